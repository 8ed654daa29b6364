"""What a vector environment itself costs: steps of environments that do nothing but hand out a picture.

    python tests/benchmarks/bench_vec_env.py --envs 16 --image-size 480

A second table shows what overlap gains where simulators and policy do not compete: both sleep.

All are run in turns, and the least time of several rounds counts, which other load disturbs least. ``SubprocVecEnv``
and ``AsyncVectorEnv`` have a process for each environment, ``SharedMemoryVecEnv`` one for each core.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_vla.envs.shared_memory import SharedMemoryVecEnv, available_cores
from sb3_vla.rollouts.stepping import Clock, Decision, step_by_halves, step_together


class Pictures(gym.Env[dict[str, npt.NDArray[Any]], npt.NDArray[np.float32]]):
    """Hands out one and the same picture, if asked to after some sleep; episodes of 32 steps."""

    action_space = spaces.Box(-1, 1, (5, 4), np.float32)

    def __init__(self, image_size: int, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": spaces.Box(-1, 1, (4,), np.float32),
            }
        )
        self.observation = self.observation_space.sample()
        self.elapsed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.elapsed = 0
        return self.observation, {}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.elapsed += 1
        if self.seconds:
            time.sleep(self.seconds)
        return self.observation, 0.0, False, self.elapsed == 32, {"env_steps": 5}


def milliseconds(step: Callable[[], Any], steps: int) -> float:
    """Of one step, on average."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps * 1e3


def in_halves(env: SharedMemoryVecEnv, actions: npt.NDArray[np.float32]) -> Callable[[], None]:
    """A step of both halves, each begun as soon as its last one has been taken."""
    parts = [actions[half] for half in env.halves]
    for half in (0, 1):
        env.step_half_async(half, parts[half])

    def step() -> None:
        for half in (0, 1):
            env.step_half_wait(half)
            env.step_half_async(half, parts[half])

    return step


def overlap(count: int, image_size: int, steps: int, rounds: int) -> Table:
    """Rollouts whose policy and whose simulators both sleep, as long for a step and half as long for half of it."""
    table = Table(title=f"Rollouts of {count} environments, {image_size} px; policy and simulators take as long")
    for column in ("ms of the policy a step", "together, ms", "by halves, ms", "ratio"):
        table.add_column(column, justify="right")
    for pause in (0.01, 0.05):
        workers = available_cores()
        makers = [functools.partial(Pictures, image_size, pause * workers / count)] * count

        def decide(observations: dict[str, npt.NDArray[Any]], pause: float = pause) -> Decision:
            time.sleep(pause * len(observations["image"]) / count)
            actions = np.zeros((len(observations["image"]), 5, 4), np.float32)
            return Decision({}, actions, actions, torch.zeros(len(actions)), {})

        env = SharedMemoryVecEnv(makers, "fork")
        observations: Any = env.reset()
        taken: dict[Any, list[float]] = {step_together: [], step_by_halves: []}
        for _ in range(rounds):
            for method, values in taken.items():
                started = time.perf_counter()
                for _ in method(env, decide, observations, steps, Clock()):
                    pass
                values.append((time.perf_counter() - started) / steps * 1e3)
        env.close()
        together, halves = (min(values) for values in taken.values())
        table.add_row(f"{pause * 1e3:.0f}", f"{together:.1f}", f"{halves:.1f}", f"{together / halves:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=480)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    makers = [functools.partial(Pictures, options.image_size)] * options.envs
    actions = np.zeros((options.envs, 5, 4), np.float32)
    ours, halves = SharedMemoryVecEnv(makers, "fork"), SharedMemoryVecEnv(makers, "fork")
    one_each = SharedMemoryVecEnv(makers, "fork", num_workers=options.envs)
    others = {
        "SB3 DummyVecEnv (no processes)": DummyVecEnv(makers),
        "SB3 SubprocVecEnv": SubprocVecEnv(makers, "fork"),
        "Gymnasium AsyncVectorEnv": gym.vector.AsyncVectorEnv(makers, context="fork"),
    }
    envs: dict[str, Any] = {
        "SharedMemoryVecEnv": ours,
        "SharedMemoryVecEnv, in halves": halves,
        "SharedMemoryVecEnv, a worker per environment": one_each,
        **others,
    }
    for env in envs.values():
        env.reset()
    steps = {name: functools.partial(env.step, actions) for name, env in envs.items()}
    steps["SharedMemoryVecEnv, in halves"] = in_halves(halves, actions)  # type: ignore[assignment]
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            taken[name].append(milliseconds(step, options.steps))
    for env in envs.values():
        env.close()

    table = Table(title=f"{options.envs} environments, {options.image_size} px, {available_cores()} cores")
    for column in ("", "ms a step", "MB/s", "ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    megabytes = options.envs * options.image_size**2 * 3 / 1e6
    for name, values in taken.items():
        least, ratio = min(values), min(values) / min(taken["SharedMemoryVecEnv"])
        table.add_row(name, f"{least:.2f}", f"{megabytes / least * 1e3:,.0f}", f"{ratio:.2f}")
    Console().print(table)
    Console().print(overlap(options.envs, options.image_size, options.steps, max(1, options.rounds // 2)))


if __name__ == "__main__":
    main()
