"""Groups of episodes of one trial: their equal starts, their advantages, and the decisions that a rollout keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.distributed.ranks import ALONE, Ranks
from sb3_vla.distributions import Trace
from sb3_vla.rollouts.buffers import DecisionBatch, DecisionBuffer

ADVANTAGE_TYPES = ("standardized", "leave_one_out")
# Keys of a reset's info that identify the trial.
_TRIAL_INFO = ("task", "goal", "trial_seed")
_EPSILON = 1e-6
# Decisions are numbered group by group; no group has more than this.
_MOST_OF_A_GROUP = 2**32

#: an environment's first observation, and the trial that its reset reports
Start = dict[str, Any]


def start_episodes(env: VecEnv, seeds: Sequence[int]) -> tuple[dict[str, npt.NDArray[Any]], list[Start]]:
    """Reset every environment with its own seed.

    :param seeds: one for each environment; equal seeds give equal trials.
    :return: the observations (N, ...), and for each environment its start, for :func:`check_same_start`.
    """
    innermost = env.unwrapped  # wrappers forward neither seeds nor infos
    # VecEnv.seed() can only count upwards, and an automatic reset has no seed at all.
    innermost._seeds = [int(seed) for seed in seeds]
    observations = env.reset()
    assert isinstance(observations, dict)
    starts = [
        {key: values[i] for key, values in observations.items()}
        | {key: info[key] for key in _TRIAL_INFO if key in info}
        for i, info in enumerate(innermost.reset_infos)
    ]
    return observations, starts  # type: ignore[return-value]


def check_same_start(expected: Start, found: Start, seed: int) -> None:
    """Check that two episodes of a group begin with the same observation and trial.

    :raises RuntimeError: if they do not; the message names what differs.
    """
    different = [key for key in expected if key not in found or not np.array_equal(expected[key], found[key])]
    if different:
        raise RuntimeError(
            f"Two environments of a group, both reset with seed {seed}, begin with another {' and '.join(different)}. "
            "GRPO compares episodes of one trial: make all environments with the same arguments, let their reset(seed) "
            "decide everything that is random, and put no wrapper with a memory around them"
        )


def group_advantages(returns: Sequence[float], advantage_type: str) -> Tensor:
    """Advantages of a group's episodes: their returns relative to the group.

    :param returns: of at least two episodes of one trial.
    :param advantage_type: ``standardized``: (return - mean) / (std + 1e-6) with the unbiased deviation (GRPO, Shao et
        al. 2024, eq. 3); ``leave_one_out``: return - mean of the others (RLOO, Ahmadian et al. 2024, eq. 8).
    :return: float32, one for each episode; they sum to zero.
    :raises ValueError: for an unknown type.
    """
    values = torch.tensor(returns, dtype=torch.float64)
    centered = values - values.mean()
    if advantage_type == "standardized":
        return (centered / (values.std() + _EPSILON)).float()
    if advantage_type == "leave_one_out":
        return (centered * len(values) / (len(values) - 1)).float()
    raise InputError(f"Unknown advantage_type={advantage_type!r}; {did_you_mean(advantage_type, ADVANTAGE_TYPES)}")


class Episode:
    """The decisions of one episode, T of them, and how it ended.

    :ivar executed: environment steps run of each decision's chunk.
    :ivar rewards: sum of the rewards of each decision.
    :ivar success: whether it succeeded at any time; None while unknown, or if the environment does not report it.
    :ivar lost: whether a crash of a worker ended it.
    """

    def __init__(self) -> None:
        self._observations: list[dict[str, Tensor]] = []
        self._traces: list[Trace] = []
        self.executed: list[int] = []
        self.rewards: list[float] = []
        self.success: bool | None = None
        self.lost = False

    def __len__(self) -> int:
        return len(self.executed)

    def add(self, observation: Mapping[str, Tensor], trace: Trace, reward: float, executed: int) -> None:
        """Store a decision.

        :param observation: prepared, without a batch axis, like ``trace``.
        :param reward: sum over the chunk.
        :param executed: environment steps run of the chunk.
        """
        # Copies: a row is a view that would keep the rows of all other environments in memory.
        self._observations.append({key: value.clone() for key, value in observation.items()})
        self._traces.append({key: value.clone() for key, value in trace.items()})
        self.rewards.append(float(reward))
        self.executed.append(int(executed))

    def forget(self) -> None:
        """Free observations and traces; rewards and success stay."""
        self._observations.clear()
        self._traces.clear()

    def decision(self, step: int) -> tuple[dict[str, Tensor], Trace]:
        """Prepared observation and trace of one decision."""
        return self._observations[step], self._traces[step]


class GroupBuffer(DecisionBuffer):
    """The decisions of whole episodes, which differ in length, stored as the episodes hold them.

    :param device: where minibatches go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._places: list[tuple[Episode, int]] = []
        self.reset()

    def __len__(self) -> int:
        """Number of decisions."""
        return len(self._places)

    def reset(self) -> None:
        """Free all episodes, even if something else, such as a callback, still holds a reference."""
        for episode, _ in self._places:
            episode.forget()
        self._places = []
        self._keys: list[int] = []
        self._lengths: list[int] = []
        self._episode_advantages: list[float] = []
        self._episode_returns: list[float] = []
        self.advantages = self.returns = self.values = torch.zeros(0)

    def add(self, episodes: Sequence[Episode], returns: Sequence[float], advantages: Tensor, number: int) -> None:
        """Store a group.

        :param episodes: of the group.
        :param returns: of each episode.
        :param advantages: float32, of each episode.
        :param number: of the group among those that all ranks have played in this rollout.
        """
        count = sum(map(len, episodes))
        self._keys += range(number * _MOST_OF_A_GROUP, number * _MOST_OF_A_GROUP + count)
        for episode in episodes:
            self._places += [(episode, step) for step in range(len(episode))]
            self._lengths.append(len(episode))
        self._episode_returns += returns
        self._episode_advantages += advantages.tolist()

    def spread_advantages(self, normalize_length: bool, ranks: Ranks = ALONE) -> None:
        """Give every decision its episode's return and advantage.

        :param normalize_length: weight an episode's advantage by mean length / length, so that all episodes have the
            same weight and a decision has weight 1 on average. A weight that is not negative commutes with the minimum
            in the clipped surrogate.
        :param ranks: over whose episodes the mean length is taken.
        """
        lengths = torch.tensor(self._lengths, dtype=torch.int64)
        advantages = torch.tensor(self._episode_advantages)
        if normalize_length:
            advantages = advantages * torch.cat(ranks.gather(lengths)).float().mean() / lengths
        self.advantages = advantages.repeat_interleave(lengths)
        self.returns = torch.tensor(self._episode_returns).repeat_interleave(lengths)
        self.values = torch.zeros_like(self.returns)

    def decisions(self) -> tuple[Tensor, Tensor]:
        """Indices 0 to B - 1, int64 (B,), and the number of each decision among those of all ranks."""
        return torch.arange(len(self)), torch.tensor(self._keys, dtype=torch.int64)

    def cut(self, shuffled: Tensor, batch_size: int) -> list[Tensor]:
        """Minibatches of at most ``batch_size`` decisions, of sizes as equal as possible.

        B differs between rollouts, and a small last minibatch would have a noisy gradient.
        """
        return list(shuffled.tensor_split(-(-len(shuffled) // batch_size)))

    def batch(self, indices: Tensor) -> DecisionBatch:
        """The decisions of these indices."""
        places = [self._places[i] for i in indices.tolist()]
        observations, traces = zip(*(episode.decision(step) for episode, step in places), strict=True)
        executed = torch.tensor([episode.executed[step] for episode, step in places])
        return DecisionBatch(
            observations=self._stacked(observations),
            trace=self._stacked(traces),
            executed=executed.to(self.device),
            values=self.values[indices].to(self.device),
            advantages=self.advantages[indices].to(self.device),
            returns=self.returns[indices].to(self.device),
            indices=indices,
        )

    def _stacked(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]).to(self.device, non_blocking=True) for key in rows[0]}
