"""What is drawn of a compiled model: its geoms and sites as triangles with their looks, and its lights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from mw_envs.errors import InputError
from mw_envs.rendering.software import arrays
from mw_envs.rendering.software.geometry import (
    Shape,
    areas,
    box_shape,
    capsule_shape,
    coarsened,
    cylinder_shape,
    mesh_shape,
    plane_shape,
    sphere_shape,
    unit,
)
from mw_envs.rendering.software.textures import TexturePool

# Of coarsened meshes, in pixels, and of what their shadows are cast by.
_CELL, _CASTER_CELLS = 1.5, (4.0, 2.0)
_KEPT_AREA = 0.85  # of what is seen from each side, or a finer cell is taken: thin parts collapse
# Round shapes, in pixels: how far inside a circle its chords may lie, and the length of parts along a straight line.
_SAGITTA, _STRAIGHT = 0.1, 20.0
_FAINTEST = 5e-4  # of a highlight, where 1 is white
# More opaque than this is opaque, to MuJoCo.
_OPAQUE = 0.995
_HEADLIGHT = -1
_NO_COLOR = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # what the model's compiler puts where no color is given
_GROUPS = 3  # geoms and sites of groups 0 to 2 are visible by default


@dataclass
class _Drawable:
    """One geom or site as it looks in its own coordinates."""

    shape: Shape
    caster: Shape
    scale: npt.NDArray[np.float64]
    is_site: bool
    index: int
    body: int
    rgba: npt.NDArray[np.float32]
    gloss: tuple[float, float, float]
    texture: int
    mapping: tuple[float, ...]
    unbounded: bool


class Prepared:
    """A model's drawables, ready for the inner loops, fine enough for a size of pixel in meters."""

    def __init__(self, model: mujoco.MjModel, background: frozenset[int], pixel: float, textures: TexturePool) -> None:
        _check_lights(model)
        self.pixel = pixel
        drawables = _drawables(model, pixel)
        self._parts = _cube_parts(len(drawables))
        self.geometry = _geometry(drawables, self._parts)
        self.casters = _casters(drawables)
        pooled = [textures.add(_picture(model, texture)) for texture in range(model.ntex)]
        skies = [pooled[i] for i in range(model.ntex) if model.tex_type[i] == mujoco.mjtTexture.mjTEXTURE_SKYBOX]
        self.sky = skies[0] if skies else -1
        self._lights, self._unshadowed, self._light_colors = _lights_of(model)
        self.materials = arrays.Materials(
            np.array([d.rgba for d in drawables], np.float32),
            np.array([(*d.gloss, _FAINTEST ** (2 / max(d.gloss[2], 1e-3))) for d in drawables], np.float32),
            np.array([pooled[d.texture] if d.texture >= 0 else -1 for d in drawables], np.int32),
            np.array([d.mapping for d in drawables], np.float32),
        )
        still = np.array([not d.is_site and d.body in background for d in drawables])
        opaque = self.materials.rgba[:, 3] >= _OPAQUE
        bounded = np.array([not d.unbounded for d in drawables])
        fixed = ~still & np.array([is_fixed(model, d.body) for d in drawables])
        self.background = _numbers(still & opaque)
        self.fixed = _numbers(fixed & opaque)
        self.moving = _numbers(~still & ~fixed & opaque)
        self.transparent = _numbers(~opaque)
        # An endless plane casts no shadow.
        self.background_casting = _numbers(still & opaque & bounded)
        self.fixed_casting = _numbers(fixed & opaque & bounded)
        self.casting = _numbers(~((still | fixed) & opaque) & bounded)
        self.moving_or_fixed = _numbers(~still & opaque)
        self.moving_or_fixed_casting = _numbers(~(still & opaque) & bounded)
        self.background_digest = self._digest(drawables, self.background)
        self.fixed_digest = self._digest(drawables, self.fixed)
        self._geoms = np.array([d.index for d in drawables if not d.is_site], dtype=np.int64)
        self._sites = np.array([d.index for d in drawables if d.is_site], dtype=np.int64)

    def _digest(self, drawables: list[_Drawable], numbers: npt.NDArray[np.int32]) -> bytes:
        """The same for drawables of scenes that look alike."""
        found = hashlib.sha256(repr((self.pixel, self.sky, self._parts)).encode())
        for d in numbers:
            shape = drawables[d].shape
            for array in (shape.places, shape.triangles, shape.corners, shape.normals, drawables[d].scale):
                found.update(array.tobytes())
            for array in (drawables[d].caster.places, drawables[d].caster.triangles):
                found.update(array.tobytes())
            for array in self.materials:
                found.update(array[d].tobytes())
        return found.digest()

    def poses(self, data: mujoco.MjData) -> npt.NDArray[np.float32]:
        """Rotations and positions of the drawables in the simulation, float32 (D, 12).

        :raises ValueError: if one is not finite.
        """
        count = len(self._geoms)
        poses = np.empty((count + len(self._sites), 12), np.float32)
        poses[:count, :9], poses[:count, 9:] = data.geom_xmat[self._geoms], data.geom_xpos[self._geoms]
        poses[count:, :9], poses[count:, 9:] = data.site_xmat[self._sites], data.site_xpos[self._sites]
        if not np.isfinite(poses).all():
            raise InputError("The simulation's poses are not finite: it has diverged, or mj_forward has not run")
        return poses

    def lights(self, data: mujoco.MjData, camera: arrays.Camera) -> arrays.Lights:
        """The model's lights and the camera's own, those without shadows first."""
        towards = np.empty((len(self._lights), 3), np.float32)
        for number, light in enumerate(self._lights):
            towards[number] = -camera.rotation[2] if light == _HEADLIGHT else -data.light_xdir[light]
        ambient, diffuse, specular = self._light_colors
        return arrays.Lights(towards, ambient, diffuse, specular, self._unshadowed)


def _numbers(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    return np.flatnonzero(chosen).astype(np.int32)


def is_fixed(model: mujoco.MjModel, body: int) -> bool:
    """Whether the simulation leaves a body where the model has it: a trial may place it, a step does not move it."""
    return bool(model.body_weldid[body] == 0 and model.body_mocapid[model.body_rootid[body]] < 0)


def _lights_of(model: mujoco.MjModel) -> tuple[list[int], int, npt.NDArray[np.float32]]:
    """Active lights, those without shadows first, how many these are, and ambient, diffuse and specular colors."""
    numbers = np.flatnonzero(model.light_active)
    lights = sorted(numbers.tolist(), key=lambda light: int(model.light_castshadow[light]))
    unshadowed = int((model.light_castshadow[numbers] == 0).sum())
    head = model.vis.headlight
    colors = [(model.light_ambient[i], model.light_diffuse[i], model.light_specular[i]) for i in lights]
    if head.active:
        lights.insert(0, _HEADLIGHT)
        colors.insert(0, (head.ambient, head.diffuse, head.specular))
        unshadowed += 1
    return lights, unshadowed, np.array(colors, np.float32).reshape(-1, 3, 3).transpose(1, 0, 2).copy()


def _check_lights(model: mujoco.MjModel) -> None:
    """Refuse what would be drawn wrongly."""
    # A light has a type since MuJoCo 3.3.2, of which 1 is directional, before that a flag.
    directional = model.light_type == 1 if hasattr(model, "light_type") else model.light_directional != 0
    active = model.light_active != 0
    if not directional[active].all() or model.light_castshadow[active].sum() > 1:
        raise InputError(
            "The software renderer knows directional lights, one of them with shadows; use renderer='egl' or 'osmesa'"
        )


def _drawables(model: mujoco.MjModel, pixel: float) -> list[_Drawable]:
    """All visible geoms, then all visible sites, fine enough for a size of pixel in meters."""
    found = []
    for prefix, count in (("geom", model.ngeom), ("site", model.nsite)):
        groups, kinds, sizes, colors, materials, bodies = (
            getattr(model, f"{prefix}_{field}") for field in ("group", "type", "size", "rgba", "matid", "bodyid")
        )
        for i in range(count):
            material = int(materials[i])
            rgba, gloss = _look(model, colors[i], material)
            if groups[i] >= _GROUPS or rgba[3] == 0:
                continue
            kind, size = mujoco.mjtGeom(kinds[i]), np.asarray(sizes[i], dtype=np.float64)
            mesh = int(model.geom_dataid[i]) if prefix == "geom" else -1
            shape, caster, scale = _shape(model, kind, size, mesh, pixel)
            texture = _texture(model, material)
            # A plane and a mesh have their size already; other shapes are scaled to it.
            sized = kind in (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_MESH)
            mapping = _mapping(model, texture, material, size, sized) if texture >= 0 else (0.0,) * 6
            unbounded = kind == mujoco.mjtGeom.mjGEOM_PLANE
            found.append(
                _Drawable(
                    shape, caster, scale, prefix == "site", i, int(bodies[i]), rgba, gloss, texture, mapping, unbounded
                )
            )
    return found


def _look(
    model: mujoco.MjModel, rgba: npt.NDArray[Any], material: int
) -> tuple[npt.NDArray[np.float32], tuple[float, float, float]]:
    """Color, and emission, specular reflection and exponent of the highlight; a material colors what has none."""
    if material < 0:
        return rgba.astype(np.float32), (0.0, 0.5, 128 * 0.5)
    if np.array_equal(rgba, _NO_COLOR):
        rgba = model.mat_rgba[material]
    shininess = 128.0 * float(model.mat_shininess[material])
    gloss = float(model.mat_emission[material]), float(model.mat_specular[material]), shininess
    return rgba.astype(np.float32), gloss


def _shape(
    model: mujoco.MjModel, kind: mujoco.mjtGeom, size: npt.NDArray[np.float64], mesh: int, pixel: float
) -> tuple[Shape, Shape, npt.NDArray[np.float64]]:
    """An object's shape, what casts its shadow, and what both are to be scaled by."""
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        return *_coarse_mesh(model, mesh, pixel), np.ones(3)
    shape, scale = _regular_shape(model, kind, size, pixel)
    return shape, shape, scale


def _regular_shape(
    model: mujoco.MjModel, kind: mujoco.mjtGeom, size: npt.NDArray[np.float64], pixel: float
) -> tuple[Shape, npt.NDArray[np.float64]]:
    """A shape and what it is to be scaled by; in as many parts as can be seen, MuJoCo's at most."""
    kinds, quality, one = mujoco.mjtGeom, model.vis.quality, np.ones(3)
    if kind == kinds.mjGEOM_PLANE:
        return plane_shape(size[0], size[1], size[2], model.vis.map.zfar * model.stat.extent), one

    def parts(length: float) -> int:
        return int(np.ceil(length / (_STRAIGHT * pixel)))

    if kind == kinds.mjGEOM_BOX:
        return box_shape(min(int(quality.numquads), parts(2 * size.max()))), size
    radius = size.max() if kind == kinds.mjGEOM_ELLIPSOID else size[0]
    wanted = int(np.ceil(np.pi / np.arccos(max(1 - _SAGITTA * pixel / radius, 0.5))))
    slices, most = min(int(quality.numslices), wanted), int(quality.numstacks)
    arc = 2 * max(1, -(-most * slices // (2 * int(quality.numslices))))
    if kind == kinds.mjGEOM_SPHERE:
        return sphere_shape(slices, arc), size[[0, 0, 0]]
    if kind == kinds.mjGEOM_ELLIPSOID:
        return sphere_shape(slices, arc), size
    if kind == kinds.mjGEOM_CYLINDER:
        return cylinder_shape(slices, min(most, parts(2 * max(size[0], size[1])))), size[[0, 0, 1]]
    if kind == kinds.mjGEOM_CAPSULE:
        return capsule_shape(size[0], size[1], slices, min(most, parts(2 * size[1])), max(arc // 2, 1)), one
    name = kind.name.removeprefix("mjGEOM_").lower()
    raise InputError(f"The software renderer cannot draw a {name}; use renderer='egl' or 'osmesa'")


# A robot's meshes are the same in all scenes.
_coarse_meshes: dict[tuple[bytes, float], tuple[Shape, Shape]] = {}


def _coarse_mesh(model: mujoco.MjModel, mesh: int, pixel: float) -> tuple[Shape, Shape]:
    """A mesh as fine as can be seen, and what casts its shadow."""
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
    digest = hashlib.blake2b(model.mesh_vert[vertices].tobytes(), digest_size=16)
    digest.update(model.mesh_face[faces].tobytes())
    key = digest.digest(), pixel
    if key not in _coarse_meshes:
        shape = coarsened(mesh_shape(model, mesh), _CELL * pixel)
        _coarse_meshes[key] = shape, _caster(shape, pixel)
    return _coarse_meshes[key]


def _caster(shape: Shape, pixel: float) -> Shape:
    for cell in _CASTER_CELLS:
        coarse = coarsened(shape, cell * pixel)
        if (areas(coarse) >= _KEPT_AREA * areas(shape)).all():
            return coarse
    return shape


def _texture(model: mujoco.MjModel, material: int) -> int:
    """The texture that colors a material, or -1."""
    if material < 0:
        return -1
    # Since MuJoCo 3.2 a material has a texture for each role; the second is its color.
    textures = np.atleast_1d(model.mat_texid[material])
    return int(textures[1] if len(textures) > 1 else textures[0])


def _mapping(
    model: mujoco.MjModel, texture: int, material: int, size: npt.NDArray[np.float64], sized: bool
) -> tuple[float, ...]:
    """How places become texture coordinates; see :class:`mw_envs.rendering.software.arrays.Materials`."""
    uniform = bool(model.mat_texuniform[material])
    if model.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D:
        x, y, z = size if uniform else (1.0, 1.0, 1.0)
        return 1.0, x, 0.0, y, 0.0, z
    scale = model.mat_texrepeat[material].astype(np.float64)
    for k in range(2):
        if size[k] > 0:
            scale[k] *= (size[k] if uniform else 1.0) / (size[k] if sized else 1.0)
    return 0.0, 0.5 * scale[0], -0.5, -0.5 * scale[1], -0.5, 0.0


def _geometry(drawables: list[_Drawable], parts: int) -> arrays.Geometry:
    places, normals, triangles, corners, facing, owners, texture_places = [], [], [], [], [], [], []
    first_vertex, first_triangle, first_corner = [0], [0], 0
    for number, drawable in enumerate(drawables):
        shape = drawable.shape
        places.append(shape.places * drawable.scale)
        facing.append(_facing(places[-1][shape.triangles]))
        texture_places.append(shape.places)
        normals.append(unit(shape.normals / drawable.scale))
        triangles.append(shape.triangles + first_vertex[-1])
        corners.append(shape.corners + first_corner)
        owners.append(np.full(len(shape.triangles), number))
        first_vertex.append(first_vertex[-1] + len(shape.places))
        first_triangle.append(first_triangle[-1] + len(shape.triangles))
        first_corner += len(shape.normals)
    return arrays.Geometry._make(
        [
            *np.ascontiguousarray(np.concatenate(places).T, np.float32),
            np.concatenate(
                [np.concatenate(triangles), _sample_numbers(drawables, parts)[:, None]], axis=1, dtype=np.int32
            ),
            np.concatenate(corners).astype(np.int32),
            np.concatenate(facing).astype(np.float32),
            np.concatenate(owners).astype(np.int32),
            np.concatenate(normals).astype(np.float32),
            np.concatenate(texture_places).astype(np.float32),
            np.array(first_vertex, np.int32),
            np.array(first_triangle, np.int32),
        ]
    )


def _casters(drawables: list[_Drawable]) -> arrays.Casters:
    places, triangles, facing, first_vertex, first_triangle = [], [], [], [0], [0]
    for drawable in drawables:
        shape = drawable.caster
        places.append(shape.places * drawable.scale)
        triangles.append(shape.triangles + first_vertex[-1])
        facing.append(_facing(places[-1][shape.triangles]))
        first_vertex.append(first_vertex[-1] + len(shape.places))
        first_triangle.append(first_triangle[-1] + len(shape.triangles))
    return arrays.Casters._make(
        [
            *np.ascontiguousarray(np.concatenate(places).T, np.float32),
            np.concatenate(triangles).astype(np.int32),
            np.concatenate(facing).astype(np.float32),
            np.array(first_vertex, np.int32),
            np.array(first_triangle, np.int32),
        ]
    )


def _facing(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Normals of triangles (T, 3, 3), of any length, and the share of their points along those, (T, 4)."""
    normals = np.cross(places[:, 1] - places[:, 0], places[:, 2] - places[:, 0])
    return np.concatenate([normals, (normals * places[:, 0]).sum(axis=1, keepdims=True)], axis=1)


def _cube_parts(drawables: int) -> int:
    """In how many parts the edges of a cube are divided, so that there are groups for as many drawables; 0: no cube."""
    return next((k for k in (3, 2, 1) if 6 * k * k * drawables <= arrays.GROUPS), 0)


def _sample_numbers(drawables: list[_Drawable], parts: int) -> npt.NDArray[np.int32]:
    """What samples know the triangles by; see :class:`mw_envs.rendering.software.arrays.Samples`.

    A triangle's group is its drawable and the part of a cube's surface that its normal points to.

    :param parts: see :func:`_cube_parts`.
    """
    total = sum(len(d.shape.triangles) for d in drawables)
    if len(drawables) > arrays.GROUPS or total > arrays.TRIANGLES:
        raise InputError(
            f"The software renderer draws up to {arrays.GROUPS} geoms and sites of {arrays.TRIANGLES} triangles; the "
            f"model has {len(drawables)} of {total}; use renderer='egl' or 'osmesa'"
        )
    groups = []
    for number, drawable in enumerate(drawables):
        if parts == 0:
            groups.append(np.full(len(drawable.shape.triangles), number))
            continue
        places = (drawable.shape.places * drawable.scale)[drawable.shape.triangles]
        normals = np.cross(places[:, 1] - places[:, 0], places[:, 2] - places[:, 0])
        towards = np.abs(normals).argmax(axis=1)[:, None]
        ahead = np.take_along_axis(normals, towards, axis=1)
        aside = np.take_along_axis(normals, (towards + np.array([1, 2])) % 3, axis=1) / np.where(
            ahead == 0, 1, np.abs(ahead)
        )
        across, down = np.minimum((aside + 1) / 2 * parts, parts - 1).astype(int).T
        part = ((2 * towards + (ahead < 0))[:, 0] * parts + across) * parts + down
        groups.append(number * 6 * parts * parts + part)
    group = np.concatenate(groups).astype(np.int64) + 1
    return (group << arrays.TRIANGLE_BITS | np.arange(total)).astype(np.uint32).view(np.int32)


def _picture(model: mujoco.MjModel, texture: int) -> npt.NDArray[np.uint8]:
    """A texture's faces, one or six, uint8 (faces, height, width, 3)."""
    width, height, channels = model.tex_width[texture], model.tex_height[texture], model.tex_nchannel[texture]
    start = model.tex_adr[texture]
    size = width * height * channels
    picture = model.tex_data[start : start + size].reshape(height, width, channels)[..., :3]
    flat = model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D or height == width
    return np.asarray(picture.reshape(1 if flat else 6, -1, width, 3), np.uint8)
