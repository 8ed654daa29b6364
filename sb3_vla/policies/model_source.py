"""The model of a policy: a new one for an environment, or that of a checkpoint, and whether it fits the environment."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from torch import Tensor, nn

from sb3_vla.checkpoints import LoadedCheckpoint, load_checkpoint
from sb3_vla.checkpoints.loading import takes_options
from sb3_vla.common.errors import InputError
from sb3_vla.common.paths import local_path
from sb3_vla.models import VLAModel, make_model, takes_option
from sb3_vla.policies.observations import HAND_KEY, channels_first, height_and_width
from sb3_vla.policies.views import known_view

_LARGEST_NATIVE_IMAGE = 128
_DEFAULT_IMAGE = 96


@dataclass(frozen=True)
class ModelSource:
    """A policy's model, and what else its checkpoint gives to the policy.

    :param model: the model.
    :param kwargs: ``model`` and ``model_kwargs`` of a policy that has the same model with other weights.
    :param view: ``camera`` and ``crop`` that the model was trained on, None where nothing says so.
    :param resize: how its images were brought to its size, see :class:`VLAPolicy`.
    :param checkpoint: what was read, None for a new model.
    :param checkpoint_kwargs: ``checkpoint`` beside ``kwargs``, for a policy that reads its weights there.
    """

    model: VLAModel
    kwargs: dict[str, Any]
    view: dict[str, Any] | None = None
    resize: str = "model"
    checkpoint: LoadedCheckpoint | None = None
    checkpoint_kwargs: dict[str, Any] | None = None

    def load_value_head(self, value_head: nn.Module) -> None:
        """Give a value head the weights of the checkpoint's, unless that reads other observations."""
        if self.checkpoint is not None:
            _load_matching(value_head, self.checkpoint.value_head)

    def load_distribution(self, distribution: nn.Module, name: str, options: Mapping[str, Any]) -> None:
        """Give a distribution what the checkpoint's has learned, if it has the same name and options."""
        if self.checkpoint is not None and self.checkpoint.distribution == (name, _as_json(options)):
            _load_matching(distribution, self.checkpoint.distribution_weights)


def new_model(
    name: str, options: Mapping[str, Any], observation_space: spaces.Dict, action_space: spaces.Box
) -> ModelSource:
    """A new model, with the sizes of an environment where the options do not give others.

    :param name: a name in :data:`sb3_vla.models.MODELS`.
    :param options: the model's own.
    :raises ValueError: for an unknown name or option.
    """
    chunk = action_space.shape[0] if len(action_space.shape) == 2 else 1
    sizes: dict[str, Any] = {
        "action_dim": action_space.shape[-1],
        "action_horizon": chunk,
        "state_dim": (observation_space["state"].shape or (0,))[0],
        "image_size": _native_image_size(observation_space["image"]),
    }
    if HAND_KEY in observation_space.spaces and takes_option(name, "hand_view"):
        sizes["hand_view"] = {"size": max(observation_space[HAND_KEY].shape or ())}
    options = {**sizes, **options}
    model = make_model(name, options)
    return ModelSource(model, {"model": name, "model_kwargs": model.with_full_paths(options)})


def model_of_checkpoint(
    checkpoint: str | Path, name: str | None, options: Mapping[str, Any], image: spaces.Space
) -> ModelSource:
    """The model of a checkpoint; it warns of images that are drawn at another size than those it was trained on.

    :param checkpoint: see :func:`sb3_vla.checkpoints.load_checkpoint`.
    :param name: the name that it is expected to have, None for any.
    :param options: of a published checkpoint, what it does not say; of one of ours, what it is expected to say.
    :param image: the space of the environment's images.
    :raises ValueError: if it is of another model than is asked for.
    """
    loaded = load_checkpoint(checkpoint, options)
    given = dict(options) if takes_options(checkpoint) else {}
    _check_checkpoint(checkpoint, loaded, name, {} if given else options)
    model, said = loaded.model, loaded.notes.get("view", {})
    _check_size(checkpoint, said, image)
    where = local_path(checkpoint)  # or a name on the hub
    kwargs = {"model": loaded.model_name, "model_kwargs": model.with_full_paths(loaded.model_kwargs)}
    return ModelSource(
        model,
        kwargs,
        known_view(said),
        said.get("resize", "model"),
        loaded,
        {
            **kwargs,
            "model_kwargs": model.with_full_paths(given),
            "checkpoint": str(where.resolve() if where.exists() else checkpoint),
        },
    )


def check_model(model: VLAModel, observation_space: spaces.Dict, action_space: spaces.Box) -> None:
    """:raises ValueError: if a model does not predict an environment's actions, or reads another state or hand view."""
    chunk = action_space.shape[0] if len(action_space.shape) == 2 else 1
    action_dim, horizon = action_space.shape[-1], model.action_horizon - model.first_action
    if model.action_dim != action_dim or horizon < chunk:
        raise InputError(
            f"The model predicts {horizon} actions of {model.action_dim} dimensions; the environment takes chunks of "
            f"{chunk} of {action_dim}. Make the environment with action_chunk <= {horizon}, or train a model for this "
            "one."
        )
    known = dict(model.named_buffers()).get("state_mean")
    state = observation_space["state"].shape or ()
    if known is not None and tuple(known.shape) != tuple(state):
        raise InputError(
            f"The model reads a state of {len(known)} numbers; the environment's is {tuple(state)}. Train a model "
            "for this environment, or make the environment that this one was trained for."
        )
    hand, space = model.hand_view, observation_space.spaces.get(HAND_KEY)
    if hand is not None and (
        space is None or space.shape not in ((hand.size, hand.size, 3), (3, hand.size, hand.size))
    ):
        found = "has none" if space is None else f"has one of shape {space.shape}"
        raise InputError(
            f"The model reads {HAND_KEY}, {hand.size}x{hand.size} pixels around the hand; the environment {found}. "
            f"Make it with {hand}"
        )


def _check_checkpoint(
    folder: str | Path, loaded: LoadedCheckpoint, model: str | None, model_kwargs: Mapping[str, Any]
) -> None:
    fix = "leave model and model_kwargs out, or give another checkpoint"
    if model not in (None, loaded.model_name):
        raise InputError(f"model={model!r}, but the checkpoint {folder} is of {loaded.model_name!r}; {fix}")
    asked, found = _as_json(model_kwargs), _as_json(loaded.model_kwargs)
    same = loaded.model.is_same_option
    other = [key for key in asked if key not in found or not same(key, asked[key], found[key])]
    if other:
        raise InputError(
            f"model_kwargs with {', '.join(f'{key}={asked[key]!r}' for key in other)}, but the checkpoint {folder} has "
            f"{', '.join(f'{key}={found[key]!r}' if key in found else f'no {key}' for key in other)}; {fix}"
        )


def _check_size(checkpoint: str | Path, view: Mapping[str, Any], image: spaces.Space) -> None:
    found = height_and_width(image, channels_first(image))
    drawn = np.broadcast_to(view.get("render_size", found), 2).tolist()
    if found != drawn:
        warnings.warn(
            f"The model of {checkpoint} was trained on pictures that were drawn with {drawn[0]}x{drawn[1]} pixels and "
            f"brought to its size; the environment's have {found[0]}x{found[1]} and look different. Make it with "
            f"image_size={view['render_size']}",
            stacklevel=4,
        )


def _native_image_size(image: spaces.Space) -> int:
    """The observation's own size where a small model can read it as it is."""
    height, width = height_and_width(image, channels_first(image))
    if height == width and height % 16 == 0 and 32 <= height <= _LARGEST_NATIVE_IMAGE:
        return height
    return _DEFAULT_IMAGE


def _load_matching(part: nn.Module, tensors: dict[str, Tensor] | None) -> None:
    """Load weights, unless there are none or their names and shapes are not those of the part."""
    shapes = {key: tensor.shape for key, tensor in (tensors or {}).items()}
    if tensors and shapes == {key: tensor.shape for key, tensor in part.state_dict().items()}:
        part.load_state_dict(tensors)


def _as_json(options: Mapping[str, Any]) -> Any:
    """Options as a checkpoint gives them back; what JSON has no word for equals nothing there."""
    return json.loads(json.dumps(dict(options), default=repr))
