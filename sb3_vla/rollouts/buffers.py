"""Rollout buffers of decisions, with the traces from which their log-probabilities are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sb3_vla.distributed.ranks import Ranks, current_ranks
from sb3_vla.distributions import Trace


@dataclass
class DecisionBatch:
    """N stored decisions, on the policy's device.

    :param observations: from :meth:`VLAPolicy.prepare`.
    :param trace: from the distribution.
    :param executed: environment steps run of each chunk, int64 (N,).
    :param values: of the critic when the decisions were taken, float32 (N,).
    :param advantages: float32 (N,).
    :param returns: float32 (N,).
    :param indices: their places in the buffer, int64 (N,).
    """

    observations: dict[str, Tensor]
    trace: Trace
    executed: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> DecisionBatch:
        """The same decisions on another device."""
        moved: dict[str, Any] = tree_map(lambda tensor: tensor.to(device), vars(self))
        return DecisionBatch(**moved)


class DecisionBuffer(ABC):
    """Interface of a rollout of B decisions to the update.

    :ivar advantages: float32, B numbers in the order of the indices when flattened, like ``values`` and ``returns``.
    """

    advantages: Tensor
    returns: Tensor
    values: Tensor

    @abstractmethod
    def __len__(self) -> int:
        """Number of decisions, B."""

    @abstractmethod
    def decisions(self) -> tuple[Tensor, Tensor]:
        """Indices of the decisions to learn from, int64 (n,), and their numbers among the decisions of all ranks.

        Sorted by these numbers, decisions are in the order of one process with the environments of all ranks.
        """

    @abstractmethod
    def cut(self, shuffled: Tensor, batch_size: int) -> list[Tensor]:
        """Split shuffled indices into minibatches."""

    def minibatches(self, batch_size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """One epoch: the indices of all decisions to learn from, shuffled, int64, in minibatches."""
        indices, _ = self.decisions()
        return self.cut(indices[torch.randperm(len(indices), generator=generator)], batch_size)

    @abstractmethod
    def batch(self, indices: Tensor) -> DecisionBatch:
        """The decisions of these indices, int64 (N,)."""


@dataclass(frozen=True)
class Minibatch:
    """M decisions of all ranks, for one step of the optimizer.

    :param indices: places in this rank's buffer of the m decisions that it holds, int64 (m,).
    :param advantages: of all M decisions, float32 (M,).
    :param mine: which of the M this rank holds, in the order of ``indices``, bool (M,).
    :param most: the largest m among the ranks.
    """

    indices: Tensor
    advantages: Tensor
    mine: Tensor
    most: int

    def __len__(self) -> int:
        return len(self.advantages)


class SharedRollout:
    """The decisions of all ranks' buffers as one rollout, in the order of one process; all ranks make it together.

    :ivar advantages: of all ranks in that order, float32, like ``values`` and ``returns``.

    :param buffer: this rank's.
    :param ranks: the ranks that train together.
    """

    def __init__(self, buffer: DecisionBuffer, ranks: Ranks) -> None:
        self.buffer = buffer
        self._ranks = ranks
        indices, keys = buffer.decisions()
        own = [column.flatten()[indices] for column in (buffer.advantages, buffer.values, buffer.returns)]
        parts = ranks.gather((keys, torch.stack(own, dim=1)))
        order = torch.argsort(torch.cat([part_keys for part_keys, _ in parts]))
        self.advantages, self.values, self.returns = torch.cat([numbers for _, numbers in parts])[order].unbind(1)
        holders = torch.cat([torch.full_like(part_keys, rank) for rank, (part_keys, _) in enumerate(parts)])[order]
        self._holders = holders
        self._mine = holders == ranks.rank
        self._indices = torch.full_like(order, -1)  # of another rank's decision there is none
        self._indices[self._mine] = indices[torch.argsort(keys)]

    def __len__(self) -> int:
        return len(self._indices)

    def minibatches(self, batch_size: int) -> list[Minibatch]:
        """One epoch of all decisions, shuffled, the same on all ranks, whose torch generators must be equal."""
        return [self._minibatch(places) for places in self.buffer.cut(torch.randperm(len(self)), batch_size)]

    def any_decision(self, device: torch.device) -> DecisionBatch:
        """A batch of one decision: this rank's, or another's where it has none; all ranks must call it.

        :param device: where a decision of another rank is brought.
        """
        own = self.buffer.batch(torch.zeros(1, dtype=torch.int64)) if len(self.buffer) else None
        if not self._ranks.any(own is None):
            assert own is not None
            return own
        gathered = self._ranks.gather(own and own.to(torch.device("cpu")))
        return next(batch for batch in gathered if batch is not None).to(device)

    def _minibatch(self, places: Tensor) -> Minibatch:
        mine = self._mine[places]
        most = int(torch.bincount(self._holders[places]).max())
        return Minibatch(self._indices[places[mine]], self.advantages[places], mine, most)


class ChunkRolloutBuffer(DecisionBuffer):
    """Rollout storage of ``n_steps`` decisions of ``n_envs`` environments, one tensor per key, allocated once.

    Tensors are laid out (environment, step), so that flat indices select rows without a copy of all images.

    :param n_steps: T decisions per environment.
    :param n_envs: N environments.
    :param device: where minibatches go.
    :param gamma: discount, see :meth:`discounts`.
    :param gae_lambda: of generalized advantage estimation (Schulman et al. 2016), per decision.
    :param gamma_per: ``decision`` or ``env_step``, what ``gamma`` is for.
    """

    #: bytes of a decision besides observation and trace
    bytes_of_numbers: ClassVar[int] = torch.int64.itemsize + 5 * torch.float32.itemsize

    def __init__(
        self,
        n_steps: int,
        n_envs: int,
        device: torch.device,
        gamma: float,
        gae_lambda: float,
        gamma_per: str = "decision",
    ) -> None:
        self.n_steps = n_steps
        self.n_envs = n_envs
        self.device = device
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.gamma_per = gamma_per
        self.observations: dict[str, Tensor] = {}
        self.traces: Trace = {}
        shape = (n_envs, n_steps)
        self.executed = torch.zeros(shape, dtype=torch.int64)
        self.rewards = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self.episode_starts = torch.zeros(shape)
        self.advantages = torch.zeros(shape)
        self.returns = torch.zeros(shape)
        self.reset()

    def __len__(self) -> int:
        return self.n_envs * self.n_steps

    @property
    def full(self) -> bool:
        """Whether all decisions are stored."""
        return self._position == self.n_steps

    def reset(self) -> None:
        """Begin a new rollout in the same memory."""
        self._position = 0

    def add(
        self,
        observations: dict[str, Tensor],
        trace: Trace,
        values: Tensor,
        rewards: np.ndarray,
        executed: np.ndarray,
        episode_starts: np.ndarray,
    ) -> None:
        """Store one decision of each of the N environments.

        :param observations: prepared, (N, ...).
        :param trace: (N, ...).
        :param values: (N,).
        :param rewards: sums over the chunks, (N,).
        :param executed: environment steps run of each chunk, (N,); 0 where a worker crashed.
        :param episode_starts: whether an episode begins with the decision, (N,).
        :raises RuntimeError: if the buffer is full.
        """
        if self.full:
            raise RuntimeError(f"The rollout buffer holds its {self.n_steps} decisions already; call reset() first")
        for stored, new in ((self.observations, observations), (self.traces, trace)):
            for key, value in new.items():
                if key not in stored:
                    stored[key] = torch.zeros((self.n_envs, self.n_steps, *value.shape[1:]), dtype=value.dtype)
                stored[key][:, self._position] = value.cpu()
        self.values[:, self._position] = values.cpu()
        self.rewards[:, self._position] = torch.as_tensor(rewards, dtype=torch.float32)
        self.executed[:, self._position] = torch.as_tensor(executed)
        self.episode_starts[:, self._position] = torch.as_tensor(episode_starts, dtype=torch.float32)
        self._position += 1

    def discounts(self, executed: np.ndarray) -> np.ndarray:
        """Discount of the value after each decision, float64, shape of ``executed``.

        It is ``gamma``, or with ``gamma_per="env_step"`` gamma^executed, as in a semi-Markov decision process (Sutton
        et al. 1999). Rewards within a chunk are summed, not discounted. A decision of which nothing was executed has
        discount one.
        """
        steps = executed if self.gamma_per == "env_step" else np.minimum(executed, 1)
        return np.power(self.gamma, steps, dtype=np.float64)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Generalized advantage estimation over decisions (Schulman et al. 2016, eq. 16).

        :param last_values: values of the observations after the last decision, (N,).
        :param dones: whether an episode ended with the last decision, (N,).
        """
        running = torch.zeros(self.n_envs)
        next_values = last_values.detach().cpu().float()
        continues = 1.0 - torch.as_tensor(dones, dtype=torch.float32)
        discounts = torch.from_numpy(self.discounts(self.executed.numpy()))
        gamma, decay = discounts.float(), (discounts * self.gae_lambda).float()
        for step in reversed(range(self.n_steps)):
            delta = self.rewards[:, step] + gamma[:, step] * next_values * continues - self.values[:, step]
            running = delta + decay[:, step] * continues * running
            self.advantages[:, step] = running
            next_values = self.values[:, step]
            continues = 1.0 - self.episode_starts[:, step]
        self.returns = self.advantages + self.values

    def decisions(self) -> tuple[Tensor, Tensor]:
        """Flat indices, environment by environment, without decisions that a crashed worker did not execute."""
        indices = self.executed.flatten().nonzero()[:, 0]
        return indices, indices + current_ranks().rank * len(self)

    def cut(self, shuffled: Tensor, batch_size: int) -> list[Tensor]:
        """Minibatches of ``batch_size`` decisions; the last one may be smaller."""
        return list(shuffled.split(batch_size))

    def batch(self, indices: Tensor) -> DecisionBatch:
        """The decisions of flat indices ``environment * T + step``."""

        def take(stored: Tensor) -> Tensor:
            return stored.flatten(0, 1)[indices].to(self.device, non_blocking=True)

        return DecisionBatch(
            observations={key: take(value) for key, value in self.observations.items()},
            trace={key: take(value) for key, value in self.traces.items()},
            executed=take(self.executed),
            values=take(self.values),
            advantages=take(self.advantages),
            returns=take(self.returns),
            indices=indices,
        )
