"""Layers that keep their inputs alone for the backward pass, and compute the rest again (Chen et al. 2016)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A layer with a switch, to be inherited before the layer's own class; it draws no random numbers.

    :ivar recomputes: see :meth:`sb3_vla.models.VLAModel.set_gradient_checkpointing`.
    """

    recomputes = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return super().__call__(*args, **kwargs)


def recomputing(layers: Iterable[nn.Module]) -> None:
    """Give layers of another library the switch; names of parameters stay."""
    for layer in layers:
        layer.__class__ = _with_switch(type(layer))  # type: ignore[arg-type]


@functools.cache
def _with_switch(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Recomputing, kind), {})
