"""Triangles of everything that MuJoCo draws, tessellated as its own renderer does it.

All shapes are unit shapes as MuJoCo defines them (a sphere of radius 1, a box of half sides 1, a cylinder of radius and
half height 1); :func:`drawable` brings them to an object's size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]

# Cosine between a corner's own normal and its triangle's, below which MuJoCo shades a mesh's corner flat.
_SMOOTH_COSINE = 0.8


@dataclass(frozen=True)
class Shape:
    """A triangulated surface.

    A *corner* is a vertex with a normal: where triangles meet at an edge, corners share a place but not a normal.

    :param places: positions, float64 (V, 3).
    :param triangles: counter-clockwise seen from outside, indices of places, int32 (T, 3).
    :param corners: indices of normals, int32 (T, 3).
    :param normals: unit normals, float64 (C, 3).
    :param corner_places: index of each corner's place, int32 (C,).
    """

    places: Floats
    triangles: Indices
    corners: Indices
    normals: Floats
    corner_places: Indices


def shape_of(places: Floats, normals: Floats) -> Shape:
    """A shape from loose triangles; equal places and equal corners become one, and triangles without area go.

    :param places: (T, 3, 3), three vertices of each triangle.
    :param normals: (T, 3, 3), their normals.
    """
    flat = np.round(places.reshape(-1, 3), 9) + 0.0
    unique_places, _, place = _unique_rows(flat)
    corner_key = np.concatenate([place[:, None], np.round(normals.reshape(-1, 3), 6) + 0.0], axis=1)
    unique_corners, _, corner = _unique_rows(corner_key)
    triangles = place.reshape(-1, 3).astype(np.int32)
    corners = corner.reshape(-1, 3).astype(np.int32)
    area = (triangles[:, 0] != triangles[:, 1]) & (triangles[:, 1] != triangles[:, 2])
    area &= triangles[:, 2] != triangles[:, 0]
    return Shape(
        unique_places,
        np.ascontiguousarray(triangles[area]),
        np.ascontiguousarray(corners[area]),
        unit(unique_corners[:, 1:]),
        unique_corners[:, 0].astype(np.int32),
    )


def coarsened(shape: Shape, cell: float) -> Shape:
    """A shape in which vertices within a cube of side ``cell`` are one (Rossignac and Borrel 1993).

    They move to their mean; triangles that collapse or repeat another go. Corners of a vertex whose normals are alike
    become one, with their mean normal.
    """
    cell_of = np.floor((shape.places - shape.places.min(axis=0)) / cell).astype(np.int64)
    _, _, cluster = _unique_rows(cell_of)
    size = np.bincount(cluster)
    places = np.stack([np.bincount(cluster, shape.places[:, k]) / size for k in range(3)], axis=1)
    triangles = cluster[shape.triangles]
    # Turned so that the least vertex comes first: the two sides of a thin sheet stay two triangles.
    turned = np.take_along_axis(triangles, (triangles.argmin(1)[:, None] + np.arange(3)) % 3, axis=1)
    kept = np.zeros(len(triangles), dtype=bool)
    kept[_unique_rows(turned)[1]] = True
    kept &= (turned[:, 0] != turned[:, 1]) & (turned[:, 1] != turned[:, 2]) & (turned[:, 2] != turned[:, 0])
    if not kept.any():  # smaller than a cell: leave it as it is
        return shape
    key = np.concatenate([cluster[shape.corner_places][:, None], np.round(2 * shape.normals).astype(np.int64)], axis=1)
    corner_key, _, corner = _unique_rows(key)
    normals = np.stack([np.bincount(corner, shape.normals[:, k]) for k in range(3)], axis=1).astype(np.float64)
    return Shape(
        places,
        triangles[kept].astype(np.int32),
        corner[shape.corners][kept].astype(np.int32),
        unit(normals),
        corner_key[:, 0].astype(np.int32),
    )


def areas(shape: Shape) -> Floats:
    """What a shape's triangles, of both sides, cover seen along x, y and z, (3,)."""
    a, b, c = (shape.places[shape.triangles[:, k]] for k in range(3))
    return np.asarray(np.abs(np.cross(b - a, c - a)).sum(axis=0) / 2)


def _unique_rows(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Different rows in their order, where each is first, and which of them each row is.

    As ``np.unique`` with an axis, which compares rows one pair of bytes after the other, in a third of its time.
    """
    order = np.lexsort(rows.T[::-1])
    in_order = rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    inverse = np.empty(len(rows), np.int64)
    inverse[order] = np.cumsum(new) - 1
    return in_order[new], order[new], inverse


def unit(vectors: Floats) -> Floats:
    """Vectors (..., 3) at length one; zero stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def mesh_shape(model: mujoco.MjModel, mesh: int) -> Shape:
    """A mesh of the model, with MuJoCo's rule for its normals: smooth where they agree with the triangle, else flat."""
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    vertices = model.mesh_vert[model.mesh_vertadr[mesh] :].astype(np.float64)
    places = vertices[model.mesh_face[faces]]
    normals = model.mesh_normal[model.mesh_normaladr[mesh] :].astype(np.float64)[model.mesh_facenormal[faces]]
    flat = unit(np.cross(places[:, 1] - places[:, 0], places[:, 2] - places[:, 0]))[:, None]
    if model.mesh_texcoordadr[mesh] < 0:
        normals = np.where((normals * flat).sum(2, keepdims=True) < _SMOOTH_COSINE, flat, normals)
    return shape_of(places, normals)


def _quads(places: Floats, normals: Floats) -> tuple[Floats, Floats]:
    """Quadrilaterals (Q, 4, 3) as two triangles each."""
    order = np.array([[0, 1, 3], [1, 2, 3]])
    return places[:, order].reshape(-1, 3, 3), normals[:, order].reshape(-1, 3, 3)


def _revolve(profile: Floats, normals: Floats, slices: int) -> tuple[Floats, Floats]:
    """Triangles of a profile (P, 2) of radius and height, revolved about z, seen from the side its normals point to.

    The profile runs so that the outside is to its right: upwards for an outer wall.
    """
    angle = 2 * np.pi * np.arange(slices + 1) / slices
    cosine, sine = np.cos(angle), np.sin(angle)
    cosine[-1], sine[-1] = cosine[0], sine[0]

    def around(pairs: Floats) -> Floats:
        """Places of points (P, 2), given as radius and height, on each slice: (P, slices + 1, 3)."""
        radius, height = pairs[:, :1], pairs[:, 1:]
        return np.stack([radius * cosine, radius * sine, np.broadcast_to(height, (len(pairs), slices + 1))], axis=2)

    place, normal = around(profile), around(normals)
    corners = [(slice(None, -1), slice(None, -1)), (slice(None, -1), slice(1, None))]
    corners += [(slice(1, None), slice(1, None)), (slice(1, None), slice(None, -1))]
    return _quads(
        np.stack([place[a, b].reshape(-1, 3) for a, b in corners], axis=1),
        np.stack([normal[a, b].reshape(-1, 3) for a, b in corners], axis=1),
    )


def _arc(stacks: int, first: float, last: float) -> Floats:
    elevation = np.linspace(first, last, stacks + 1)
    arc = np.stack([np.cos(elevation), np.sin(elevation)], axis=1)
    arc[np.abs(arc) < 1e-12] = 0.0
    return arc


def _disks(slices: int, stacks: int) -> list[tuple[Floats, Floats]]:
    """Bottom at z = -1 and top at z = 1."""
    outwards = np.linspace(0, 1, stacks + 1)
    bottom = np.stack([outwards, np.full(stacks + 1, -1.0)], axis=1)
    top = np.stack([outwards[::-1], np.full(stacks + 1, 1.0)], axis=1)
    down, up = np.tile([0.0, -1.0], (stacks + 1, 1)), np.tile([0.0, 1.0], (stacks + 1, 1))
    return [_revolve(bottom, down, slices), _revolve(top, up, slices)]


def _joined(parts: list[tuple[Floats, Floats]]) -> Shape:
    return shape_of(np.concatenate([p for p, _ in parts]), np.concatenate([n for _, n in parts]))


@functools.lru_cache
def sphere_shape(slices: int, stacks: int) -> Shape:
    """Unit sphere."""
    arc = _arc(2 * (stacks // 2), -np.pi / 2, np.pi / 2)
    return _joined([_revolve(arc, arc, slices)])


@functools.lru_cache
def cylinder_shape(slices: int, stacks: int) -> Shape:
    """Cylinder of radius 1 from z = -1 to z = 1, closed."""
    wall = np.stack([np.ones(stacks + 1), np.linspace(-1, 1, stacks + 1)], axis=1)
    normal = np.tile([1.0, 0.0], (stacks + 1, 1))
    return _joined([_revolve(wall, normal, slices), *_disks(slices, max(stacks // 2, 1))])


@functools.lru_cache
def capsule_shape(radius: float, half_length: float, slices: int, stacks: int, cap_stacks: int) -> Shape:
    """Capsule at its real size.

    :param stacks: parts of the straight wall, and cap_stacks of each cap from its rim to its pole.
    """
    lower, upper = _arc(cap_stacks, -np.pi / 2, 0.0), _arc(cap_stacks, 0.0, np.pi / 2)
    wall = np.stack([np.full(stacks + 1, radius), np.linspace(-half_length, half_length, stacks + 1)], axis=1)
    return _joined(
        [
            _revolve(lower * radius - [0, half_length], lower, slices),
            _revolve(wall, np.tile([1.0, 0.0], (stacks + 1, 1)), slices),
            _revolve(upper * radius + [0, half_length], upper, slices),
        ]
    )


@functools.lru_cache
def box_shape(divisions: int) -> Shape:
    """Box of half sides 1, each side in divisions x divisions quadrilaterals."""
    edge = np.linspace(-1, 1, divisions + 1)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(divisions), np.arange(divisions), indexing="ij"))
    u = np.stack([edge[x], edge[x + 1], edge[x + 1], edge[x]], axis=1)
    v = np.stack([edge[y], edge[y], edge[y + 1], edge[y + 1]], axis=1)
    parts = []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            places = np.empty((len(x), 4, 3))
            places[..., axis] = sign
            places[..., (axis + 1) % 3], places[..., (axis + 2) % 3] = u, v
            normals = np.zeros_like(places)
            normals[..., axis] = sign
            parts.append(_quads(places if sign > 0 else places[:, ::-1], normals))
    return _joined(parts)


@functools.lru_cache
def plane_shape(half_x: float, half_y: float, spacing: float, far: float) -> Shape:
    """Plane at its real size, in a grid; a half side of 0 reaches as far as the camera sees.

    MuJoCo lights a plane at the grid's corners; with directional lights only their highlights depend on how fine it is.
    """

    def edges(half: float) -> Floats:
        if half <= 0:
            return np.linspace(-1.05 * far, 1.05 * far, 101)
        cells = int(np.clip(round(half / max(spacing, half / 100)), 1, 100))
        return np.linspace(-half, half, 2 * cells + 1)

    ex, ey = edges(half_x), edges(half_y)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(len(ex) - 1), np.arange(len(ey) - 1), indexing="ij"))
    places = np.zeros((len(x), 4, 3))
    places[..., 0] = np.stack([ex[x], ex[x + 1], ex[x + 1], ex[x]], axis=1)
    places[..., 1] = np.stack([ey[y], ey[y], ey[y + 1], ey[y + 1]], axis=1)
    normals = np.zeros_like(places)
    normals[..., 2] = 1.0
    return _joined([_quads(places, normals)])
