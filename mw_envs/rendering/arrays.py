"""The arrays that the software renderer's inner loops work on, and how these are compiled.

Letters: V vertices (places), C corners (a vertex with a normal), T triangles, D drawables, S lights.

*Samples* are the points at which coverage and depth are decided: ``s x s`` a pixel, one in each of its cells. Depths
are kept as one over the distance along the camera's axis, which is linear on the screen; a larger one is nearer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Arithmetic may be regrouped, but what is not finite stays what it is: comparisons keep it from becoming an index.
_FAST = {"arcp", "contract", "nsz", "reassoc"}
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": _FAST, "error_model": "numpy"}
compiled = numba.njit(**_OPTIONS)
# A call would hand over each field of each array.
inlined = numba.njit(**_OPTIONS, inline="always")

NOTHING = -1  # the triangle of a sample that sees none
F = np.float32
ZERO, HALF, ONE = F(0), F(0.5), F(1)


class Geometry(NamedTuple):
    """What a scene's drawables are made of; set once.

    :param x: object coordinates of vertices, float32 (V,); so are y and z.
    :param triangles: vertices of each triangle, int32 (T, 3).
    :param corners: corners of each triangle, int32 (T, 3).
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
    drawable: Array
    normals: Array
    texture_places: Array
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
    """A pinhole, in pixels: a point (x, y, w) of camera space is seen at (centre_x + focal_x x / w, centre_y + ...).

    :param rotation: world to camera, float32 (3, 3); rows are right, up and forward.
    :param position: float32 (3,).
    :param near: least distance that is drawn, metres.
    """

    rotation: Array
    position: Array
    focal_x: float
    focal_y: float
    centre_x: float
    centre_y: float
    near: float


class Workspace(NamedTuple):
    """What is computed anew for each frame, in memory that is kept.

    :param camera_x: vertices in camera space, float32 (V,); so are camera_y and camera_w.
    :param screen_x: vertices on the screen in samples, float32 (V,); so is screen_y.
    :param inverse_w: one over the distance, 0 if nearer than the near plane, float32 (V,).
    :param light_u: vertices in texels of the shadow map, float32 (V,); so are light_v and light_d (metres).
    :param colors: of corners: by unshadowed lights, by shadowed ones, float32 (C, 6).
    :param lit: frame in which a corner's colours were computed, int64 (C,).
    :param planes: of triangles: what times a ray (x, y, 1) is each quantity times its weight, float32 (T, 3, 16).
    :param ready: frame in which a triangle's planes were computed, int64 (T,).
    """

    camera_x: Array
    camera_y: Array
    camera_w: Array
    screen_x: Array
    screen_y: Array
    inverse_w: Array
    light_u: Array
    light_v: Array
    light_d: Array
    colors: Array
    lit: Array
    planes: Array
    ready: Array


class ShadowMap(NamedTuple):
    """Distances from the light of what it meets first, in a window of the light's plane.

    :param depth: metres, float32 (rows, columns); inf where it meets nothing.
    :param u0: texel of the first column, and v0 of the first row.
    :param slack: metres that a surface may lie behind the stored depth and still be lit.
    """

    depth: Array
    u0: int
    v0: int
    slack: float
