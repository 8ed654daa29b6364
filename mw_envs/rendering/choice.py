"""The choice of a renderer, and one of each kind per process."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from mw_envs.errors import InputError
from mw_envs.rendering.view import Renderer, RendererUnavailableError, Scene, View, explained_mujoco_import
from mw_envs.tasks import did_you_mean

RENDERERS = ("auto", "software", "egl", "osmesa")
_renderers: dict[tuple[int, str], Renderer] = {}


def get_renderer(kind: str = "auto") -> Renderer:
    """This process's renderer of a kind, created on the first call; threads may draw with it at once.

    :param kind: ``software`` needs nothing but the processor, and is what ``auto`` means; ``egl`` and ``osmesa`` are
        MuJoCo's own renderer.
    :raises ValueError: for an unknown kind.
    :raises RendererUnavailableError: if the library is missing.
    """
    if kind not in RENDERERS:
        raise InputError(f"Unknown renderer {kind!r}; {did_you_mean(kind, RENDERERS)}")
    key = (os.getpid(), kind)  # a forked worker must not use its parent's OpenGL context
    return _renderers.get(key) or _renderers.setdefault(key, _create(kind))


def renderer_available(kind: str = "auto") -> bool:
    """Whether :func:`get_renderer` would give a renderer of this kind."""
    try:
        get_renderer(kind)
    except RendererUnavailableError:
        return False
    return True


def _create(kind: str) -> Renderer:
    if kind == "auto":
        return get_renderer("software")
    with explained_mujoco_import():
        import mujoco  # noqa: F401
    if kind == "software":
        from mw_envs.rendering.software.compiling import CompiledOnce
        from mw_envs.rendering.software.renderer import SoftwareRenderer
        from mw_envs.rendering.software.warming import compile_apart

        return CompiledOnce(SoftwareRenderer(), compile_apart)
    return _OneAThread(kind)


class _OneAThread(threading.local):
    """An OpenGL renderer for each thread, because a context serves one thread at a time."""

    def __init__(self, platform: str) -> None:
        from mw_envs.rendering.opengl import OpenGLRenderer

        self._renderer = OpenGLRenderer(platform)

    def render(self, model: Any, data: Any, view: View, scene: Scene) -> npt.NDArray[np.uint8]:
        """Draw a view; see :meth:`mw_envs.rendering.Renderer.render`."""
        return self._renderer.render(model, data, view, scene)
