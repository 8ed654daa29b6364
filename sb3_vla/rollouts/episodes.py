"""How the episodes of a training ended: success rates per task, and how often each task is sampled."""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_vla.distributed.ranks import Ranks
from sb3_vla.rollouts.metrics import EpisodeRecord, success_rates

# Least weight of a task that is always or never solved, where 1 is that of a task solved every other time.
_LEAST_TASK_WEIGHT = 0.1
# Keys of the info dict at the end of an episode that are kept.
_KEYS = ("task", "is_success", "elapsed_steps", "episode_return", "episode", "worker_restarted")
# Episodes of a task that its present success rate is estimated from; older ones lag behind the policy.
_RECENT_EPISODES = 30


class EpisodeStatistics:
    """The latest episodes of each task.

    :param window: episodes kept per task.
    :ivar by_task: their records.
    :ivar ended: episodes of all ranks that ended in the present rollout.
    :ivar without_success: episodes that ended before the first one that reported ``is_success``.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.by_task: defaultdict[str, deque[EpisodeRecord]] = defaultdict(lambda: deque(maxlen=window))
        self.ended = 0
        self.without_success = 0
        self._pending: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def add(self, infos: Sequence[dict[str, Any]], dones: npt.NDArray[np.bool_], *order: int) -> None:
        """Keep the infos of the environments whose episode ended, until :meth:`count` takes them.

        :param infos: of this rank's environments.
        :param dones: bool (N,).
        :param order: sorts the steps of a rollout; within a step, episodes are in the order of ranks and environments.
        """
        for info, done in zip(infos, dones, strict=True):
            if done:
                self._pending.append((order, {key: info[key] for key in _KEYS if key in info}))

    def count(self, algorithm: BaseAlgorithm, ranks: Ranks) -> None:
        """Count the episodes of all ranks that were added; every rank must call it.

        :param algorithm: whose ``ep_info_buffer`` and ``ep_success_buffer`` get them, too.
        """
        episodes, successes = algorithm.ep_info_buffer, algorithm.ep_success_buffer
        assert episodes is not None and successes is not None
        gathered = [episode for part in ranks.gather(self._pending) for episode in part]
        self._pending = []
        for _, info in sorted(gathered, key=lambda episode: episode[0]):
            self._count(info, episodes, successes)

    def _count(self, info: dict[str, Any], episodes: deque[Any], successes: deque[Any]) -> None:
        self.ended += 1
        if info.get("worker_restarted"):  # a crash says nothing about the policy
            info = {"episode": info.get("episode")}
        elif "is_success" in info:
            successes.extend([False] * self.without_success)
            self.without_success = 0
        elif successes:  # the environments report success, so this episode was cut before it succeeded
            info = {"is_success": False, **info}
        else:
            self.without_success += 1
        success, monitored = info.get("is_success"), info.get("episode")  # the latter from SB3's Monitor
        if monitored is not None:
            episodes.append(monitored)
        if success is not None:
            successes.append(success)
        if "task" in info:
            length = info.get("elapsed_steps", (monitored or {}).get("l"))
            reward = info.get("episode_return", (monitored or {}).get("r"))
            record = EpisodeRecord(None if success is None else float(success), length, reward)
            self.by_task[info["task"]].append(record)

    def success_rates(self) -> dict[str, float]:
        """Share of successes among the latest episodes of each task, 0..1."""
        return success_rates(self.by_task)

    def task_weights(self) -> dict[str, float]:
        """Sampling weight of each task: 4 p (1 - p) of its recent success rate p, and at least 0.1.

        The variance p (1 - p) of a success is what it can teach; p is estimated by Laplace's rule of succession, so
        that a task without a success among a few episodes keeps a weight.
        """
        weights = {}
        for task, records in self.by_task.items():
            recent = list(records)[-_RECENT_EPISODES:]
            rate = (sum(each.success or 0.0 for each in recent) + 1) / (len(recent) + 2)
            weights[task] = max(_LEAST_TASK_WEIGHT, 4 * rate * (1 - rate))
        return weights

    def sample_tasks(self, env: VecEnv) -> None:
        """Let environments draw tasks by :meth:`task_weights`, once an episode has reported task and success."""
        if self.success_rates():
            env.env_method("set_task_weights", self.task_weights())
        elif self.ended:
            warnings.warn(
                'task_sampling="signal" is without effect: no episode has ended with both info["task"] and '
                'info["is_success"]; let the environments give them, or use task_sampling="uniform"',
                stacklevel=2,
            )
