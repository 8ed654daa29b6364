"""A Gaussian around the chunk that the flow reaches from zero noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sb3_vla.distributions.base import (
    ActionDistribution,
    Trace,
    executed_mask,
    gaussian_kl,
    gaussian_log_prob,
    integrate,
)
from sb3_vla.models.base import Context, VLAModel


class GaussianChunk(ActionDistribution):
    """Actions mu + std * noise, where the noise of a chunk's K steps is independent or common.

    ``coherence="independent"``: K x A independent normals. ``coherence="offset"``: one A-dimensional offset moves the
    whole chunk, so exploration persists over the chunk instead of averaging out. The offset is then all that is random:
    the log-probability is that of the chunk's mean action under N(mean of mu, std^2), and the chunk's shape around its
    mean follows the network without being explored.

    :param action_chunk: K.
    :param action_dim: A.
    :param std: standard deviation in environment units (the box is -1..1), one or A numbers.
    :param coherence: ``independent`` or ``offset``.
    :param learn_std: whether the deviation is trained; only then does it have an entropy worth a bonus.
    :param denoising_steps: Euler steps to the mean. From zero noise the first one leads to the mean of the actions that
        were imitated (the velocity there is minus that mean), and more steps measured the same success.
    """

    needs_trace = False
    log_std: Tensor

    def __init__(
        self,
        action_chunk: int,
        action_dim: int,
        std: float | Sequence[float] = 0.2,
        coherence: str = "independent",
        learn_std: bool = False,
        denoising_steps: int = 1,
    ) -> None:
        super().__init__(action_chunk, denoising_steps)
        if coherence not in ("independent", "offset"):
            raise ValueError(f"coherence={coherence!r}; expected 'independent' or 'offset'")
        values = torch.as_tensor(std, dtype=torch.float32).expand(action_dim) if _is_valid(std, action_dim) else None
        if values is None:
            raise ValueError(f"std={std!r}; expected one positive number or {action_dim} of them")
        self.coherent = coherence == "offset"
        self.learn_std = self.has_entropy = learn_std
        if learn_std:
            self.log_std = nn.Parameter(values.log().clone())
        else:  # no parameter: sb3-contrib's TRPO wants a gradient of every one
            self.register_buffer("log_std", values.log().clone())

    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        mean = self.mode(model, context)
        steps = 1 if self.coherent else self.action_chunk
        noise = torch.randn((len(mean), steps, mean.shape[2]), generator=generator, device=mean.device)
        action = mean + self._std() * noise
        return action, {"action": action}

    def transition(self, model: VLAModel, context: Context, trace: Trace) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(context.features), model.action_horizon, model.action_dim, device=context.features.device)
        mean = self.executed_actions(model, integrate(model, context, x, self.denoising_steps))
        return mean, self._std().expand_as(mean)

    def _std(self) -> Tensor:
        return self.noise_scale * self.log_std.exp()

    def log_prob(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> Tensor:
        action = trace["action"].reshape(mean.shape)
        if self.coherent:
            return gaussian_log_prob(action.mean(1), mean.mean(1), std[:, 0]).sum(1)
        elementwise = gaussian_log_prob(action, mean, std)
        return (elementwise * executed_mask(executed, self.action_chunk)).sum((1, 2))

    def kl_divergence(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        if self.coherent:
            return gaussian_kl(mean.mean(1), std[:, 0], reference_mean.mean(1), reference_std[:, 0]).sum(1)
        elementwise = gaussian_kl(mean, std, reference_mean, reference_std)
        return (elementwise * executed_mask(executed, self.action_chunk)).sum((1, 2))

    def entropy(self, std: Tensor, executed: Tensor) -> Tensor | None:
        if not self.learn_std:
            return None
        per_step = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(2)  # (N, K)
        if self.coherent:
            return per_step[:, 0]
        return (per_step * executed_mask(executed, self.action_chunk)[:, :, 0]).sum(1)


def _is_valid(std: float | Sequence[float], action_dim: int) -> bool:
    values = [std] if isinstance(std, (int, float)) else list(std)
    return len(values) in (1, action_dim) and all(value > 0 and math.isfinite(value) for value in values)
