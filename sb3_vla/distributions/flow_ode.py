"""The flow itself: random start, deterministic way; for evaluation."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from sb3_vla.common.errors import InputError
from sb3_vla.distributions.base import (
    ActionDistribution,
    Trace,
    check_denoising_steps,
    integrate,
    random_start,
    start_of_mode,
)
from sb3_vla.models.base import Context, VLAModel


class FlowODE(ActionDistribution):
    """Euler steps from standard normal noise: what imitation trained. It has no tractable density.

    :param action_chunk: K.
    :param denoising_steps: Euler steps.
    """

    def __init__(self, action_chunk: int, denoising_steps: int = 4) -> None:
        super().__init__(action_chunk)
        check_denoising_steps(denoising_steps)
        self.denoising_steps = denoising_steps

    def check_trainable(self, model: VLAModel) -> None:
        """See :meth:`ActionDistribution.check_trainable`."""
        self._refuse()

    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        """Follow the flow from random noise; the trace is empty."""
        x = random_start(model, context, generator)
        return self.executed_actions(model, integrate(model, context, x, self.denoising_steps)), {}

    def mode(self, model: VLAModel, context: Context) -> Tensor:
        """The flow followed from zero noise."""
        x = start_of_mode(model, context)
        return self.executed_actions(model, integrate(model, context, x, self.denoising_steps))

    def transition(self, model: VLAModel, context: Context, trace: Trace) -> NoReturn:
        """:raises ValueError: always, as :meth:`log_prob_terms` and :meth:`kl_terms`: there is no density."""
        self._refuse()

    def log_prob_terms(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> NoReturn:
        """See :meth:`transition`."""
        self._refuse()

    def kl_terms(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> NoReturn:
        """See :meth:`transition`."""
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise InputError(
            "The flow_ode distribution has no log-probability: it is for evaluation. "
            "Train with flow_sde, flow_noise, flow_cps or gaussian"
        )
