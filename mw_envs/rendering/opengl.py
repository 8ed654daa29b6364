"""MuJoCo's OpenGL renderer without a window, with settings that are quick where no GPU is.

Shadows, reflections and multisampling are off: with software OpenGL they cost ten times the rest of the frame.
One OpenGL context serves a whole thread, and one upload of a scene's meshes all environments that show it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from importlib import import_module
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from mw_envs.errors import InputError
from mw_envs.rendering.software.mesh_detail import coarsen_meshes
from mw_envs.rendering.view import RendererUnavailableError, Scene, View
from mw_envs.tasks import did_you_mean

# Distance at which the cell of a coarsened mesh is smaller than a pixel, meters: the robot seen from a camera that
# stands beside the table, and the gripper seen from one that it carries.
_STANDING_DISTANCE, _CARRIED_DISTANCE = 1.0, 0.1
_MAX_GEOMS = 2000
_opening = threading.Lock()


class OpenGLRenderer:
    """Draws with MuJoCo's own OpenGL code; see :class:`mw_envs.rendering.Renderer`.

    :param platform: ``egl`` (GPU, or Mesa's software) or ``osmesa`` (software).
    :raises RendererUnavailableError: if the platform's library is missing or refuses a context.
    """

    def __init__(self, platform: str) -> None:
        # Mesa's own threads would compete with the other workers, and do not survive a fork.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        with _opening:
            self._gl = _open_context(platform)
        self._scenes: dict[tuple[str, float], mujoco.MjrContext] = {}
        self._graph: dict[str, mujoco.MjvScene] = {}
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._options = mujoco.MjvOption()
        free = weakref.finalize(self, _free, self._scenes, self._gl, threading.get_ident())  # as the thread ends
        free.atexit = False
        atexit.register(free)  # after MuJoCo's end of EGL was, so it comes before that

    def render(self, model: mujoco.MjModel, data: mujoco.MjData, view: View, scene: Scene) -> npt.NDArray[np.uint8]:
        """Draw a view; see :meth:`mw_envs.rendering.Renderer.render`.

        :raises ValueError: if the model has no camera of that name.
        """
        camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, view.camera)
        if camera < 0:
            known = [model.camera(i).name for i in range(model.ncam)]
            raise InputError(f"Unknown camera {view.camera!r}; {did_you_mean(view.camera, known)}")
        self._gl.make_current()
        context = self._context(model, camera, view, scene.name)
        if scene.name not in self._graph:
            self._graph[scene.name] = mujoco.MjvScene(model, _MAX_GEOMS)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._graph[scene.name].flags[flag] = 0
        graph = self._graph[scene.name]
        view = _of_part(view)
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(model, data, self._options, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, graph)
        _narrow_frustum(graph, view)
        rect = mujoco.MjrRect(0, 0, view.width, view.height)
        mujoco.mjr_render(rect, graph, context)
        picture = np.empty((view.height, view.width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(picture, None, rect, context)
        # OpenGL's rows run upwards, so a picture turned by 180 degrees only wants its columns reversed.
        return np.ascontiguousarray(picture[:, ::-1] if view.rotated else picture[::-1])

    def _context(self, model: mujoco.MjModel, camera: int, view: View, scene: str) -> mujoco.MjrContext:
        """The scene's meshes and textures in OpenGL, fine enough for the view, with a framebuffer large enough."""
        rows = view.height / view.crop[2]
        distance = _STANDING_DISTANCE if model.cam_bodyid[camera] == 0 else _CARRIED_DISTANCE
        pixel = 2 * np.tan(np.radians(model.cam_fovy[camera]) / 2) * distance / rows
        cell = round(float(2.0 ** np.floor(np.log2(pixel))), 6)  # few different ones, none larger than a pixel
        key = (scene, cell)
        if key not in self._scenes:
            drawn = coarsen_meshes(model, cell)
            drawn.vis.global_.offwidth, drawn.vis.global_.offheight = view.width, view.height
            drawn.vis.quality.offsamples = 0
            drawn.vis.quality.shadowsize = 0
            self._scenes[key] = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        context = self._scenes[key]
        if context.offWidth < view.width or context.offHeight < view.height:
            mujoco.mjr_resizeOffscreen(max(context.offWidth, view.width), max(context.offHeight, view.height), context)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, context)
        return context


def _free(contexts: dict[Any, mujoco.MjrContext], gl: Any, thread: int) -> None:
    if threading.get_ident() == thread:  # in a thread that outlives the process's end nothing can be freed by another
        for context in contexts.values():
            context.free()
    contexts.clear()
    gl.free()


def _open_context(platform: str) -> Any:
    """MuJoCo's OpenGL context of a platform, made current; a failure leaves the process as it was."""
    asked_for = os.environ.get("PYOPENGL_PLATFORM")
    if asked_for and asked_for.lower() != platform:
        raise RendererUnavailableError(
            f"The {platform} renderer cannot start: PYOPENGL_PLATFORM={asked_for!r}, from your environment, from "
            f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} or from a renderer that this process has already. Unset "
            f"them, or choose renderer={asked_for.lower()!r}"
        )
    loaded = set(sys.modules)
    try:
        context_class = import_module(f"mujoco.{platform}").GLContext
        context_class._context = None  # what its __del__ looks for; a failure in __init__ would print another error
        context = context_class(64, 64)
        context.make_current()
    except Exception as error:  # PyOpenGL raises whatever the missing library leads to
        # MuJoCo sets the variable, and PyOpenGL serves one platform once imported: either would stop the next attempt.
        if not asked_for:
            os.environ.pop("PYOPENGL_PLATFORM", None)
        for name in set(sys.modules) - loaded:
            if name.startswith((f"mujoco.{platform}", "OpenGL")):
                del sys.modules[name]
        raise RendererUnavailableError.of_library(platform, error) from error
    return context


def _of_part(view: View) -> View:
    """A view whose picture is that part of another's which is to be drawn."""
    top, left, height, width = view.drawn
    row, column = view.crop[2] / view.height, view.crop[3] / view.width  # of a pixel, in fractions of the camera's view
    crop = (view.crop[0] + top * row, view.crop[1] + left * column, height * row, width * column)
    return View(view.camera, height, width, crop, view.rotated)


def _narrow_frustum(graph: Any, view: View) -> None:
    """Let the camera see only the view's window, so that no pixel outside it is drawn."""
    top, left, height, width = view.crop
    if view.rotated:
        top, left = 1 - (top + height), 1 - (left + width)
    for camera in graph.camera:
        full_height = camera.frustum_top - camera.frustum_bottom
        # The window's pixels are square in the full view when the picture has the window's aspect.
        full_width = full_height * (view.width / width) / (view.height / height)
        full_top = camera.frustum_top
        camera.frustum_center += full_width * (left + width / 2 - 0.5)
        camera.frustum_width = full_width * width / 2
        camera.frustum_top = full_top - full_height * top
        camera.frustum_bottom = full_top - full_height * (top + height)
