"""Interface of action distributions: samples, and their log-probabilities under later weights.

A *trace* is what must be stored to compute the log-probability of a sample again: the action, the tokens, or the
states before and after stochastic denoising steps. Letters as in :mod:`sb3_vla.models.base`; K is the executed chunk, S
the number of random denoising steps in a trace (1 where nothing is denoised at random).
Log-probabilities are float32, whatever the model's precision, and those of denoised or tokenized actions are in the
model's normalized units, whose constant Jacobian cancels in every ratio.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mw_envs.tasks import did_you_mean
from sb3_vla.common import batch_noise as noise
from sb3_vla.common.errors import InputError
from sb3_vla.models.base import Context, VLAModel

Trace = dict[str, Tensor]
#: what one log-probability may stand for, see :meth:`ActionDistribution.log_prob`
LOGPROB_TYPES = ("chunk", "action", "token", "denoising_step")


class ActionDistribution(nn.Module, ABC):
    """A distribution of action chunks (N, K, A) in environment units around what a model predicts.

    :param action_chunk: K, executed actions per decision.
    """

    #: predictions, among :data:`sb3_vla.models.base.PREDICTIONS`, of the models that it takes
    predictions: ClassVar[tuple[str, ...]] = ("velocity",)
    #: False where the log-probability follows from observation and action alone, as stock Stable-Baselines3 needs
    needs_trace = True
    #: whether the entropy depends on the weights, so that a bonus on it has an effect
    has_entropy = False
    #: factor of the exploration noise, which an algorithm may schedule
    noise_scale = 1.0
    #: the model's own, see :class:`sb3_vla.models.VLAModel`
    first_action = 0

    def __init__(self, action_chunk: int) -> None:
        super().__init__()
        self.action_chunk = action_chunk

    @classmethod
    def for_model(cls, model: VLAModel, action_chunk: int, **options: Any) -> ActionDistribution:
        """Build the distribution with the sizes and other options that come from the model.

        :param model: the model whose actions it distributes.
        :param action_chunk: K.
        :param options: the distribution's own.
        """
        return cls(action_chunk, **options)

    @property
    def denoisings(self) -> int:
        """Runs of the denoiser per decision that an update differentiates."""
        return 1

    def check_trainable(self, model: VLAModel) -> None:
        """Check, before the first rollout, that a model can be trained through this distribution.

        :raises ValueError: if it cannot.
        """
        return None

    @abstractmethod
    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        """Draw action chunks, float32 (N, K, A) in environment units (not clipped), and their trace.

        :param generator: the only source of randomness if given; else torch's global one.
        """

    @abstractmethod
    def transition(self, model: VLAModel, context: Context, trace: Trace) -> tuple[Tensor, Tensor]:
        """Parameters of the distribution of the trace under the model's present weights, float32.

        Mean and standard deviation of normal distributions, (N, K, A) or (N, S, K, A); for tokens logits (N, K, A, V)
        and temperature (N, 1, 1, 1).

        :param trace: from :meth:`sample`.
        """

    @abstractmethod
    def log_prob_terms(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> Tensor:
        """Log-density of each random number of the trace, float32 (N, S, K, A), zero where it was not executed.

        :param mean: from :meth:`transition`, like ``std``.
        :param trace: from :meth:`sample`.
        :param executed: environment steps run of each chunk, int64 (N,).
        """

    @abstractmethod
    def kl_terms(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        """KL(transition || reference transition) of each random number, see :meth:`log_prob_terms`."""

    @abstractmethod
    def mode(self, model: VLAModel, context: Context) -> Tensor:
        """The deterministic action chunk (N, K, A) in environment units."""

    def log_prob(
        self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor, logprob_type: str = "chunk"
    ) -> Tensor:
        """Log-density of the trace, float32, of the executed steps alone.

        :param mean: from :meth:`transition`.
        :param std: from :meth:`transition`.
        :param executed: environment steps of the chunk that were run, int64 (N,); the others had no effect.
        :param logprob_type: what one log-probability, hence one ratio, stands for: ``chunk``, the decision, (N,);
            ``action``, an environment step, (N, K); ``token``, a dimension of one, (N, K, A); ``denoising_step``,
            (N, S), as in DPPO (Ren et al. 2024). Steps that were not executed have log-density zero.
        :raises ValueError: for an unknown type, or one that the distribution does not have.
        """
        self.check_logprob_type(logprob_type)
        terms = self.log_prob_terms(mean, std, trace, executed)
        if logprob_type == "token":
            return terms.sum(1)
        return terms.sum({"chunk": (1, 2, 3), "action": (1, 3), "denoising_step": (2, 3)}[logprob_type])

    def check_logprob_type(self, logprob_type: str) -> None:
        """:raises ValueError: for a type that :meth:`log_prob` does not have."""
        if logprob_type not in LOGPROB_TYPES:
            raise InputError(f"Unknown logprob_type={logprob_type!r}; {did_you_mean(logprob_type, LOGPROB_TYPES)}")
        self._check_logprob_type(logprob_type)

    def kl_divergence(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        """KL(this transition || reference transition), float32 (N,), executed steps only."""
        return self.kl_terms(mean, std, reference_mean, reference_std, executed).sum((1, 2, 3))

    def entropy(self, mean: Tensor, std: Tensor, executed: Tensor) -> Tensor | None:
        """Entropy of the executed steps, float32 (N,); None where the weights do not change it."""
        return None

    def executed_actions(self, model: VLAModel, x: Tensor) -> Tensor:
        """The executed part of denoised chunks (N, H, L), in environment units (N, K, A)."""
        return model.unnormalize_action(self._executed_part(x, model.action_dim))

    def _executed_part(self, x: Tensor, action_dim: int) -> Tensor:
        """(..., K, A) of (..., H, L)."""
        return x[..., self.first_action : self.first_action + self.action_chunk, :action_dim]

    def _check_logprob_type(self, logprob_type: str) -> None:
        """Refuse a known type that this distribution does not have."""
        return None

    def _mask(self, terms: Tensor, executed: Tensor) -> Tensor:
        """Zero what was not executed of (N, S, K, A)."""
        return terms * executed_mask(executed, self.action_chunk)[:, None]


def check_denoising_steps(steps: int) -> None:
    """:raises ValueError: for a number of denoising steps below one."""
    if steps < 1:
        raise InputError(f"denoising_steps={steps}; expected at least 1")


def start_of_mode(model: VLAModel, context: Context) -> Tensor:
    """Zero noise, float32 (N, H, L), from which :meth:`ActionDistribution.mode` denoises."""
    features = context.features
    return torch.zeros(len(features), model.action_horizon, model.latent_dim, device=features.device)


def random_start(model: VLAModel, context: Context, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, float32 (N, H, L)."""
    features = context.features
    shape = (len(features), model.action_horizon, model.latent_dim)
    return noise.normal(shape, generator, features.device)


def time_grid(steps: int, device: torch.device | None = None) -> Tensor:
    """Flow times 1 = t_0 > ... > t_steps = 0, float32 (steps + 1,)."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=device).to(torch.float32)


def integrate(model: VLAModel, context: Context, x: Tensor, steps: int) -> Tensor:
    """Follow the flow from x at time 1 to time 0 in Euler steps (the ODE sampler of pi0), float32 (N, H, L).

    :param x: noise, float32 (N, H, L).
    :param steps: Euler steps of equal length.
    """
    grid = time_grid(steps, x.device)
    for now, then in pairwise(grid):
        x = x - (now - then) * model.denoise(context, x, now.expand(len(x))).float()
    return x


def logprob_mask(logprob_type: str, executed: Tensor, log_prob: Tensor) -> Tensor:
    """1 for log-probabilities of executed actions, else 0, float32, broadcastable to them.

    :param executed: environment steps run, int64 (N,).
    :param log_prob: from :meth:`ActionDistribution.log_prob`.
    """
    if logprob_type in ("action", "token"):
        mask = executed_mask(executed, log_prob.shape[1])
        return mask if logprob_type == "token" else mask[:, :, 0]
    return (executed > 0).to(torch.float32).reshape(-1, *[1] * (log_prob.ndim - 1))


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


def gaussian_entropy(std: Tensor) -> Tensor:
    """Elementwise differential entropy of a normal distribution."""
    return std.log() + 0.5 * math.log(2 * math.pi * math.e)
