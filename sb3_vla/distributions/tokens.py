"""Categorical action tokens, decoded in parallel (RT-2 2023; OpenVLA-OFT, Kim et al. 2025)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sb3_vla.common import batch_noise as noise
from sb3_vla.common.errors import InputError
from sb3_vla.distributions.base import ActionDistribution, Trace
from sb3_vla.models.base import Context, VLAModel


class ActionTokens(ActionDistribution):
    """Every dimension of every action of the chunk is a token of its own, drawn from the model's logits.

    All quantities are of the tempered distribution, which acts; a token means the action that the model's
    ``token_values`` give. ``noise_scale`` is a factor of the temperature.

    :param action_chunk: K.
    :param temperature: divides the logits; RLinf explores at 1.6.
    """

    predictions = ("tokens",)
    has_entropy = True

    def __init__(self, action_chunk: int, temperature: float = 1.0) -> None:
        super().__init__(action_chunk)
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"temperature={temperature!r}; expected a positive number")
        self.temperature = temperature

    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        """See :meth:`ActionDistribution.sample`; the trace is ``tokens``, int64 (N, K, A)."""
        logits, temperature = self.transition(model, context, {})
        probabilities = _log_probabilities(logits, temperature).exp()
        tokens = noise.categories(probabilities, generator)
        return self._actions(model, tokens), {"tokens": tokens}

    def transition(self, model: VLAModel, context: Context, trace: Trace) -> tuple[Tensor, Tensor]:
        """Logits (N, K, A, V) and temperature (N, 1, 1, 1), see :meth:`ActionDistribution.transition`."""
        logits = self._logits(model, context)
        temperature = torch.tensor(self.noise_scale * self.temperature, device=logits.device)
        return logits, temperature.expand(len(logits), 1, 1, 1)

    def log_prob_terms(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> Tensor:
        """See :meth:`ActionDistribution.log_prob_terms`; S is 1."""
        tokens = trace["tokens"].reshape(mean.shape[:3])
        chosen = _log_probabilities(mean, std).gather(3, tokens[..., None])[..., 0]
        return self._mask(chosen[:, None], executed)

    def kl_terms(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        """See :meth:`ActionDistribution.kl_terms`; S is 1."""
        own, reference = _log_probabilities(mean, std), _log_probabilities(reference_mean, reference_std)
        return self._mask((own.exp() * (own - reference)).sum(3)[:, None], executed)

    def entropy(self, mean: Tensor, std: Tensor, executed: Tensor) -> Tensor:
        """See :meth:`ActionDistribution.entropy`."""
        own = _log_probabilities(mean, std)
        return self._mask(-(own.exp() * own).sum(3)[:, None], executed).sum((1, 2, 3))

    def mode(self, model: VLAModel, context: Context) -> Tensor:
        """The likeliest token of each dimension."""
        return self._actions(model, self._logits(model, context).argmax(3))

    def _logits(self, model: VLAModel, context: Context) -> Tensor:
        last = self.first_action + self.action_chunk
        return model.token_logits(context)[:, self.first_action : last].float()

    def _actions(self, model: VLAModel, tokens: Tensor) -> Tensor:
        return model.unnormalize_action(model.token_values[tokens])


def _log_probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    return torch.log_softmax(logits / temperature, dim=3)
