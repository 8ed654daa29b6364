"""CompactVLA: a vision-language-action model of a few million parameters that trains from scratch on a CPU.

A small residual convolutional network, modulated by the instruction (FiLM, Perez et al. 2018), gives a grid of visual
tokens; a byte-level encoder reads the instruction, so any sentence can be given; a transformer over the action chunk
attends to visual and language tokens, is modulated by a summary of these and of the hand's state, and predicts the
velocity of a flow. What the chunk attends to depends on image and sentence alone, like pi0's cached prefix. A second
network of the same kind reads the hand view, where the model has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mw_envs.hand_view import HandView
from sb3_vla.common.errors import InputError
from sb3_vla.models.base import PERCEPTION, Context, VLAModel


class CompactVLA(VLAModel):
    """The default model of ``VLAPolicy``.

    :param action_dim: A.
    :param action_horizon: H, actions predicted per decision.
    :param state_dim: size of the proprioceptive state.
    :param image_size: side of the square image it reads; a multiple of 16.
    :param width: width of the transformer; a multiple of 64.
    :param depth: blocks of the transformer.
    :param channels: channels of the vision encoder's three stages, multiples of 8.
    :param hand_view: arguments of :class:`mw_envs.hand_view.HandView`, whose ``size`` is a multiple of 16 here, for the
        ``hand_image`` that the model reads as well; None for a model that reads ``image`` alone.
    """

    state_mean: Tensor
    state_std: Tensor

    def __init__(
        self,
        action_dim: int = 4,
        action_horizon: int = 5,
        state_dim: int = 4,
        image_size: int = 96,
        width: int = 128,
        depth: int = 3,
        channels: Sequence[int] = (32, 48, 96),
        hand_view: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(action_dim, action_horizon)
        self.config = {
            "action_dim": action_dim,
            "action_horizon": action_horizon,
            "state_dim": state_dim,
            "image_size": image_size,
            "width": width,
            "depth": depth,
            "channels": list(channels),
            "hand_view": None if hand_view is None else dict(hand_view),
        }
        self.hand_view = None if hand_view is None else HandView.noted(hand_view)
        pictures = {"image": image_size}
        if self.hand_view is not None:
            pictures["hand_image"] = self.hand_view.size
        for name, size in pictures.items():
            if size < 32 or size % 16:
                option = "image_size" if name == "image" else "hand_view size"
                raise InputError(f"CompactVLA {option}={size}; expected a multiple of 16, at least 32")
        if len(channels) != 3 or any(c < 8 or c % 8 for c in channels):
            raise InputError(f"CompactVLA channels={channels!r}; expected three multiples of 8")
        if width < 64 or width % 64:
            raise InputError(f"CompactVLA width={width}; expected a multiple of 64, at least 64")
        self.image_size = (image_size, image_size)
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.instruction_encoder = InstructionEncoder(width)
        self.image_encoders = nn.ModuleDict(
            {name: ImageEncoder(side, channels, width) for name, side in pictures.items()}
        )
        self.state_encoder = nn.Sequential(nn.Linear(state_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.context_norm = nn.LayerNorm(width)
        self.action_in = nn.Linear(action_dim, width)
        self.action_position = nn.Parameter(torch.randn(action_horizon, width) * 0.02)
        self.time_encoder = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ActionBlock(width) for _ in range(depth))
        self.action_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.action_modulation = nn.Linear(width, 2 * width)
        self.action_feature_dim = width
        self.action_out = nn.Linear(width, action_dim)
        self.feature_dim = 2 * (len(pictures) * (channels[1] + channels[2]) + width)
        self.summary = nn.Sequential(nn.Linear(self.feature_dim, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def backbone(self) -> Iterator[nn.Parameter]:
        """See :meth:`VLAModel.backbone`."""
        yield from self.instruction_encoder.parameters()
        yield from self.image_encoders.parameters()
        yield from self.context_norm.parameters()
        for block in self.blocks:
            yield from block.cross_kv.parameters()  # type: ignore[union-attr]

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`VLAModel.perceive`."""
        words = self.instruction_encoder(observation["instruction"])  # (N, width)
        seen = [encoder(observation[name], words) for name, encoder in self.image_encoders.items()]
        tokens = self.context_norm(torch.cat([*(tokens for tokens, _ in seen), words[:, None]], dim=1))
        keys_values = [torch.stack(block.keys_values(tokens), dim=1) for block in self.blocks]  # type: ignore[operator]
        return {
            PERCEPTION + "words": words,
            PERCEPTION + "keys_values": torch.stack(keys_values, dim=1),  # (N, blocks, 2, heads, tokens, 64)
            PERCEPTION + "position": torch.cat([position for _, position in seen], dim=1),
            "state": observation["state"],
        }

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        """See :meth:`VLAModel.contextualize`."""
        words = perception[PERCEPTION + "words"]
        state = (perception["state"].float() - self.state_mean) / self.state_std
        state = self.state_encoder(state.clamp(-10, 10))  # (N, width)
        features = torch.cat([perception[PERCEPTION + "position"], words, state], dim=1)
        return Context(features.float(), (perception[PERCEPTION + "keys_values"], self.summary(features)))

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """See :meth:`VLAModel.denoise`."""
        return self.denoise_features(context, x, t)[0]

    def denoise_features(self, context: Context, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`VLAModel.denoise_features`."""
        keys_values, summary = context.state
        h = self.action_in(x) + self.action_position  # (R * N, H, width)
        condition = self.time_encoder(time_embedding(t)) + summary.repeat(len(x) // len(summary), 1)
        condition = F.silu(condition)
        for block, (keys, values) in zip(self.blocks, (kv.unbind(1) for kv in keys_values.unbind(1)), strict=True):
            h = block(h, condition, keys, values)
        shift, scale = self.action_modulation(condition)[:, None].chunk(2, dim=2)
        h = self.action_norm(h) * (1 + scale) + shift
        return self.action_out(h).float(), h.float()


class InstructionEncoder(nn.Module):
    """UTF-8 bytes, zero padded, uint8 (N, L), to one vector (N, width): two convolutions over bytes, then pooling.

    Convolutions give word pieces, so a sentence that shares words with known ones lands near them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.pieces = nn.Conv1d(64, 128, kernel_size=5, padding=2)
        self.phrases = nn.Conv1d(128, 128, kernel_size=5, padding=2, dilation=1)
        self.out = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, instruction: Tensor) -> Tensor:
        # Few different sentences are in a batch: encode each once.
        unique, inverse = torch.unique(instruction, dim=0, return_inverse=True)
        present = (unique != 0)[:, None].to(torch.float32)  # (U, 1, L)
        h = self.embedding(unique.long()).transpose(1, 2) * present
        h = F.silu(self.pieces(h)) * present
        h = F.silu(self.phrases(h)) * present
        mean = h.sum(2) / present.sum(2).clamp(min=1)
        # Padding counts as 0 in the maximum, so a sentence without any must see that 0 too.
        return self.out(torch.cat([mean, h.amax(2).clamp(min=0)], dim=1))[inverse]


class ImageEncoder(nn.Module):
    """Images, uint8 (N, 3, S, S), to visual tokens (N, (S / 16)^2, width) and to where in the grids each channel is
    strong, (N, 2 (channels[1] + channels[2])), which is finer than a token."""

    def __init__(self, side: int, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.grids = VisionEncoder(channels, width)
        self.projection = nn.Linear(channels[2], width)
        self.position = nn.Parameter(torch.randn((side // 16) ** 2, width) * 0.02)
        self.sharpness = nn.Parameter(torch.full((1, channels[1], 1, 1), 2.0))

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = self.grids(image.float().div_(127.5).sub_(1.0).contiguous(), words)
        tokens = self.projection(rearrange(coarse, "n c h w -> n (h w) c")) + self.position
        return tokens, torch.cat([expected_position(fine * self.sharpness), expected_position(coarse)], dim=1)


class VisionEncoder(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] to two grids of features: channels[1] at S / 8 and channels[2] at S / 16."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        first, second, third = channels
        self.stem = nn.Conv2d(3, first, kernel_size=6, stride=4, padding=1)
        self.down1 = nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1)
        self.block1 = ResidualBlock(second, width)
        self.down2 = nn.Conv2d(second, third, kernel_size=3, stride=2, padding=1)
        self.block2 = ResidualBlock(third, width)
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in (first, second))

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        h = F.silu(self.norms[0](self.stem(image)))
        h = F.silu(self.norms[1](self.down1(h)))
        h = self.block1(h, words)
        return h, self.block2(self.down2(h), words)


class ResidualBlock(nn.Module):
    """Two convolutions around a modulation by the instruction, with a residual connection."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.film = nn.Linear(width, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, h: Tensor, words: Tensor) -> Tensor:
        scale, shift = self.film(words)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv1(F.silu(self.norm(h)))
        return h + self.conv2(F.silu(inner * (1 + scale) + shift))


class ActionBlock(nn.Module):
    """Self-attention over the chunk, cross-attention to the context, a perceptron; each modulated (adaLN, DiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 9 * width)
        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.cross_q = nn.Linear(width, width)
        self.cross_kv = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        nn.init.zeros_(self.modulation.weight)
        # Gates start at one: from-scratch training is short, and a closed gate costs its first hundreds of steps.
        with torch.no_grad():
            bias = torch.zeros(9, width)
            bias[2::3] = 1.0
            self.modulation.bias.copy_(bias.flatten())

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, heads, tokens, 64) of the context for the cross-attention."""
        keys, values = self._split(self.cross_kv(tokens), 2)
        return keys, values

    def forward(self, h: Tensor, condition: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = self.modulation(condition)[:, None].chunk(
            9, dim=2
        )
        q, k, v = self._split(self.self_qkv(self.norm(h) * (1 + scale1) + shift1), 3)
        attended = _attention(q, k, v)
        h = h + gate1 * self.self_out(rearrange(attended, "n heads t d -> n t (heads d)"))
        (q,) = self._split(self.cross_q(self.norm(h) * (1 + scale2) + shift2), 1)
        # All R denoisings of a context query it together.
        q = rearrange(q, "(r n) heads t d -> n heads (r t) d", n=len(keys))
        attended = _attention(q, keys, values)
        attended = rearrange(attended, "n heads (r t) d -> (r n) t (heads d)", t=h.shape[1])
        h = h + gate2 * self.cross_out(attended)
        return h + gate3 * self.mlp(self.norm(h) * (1 + scale3) + shift3)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return rearrange(x, "n t (parts heads d) -> parts n heads t d", parts=parts, heads=self.heads).unbind()


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, (N, heads, tokens, 64) each.

    On a CPU it is written out: there the backward pass of torch's fused kernel takes ten times as long for so few
    tokens (``tests/benchmarks/bench_learner.py``).
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    return ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(dim=-1) @ value


def expected_position(grid: Tensor) -> Tensor:
    """Spatial soft-argmax (Levine et al. 2016): (N, C, h, w) to x and y in [-1, 1] of each channel, (N, 2 C)."""
    height, width = grid.shape[2:]
    weights = grid.float().flatten(2).softmax(dim=2)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=grid.device),
        torch.linspace(-1, 1, width, device=grid.device),
        indexing="ij",
    )
    return torch.cat([weights @ x.flatten(), weights @ y.flatten()], dim=1)


def time_embedding(t: Tensor, size: int = 64, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """Sine and cosine of flow times (N,) at log-spaced periods, (N, size), in float64 where it matters as pi0 does."""
    fraction = torch.linspace(0, 1, size // 2, dtype=torch.float64, device=t.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = t.double()[:, None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(t.dtype)
