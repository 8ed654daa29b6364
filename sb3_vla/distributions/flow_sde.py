"""Flow-SDE: denoising made stochastic, so that a flow policy has a log-probability (Flow-GRPO 2025; piRL 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from sb3_vla.distributions.chain import FlowChain


class FlowSDE(FlowChain):
    """The flow's Euler steps, one or all of them with the noise of an SDE that has the same marginals.

    With the letters of :class:`FlowChain`, c = s - sigma^2 d / (2 t) and std = sigma sqrt(d), where
    sigma = a sqrt(t / (1 - t)); at t = 1 the denominator takes the next grid time. The marginals are those of the flow
    up to the error of the step, which adds noise: with few steps and a large a, visibly.

    :param action_chunk: K.
    :param noise_level: a.
    :param joint: whether all steps are stochastic, or one drawn for each sample.
    :param denoising_steps: Euler steps.
    :param fixed_start: start at zero noise, see :class:`DenoisingChain`.
    """

    def noise(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FlowChain.noise`."""
        denominator = torch.where(t == 1, 1 - s, 1 - t)
        sigma = self.noise_scale * self.noise_level * (t / denominator).sqrt()
        step = t - s
        return s - sigma.square() * step / (2 * t), sigma * step.sqrt()
