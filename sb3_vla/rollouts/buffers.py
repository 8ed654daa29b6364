"""ChunkRolloutBuffer: decisions, not environment steps, with the trace that their log-probability needs."""

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
    """Stored decisions; N of them, on the policy's device.

    :param observations: as :meth:`VLAPolicy.prepare` gave them.
    :param trace: as the distribution gave it.
    :param executed: environment steps run of the chunk, int64 (N,).
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
        """The same decisions elsewhere."""
        moved: dict[str, Any] = tree_map(lambda tensor: tensor.to(device), vars(self))
        return DecisionBatch(**moved)


class DecisionBuffer(ABC):
    """What an update asks of a rollout of B decisions.

    :ivar advantages: float32, as ``values`` and ``returns`` in the order of the indices when flattened.
    """

    advantages: Tensor
    returns: Tensor
    values: Tensor

    @abstractmethod
    def __len__(self) -> int:
        """B."""

    @abstractmethod
    def decisions(self) -> tuple[Tensor, Tensor]:
        """Indices of the decisions to learn from, int64 (n,), and of each a number that is its own among the decisions
        of all ranks; their order is that of one process with all the ranks' environments."""

    @abstractmethod
    def cut(self, shuffled: Tensor, batch_size: int) -> list[Tensor]:
        """Shuffled indices in minibatches."""

    def minibatches(self, batch_size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Indices of this buffer's decisions once, shuffled, in minibatches, int64."""
        indices, _ = self.decisions()
        return self.cut(indices[torch.randperm(len(indices), generator=generator)], batch_size)

    @abstractmethod
    def batch(self, indices: Tensor) -> DecisionBatch:
        """The decisions of these indices."""


@dataclass(frozen=True)
class Minibatch:
    """Decisions of all ranks that make one step of the optimizer, M of them.

    :param indices: of those that this rank holds, in its buffer, int64 (m,).
    :param advantages: of all of them, float32 (M,).
    :param mine: which of them this rank holds, in the order of ``indices``, bool (M,).
    :param most: how many of them the rank holds that holds most.
    """

    indices: Tensor
    advantages: Tensor
    mine: Tensor
    most: int

    def __len__(self) -> int:
        return len(self.advantages)


class SharedRollout:
    """The decisions of all ranks' buffers as one rollout, in the order in which one process would have them.

    :ivar advantages: of all ranks, as ``values`` and ``returns`` float32 in that order.

    :param buffer: this rank's.
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
        """All decisions once, shuffled, the same on all ranks whose generators are the same."""
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
    """Rollout storage of ``n_steps`` decisions of ``n_envs`` environments, allocated once, in one piece per key.

    Everything is laid out (environment, step), so that a flat index needs no copy of the images.

    :param n_steps: T decisions per environment.
    :param n_envs: N environments.
    :param device: where minibatches go.
    :param gamma: discount, see :meth:`discounts`.
    :param gae_lambda: of generalized advantage estimation (Schulman et al. 2016), per decision.
    :param gamma_per: ``decision`` or ``env_step``, what ``gamma`` is for.
    """

    #: of a decision, besides what was seen and drawn
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
        """Start a new rollout in the same memory."""
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
        """Store one decision of every environment."""
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
        """What the value after a decision counts before it, float64, shape of ``executed``.

        ``gamma``, or with ``gamma_per="env_step"`` gamma to the power of the environment steps that were run, as in a
        semi-Markov decision process (Sutton et al. 1999); rewards within a chunk are summed, not discounted. Of a
        decision that was not run it is one: no time has passed.
        """
        steps = executed if self.gamma_per == "env_step" else np.minimum(executed, 1)
        return np.power(self.gamma, steps, dtype=np.float64)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Generalized advantage estimation over decisions.

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
        """Flat indices, environment by environment; without decisions of which nothing was run, because their worker
        died."""
        indices = self.executed.flatten().nonzero()[:, 0]
        return indices, indices + current_ranks().rank * len(self)

    def cut(self, shuffled: Tensor, batch_size: int) -> list[Tensor]:
        """Minibatches of one size; a remainder makes a smaller last one."""
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
