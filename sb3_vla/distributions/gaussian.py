"""A Gaussian around the chunk that the flow reaches from zero noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sb3_vla.common import batch_noise as noise
from sb3_vla.common.errors import InputError
from sb3_vla.distributions.base import (
    ActionDistribution,
    Trace,
    check_denoising_steps,
    executed_mask,
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_prob,
    integrate,
    start_of_mode,
)
from sb3_vla.models.base import Context, VLAModel


class GaussianChunk(ActionDistribution):
    """Actions mu + std * noise, with independent or common noise of a chunk's K steps.

    ``coherence="independent"``: K x A independent normals. ``coherence="offset"``: one A-dimensional offset moves the
    whole chunk, so exploration persists over the chunk instead of averaging out. Only the offset is random then: the
    log-probability is that of the mean of the executed actions under N(mean of their mu, std^2), and the shape of the
    chunk around its mean is not explored.

    :param action_chunk: K.
    :param action_dim: A.
    :param std: standard deviation in environment units (the box is -1..1), one or A numbers.
    :param coherence: ``independent`` or ``offset``.
    :param learn_std: whether the deviation is trained; only then does it have an entropy worth a bonus.
    :param denoising_steps: Euler steps to mu. One step from zero noise gives the conditional mean of the demonstrated
        actions (the velocity there is minus that mean), which is no good action where two different ones were
        demonstrated, as at a grasp; the second step moves towards one of them.
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
        denoising_steps: int = 2,
    ) -> None:
        super().__init__(action_chunk)
        check_denoising_steps(denoising_steps)
        self.denoising_steps = denoising_steps
        if coherence not in ("independent", "offset"):
            raise InputError(f"coherence={coherence!r}; expected 'independent' or 'offset'")
        values = torch.as_tensor(std, dtype=torch.float32).expand(action_dim) if _is_valid(std, action_dim) else None
        if values is None:
            raise InputError(f"std={std!r}; expected one positive number or {action_dim} of them")
        self.coherent = coherence == "offset"
        self.learn_std = self.has_entropy = learn_std
        if learn_std:
            self.log_std = nn.Parameter(values.log().clone())
        else:  # no parameter: sb3-contrib's TRPO wants a gradient of every one
            self.register_buffer("log_std", values.log().clone())

    @classmethod
    def for_model(cls, model: VLAModel, action_chunk: int, **options: Any) -> GaussianChunk:
        """See :meth:`ActionDistribution.for_model`."""
        return cls(action_chunk, model.action_dim, **options)

    @property
    def denoisings(self) -> int:
        """See :attr:`ActionDistribution.denoisings`."""
        return self.denoising_steps

    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        """See :meth:`ActionDistribution.sample`; the trace is ``action``, float32 (N, K, A)."""
        mean = self.mode(model, context)
        steps = 1 if self.coherent else self.action_chunk
        drawn = noise.normal((len(mean), steps, mean.shape[2]), generator, mean.device)
        action = mean + self._std() * drawn
        return action, {"action": action}

    def mode(self, model: VLAModel, context: Context) -> Tensor:
        """The flow followed from zero noise."""
        x = integrate(model, context, start_of_mode(model, context), self.denoising_steps)
        return self.executed_actions(model, x)

    def transition(self, model: VLAModel, context: Context, trace: Trace) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the actions, (N, K, A), see :meth:`ActionDistribution.transition`."""
        mean = self.mode(model, context)
        return mean, self._std().expand_as(mean)

    def log_prob_terms(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> Tensor:
        """See :meth:`ActionDistribution.log_prob_terms`; of a common offset (N, 1, 1, A)."""
        action = trace["action"].reshape(mean.shape)
        terms = gaussian_log_prob(self._drawn(action, executed), self._drawn(mean, executed), self._drawn_std(std))
        return self._mask(terms, executed)

    def kl_terms(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        """See :meth:`ActionDistribution.kl_terms`; of a common offset (N, 1, 1, A)."""
        own = self._drawn(mean, executed), self._drawn_std(std)
        reference = self._drawn(reference_mean, executed), self._drawn_std(reference_std)
        return self._mask(gaussian_kl(*own, *reference), executed)

    def entropy(self, mean: Tensor, std: Tensor, executed: Tensor) -> Tensor | None:
        """See :meth:`ActionDistribution.entropy`."""
        if not self.learn_std:
            return None
        return self._mask(gaussian_entropy(self._drawn_std(std)), executed).sum((1, 2, 3))

    def _std(self) -> Tensor:
        return self.noise_scale * self.log_std.exp()

    def _drawn(self, value: Tensor, executed: Tensor) -> Tensor:
        """The numbers that were drawn, (N, 1, K, A), or what a common offset moved: the executed mean, (N, 1, 1, A)."""
        if self.coherent:
            total = (value * executed_mask(executed, self.action_chunk)).sum(1, keepdim=True)
            value = total / executed.clamp(1, self.action_chunk)[:, None, None]
        return value[:, None]

    def _drawn_std(self, std: Tensor) -> Tensor:
        return std[:, None, :1] if self.coherent else std[:, None]

    def _mask(self, terms: Tensor, executed: Tensor) -> Tensor:
        if self.coherent:  # the offset counts whole, however much of the chunk was run
            return terms * (executed > 0)[:, None, None, None].to(torch.float32)
        return super()._mask(terms, executed)

    def _check_logprob_type(self, logprob_type: str) -> None:
        if self.coherent and logprob_type in ("action", "token"):
            raise InputError(
                f"logprob_type={logprob_type!r}: with coherence='offset' one draw moves the whole chunk, and no "
                "step has a probability of its own; use 'chunk', or coherence='independent'"
            )


def _is_valid(std: float | Sequence[float], action_dim: int) -> bool:
    values = [std] if isinstance(std, (int, float)) else list(std)
    return len(values) in (1, action_dim) and all(value > 0 and math.isfinite(value) for value in values)
