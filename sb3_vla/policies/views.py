"""The view of a policy: camera, window of its image (``crop``), and the size in which images are rendered.

A checkpoint notes the view that its model was trained on, and an environment of ``mw_envs`` has the one that it
renders. With another view a model fails without an error, so the two are compared wherever they are brought together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from mw_envs.env import CAMERAS
from mw_envs.hand_view import HandView
from mw_envs.rendering import CROPS, resolve_crop
from mw_envs.tasks import did_you_mean
from sb3_vla.common.config import ConfigError
from sb3_vla.common.errors import InputError
from sb3_vla.distributed.ranks import current_ranks
from sb3_vla.models import VLAModel, takes_option
from sb3_vla.policies.observations import HAND_KEY, channels_first, height_and_width

#: arguments of environments for the hand view, and their names in :class:`mw_envs.hand_view.HandView`
HAND_OPTIONS = {"hand_view": "size", "hand_window": "window", "hand_border": "border"}
#: the default view of environments
FULL_VIEW: dict[str, Any] = {"camera": "corner2", "crop": None}
#: height, width and channels of the images that environments render by default
FULL_PICTURE = (480, 480, 3)


def known_view(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """``camera`` and ``crop`` of some options, with the environment's default for one that is missing.

    :param said: such as the note ``view`` of a checkpoint, or the arguments of an environment.
    :return: None where both are missing.
    """
    return {key: said.get(key, default) for key, default in FULL_VIEW.items()} if FULL_VIEW.keys() & said else None


def view_of(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of environments for the view of a checkpoint's model; the full default view if it notes none.

    :param notes: of the checkpoint.
    :return: ``camera``, ``crop``, and ``image_size`` where images were rendered larger than the model reads them.
    """
    said = notes.get("view", {})
    drawn = {"image_size": said["render_size"]} if "render_size" in said else {}
    return {**(known_view(said) or FULL_VIEW), **drawn}


def hand_options(model: VLAModel) -> dict[str, Any]:
    """Arguments of environments for the hand view of a model; empty for a model without one."""
    hand = model.hand_view
    return {} if hand is None else {name: getattr(hand, field) for name, field in HAND_OPTIONS.items()}


def told_hand_view(said: Mapping[str, Any]) -> HandView | None:
    """The hand view of environments with these arguments, see :data:`HAND_OPTIONS`; None without one."""
    if said.get("hand_view") is None:
        return None
    return HandView(**{field: said[name] for name, field in HAND_OPTIONS.items() if name in said})


def hand_views_of_envs(env: VecEnv) -> set[HandView]:
    """The hand views of environments; empty where they have none."""
    found = env.get_attr("hand_view") if env.has_attr("hand_view") else []
    return {one for one in found if isinstance(one, HandView)}


def with_hand_view(policy_kwargs: Mapping[str, Any], env: VecEnv) -> dict[str, Any]:
    """Options of a policy, whose new model reads the hand view that environments draw.

    The observation space tells the size of the picture alone. A model from a checkpoint, or one that takes no hand
    view, is left as it is, and so is one for a picture whose size a wrapper has changed.
    """
    new = policy_kwargs.get("checkpoint") is None and takes_option(policy_kwargs.get("model") or "compact", "hand_view")
    space = getattr(env.observation_space, "spaces", {}).get(HAND_KEY)
    shape = () if space is None else space.shape
    for hand in hand_views_of_envs(env) if new else ():
        if hand.size in shape:
            model_kwargs = {"hand_view": asdict(hand), **(policy_kwargs.get("model_kwargs") or {})}
            policy_kwargs = {**policy_kwargs, "model_kwargs": model_kwargs}
    return dict(policy_kwargs)


def check_hand_view(model: VLAModel, env: VecEnv) -> None:
    """:raises ValueError: if environments draw another hand view than a model reads."""
    shown = other_hand_view(model.hand_view, hand_views_of_envs(env))
    if shown is not None:
        raise InputError(
            f"The model reads the hand view that {model.hand_view} draws, but the environment was made with {shown}; "
            "make it with the former"
        )


def other_hand_view(read: HandView | None, shown: Iterable[HandView | None]) -> HandView | None:
    """A hand view of the environments with another window or border than the model's; None if all agree.

    The size of its image is not compared: the observation space has it, also where a wrapper has changed it.
    """
    if read is None:
        return None
    known = read.resolution, read.border
    found = (one for one in shown if one is not None and (round(read.size / one.window), one.border) != known)
    return next(found, None)


def cut_window(pictures: npt.NDArray[np.uint8], crop: Any, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Cut the window of a crop from images of the full view.

    :param pictures: uint8 (N, height, width, 3).
    :param crop: a name, or (top, left, height, width) in fractions; None for the whole image.
    :param size: height and width of the result.
    :return: uint8 (N, *size, 3), each pixel the mean of the area that it covers.
    :raises ValueError: if window and size have different proportions.
    """
    top, left, height, width = resolve_crop(crop)
    if abs(height / size[0] - width / size[1]) > 1e-6:
        raise InputError(
            f"A window of {height:g} x {width:g} of the view is not cut to {size[0]}x{size[1]} pixels, of other "
            "proportions; draw it with the environment's crop and image_size"
        )
    down = _shares(pictures.shape[1], top, height, size[0])
    across = _shares(pictures.shape[2], left, width, size[1])
    mean = np.einsum("yh,nhwc,xw->nyxc", down, pictures.astype(np.float32), across, optimize=True)
    return np.rint(mean).astype(np.uint8)


def cut_from_full_view(
    observation: Mapping[str, Any], view: Mapping[str, Any] | None, hand: HandView | None, space: spaces.Dict
) -> Mapping[str, Any]:
    """An observation whose picture of the full view, if it is one, is replaced by the window that a policy reads.

    :param observation: one, or a batch.
    :param view: the policy's, see :func:`known_view`; None leaves the observation as it is.
    :param hand: the hand view that the model reads; it is cut as well, unless the observation has one.
    :param space: the policy's observation space.
    :raises ValueError: for a state of another shape, which is to tell where the hand is.
    """
    view, height_width = known_view(view or {}), height_and_width(space["image"], channels_first(space["image"]))
    picture, state = (np.asarray(observation.get(key)) for key in ("image", "state"))
    if picture.shape[-3:] == (FULL_PICTURE[2], *FULL_PICTURE[:2]):
        picture = np.moveaxis(picture, -3, -1)
    own = tuple(height_width) == FULL_PICTURE[:2]
    if view is None or own or picture.shape[-3:] != FULL_PICTURE or picture.dtype != np.uint8:
        return observation
    found, batch = dict(observation), picture.shape[:-3]
    pictures = picture.reshape(math.prod(batch), *FULL_PICTURE)
    expected = (*batch, *(space["state"].shape or ()))
    if hand is not None and HAND_KEY not in observation:
        if state.shape != expected:
            raise InputError(
                f"The observation's state has shape {state.shape}; expected {expected}, beside an image of shape "
                f"{picture.shape}, from which the hand view is cut where it says that the hand is"
            )
        cut = hand.cut(pictures, view["camera"], state.reshape(len(pictures), state.shape[-1]))
        found[HAND_KEY] = cut.reshape(*batch, *cut.shape[1:])
    cut = cut_window(pictures, view["crop"], (height_width[0], height_width[1]))
    return {**found, "image": cut.reshape(*batch, *cut.shape[1:])}


def _shares(before: int, first: float, length: float, after: int) -> npt.NDArray[np.float32]:
    """How much of each new pixel of a part of a line each old one covers, (after, before)."""
    edges = before * (first + length * np.arange(after + 1) / after)
    old = np.arange(before)
    covered = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    shares = np.maximum(covered, 0.0)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32)


def view_of_envs(env: VecEnv) -> dict[str, Any] | None:
    """The view of environments; None where it is unknown, or they have several."""
    if not env.has_attr("camera_view"):
        return None
    views = env.get_attr("camera_view")
    return views[0] if all(same_view(view, views[0]) for view in views) else None


def same_view(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two views have the same camera and window, by name or in numbers."""
    windows = resolve_crop(one["crop"]), resolve_crop(other["crop"])
    return one["camera"] == other["camera"] and max(abs(a - b) for a, b in zip(*windows, strict=True)) < 1e-6


def described(view: Mapping[str, Any]) -> str:
    """A view in words, for messages."""
    window = resolve_crop(view["crop"])
    name = next((name for name, known in CROPS.items() if known == window), list(window))
    return f"camera={view['camera']} with crop={name}"


def settled_view(source: object, said: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The view for a checkpoint's model: the one given by the user, else the checkpoint's.

    It warns where the two differ, and where there is neither; environments then have their default view.

    :param source: the checkpoint, for the message.
    :param said: its note ``view``.
    :param given: ``camera``, ``crop`` or both.
    :return: None where there is neither.
    """
    known = known_view(said)
    if not given:
        if known is None:
            warn_once(
                f"Checkpoint {source} does not say which view its model was trained on; {described(FULL_VIEW)} is "
                "taken. Give crop and camera, such as crop=workspace, if it was another"
            )
        return known
    view = {**(known or FULL_VIEW), **given}
    if known is not None:
        warn_of_another_view(known, view)
    return view


def view_of_data(source: object, said: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The view of demonstrations: the one that they note, completed by the one given by the user.

    :param source: the dataset, for the message.
    :param said: such as :attr:`sb3_vla.data.Demonstrations.camera`.
    :param given: ``camera``, ``crop`` or both.
    :raises ValueError: if the two differ.
    """
    known = known_view(said)
    if given and known is not None and not same_view(known, {**known, **given}):
        raise InputError(
            f"{source} was recorded with {described(known)}, but {described({**known, **given})} is given; leave "
            "camera and crop out"
        )
    return {**said, **((known or {**FULL_VIEW, **given}) if given else {})}


def warn_of_another_view(
    learned: Mapping[str, Any], shown: Mapping[str, Any], what: str = "The policy was trained on"
) -> None:
    """Warn if a policy is shown another view than the one that it was trained on.

    :param learned: the view of the training.
    :param shown: the present view.
    :param what: beginning of the message.
    """
    if not same_view(learned, shown):
        warn_once(
            f"{what} {described(learned)}, but the policy is shown {described(shown)}, where it acts worse or fails. "
            "Choose one view for both; where camera and crop are left out, they are those that the policy knows"
        )


def warn_once(message: str) -> None:
    """Warn on the first rank alone."""
    if current_ranks().leads:
        warnings.warn(message, stacklevel=3)


def given_view(crop: Any, camera: str | None) -> dict[str, Any]:
    """What the settings ``crop`` and ``camera`` say of a view; None says nothing.

    :raises ConfigError: for what no environment has; the message names what there is.
    """
    try:
        resolve_crop(crop)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if camera is not None and camera not in CAMERAS:
        raise ConfigError(f"Unknown camera {camera!r}; {did_you_mean(camera, CAMERAS)}")
    return {name: value for name, value in (("camera", camera), ("crop", crop)) if value is not None}
