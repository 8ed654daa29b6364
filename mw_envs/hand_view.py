"""The hand view: a window of the camera's view, centered on the hand, whose pixels are those of the full picture.

Where the window lies follows from the camera and from the observation's ``state``, so what the environment draws can be
cut from a picture of the full view as well.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mw_envs.errors import InputError
from mw_envs.tasks import did_you_mean

BORDERS = ("shift", "black")
DEFAULT_WINDOW = 2 / 9
#: side in pixels of the largest full picture that a window is cut from, which a renderer holds whole
LARGEST_PICTURE = 960
# The state tells where the palm is; what is handled is between the fingertips, meters from there.
_PALM_TO_FINGERTIPS = np.array([0.0, 0.0, -0.06])


@dataclass(frozen=True)
class Pinhole:
    """A camera of MetaWorld's that stands beside the table, the same in all scenes.

    :param position: meters, world.
    :param right: the unit vector along its picture's rows, before the picture is turned, world.
    :param up: the one against the columns.
    :param fovy: vertical field of view, degrees.
    :param turned: whether its pictures are returned turned by 180 degrees.
    """

    position: tuple[float, float, float]
    right: tuple[float, float, float]
    up: tuple[float, float, float]
    fovy: float
    turned: bool

    def project(self, points: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Row and column, as fractions of the returned square picture, of points (..., 3) in meters; (..., 2)."""
        right, up = np.array(self.right), np.array(self.up)
        offset = points - np.array(self.position)
        depth = -offset @ np.cross(right, up)
        place = np.stack([-(offset @ up), offset @ right], axis=-1) / depth[..., None]
        place /= 2 * math.tan(math.radians(self.fovy) / 2)
        turned: npt.NDArray[np.float64] = 0.5 + (-place if self.turned else place)
        return turned


_CORNER2 = Pinhole(
    (0.75, 0.075, 0.7),
    (-0.5499013297, -0.8331827568, 0.0584381836),
    (0.3762077406, -0.3095491422, -0.8732966646),
    60.0,
    turned=True,
)
STANDING = {
    "topview": Pinhole((0.0, 0.5, 1.5), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), 45.0, turned=False),
    "corner": Pinhole(
        (-1.1, -0.4, 0.6),
        (-0.7071067812, 0.7071067812, 0.0),
        (-0.1924500897, -0.1924500897, -0.9622504486),
        45.0,
        turned=True,
    ),
    "corner2": _CORNER2,
    "corner3": Pinhole(
        (0.9, 0.0, 1.5),
        (-0.488472263, -0.8690020066, -0.0789326351),
        (0.7607504757, -0.379818318, -0.5263048157),
        45.0,
        turned=True,
    ),
    "corner4": _CORNER2,
}
#: where the cameras that the hand carries see it: row and column, as fractions of the picture
CARRIED = {"behindGripper": (0.6003, 0.5), "gripperPOV": (0.5869, 0.3302)}


def check_window(window: object, border: object) -> None:
    """Refuse a window or a border that no hand view has.

    :raises ValueError: with the value and what is expected.
    """
    number = isinstance(window, numbers.Real) and not isinstance(window, bool)
    if not number or not 0 < window <= 1:  # type: ignore[operator]
        raise InputError(f"hand_window={window!r}; expected a fraction of the view, above 0 and at most 1")
    if border not in BORDERS:
        raise InputError(f"Unknown hand_border {border!r}; {did_you_mean(str(border), BORDERS)}")


@dataclass(frozen=True)
class HandView:
    """Which window of a camera's view follows the hand.

    The window is ``size`` pixels of the full square picture of ``resolution`` pixels. With a window of size / 480 that
    is the 480-pixel picture itself. Two are equal that show the same pixels, however their windows were rounded.

    :param size: side of the window's picture, pixels.
    :param window: side of the window as a fraction of the view; it is rounded to whole pixels of a picture.
    :param border: what happens where the window reaches beyond the view: ``shift`` moves it back inside, ``black``
        leaves the hand in its center and black what lies outside.
    :raises ValueError: for a size below 1, a window outside (0, 1] or so small that the full picture is of more than
        :data:`LARGEST_PICTURE` pixels, or an unknown border.
    """

    size: int
    window: float = DEFAULT_WINDOW
    border: str = "shift"

    @classmethod
    def noted(cls, note: object) -> HandView:
        """As a note of a data set or a model says it: a mapping of these arguments, of which ``size`` is needed.

        :raises ValueError: for a note of anything else.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(note, Mapping) or "size" not in note or not set(note) <= set(known):
            raise InputError(f"The hand view is noted as {note!r}; expected size, and window and border if they differ")
        return cls(**note)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, (int, np.integer)) or self.size < 1:
            raise InputError(f"hand_view={self.size!r}; expected the side of a picture, a whole number of pixels")
        check_window(self.window, self.border)
        least = self.size / LARGEST_PICTURE
        if self.size > LARGEST_PICTURE:
            raise InputError(f"hand_view={self.size}; expected at most {LARGEST_PICTURE} pixels")
        if not self.size <= self.window * (LARGEST_PICTURE + 0.5):  # no division, which may overflow
            raise InputError(
                f"hand_window={self.window!r} with hand_view={self.size} is cut from a picture of more than "
                f"{LARGEST_PICTURE} pixels a side; expected a window of at least {math.ceil(least * 1e4) / 1e4:g}"
            )

    @property
    def resolution(self) -> int:
        """Side of the full picture that the window is cut from, pixels."""
        return round(self.size / self.window)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HandView) and self._shown == other._shown

    def __hash__(self) -> int:
        return hash(self._shown)

    def __str__(self) -> str:
        """As an environment is told it."""
        return f"hand_view={self.size}, hand_window={self.window:g}, hand_border={self.border!r}"

    @property
    def _shown(self) -> tuple[int, int, str]:
        return self.size, self.resolution, self.border

    def corner(self, camera: str, states: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Where the window begins, row and column in pixels of the full picture; with ``black`` it may lie outside.

        :param camera: name of the camera.
        :param states: (..., S), the hand's x, y, z in meters first.
        :return: int64 (..., 2).
        """
        if camera in CARRIED:
            center = np.broadcast_to(CARRIED[camera], (*states.shape[:-1], 2))
        else:
            center = STANDING[camera].project(states[..., :3].astype(np.float64) + _PALM_TO_FINGERTIPS)
        first = np.rint(center * self.resolution - self.size / 2).astype(np.int64)
        return np.clip(first, 0, self.resolution - self.size) if self.border == "shift" else first

    def cut(
        self, pictures: npt.NDArray[np.uint8], camera: str, states: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.uint8]:
        """The windows of pictures of the full view.

        Pictures of another resolution than the window's are resampled as Pillow's bilinear reduction does.

        :param pictures: uint8 (N, side, side, 3).
        :param camera: the camera that took them.
        :param states: (N, S).
        :return: uint8 (N, size, size, 3).
        :raises ValueError: if the pictures are not square.
        """
        height, width = pictures.shape[1:3]
        if height != width:
            raise InputError(f"A hand view is cut from square pictures; got {height}x{width} pixels")
        windows = np.zeros((len(pictures), self.size, self.size, 3), np.uint8)
        weights = _reduction(height, self.resolution)
        for picture, corner, window in zip(pictures, self.corner(camera, states), windows, strict=True):
            (top, left, rows, columns), (down, right) = self.inside(*corner)
            if height == self.resolution:
                part = picture[top : top + rows, left : left + columns]
            else:
                down_weights, across = weights[top : top + rows], weights[left : left + columns]
                used = (slice(*_used(down_weights)), slice(*_used(across)))
                reduced = np.tensordot(down_weights[:, used[0]], picture[used].astype(np.float32), 1)
                part = np.rint(np.moveaxis(np.tensordot(across[:, used[1]], reduced, (1, 1)), 0, 1))
            window[down : down + rows, right : right + columns] = part
        return windows

    def inside(self, row: int, column: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """The part of the window that is in the view.

        :param row: where the window begins, as :meth:`corner` tells.
        :return: (top, left, height, width) in pixels of the full picture; row and column of that part in the window.
        """
        top, left = max(row, 0), max(column, 0)
        height = max(min(row + self.size, self.resolution) - top, 0)
        width = max(min(column + self.size, self.resolution) - left, 0)
        return (top, left, height, width), (top - row, left - column)


@lru_cache
def _reduction(before: int, after: int) -> npt.NDArray[np.float32]:
    """Each new pixel of a line as a mean of the old ones, float32 (after, before).

    Weights are a triangle as wide as what lies between two new pixels on either side.
    """
    scale = before / after
    distance = np.abs((np.arange(after)[:, None] + 0.5) * scale - (np.arange(before) + 0.5)) / max(scale, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


def _used(weights: npt.NDArray[np.float32]) -> tuple[int, int]:
    """The first and one past the last old pixel that a mean takes."""
    used = np.flatnonzero(weights.any(0))
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
