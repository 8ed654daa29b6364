"""Flow-CPS: coefficients-preserving sampling (Wang & Yu 2025), the flow's counterpart of DDIM with noise."""

from __future__ import annotations

import math

from torch import Tensor

from sb3_vla.common.errors import InputError
from sb3_vla.distributions.chain import FlowChain


class FlowCPS(FlowChain):
    """The flow's Euler steps, one or all of them with a part of the predicted noise exchanged for fresh noise.

    With the letters of :class:`FlowChain`, c = s cos(pi a / 2) and std = s sin(pi a / 2): action and noise keep the
    coefficients (1 - s) and s, so where the observation tells the action the marginals are exact at any number of
    steps. Where several actions are right, they come out narrower, because the predicted noise is then an average; more
    steps do not help. The last step, s = 0, has no noise and no density; it is never the drawn one.

    :param action_chunk: K.
    :param noise_level: a, above 0 and at most 1, where all noise is fresh.
    :param joint: whether all steps but the last are stochastic, or one drawn for each sample.
    :param denoising_steps: Euler steps, at least 2.
    :param fixed_start: start at zero noise, see :class:`DenoisingChain`.
    """

    greatest_noise = 1.0
    least_steps = 2  # the last one has no noise

    @property
    def random_steps(self) -> range:
        """See :attr:`DenoisingChain.random_steps`."""
        return range(self.denoising_steps - 1)

    def noise(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FlowChain.noise`."""
        most = math.sin(math.pi * self.noise_level / 2)
        fresh = self.noise_scale * most
        if fresh > 1:
            raise InputError(
                f"noise_scale={self.noise_scale:g} with noise_level={self.noise_level:g} asks flow_cps for more noise "
                f"than there is; expected a noise_scale of at most {1 / most:g}, or a lower noise_level"
            )
        return s * math.sqrt(1 - fresh**2), s * fresh
