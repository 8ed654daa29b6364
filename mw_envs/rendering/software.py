"""A software renderer that draws what MuJoCo's own renderer draws, without OpenGL.

It reads a compiled model and its data. The background, which does not move, is drawn once for each view and kept with
its depths, once in the light and once in the shadow of what moves; a frame draws the moving triangles over it.
Facts about MuJoCo's renderer (lighting by OpenGL's fixed functions at vertices, multisampling, shadow and texture
mapping, the order of passes) are those of its classic OpenGL renderer at default quality.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from mw_envs.rendering import arrays, raster, shading
from mw_envs.rendering.geometry import (
    Shape,
    box_shape,
    capsule_shape,
    coarsened,
    cylinder_shape,
    mesh_shape,
    plane_shape,
    sphere_shape,
    unit,
)
from mw_envs.rendering.view import Scene, View
from mw_envs.tasks import did_you_mean

# Distance at which the side of a pixel is measured: the robot seen from a camera that stands beside the table, and the
# gripper seen from one that it carries, metres.
_STANDING_DISTANCE, _CARRIED_DISTANCE = 1.0, 0.1
# Cells of coarsened meshes and texels of shadow maps, in pixels.
_CELL, _TEXEL = 1.5, 1.25
# A surface is in shadow if it lies this much behind what the light meets first, in texels.
_SLACK = 0.75
_SLOPE_TEXELS = 1.0
_STAGGER = -0.25
_FAINTEST = 5e-4  # of a highlight, where 1 is white
# More opaque than this is opaque, to MuJoCo.
_OPAQUE = 0.995
_BACKGROUNDS_KEPT = 8
_NO_COLOUR = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # what the model's compiler puts where no colour is given
_GROUPS = 3  # geoms and sites of groups 0 to 2 are visible by default


@dataclass
class _Drawable:
    """One geom or site as it looks in its own coordinates."""

    shape: Shape
    scale: npt.NDArray[np.float64]
    is_site: bool
    index: int
    body: int
    rgba: npt.NDArray[np.float32]
    gloss: tuple[float, float, float]
    texture: int
    mapping: tuple[float, ...]
    unbounded: bool


@dataclass
class _Background:
    """The part of a view that does not move."""

    bright: npt.NDArray[np.uint8]
    dark: npt.NDArray[np.uint8]
    nearest: npt.NDArray[np.float32]
    light_places: npt.NDArray[np.float32]
    shadows: arrays.ShadowMap


class SoftwareRenderer:
    """Draws on the processor; see :class:`mw_envs.rendering.Renderer`.

    :param samples: samples per pixel along each side, for smooth edges.
    """

    def __init__(self, samples: int = 2) -> None:
        self.samples = samples
        # Four samples stand where those of OpenGL's multisampling usually do, no two in one row or column.
        self._stagger = _STAGGER if samples == 2 else 0.0
        self._scenes: dict[tuple[Scene, float], _Prepared] = {}
        self._backgrounds: OrderedDict[Any, _Background] = OrderedDict()
        self._complete = False
        self._buffers: dict[tuple[int, int], tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]] = {}

    def render(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        view: View,
        scene: Scene,
    ) -> npt.NDArray[np.uint8]:
        """Draw a view; see :meth:`mw_envs.rendering.Renderer.render`.

        :raises ValueError: if the model has no camera of that name.
        """
        number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, view.camera)
        if number < 0:
            known = [model.camera(i).name for i in range(model.ncam)]
            raise ValueError(f"Unknown camera {view.camera!r}; {did_you_mean(view.camera, known)}")
        camera = _camera(model, data, number, view)
        pixel = _pixel_size(model, number, view)
        if (scene, pixel) not in self._scenes:
            self._scenes[scene, pixel] = _Prepared(model, scene.background, pixel)
        prepared = self._scenes[scene, pixel]
        prepared.place(data)
        lights = prepared.lights(data, camera)
        prepared.light_up(camera, lights)
        background = self._background(prepared, camera, lights, view)
        picture = background.bright.copy()
        self._draw_moving(prepared, camera, lights, background, picture)
        return picture

    def _background(self, scene: _Prepared, camera: arrays.Camera, lights: arrays.Lights, view: View) -> _Background:
        poses = scene.poses[scene.background]
        key = (id(scene), view, *(a.tobytes() for a in (poses, camera.rotation, camera.position, lights.towards)))
        if key not in self._backgrounds:
            self._backgrounds[key] = self._draw_background(scene, camera, lights, view)
            while len(self._backgrounds) > _BACKGROUNDS_KEPT:
                self._backgrounds.popitem(last=False)
        self._backgrounds.move_to_end(key)
        return self._backgrounds[key]

    def _draw_background(
        self, scene: _Prepared, camera: arrays.Camera, lights: arrays.Lights, view: View
    ) -> _Background:
        samples, drawables = self.samples, scene.background
        rows, columns = view.height * samples, view.width * samples
        nearest, triangle = np.zeros((rows, columns), np.float32), np.full((rows, columns), arrays.NOTHING, np.int32)
        bright = np.zeros((view.height, view.width, 3), np.uint8)
        if scene.sky >= 0:
            shading.draw_sky(scene.textures, scene.sky, camera, bright)
        dark, light_places = bright.copy(), np.zeros((view.height, view.width, 3), np.float32)
        shadows = scene.shadow_map(drawables, lights)
        raster.project(scene.geometry, drawables, scene.poses, camera, samples, scene.workspace)
        self._find_visible(scene, drawables, camera, (0, 0, columns, rows), nearest, triangle)
        shading.resolve_background(
            samples, triangle, *scene.colouring(lights), camera, shadows, bright, dark, light_places
        )
        return _Background(bright, dark, nearest, light_places, shadows)

    def _draw_moving(
        self,
        scene: _Prepared,
        camera: arrays.Camera,
        lights: arrays.Lights,
        background: _Background,
        picture: npt.NDArray[np.uint8],
    ) -> None:
        samples = self.samples
        shadows = scene.shadow_map(scene.casting, lights)
        shading.darken(background.light_places, shadows, background.dark, picture)
        nearest, triangle = self._buffer(*background.nearest.shape)
        everything = np.concatenate([scene.moving, scene.transparent])
        window = raster.project(scene.geometry, everything, scene.poses, camera, samples, scene.workspace)
        window, pixels = _clipped(window, picture.shape, samples)
        raster.restore(window, background.nearest, nearest, triangle)
        colouring = scene.colouring(lights)
        self._find_visible(scene, scene.moving, camera, window, nearest, triangle)
        shading.resolve(pixels, samples, triangle, *colouring, camera, shadows, background.shadows, picture)
        if not self._complete:  # what is compiled with the first picture includes what that one has no use for
            shading.blend((0, 0, 0, 0), samples, triangle, np.float32(1), *colouring, camera, picture)
            self._complete = True
        distance = np.linalg.norm(scene.poses[scene.transparent, 9:] - camera.position, axis=1)
        layers = []
        for d in scene.transparent[np.argsort(distance, kind="stable")]:
            seen = np.full_like(triangle, arrays.NOTHING)
            self._find_visible(scene, np.array([d], np.int32), camera, window, nearest.copy(), seen)
            layers.append((scene.materials.rgba[d, 3], seen))
        # MuJoCo draws what is transparent twice, from front to back and from back to front.
        for alpha, seen in layers + layers[::-1]:
            shading.blend(pixels, samples, seen, alpha, *colouring, camera, picture)

    def _find_visible(
        self,
        scene: _Prepared,
        drawables: npt.NDArray[np.int32],
        camera: arrays.Camera,
        window: tuple[int, int, int, int],
        nearest: npt.NDArray[np.float32],
        triangle: npt.NDArray[np.int32],
    ) -> None:
        """Update what the samples of a window see by drawables that have been projected."""
        fx, fy, ox, oy = camera.focal_x, camera.focal_y, camera.centre_x, camera.centre_y
        focal = tuple(self.samples * value for value in (fx, fy, ox, oy))
        facing = float(np.sign(fx * fy))  # a triangle's front, counter-clockwise, on a screen whose rows run downwards
        raster.rasterise(
            scene.geometry, drawables, scene.workspace, facing, camera.near, window, focal, self._stagger, nearest,
            triangle,
        )  # fmt: skip

    def _buffer(self, rows: int, columns: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        if (rows, columns) not in self._buffers:
            depths = np.zeros((rows, columns), np.float32)
            self._buffers[rows, columns] = (depths, np.full((rows, columns), arrays.NOTHING, np.int32))
        return self._buffers[rows, columns]


class _Prepared:
    """A model's drawables, ready for the inner loops, fine enough for a size of pixel in metres."""

    def __init__(self, model: mujoco.MjModel, background: frozenset[int], pixel: float) -> None:
        _check_lights(model)
        self.model = model
        self._texel = _TEXEL * pixel
        self.drawables = _drawables(model, _CELL * pixel)
        self.geometry = _geometry(self.drawables)
        self.textures = _textures(model)
        skies = [i for i in range(model.ntex) if model.tex_type[i] == mujoco.mjtTexture.mjTEXTURE_SKYBOX]
        self.sky = skies[0] if skies else -1
        self.materials = arrays.Materials(
            np.array([d.rgba for d in self.drawables], np.float32),
            np.array([(*d.gloss, _FAINTEST ** (2 / max(d.gloss[2], 1e-3))) for d in self.drawables], np.float32),
            np.array([d.texture for d in self.drawables], np.int32),
            np.array([d.mapping for d in self.drawables], np.float32),
        )
        still = np.array([not d.is_site and d.body in background for d in self.drawables])
        opaque = self.materials.rgba[:, 3] >= _OPAQUE
        bounded = np.array([not d.unbounded for d in self.drawables])
        self.background = np.flatnonzero(still & opaque).astype(np.int32)
        self.moving = np.flatnonzero(~still & opaque).astype(np.int32)
        self.transparent = np.flatnonzero(~opaque).astype(np.int32)
        self.casting = np.flatnonzero(~(still & opaque)).astype(np.int32)
        self._bounded = set(np.flatnonzero(bounded).tolist())
        self._geoms = np.array([d.index for d in self.drawables if not d.is_site], dtype=np.int64)
        self._sites = np.array([d.index for d in self.drawables if d.is_site], dtype=np.int64)
        self.poses = np.zeros((len(self.drawables), 12), np.float32)
        self._eyes = np.zeros((len(self.drawables), 3), np.float32)
        self._towards = np.zeros((len(self.drawables), 0, 3), np.float32)
        vertices, corners = len(self.geometry.x), len(self.geometry.normals)
        triangles = len(self.geometry.triangles)
        self.workspace = arrays.Workspace._make(
            [
                *np.zeros((9, vertices), np.float32),
                np.zeros((corners, 6), np.float32),
                np.full(corners, -1, np.int64),
                np.empty((triangles, 3, 16), np.float32),
                np.full(triangles, -1, np.int64),
            ]
        )
        self._frame = 0

    def place(self, data: mujoco.MjData) -> None:
        """Take poses from the simulation.

        :raises ValueError: if one is not finite.
        """
        count = len(self._geoms)
        self.poses[:count, :9], self.poses[:count, 9:] = data.geom_xmat[self._geoms], data.geom_xpos[self._geoms]
        self.poses[count:, :9], self.poses[count:, 9:] = data.site_xmat[self._sites], data.site_xpos[self._sites]
        if not np.isfinite(self.poses).all():
            raise ValueError("The simulation's poses are not finite: it has diverged, or mj_forward has not run")

    def lights(self, data: mujoco.MjData, camera: arrays.Camera) -> arrays.Lights:
        """The model's lights and the camera's own, those without shadows first."""
        model, head = self.model, self.model.vis.headlight
        found = []
        if head.active:
            found.append((0, -camera.rotation[2], head.ambient, head.diffuse, head.specular))
        for i in range(model.nlight):
            if model.light_active[i]:
                colours = model.light_ambient[i], model.light_diffuse[i], model.light_specular[i]
                found.append((int(model.light_castshadow[i]), -data.light_xdir[i], *colours))
        found.sort(key=lambda light: light[0])
        columns = [np.array([light[k] for light in found], np.float32).reshape(-1, 3) for k in range(1, 5)]
        towards, ambient, diffuse, specular = columns
        unshadowed = sum(1 for light in found if not light[0])
        return arrays.Lights(towards, ambient, diffuse, specular, unshadowed)

    def light_up(self, camera: arrays.Camera, lights: arrays.Lights) -> None:
        """Prepare the lighting of a frame."""
        if self._towards.shape[1] != len(lights.towards):
            self._towards = np.zeros((len(self.drawables), len(lights.towards), 3), np.float32)
        everything = np.arange(len(self.drawables), dtype=np.int32)
        shading.prepare_lighting(everything, self.poses, camera, lights, self._eyes, self._towards)
        self._frame += 1

    def colouring(self, lights: arrays.Lights) -> tuple[Any, ...]:
        """What the inner loops want to know to compute colours."""
        return (
            self._frame, self.geometry, self.materials, self.textures, lights, self._eyes, self._towards,
            self.workspace,
        )  # fmt: skip

    def shadow_map(self, drawables: npt.NDArray[np.int32], lights: arrays.Lights) -> arrays.ShadowMap:
        """What the light that casts shadows meets of these drawables, whose places in its space are computed, too."""
        if lights.unshadowed == len(lights.towards):
            return arrays.ShadowMap(np.zeros((0, 0), np.float32), 0, 0, 0.0)
        axes = _light_axes(-lights.towards[lights.unshadowed])
        casting = np.array([d for d in drawables if d in self._bounded], np.int32)
        if len(casting) < len(drawables):
            raster.project_to_light(self.geometry, drawables, self.poses, axes, self._texel, self.workspace)
        left, top, right, bottom = raster.project_to_light(
            self.geometry, casting, self.poses, axes, self._texel, self.workspace
        )
        depth = np.full((bottom - top, right - left), np.inf, np.float32)
        raster.rasterise_shadow(self.geometry, casting, self.workspace, left, top, _SLOPE_TEXELS, depth)
        return arrays.ShadowMap(depth, left, top, _SLACK * self._texel)


def _check_lights(model: mujoco.MjModel) -> None:
    """Refuse what would be drawn wrongly."""
    # A light has a type since MuJoCo 3.3.2, of which 1 is directional, before that a flag.
    directional = model.light_type == 1 if hasattr(model, "light_type") else model.light_directional != 0
    active = model.light_active != 0
    if not directional[active].all() or model.light_castshadow[active].sum() > 1:
        raise ValueError(
            "The software renderer knows directional lights, one of them with shadows; use renderer='egl' or 'osmesa'"
        )


def _pixel_size(model: mujoco.MjModel, camera: int, view: View) -> float:
    """Side of a pixel where it is least, metres; few different ones, so that views share what is prepared."""
    distance = _STANDING_DISTANCE if model.cam_bodyid[camera] == 0 else _CARRIED_DISTANCE
    pixel = 2 * np.tan(np.radians(model.cam_fovy[camera]) / 2) * distance * view.crop[2] / view.height
    return round(float(2.0 ** np.floor(np.log2(pixel))), 6)


def _camera(model: mujoco.MjModel, data: mujoco.MjData, camera: int, view: View) -> arrays.Camera:
    top, left, height, width = view.crop
    rows, columns = view.height / height, view.width / width
    focal = rows / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    axes = data.cam_xmat[camera].reshape(3, 3)
    sign = -1.0 if view.rotated else 1.0
    return arrays.Camera(
        rotation=np.stack([axes[:, 0], axes[:, 1], -axes[:, 2]]).astype(np.float32),
        position=data.cam_xpos[camera].astype(np.float32),
        focal_x=sign * focal,
        focal_y=-sign * focal,
        centre_x=columns * (0.5 - left),
        centre_y=rows * (0.5 - top),
        near=model.vis.map.znear * model.stat.extent,
    )


def _clipped(
    window: tuple[int, int, int, int], shape: tuple[int, ...], samples: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """A window of samples inside the picture, widened to whole pixels, and those pixels."""
    left, top, right, bottom = window
    pixels = (
        max(0, left // samples),
        max(0, top // samples),
        min(shape[1], -(-right // samples)),
        min(shape[0], -(-bottom // samples)),
    )
    return tuple(samples * edge for edge in pixels), pixels  # type: ignore[return-value]


def _light_axes(direction: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    along = unit(direction.astype(np.float64))
    across = unit(np.cross(along, [0.0, 0.0, 1.0] if abs(along[2]) < 0.9 else [1.0, 0.0, 0.0]))
    return np.stack([across, np.cross(along, across), along]).astype(np.float32)


def _drawables(model: mujoco.MjModel, cell: float) -> list[_Drawable]:
    """All visible geoms, then all visible sites; meshes with vertices no nearer to each other than a cell, metres."""
    found = []
    for prefix, count in (("geom", model.ngeom), ("site", model.nsite)):
        groups, kinds, sizes, colours, materials, bodies = (
            getattr(model, f"{prefix}_{field}") for field in ("group", "type", "size", "rgba", "matid", "bodyid")
        )
        for i in range(count):
            material = int(materials[i])
            rgba, gloss = _look(model, colours[i], material)
            if groups[i] >= _GROUPS or rgba[3] == 0:
                continue
            kind, size = mujoco.mjtGeom(kinds[i]), np.asarray(sizes[i], dtype=np.float64)
            mesh = int(model.geom_dataid[i]) if prefix == "geom" else -1
            shape, scale = _shape(model, kind, size, mesh, cell)
            texture = _texture(model, material)
            # A plane and a mesh have their size already; other shapes are scaled to it.
            sized = kind in (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_MESH)
            mapping = _mapping(model, texture, material, size, sized) if texture >= 0 else (0.0,) * 6
            unbounded = kind == mujoco.mjtGeom.mjGEOM_PLANE
            found.append(
                _Drawable(shape, scale, prefix == "site", i, int(bodies[i]), rgba, gloss, texture, mapping, unbounded)
            )
    return found


def _look(
    model: mujoco.MjModel, rgba: npt.NDArray[Any], material: int
) -> tuple[npt.NDArray[np.float32], tuple[float, float, float]]:
    """Colour, and emission, specular reflection and exponent of the highlight; a material colours what has none."""
    if material < 0:
        return rgba.astype(np.float32), (0.0, 0.5, 128 * 0.5)
    if np.array_equal(rgba, _NO_COLOUR):
        rgba = model.mat_rgba[material]
    shininess = 128.0 * float(model.mat_shininess[material])
    gloss = float(model.mat_emission[material]), float(model.mat_specular[material]), shininess
    return rgba.astype(np.float32), gloss


def _shape(
    model: mujoco.MjModel, kind: mujoco.mjtGeom, size: npt.NDArray[np.float64], mesh: int, cell: float
) -> tuple[Shape, npt.NDArray[np.float64]]:
    """An object's shape and what it is to be scaled by."""
    kinds, quality = mujoco.mjtGeom, model.vis.quality
    slices, stacks, one = int(quality.numslices), int(quality.numstacks), np.ones(3)
    if kind == kinds.mjGEOM_PLANE:
        return plane_shape(size[0], size[1], size[2], model.vis.map.zfar * model.stat.extent), one
    if kind == kinds.mjGEOM_SPHERE:
        return sphere_shape(slices, stacks), size[[0, 0, 0]]
    if kind == kinds.mjGEOM_ELLIPSOID:
        return sphere_shape(slices, stacks), size
    if kind == kinds.mjGEOM_CYLINDER:
        return cylinder_shape(slices, stacks), size[[0, 0, 1]]
    if kind == kinds.mjGEOM_CAPSULE:
        return capsule_shape(size[0], size[1], slices, stacks), one
    if kind == kinds.mjGEOM_BOX:
        return box_shape(int(quality.numquads)), size
    if kind == kinds.mjGEOM_MESH:
        return _coarse_mesh(model, mesh, cell), one
    name = kind.name.removeprefix("mjGEOM_").lower()
    raise ValueError(f"The software renderer cannot draw a {name}; use renderer='egl' or 'osmesa'")


# A robot's meshes are the same in all scenes.
_coarse_meshes: dict[tuple[bytes, float], Shape] = {}


def _coarse_mesh(model: mujoco.MjModel, mesh: int, cell: float) -> Shape:
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
    digest = hashlib.blake2b(model.mesh_vert[vertices].tobytes(), digest_size=16)
    digest.update(model.mesh_face[faces].tobytes())
    key = digest.digest(), cell
    if key not in _coarse_meshes:
        _coarse_meshes[key] = coarsened(mesh_shape(model, mesh), cell)
    return _coarse_meshes[key]


def _texture(model: mujoco.MjModel, material: int) -> int:
    """The texture that colours a material, or -1."""
    if material < 0:
        return -1
    # Since MuJoCo 3.2 a material has a texture for each role; the second is its colour.
    textures = np.atleast_1d(model.mat_texid[material])
    return int(textures[1] if len(textures) > 1 else textures[0])


def _mapping(
    model: mujoco.MjModel, texture: int, material: int, size: npt.NDArray[np.float64], sized: bool
) -> tuple[float, ...]:
    """How places become texture coordinates; see :class:`mw_envs.rendering.arrays.Materials`."""
    uniform = bool(model.mat_texuniform[material])
    if model.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D:
        x, y, z = size if uniform else (1.0, 1.0, 1.0)
        return 1.0, x, 0.0, y, 0.0, z
    scale = model.mat_texrepeat[material].astype(np.float64)
    for k in range(2):
        if size[k] > 0:
            scale[k] *= (size[k] if uniform else 1.0) / (size[k] if sized else 1.0)
    return 0.0, 0.5 * scale[0], -0.5, -0.5 * scale[1], -0.5, 0.0


def _geometry(drawables: list[_Drawable]) -> arrays.Geometry:
    places, normals, triangles, corners, owners, texture_places = [], [], [], [], [], []
    first_vertex, first_triangle, first_corner = [0], [0], 0
    for number, drawable in enumerate(drawables):
        shape = drawable.shape
        places.append(shape.places * drawable.scale)
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
            np.concatenate(triangles).astype(np.int32),
            np.concatenate(corners).astype(np.int32),
            np.concatenate(owners).astype(np.int32),
            np.concatenate(normals).astype(np.float32),
            np.concatenate(texture_places).astype(np.float32),
            np.array(first_vertex, np.int32),
            np.array(first_triangle, np.int32),
        ]
    )


def _textures(model: mujoco.MjModel) -> arrays.Textures:
    """All textures with their reductions."""
    pixels: list[npt.NDArray[np.uint8]] = [np.zeros((1, 3), np.uint8)]
    levels = np.zeros((max(model.ntex, 1), 16, 4), np.int32)
    first = 1
    for texture in range(model.ntex):
        width, height, channels = model.tex_width[texture], model.tex_height[texture], model.tex_nchannel[texture]
        start = model.tex_adr[texture]
        picture = model.tex_data[start : start + width * height * channels].reshape(height, width, channels)[..., :3]
        faces = 1
        if model.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D and height != width:
            faces = 6
        level = picture.reshape(faces, height // faces, width, 3).astype(np.float32)
        for number in range(levels.shape[1]):
            levels[texture, number] = first, level.shape[2], level.shape[1], faces
            pixels.append(np.floor(level + 0.5).astype(np.uint8).reshape(-1, 3))
            first += len(pixels[-1])
            if level.shape[1] == level.shape[2] == 1:
                break
            level = _halved(_halved(level, 2), 1)
    return arrays.Textures(np.concatenate(pixels), levels)


def _halved(pictures: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Pictures with half the pixels along an axis, each the linear interpolation at its centre, halves rounded up."""
    size = pictures.shape[axis]
    if size == 1:
        return pictures
    half = size // 2
    centre = (np.arange(half) + 0.5) * size / half - 0.5
    low = np.floor(centre).astype(int)
    weight = (centre - low).reshape([-1 if k == axis else 1 for k in range(4)]).astype(np.float32)
    upper = np.minimum(low + 1, size - 1)
    return np.floor(pictures.take(low, axis) * (1 - weight) + pictures.take(upper, axis) * weight + 0.5)
