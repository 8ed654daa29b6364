"""Compiling the software renderer's inner loops in a process of its own, so that all that draw run the same code.

A function that was just compiled calls the copies of others that were compiled for themselves; read back from disk, it
calls the copies in its own file. Both compute the same up to rounding, which at an edge decides a pixel. So the process
that compiles draws nothing that anybody sees.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from mw_envs.rendering.software import frame, shading, textures

#: what Python calls; the rest is compiled with these
_ENTRIES = (
    frame.light_window,
    frame.cast_shadows,
    frame.draw_still,
    frame.show_background,
    frame.draw_moving,
    shading.prepare_lighting,
    textures.draw_sky,
)
# Something of everything, for the types of all arrays are the same in every scene.
_SCENE = """
<mujoco>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0 0 1" rgb2="1 1 1" width="16" height="16"/>
    <texture name="squares" type="2d" builtin="checker" rgb1="0 0 0" rgb2="1 1 1" width="16" height="16"/>
    <material name="squares" texture="squares"/>
  </asset>
  <worldbody>
    <camera name="down" pos="0 0 2"/>
    <light directional="true" pos="0 0 3" dir="1 0 -1"/>
    <geom type="plane" size="2 2 .1" material="squares"/>
    <geom type="box" size=".1 .1 .1" pos="-.5 0 .1"/>
    <body pos="0 .5 .5"><geom type="box" size=".1 .1 .1"/></body>
    <body pos="0 0 .5"><freejoint/><geom type="sphere" size=".1"/></body>
    <body pos=".3 0 .5"><geom type="box" size=".1 .1 .1" rgba="1 0 0 .5"/></body>
  </worldbody>
</mujoco>
"""


def compiled_before() -> bool:
    """Whether all is on disk, so that the next first picture takes a second."""
    return all(_on_disk(entry) for entry in _ENTRIES)


def cache_folder() -> str | None:
    """Where the machine code is kept; None if it is not."""
    return _ENTRIES[0]._cache.cache_path  # type: ignore[no-any-return]


def compile_apart() -> None:
    """Compile in another process what is not on disk yet; where that fails, the caller's first picture does it."""
    if compiled_before():
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        subprocess.run(
            [sys.executable, "-m", "mw_envs.rendering.software.warming"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except OSError:
        pass


def _on_disk(entry: Any) -> bool:
    """Whether numba would read a function from disk.

    It does not say so otherwise, and if it kept its files in another way we would take them to be there.
    """
    try:
        return bool(entry._cache._cache_file._load_index())
    except Exception:
        return True


def _draw_something() -> None:
    import mujoco

    from mw_envs.rendering.software.renderer import SoftwareRenderer
    from mw_envs.rendering.view import Scene, View

    model = mujoco.MjModel.from_xml_string(_SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    SoftwareRenderer().render(model, data, View("down", 32, 32), Scene("something", frozenset({0})))


if __name__ == "__main__":
    _draw_something()
