"""What more ranks and overlap bring.

    python tests/benchmarks/bench_scaling.py                  # one rank and two, the same on Ray, and overlap
    python tests/benchmarks/bench_scaling.py --ranks 1 2 4 8 --device cuda --step-ms 50

**Ranks.** The same training, PPO of CompactVLA with the same environments in all and the same minibatches, by one rank
and by several under torchrun. An environment sleeps instead of simulating, as if each had a core of its own: what
scales is the learner, and on a machine with fewer cores than ranks the learner cannot. The last column is the time in
which a gradient of the size is summed over the ranks. Rows of Ray have as many learners on a cluster of this machine,
each with an actor of environments and a copy of the policy that decides: what those cost shows against torchrun's rows.

**Overlap.** Policy and simulator sleep, T_policy a decision of all environments and T_env a step, so that the clock
shows how rollouts are arranged and nothing else. One half of the environments simulates while the policy decides for
the other (``pipeline_stage_num=2``): an iteration should fall from T_env + T_policy towards max(T_env, T_policy).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from mw_envs import encode_instruction
from sb3_vla import PPO, SharedMemoryVecEnv
from sb3_vla.distributed.ranks import current_ranks, torchrun
from sb3_vla.ray import ClusterOptions
from sb3_vla.ray.connection import connected
from sb3_vla.ray.learners import run_learners
from sb3_vla.ray.resources import ClusterResources
from sb3_vla.rollouts.stepping import Clock, Decision, step_by_halves, step_together


class Sleeper(gym.Env[dict[str, npt.NDArray[Any]], npt.NDArray[np.float32]]):
    """Shows one random picture, and sleeps for a step; a reward that depends on the action.

    :param seconds: of a step.
    """

    action_space = spaces.Box(-1, 1, (5, 4), np.float32)

    def __init__(self, image_size: int, seconds: float = 0.0) -> None:
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": spaces.Box(-1, 1, (4,), np.float32),
                "instruction": spaces.Box(0, 255, (64,), np.uint8),
            }
        )
        self.observation_space.seed(0)
        sentence = {"instruction": encode_instruction("Reach a goal position")}
        self.observation = {**self.observation_space.sample(), **sentence}
        self.seconds, self.elapsed = seconds, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.elapsed = 0
        return self.observation, {}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self.seconds)
        self.elapsed += 1
        return self.observation, float(action[0, 0]), self.elapsed == 20, False, {"env_steps": 5}


class SleepersSideBySide(DummyVecEnv):
    """Environments that sleep at the same time, as if each had a core of its own.

    :param seconds: of a step of all.
    """

    def __init__(self, count: int, image_size: int, seconds: float) -> None:
        super().__init__([functools.partial(Sleeper, image_size)] * count)
        self.seconds = seconds

    def step_wait(self) -> VecEnvStepReturn:
        time.sleep(self.seconds)
        return super().step_wait()


def train_as_rank(options: argparse.Namespace, resources: ClusterResources | None = None) -> dict[str, float]:
    """What each rank does.

    :param resources: of a learner on a cluster.
    :return: seconds of a rollout, of an update, and of the sum of a gradient.
    """
    count = len(current_ranks().share(options.envs, "envs"))
    seconds_of_step = options.step_ms / 1000
    if resources is None:
        env: Any = SleepersSideBySide(count, options.image_size, seconds_of_step)
    else:  # an actor steps its environments one after the other
        env = resources.envs([functools.partial(Sleeper, options.image_size, seconds_of_step / count)] * count, None)
    try:
        algorithm = PPO(
            "VLAPolicy",
            env,
            n_steps=options.decisions,
            batch_size=options.batch_size,
            n_epochs=options.epochs,
            seed=0,
            device=options.device,
        )
        if resources is not None:
            algorithm.replicas = resources.replicas(algorithm.policy)
        seconds: dict[str, list[float]] = {"rollout": [], "update": []}
        for _ in range(options.rounds + 1):
            algorithm.learn(options.decisions * options.envs, log_interval=1000, reset_num_timesteps=False)
            for kind in seconds:
                seconds[kind].append(float(algorithm.logger.name_to_value[f"time/{kind}_seconds"]))
        found = {kind: min(times[1:]) for kind, times in seconds.items()}  # the first one warms up
        return {**found, "sum": _seconds_of_a_sum(algorithm)}
    finally:
        env.close()
        if resources is not None:
            resources.leave()


def measure(options: argparse.Namespace) -> None:
    """Print what :func:`train_as_rank` finds as JSON, of ranks of torchrun or of learners on Ray."""
    if options.as_learners is None:
        with torchrun() as ranks:
            found = train_as_rank(options)
            if ranks.leads:
                print(json.dumps(found))
        return
    processes = f"0:0-{options.as_learners - 1}"
    cluster_options = ClusterOptions(1, {"actor,env,rollout": processes})
    with connected(cluster_options) as cluster:
        print(json.dumps(run_learners(cluster, cluster_options, functools.partial(train_as_rank, options))))


def _seconds_of_a_sum(algorithm: PPO, repeats: int = 10) -> float:
    parameters = [parameter for parameter in algorithm.policy.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    times = []
    for _ in range(repeats):
        current_ranks().wait()
        if algorithm.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        current_ranks().sum_gradients(parameters, {"loss": 0.0})
        if algorithm.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def ranks_table(options: argparse.Namespace) -> Table:
    table = Table(
        title=f"{options.envs} environments x {options.decisions} decisions, a step {options.step_ms:g} ms, "
        f"{options.image_size} px, minibatches of {options.batch_size}, {options.epochs} epochs, CompactVLA, "
        f"{options.device}, {os.cpu_count()} cores; least of {options.rounds}"
    )
    for column in (
        "started by",
        "ranks",
        "rollout, s",
        "update, s",
        "both, s",
        "speed-up",
        "efficiency",
        "sum of gradients, ms",
    ):
        table.add_column(column, justify="right")
    first: float | None = None
    for starter, count in [*(("torchrun", count) for count in options.ranks), *(("Ray", n) for n in options.learners)]:
        launcher: list[str] = []
        if starter == "torchrun" and count > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        role = ["--as-rank"] if starter == "torchrun" else ["--as-learners", str(count)]
        command = [sys.executable, *launcher, __file__, *sys.argv[1:], *role]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr}")
        found = json.loads(next(line for line in reversed(run.stdout.splitlines()) if line.startswith("{")))
        both = found["rollout"] + found["update"]
        first = both * count if first is None else first
        table.add_row(
            starter,
            str(count),
            *(f"{value:.2f}" for value in (found["rollout"], found["update"], both, first / both)),
            f"{first / both / count:.0%}",
            f"{1000 * found['sum']:.1f}",
        )
    return table


def overlap_table(options: argparse.Namespace) -> Table:
    count = 4
    table = Table(title=f"Overlap of sleeping policy and simulator, ms per decision of {count} environments")
    for column in ("T_env", "T_policy", "together", "by halves", "max", "shortened by", "possible"):
        table.add_column(column, justify="right")
    for env_ms, policy_ms in options.overlap_ms:
        # Half the environments take half the policy's time, and with a core for each no less of the simulator's.
        env = SharedMemoryVecEnv(
            [functools.partial(Sleeper, 16, env_ms / 1000 / 2)] * count, num_workers=count // 2, start_method="fork"
        )
        try:
            together, halves = (
                1000 * _seconds_per_decision(env, steps, policy_ms / 1000, options.overlap_decisions)
                for steps in (step_together, step_by_halves)
            )
        finally:
            env.close()
        possible = 1 - max(env_ms, policy_ms) / (env_ms + policy_ms)
        cells = (env_ms, policy_ms, together, halves, max(env_ms, policy_ms))
        table.add_row(*(f"{cell:.1f}" for cell in cells), f"{1 - halves / together:.0%}", f"{possible:.0%}")
    return table


def _seconds_per_decision(env: SharedMemoryVecEnv, steps: Any, policy_seconds: float, decisions: int) -> float:
    def decide(observations: dict[str, npt.NDArray[Any]]) -> Decision:
        count = len(observations["state"])
        time.sleep(policy_seconds * count / env.num_envs)
        actions = np.zeros((count, 5, 4), np.float32)
        return Decision({}, actions, actions, torch.zeros(count), {})

    observations = env.reset()
    started = time.perf_counter()
    for _ in steps(env, decide, observations, decisions, Clock()):
        pass
    return (time.perf_counter() - started) / decisions


def _pair(text: str) -> Sequence[float]:
    env_ms, policy_ms = map(float, text.split(","))
    return env_ms, policy_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--learners", type=int, nargs="*", default=[1, 2] if find_spec("ray") else [])
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--decisions", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=20.0, help="of a step of all environments")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--overlap-ms", type=_pair, nargs="*", metavar="T_ENV,T_POLICY",
                        default=[(40, 40), (40, 20), (20, 40), (40, 5)])  # fmt: skip
    parser.add_argument("--overlap-decisions", type=int, default=30)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-learners", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank or options.as_learners is not None:
        measure(options)
        return
    if options.ranks or options.learners:
        Console().print(ranks_table(options))
    if options.overlap_ms:
        Console().print(overlap_table(options))


if __name__ == "__main__":
    main()
