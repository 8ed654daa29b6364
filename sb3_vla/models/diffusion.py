"""What models with a diffusion head share: noise schedules, the conditional 1-D U-Net, normalization, the loss.

The U-Net is that of Diffusion Policy (Chi et al. 2023) with LeRobot's names of modules, so published weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mw_envs.tasks import did_you_mean
from sb3_vla.common import batch_noise as draw
from sb3_vla.common.errors import InputError
from sb3_vla.models.base import VLAModel
from sb3_vla.models.normalization import normalize, unnormalize

SCHEDULES = ("squaredcos_cap_v2", "linear")
NORMALIZATIONS = ("identity", "mean_std", "min_max")
DIFFUSION_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_MOMENTS = ("mean", "std", "min", "max")


class DiffusionModel(VLAModel):
    """A model whose denoiser was trained on diffusion timesteps.

    :param action_dim: A.
    :param action_horizon: H.
    :param state_dim: size of the proprioceptive state.
    :param prediction: what the denoiser puts out: ``epsilon``, ``sample`` or ``v_prediction``.
    :param timesteps: T.
    :param schedule: ``squaredcos_cap_v2`` or ``linear``, see :func:`noise_schedule`.
    :param normalization: how ``state`` and ``action`` are normalized, names in :data:`NORMALIZATIONS`. Samplers clip
        predicted actions to [-1, 1], which is the data's range with ``min_max``.
    :param mask_padding: whether the loss leaves out steps past the end of an episode; else they count, with the last
        action repeated.
    """

    def __init__(
        self,
        action_dim: int,
        action_horizon: int,
        state_dim: int,
        prediction: str,
        timesteps: int,
        schedule: str,
        normalization: dict[str, str],
        mask_padding: bool,
    ) -> None:
        super().__init__(action_dim, action_horizon)
        if prediction not in DIFFUSION_PREDICTIONS:
            raise InputError(f"Unknown prediction={prediction!r}; {did_you_mean(prediction, DIFFUSION_PREDICTIONS)}")
        for kind in normalization.values():
            if kind not in NORMALIZATIONS:
                raise InputError(f"Unknown normalization {kind!r}; {did_you_mean(kind, NORMALIZATIONS)}")
        self.prediction = prediction
        self.normalization = normalization
        self.mask_padding = mask_padding
        self.register_buffer("alphas_cumprod", noise_schedule(schedule, timesteps), persistent=False)
        self.register_buffer("action_min", -torch.ones(action_dim))
        self.register_buffer("action_max", torch.ones(action_dim))
        self._register_statistics("state", (state_dim,))

    def _register_statistics(self, name: str, shape: tuple[int, ...]) -> None:
        """Buffers ``name_mean`` and so on, so that each normalization changes nothing until they are set."""
        for moment, value in zip(_MOMENTS, (0.0, 1.0, -1.0, 1.0), strict=True):
            self.register_buffer(f"{name}_{moment}", torch.full(shape, value))

    def _normalize(self, name: str, value: Tensor) -> Tensor:
        return normalize(value, self._statistics(name), self.normalization[name], "lerobot")

    def _statistics(self, name: str) -> dict[str, Tensor]:
        return {moment: getattr(self, f"{name}_{moment}") for moment in _MOMENTS}

    def normalize_action(self, action: Tensor) -> Tensor:
        """See :meth:`VLAModel.normalize_action`."""
        return self._normalize("action", action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """See :meth:`VLAModel.unnormalize_action`."""
        return unnormalize(action, self._statistics("action"), self.normalization["action"], "lerobot")

    def imitation_loss(
        self, observation: dict[str, Tensor], actions: Tensor, mask: Tensor, *, draws: int = 1
    ) -> Tensor:
        """Mean squared error of the prediction at uniform timesteps (Ho et al. 2020, eq. 14); see
        :meth:`VLAModel.imitation_loss`.

        A model whose horizon begins in the past imitates the first action there too: only what comes after the
        observation is known, and LeRobot pads the beginning of an episode likewise.
        """
        context = self.encode(observation)
        past = self.first_action
        if past:
            actions = torch.cat([actions[:, :1].expand(-1, past, -1), actions[:, :-past]], dim=1)
            mask = torch.cat([torch.zeros_like(mask[:, :past]), mask[:, :-past]], dim=1)
        x0 = self.normalize_action(actions).repeat(draws, 1, 1)
        noise = draw.normal(x0.shape, device=x0.device)
        t = draw.integers(0, len(self.alphas_cumprod), (len(x0),), device=x0.device)
        x, target = self.noised(x0, noise, t)
        error = (self.denoise(context, x, t) - target).square().mean(dim=2)
        if not self.mask_padding:
            return error.mean()
        weight = mask.to(error.dtype).repeat(draws, 1)
        return (error * weight).sum() / weight.sum()

    def imitation_weight(self, mask: Tensor) -> float:
        """See :meth:`VLAModel.imitation_weight`."""
        return mask[:, : mask.shape[1] - self.first_action].sum().item() if self.mask_padding else len(mask)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized chunks (N, H, L) at timesteps (N,), and what the denoiser should put out there."""
        alphas = self.alphas_cumprod[t][:, None, None]
        signal, deviation = alphas.sqrt(), (1 - alphas).sqrt()
        x = signal * x0 + deviation * noise
        targets = {"epsilon": noise, "sample": x0, "v_prediction": signal * noise - deviation * x0}
        return x, targets[self.prediction]


def noise_schedule(schedule: str, timesteps: int) -> Tensor:
    """abar of each timestep, float32 (T,).

    :param schedule: ``squaredcos_cap_v2``: squared cosine (Nichol & Dhariwal 2021, eq. 17), betas at most 0.999;
        ``linear``: betas from 1e-4 to 0.02 (Ho et al. 2020).
    :param timesteps: T.
    :raises ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"Unknown schedule={schedule!r}; {did_you_mean(schedule, SCHEDULES)}")
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, timesteps)
    else:
        time = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        level = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999).float()
    return (1 - betas).cumprod(0)


class ConditionalUnet1d(nn.Module):
    """A U-Net over the steps of an action chunk, each block modulated by timestep and observation (FiLM).

    :param channels: L.
    :param condition_dim: size of what it knows of the observation.
    :param down_dims: channels of the levels, multiples of ``groups``; each level but the first halves the chunk.
    :param kernel_size: of the convolutions, odd.
    :param groups: of the group norms.
    :param step_dim: size of the timestep's embedding, even.
    :param scale: whether a block is scaled as well as shifted.
    :param sinusoid: the timestep's embedding, int64 (B,) to float32 (B, step_dim).
    """

    def __init__(
        self,
        channels: int,
        condition_dim: int,
        down_dims: Sequence[int],
        kernel_size: int = 5,
        groups: int = 8,
        step_dim: int = 128,
        scale: bool = True,
        sinusoid: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for dim in down_dims:
            if dim % groups:
                raise InputError(f"down_dims={tuple(down_dims)}; expected multiples of groups={groups}")
        self.step_dim = step_dim
        self.sinusoid = sinusoid or step_sinusoid
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(step_dim, 4 * step_dim), nn.Mish(), nn.Linear(4 * step_dim, step_dim)
        )

        def block(inside: int, outside: int) -> ConditionalBlock1d:
            return ConditionalBlock1d(inside, outside, step_dim + condition_dim, kernel_size, groups, scale)

        levels = list(pairwise([channels, *down_dims]))
        self.down_modules = nn.ModuleList(
            nn.ModuleList(
                [
                    block(above, below),
                    block(below, below),
                    nn.Identity() if depth == len(levels) - 1 else nn.Conv1d(below, below, 3, 2, 1),
                ]
            )
            for depth, (above, below) in enumerate(levels)
        )
        deepest = down_dims[-1]
        self.mid_modules = nn.ModuleList([block(deepest, deepest), block(deepest, deepest)])
        self.up_modules = nn.ModuleList(
            nn.ModuleList([block(2 * below, above), block(above, above), nn.ConvTranspose1d(above, above, 4, 2, 1)])
            for above, below in reversed(levels[1:])
        )
        first = down_dims[0]
        self.final_conv = nn.Sequential(ConvBlock1d(first, first, kernel_size, groups), nn.Conv1d(first, channels, 1))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Chunks (B, H, L), timesteps (B,) and conditions (B, condition_dim) to predictions (B, H, L)."""
        step = self.diffusion_step_encoder(self.sinusoid(t, self.step_dim).to(condition.dtype))
        condition = torch.cat([step, condition], dim=1)
        h = x.transpose(1, 2)
        skips = []
        for stage in self.down_modules:
            first, second, shorter = cast(nn.ModuleList, stage)
            h = second(first(h, condition), condition)
            skips.append(h)
            h = shorter(h)
        for block in self.mid_modules:
            h = block(h, condition)
        for stage in self.up_modules:
            first, second, longer = cast(nn.ModuleList, stage)
            h = torch.cat([h, skips.pop()], dim=1)
            h = longer(second(first(h, condition), condition))
        return self.final_conv(h).transpose(1, 2)


class ConditionalBlock1d(nn.Module):
    """Two convolutions with a modulation between, and a residual connection."""

    def __init__(
        self, inside: int, outside: int, condition_dim: int, kernel_size: int, groups: int, scale: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.conv1 = ConvBlock1d(inside, outside, kernel_size, groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition_dim, 2 * outside if scale else outside))
        self.conv2 = ConvBlock1d(outside, outside, kernel_size, groups)
        self.residual_conv = nn.Conv1d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.cond_encoder(condition)[:, :, None]
        h = self.conv1(x)
        if self.scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = scale * h + shift
        else:
            h = h + modulation
        return self.conv2(h) + self.residual_conv(x)


class ConvBlock1d(nn.Module):
    """Convolution, group norm, Mish."""

    def __init__(self, inside: int, outside: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(inside, outside, kernel_size, padding=kernel_size // 2), nn.GroupNorm(groups, outside), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def step_sinusoid(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of timesteps (B,) at log-spaced frequencies 1 ... 1e-4, float32 (B, size)."""
    half = size // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def check_horizon(horizon: int, down_dims: Sequence[int]) -> None:
    """:raises ValueError: for a chunk that the U-Net's levels cannot halve and double again."""
    step = 2 ** (len(down_dims) - 1)
    if horizon < step or horizon % step:
        raise InputError(
            f"action_horizon={horizon} with {len(down_dims)} levels in down_dims; expected a multiple of {step}, such "
            f"as {max(1, math.ceil(horizon / step)) * step}. The environment's action_chunk may be shorter"
        )


def shrink(image: Tensor, size: int) -> Tensor:
    """Images (N, 3, h, w) at size x size by antialiased bilinear interpolation; unchanged where they have it."""
    if image.shape[2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True)
