"""Action distributions: one file each, one line in :data:`DISTRIBUTIONS`."""

from __future__ import annotations

from typing import Any

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.distributions.base import LOGPROB_TYPES, ActionDistribution, Trace, integrate
from sb3_vla.distributions.diffusion import DDIM, DDPM
from sb3_vla.distributions.flow_cps import FlowCPS
from sb3_vla.distributions.flow_noise import FlowNoise
from sb3_vla.distributions.flow_ode import FlowODE
from sb3_vla.distributions.flow_sde import FlowSDE
from sb3_vla.distributions.gaussian import GaussianChunk
from sb3_vla.distributions.tokens import ActionTokens
from sb3_vla.models.base import VLAModel

DISTRIBUTIONS: dict[str, type[ActionDistribution]] = {
    "gaussian": GaussianChunk,
    "flow_ode": FlowODE,
    "flow_sde": FlowSDE,
    "flow_noise": FlowNoise,
    "flow_cps": FlowCPS,
    "ddpm": DDPM,
    "ddim": DDIM,
    "tokens": ActionTokens,
}


def default_distribution(model: VLAModel) -> str:
    """Name of the distribution of a model whose checkpoint does not note one."""
    return {"velocity": "gaussian", "tokens": "tokens"}.get(model.prediction, "ddim")


def make_distribution(name: str, model: VLAModel, action_chunk: int, **options: Any) -> ActionDistribution:
    """Build a distribution by name.

    :param name: a name in :data:`DISTRIBUTIONS`.
    :param model: the model whose actions it distributes.
    :param action_chunk: K, executed actions per decision.
    :param options: see the classes.
    :raises ValueError: for an unknown name or option, or a distribution for models with another prediction.
    """
    if name not in DISTRIBUTIONS:
        names = f"known: {', '.join(DISTRIBUTIONS)}"
        near = did_you_mean(name, DISTRIBUTIONS)
        raise InputError(f"Unknown action distribution {name!r}; {near if near == names else f'{near} ({names})'}")
    kind = DISTRIBUTIONS[name]
    if model.prediction not in kind.predictions:
        fitting = [other for other, each in DISTRIBUTIONS.items() if model.prediction in each.predictions]
        raise InputError(
            f"Distribution {name!r} is for models that predict {' or '.join(kind.predictions)}; {type(model).__name__} "
            f"predicts {model.prediction}. Choose among {', '.join(fitting)}"
        )
    try:
        distribution = kind.for_model(model, action_chunk, **options)
    except TypeError as error:
        raise InputError(
            f"Distribution {name!r} does not take these options: {options} ({error}); distribution_kwargs={{}} leaves "
            "all at their defaults"
        ) from error
    distribution.first_action = model.first_action
    return distribution


__all__ = [
    "DDIM",
    "DDPM",
    "DISTRIBUTIONS",
    "LOGPROB_TYPES",
    "ActionDistribution",
    "ActionTokens",
    "FlowCPS",
    "FlowNoise",
    "FlowODE",
    "FlowSDE",
    "GaussianChunk",
    "Trace",
    "default_distribution",
    "integrate",
    "make_distribution",
]
