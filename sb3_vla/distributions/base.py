"""What an action distribution offers to an algorithm: samples, and their log-probability under later weights.

A *trace* is what must be stored to compute the log-probability of a sample again: the action itself, or two ends of a
stochastic denoising step. Letters as in :mod:`sb3_vla.models.base`; K is the executed chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor, nn

from sb3_vla.models.base import Context, VLAModel

Trace = dict[str, Tensor]


class ActionDistribution(nn.Module, ABC):
    """A distribution of action chunks (N, K, A) in environment units around what a model denoises.

    :param action_chunk: K, executed actions per decision.
    :param denoising_steps: Euler steps from noise to action.
    """

    #: whether the log-probability follows from observation and action alone, as stock Stable-Baselines3 needs
    needs_trace = True
    #: whether the entropy depends on the weights, so that a bonus on it has an effect
    has_entropy = False
    #: factor of the exploration noise, which an algorithm may lower as it learns
    noise_scale = 1.0

    def __init__(self, action_chunk: int, denoising_steps: int) -> None:
        super().__init__()
        if denoising_steps < 1:
            raise ValueError(f"denoising_steps={denoising_steps}; expected at least 1")
        self.action_chunk = action_chunk
        self.denoising_steps = denoising_steps

    @abstractmethod
    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        """Draw action chunks, float32 (N, K, A) in environment units (not clipped), and their trace."""

    @abstractmethod
    def transition(self, model: VLAModel, context: Context, trace: Trace) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what is random in the trace, under the model's present weights.

        Two of these give the Kullback-Leibler divergence of two sets of weights.
        """

    @abstractmethod
    def log_prob(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> Tensor:
        """Log-density of the trace, float32 (N,), summed over the executed steps.

        :param mean: from :meth:`transition`.
        :param std: from :meth:`transition`.
        :param executed: environment steps of the chunk that were run, int64 (N,); the others had no effect.
        """

    @abstractmethod
    def kl_divergence(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        """KL(this transition || reference transition), (N,), executed steps only."""

    def entropy(self, std: Tensor, executed: Tensor) -> Tensor | None:
        """Differential entropy of the executed steps, (N,), or None where it does not depend on the weights."""
        return None

    def mode(self, model: VLAModel, context: Context) -> Tensor:
        """The deterministic action chunk (N, K, A): the flow followed from zero noise."""
        x = torch.zeros(len(context.features), model.action_horizon, model.action_dim, device=context.features.device)
        return self.executed_actions(model, integrate(model, context, x, self.denoising_steps))

    def executed_actions(self, model: VLAModel, x: Tensor) -> Tensor:
        """The executed part of denoised chunks (N, H, A), in environment units (N, K, A)."""
        return model.unnormalise_action(x[:, : self.action_chunk])


def time_grid(steps: int, device: torch.device | None = None) -> Tensor:
    """Flow times 1 = t_0 > ... > t_steps = 0, float32 (steps + 1,)."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=device).to(torch.float32)


def integrate(model: VLAModel, context: Context, x: Tensor, steps: int) -> Tensor:
    """Follow the flow from x at time 1 to time 0 in Euler steps (the ODE sampler of pi0)."""
    grid = time_grid(steps, x.device)
    for now, then in pairwise(grid):
        x = x - (now - then) * model.denoise(context, x, now.expand(len(x)))
    return x


def executed_mask(executed: Tensor, steps: int) -> Tensor:
    """Which of a chunk's steps were run, float32 (N, steps, 1)."""
    return (torch.arange(steps, device=executed.device) < executed[:, None])[:, :, None].to(torch.float32)


def gaussian_kl(mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor) -> Tensor:
    """Elementwise KL divergence of a normal distribution from a reference."""
    squared = std.square() + (mean - reference_mean).square()
    return (reference_std / std).log() + 0.5 * (squared / reference_std.square() - 1)


def gaussian_log_prob(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log-density of a normal distribution."""
    return -0.5 * ((value - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
