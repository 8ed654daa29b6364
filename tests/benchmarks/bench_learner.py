"""What PPO itself costs beside stable_baselines3.PPO: the same network, batch and data, learning in turns.

    python tests/benchmarks/bench_learner.py --envs 16 --image-size 96
    python tests/benchmarks/bench_learner.py --against 3939af5

The environments hand out pictures that were drawn before, so a rollout is the learner's own work. On a CPU the
processor's time counts, which other load disturbs less than the clock's; a ratio is the median of those of neighbors
in time, since a machine's speed drifts by more than what is measured. The first table has the memory of a rollout
beside its payload, each buffer in a process of its own: the peak of resident memory while a rollout is stored and all
of its minibatches are read twice.

``--against`` compares CompactVLA's steps with those of another commit instead, in turns: imitation of 128 frames, an
update of 512 decisions with a frozen backbone, and an iteration of the quickstart's PPO with its environments, by the
clock.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import stable_baselines3
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from mw_envs import encode_instruction
from sb3_vla import PPO
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer


class Pictures(gym.Env[dict[str, npt.NDArray[Any]], npt.NDArray[np.float32]]):
    """Hands out a few random pictures in turn; episodes of 20 decisions, a reward that depends on the action."""

    action_space = spaces.Box(-1, 1, (5, 4), np.float32)

    def __init__(self, image_size: int) -> None:
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": spaces.Box(-1, 1, (4,), np.float32),
                "instruction": spaces.Box(0, 255, (64,), np.uint8),
            }
        )
        self.observation_space.seed(0)
        sentence = {"instruction": encode_instruction("Reach a goal position")}
        self.observations = [{**self.observation_space.sample(), **sentence} for _ in range(4)]
        self.elapsed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.elapsed = 0
        return self.observations[0], {}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.elapsed += 1
        observation = self.observations[self.elapsed % 4]
        return observation, float(action[0, 0]), self.elapsed == 20, False, {"env_steps": 5}


class Timed:
    """An algorithm whose rollouts and updates are timed; both algorithms learn by the same two calls."""

    def __init__(
        self,
        algorithm_class: type[stable_baselines3.PPO],
        options: argparse.Namespace,
        epochs: int,
        policy_kwargs: dict[str, Any] | None = None,
    ) -> None:
        env = DummyVecEnv([functools.partial(Pictures, options.image_size)] * options.envs)
        self.algorithm = algorithm_class(
            "VLAPolicy",
            env,
            n_steps=options.decisions,
            batch_size=options.batch_size,
            n_epochs=epochs,
            seed=0,
            device=options.device,
            policy_kwargs=policy_kwargs,
        )
        self.seconds: dict[str, list[float]] = {"rollout": [], "update": []}
        self._time("collect_rollouts", "rollout")
        self._time("train", "update")

    def _time(self, method: str, kind: str) -> None:
        real = getattr(self.algorithm, method)

        clock = time.process_time if self.algorithm.device.type == "cpu" else time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = clock()
            result = real(*args, **kwargs)
            self.seconds[kind].append(clock() - started)
            return result

        setattr(self.algorithm, method, timed)

    def learn(self) -> None:
        self.algorithm.learn(self.algorithm.n_steps * self.algorithm.n_envs, reset_num_timesteps=False)

    def measured(self) -> dict[str, npt.NDArray[np.float64]]:
        """Seconds of each part, round by round; the first one warms up."""
        parts = {kind: np.array(seconds[1:]) for kind, seconds in self.seconds.items()}
        return {**parts, "both": parts["rollout"] + parts["update"]}


def learning(options: argparse.Namespace) -> Table:
    table = Table(
        title=f"{options.envs} environments x {options.decisions} decisions, {options.image_size} px, minibatches of "
        f"{options.batch_size}, CompactVLA, {options.device}, {torch.get_num_threads()} thread(s); medians of "
        f"{options.rounds} rounds"
    )
    for column in ("epochs", "", "SB3 PPO, s", "sb3_vla PPO, s", "ratio"):
        table.add_column(column, justify="right")
    for epochs in options.epochs:
        theirs, ours = (Timed(cls, options, epochs) for cls in (stable_baselines3.PPO, PPO))
        for _ in range(options.rounds + 1):
            theirs.learn()
            ours.learn()
        mine = ours.measured()
        for kind, stock in theirs.measured().items():
            ratio = np.median(mine[kind] / stock)
            table.add_row(str(epochs), kind, f"{np.median(stock):.2f}", f"{np.median(mine[kind]):.2f}", f"{ratio:.3f}")
    return table


def _peak(reset: bool = False) -> int:
    """Peak of this process's resident memory since the last reset, bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _measured(stock: bool, envs: int, decisions: int, image_size: int, batch_size: int, found: Any) -> None:
    _store_and_read(stock, _observation(envs, 32), 2, batch_size)  # what a first use loads is not the buffer's
    observation = _observation(envs, image_size)
    before = _peak(reset=True)
    _store_and_read(stock, observation, decisions, batch_size)
    found.put(_peak() - before)


def _observation(envs: int, image_size: int) -> dict[str, npt.NDArray[Any]]:
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (envs, 3, image_size, image_size), np.uint8),
        "state": generator.normal(size=(envs, 4)).astype(np.float32),
        "instruction": generator.integers(0, 256, (envs, 64), np.uint8),
    }


def _store_and_read(stock: bool, observation: dict[str, npt.NDArray[Any]], decisions: int, batch_size: int) -> None:
    envs = len(observation["image"])
    action = np.zeros((envs, 5, 4), np.float32)
    tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    zeros, values = np.zeros(envs), torch.zeros(envs)
    theirs: Any = None
    if stock:
        observed: dict[str, spaces.Space] = {
            key: spaces.Box(0, 255, value.shape[1:], value.dtype)  # type: ignore[arg-type]
            for key, value in observation.items()
        }
        actions = spaces.Box(-1, 1, (5, 4))
        theirs = DictRolloutBuffer(decisions, spaces.Dict(observed), actions, "cpu", n_envs=envs)  # type: ignore[arg-type]
    ours = ChunkRolloutBuffer(decisions, envs, torch.device("cpu"), 0.99, 0.95)
    for _ in range(decisions):
        if stock:
            theirs.add(observation, action, zeros, zeros, values, values)
        else:
            ours.add(tensors, {"action": torch.from_numpy(action)}, values, zeros, np.full(envs, 5), zeros)
    (theirs if stock else ours).compute_returns_and_advantage(values, zeros)
    for _ in range(2):
        for batch in theirs.get(batch_size) if stock else map(ours.batch, ours.minibatches(batch_size)):
            assert batch.observations["image"].shape[1] == 3
            del batch


def memory(options: argparse.Namespace) -> Table:
    table = Table(title="Memory of a rollout, 64 environments x 20 decisions, minibatches of 64")
    for column in ("pixels", "payload, MB", "SB3, MB", "sb3_vla, MB", "SB3 / payload", "sb3_vla / payload"):
        table.add_column(column, justify="right")
    # Else the allocator keeps freed minibatches, now more and now fewer, for both buffers alike.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    for image_size in options.memory_pixels:
        # Pictures, states, words, actions, and seven numbers of four bytes: a decision's own.
        payload = 64 * 20 * (3 * image_size**2 + 4 * 4 + 64 + 20 * 4 + 7 * 4)
        peaks = []
        for stock in (True, False):
            found = context.Queue()
            process = context.Process(target=_measured, args=(stock, 64, 20, image_size, 64, found))
            process.start()
            peaks.append(found.get())
            process.join()
        ratios = [f"{peak / payload:.2f}" for peak in peaks]
        table.add_row(str(image_size), f"{payload / 1e6:.0f}", *(f"{peak / 1e6:.0f}" for peak in peaks), *ratios)
    return table


def _serve() -> None:
    """Do what standard input names, line by line, and say how many seconds it took: for :func:`against`."""
    steps = {"imitation": _imitation(), "update": _update(), "iteration": _iteration()}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(steps[line.strip()]()), flush=True)


def _imitation(frames: int = 1000, steps: int = 12) -> Any:
    from sb3_vla.data.demonstrations import Demonstrations
    from sb3_vla.sft.imitation import sft
    from sb3_vla.sft.settings import SFTConfig

    generator = np.random.default_rng(0)
    index = np.zeros(frames, np.int64)
    data = Demonstrations(
        images=generator.integers(0, 256, (frames, 96, 96, 3), np.uint8),
        states=generator.normal(size=(frames, 4)).astype(np.float32),
        actions=generator.uniform(-1, 1, (frames, 4)).astype(np.float32),
        instructions=["Reach a goal position"],
        instruction_index=index,
        tasks=["reach-v3"],
        episode_index=index,
        frame_index=np.arange(frames),
        episode_starts=np.array([0]),
        episode_ends=np.array([frames]),
        trials=[None],
        camera={"camera": "corner2", "crop": "workspace"},
    )

    def step() -> float:
        ends: list[float] = []
        sft(
            data,
            SFTConfig(steps=steps, validation_fraction=0.0),
            progress=False,
            on_step=lambda _: ends.append(time.process_time()),
        )
        return float(np.median(np.diff(ends)))

    return step


def _update(epochs: int = 4) -> Any:
    options = argparse.Namespace(envs=16, image_size=96, decisions=32, batch_size=512, device="cpu")
    timed = Timed(PPO, options, epochs, {"trainable": "expert"})

    def step() -> float:
        timed.learn()
        return timed.seconds["update"][-1] / epochs

    return step


def _iteration() -> Any:
    from sb3_vla.envs.shared_memory import SharedMemoryVecEnv

    num_envs, n_steps = 16, 128
    make = functools.partial(
        gym.make, "mw_envs:MetaWorldMT10-v0", image_size=96, crop="workspace", action_chunk=5, horizon=160,
        privileged_state=True, elapsed_time=True,
    )  # fmt: skip
    env = SharedMemoryVecEnv([make] * num_envs)
    algorithm = PPO(
        "VLAPolicy", env, 5e-5, n_steps, 512, 4, target_kl=0.03, vf_coef=1.0, seed=0, value_lr=5e-4, critic_warmup=2,
        bootstrap_truncated=False, policy_kwargs={"trainable": "expert"},
    )  # fmt: skip

    def step() -> float:
        started = time.perf_counter()
        algorithm.learn(num_envs * n_steps, reset_num_timesteps=False)
        return time.perf_counter() - started

    return step


def against(revision: str, rounds: int, threads: int) -> Table:
    """CompactVLA's steps at another commit and here."""
    root = Path(__file__).parents[2]
    table = Table(
        title=f"CompactVLA beside {revision}, bf16 where it pays, {threads} thread(s), {rounds} rounds in turns"
    )
    for column in ("", f"{revision}, s", "here, s", "times faster"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["git", "-C", root, "worktree", "add", "--detach", folder, revision], check=True, capture_output=True
        )
        servers = []
        try:
            for tree in (Path(folder), root):
                variables = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
                command = [sys.executable, __file__, "--serve"]
                pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                servers.append(subprocess.Popen(command, env=variables, **pipes))
                _answer(servers[-1])
            for name in ("imitation", "update", "iteration"):
                found = np.array([[_answer(server, name) for server in servers] for _ in range(rounds + 1)])[1:]
                before, here = np.median(found, axis=0)
                table.add_row(name, f"{before:.3f}", f"{here:.3f}", f"{np.median(found[:, 0] / found[:, 1]):.2f}")
        finally:
            for server in servers:
                server.kill()
            subprocess.run(["git", "-C", root, "worktree", "remove", "--force", folder], check=True)
    return table


def _answer(server: subprocess.Popen[str], name: str | None = None) -> Any:
    assert server.stdin is not None and server.stdout is not None
    if name is not None:
        server.stdin.write(f"{name}\n")
        server.stdin.flush()
    while True:  # other lines are what is said on the way
        line = server.stdout.readline()
        if not line:
            raise RuntimeError("a server of another commit ended")
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--decisions", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-pixels", type=int, nargs="*", default=[96, 224, 480])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", metavar="REVISION", help="compare with another commit instead")
    parser.add_argument("--threads", type=int, default=1, help="of either, with --against")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return _serve()
    if options.against:
        return Console().print(against(options.against, options.rounds, options.threads))
    Console().print(memory(options))
    Console().print(learning(options))


if __name__ == "__main__":
    main()
