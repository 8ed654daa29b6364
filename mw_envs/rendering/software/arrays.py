"""The arrays that the software renderer's inner loops work on, and how these are compiled.

Letters: V vertices (places), C corners (a vertex with a normal), T triangles, D drawables, S lights.

*Samples* are the points at which coverage and depth are decided, four a pixel; see :class:`Samples`. Triangles of one
drawable that face nearly the same way are a *group*: what a pixel sees of one is given the color of one of its
triangles.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Arithmetic may be regrouped, but what is not finite stays what it is: comparisons keep it from becoming an index.
_FAST = {"arcp", "contract", "nsz", "reassoc"}
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}


def compiled(function: Callable[..., Any]) -> Any:
    """A function as machine code, which is made on its first call and kept on disk."""
    return _compiled(function)


def inlined(function: Callable[..., Any]) -> Any:
    """The same as a part of what calls it: a call would hand over each field of each array."""
    return _compiled(function, inline="always")


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    if not _CACHE:
        return numba.njit(cache=_CACHE is None, **_OPTIONS, **options)(function)
    settings: Any = numba.config
    before, settings.CACHE_DIR = settings.CACHE_DIR, _CACHE
    try:
        return numba.njit(cache=True, **_OPTIONS, **options)(function)
    finally:
        settings.CACHE_DIR = before  # for other packages' functions


def _cache() -> str | None:
    """A temporary folder for what Numba compiles; None where Numba finds one by itself, empty where there is none.

    It looks in ``NUMBA_CACHE_DIR``, beside the module and below the user's home.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if not os.path.isabs(os.path.expanduser("~") if given is None else given):
        os.environ["XDG_CACHE_HOME"] = os.devnull  # else Numba makes a folder, such as ~, in the working directory
    try:
        numba.njit(cache=True)(_cache)
        return None
    except RuntimeError:  # what Numba raises if it finds no folder
        pass
    finally:
        if given is None:
            os.environ.pop("XDG_CACHE_HOME", None)
        else:
            os.environ["XDG_CACHE_HOME"] = given
    remedy = "Set NUMBA_CACHE_DIR to a folder that you may write to"
    try:
        folder = Path(tempfile.gettempdir()) / f"mw_envs-compiled-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            warnings.warn(
                f"The compiled renderer is kept in {folder} only, until that is cleared. {remedy}", stacklevel=2
            )
        found = folder.lstat()
        # Numba runs what lies there, so only this user may have put it there.
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if own and os.access(folder, os.W_OK | os.X_OK):  # it may be of an earlier time, and read-only now
            return str(folder)
    except OSError:
        pass
    warnings.warn(f"Each process compiles the renderer for itself, which takes half a minute. {remedy}", stacklevel=2)
    return ""


_CACHE = _cache()

TILE = 16  # side of the squares in which the background is looked through for shadows, pixels

F = np.float32
ZERO, HALF, ONE = F(0), F(0.5), F(1)

SAMPLES = 4
# The triangles' inner loops treat this many samples, or texels of a shadow map, at a time, so that they become vector
# instructions; rows have a margin for what that writes beyond their end.
LANES = 16
MARGIN = LANES // SAMPLES - 1  # pixels
GROUP_BITS, TRIANGLE_BITS = 12, 20
GROUPS, TRIANGLES = (1 << GROUP_BITS) - 1, 1 << TRIANGLE_BITS
# Samples stand where those of OpenGL's multisampling usually do, no two of a pixel in one row or column.
SAMPLE_X = np.array([0.125, 0.625, 0.375, 0.875], np.float32)
SAMPLE_Y = np.array([0.375, 0.125, 0.875, 0.625], np.float32)
LANE_X = np.array([lane // SAMPLES + SAMPLE_X[lane % SAMPLES] for lane in range(LANES)], np.float32)
LANE_Y = np.array([SAMPLE_Y[lane % SAMPLES] for lane in range(LANES)], np.float32)
# Quantities that vary over a triangle: color by unshadowed lights, by shadowed ones, place in the light's space, place
# on the texture, and the weight that all of them are multiplied by. In a triangle's first row, at LEVEL, TEXTURE and
# DRAWABLE, are how much its texture is reduced, which one that is, or -1, and what the triangle belongs to.
U, V, D, S, WEIGHT, LEVEL, TEXTURE, DRAWABLE, QUANTITIES = 6, 7, 8, 9, 12, 13, 14, 15, 16


class Geometry(NamedTuple):
    """What a scene's drawables are made of; set once.

    :param x: object coordinates of vertices, float32 (V,); so are y and z.
    :param triangles: vertices of each triangle, and the number by which samples know it, int32 (T, 4).
    :param corners: corners of each triangle, int32 (T, 3).
    :param facing: normal of each triangle and the share of its points along that, float32 (T, 4).
    :param drawable: drawable of each triangle, int32 (T,).
    :param normals: object coordinates of the corners' normals, float32 (C, 3).
    :param texture_places: object coordinates that textures are mapped by, float32 (V, 3).
    :param first_vertex: first vertex of each drawable and the end, int32 (D + 1,).
    :param first_triangle: first triangle of each drawable and the end, int32 (D + 1,).
    """

    x: Array
    y: Array
    z: Array
    triangles: Array
    corners: Array
    facing: Array
    drawable: Array
    normals: Array
    texture_places: Array
    first_vertex: Array
    first_triangle: Array


class Casters(NamedTuple):
    """What the drawables' shadows are cast by: their shapes again, meshes with less detail.

    :param x: object coordinates of vertices, float32 (V,); so are y and z.
    :param triangles: vertices of each triangle, int32 (T, 3).
    :param facing: see :class:`Geometry`; so are first_vertex and first_triangle.
    """

    x: Array
    y: Array
    z: Array
    triangles: Array
    facing: Array
    first_vertex: Array
    first_triangle: Array


class Materials(NamedTuple):
    """Looks of the drawables.

    :param rgba: float32 (D, 4).
    :param gloss: emission, specular reflection, exponent of the highlight, and the squared cosine below which there is
        none to be seen, float32 (D, 4).
    :param texture: index of the texture or -1, int32 (D,).
    :param mapping: 0 for a flat texture whose u = a x + b and v = c y + d, 1 for a cube of directions (a x, c y, e z);
        float32 (D, 6): kind, a, b, c, d, e.
    """

    rgba: Array
    gloss: Array
    texture: Array
    mapping: Array


class Textures(NamedTuple):
    """Pictures with their reductions by two, four, ...

    :param pixels: all levels of all textures, one after the other, uint8 (P, 3).
    :param levels: of each texture and level: first pixel, width, height of one face, faces; int32 (X, L, 4). A width of
        0 marks a level that is not there.
    """

    pixels: Array
    levels: Array


class Lights(NamedTuple):
    """Directional lights; those from ``unshadowed`` on are blocked by what the shadow maps hold.

    :param towards: unit vectors to the lights, float32 (S, 3).
    :param ambient: float32 (S, 3); so are diffuse and specular.
    :param unshadowed: number of lights that cast no shadows; they come first.
    """

    towards: Array
    ambient: Array
    diffuse: Array
    specular: Array
    unshadowed: int


class Camera(NamedTuple):
    """A pinhole, in pixels: a point (x, y, w) of camera space is seen at (center_x + focal_x x / w, center_y + ...).

    :param rotation: world to camera, float32 (3, 3); rows are right, up and forward.
    :param position: float32 (3,).
    :param near: least distance that is drawn, meters.
    """

    rotation: Array
    position: Array
    focal_x: float
    focal_y: float
    center_x: float
    center_y: float
    near: float


class Workspace(NamedTuple):
    """What is computed anew for each frame, in memory that is kept.

    :param camera: vertices in camera space, float32 (V, 4): x, y, w; the last column of this and of the next two only
        makes what belongs to a vertex lie in one line of the cache.
    :param screen: vertices on the screen in pixels, and one over the distance, 0 if nearer than the near plane, float32
        (V, 4).
    :param light: the casters' vertices in texels of the shadow map, and their depth in meters, float32 (V, 4).
    :param front: triangles whose front is towards the camera or a light, int32 (T + 1,): what is written first and
        counted then has room.
    :param corners: quantities at the corners, float32 (C, 16).
    :param lit: frame in which a corner's quantities were computed, int64 (C,).
    :param slots: of triangles: in the upper half of a number the frame that showed it last, in the lower half its place
        among the visible ones, int64 (T,).
    :param visible: triangles that a frame shows, int32 (T + 1,), see ``front``.
    :param planes: of visible triangles: three rows that, times a ray (x, y, 1), are each quantity times its weight, and
        room for the result, float32 (T, 4, 16). Of as many as a frame shows, memory is touched.
    :param fresh: corners to be lit, their vertices and their drawables; int32 (C + 1,).
    :param shadows: room for a shadow map, float32 (n,).
    """

    camera: Array
    screen: Array
    light: Array
    front: Array
    corners: Array
    lit: Array
    slots: Array
    visible: Array
    planes: Array
    fresh: Array
    fresh_vertices: Array
    fresh_drawables: Array
    shadows: Array


class Look(NamedTuple):
    """All that colors are computed from.

    :param frame: number of the frame, counted from 1.
    :param eyes: the camera in each drawable's coordinates, float32 (D, 3).
    :param towards: the directions to the lights in each drawable's coordinates, float32 (D, S, 3).
    :param to_light: each drawable's coordinates to those of the light that casts shadows, in texels across and meters
        along it, three rows of four each, float32 (D, 12); zeros if none does.
    """

    frame: int
    geometry: Geometry
    casters: Casters
    materials: Materials
    textures: Textures
    lights: Lights
    workspace: Workspace
    eyes: Array
    towards: Array
    to_light: Array


class ShadowMap(NamedTuple):
    """Distances from the light of what it meets first, in a window of the light's plane.

    :param depth: meters, float32 (rows, columns + margin); inf where it meets nothing.
    :param columns: columns that count.
    :param u0: texel of the first column, and v0 of the first row.
    :param slack: meters that a surface may lie behind the stored depth and still be lit.
    """

    depth: Array
    columns: int
    u0: int
    v0: int
    slack: float


class Samples(NamedTuple):
    """What samples see.

    :param nearness: one over the distance along the camera's axis, which is linear on the screen, float32 (rows, 4
        (columns + margin)).
    :param numbers: the triangle, counted from 0, and in the upper bits its group, from 1; or 0 for what was there
        before; int32, of the same shape. When colors are computed they become the triangle's place among the visible
        ones, counted from 1.
    """

    nearness: Array
    numbers: Array


class Background(NamedTuple):
    """The part of a view that does not move.

    :param bright: its picture in the light, uint8 (rows, columns, 3).
    :param dark: the same in the shadow of something, uint8 (rows, columns, 3).
    :param nearness: what its samples see, see :class:`Samples`.
    :param light_u: texel of the light's plane that a pixel lies in, int32 (rows, columns); so is light_v.
    :param light_d: its depth there, float32 (rows, columns); -1e9 marks a pixel that a shadow does not change.
    :param tiles: of each square of TILE pixels, the first and last texel across and down that a shadow may change it
        from, int32 (rows / TILE, columns / TILE, 4), both rounded up.
    :param shadows: what the light meets of it.
    """

    bright: Array
    dark: Array
    nearness: Array
    light_u: Array
    light_v: Array
    light_d: Array
    tiles: Array
    shadows: ShadowMap


class Canvas(NamedTuple):
    """Samples that moving things are drawn into, over a background's.

    :param seen: what the samples see; outside the spans it is the background's.
    :param spans: first and last pixel of each row that may see a triangle, int32 (rows, 2).
    :param layer: room for what transparent things cover, as ``seen``, and layer_spans as ``spans``.
    """

    seen: Samples
    spans: Array
    layer: Samples
    layer_spans: Array
