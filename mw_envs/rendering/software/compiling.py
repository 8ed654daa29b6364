"""The first picture of a process, for which the software renderer's inner loops are compiled or read from disk."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mw_envs.rendering.view import Renderer, Scene, View

# What was compiled before is there after a second or three.
_PATIENCE_SECONDS = 5.0
_MESSAGE = "mw_envs: the software renderer is being compiled, once on this machine; it takes about half a minute"


class CompiledOnce:
    """A renderer whose first picture in a process is drawn by one process at a time.

    So workers that start together compile once: the first one compiles and keeps the result on disk, the others wait
    and read it. Where that takes long, the one that compiles says so on the standard error.

    :param renderer: the renderer that compiles when it draws.
    :param prepare: called before that picture.
    """

    def __init__(self, renderer: Renderer, prepare: Callable[[], None] = lambda: None) -> None:
        self._renderer = renderer
        self._prepare = prepare
        self._compiled = False

    def render(self, model: Any, data: Any, view: View, scene: Scene) -> npt.NDArray[np.uint8]:
        """Draw a view; see :meth:`mw_envs.rendering.Renderer.render`."""
        if self._compiled:
            return self._renderer.render(model, data, view, scene)
        with _alone():
            timer = threading.Timer(_PATIENCE_SECONDS, print, (_MESSAGE,), {"file": sys.stderr, "flush": True})
            timer.daemon = True
            timer.start()
            try:
                self._prepare()
                picture = self._renderer.render(model, data, view, scene)
            finally:
                timer.cancel()
        self._compiled = True
        return picture


@contextmanager
def _alone() -> Iterator[None]:
    """Keep this user's other processes from doing the same; where files cannot be locked, go on without."""
    try:
        import fcntl

        lock = open(Path(tempfile.gettempdir()) / f"mw_envs-compiling-{os.getuid()}.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up when the file is closed, also by a process that dies
    except (ImportError, OSError):
        yield
        return
    with lock:
        yield
