"""Weights that recorded outputs of other implementations were made with: a function of name, shape and seed alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers scaled for stable activations, float32; around 1 for the weights of norms."""
    state = 0
    for character in name:
        state = (131 * state + ord(character)) % (2**31 - 1)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(state ^ seed))
    if len(shape) > 1:
        return numbers / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * numbers if name.endswith("weight") else 0.1 * numbers
