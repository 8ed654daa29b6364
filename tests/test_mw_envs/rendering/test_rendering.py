"""Pictures: the window, the orientation and the likeness to MuJoCo's own; and what happens where OpenGL is missing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mujoco
import numpy as np
import numpy.typing as npt
import pytest

from mw_envs import TASKS, Trial
from mw_envs.env import CAMERAS, MetaWorldEnv
from mw_envs.rendering import (
    CROPS,
    RendererUnavailableError,
    View,
    get_renderer,
    renderer_available,
    resolve_crop,
)
from mw_envs.rendering.software.mesh_detail import coarsen_meshes
from mw_envs.simulation.scene import Simulator

WORKSPACE = CROPS["workspace"]
# What the workspace window does not hold: these tasks' goals, all 50 of them, lie below it and to its right by at most
# these shares of its height and width.
GOALS_OUTSIDE_THE_WORKSPACE = {"sweep-v3": (0.17, 0.06), "stick-pull-v3": (0.21, 0.0)}
FAST_TASKS = ["reach-v3", "hammer-v3", "stick-push-v3", *GOALS_OUTSIDE_THE_WORKSPACE]
EVERY_TASK = FAST_TASKS + [pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task not in FAST_TASKS]


@pytest.fixture(scope="module")
def hammer() -> Simulator:
    simulator = Simulator("hammer-v3")
    simulator.place(Trial("hammer-v3", 0, 0))
    return simulator


@pytest.fixture(params=["software", "opengl"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("opengl") if request.param == "opengl" else "software"


def draw(simulator: Simulator, view: View, kind: str) -> npt.NDArray[np.uint8]:
    return get_renderer(kind).render(simulator.model, simulator.data, view, simulator.scene)


def difference(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Mean absolute difference, 0..255."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b).mean())


def project(
    simulator: Simulator, camera: str, points: npt.ArrayLike, upside_down: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rows and columns of world points in a square full view, 0..1, by the pinhole model and the camera's matrices."""
    number = simulator.model.camera(camera).id
    axes = simulator.data.cam_xmat[number].reshape(3, 3)  # columns: right, up, backwards
    right, up, backwards = ((np.atleast_2d(points) - simulator.data.cam_xpos[number]) @ axes).T
    half = np.tan(np.radians(simulator.model.cam_fovy[number]) / 2) * -backwards
    rows, columns = (1 - up / half) / 2, (1 + right / half) / 2
    return (1 - rows, 1 - columns) if upside_down else (rows, columns)


# The window of the view


@pytest.mark.parametrize("upside_down", [True, False])
def test_a_crop_is_the_window_of_the_full_view(hammer: Simulator, upside_down: bool, kind: str) -> None:
    # Both pictures have 288 rows per full view, hence the same meshes and the same pixel grid: rows 34 to 226, columns
    # 72 to 264. What differs is rounding in the projection.
    full = draw(hammer, View("corner2", 288, 288, rotated=upside_down), kind)
    crop = draw(hammer, View("corner2", 192, 192, WORKSPACE, rotated=upside_down), kind)
    window = full[34:226, 72:264]
    assert difference(crop, window) < 0.01
    assert difference(crop[1:], window[:-1]) > 1  # the bound tells one row from the next
    assert difference(crop[:, 1:], window[:, :-1]) > 1


def test_a_window_that_is_not_square(hammer: Simulator, kind: str) -> None:
    full = draw(hammer, View("corner2", 288, 288), kind)
    crop = draw(hammer, View("corner2", 144, 108, (0.25, 0.125, 0.5, 0.375)), kind)
    assert crop.shape == (144, 108, 3)
    assert difference(crop, full[72:216, 36:144]) < 0.01


def test_a_wider_picture_shows_more_at_its_sides(hammer: Simulator, kind: str) -> None:
    square = draw(hammer, View("corner2", 96, 96), kind)
    wide = draw(hammer, View("corner2", 96, 144), kind)
    assert wide.shape == (96, 144, 3)
    assert difference(wide[:, 24:120], square) < 0.01
    tall = draw(hammer, View("corner2", 96, 64), kind)
    assert difference(tall, square[:, 16:80]) < 0.01


def test_pictures_are_new_contiguous_and_repeatable(hammer: Simulator, kind: str) -> None:
    view = View("corner2", 40, 60, WORKSPACE)
    first, second = draw(hammer, view, kind), draw(hammer, view, kind)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    assert first.flags.owndata
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, second)
    draw(hammer, View("corner2", 480, 480), kind)  # a larger framebuffer in between
    np.testing.assert_array_equal(draw(hammer, view, kind), first)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_the_workspace_holds_hand_objects_and_goal(task: str) -> None:
    top, left, height, width = WORKSPACE
    simulator = Simulator(task)
    for goal in range(0, 50, 7):
        observation = simulator.place(Trial(task, 0, goal))
        points = {"hand": observation[:3], "object": observation[4:7], "goal": observation[36:39]}
        if observation[11:18].any():
            points["second object"] = observation[11:14]
        rows, columns = project(simulator, "corner2", list(points.values()), upside_down=True)
        for name, row, column in zip(points, (rows - top) / height, (columns - left) / width, strict=True):
            if name == "goal" and task in GOALS_OUTSIDE_THE_WORKSPACE:
                below, beside = GOALS_OUTSIDE_THE_WORKSPACE[task]
                assert 1 < row < 1 + below, (goal, row)
                assert 0 < column < 1 + beside, (goal, column)
            else:
                assert 0 < row < 1, (goal, name, row)
                assert 0 < column < 1, (goal, name, column)


def test_crops() -> None:
    assert resolve_crop(None) == resolve_crop("full") == (0, 0, 1, 1)
    assert resolve_crop("workspace") == pytest.approx((17 / 144, 1 / 4, 2 / 3, 2 / 3))
    assert resolve_crop([0, 0.5, 1, 0.5]) == (0, 0.5, 1, 0.5)


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ("workplace", r"crop 'workplace'; did you mean 'workspace'\?"),
        ((0.5, 0, 0.6, 1), r"crop=\(0.5, 0, 0.6, 1\); expected \(top, left, height, width\) in fractions"),
        ((0, -0.1, 1, 1), "inside 0..1"),
        ((0, 0, 0, 1), "inside 0..1"),
        ((0, 0, 1), "inside 0..1"),
        ((0, 0, 1, float("nan")), "inside 0..1"),
        ((0, 0, 96, 96), "in fractions"),
        (0.5, "inside 0..1"),
    ],
)
def test_crops_that_make_no_sense_are_refused(crop: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_crop(crop)  # type: ignore[arg-type]


# The orientation


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera_is_upright_and_not_mirrored(camera: str, opengl: str) -> None:
    """A puck held before the camera is drawn where the geometry says; moved upwards and to the right, it goes there.

    Up is the world's; for the two cameras that look straight down it is away from the robot. Neither direction is taken
    from the camera's own axes but for where it looks. The renderer is one without shadows, which would move as well;
    the software renderer is compared with MuJoCo's pictures instead.
    """
    simulator = Simulator("reach-v3")
    simulator.place(Trial("reach-v3", 0, 0))
    model, data = simulator.model, simulator.data
    geom = model.geom("objGeom").id
    number = model.camera(camera).id
    forward = -data.cam_xmat[number].reshape(3, 3)[:, 2]
    carried = model.cam_bodyid[number] != 0
    distance, step = (0.12, 0.02) if carried else (0.35, 0.05)
    up = np.array([0.0, 1.0, 0.0] if camera in ("topview", "gripperPOV") else [0.0, 0.0, 1.0])
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    rotated = MetaWorldEnv("MT10", camera=camera)._view.rotated

    def place_in_picture(position: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        pictures = []
        for where in (position, np.array([0.0, 0.0, -50.0])):
            data.geom_xpos[geom] = where
            pictures.append(draw(simulator, View(camera, 64, 64, rotated=rotated), opengl).astype(int))
        changed = np.argwhere(np.abs(pictures[0] - pictures[1]).sum(axis=-1) > 30)
        assert len(changed) > 10
        return changed.mean(axis=0) + 0.5

    middle = data.cam_xpos[number] + distance * forward
    row, column = place_in_picture(middle)
    assert (row, column) == (pytest.approx(32, abs=1.5), pytest.approx(32, abs=1.5))
    higher_row, _ = place_in_picture(middle + step * up)
    assert higher_row < row - 3
    beside = middle + step * right
    beside_row, beside_column = place_in_picture(beside)
    assert beside_column > column + 3
    rows, columns = project(simulator, camera, beside, upside_down=rotated)
    assert (beside_row, beside_column) == (
        pytest.approx(64 * rows[0], abs=1.5),
        pytest.approx(64 * columns[0], abs=1.5),
    )


def test_an_unknown_camera_is_an_error(hammer: Simulator, kind: str) -> None:
    with pytest.raises(ValueError, match=r"camera 'corner5'; did you mean 'corner[1-4]?'\?"):
        draw(hammer, View("corner5", 32, 32), kind)


# The likeness

STOCK = """
import sys
import mujoco
import numpy as np
from mw_envs import Trial
from mw_envs.simulation.scene import Simulator

simulator = Simulator("hammer-v3")
simulator.place(Trial("hammer-v3", 0, 0))
pictures = {}
for size in (480, 96):
    with mujoco.Renderer(simulator.model, size, size) as renderer:
        renderer.update_scene(simulator.data, camera="corner2")
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        pictures[str(size)] = np.rot90(renderer.render(), 2)
np.savez(sys.argv[1], **pictures)
"""


def test_opengl_pictures_are_like_mujocos_own(opengl: str, hammer: Simulator, tmp_path: Path) -> None:
    """Against MuJoCo's stock renderer (fine meshes, four samples a pixel, no shadows), mean absolute difference.

    Measured: 0.50 at 480 pixels, 2.10 at 96 (2.02 with the fine meshes). One row further it is 3.1 and 6.1.
    """
    path = tmp_path / "stock.npz"
    environment = {**os.environ, "MUJOCO_GL": opengl}
    subprocess.run([sys.executable, "-c", STOCK, str(path)], check=True, env=environment)
    stock = np.load(path)
    for size, bound in ((480, 0.8), (96, 2.5)):
        own = draw(hammer, View("corner2", size, size), opengl)
        assert difference(own, stock[str(size)]) < bound
        assert difference(own[1:], stock[str(size)][:-1]) > 1.5 * bound


def test_coarse_meshes_have_fewer_triangles_in_the_same_place(hammer: Simulator) -> None:
    before = hammer.model.mesh_face.copy(), hammer.model.mesh_vert.copy(), hammer.model.mesh_facenum.copy()
    coarse = coarsen_meshes(hammer.model, 0.008)
    for array, copy in zip(
        (hammer.model.mesh_face, hammer.model.mesh_vert, hammer.model.mesh_facenum), before, strict=True
    ):
        np.testing.assert_array_equal(array, copy)  # the physics keeps the fine ones
    assert coarse.mesh_facenum.sum() < 0.5 * hammer.model.mesh_facenum.sum()
    assert (coarse.mesh_facenum > 0).all()
    # A vertex moves to the mean of its cube, so by less than the cube's diagonal.
    assert np.linalg.norm(coarse.mesh_vert - hammer.model.mesh_vert, axis=1).max() < np.sqrt(3) * 0.008


# The choice of a platform


def test_an_unknown_renderer() -> None:
    with pytest.raises(ValueError, match=r"renderer 'eql'; did you mean 'egl'\?"):
        get_renderer("eql")


def test_one_renderer_of_a_kind_per_process(kind: str) -> None:
    assert get_renderer() is get_renderer("auto") is get_renderer("software")
    assert get_renderer(kind) is get_renderer(kind)


def id_of_renderer(kind: str) -> int:
    return id(get_renderer(kind))


def test_a_forked_process_has_its_own(kind: str) -> None:
    parents = id_of_renderer(kind)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        # The parent's lives on in the child, so the number is taken.
        assert pool.apply(id_of_renderer, (kind,)) != parents
        pool.close()
        pool.join()


def test_each_thread_draws_by_a_context_of_its_own(kind: str, hammer: Simulator) -> None:
    """Threads that end give theirs back."""
    view = View("corner2", 32, 32)
    expected = get_renderer(kind).render(hammer.model, hammer.data, view, hammer.scene)
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            begin = threading.Barrier(3)

            def draw(_: int, begin: threading.Barrier = begin) -> npt.NDArray[np.uint8]:
                begin.wait()
                return get_renderer(kind).render(hammer.model, hammer.data, view, hammer.scene)

            for picture in pool.map(draw, range(3)):
                np.testing.assert_array_equal(picture, expected)
    again = get_renderer(kind).render(hammer.model, hammer.data, view, hammer.scene)
    np.testing.assert_array_equal(again, expected)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with MuJoCo's variables as given, else unset."""
    clean = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    return subprocess.run([sys.executable, "-c", program], env={**clean, **environment}, capture_output=True, text=True)


def test_a_thread_that_outlives_the_process_ends_quietly(opengl: str) -> None:
    program = f"""
import threading, time
import gymnasium as gym
def draw():
    env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", image_size=32, renderer="{opengl}")
    env.reset(seed=0)
    return env
env = draw()
ended = threading.Thread(target=draw)
ended.start()
ended.join()
drawn = threading.Event()
def hang():
    env = draw()
    drawn.set()
    time.sleep(60)
threading.Thread(target=hang, daemon=True).start()
assert drawn.wait(60)
"""
    done = run_python(program)
    assert (done.returncode, done.stderr) == (0, "")


DRAW_ONE = """
import hashlib
import gymnasium as gym
env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", image_size=32)
observation, _ = env.reset(seed=0)
assert observation["image"].std() > 10
print(hashlib.sha256(observation["image"]).hexdigest())
"""


def test_pictures_do_not_depend_on_mujocos_variable() -> None:
    if not renderer_available("egl"):
        pytest.skip("needs EGL")
    runs = [run_python(DRAW_ONE), run_python(DRAW_ONE, MUJOCO_GL="egl"), run_python(DRAW_ONE, MUJOCO_GL="disable")]
    assert [run.stderr for run in runs if run.returncode] == []
    assert len({run.stdout for run in runs}) == 1


# Libraries missing as they are on a bare machine: the loader does not find them. Then a stand-in for mujoco.osmesa with
# the conditions of the real one: that no other platform was asked for, and that PyOpenGL has chosen OSMesa.
WITHOUT = """
import ctypes, importlib.abc, importlib.machinery, os, sys

load = ctypes.CDLL.__init__
def refuse(self, name, *args, **kwargs):
    if any(missing in str(name) for missing in {missing}):
        raise OSError(f"{{name}}: cannot open shared object file")
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = refuse

class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "mujoco.osmesa" and {osmesa} else None

    def exec_module(self, module):
        if os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa") != "osmesa":
            raise ImportError("PYOPENGL_PLATFORM")
        from OpenGL import platform
        module.platform = type(platform.PLATFORM).__name__
        class GLContext:
            def __init__(self, width, height): pass
            def make_current(self): pass
            def free(self): pass
        module.GLContext = GLContext
sys.meta_path.insert(0, StandIn())

from mw_envs.rendering import RendererUnavailableError, get_renderer, renderer_available
"""


def without(*missing: str, osmesa: bool = False) -> str:
    return WITHOUT.format(missing=missing, osmesa=osmesa)


@pytest.mark.parametrize("how", ["no library", "no device"])
def test_osmesa_works_where_egl_has_failed_in_the_same_process(how: str) -> None:
    program = (
        without(*(["EGL"] if how == "no library" else []), osmesa=True)
        + """
before = set(sys.modules)
assert not renderer_available("egl")
assert "PYOPENGL_PLATFORM" not in os.environ
assert not [name for name in set(sys.modules) - before if name.startswith(("OpenGL", "mujoco.egl"))]
get_renderer("osmesa")
print(sys.modules["mujoco.osmesa"].platform, os.environ["PYOPENGL_PLATFORM"])
"""
    )
    # libEGL finds no driver in an empty folder, as where no driver is installed.
    run = run_python(program, **({"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"} if how == "no device" else {}))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["OSMesaPlatform", "osmesa"]
    assert "Exception ignored" not in run.stderr


def test_a_failed_attempt_at_osmesa_does_not_stop_egl() -> None:
    if not renderer_available("egl"):
        pytest.skip("needs EGL")
    run = run_python(
        without("OSMesa")
        + "assert not renderer_available('osmesa'); assert 'PYOPENGL_PLATFORM' not in os.environ; get_renderer('egl')"
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("platform", ["egl", "osmesa"])
def test_without_the_library_the_error_names_the_package_and_the_renderer_without(platform: str) -> None:
    run = run_python(without("EGL", "OSMesa") + f"get_renderer({platform!r})")
    *_, last = run.stderr.split("RendererUnavailableError: ")
    assert f"apt-get install lib{platform}" in last, run.stderr
    assert "renderer='software'" in last


def test_without_any_library_the_default_draws_and_opengl_is_refused_when_it_is_to_draw() -> None:
    program = (
        without("EGL", "OSMesa", "GL.so")
        + """
import gymnasium as gym
env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", image_size=32)
assert env.reset(seed=0)[0]["image"].std() > 10
env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", image_size=32, renderer="egl")
try:
    env.reset(seed=0)
except RendererUnavailableError as error:
    print("apt-get install libegl1" in str(error))
"""
    )
    run = run_python(program)
    assert run.stdout.split() == ["True"], run.stderr


@pytest.mark.parametrize("platform", ["egl", "osmesa"])
def test_mujocos_variable_without_the_library_is_explained(platform: str) -> None:
    program = (
        without("EGL", "OSMesa")
        + """
try:
    import mw_envs.simulation.scene
except RendererUnavailableError as error:
    print(error)
print(renderer_available())
"""
    )
    run = run_python(program, MUJOCO_GL=platform)
    assert f"MUJOCO_GL={platform} stops MuJoCo; unset it" in run.stdout, run.stderr
    assert f"apt-get install lib{platform}" in run.stdout
    assert run.stdout.split()[-1] == "False"


def test_a_platform_that_is_asked_for_is_not_overruled() -> None:
    program = "from mw_envs.rendering import get_renderer; get_renderer('egl')"
    run = run_python(program, PYOPENGL_PLATFORM="osmesa")
    *_, last = run.stderr.split("RendererUnavailableError: ")
    assert "PYOPENGL_PLATFORM='osmesa'" in last
    assert "renderer='osmesa'" in last
    assert "apt-get" not in last


@pytest.fixture
def no_renderers_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("mw_envs.rendering.choice._renderers", {})
    yield


def test_a_renderer_that_failed_is_tried_again(no_renderers_yet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    works: set[str] = set()

    class Fake:
        def __init__(self, platform: str) -> None:
            if platform not in works:
                raise RendererUnavailableError(f"no {platform}")
            self.platform = platform

    monkeypatch.setattr("mw_envs.rendering.opengl.OpenGLRenderer", Fake)
    with pytest.raises(RendererUnavailableError, match="no egl"):
        get_renderer("egl")
    works.add("egl")
    assert get_renderer("egl")._renderer.platform == "egl"  # type: ignore[attr-defined]


def test_the_stock_model_has_the_cameras() -> None:
    model = Simulator("reach-v3").model
    known = {mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, number) for number in range(model.ncam)}
    assert known == set(CAMERAS)
