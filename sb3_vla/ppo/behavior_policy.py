"""The behavior policy of a rollout: what the update compares the present policy with."""

from __future__ import annotations

import torch
from torch import Tensor

from sb3_vla.policies.vla_policy import Evaluation


class BehaviorPolicy:
    """Log-probabilities and transitions of a rollout's decisions under the weights that took them, in buffer order.

    :param count: decisions in the buffer, B.
    :ivar log_prob: float32 (B, ...), like ``mean`` and ``std`` on the CPU; see :class:`Evaluation`.
    :ivar reference: the same under the reference policy of ``kl_coef``, None without one.
    """

    def __init__(self, count: int) -> None:
        self.log_prob = self.mean = self.std = torch.zeros(0)
        self.reference: BehaviorPolicy | None = None
        self._known = torch.zeros(count, dtype=torch.bool)

    def knows(self, indices: Tensor) -> bool:
        """Whether all of these decisions, int64 (N,), are stored."""
        return bool(self._known[indices].all())

    def keep(self, indices: Tensor, found: Evaluation) -> None:
        """Store N decisions that were evaluated under those weights.

        :param indices: int64 (N,).
        :param found: their evaluation.
        """
        for name in ("log_prob", "mean", "std"):
            rows = getattr(found, name).detach().cpu()
            if not self._known.any():
                setattr(self, name, rows.new_zeros(len(self._known), *rows.shape[1:]))
            getattr(self, name)[indices] = rows
        self._known[indices] = True
