"""Rollouts by halves give what rollouts of all environments together give, and lose nothing to a worker's death."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecTransposeImage
from toy import ToyEnv, toy_ppo, toy_vec

from sb3_vla import PPO
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer
from sb3_vla.rollouts.stepping import Clock, Decision, halved, step_by_halves, step_together


def shared(count: int = 5, restart_workers: bool = False, **options: Any) -> SharedMemoryVecEnv:
    makers: list[Callable[[], gym.Env]] = [functools.partial(ToyEnv, **options)] * count
    return SharedMemoryVecEnv(makers, "fork", num_workers=2, restart_workers=restart_workers)


def decide(observations: dict[str, np.ndarray]) -> Decision:
    """Actions that each environment's own observation tells, elementwise, so that batches change no bit."""
    tensors = {key: torch.as_tensor(value) for key, value in observations.items()}
    actions = observations["state"].reshape(-1, 2, 2)
    return Decision(tensors, actions, np.tanh(actions), tensors["state"][:, 0], {"chain": tensors["image"][:, 0, 0]})


def course(env: VecEnv, steps: Any) -> list[tuple[Any, Any]]:
    env.seed(3)
    found = list(steps(env, decide, env.reset(), 7, Clock()))
    env.close()
    return found


def equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            equal(first, second)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype == other.dtype
    else:
        np.testing.assert_array_equal(one, other, strict=isinstance(one, np.ndarray))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 5])
def test_halves_give_what_all_together_give(transposed: bool, count: int) -> None:
    wrap = VecTransposeImage if transposed else (lambda env: env)
    expected = course(wrap(toy_vec(count, horizon=3, truncates=True)), step_together)
    found = course(wrap(shared(count, horizon=3, truncates=True)), step_by_halves)
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        equal(vars(one[0]), vars(other[0]))
        equal(vars(one[1]), vars(other[1]))
    infos = found[2][1].infos
    shape = (3, 32, 32) if transposed else (32, 32, 3)
    assert all(info["terminal_observation"]["image"].shape == shape for info in infos)


def test_one_half_simulates_while_the_other_is_decided_for() -> None:
    env = shared()
    env.seed(3)
    calls: list[str] = []
    real_begin, real_end = env.step_half_async, env.step_half_wait
    env.step_half_async = lambda half, actions: (calls.append(f"begin {half}"), real_begin(half, actions))[1]  # type: ignore
    env.step_half_wait = lambda half: (calls.append(f"end {half}"), real_end(half))[1]  # type: ignore

    def told(observations: dict[str, np.ndarray]) -> Decision:
        calls.append("decide")
        return decide(observations)

    for _ in step_by_halves(env, told, env.reset(), 2, Clock()):  # type: ignore[arg-type]
        calls.append("step")
    env.close()
    start = ["decide", "begin 0", "decide", "begin 1"]
    assert calls == [
        *start,
        "end 0",
        "decide",
        "begin 0",
        "end 1",
        "decide",
        "begin 1",
        "step",
        "end 0",
        "end 1",
        "step",
    ]


def test_which_environments_have_halves() -> None:
    env = shared(2)
    assert halved(env) is env and halved(VecTransposeImage(env)) is env
    assert halved(VecMonitor(env)) is None  # it counts in step_wait()
    env.close()
    assert halved(toy_vec()) is None
    one = shared(1)
    assert halved(one) is None
    one.close()


class Rewards(BaseCallback):
    """Keeps the rewards as the environments gave them, and can stop or kill."""

    def __init__(self, last: int | None = None, victim: int | None = None) -> None:
        super().__init__()
        self.last, self.victim = last, victim
        self.rewards: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.rewards.append(self.locals["rewards"].copy())
        assert self.training_env.get_attr("horizon") == [3] * 5
        if self.victim is not None and self.n_calls == 3:
            os.kill(self.victim, signal.SIGKILL)
        return self.last is None or self.n_calls < self.last


def rollout(overlap: bool, env: VecEnv, last: int | None = None) -> tuple[PPO, list[np.ndarray]]:
    """A rollout nearly without noise, which would be another in batches of another size."""
    algorithm = toy_ppo(env, overlap=overlap, batch_size=20, noise_scale=1e-6, learning_rate=0.0)  # type: ignore[arg-type]
    callback = Rewards(last)
    algorithm.learn(40, callback=callback)
    return algorithm, callback.rewards


def test_ppo_collects_the_same_with_overlap() -> None:
    found, rewards = rollout(True, shared(horizon=3, truncates=True))
    expected, expected_rewards = rollout(False, shared(horizon=3, truncates=True))
    ours: Any = found.rollout_buffer
    theirs: Any = expected.rollout_buffer
    assert isinstance(ours, ChunkRolloutBuffer) and len(rewards) == 8
    equal(ours.observations, theirs.observations)
    equal(ours.executed, theirs.executed)
    equal(ours.episode_starts, theirs.episode_starts)
    equal(found._last_obs, expected._last_obs)
    # Noise of 2e-7, and rounding of batches of another size.
    np.testing.assert_allclose(rewards, expected_rewards, atol=1e-5)
    for name in ("rewards", "values", "returns"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.traces, theirs.traces, atol=1e-5, rtol=1e-5)
    assert found.num_timesteps == expected.num_timesteps == 40
    for algorithm in (found, expected):
        assert algorithm.env is not None
        algorithm.env.close()


def test_overlap_acts_where_there_are_halves_only() -> None:
    one, other = (toy_ppo(toy_vec(), overlap=overlap).learn(32) for overlap in (True, False))
    equal(dict(one.policy.state_dict()), dict(other.policy.state_dict()))


def test_a_stopped_rollout_can_be_followed_by_another() -> None:
    algorithm, rewards = rollout(True, shared(horizon=3), last=4)
    assert len(rewards) == 4
    algorithm.learn(40, reset_num_timesteps=False)
    algorithm.learn(40)
    assert algorithm.rollout_buffer.full
    assert algorithm.env is not None
    algorithm.env.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_rollout_goes_on_when_a_worker_is_replaced(overlap: bool) -> None:
    """What was lost holds no decision to learn from, and its value is that of what was seen last."""
    env = shared(horizon=3, restart_workers=True)
    algorithm = toy_ppo(env, overlap=overlap, batch_size=20, bootstrap_truncated=False, gamma=0.9)  # type: ignore[arg-type]
    torch.nn.init.constant_(algorithm.policy.value_head.layers[-1].bias, 10.0)
    algorithm.learn(40, callback=Rewards(victim=env.processes[1].pid))
    buffer: Any = algorithm.rollout_buffer
    assert env.dropped_episodes == 3
    lost = (buffer.executed == 0).nonzero()
    assert lost[:, 0].tolist() == [2, 3, 4]
    for i, step in lost.tolist():
        # Its own last observation is what it decided on, and no time has passed.
        assert buffer.rewards[i, step].item() == pytest.approx(buffer.values[i, step].item(), rel=1e-4)
        assert buffer.episode_starts[i, step + 1] == 1
    assert dict(algorithm.logger.name_to_value)["train/skipped_steps"] == 0
    env.close()
