"""Parts of transformer layers that several models share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: cosines and sines, float32 (N, 1, T, head_dim) or (N, T, 1, head_dim) each
Rotation = tuple[Tensor, Tensor]


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def rms_normalized(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, in float32 (Zhang & Sennrich 2019).

    ``torch.nn.RMSNorm`` rounds to bfloat16 after the weights are applied, the published models before it.
    """
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rotation_of(positions: Tensor, head_dim: int, theta: float = 10_000.0, *, heads_at: int = 1) -> Rotation:
    """Rotary embedding (Su et al. 2021) of positions (N, T), the halves of a head rotated against each other.

    :param heads_at: axis of the heads in what is rotated, 1 or 2.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(heads_at)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Heads (N, heads, T, head_dim), or (N, T, heads, head_dim), at their positions."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)
