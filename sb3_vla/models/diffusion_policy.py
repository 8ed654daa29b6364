"""Diffusion Policy (Chi et al. 2023) as LeRobot publishes it: ResNet with spatial soft-argmax, conditional 1-D U-Net.

A decision has one image. A model of ``n_obs_steps`` > 1 takes it as all of them, as the original does at the start of
an episode; whoever has the earlier ones gives ``image`` (N, n_obs_steps, 3, h, w) and ``state`` (N, n_obs_steps, S),
newest last. Imitation shows it the same repeated image that it will act on.

LeRobot's random crop is a random shift before the crop of the center: with a crop of c out of s pixels, imitation's
``shift=(s - c) // 2`` draws from the same windows. In rollouts and updates the window is the center.

Ours is the instruction: Diffusion Policy knows one task. With ``instruction_dim`` > 0 a byte-level encoder of the
sentence gives numbers that stand where LeRobot has ``observation.environment_state``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.models.base import PERCEPTION, Context
from sb3_vla.models.compact import InstructionEncoder
from sb3_vla.models.diffusion import ConditionalUnet1d, DiffusionModel, check_horizon, shrink

#: residual blocks of each stage
RESNETS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
NORMS = ("group", "batch")
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "min": (0.0,) * 3, "max": (1.0,) * 3}


class DiffusionPolicy(DiffusionModel):
    """Diffusion Policy. The defaults are a small one that trains from scratch; LeRobot's is
    ``widths=(64, 128, 256, 512), keypoints=32, down_dims=(512, 1024, 2048), instruction_dim=0`` (263 M parameters).

    :param action_dim: A.
    :param action_horizon: H, a multiple of 2^(levels - 1).
    :param state_dim: size of the proprioceptive state.
    :param image_size: side of the square image that is cropped; others are brought to it.
    :param crop_size: side of the window in its center; None for all of it.
    :param n_obs_steps: observations it knows, at successive environment steps; its horizon begins with the first.
    :param instruction_dim: size of what it knows of the instruction; 0 for nothing, as published.
    :param resnet: name in :data:`RESNETS`.
    :param widths: channels of the ResNet's four stages, multiples of 16 with group norms.
    :param norm: ``group`` (groups of 16 channels), or ``batch``, always with its stored statistics: a ratio of
        probabilities must not depend on the batch.
    :param keypoints: of the spatial soft-argmax.
    :param down_dims: channels of the U-Net's levels.
    :param kernel_size: of the U-Net.
    :param groups: of the U-Net's norms.
    :param step_dim: size of the timestep's embedding.
    :param film_scale: whether the U-Net's blocks are scaled as well as shifted.
    :param prediction: see :class:`DiffusionModel`, as the next ones.
    :param timesteps: T.
    :param schedule: noise schedule.
    :param normalization: of ``image``, ``state`` and ``action``.
    :param mask_padding: of the loss.
    """

    def __init__(
        self,
        action_dim: int = 4,
        action_horizon: int = 8,
        state_dim: int = 4,
        image_size: int = 96,
        crop_size: int | None = None,
        n_obs_steps: int = 1,
        instruction_dim: int = 64,
        resnet: str = "resnet18",
        widths: Sequence[int] = (32, 32, 64, 128),
        norm: str = "group",
        keypoints: int = 32,
        down_dims: Sequence[int] = (64, 128, 256),
        kernel_size: int = 5,
        groups: int = 8,
        step_dim: int = 64,
        film_scale: bool = True,
        prediction: str = "epsilon",
        timesteps: int = 100,
        schedule: str = "squaredcos_cap_v2",
        normalization: Mapping[str, str] | None = None,
        mask_padding: bool = True,
    ) -> None:
        modes = {"image": "mean_std", "state": "min_max", "action": "min_max", **(normalization or {})}
        super().__init__(action_dim, action_horizon, state_dim, prediction, timesteps, schedule, modes, mask_padding)
        self.config = {
            "action_dim": action_dim,
            "action_horizon": action_horizon,
            "state_dim": state_dim,
            "image_size": image_size,
            "crop_size": crop_size,
            "n_obs_steps": n_obs_steps,
            "instruction_dim": instruction_dim,
            "resnet": resnet,
            "widths": list(widths),
            "norm": norm,
            "keypoints": keypoints,
            "down_dims": list(down_dims),
            "kernel_size": kernel_size,
            "groups": groups,
            "step_dim": step_dim,
            "film_scale": film_scale,
            "prediction": prediction,
            "timesteps": timesteps,
            "schedule": schedule,
            "normalization": modes,
            "mask_padding": mask_padding,
        }
        check_horizon(action_horizon, down_dims)
        if not 1 <= n_obs_steps <= action_horizon:
            raise InputError(f"n_obs_steps={n_obs_steps}; expected 1 to action_horizon={action_horizon}")
        if crop_size is not None and not 0 < crop_size <= image_size:
            raise InputError(f"crop_size={crop_size}; expected 1 to image_size={image_size}, or None")
        self.image_size = (image_size, image_size)
        self.crop_size = crop_size or image_size
        self.n_obs_steps = n_obs_steps
        self.first_action = n_obs_steps - 1
        self._register_statistics("image", (3, 1, 1))
        self.set_statistics({f"image_{moment}": torch.tensor(v).view(3, 1, 1) for moment, v in _IMAGENET.items()})
        self.rgb_encoder = RgbEncoder(self.crop_size, resnet, widths, norm, keypoints)
        self.instruction_encoder = InstructionEncoder(instruction_dim) if instruction_dim else None
        self.feature_dim = n_obs_steps * (state_dim + 2 * keypoints + instruction_dim)
        self.unet = ConditionalUnet1d(
            action_dim, self.feature_dim, down_dims, kernel_size, groups, step_dim, film_scale
        )

    def backbone(self) -> Iterator[nn.Parameter]:
        """See :meth:`VLAModel.backbone`."""
        yield from self.rgb_encoder.parameters()
        if self.instruction_encoder is not None:
            yield from self.instruction_encoder.parameters()

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`VLAModel.perceive`; ``image`` and ``state`` may have a second axis of ``n_obs_steps``.

        :raises ValueError: for another number of observations.
        """
        image = observation["image"]
        steps = image.shape[1] if image.ndim == 5 else 1
        if steps not in (1, self.n_obs_steps):
            raise InputError(f"image has {steps} observations; expected 1 or n_obs_steps={self.n_obs_steps}")
        features = self.rgb_encoder(self.window(image.reshape(-1, *image.shape[-3:])))
        perception = {PERCEPTION + "image": features.unflatten(0, (-1, steps)), "state": observation["state"]}
        if self.instruction_encoder is not None:
            perception[PERCEPTION + "words"] = self.instruction_encoder(observation["instruction"])
        return perception

    def window(self, image: Tensor) -> Tensor:
        """What the ResNet reads of images uint8 (N, 3, h, w): normalized, brought to size, cropped; float32."""
        image = shrink(self._normalize("image", image.float() / 255), self.image_size[0])
        margin = (self.image_size[0] - self.crop_size) / 2
        start = round(margin)  # to even, as torchvision does
        return image[:, :, start : start + self.crop_size, start : start + self.crop_size]

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        """See :meth:`VLAModel.contextualize`."""
        state = self._normalize("state", perception["state"].float())
        if state.ndim == 2:
            state = state[:, None]
        known = [state, perception[PERCEPTION + "image"]]
        if self.instruction_encoder is not None:
            known.append(perception[PERCEPTION + "words"][:, None])
        condition = torch.cat([part.expand(-1, self.n_obs_steps, -1) for part in known], dim=2).flatten(1)
        return Context(condition.float(), condition)

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """See :meth:`VLAModel.denoise`."""
        return self.unet(x, t, context.state.repeat(len(x) // len(context.state), 1)).float()


class RgbEncoder(nn.Module):
    """Images (N, 3, size, size) to the places of key points, (N, 2 keypoints): ResNet, spatial soft-argmax."""

    def __init__(self, size: int, resnet: str, widths: Sequence[int], norm: str, keypoints: int) -> None:
        super().__init__()
        if resnet not in RESNETS:
            raise InputError(f"Unknown resnet={resnet!r}; {did_you_mean(resnet, RESNETS)}")
        if norm not in NORMS:
            raise InputError(f"Unknown norm={norm!r}; {did_you_mean(norm, NORMS)}")
        if len(widths) != 4 or any(width < 16 or width % 16 for width in widths):
            raise InputError(f"widths={tuple(widths)}; expected four multiples of 16")
        stages = []
        inside = widths[0]
        for stage, (blocks, width) in enumerate(zip(RESNETS[resnet], widths, strict=True)):
            first = ResidualBlock2d(inside, width, stride=1 if stage == 0 else 2, norm=norm)
            stages.append(nn.Sequential(first, *(ResidualBlock2d(width, width, 1, norm) for _ in range(blocks - 1))))
            inside = width
        stem = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.backbone = nn.Sequential(stem, _norm(norm, widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *stages)
        grid = size
        for _ in range(5):
            grid = (grid + 1) // 2
        if grid < 2:
            raise InputError(
                f"Pictures of {size} pixels leave one cell, in which nothing has a place; expected over 32"
            )
        self.pool = SpatialSoftmax(widths[3], keypoints, grid)
        self.out = nn.Linear(2 * keypoints, 2 * keypoints)

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(self.out(self.pool(self.backbone(image)).flatten(1)))


class ResidualBlock2d(nn.Module):
    """The basic block of a ResNet (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = _norm(norm, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = _norm(norm, outside)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), _norm(norm, outside))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class StoredBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by its stored statistics, in training too."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _norm(norm: str, channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels) if norm == "group" else StoredBatchNorm2d(channels)


class SpatialSoftmax(nn.Module):
    """Where in a grid (N, C, size, size) each key point is, x and y in [-1, 1], (N, keypoints, 2).

    Spatial soft-argmax (Levine et al. 2016) of a 1 x 1 convolution. The grid's coordinates are a part of the published
    weights.
    """

    pos_grid: Tensor

    def __init__(self, channels: int, keypoints: int, size: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, keypoints, 1)
        line = torch.linspace(-1, 1, size, dtype=torch.float64).float()
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("pos_grid", torch.stack([x.flatten(), y.flatten()], dim=1))

    def forward(self, grid: Tensor) -> Tensor:
        return self.nets(grid).float().flatten(2).softmax(dim=2) @ self.pos_grid
