"""Flow-Noise: the flow's Euler steps with noise of a learned size (ReinFlow, Zhang et al. 2025; piRL 2025)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sb3_vla.common.errors import InputError
from sb3_vla.distributions.base import gaussian_entropy
from sb3_vla.distributions.chain import DenoisingChain, time_grid
from sb3_vla.models.base import Context, VLAModel


class FlowNoise(DenoisingChain):
    """x_s ~ N(x - d v, std^2), where a perceptron computes std from the features from which the model computes v.

    The logarithm of the variance lies within ``noise_range``, in the middle of it before training. The noise is not
    that of an SDE of the flow, so the marginals are not the flow's; training reduces it where it does harm. The entropy
    is that of the chain given its start: the sum over its stochastic steps.

    :param action_chunk: K.
    :param feature_dim: the model's ``action_feature_dim``.
    :param latent_dim: L.
    :param noise_range: least and largest standard deviation, normalized units; piRL takes 0.04 to 0.1 in MetaWorld.
    :param joint: whether all steps are stochastic, or one drawn for each sample.
    :param denoising_steps: Euler steps.
    :param widths: hidden layers of the noise head.
    :param fixed_start: start at zero noise, see :class:`DenoisingChain`.
    """

    has_entropy = True

    def __init__(
        self,
        action_chunk: int,
        feature_dim: int,
        latent_dim: int,
        noise_range: Sequence[float] = (0.08, 0.16),
        joint: bool = True,
        denoising_steps: int = 4,
        widths: Sequence[int] = (128, 64, 32),
        fixed_start: bool = False,
    ) -> None:
        super().__init__(action_chunk, denoising_steps, joint, fixed_start)
        if len(noise_range) != 2 or not 0 < noise_range[0] < noise_range[1] < math.inf:
            raise InputError(f"noise_range={noise_range!r}; expected two numbers, 0 < least < largest")
        self.lowest, self.highest = (2 * math.log(std) for std in noise_range)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise((feature_dim, *widths)):
            layers += [nn.Linear(inner, outer), nn.Tanh()]
        self.noise_head = nn.Sequential(*layers, nn.Linear((feature_dim, *widths)[-1], latent_dim), nn.Tanh())
        last = self.noise_head[-2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @classmethod
    def for_model(cls, model: VLAModel, action_chunk: int, **options: Any) -> FlowNoise:
        """See :meth:`ActionDistribution.for_model`.

        :raises ValueError: for a model without features of its actions.
        """
        if model.action_feature_dim is None:
            raise InputError(
                f"flow_noise reads the features of each action, which {type(model).__name__} does not give; "
                "use flow_sde or flow_cps"
            )
        return cls(action_chunk, model.action_feature_dim, model.latent_dim, **options)

    def kernel(self, model: VLAModel, context: Context, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DenoisingChain.kernel`."""
        grid = time_grid(self.denoising_steps, x.device)
        t, s = grid[index], grid[index + 1]
        velocity, features = model.denoise_features(context, x, t)
        reached = x - (t - s)[:, None, None] * velocity.float()
        with torch.autocast(x.device.type, enabled=False):  # log-probabilities are float32
            fraction = (self.noise_head(features.float()) + 1) / 2
        std = torch.exp(0.5 * (self.lowest + (self.highest - self.lowest) * fraction))
        return reached, self.noise_scale * std, reached

    def entropy(self, mean: Tensor, std: Tensor, executed: Tensor) -> Tensor:
        """See :meth:`ActionDistribution.entropy`."""
        return self._mask(gaussian_entropy(std), executed).sum((1, 2, 3))
