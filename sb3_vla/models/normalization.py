"""Normalization of states and actions by statistics of the data, exactly as openpi and LeRobot compute it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS = ("mean", "std", "min", "max", "q01", "q99")
SCHEMES = ("mean_std", "quantiles", "min_max", "identity")
CONVENTIONS = ("openpi", "lerobot")


def normalize(x: Tensor, statistics: Mapping[str, Tensor], scheme: str, convention: str) -> Tensor:
    """Data units to the model's; ``quantiles`` and ``min_max`` map an interval to [-1, 1].

    :param x: any leading shape.
    :param statistics: tensors of the last axis' size, by the names in :data:`STATISTICS`.
    :param scheme: one of :data:`SCHEMES`.
    :param convention: one of :data:`CONVENTIONS`; they differ in how they keep from dividing by zero.
    """
    if scheme == "identity":
        return x
    if scheme == "mean_std":
        return (x - statistics["mean"]) / (statistics["std"] + (1e-6 if convention == "openpi" else 1e-8))
    lowest, width = _interval(statistics, scheme, convention)
    return (x - lowest) / width * 2 - 1


def unnormalize(x: Tensor, statistics: Mapping[str, Tensor], scheme: str, convention: str) -> Tensor:
    """The model's units to the data's; parameters as of :func:`normalize`. LeRobot adds nothing to the deviation."""
    if scheme == "identity":
        return x
    if scheme == "mean_std":
        return x * (statistics["std"] + (1e-6 if convention == "openpi" else 0.0)) + statistics["mean"]
    lowest, width = _interval(statistics, scheme, convention)
    return (x + 1) / 2 * width + lowest


def _interval(statistics: Mapping[str, Tensor], scheme: str, convention: str) -> tuple[Tensor, Tensor]:
    low, high = ("q01", "q99") if scheme == "quantiles" else ("min", "max")
    width = statistics[high] - statistics[low]
    width = width + 1e-6 if convention == "openpi" else width.masked_fill(width == 0, 1e-8)
    return statistics[low], width
