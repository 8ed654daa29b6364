"""Observations of a policy: the keys that it reads, checks of spaces, and conversion of arrays to a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from mw_envs.tasks import fit_instruction
from sb3_vla.common.errors import InputError

MODEL_KEYS = ("image", "state", "instruction")
#: the key of a hand view, where the model reads one
HAND_KEY = "hand_image"
#: observations that only the critic reads, where an environment gives them
CRITIC_KEYS = ("privileged_state", "elapsed_time")
#: advice in errors about stacked images
STACKED = (
    "A policy decides on one picture: leave VecFrameStack, FrameStackObservation and GrayscaleObservation out. Where "
    "one picture does not tell enough, add numbers to the state"
)
#: advice in errors about VecNormalize
NORMALIZED = 'Where VecNormalize made it that, name what it may change: VecNormalize(env, norm_obs_keys=["state"])'
# Advice in errors about an observation that does not fit, by key.
_HINTS = {
    **dict.fromkeys(("image", HAND_KEY), "; its channels may come first or last"),
    "state": "",
    "instruction": "; mw_envs.encode_instruction makes one of a sentence",
    **dict.fromkeys(CRITIC_KEYS, ""),
    "float image": ". Give it as it was drawn; one in 0..1 is (255 * image).round().astype(np.uint8)",
}


def fitted(observation: Mapping[str, Any], space: spaces.Dict) -> dict[str, np.ndarray]:
    """Convert an observation to a space: data types, the order of an image's axes, zeros at an instruction's end.

    Integers and floats are converted to those of the space, and integers to floats, but not floats to integers.

    :param observation: arrays of the space's shapes, or batches of them (N, ...). Keys of the critic may be missing;
        keys that are not read are dropped.
    :param space: of the policy.
    :raises ValueError: for a missing key, a shape or type that does not fit, an integer out of bounds, a number that
        is not finite, batches of different sizes, and an empty batch.
    """
    needed = (*MODEL_KEYS, *(key for key in (HAND_KEY,) if key in space.spaces))
    missing = [key for key in needed if key not in observation]
    if missing:
        raise InputError(f"The observation has no {', '.join(missing)}; it has {', '.join(map(str, observation))}")
    read = [key for key in (*MODEL_KEYS, HAND_KEY, *CRITIC_KEYS) if key in observation and key in space.spaces]
    found = {key: _fitted(key, np.asarray(observation[key]), space[key]) for key in read}
    counts = {key: len(array) if array.ndim > len(space[key].shape or ()) else None for key, array in found.items()}
    if len(set(counts.values())) > 1:
        told = (f"{key} of {'one, without a batch axis' if n is None else n}" for key, n in counts.items())
        raise InputError(f"The observation's arrays are batches of different sizes: {'; '.join(told)}")
    if 0 in counts.values():
        raise InputError("The observation is a batch of none; expected at least one")
    return found


def _fitted(key: str, array: np.ndarray, space: spaces.Space) -> np.ndarray:
    assert isinstance(space, spaces.Box)
    where, whole = f"The observation's {key}", np.issubdtype(space.dtype, np.integer)
    if key in ("image", HAND_KEY) and array.ndim in (3, 4):
        # As it is, (H, W, C) as (C, H, W), or the other way round.
        orders = [np.moveaxis(array, axes, (-3, -2, -1)) for axes in ((-3, -2, -1), (-1, -3, -2), (-2, -1, -3))]
        array = next((turned for turned in orders if turned.shape[-3:] == space.shape), array)
    if key == "instruction" and array.dtype == np.uint8 and array.ndim in (1, 2):
        array = fit_instruction(array, space.shape[0])
    if array.shape not in (space.shape, array.shape[:1] + space.shape):
        raise InputError(f"{where} has shape {array.shape}; expected {space.shape}, or a batch of such{_HINTS[key]}")
    if array.dtype.kind not in ("iu" if whole else "iuf"):
        hint = _HINTS["float image"] if key in ("image", HAND_KEY) and array.dtype.kind == "f" else ""
        raise InputError(f"{where} has type {array.dtype}; expected {space.dtype}{hint}")
    if whole and array.size and not space.low.min() <= array.min() <= array.max() <= space.high.max():
        raise InputError(f"{where} has values from {array.min()} to {array.max()}; expected those of {space}")
    with np.errstate(over="ignore"):
        fitting = array.astype(space.dtype, copy=False)
    # Bounds of floats are not checked: VecNormalize does not change those of the keys that it normalizes.
    if not whole and not np.isfinite(fitting).all():
        raise InputError(f"{where} is {array}; expected finite numbers")
    return fitting


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """:raises ValueError: if the spaces are not those of a vision-language-action environment."""
    fix = 'Use an environment such as gym.make("mw_envs:MetaWorldMT50-v0").'
    if not isinstance(observation_space, spaces.Dict):
        raise InputError(
            f"VLAPolicy needs a Dict observation with {', '.join(MODEL_KEYS)}; got {observation_space}. {fix}"
        )
    missing = [key for key in MODEL_KEYS if key not in observation_space.spaces]
    if missing:
        raise InputError(
            f"VLAPolicy needs an observation with {', '.join(MODEL_KEYS)}; {', '.join(missing)} is missing among "
            f"{', '.join(observation_space.spaces)}. {fix}"
        )
    image = observation_space["image"]
    if image.dtype != np.uint8:
        raise InputError(f"VLAPolicy needs image as uint8 with three axes; got {image}. {NORMALIZED}. Else: {fix}")
    if len(image.shape or ()) != 3:
        raise InputError(f"VLAPolicy needs image as uint8 with three axes; got {image}. {STACKED}. {fix}")
    instruction = observation_space["instruction"]
    if instruction.dtype != np.uint8:
        raise InputError(f"VLAPolicy needs instruction as uint8; got {instruction}. {NORMALIZED}")
    if not isinstance(action_space, spaces.Box) or len(action_space.shape) not in (1, 2):
        raise InputError(f"VLAPolicy needs a Box action space of shape (A,) or (K, A); got {action_space}. {fix}")


def channels_first(image: spaces.Space) -> bool:
    """Whether the space of an image is (3, H, W) rather than (H, W, 3).

    :raises ValueError: if it is neither.
    """
    shape = image.shape or ()
    if 3 not in (shape[0], shape[2]):
        raise InputError(f"VLAPolicy needs one color image, (H, W, 3) or (3, H, W); got shape {shape}. {STACKED}")
    return shape[2] != 3


def height_and_width(image: spaces.Space, channels_first: bool) -> list[int]:
    """Height and width of the space of an image."""
    shape = list(image.shape or ())
    return shape[1:] if channels_first else shape[:2]
