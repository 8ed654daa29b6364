"""Gemma (Gemma Team 2024) as pi0 uses it: a tower whose tokens also attend to the keys and values of another tower.

PaliGemma's language model is one tower, the smaller action expert the other. Layer by layer they share one attention,
in which the first tower's tokens are blind to the second's; so the first runs once, and the second as often as one
likes against the keys and values that it left. Parameter names are openpi's.
Letters besides those of :mod:`sb3_vla.models.base`: T tokens of this tower, P tokens of the other, W width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sb3_vla.models.layers import GatedMLP, Rotation, rms_normalized, rotate, rotation_of
from sb3_vla.models.recomputing import Recomputing

#: of one layer, after the rotation: (N, kv_heads, T, head_dim) each
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GemmaSize:
    """Sizes of a tower; towers that share attention agree in depth, heads, kv_heads and head_dim."""

    width: int
    mlp: int
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256


class GemmaTower(nn.Module):
    """Layers of shared attention.

    :param size: sizes.
    :param vocabulary: rows of the token embedding; None for a tower without one.
    :param condition_dim: size of the vector that modulates the norms (pi0.5's expert); None for plain norms.
    """

    def __init__(self, size: GemmaSize, vocabulary: int | None = None, condition_dim: int | None = None) -> None:
        super().__init__()
        self.size = size
        if vocabulary is not None:
            self.embed_tokens = nn.Embedding(vocabulary, size.width)
        self.layers = nn.ModuleList(GemmaLayer(size, condition_dim) for _ in range(size.depth))
        self.norm = _norm(size.width, condition_dim)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        before: list[KeysValues] | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run the tower.

        :param x: embedded tokens (N, T, W).
        :param positions: places for the rotary embedding, int64 (N, T).
        :param mask: which keys (the other tower's, then this one's) a query attends to, bool, broadcastable to
            (N, heads, T, P + T); None for all. Every query needs a key.
        :param before: keys and values of the other tower's layers, (N, kv_heads, P, head_dim) each.
        :param condition: (N, condition_dim), for modulated norms.
        :return: the tokens after the final norm, and this tower's own keys and values, one pair a layer.
        """
        rotation = rotation_of(positions, self.size.head_dim)
        left: list[KeysValues] = []
        for index, layer in enumerate(self.layers):
            others = None if before is None else before[index]
            x, own = layer(x, rotation, mask, others, condition)
            left.append(own)
        return self.norm(x, condition)[0], left


class GemmaLayer(Recomputing):
    """Attention and a gated perceptron, each behind a norm and with a residual connection."""

    def __init__(self, size: GemmaSize, condition_dim: int | None) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(size)
        self.mlp = GatedMLP(size.width, size.mlp, functools.partial(F.gelu, approximate="tanh"))
        self.input_layernorm = _norm(size.width, condition_dim)
        self.post_attention_layernorm = _norm(size.width, condition_dim)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None, before: KeysValues | None, condition: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        normed, gate = self.input_layernorm(x, condition)
        attended, own = self.self_attn(normed, rotation, mask, before)
        x = _add(x, attended, gate)
        normed, gate = self.post_attention_layernorm(x, condition)
        return _add(x, self.mlp(normed), gate), own


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions; all heads of a group share keys and values."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.group = size.heads // size.kv_heads
        self.q_proj = nn.Linear(size.width, size.heads * size.head_dim, bias=False)
        self.k_proj = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.v_proj = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.o_proj = nn.Linear(size.heads * size.head_dim, size.width, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None, before: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        query, key, value = (
            rearrange(projection(x), "n t (heads d) -> n heads t d", d=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        own = key, value
        if before is not None:
            key, value = (torch.cat([b.to(o.dtype), o], dim=2) for b, o in zip(before, own, strict=True))
        key, value = (self._to_heads(part) for part in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(rearrange(attended, "n heads t d -> n t (heads d)")), own

    def _to_heads(self, part: Tensor) -> Tensor:
        """(N, kv_heads, T, d) to (N, heads, T, d), as a view."""
        return part[:, :, None].expand(-1, -1, self.group, -1, -1).flatten(1, 2)


class RMSNorm(nn.Module):
    """Root mean square norm with factor 1 + weight, in float32; its residual branch is not gated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, None]:
        return (rms_normalized(x, 1e-6) * (1 + self.weight.float())).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """Root mean square norm whose scale and shift, and the gate of its residual branch, a condition gives (DiT)."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(condition_dim, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        assert condition is not None
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=2)
        return (rms_normalized(x, 1e-6) * (1 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)


def _norm(width: int, condition_dim: int | None) -> nn.Module:
    return RMSNorm(width) if condition_dim is None else AdaptiveRMSNorm(width, condition_dim)


def _add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + (branch if gate is None else branch * gate)
