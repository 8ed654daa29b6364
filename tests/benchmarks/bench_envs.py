"""Environment steps per second with a picture for each decision: ours, and what public packages give, in one run.

    python tests/benchmarks/bench_envs.py                                                   about fifteen minutes
    python tests/benchmarks/bench_envs.py --sizes 480 --tasks 4 --seconds 5 --steps 40      a glance

All have two worker processes and random actions; episodes end at success or after 160 steps, and each new episode has
another of the 50 tasks. What happens once (making environments, compiling, the first visit to a task) is not counted.

**The baselines** are `Meta-World/MT1` environments in Gymnasium's ``AsyncVectorEnv``, one in each worker, and in
Stable-Baselines3's ``SubprocVecEnv``; both are asked for their pictures (MuJoCo's OpenGL, default quality) after each
step. Their only way to another task is to make another environment, which the worker does at a reset. As that is slow,
they are measured without it as well, each environment keeping one task; the ratio is to the fastest of the four. Chunks
change nothing for them, since they know none: five actions are five steps and five pictures. Who executes chunks by
hand may draw at the end of each only; this is measured, too, and has a ratio of its own.

All rows of a size are made first and then take turns, in rounds: within minutes a shared machine's speed may drift by a
third. A baseline is measured for one episode (``--steps`` vector steps) in each worker, the reset at its end included.
**Ours** settle for 15 steps after each reset, which are not counted but take their time. ``SubprocVecEnv`` has one
environment in each worker, our own vector environment several.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported, here and in the workers

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from mw_envs import TASKS
from mw_envs.rendering import renderer_available
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv

WORKERS = 2
HORIZON = 160
CHUNKS = (1, 5)
TARGET = 100.0  # times the better baseline, at 480 px with chunks of 5
_POSITION = (0.75, 0.075, 0.7)  # of the camera corner2 in the published data, meters
_SEED = 0

Actions = npt.NDArray[np.float32]


class PublicEnv(gym.Env[npt.NDArray[np.float64], Actions]):
    """`Meta-World/MT1` as a user of public packages has it: one task, or another environment for every episode.

    :param tasks: what is played, in this order, again and again.
    :param size: side of the picture, pixels.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as Gymnasium declares it)
    render_mode = "rgb_array"
    # The goal's bounds differ between tasks, and vector environments want one space for all.
    observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def __init__(self, tasks: Sequence[str], size: int) -> None:
        self._tasks, self._size, self._episode = tasks, size, 0
        self._task = ""
        self._env: gym.Env[Any, Any] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        task = self._tasks[self._episode % len(self._tasks)]
        self._episode += 1
        if self._env is None or task != self._task:
            self.close()
            self._task, self._env = task, self._made(task)
        return self._env.reset(seed=seed, options=options)

    def _made(self, task: str) -> gym.Env[Any, Any]:
        import metaworld  # noqa: F401 (registers its environments)

        env = gym.make(
            "Meta-World/MT1",
            env_name=task,
            seed=_SEED,
            max_episode_steps=HORIZON,
            terminate_on_success=True,
            render_mode="rgb_array",
            camera_name="corner2",
            width=self._size,
            height=self._size,
            disable_env_checker=True,
        )
        sawyer: Any = env.unwrapped
        sawyer.model.cam_pos[sawyer.model.camera("corner2").id] = _POSITION
        return env

    def step(self, action: Actions) -> tuple[npt.NDArray[np.float64], Any, bool, bool, dict[str, Any]]:
        assert self._env is not None
        return self._env.step(action)

    def render(self) -> Any:
        assert self._env is not None
        return self._env.render()

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def public_envs(tasks: Sequence[str], size: int, task_changes: bool) -> list[Callable[[], gym.Env[Any, Any]]]:
    """One for each worker, with its share of the tasks."""
    order = [str(task) for task in np.random.default_rng(_SEED).permutation(tasks)]
    shares = [order[worker::WORKERS] for worker in range(WORKERS)]
    return [partial(PublicEnv, share if task_changes else share[:1], size) for share in shares]


def random_actions(shape: tuple[int, ...]) -> Iterator[Actions]:
    generator = np.random.default_rng(_SEED)
    while True:
        yield generator.uniform(-1, 1, shape).astype(np.float32)


# Environment steps and seconds of one share of a row; the first one is nothing, when all is ready.
Row = Generator[tuple[int, float], None, None]


def gymnasium_row(tasks: Sequence[str], size: int, task_changes: bool, steps: int, steps_a_picture: int) -> Row:
    """Gymnasium's vector environment, some vector steps at a time."""
    envs = AsyncVectorEnv(
        public_envs(tasks, size, task_changes), context="forkserver", autoreset_mode=AutoresetMode.SAME_STEP
    )
    try:
        envs.reset(seed=_SEED)
        _check(envs.render(), size)
        yield from _public_row(envs.step, envs.render, steps, steps_a_picture)
    finally:
        envs.close()


def sb3_row(tasks: Sequence[str], size: int, task_changes: bool, steps: int, steps_a_picture: int) -> Row:
    """Stable-Baselines3's vector environment, some vector steps at a time."""
    envs = SubprocVecEnv(public_envs(tasks, size, task_changes))
    try:
        envs.seed(_SEED)
        envs.reset()
        _check(envs.get_images(), size)
        yield from _public_row(envs.step, envs.get_images, steps, steps_a_picture)
    finally:
        envs.close()


def _public_row(step: Callable[[Any], Any], draw: Callable[[], Any], steps: int, steps_a_picture: int) -> Row:
    actions = random_actions((WORKERS, 4))
    yield 0, 0.0
    number = 0
    while True:
        start = time.perf_counter()
        for _ in range(steps):
            step(next(actions))
            number += 1
            if number % steps_a_picture == 0:
                draw()
        yield WORKERS * steps, time.perf_counter() - start


def _check(pictures: Any, size: int) -> None:
    shapes = [np.shape(picture) for picture in pictures]
    if shapes != WORKERS * [(size, size, 3)]:
        raise RuntimeError(f"The baseline drew pictures of shapes {shapes}; expected side {size}")


def our_row(kind: type[VecEnv], tasks: Sequence[str], size: int, chunk: int, envs_a_worker: int, seconds: float) -> Row:
    """Our environments, some seconds at a time."""
    make = partial(
        gym.make, "mw_envs:MetaWorldMT50-v0", tasks=tasks, image_size=size, action_chunk=chunk, horizon=HORIZON
    )
    number = WORKERS * envs_a_worker
    options = {} if kind is SubprocVecEnv else {"num_workers": WORKERS}
    envs = kind(number * [make], **options)  # type: ignore[call-arg, arg-type]
    try:
        envs.seed(_SEED)
        for visit in range(len(tasks)):  # each environment sees each task
            envs.set_options([{"task": tasks[(i - visit) % len(tasks)]} for i in range(number)])
            envs.reset()
        actions = random_actions((number, *envs.action_space.shape))  # type: ignore[misc]
        envs.reset()
        yield 0, 0.0
        while True:
            if isinstance(envs, SharedMemoryVecEnv):
                yield _by_halves(envs, actions, seconds)
            else:
                yield _in_lockstep(envs, actions, seconds)
    finally:
        envs.close()


def _in_lockstep(envs: VecEnv, actions: Iterator[Actions], seconds: float) -> tuple[int, float]:
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        _, _, _, infos = envs.step(next(actions))
        steps += sum(info["env_steps"] for info in infos)
    return steps, elapsed


def _by_halves(envs: SharedMemoryVecEnv, actions: Iterator[Actions], seconds: float) -> tuple[int, float]:
    """One half gets its actions while the other one is simulated, as in a rollout with ``overlap=True``."""
    halves = envs.halves
    for half, members in enumerate(halves):
        envs.step_half_async(half, next(actions)[members])
    steps, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < seconds:
        for half, members in enumerate(halves):
            _, _, _, infos = envs.step_half_wait(half)
            steps += sum(info["env_steps"] for info in infos)
            envs.step_half_async(half, next(actions)[members])
        elapsed = time.perf_counter() - start
    for half in range(2):
        envs.step_half_wait(half)
    return steps, elapsed


def measured(rows: dict[str, Row], rounds: int) -> dict[str, list[tuple[int, float]]]:
    """Environment steps and seconds of each row in each round.

    The rows take turns, for the speed of a machine may drift by a third within minutes.
    """
    try:
        for row in rows.values():
            next(row)
        shares: dict[str, list[tuple[int, float]]] = {name: [] for name in rows}
        for number in range(1, rounds + 1):
            for name, row in rows.items():
                shares[name].append(next(row))
                steps, seconds = shares[name][-1]
                print(f"  round {number} of {rounds}: {name}: {steps / seconds:.1f}", file=sys.stderr, flush=True)
        return shares
    finally:
        for row in rows.values():
            row.close()


def rate_of(shares: list[tuple[int, float]]) -> float:
    """Environment steps per second."""
    return sum(steps for steps, _ in shares) / sum(seconds for _, seconds in shares)


def _print_machine(opengl: str | None) -> None:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("metaworld", "mujoco", "gymnasium", "stable-baselines3", "numpy", "numba")
    print(f"{cpu}, {os.cpu_count()} cores; OpenGL: {opengl or 'none, so no baselines'}")
    print(f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[480, 224, 96], help="sides of the picture, pixels")
    parser.add_argument("--tasks", type=int, default=len(TASKS), metavar="N", help="of the 50, at even distances")
    parser.add_argument("--seconds", type=float, default=15.0, help="measured for each row of ours")
    parser.add_argument("--steps", type=int, default=HORIZON, help="vector steps of each baseline, reset at the last")
    parser.add_argument("--rounds", type=int, default=4, help="in which all rows take turns")
    parser.add_argument("--envs", type=int, default=8, help="environments in a worker of our own vector environment")
    options = parser.parse_args()
    if not WORKERS <= options.tasks <= len(TASKS):
        parser.error(f"--tasks {options.tasks}; expected {WORKERS} to {len(TASKS)}")
    if options.rounds < 1 or options.steps % options.rounds:
        parser.error(f"--rounds {options.rounds}; expected a divisor of --steps {options.steps}")
    tasks = [list(TASKS)[i * len(TASKS) // options.tasks] for i in range(options.tasks)]
    opengl = next((kind for kind in ("egl", "osmesa") if renderer_available(kind)), None)
    if opengl is not None:
        os.environ["MUJOCO_GL"] = opengl  # for the workers
    _print_machine(opengl)
    print(f"environment steps/s, {WORKERS} workers, {len(tasks)} tasks; ratio to the best that draws each step [chunk]")

    for size in options.sizes:
        public, ours = _rows(tasks, size, opengl is not None, options)
        rows = {name: row for some in (*public.values(), *ours.values()) for name, row in some.items()}
        _print_rates(size, public, ours, measured(rows, options.rounds))


Rows = dict[int, dict[str, Row]]  # by steps a picture, or actions a chunk, and by name


def _rows(tasks: Sequence[str], size: int, opengl: bool, options: argparse.Namespace) -> tuple[Rows, Rows]:
    """The baselines and ours."""
    steps, seconds = options.steps // options.rounds, options.seconds / options.rounds
    public: Rows = {every: {} for every in CHUNKS}
    ours: Rows = {chunk: {} for chunk in CHUNKS}
    for every in CHUNKS if opengl else ():
        for name, row in (("Gymnasium AsyncVectorEnv", gymnasium_row), ("SB3 SubprocVecEnv", sb3_row)):
            for changes in (True, False):
                how = f"{name}, {'' if changes else 'no '}task changes, a picture every {every}"
                public[every][how] = row(tasks, size, changes, steps, every)
    for chunk in CHUNKS:
        for kind, envs in ((SubprocVecEnv, 1), (SharedMemoryVecEnv, options.envs)):
            name = f"ours in {'SB3 ' if kind is SubprocVecEnv else ''}{kind.__name__}, chunk {chunk}"
            ours[chunk][name] = our_row(kind, tasks, size, chunk, envs, seconds)
    return public, ours


def _print_rates(size: int, public: Rows, ours: Rows, shares: dict[str, list[tuple[int, float]]]) -> None:
    rates = {name: rate_of(found) for name, found in shares.items()}
    best = {every: max(rows, key=rates.__getitem__) for every, rows in public.items() if rows}
    for rows in public.values():
        for name in rows:
            print(f"{size:4} px  {name:66}{rates[name]:8.1f}")
    for chunk, rows in ours.items():
        for name in rows:
            line = f"{size:4} px  {name:66}{rates[name]:8.1f}"
            if best:
                line += f"{rates[name] / rates[best[1]]:8.1f}x [{rates[name] / rates[best[chunk]]:.1f}x]"
            print(line)
    if best and size == 480:
        fastest = max(ours[5], key=rates.__getitem__)
        ratio = rates[fastest] / rates[best[1]]
        each = [a / b for a, b in zip(_each(shares[fastest]), _each(shares[best[1]]), strict=True)]
        print(
            f"target >= {TARGET:g}x at 480 px, chunk 5: {'met' if ratio >= TARGET else 'MISSED'}, {ratio:.0f}x "
            f"(rounds: {min(each):.0f}x to {max(each):.0f}x; the baseline's resets are in the last)"
        )


def _each(shares: list[tuple[int, float]]) -> list[float]:
    return [steps / seconds for steps, seconds in shares]


if __name__ == "__main__":
    main()
