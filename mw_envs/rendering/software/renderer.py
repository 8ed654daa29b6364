"""A software renderer that draws what MuJoCo's own renderer draws, without OpenGL.

It reads a compiled model and its data. The background, which never moves, is drawn once for each view and kept with
its depths, once in the light and once in the shadow of what moves. Over it comes what a trial places and the simulation
leaves there, drawn once for each trial and kept in the same way; a frame draws the moving triangles over that. So a
picture depends on the model, its data and the view, and not on what was drawn before.
Facts about MuJoCo's renderer (lighting by OpenGL's fixed functions at vertices, multisampling, shadow and texture
mapping, the order of passes) are those of its classic OpenGL renderer at default quality.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, replace
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from mw_envs.errors import InputError
from mw_envs.rendering.software import arrays, frame, shading
from mw_envs.rendering.software.geometry import unit
from mw_envs.rendering.software.prepared import Prepared, is_fixed
from mw_envs.rendering.software.still_pictures import PICTURES, Still, Stills
from mw_envs.rendering.software.textures import TexturePool, draw_sky
from mw_envs.rendering.view import Scene, View
from mw_envs.tasks import did_you_mean

# Distance at which the side of a pixel is measured: the robot seen from a camera that stands beside the table, and the
# gripper seen from one that it carries, meters.
_STANDING_DISTANCE, _CARRIED_DISTANCE = 1.0, 0.1
# Kept of backgrounds, of which there are few, and of what trials have placed; each view and environment needs one of
# these, 10 MB at 480x480 pixels, and those of earlier trials stay until the room is used.
_BACKGROUND_BYTES, _SETTING_BYTES = 128 * 2**20, 256 * 2**20


@dataclass(frozen=True)
class _Shot:
    """A moment of a scene as a camera sees it.

    :param standing: whether the camera is where a trial has put it; for one that moves, nothing is worth keeping.
    :param poses: see :meth:`Prepared.poses`.
    """

    scene: Prepared
    view: View
    standing: bool
    camera: arrays.Camera
    poses: npt.NDArray[np.float32]
    look: arrays.Look


class _Scratch(threading.local):
    """What a frame is drawn in; each thread has its own."""

    def __init__(self) -> None:
        self.canvases: dict[tuple[int, int], tuple[Still, arrays.Canvas]] = {}
        self.workspace = _workspace(0, 0, 0)
        self.frame = 0


class SoftwareRenderer:
    """Draws on the processor; see :class:`mw_envs.rendering.Renderer`.

    Several threads may draw at once, each from data of its own. They share what is prepared and kept.
    """

    def __init__(self) -> None:
        self._scenes: dict[tuple[Scene, float], Prepared] = {}
        self._textures = TexturePool()
        self._preparing = threading.Lock()  # of scenes and their textures
        self._backgrounds = Stills(_BACKGROUND_BYTES)
        self._settings = Stills(_SETTING_BYTES)  # backgrounds with what a trial has placed
        self._scratch = _Scratch()

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
            raise InputError(f"Unknown camera {view.camera!r}; {did_you_mean(view.camera, known)}")
        camera = _camera(model, data, number, view)
        pixel = _pixel_size(model, number, view)
        prepared = self._scenes.get((scene, pixel)) or self._prepare(model, scene, pixel)
        poses = prepared.poses(data)
        look = self._look(prepared, prepared.lights(data, camera), camera, poses)
        standing = is_fixed(model, int(model.cam_bodyid[number]))
        shot = _Shot(prepared, view, standing, camera, poses, look)
        still = self._still(shot)
        moving, casting = prepared.moving, prepared.casting
        if not standing:
            moving, casting = prepared.moving_or_fixed, prepared.moving_or_fixed_casting
        look, window = self._to_light(shot, casting)
        background, canvas = still.background, self._canvas(still)
        transparent = prepared.transparent
        if len(transparent) > 1:
            distance = np.linalg.norm(poses[transparent, 9:] - camera.position, axis=1)
            transparent = transparent[np.argsort(distance, kind="stable")]
        top, left, height, width = view.drawn
        part = left, top, left + width, top + height
        picture = np.empty_like(background.bright)
        frame.draw_moving(
            look, camera, poses, moving, transparent, casting, window, pixel, background, canvas, part, picture
        )  # fmt: skip
        return picture if view.part is None else picture[top : top + height, left : left + width].copy()

    def _prepare(self, model: mujoco.MjModel, scene: Scene, pixel: float) -> Prepared:
        with self._preparing:
            if (scene, pixel) not in self._scenes:  # another thread may have been quicker
                self._scenes[scene, pixel] = Prepared(model, scene.background, pixel, self._textures)
            return self._scenes[scene, pixel]

    def _look(
        self, scene: Prepared, lights: arrays.Lights, camera: arrays.Camera, poses: npt.NDArray[np.float32]
    ) -> arrays.Look:
        """What colors are computed from."""
        geometry, scratch = scene.geometry, self._scratch
        space = scratch.workspace
        wanted = len(geometry.x), len(geometry.normals), len(geometry.triangles)
        there = len(space.camera), len(space.corners), len(space.planes)
        if any(w > t for w, t in zip(wanted, there, strict=True)):
            scratch.workspace = space = _workspace(*map(max, wanted, there))
        eyes = np.empty((len(poses), 3), np.float32)
        towards = np.empty((len(poses), len(lights.towards), 3), np.float32)
        to_light = np.zeros((len(poses), 12), np.float32)
        texel = frame.TEXEL * scene.pixel
        shading.prepare_lighting(poses, camera, lights, _light_axes(lights), texel, eyes, towards, to_light)
        textures = self._textures.arrays
        return arrays.Look(
            scratch.frame, geometry, scene.casters, scene.materials, textures, lights, space, eyes, towards, to_light
        )

    def _to_light(self, shot: _Shot, casting: npt.NDArray[np.int32]) -> tuple[arrays.Look, tuple[int, int, int, int]]:
        """Project drawables to the light's plane; a new frame's look, with room for their shadows, and their window."""
        look, scratch = shot.look, self._scratch
        window = frame.light_window(look, casting)
        wanted = frame.texels(window)
        if wanted > len(scratch.workspace.shadows):
            scratch.workspace = scratch.workspace._replace(shadows=np.empty(wanted + wanted // 4, np.float32))
        scratch.frame += 1
        return look._replace(frame=scratch.frame, workspace=scratch.workspace), window

    def _still(self, shot: _Shot) -> Still:
        """What does not move in a view, drawn if it is not there yet; scenes that look alike share it."""
        scene = shot.scene
        # Models differ a little in their near plane. Where nothing is so near, they share a background.
        near = 2.0 ** np.floor(np.log2(shot.camera.near))
        key, base = self._base(replace(shot, camera=shot.camera._replace(near=near)))
        if base.nearest <= 2 * near:
            key, base = self._base(shot)
        if not shot.standing or len(scene.fixed) == 0:
            return base
        placed = key, shot.camera.near, scene.fixed_digest, _hashable(shot.poses[scene.fixed])
        setting = self._settings.get(placed)
        if setting is None:
            setting, _ = self._settings.put(placed, self._drawn(shot, base, fixed=True))
        return setting

    def _base(self, shot: _Shot) -> tuple[Any, Still]:
        """The background in a view, and what it is known by."""
        scene = shot.scene
        seen_from = *shot.camera, *shot.look.lights, shot.poses[scene.background]
        key = scene.background_digest, shot.view.height, shot.view.width, *map(_hashable, seen_from)
        base = self._backgrounds.get(key)
        if base is None:
            base, gone = self._backgrounds.put(key, self._drawn(shot, _blank(shot), fixed=False))
            for forgotten in gone:
                self._settings.forget(forgotten.background)
        return key, base

    def _drawn(self, shot: _Shot, over: Still, fixed: bool) -> Still:
        """What never moves, drawn over the sky, or what a trial places, drawn over that."""
        scene = shot.scene
        drawables, casting = (
            (scene.fixed, scene.fixed_casting) if fixed else (scene.background, scene.background_casting)
        )
        look, window = self._to_light(shot, casting)
        shadows = frame.cast_shadows(look, casting, window, scene.pixel)
        shadows = shadows._replace(depth=shadows.depth.copy())
        pictures = {name: getattr(over.background, name).copy() for name in PICTURES}
        background = over.background._replace(**pictures, shadows=_both(shadows, over.background.shadows))
        canvas, changed = self._taken_canvas(over), _no_spans(shot.view.height)
        frame.draw_still(
            look, shot.camera, shot.poses, drawables, shadows, background, canvas.seen, canvas.spans, changed
        )
        still = Still(background, over.base, changed) if fixed else Still(background, background, over.spans)
        self._scratch.canvases[shot.view.height, shot.view.width] = still, canvas
        return still

    def _canvas(self, still: Still) -> arrays.Canvas:
        """Samples of a view's size that hold a background."""
        canvas = self._taken_canvas(still)
        rows, columns = still.background.light_d.shape
        self._scratch.canvases[rows, columns] = still, canvas
        return canvas

    def _taken_canvas(self, still: Still) -> arrays.Canvas:
        """The same; it is to be put back, so that what an interrupt leaves of it is not taken for a background."""
        rows, columns = still.background.light_d.shape
        before, canvas = self._scratch.canvases.pop((rows, columns), (None, None))
        if canvas is None:
            seen, layer = frame.samples(rows, columns), frame.samples(rows, columns)
            canvas = arrays.Canvas(seen, _no_spans(rows), layer, _no_spans(rows))
        if before is not still:
            if before is not None and before.base is still.base:
                different = before.spans.copy()
                np.minimum(before.spans[:, 0], still.spans[:, 0], out=different[:, 0])
                np.maximum(before.spans[:, 1], still.spans[:, 1], out=different[:, 1])
            else:
                different = np.tile(np.array([0, columns - 1], np.int32), (rows, 1))
            frame.show_background(still.background.nearness, different, canvas.seen)
        return canvas


def _hashable(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


_NO_SHADOWS = arrays.ShadowMap(np.full((1, arrays.LANES), np.inf, np.float32), 0, 0, 0, 0.0)


def _both(one: arrays.ShadowMap, other: arrays.ShadowMap) -> arrays.ShadowMap:
    """What the light meets first of two maps."""
    maps = [shadows for shadows in (one, other) if shadows.columns > 0]
    if len(maps) < 2:
        return maps[0] if maps else one
    left, top = min(m.u0 for m in maps), min(m.v0 for m in maps)
    right, bottom = max(m.u0 + m.columns for m in maps), max(m.v0 + len(m.depth) for m in maps)
    depth = np.full((bottom - top, right - left + arrays.LANES), np.inf, np.float32)
    for m in maps:
        there = depth[m.v0 - top :, m.u0 - left :][: len(m.depth), : m.columns]
        np.minimum(there, m.depth[:, : m.columns], out=there)
    return one._replace(depth=depth, columns=right - left, u0=left, v0=top)


def _blank(shot: _Shot) -> Still:
    """The sky."""
    rows, columns = shot.view.height, shot.view.width
    bright = np.zeros((rows, columns, 3), np.uint8)
    if shot.scene.sky >= 0:
        draw_sky(shot.look.textures, shot.scene.sky, shot.camera, bright)
    nearness = frame.samples(rows, columns).nearness
    light_u, light_v = np.zeros((2, rows, columns), np.int32)
    light_d = np.full((rows, columns), shading.NO_SHADOW, np.float32)
    tiles = np.zeros((-(-rows // arrays.TILE), -(-columns // arrays.TILE), 4), np.int32)
    sky = arrays.Background(bright, bright, nearness, light_u, light_v, light_d, tiles, _NO_SHADOWS)
    return Still(sky, sky, _no_spans(rows))


def _no_spans(rows: int) -> npt.NDArray[np.int32]:
    return np.tile(np.array([frame.UNLIMITED, -1], np.int32), (rows, 1))


def _workspace(vertices: int, corners: int, triangles: int) -> arrays.Workspace:
    return arrays.Workspace._make(
        [
            *np.empty((3, vertices, 4), np.float32),
            np.empty(triangles + 1, np.int32),
            np.zeros((corners, arrays.QUANTITIES), np.float32),
            np.zeros(corners, np.int64),
            np.zeros(triangles, np.int64),
            np.empty(triangles + 1, np.int32),
            np.empty((triangles, 4, arrays.QUANTITIES), np.float32),
            *np.empty((3, corners + 1), np.int32),
            np.empty(0, np.float32),
        ]
    )


def _pixel_size(model: mujoco.MjModel, camera: int, view: View) -> float:
    """Side of a pixel where it is least, meters; few different ones, so that views share what is prepared."""
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
        center_x=columns * (0.5 - left),
        center_y=rows * (0.5 - top),
        near=model.vis.map.znear * model.stat.extent,
    )


def _light_axes(lights: arrays.Lights) -> npt.NDArray[np.float32]:
    """Two directions across the light that casts shadows and the one along it, float32 (3, 3), or empty."""
    if lights.unshadowed == len(lights.towards):
        return np.empty((0, 3), np.float32)
    return _axes_along(lights.towards[lights.unshadowed].tobytes())


@functools.lru_cache
def _axes_along(towards: bytes) -> npt.NDArray[np.float32]:
    along = unit(-np.frombuffer(towards, np.float32).astype(np.float64))
    across = unit(np.cross(along, [0.0, 0.0, 1.0] if abs(along[2]) < 0.9 else [1.0, 0.0, 0.0]))
    return np.stack([across, np.cross(along, across), along]).astype(np.float32)
