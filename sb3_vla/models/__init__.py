"""Vision-language-action models: one file each, one line in :data:`MODELS`."""

from __future__ import annotations

from mw_envs.tasks import did_you_mean
from sb3_vla.models.base import Context, VLAModel
from sb3_vla.models.compact import CompactVLA

MODELS: dict[str, type[VLAModel]] = {"compact": CompactVLA}


def model_class(name: str) -> type[VLAModel]:
    """Look a model up by name.

    :raises ValueError: for an unknown name; the message offers the nearest known one.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}; {did_you_mean(name, MODELS)}")
    return MODELS[name]


__all__ = ["MODELS", "CompactVLA", "Context", "VLAModel", "model_class"]
