"""What is to be drawn: a camera, a window of its view, a size; and the interface of what draws it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mw_envs.errors import ExpectedError, InputError
from mw_envs.tasks import did_you_mean

Crop = tuple[float, float, float, float]
_PACKAGES = {"egl": "libegl1 libgl1 libgl1-mesa-dri", "osmesa": "libosmesa6 libgl1"}
FULL_VIEW: Crop = (0.0, 0.0, 1.0, 1.0)
# Windows of the default camera's view, (top, left, height, width) in fractions. "workspace" gives the scene 2.25 times
# the pixels of the full view. At the start of a trial it holds the hand, every object and the goal of all 50 tasks, but
# for the goals of stick-pull-v3 and sweep-v3: these lie up to a fifth of the window below it.
CROPS: dict[str, Crop] = {"full": FULL_VIEW, "workspace": (17 / 144, 36 / 144, 96 / 144, 96 / 144)}


class RendererUnavailableError(ExpectedError, RuntimeError):
    """No renderer of the wanted kind works on this machine; the message names what to install."""

    @classmethod
    def of_library(cls, platform: str, cause: Exception) -> RendererUnavailableError:
        """The error about a platform, ``egl`` or ``osmesa``, whose library is missing or fails."""
        return cls(
            f"The {platform} renderer does not work on this machine ({type(cause).__name__}: {cause}). "
            f"Use renderer='software', which needs none, or install its library, on Debian and Ubuntu: "
            f"apt-get install {_PACKAGES[platform]}"
        )


@contextmanager
def explained_mujoco_import() -> Iterator[None]:
    """Around ``import mujoco``, which fails obscurely where ``MUJOCO_GL`` names a platform without its library.

    :raises RendererUnavailableError: in that case.
    """
    try:
        yield
    except (AttributeError, ImportError) as error:
        platform = os.environ.get("MUJOCO_GL", "").lower().strip()
        if platform not in _PACKAGES:
            raise
        reason = RendererUnavailableError.of_library(platform, error)
        raise RendererUnavailableError(f"MUJOCO_GL={platform} stops MuJoCo; unset it, or: {reason}") from error


@dataclass(frozen=True)
class View:
    """A picture to draw.

    :param camera: name of a camera of the model.
    :param height: rows of the picture.
    :param width: columns of the picture.
    :param crop: window of the camera's view, (top, left, height, width) in fractions of the picture as it is returned.
    :param rotated: turn the picture by 180 degrees, as the published MetaWorld data does.
    :param part: the rectangle of the picture to draw and return, (top, left, height, width) in whole pixels; None for
        all of it. A part that moves from frame to frame costs no more than one that stays, which a crop does not give.
    """

    camera: str
    height: int
    width: int
    crop: Crop = FULL_VIEW
    rotated: bool = True
    part: tuple[int, int, int, int] | None = None

    @property
    def drawn(self) -> tuple[int, int, int, int]:
        """The rectangle that is drawn, (top, left, height, width) in pixels of the picture."""
        return (0, 0, self.height, self.width) if self.part is None else self.part


@dataclass(frozen=True)
class Scene:
    """What a renderer may prepare once and use again.

    :param name: models of one name have the same meshes, textures and materials.
    :param background: bodies that no trial moves.
    """

    name: str
    background: frozenset[int] = frozenset()


class Renderer(Protocol):
    """Draws views of MuJoCo scenes."""

    def render(self, model: Any, data: Any, view: View, scene: Scene) -> npt.NDArray[np.uint8]:
        """Draw a view.

        :param model: compiled ``MjModel``.
        :param data: its ``MjData`` after ``mj_forward``.
        :param view: what to draw.
        :param scene: which scene it is.
        :return: a new contiguous array, uint8, shape (height, width, 3), or of the view's part.
        """
        ...


def resolve_crop(crop: str | Sequence[float] | None) -> Crop:
    """A crop's four fractions from a name in :data:`CROPS`, from the numbers themselves, or the full view from None.

    :raises ValueError: for an unknown name or a window that is empty or leaves the view.
    """
    if crop is None:
        return FULL_VIEW
    if isinstance(crop, str):
        if crop not in CROPS:
            raise InputError(f"Unknown crop {crop!r}; {did_you_mean(crop, CROPS)}, or (top, left, height, width)")
        return CROPS[crop]
    try:
        window = np.array([float(value) for value in crop])
        top, left, height, width = window.tolist()
        bounds = (top, left, 1 - top - height, 1 - left - width)
        inside = np.all(np.isfinite(window)) and min(bounds) >= -1e-9 and min(height, width) > 0
    except (TypeError, ValueError):
        inside = False
    if not inside:
        raise InputError(f"crop={crop!r}; expected (top, left, height, width) in fractions of the view, inside 0..1")
    return top, left, height, width
