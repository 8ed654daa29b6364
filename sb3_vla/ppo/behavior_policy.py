"""The policy that took a rollout, as far as an update needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from sb3_vla.policies.vla_policy import Evaluation


class BehaviorPolicy:
    """Log-probabilities of a rollout's decisions under the policy that took them, in buffer order.

    :param count: decisions in the buffer.
    """

    def __init__(self, count: int) -> None:
        self.log_prob = self.mean = self.std = torch.zeros(0)
        self.reference: BehaviorPolicy | None = None
        self._known = torch.zeros(count, dtype=torch.bool)

    def knows(self, indices: Tensor) -> bool:
        """Whether all of these decisions were kept."""
        return bool(self._known[indices].all())

    def keep(self, indices: Tensor, found: Evaluation) -> None:
        """Take over decisions that were evaluated under those weights."""
        for name in ("log_prob", "mean", "std"):
            rows = getattr(found, name).detach().cpu()
            if not self._known.any():
                setattr(self, name, rows.new_zeros(len(self._known), *rows.shape[1:]))
            getattr(self, name)[indices] = rows
        self._known[indices] = True
