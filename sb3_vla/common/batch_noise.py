"""Random numbers of a batch of which this process may hold a part.

Ranks that share a batch have equal generators. Each draws the numbers of all of it and keeps those of its own samples,
so that what a sample meets does not depend on how many ranks there are, nor on which of them holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sb3_vla.common.errors import InputError


@dataclass(frozen=True)
class _Part:
    rows: Tensor
    total: int


_part: ContextVar[_Part | None] = ContextVar("part", default=None)


@contextmanager
def part_of_batch(rows: npt.ArrayLike, total: int) -> Iterator[None]:
    """What is drawn in this context is for some samples of a larger batch.

    :param rows: their places in it, in the order of the samples here.
    :param total: size of the larger batch.
    """
    token = _part.set(_Part(torch.from_numpy(np.array(rows, dtype=np.int64)), total))
    try:
        yield
    finally:
        _part.reset(token)


def normal(
    shape: Sequence[int], generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Standard normal numbers, float32.

    :param shape: its first axis is that of the samples; R times as many are R draws for each, row r * N + n for sample
        n.
    :param generator: the only source of randomness if given; else torch's global one.
    """
    return _of_part(shape, lambda whole: torch.randn(whole, generator=generator, device=device))


def uniform(
    shape: Sequence[int], generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Numbers in [0, 1), float32; see :func:`normal`."""
    return _of_part(shape, lambda whole: torch.rand(whole, generator=generator, device=device))


def integers(
    low: int,
    high: int,
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Integers from ``low`` to below ``high``, int64; see :func:`normal`."""
    return _of_part(shape, lambda whole: torch.randint(low, high, tuple(whole), generator=generator, device=device))


def categories(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw from each categorical distribution on the last axis, int64, of the other axes; see :func:`normal`.

    The first of exponential arrivals at these rates, which is also how ``torch.multinomial`` draws.
    """

    def arrivals(whole: Sequence[int]) -> Tensor:
        return torch.empty(tuple(whole), device=probabilities.device).exponential_(generator=generator)

    return (probabilities / _of_part(probabilities.shape, arrivals)).argmax(-1)


def _of_part(shape: Sequence[int], draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
    part = _part.get()
    if part is None:
        return draw(shape)
    draws, rest = divmod(shape[0], len(part.rows))
    if rest:
        raise InputError(f"{shape[0]} samples; expected a multiple of the {len(part.rows)} of this part of a batch")
    whole = draw((draws * part.total, *shape[1:]))
    return whole.unflatten(0, (draws, part.total))[:, part.rows.to(whole.device)].flatten(0, 1)
