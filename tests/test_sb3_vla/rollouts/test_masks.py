"""Masks, returns and advantages of a rollout in MetaWorld's environment against a table worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import toy_ppo

import mw_envs.env
from mw_envs import Trial
from mw_envs.env import MetaWorldEnv
from sb3_vla.distributions.base import logprob_mask
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer

HORIZON, CHUNK = 12, 5


class Scripted:
    """A simulator that succeeds at certain steps, counted from the reset."""

    model = data = scene = None

    def __init__(self, task: str, success_at: set[int]) -> None:
        self.task, self.success_at, self.steps = task, success_at, 0

    def place(self, trial: Trial) -> npt.NDArray[np.float64]:
        self.steps = 0
        return np.ones(39)

    def step(
        self, action: npt.NDArray[np.float32], reward_wanted: bool = True
    ) -> tuple[npt.NDArray[np.float64], float, bool]:
        self.steps += 1
        return np.ones(39), 0.0 if reward_wanted else np.nan, self.steps in self.success_at


class DyingWorker(DummyVecEnv):
    """The worker of one environment dies in a step of it, and is replaced, as SharedMemoryVecEnv has it."""

    def __init__(self, makers: list[Callable[[], Any]], number: int, step: int) -> None:
        super().__init__(makers)
        self.number, self.left = number, step

    def step_wait(self) -> Any:
        before = {key: value[self.number].copy() for key, value in self.buf_obs.items()}
        observations, rewards, dones, infos = super().step_wait()
        self.left -= 1
        if self.left == 0:
            i = self.number
            observation, _ = self.envs[i].reset()
            self._save_obs(i, observation)
            observations = self._obs_from_buf()
            rewards[i], dones[i] = 0.0, True
            infos[i] = {"worker_restarted": True, "env_steps": 0, "TimeLimit.truncated": True}
            infos[i]["terminal_observation"] = before
        return observations, rewards, dones, infos


# Chunks of 5 in episodes of at most 12 steps; a value is 2 + 0.1 * (steps since the reset): 2, 2.5, 3, and 3.2 at the
# limit. gamma = lambda = 1/2. What success at some steps, ending the episode or not, gives in four decisions:
CASES: dict[str, tuple[set[int], bool]] = {
    "inside a chunk, then lost, the episode ends": ({3}, True),
    "inside a chunk, then lost and won again, the episode goes on": ({3, 8}, False),
    "at the very last step": ({12}, True),
    "never: time-out": (set(), True),
    "never, and the worker dies in the second decision": (set(), True),
}
EXECUTED = [[3, 3, 3, 3], [5, 5, 2, 5], [5, 5, 2, 5], [5, 5, 2, 5], [5, 0, 5, 5]]
# A time-out earns 1/2 * 3.2, the dead worker's decision all of the value before it, 2.5.
REWARDS = [[1, 1, 1, 1], [1, 0, 1.6, 1], [0, 0, 1, 0], [0, 0, 1.6, 0], [0, 2.5, 0, 0]]
VALUES = [[2, 2, 2, 2], [2, 2.5, 3, 2], [2, 2.5, 3, 2], [2, 2.5, 3, 2], [2, 2.5, 2, 2.5]]
# reward + 1/2 next value - value, where no episode ended
DELTAS = [
    [1 - 2, 1 - 2, 1 - 2, 1 - 2],
    [1 + 1.25 - 2, 0 + 1.5 - 2.5, 1.6 - 3, 1 + 1.25 - 2],
    [0 + 1.25 - 2, 0 + 1.5 - 2.5, 1 - 3, 0 + 1.25 - 2],
    [0 + 1.25 - 2, 0 + 1.5 - 2.5, 1.6 - 3, 0 + 1.25 - 2],
    [0 + 1.25 - 2, 2.5 - 2.5, 0 + 1.25 - 2, 0 + 1.5 - 2.5],
]
# delta + 1/4 next advantage, where no episode ended
ADVANTAGES = [
    [-1, -1, -1, -1],
    [-0.0875, -1.35, -1.4, 0.25],
    [-1.125, -1.5, -2, -0.75],
    [-1.0875, -1.35, -1.4, -0.75],
    [-0.75, 0, -1, -1],
]
RETURNS = [[1, 1, 1, 1], [1.9125, 1.15, 1.6, 2.25], [0.875, 1, 1, 1.25], [0.9125, 1.15, 1.6, 1.25], [1.25, 2.5, 1, 1.5]]


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> ChunkRolloutBuffer:
    """A rollout of the cases, each in an environment of its own."""
    scripts = iter([success_at for success_at, _ in CASES.values()])
    monkeypatch.setattr(mw_envs.env, "acquire_simulator", lambda task: Scripted(task, next(scripts)))
    monkeypatch.setattr(mw_envs.env, "release_simulator", lambda simulator: None)
    monkeypatch.setattr(MetaWorldEnv, "_draw", lambda self, view: np.zeros((view.height, view.width, 3), np.uint8))

    def maker(ends: bool) -> Callable[[], MetaWorldEnv]:
        options: dict[str, Any] = {"horizon": HORIZON, "settle_steps": 0, "image_size": 32, "elapsed_time": True}
        return lambda: MetaWorldEnv("MT1", task="reach-v3", action_chunk=CHUNK, terminate_on_success=ends, **options)

    env = DyingWorker([maker(ends) for _, ends in CASES.values()], number=4, step=2)
    algorithm = toy_ppo(env, n_steps=4, batch_size=20, gamma=0.5, gae_lambda=0.5, learning_rate=0.0)
    algorithm.policy._values = lambda context, obs: 2 + HORIZON / 10 * obs["elapsed_time"][:, 0]
    algorithm.learn(20)
    found: Any = algorithm.rollout_buffer
    return found


def test_masks(buffer: ChunkRolloutBuffer) -> None:
    assert buffer.executed.tolist() == EXECUTED
    mask = logprob_mask("action", buffer.executed.flatten(), torch.zeros(20, CHUNK)).reshape(5, 4, CHUNK)
    assert mask[0].tolist() == [[1, 1, 1, 0, 0]] * 4
    assert mask[3].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert mask[4, 1].tolist() == [0, 0, 0, 0, 0]
    # The dead worker's decision is no sample.
    assert sorted(torch.cat(buffer.minibatches(7)).tolist()) == [i for i in range(20) if i != 4 * 4 + 1]


def test_rewards_values_and_ends(buffer: ChunkRolloutBuffer) -> None:
    for found, expected in ((buffer.rewards, REWARDS), (buffer.values, VALUES)):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    # A decision is the first of an episode where the one before ended it.
    starts = [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]]
    assert buffer.episode_starts.tolist() == starts


def test_advantages_and_returns(buffer: ChunkRolloutBuffer) -> None:
    for found, expected in (
        (buffer.advantages, ADVANTAGES),
        (buffer.returns, RETURNS),
    ):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_the_table_agrees_with_itself() -> None:
    """Each row again by the recursion, in plain numbers."""
    ends = [[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    for deltas, advantages, values, returns, end in zip(DELTAS, ADVANTAGES, VALUES, RETURNS, ends, strict=True):
        following = 0.0
        for t in (3, 2, 1, 0):
            following = deltas[t] + (0.0 if end[t] else 0.25 * following)
            assert advantages[t] == pytest.approx(following) and returns[t] == pytest.approx(following + values[t])
