"""Flow-SDE: denoising made stochastic, so that a flow policy has a log-probability (Flow-GRPO 2025; piRL 2025)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sb3_vla.distributions.base import (
    ActionDistribution,
    Trace,
    executed_mask,
    gaussian_kl,
    gaussian_log_prob,
    time_grid,
)
from sb3_vla.models.base import Context, VLAModel


class FlowSDE(ActionDistribution):
    """The flow's Euler steps, one or all of them with the noise of an SDE that has the same marginals.

    At flow time t, with step d to s = t - d and velocity v: predicted action x0 = x - t v, predicted noise
    x1 = x + (1 - t) v, and x_s ~ N(x0 (1 - s) + x1 (s - sigma^2 d / (2 t)), sigma^2 d), sigma = a sqrt(t / (1 - t));
    at t = 1 the denominator takes the next grid time.

    ``joint=False``: one step, drawn for each sample, is stochastic; the others follow the ODE. The trace holds that
    step alone, so an update needs one pass of the denoiser. ``joint=True``: all steps are, and the log-probability is
    the sum over the chain. Only executed steps count; the density is in the model's normalised units, whose
    constant Jacobian cancels in every ratio.

    :param action_chunk: K.
    :param noise_level: a.
    :param joint: whether all steps are stochastic.
    :param denoising_steps: Euler steps.
    """

    def __init__(
        self, action_chunk: int, noise_level: float = 0.5, joint: bool = False, denoising_steps: int = 4
    ) -> None:
        super().__init__(action_chunk, denoising_steps)
        if not (math.isfinite(noise_level) and noise_level > 0):
            raise ValueError(f"noise_level={noise_level!r}; expected a positive number")
        self.noise_level = noise_level
        self.joint = joint

    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        count, device = len(context.features), context.features.device
        x = torch.randn((count, model.action_horizon, model.action_dim), generator=generator, device=device)
        drawn = torch.randint(self.denoising_steps, (count,), generator=generator, device=device)
        chain = [x]
        for step in range(self.denoising_steps):
            index = torch.full((count,), step, device=device)
            mean, std, ode = self._kernel(model, context, x, index)
            noise = torch.randn(x.shape, generator=generator, device=device)
            stochastic = mean + std * noise
            x = stochastic if self.joint else torch.where((drawn == step)[:, None, None], stochastic, ode)
            chain.append(x)
        action = self.executed_actions(model, x)
        stacked = torch.stack(chain, dim=1)  # (N, steps + 1, H, A)
        if self.joint:
            return action, {"chain": stacked}
        rows = torch.arange(count, device=device)
        return action, {"chain": stacked[rows[:, None], torch.stack([drawn, drawn + 1], 1)], "denoising_index": drawn}

    def transition(self, model: VLAModel, context: Context, trace: Trace) -> tuple[Tensor, Tensor]:
        chain = trace["chain"]  # (N, 2 or steps + 1, H, A)
        transitions = chain.shape[1] - 1
        # All transitions of a sample at once: row r * N + n is transition r of sample n.
        start = chain[:, :-1].transpose(0, 1).flatten(0, 1)
        if self.joint:
            index = torch.arange(transitions, device=chain.device).repeat_interleave(len(chain))
        else:
            index = trace["denoising_index"].flatten().long()
        mean, std, _ = self._kernel(model, context, start, index)
        shape = (transitions, len(chain), *mean.shape[1:])
        return mean.reshape(shape).transpose(0, 1), std.expand_as(mean).reshape(shape).transpose(0, 1)

    def log_prob(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> Tensor:
        elementwise = gaussian_log_prob(trace["chain"][:, 1:], mean, std)
        return self._sum_executed(elementwise, executed)

    def kl_divergence(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        return self._sum_executed(gaussian_kl(mean, std, reference_mean, reference_std), executed)

    def _sum_executed(self, elementwise: Tensor, executed: Tensor) -> Tensor:
        mask = executed_mask(executed, self.action_chunk)[:, None]
        return (elementwise[:, :, : self.action_chunk] * mask).sum((1, 2, 3))

    def _kernel(self, model: VLAModel, context: Context, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation of the stochastic step ``index`` (N,) from x, and where the ODE would go."""
        grid = time_grid(self.denoising_steps, x.device)
        t, s = grid[index], grid[index + 1]
        velocity = model.denoise(context, x, t)
        denominator = torch.where(t == 1, 1 - grid[1], 1 - t)
        sigma = self.noise_scale * self.noise_level * (t / denominator).sqrt()
        t, s, sigma = t[:, None, None], s[:, None, None], sigma[:, None, None]
        step = t - s
        x0 = x - t * velocity
        x1 = x + (1 - t) * velocity
        mean = x0 * (1 - s) + x1 * (s - sigma.square() * step / (2 * t))
        return mean, sigma * step.sqrt(), x - step * velocity
