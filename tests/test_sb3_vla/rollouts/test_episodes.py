"""Episode statistics: success per task, what counts as a failure, and how tasks are sampled by it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import ToyEnv, toy_ppo

from sb3_vla.rollouts.metrics import EpisodeRecord, episode_metrics


def ended(*told: tuple[str, bool | None], **more: Any) -> list[dict[str, Any]]:
    """Infos of episodes that ended, of which some say nothing of success."""
    return [{"task": task, **({} if success is None else {"is_success": success}), **more} for task, success in told]


def test_an_episode_that_ends_without_a_word_has_not_succeeded() -> None:
    """As where a time limit outside cuts an environment that tells of success at its own end only."""
    algorithm = toy_ppo()
    algorithm._setup_learn(1)
    infos = ended(("a", True), ("a", None), ("a", None), ("a", False), ("b", None), elapsed_steps=4, episode_return=2.0)
    algorithm._record_episodes(infos, np.ones(5, dtype=bool))
    assert algorithm.task_success() == {"a": 0.25, "b": 0.0}
    found = episode_metrics(algorithm.episodes.by_task, 5)
    assert (found["env/success_once"], found["env/success_once/a"], found["env/success_once/b"]) == (0.125, 0.25, 0.0)
    assert (found["env/episode_len"], found["env/return"]) == (4.0, 2.0)
    assert list(algorithm.ep_success_buffer) == [True, False, False, False, False]  # type: ignore[arg-type]
    weights = algorithm.episodes.task_weights()
    assert weights["a"] == pytest.approx(4 * 2 / 6 * 4 / 6) and weights["b"] == pytest.approx(4 * 1 / 3 * 2 / 3)


def test_success_that_nothing_tells_of_is_unknown() -> None:
    algorithm = toy_ppo()
    algorithm._setup_learn(1)
    algorithm._record_episodes(ended(("a", None), ("b", None)), np.ones(2, dtype=bool))
    assert algorithm.task_success() == {} and episode_metrics(algorithm.episodes.by_task, 2) == {}
    assert not algorithm.ep_success_buffer
    # Monitor tells the rest.
    algorithm._record_episodes(ended(("a", None), episode={"r": 3.0, "l": 2}), np.ones(1, dtype=bool))
    expected = {"env/return": 3.0, "env/episode_len": 2.0, "env/reward": 1.5, "env/num_trajectories": 3.0}
    assert episode_metrics(algorithm.episodes.by_task, 3) == expected


def test_the_death_of_a_worker_says_nothing_about_the_policy() -> None:
    algorithm = toy_ppo()
    algorithm._setup_learn(1)
    infos = ended(("a", True)) + ended(("a", False), ("b", False), worker_restarted=True, episode={"r": 1.0, "l": 2})
    algorithm._record_episodes(infos, np.ones(3, dtype=bool))
    assert algorithm.task_success() == {"a": 1.0} and list(algorithm.ep_success_buffer) == [True]  # type: ignore[arg-type]
    assert len(algorithm.ep_info_buffer) == 2  # type: ignore[arg-type]


def test_episodes_that_a_limit_outside_cuts_count() -> None:
    """Of four episodes each one that is cut failed; the others succeed, or not, by themselves."""
    from gymnasium.wrappers import TimeLimit
    from stable_baselines3.common.vec_env import DummyVecEnv

    makers = [partial(ToyEnv, horizon=1)] * 2 + [lambda: TimeLimit(ToyEnv(horizon=3), 1)] * 2
    algorithm = toy_ppo(DummyVecEnv(makers), n_steps=6, batch_size=24)
    told: list[float] = []

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            told.extend(float(info.get("is_success", 0.0)) for info in self.locals["infos"])
            return True

    algorithm.learn(24, callback=Count())
    assert len(told) == 24  # each step ends an episode
    assert sum(len(episodes) for episodes in algorithm.episodes.by_task.values()) == 24
    successes = sum(each.success or 0.0 for episodes in algorithm.episodes.by_task.values() for each in episodes)
    assert successes == sum(told)


def test_tasks_are_drawn_by_the_signal_they_give() -> None:
    algorithm = toy_ppo(task_sampling="signal")
    failed, solved = EpisodeRecord(0.0, 9, 0.0), EpisodeRecord(1.0, 9, 1.0)
    # Only the last 30 episodes count: what came before lags behind the policy.
    algorithm.episodes.by_task["solved"].extend([failed] * 70 + [solved] * 30)
    algorithm.episodes.by_task["open"].extend([solved] * 49 + [failed] * 15 + [solved] * 15)
    algorithm.episodes.by_task["rare"].extend([solved] * 3 + [failed] * 25)
    weights = algorithm.episodes.task_weights()
    assert weights == {
        "solved": pytest.approx(4 * 31 / 32 / 32),
        "open": 1.0,
        "rare": pytest.approx(4 * 4 / 30 * 26 / 30),
    }
    told: list[Any] = []
    assert algorithm.env is not None
    algorithm.env.env_method = lambda name, *args: told.append((name, *args))  # type: ignore[assignment]
    algorithm.learn(16)
    assert told == [("set_task_weights", weights)]
    with pytest.raises(ValueError, match="did you mean 'signal'"):
        toy_ppo(task_sampling="signals")


class Silent(gym.Wrapper):
    """An environment whose info lacks something, or all of it until an episode."""

    def __init__(self, env: gym.Env, lacks: str, until: float = math.inf) -> None:
        super().__init__(env)
        self.lacks, self.until, self.ended = lacks, until, 0

    def step(self, action: Any) -> Any:
        *outcome, info = self.env.step(action)
        if self.ended < self.until:
            del info[self.lacks]
        self.ended += outcome[2] or outcome[3]
        return *outcome, info


def test_episodes_before_the_first_that_tells_of_success_have_failed() -> None:
    def silent() -> gym.Env:
        return Silent(ToyEnv(), "is_success", until=3)

    algorithm = toy_ppo(DummyVecEnv([silent] * 2))
    algorithm.learn(16)
    assert list(algorithm.ep_success_buffer or ())[:6] == [False] * 6
    assert len(algorithm.ep_success_buffer or ()) == 16


@pytest.mark.parametrize("lacks", ["task", "is_success"])
def test_tasks_that_nobody_tells_cannot_be_drawn_by_their_signal(lacks: str) -> None:
    def silent() -> gym.Env:
        return Silent(ToyEnv(), lacks)

    algorithm = toy_ppo(DummyVecEnv([silent] * 2), task_sampling="signal")
    with pytest.warns(UserWarning, match=r'"signal" is without effect: no episode has ended with both info\["task"\]'):
        algorithm.learn(32)
