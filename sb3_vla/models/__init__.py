"""Vision-language-action models: one file each, one line in :data:`MODELS`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.models.base import Context, VLAModel
from sb3_vla.models.compact import CompactVLA
from sb3_vla.models.diffusion_policy import DiffusionPolicy
from sb3_vla.models.openvla_oft import OpenVLAOFT
from sb3_vla.models.pi0 import Pi0, Pi05
from sb3_vla.models.smolvla import SmolVLA
from sb3_vla.models.tinyvla import TinyVLA

MODELS: dict[str, type[VLAModel]] = {
    "compact": CompactVLA,
    "diffusion_policy": DiffusionPolicy,
    "openvla_oft": OpenVLAOFT,
    "pi0": Pi0,
    "pi05": Pi05,
    "smolvla": SmolVLA,
    "tinyvla": TinyVLA,
}


def model_class(name: str) -> type[VLAModel]:
    """Look a model up by name.

    :raises ValueError: for an unknown name; the message offers the nearest known one.
    """
    if name not in MODELS:
        raise InputError(f"Unknown model {name!r}; {did_you_mean(name, MODELS)}")
    return MODELS[name]


def make_model(name: str, options: Mapping[str, Any]) -> VLAModel:
    """Build a model by name.

    :param options: the model's own.
    :raises ValueError: for an unknown name or option.
    """
    try:
        return model_class(name)(**options)
    except TypeError as error:
        raise InputError(f"Model {name!r} does not take these options: {dict(options)} ({error})") from error


def takes_option(name: str, option: str) -> bool:
    """Whether a model's constructor names an option.

    :param name: a name in :data:`MODELS`.
    :raises ValueError: for an unknown name.
    """
    return option in inspect.signature(model_class(name)).parameters


__all__ = [
    "MODELS",
    "CompactVLA",
    "Context",
    "DiffusionPolicy",
    "OpenVLAOFT",
    "Pi0",
    "Pi05",
    "SmolVLA",
    "TinyVLA",
    "VLAModel",
    "make_model",
    "model_class",
    "takes_option",
]
