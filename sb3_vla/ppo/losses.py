"""The losses of PPO as functions of tensors (Schulman et al. 2017); means over decisions are the caller's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Such a ratio is clipped anyway, and beyond e^88 its gradient is not finite in float32.
_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate of N decisions, whose log-probabilities may have further axes (N, ...).

    :param of_decisions: the loss of each decision, (N,).
    :param ratio: pi / pi_old, (N, ...).
    :param clipped: the ratio within the clip range.
    :param bounded: where ``dual_clip`` bounds the loss, bool.
    """

    of_decisions: Tensor
    ratio: Tensor
    clipped: Tensor
    bounded: Tensor


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    counted: Tensor,
    below: float,
    above: float,
    dual_clip: float | None = None,
) -> Surrogate:
    """-min(r A, clip(r, 1 - below, 1 + above) A) (Schulman et al. 2017, eq. 7), summed over the ratios of a decision.

    :param log_prob: of the decisions under the present policy, float32 (N,) or (N, ...).
    :param old_log_prob: under the behavior policy, shape of ``log_prob``.
    :param advantages: float32 (N,).
    :param counted: 1 for ratios of executed actions, else 0, shape of ``log_prob``.
    :param below: clip range below one.
    :param above: clip range above one (clip-higher, Yu et al. 2025, eq. 10).
    :param dual_clip: with a negative advantage the surrogate is at least this times it (Ye et al. 2020, eq. 5).
    """
    ratio = torch.exp((log_prob - old_log_prob).clamp(max=_LARGEST_LOG_RATIO))
    advantages = advantages.reshape(-1, *[1] * (ratio.ndim - 1))
    clipped = torch.clamp(ratio, 1 - below, 1 + above)
    surrogate = torch.min(advantages * ratio, advantages * clipped)
    bounded = torch.zeros_like(surrogate, dtype=torch.bool)
    if dual_clip is not None:
        bounded = (advantages < 0) & (surrogate < dual_clip * advantages)
        surrogate = torch.where(bounded, dual_clip * advantages, surrogate)
    of_decisions = -(surrogate * counted).reshape(len(ratio), -1).sum(1)
    return Surrogate(of_decisions, ratio, clipped, bounded)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    clip_range: float | None = None,
    huber_delta: float | None = None,
) -> tuple[Tensor, float | None]:
    """Mean squared or Huber error of values against returns, float32 (N,) each.

    :param clip_range: how far a value may move from that of the rollout; None for any distance.
    :param huber_delta: error from which the loss grows linearly; None for the square.
    :return: the loss, and the share of values that are clipped, None without a clip range.
    """
    share = None
    if clip_range is not None:
        change = values - old_values
        share = (change.abs() > clip_range).float().mean().item()
        values = old_values + change.clamp(-clip_range, clip_range)
    if huber_delta is None:
        return F.mse_loss(returns, values), share
    return F.huber_loss(returns, values, delta=huber_delta), share
