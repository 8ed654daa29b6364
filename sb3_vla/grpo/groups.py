"""Groups of episodes of one trial: starting them alike, their advantages, and the decisions that a rollout keeps."""

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
# What a reset tells of the trial that it placed, beside what can be seen.
_TRIAL_INFO = ("task", "goal", "trial_seed")
_EPSILON = 1e-6
# More decisions than a group has, so that groups do not overlap where decisions are numbered.
_MOST_OF_A_GROUP = 2**32

Start = dict[str, Any]


def start_episodes(env: VecEnv, seeds: Sequence[int]) -> tuple[dict[str, npt.NDArray[Any]], list[Start]]:
    """Reset every environment with its own seed.

    :param seeds: one for each environment; equal seeds are to place equal trials.
    :return: the observations, and of each environment what :func:`check_same_start` compares.
    """
    innermost = env.unwrapped  # wrappers pass on neither seeds nor infos
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
    """A group's episodes begin in the same state, as far as observations and infos tell.

    :raises RuntimeError: if they do not; the message says in what they differ.
    """
    different = [key for key in expected if key not in found or not np.array_equal(expected[key], found[key])]
    if different:
        raise RuntimeError(
            f"Two environments of a group, both reset with seed {seed}, begin with another {' and '.join(different)}. "
            "GRPO compares episodes of one trial: make all environments with the same arguments, let their reset(seed) "
            "decide everything that is random, and put no wrapper with a memory around them"
        )


def group_advantages(returns: Sequence[float], advantage_type: str) -> Tensor:
    """How much better each episode of a group was than the group.

    :param returns: of at least two episodes of one trial.
    :param advantage_type: ``standardized``: (return - mean) / (std + 1e-6) with the unbiased deviation (GRPO, Shao et
        al. 2024, eq. 3); ``leave_one_out``: return - mean of the others (RLOO, Ahmadian et al. 2024, eq. 8).
    :return: float32, one for each episode, of sum zero.
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
    :ivar rewards: of each decision, until the episode ended.
    :ivar success: whether it succeeded at any time; None while unknown, or if the environment does not tell.
    :ivar lost: whether it was aborted by a crash of a worker.
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
        """Store a decision; tensors without a batch axis."""
        # Copies, since a row would keep the rows of all the other environments.
        self._observations.append({key: value.clone() for key, value in observation.items()})
        self._traces.append({key: value.clone() for key, value in trace.items()})
        self.rewards.append(float(reward))
        self.executed.append(int(executed))

    def forget(self) -> None:
        """Let go of what was seen and drawn; how it ended is still known."""
        self._observations.clear()
        self._traces.clear()

    def decision(self, step: int) -> tuple[dict[str, Tensor], Trace]:
        """What one decision saw, and its trace."""
        return self._observations[step], self._traces[step]


class GroupBuffer(DecisionBuffer):
    """The decisions of whole episodes, which differ in length; nothing is stored but these.

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
        """Forget all episodes, whoever else still holds them, such as a callback the last rollout's locals."""
        for episode, _ in self._places:
            episode.forget()
        self._places = []
        self._keys: list[int] = []
        self._lengths: list[int] = []
        self._episode_advantages: list[float] = []
        self._episode_returns: list[float] = []
        self.advantages = self.returns = self.values = torch.zeros(0)

    def add(self, episodes: Sequence[Episode], returns: Sequence[float], advantages: Tensor, number: int) -> None:
        """Keep a group.

        :param returns: of each episode.
        :param advantages: of each episode, for every one of its decisions.
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

        :param normalize_length: divide an episode's advantage by its length, so that each episode weighs the same,
            times the mean length, so that a decision weighs 1 on average. The weight passes through the minimum of the
            clipped surrogate, because it is not negative.
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
        """Group by group in the order of their numbers, then in the order in which they were added."""
        return torch.arange(len(self)), torch.tensor(self._keys, dtype=torch.int64)

    def cut(self, shuffled: Tensor, batch_size: int) -> list[Tensor]:
        """Minibatches of at most ``batch_size``, as equal as can be: their number is another each time, and a
        remainder of a few would make a step of noise."""
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
