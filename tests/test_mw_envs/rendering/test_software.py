"""The software renderer: its shapes, what a renderer promises, and scenes whose picture follows from geometry."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
import pytest

from mw_envs import Trial
from mw_envs.rendering import CROPS, Scene, View, get_renderer
from mw_envs.rendering.software.compiling import CompiledOnce
from mw_envs.rendering.software.geometry import (
    Shape,
    box_shape,
    capsule_shape,
    coarsened,
    cylinder_shape,
    mesh_shape,
    plane_shape,
    sphere_shape,
)
from mw_envs.rendering.software.prepared import Prepared
from mw_envs.rendering.software.renderer import SoftwareRenderer, arrays, frame
from mw_envs.rendering.software.textures import TexturePool
from mw_envs.simulation.scene import Simulator

Picture = npt.NDArray[np.uint8]


def placed(task: str, goal: int = 0) -> Simulator:
    simulator = Simulator(task)
    simulator.place(Trial(task, 0, goal))
    return simulator


def draw(simulator: Simulator, view: View, renderer: SoftwareRenderer | None = None) -> Picture:
    renderer = renderer or SoftwareRenderer()
    return renderer.render(simulator.model, simulator.data, view, simulator.scene)


def difference(a: Picture, b: Picture) -> float:
    """Mean absolute difference, 0..255."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b).mean())


# --- Shapes -----------------------------------------------------------------------------------------------------------


def volume(shape: Shape) -> float:
    """By the divergence theorem, so positive only if all triangles are seen counter-clockwise from outside."""
    a, b, c = (shape.places[shape.triangles[:, k]] for k in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


@pytest.mark.parametrize(
    ("shape", "ideal", "tolerance"),
    [
        (sphere_shape(28, 16), 4 / 3 * np.pi, 0.02),
        (cylinder_shape(28, 16), 2 * np.pi, 0.01),
        (capsule_shape(0.1, 0.3, 28, 16, 8), np.pi * 0.1**2 * 0.6 + 4 / 3 * np.pi * 0.1**3, 0.015),
        (box_shape(4), 8.0, 1e-9),
    ],
    ids=["sphere", "cylinder", "capsule", "box"],
)
def test_shapes_are_closed_and_face_outwards(shape: Shape, ideal: float, tolerance: float) -> None:
    assert volume(shape) == pytest.approx(ideal, rel=tolerance) and volume(shape) <= ideal * (1 + 1e-9)
    edges = np.concatenate([shape.triangles[:, [0, 1]], shape.triangles[:, [1, 2]], shape.triangles[:, [2, 0]]])
    forth, back = {tuple(e) for e in edges.tolist()}, {tuple(e[::-1]) for e in edges.tolist()}
    assert forth == back and len(forth) == len(edges)  # each edge belongs to two triangles, once in each direction
    corner_normals = shape.normals[shape.corners]
    flat = np.cross(*(np.diff(shape.places[shape.triangles], axis=1).transpose(1, 0, 2)))
    assert ((corner_normals * flat[:, None]).sum(2) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(shape.normals, axis=1), 1)


def test_a_plane_has_its_size_and_an_endless_one_reaches_far() -> None:
    np.testing.assert_allclose(np.ptp(plane_shape(4, 2, 0.1, 50).places, axis=0), [8, 4, 0])
    assert (np.ptp(plane_shape(0, 0, 0.1, 50).places, axis=0)[:2] > 100).all()


def test_a_coarse_mesh_stays_where_it_was() -> None:
    model = placed("hammer-v3").model
    fine = mesh_shape(model, int(np.argmax(model.mesh_facenum)))
    coarse = coarsened(fine, 0.004)
    assert len(coarse.triangles) < 0.6 * len(fine.triangles)
    # A vertex moves to the mean of its cube, so by less than the cube's diagonal.
    nearest = np.array([np.linalg.norm(fine.places - place, axis=1).min() for place in coarse.places[::17]])
    assert nearest.max() < np.sqrt(3) * 0.004
    np.testing.assert_array_equal(coarse.corner_places[coarse.corners], coarse.triangles)
    assert coarsened(fine, 10.0) is fine  # nothing would be left


def test_round_shapes_have_as_many_parts_as_can_be_seen() -> None:
    """A sphere's chords leave it by no more than a tenth of a pixel, a quad's diagonal by twice that; no more than
    MuJoCo's of any.
    """
    pixel, radii = 0.002, [0.001, 0.004, 0.01, 0.03, 0.5]
    geoms = "".join(
        f'<geom type="sphere" size="{r}"/><geom type="cylinder" size="{r} .02"/><geom type="capsule" size="{r} .02"/>'
        f'<geom type="box" size="{r} {r} {r}"/>'
        for r in radii
    )
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{geoms}</worldbody></mujoco>")
    geometry = Prepared(model, frozenset(), pixel, TexturePool()).geometry
    places = np.stack([geometry.x, geometry.y, geometry.z], axis=1)
    ends = [slice(*ends) for ends in pairwise(geometry.first_triangle)]
    counts = np.array([end.stop - end.start for end in ends]).reshape(-1, 4)
    full = [sphere_shape(28, 16), cylinder_shape(28, 16), capsule_shape(0.1, 0.3, 28, 16, 8), box_shape(4)]
    assert (np.diff(counts, axis=0) >= 0).all() and (counts[0] < 60).all()
    # Large ones are MuJoCo's own, but a capsule's wall that is so short has fewer stacks.
    np.testing.assert_array_equal(counts[-1, [0, 1, 3]], [len(full[k].triangles) for k in (0, 1, 3)])
    assert counts[-1, 2] < len(full[2].triangles)
    for radius, end in zip(radii[:-1], ends[::4], strict=False):
        corners = places[geometry.triangles[end, :3]]
        middles = (corners + np.roll(corners, 1, axis=1)) / 2
        assert np.linalg.norm(middles, axis=2).min() > max(radius - 2 * 0.12 * pixel, 0.4 * radius)


@pytest.mark.parametrize("pixel", [0.002, 0.008])
@pytest.mark.parametrize("task", ["hammer-v3", "assembly-v3", "coffee-push-v3"])
def test_shadows_are_cast_by_coarser_meshes_that_keep_their_areas(task: str, pixel: float) -> None:
    simulator = placed(task)
    prepared = Prepared(simulator.model, simulator.scene.background, pixel, TexturePool())
    fine, coarse = prepared.geometry, prepared.casters
    assert len(coarse.triangles) < 0.8 * len(fine.triangles)

    def seen(g: arrays.Geometry | arrays.Casters, d: int) -> npt.NDArray[np.float64]:
        """Along x, y and z, of a drawable's triangles."""
        places = np.stack([g.x, g.y, g.z], axis=1, dtype=np.float64)
        corners = places[g.triangles[g.first_triangle[d] : g.first_triangle[d + 1], :3]]
        return np.abs(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])).sum(axis=0) / 2

    for d in range(len(fine.first_vertex) - 1):
        ours, theirs = (
            np.stack([g.x, g.y, g.z], axis=1)[g.first_vertex[d] : g.first_vertex[d + 1]] for g in (coarse, fine)
        )
        assert (ours.min(axis=0) >= theirs.min(axis=0) - 1e-6).all()
        assert (np.ptp(theirs, axis=0) - np.ptp(ours, axis=0) < 2 * 4 * pixel).all()  # a cell on either side
        assert (seen(coarse, d) >= 0.84 * seen(fine, d)).all()


def test_the_smallest_sphere_is_there_whatever_the_quality() -> None:
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><visual><quality numslices="60" numstacks="16"/></visual>'
        '<worldbody><geom type="sphere" size="1e-4"/><geom type="ellipsoid" size="1e-4 1e-4 1e-4"/></worldbody>'
        "</mujoco>"
    )
    first = Prepared(model, frozenset(), 0.002, TexturePool()).geometry.first_triangle
    assert (np.diff(first) > 0).all()


# --- What a renderer promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "left", "height", "width"), [(60, 120, 120, 80), (31, 77, 61, 53), (0, 0, 5, 1)])
def test_a_crop_is_that_part_of_the_view(top: int, left: int, height: int, width: int) -> None:
    """The same pixels: samples stand at the same places of a pixel, and detail depends on a pixel's size alone."""
    simulator = placed("hammer-v3")
    whole = draw(simulator, View("corner2", 240, 240))
    crop = (top / 240, left / 240, height / 240, width / 240)
    part = draw(simulator, View("corner2", height, width, crop=crop))
    assert difference(part, whole[top : top + height, left : left + width]) < 0.05


def test_turning_the_view_turns_the_picture() -> None:
    simulator = placed("hammer-v3")
    upright = draw(simulator, View("corner2", 96, 128, rotated=False))
    turned = draw(simulator, View("corner2", 96, 128, rotated=True))
    assert difference(np.rot90(upright, 2), turned) < 0.2


def test_what_was_drawn_before_leaves_no_trace() -> None:
    """Bit for bit the same, in another renderer and after other tasks, views and states."""
    simulator, view = placed("reach-v3", 3), View("corner2", 96, 96, CROPS["workspace"])
    first = draw(simulator, view)
    renderer = SoftwareRenderer()
    for other in ("window-open-v3", "sweep-into-v3"):
        draw(placed(other), view, renderer)
    draw(simulator, View("corner2", 64, 96), renderer)
    simulator.place(Trial("reach-v3", 0, 9))
    moved = draw(simulator, view, renderer)
    simulator.place(Trial("reach-v3", 0, 3))
    np.testing.assert_array_equal(draw(simulator, view, renderer), first)
    assert difference(moved, first) > 0.1


def test_tasks_share_their_background_and_textures() -> None:
    """48 of the 50 tasks stand before the same table; drawing it again would take as long as a hundred frames."""
    renderer, view = SoftwareRenderer(), View("corner2", 48, 48)
    texels = []
    for task in ("reach-v3", "push-v3", "window-open-v3", "drawer-close-v3"):
        draw(placed(task), view, renderer)
        assert len(renderer._backgrounds) == 1
        texels.append(len(renderer._textures.arrays.pixels))
    assert texels[0] == texels[1]  # two tasks with the same textures
    draw(placed("sweep-into-v3"), view, renderer)  # whose table has a hole
    assert len(renderer._backgrounds) == 2


def test_pictures_are_new_contiguous_arrays() -> None:
    simulator, renderer = placed("reach-v3"), SoftwareRenderer()
    first = draw(simulator, View("corner2", 48, 64), renderer)
    assert first.shape == (48, 64, 3) and first.dtype == np.uint8 and first.flags.c_contiguous
    second = draw(simulator, View("corner2", 48, 64), renderer)
    assert not np.shares_memory(first, second)
    first[:] = 0
    np.testing.assert_array_equal(draw(simulator, View("corner2", 48, 64), renderer), second)


def test_unknown_camera() -> None:
    with pytest.raises(ValueError, match="Unknown camera 'corner22'; did you mean 'corner2'"):
        draw(placed("reach-v3"), View("corner22", 16, 16))


def test_no_opengl_is_needed() -> None:
    program = """
import sys
sys.modules["OpenGL"] = None  # as if it were not installed
import gymnasium, mw_envs
env = gymnasium.make("mw_envs:MetaWorldMT10-v0", image_size=32, renderer="software")
observation, _ = env.reset(seed=0)
assert observation["image"].std() > 10
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "MUJOCO_GL": "disable"})


def test_it_is_the_renderer_of_that_name() -> None:
    renderer = get_renderer("software")
    assert isinstance(renderer, CompiledOnce)
    assert get_renderer("software") is renderer
    simulator, view = placed("reach-v3"), View("corner2", 32, 32)
    for _ in range(2):  # the first picture and those after it
        picture = renderer.render(simulator.model, simulator.data, view, simulator.scene)
        np.testing.assert_array_equal(picture, draw(simulator, view))


class SlowRenderer:
    """Takes its time, as a renderer does that is compiled."""

    def render(self, *_: Any) -> Picture:
        time.sleep(0.5)
        return np.zeros((1, 1, 3), np.uint8)


NOWHERE = (None, None, View("corner2", 1, 1), Scene("nothing"))


def test_only_the_first_picture_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("mw_envs.rendering.software.compiling._PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    renderer = CompiledOnce(SlowRenderer())
    renderer.render(*NOWHERE)
    assert capsys.readouterr().err.count("is being compiled, once on this machine") == 1
    renderer.render(*NOWHERE)
    assert capsys.readouterr().err == ""


def test_one_process_compiles_while_the_others_wait(tmp_path: Path) -> None:
    program = """
import sys, time
from mw_envs.rendering import Scene, View
from mw_envs.rendering.software.compiling import CompiledOnce

class SlowRenderer:
    def render(self, *_):
        start = time.monotonic()
        time.sleep(0.5)
        print(start, time.monotonic())

CompiledOnce(SlowRenderer()).render(None, None, View("corner2", 1, 1), Scene("nothing"))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    spans = sorted(tuple(map(float, run.communicate(timeout=60)[0].split())) for run in runs)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_where_no_file_can_be_locked_it_draws_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert CompiledOnce(SlowRenderer()).render(*NOWHERE).shape == (1, 1, 3)


def blocked_package(folder: Path) -> dict[str, str]:
    """A copy of the package beside which nothing can be written, also not by root, and a user without a home."""
    shutil.copytree(Path(arrays.__file__).parents[2], folder / "mw_envs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mw_envs" / "rendering" / "software" / "__pycache__").touch()
    kept = {key: value for key, value in os.environ.items() if key not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    (folder / "tmp").mkdir()
    return {**kept, "PYTHONPATH": str(folder), "HOME": "/dev/null", "TMPDIR": str(folder / "tmp")}


def test_where_nothing_can_be_kept_a_temporary_folder_is_told_of_once(tmp_path: Path) -> None:
    environment = blocked_package(tmp_path)
    program = (
        "from mw_envs.rendering import get_renderer; from mw_envs.rendering.software import warming; "
        "get_renderer(); print(warming.cache_folder())"
    )
    command = [sys.executable, "-c", program]
    runs = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    first, second = (subprocess.run(command, **runs) for _ in range(2))  # type: ignore[call-overload]
    folder = tmp_path / "tmp" / f"mw_envs-compiled-{os.getuid()}"
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{folder}{os.sep}")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert f"kept in {folder} only" in first.stderr and "Set NUMBA_CACHE_DIR" in first.stderr
    assert second.stderr == ""


@pytest.mark.parametrize("cache", [None, "", "relative"])
def test_without_a_home_no_folder_is_made_where_a_program_happens_to_run(cache: str | None, tmp_path: Path) -> None:
    """A container may run as a user who is in no list; Numba takes ``~``, and a relative name, as they stand."""
    environment = {key: value for key, value in blocked_package(tmp_path).items() if key != "HOME"}
    environment |= {} if cache is None else {"XDG_CACHE_HOME": cache, "HOME": str(tmp_path / "home")}
    program = (
        "import os, pwd; pwd.getpwuid = {}.__getitem__; "
        "from mw_envs.rendering.software import arrays; print(arrays._CACHE)"
    )
    program += "; print(os.environ.get('XDG_CACHE_HOME'))"
    (tmp_path / "here").mkdir()
    runs = {"env": environment, "cwd": tmp_path / "here", "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", program], **runs)  # type: ignore[call-overload]
    assert done.stdout.splitlines() == [str(tmp_path / "tmp" / f"mw_envs-compiled-{os.getuid()}"), str(cache)], (
        done.stderr
    )
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("how", ["no temporary folder", "writable by others", "a link", "read-only"])
def test_machine_code_is_kept_in_no_folder_of_others(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locator(**_: Any) -> Any:
        raise RuntimeError("cannot cache function")

    monkeypatch.setattr(arrays.numba, "njit", no_locator)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing" if how == "no temporary folder" else tmp_path))
    folder = tmp_path / f"mw_envs-compiled-{os.getuid()}"
    if how == "writable by others":
        folder.mkdir()
        folder.chmod(0o777)
    elif how == "a link":
        folder.symlink_to(tmp_path)
    elif how == "read-only":
        folder.mkdir(mode=0o700)
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write whatever the mode says
    with pytest.warns(UserWarning, match=r"Each process compiles .* Set NUMBA_CACHE_DIR"):
        assert arrays._cache() == ""


@pytest.mark.slow
def test_the_first_process_of_all_draws_what_every_other_draws(tmp_path: Path) -> None:
    program = """
import hashlib
import gymnasium, mw_envs
from mw_envs.rendering.software import warming

env = gymnasium.make("mw_envs:MetaWorldMT50-v0")
for task in ("reach-v3", "hammer-v3"):
    observation, _ = env.reset(options={"task": task, "goal": 1, "seed": 0})
    print(hashlib.sha256(observation["image"].tobytes()).hexdigest())
print(sum(sum(entry.stats.cache_misses.values()) for entry in warming._ENTRIES))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    first, second = (subprocess.check_output(command, env=environment, text=True).split() for _ in range(2))
    assert first == second
    assert first[-1] == "0"  # compiled by a process of its own, with the types that MetaWorld's scenes have


# --- Threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [2**27, 1])
def test_threads_draw_what_one_draws(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """At once, of scenes that nobody has drawn yet, in views of several sizes, with much room to keep them or none."""
    for name in ("_BACKGROUND_BYTES", "_SETTING_BYTES"):
        monkeypatch.setattr(f"mw_envs.rendering.software.renderer.{name}", room)
    simulators = [placed(task, goal) for task in ("reach-v3", "hammer-v3", "push-v3") for goal in (0, 1)]
    views = [View("corner2", 64, 64), View("corner2", 40, 56), View("gripperPOV", 48, 48)]
    everything = range(len(views))
    alone = SoftwareRenderer()
    expected = [[draw(simulator, views[k], alone) for k in everything] for simulator in simulators]
    renderer, begin = SoftwareRenderer(), threading.Barrier(len(simulators))

    def draw_all(number: int) -> list[Picture]:
        begin.wait()
        return [draw(simulators[number], views[k], renderer) for _ in range(6) for k in everything]

    with ThreadPoolExecutor(len(simulators)) as pool:
        drawn = list(pool.map(draw_all, range(len(simulators))))
    for of_thread, right in zip(drawn, expected, strict=True):
        for number, picture in enumerate(of_thread):
            np.testing.assert_array_equal(picture, right[number % len(views)])
    for stills in (renderer._backgrounds, renderer._settings):
        assert stills._bytes == sum(still.own_bytes for still in stills._kept.values())


def test_a_simulation_may_change_threads() -> None:
    """As with a pool that gives each step to another one."""
    simulator, renderer, view = placed("drawer-open-v3"), SoftwareRenderer(), View("corner2", 48, 48)
    alone, pool = SoftwareRenderer(), ThreadPoolExecutor(3)
    with pool:
        for _ in range(9):
            simulator.step(np.ones(4, np.float32))
            np.testing.assert_array_equal(
                pool.submit(draw, simulator, view, renderer).result(), draw(simulator, view, alone)
            )


# --- Scenes that MetaWorld does not have ------------------------------------------------------------------------------


def scene_of(xml: str) -> tuple[mujoco.MjModel, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{xml}</worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


CAMERA = '<camera name="down" pos="0 0 2" fovy="60"/>'


def test_a_square_has_its_size_and_color_by_the_pinhole_and_the_headlight() -> None:
    """A box's top at distance 1.9 under the camera's own light: ambient 0.1, diffuse 0.4, MuJoCo's defaults."""
    model, data = scene_of(CAMERA + '<geom type="box" size=".3 .2 .1" rgba="1 .5 .2 1"/>')
    model.vis.headlight.specular[:] = 0
    picture = SoftwareRenderer().render(model, data, View("down", 200, 200, rotated=False), Scene("square"))
    focal = 100 / np.tan(np.radians(30))
    rows, columns = np.flatnonzero(picture.any((1, 2))), np.flatnonzero(picture.any((0, 2)))
    assert len(columns) == pytest.approx(2 * 0.3 / 1.9 * focal, abs=2)
    assert len(rows) == pytest.approx(2 * 0.2 / 1.9 * focal, abs=2)
    np.testing.assert_allclose(picture[100, 100], np.array([255, 127.5, 51]) * 0.5, atol=1)


LIGHT = '<light directional="true" pos="0 0 3" dir="1 0 -1" diffuse=".5 .5 .5" specular="0 0 0"/>'
FLOOR = '<geom type="plane" size="2 2 .1" rgba=".8 .8 .8 1"/>'
# A body that never moves, one that the simulation leaves where a trial puts it, and one that it moves.
NEVER, PLACED, MOVING = "never moves", "placed", "moving"


def bodies_of(*bodies: tuple[str, str]) -> tuple[str, frozenset[int]]:
    """Bodies' text and the background, from what each contains and how it moves."""
    text = "".join(f"{body}{'<freejoint/>' if kind == MOVING else ''}</body>" for body, kind in bodies)
    return text, frozenset({0, *(i for i, (_, kind) in enumerate(bodies, 1) if kind == NEVER)})


@pytest.mark.parametrize("kind", [NEVER, PLACED, MOVING])
def test_nearer_things_hide_farther_ones_and_shadows_fall_behind(kind: str) -> None:
    ball, background = bodies_of(('<body pos="0 0 .5"><geom type="sphere" size=".1" rgba="1 0 0 1"/>', kind))
    model, data = scene_of(CAMERA + LIGHT + FLOOR + ball)
    model.vis.headlight.specular[:] = 0
    view = View("down", 200, 200, rotated=False)
    picture = SoftwareRenderer().render(model, data, view, Scene("ball", background)).astype(int)
    assert picture[100, 100, 0] > 2 * picture[100, 100, 1]  # the ball, red
    focal = 100 / np.tan(np.radians(30))
    column = 100 + round(0.5 / 2 * focal)  # the light falls at 45 degrees: the shadow lies half a meter to the side
    lit, dark = picture[100, 200 - column], picture[100, column]
    expected = 255 * 0.8 * 0.5 * np.sqrt(0.5)  # what the light alone gives
    np.testing.assert_allclose(lit - dark, expected, atol=2)


@pytest.mark.parametrize(
    "kinds", [(NEVER, NEVER), (PLACED, PLACED), (MOVING, MOVING), (NEVER, PLACED), (PLACED, MOVING)]
)
def test_of_two_things_in_one_place_the_later_one_is_seen(kinds: tuple[str, str]) -> None:
    """As in MuJoCo, whose markers of goals lie in one place here and there."""
    colors = ("1 0 0 1", "0 1 0 1")
    text, background = bodies_of(
        *(
            (f'<body pos="0 0 .2"><geom type="box" size=".3 .3 .1" rgba="{c}"/>', k)
            for c, k in zip(colors, kinds, strict=True)
        )
    )
    model, data = scene_of(CAMERA + text)
    model.vis.headlight.specular[:] = 0
    picture = SoftwareRenderer().render(model, data, View("down", 64, 64), Scene("two", background))
    inside = picture[26:38, 26:38]  # at its edges a pixel shows half of what is behind
    assert (inside[..., 1] > 100).all() and not inside[..., 0].any()


@pytest.mark.parametrize("plate", [NEVER, PLACED, MOVING])
@pytest.mark.parametrize("ball", [PLACED, MOVING])
def test_what_is_placed_and_what_moves_cast_shadows_on_each_other(plate: str, ball: str) -> None:
    """The ball's shadow lies half on the plate, half on the floor; the plate's lies on the floor."""
    view = View("down", 200, 200, rotated=False)

    def drawn(plate: str, ball: str, ball_height: float = 0.6) -> Picture:
        text, background = bodies_of(
            ('<body pos=".45 0 .2"><geom type="box" size=".2 .3 .02" rgba="0 1 0 1"/>', plate),
            (f'<body pos="0 0 {ball_height}"><geom type="sphere" size=".15" rgba="1 0 0 1"/>', ball),
        )
        model, data = scene_of(CAMERA + LIGHT + FLOOR + text)
        return SoftwareRenderer().render(model, data, view, Scene("plate", background))

    picture, without = (drawn(plate, ball, height).astype(int) for height in (0.6, -1.0))
    assert difference(picture, drawn(NEVER, NEVER)) < 0.05
    focal = 100 / np.tan(np.radians(30))
    # The light comes at 45 degrees: the ball's shadow meets the plate as far aside as it hangs above it.
    of_ball, of_plate = (100 + round(x / (2 - z) * focal) for x, z in ((0.38, 0.22), (0.75, 0.0)))
    assert (without[100, of_ball] - picture[100, of_ball])[1] > 60
    assert (picture[100, 200 - of_plate] - picture[100, of_plate]).min() > 60


def test_what_a_trial_places_is_drawn_once_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that take turns, more than are kept: each picture is that of a renderer of its own."""
    view = View("corner2", 48, 64)
    trials = [Trial("button-press-v3", 0, goal) for goal in range(3)] + [Trial("push-v3", 0, 1)]
    simulators = {trial: Simulator(trial.task) for trial in trials}
    for trial, simulator in simulators.items():
        simulator.place(trial)
    bytes_kept = 1 << 28
    for kept in (4, 2):
        monkeypatch.setattr("mw_envs.rendering.software.renderer._SETTING_BYTES", bytes_kept)
        renderer = SoftwareRenderer()
        for trial in [*trials, *trials[::-1], *trials]:
            simulator = simulators[trial]
            simulator.step(np.array([0.3, -0.5, 0.2, 1.0], np.float32))
            np.testing.assert_array_equal(draw(simulator, view, renderer), draw(simulator, view))
        assert len(renderer._settings) == kept
        bytes_kept = 2 * max(still.own_bytes for still in renderer._settings._kept.values())


@pytest.mark.parametrize("room", [2**27, 2**18], ids=["room for all", "room for one"])
def test_a_camera_that_moves_leaves_little_behind(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A hand's camera sees another background in each frame, whose map of shadows may be large."""
    monkeypatch.setattr("mw_envs.rendering.software.renderer._BACKGROUND_BYTES", room)
    simulator, renderer, view = placed("door-open-v3"), SoftwareRenderer(), View("gripperPOV", 48, 48)
    usual = View("corner2", 48, 48)
    first = draw(simulator, usual, renderer)
    assert len(renderer._settings) == 1
    for _ in range(3):
        simulator.step(np.array([0.5, 0.5, -0.5, 1.0], np.float32))
        np.testing.assert_array_equal(draw(simulator, view, renderer), draw(simulator, view))
    # What is placed is kept of the standing camera alone, and goes with the background that it was drawn over.
    assert (len(renderer._backgrounds) > 3, len(renderer._settings)) == ((True, 1) if room == 2**27 else (False, 0))
    assert len(renderer._backgrounds) == 1 or room == 2**27
    simulator.place(Trial("door-open-v3", 0, 0))
    np.testing.assert_array_equal(draw(simulator, usual, renderer), first)


def interrupted_after(compiled: Callable[..., Any]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        compiled(*arguments)
        raise KeyboardInterrupt

    return call


def test_an_interrupt_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it falls between two compiled functions."""
    view, here, there = View("corner2", 48, 48), placed("button-press-v3", 1), placed("button-press-v3", 2)
    for name in ("show_background", "draw_still", "cast_shadows", "draw_moving", "light_window"):
        renderer = SoftwareRenderer()
        draw(here, view, renderer)

        with monkeypatch.context() as patch:
            patch.setattr(frame, name, interrupted_after(getattr(frame, name)))
            with pytest.raises(KeyboardInterrupt):
                draw(there, view, renderer)
        for simulator in (here, there):
            np.testing.assert_array_equal(draw(simulator, view, renderer), draw(simulator, view))


def test_what_the_background_depends_on() -> None:
    """One renderer draws scenes that differ in the lens, the light, or how many things there are in all."""
    view, renderer = View("down", 64, 64, rotated=False), SoftwareRenderer()
    box = '<geom type="box" size=".4 .3 .1" euler="20 30 0" rgba="1 .5 .2 1"/>'
    others = "".join(f'<body pos="{i} 5 0"><geom type="box" size=".1 .1 .1"/></body>' for i in range(90))
    scenes = [
        CAMERA + LIGHT + FLOOR + box,
        CAMERA.replace("60", "56") + LIGHT + FLOOR + box,
        CAMERA + LIGHT.replace(".5 .5 .5", ".9 .1 .5") + FLOOR + box,
        CAMERA + LIGHT + FLOOR + box + others,
    ]
    pictures = []
    for number, text in enumerate(scenes):
        model, data = scene_of(text)
        scene = Scene(str(number), frozenset({0}))
        pictures.append(renderer.render(model, data, view, scene))
        np.testing.assert_array_equal(pictures[-1], SoftwareRenderer().render(model, data, view, scene))
    assert difference(pictures[0], pictures[1]) > 1 and difference(pictures[0], pictures[2]) > 1


def test_more_than_samples_can_count_is_refused() -> None:
    geoms = "".join(f'<geom type="box" size=".1 .1 .1" pos="{i} 0 0"/>' for i in range(4096))
    model, data = scene_of(CAMERA + geoms)
    with pytest.raises(ValueError, match=r"draws up to 4095 geoms and sites .* has 4096 of .*renderer='egl'"):
        SoftwareRenderer().render(model, data, View("down", 16, 16), Scene("many"))


def test_a_scene_of_many_things_still_has_their_colors() -> None:
    """So many that the groups of what they show are whole drawables."""
    geoms = "".join(
        f'<geom type="sphere" size=".02" pos="{0.1 * (i % 30 - 14.5)} {0.1 * (i // 30 - 14.5)} 0" '
        f'rgba="{int(i % 30 > 14)} {int(i // 30 > 14)} 1 1"/>'
        for i in range(900)
    )
    model, data = scene_of(CAMERA + geoms)
    model.vis.headlight.specular[:] = 0
    picture = SoftwareRenderer().render(model, data, View("down", 240, 240, rotated=False), Scene("many"))
    left, right, top, bottom = picture[:, :118], picture[:, 122:], picture[:118], picture[122:]
    assert right[..., 0].max() > 100 and not left[..., 0].any()
    assert top[..., 1].max() > 100 and not bottom[..., 1].any()


def test_what_is_transparent_shows_what_is_behind() -> None:
    """MuJoCo blends it twice, from front to back and from back to front: 1 - (1 - alpha)^2 of its color."""
    glass = '<body pos="0 0 .5"><geom type="box" size=".3 .3 .01" rgba="0 0 1 .3"/></body>'
    model, data = scene_of(CAMERA + '<geom type="plane" size="2 2 .1" rgba="1 0 0 1"/>' + glass)
    model.vis.headlight.specular[:] = 0
    picture = SoftwareRenderer().render(model, data, View("down", 100, 100, rotated=False), Scene("glass"))
    share = 1 - 0.7**2
    np.testing.assert_allclose(picture[50, 50], [127.5 * (1 - share), 0, 127.5 * share], atol=2)


def test_a_floor_that_goes_on_behind_the_camera() -> None:
    model, data = scene_of(
        '<camera name="along" pos="0 0 .1" euler="90 0 0"/><geom type="plane" size="5 5 1" rgba="0 1 0 1"/>'
    )
    picture = SoftwareRenderer().render(model, data, View("along", 100, 100, rotated=False), Scene("floor"))
    assert (picture[55:, :, 1] > 0).all() and not picture[:45].any()


@pytest.mark.parametrize("height", [0.5, 1.9], ids=["before the camera", "through its plane"])
def test_what_moves_has_the_texture_of_what_does_not(height: float) -> None:
    """A slope that is seen from near and far; of the background, each pixel asks how much its texture is reduced."""
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><asset><texture name="t" type="2d" builtin="checker" rgb1="0 0 0" rgb2="1 1 1" width="64" '
        'height="64"/>'
        '<material name="m" texture="t" texrepeat="12 12"/></asset><worldbody>'
        f'{CAMERA}<body pos="0 0 {height}" euler="0 60 0"><freejoint/>'
        '<geom type="box" size="1.2 1 .02" material="m"/></body></worldbody></mujoco>'
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    view = View("down", 200, 200, rotated=False)
    moving, still = (
        SoftwareRenderer().render(model, data, view, Scene(name, frozenset(bodies))).astype(int)
        for name, bodies in (("moving", [0]), ("still", [0, 1]))
    )
    assert still.std() > 20
    assert abs(moving - still).mean() <= 1.0


@pytest.mark.parametrize(
    "light",
    ['<light pos="0 0 3" dir="0 0 -1"/>', 2 * '<light directional="true" pos="0 0 3" dir="1 0 -1"/>'],
    ids=["spot", "two shadows"],
)
def test_lights_that_it_does_not_know_are_refused(light: str) -> None:
    model, data = scene_of(CAMERA + light + '<geom type="sphere" size=".1"/>')
    with pytest.raises(ValueError, match="knows directional lights, one of them with shadows; use renderer='egl'"):
        SoftwareRenderer().render(model, data, View("down", 16, 16, rotated=False), Scene("light"))


def test_a_diverged_simulation_is_an_error() -> None:
    simulator = placed("reach-v3")
    simulator.data.geom_xpos[21] = np.nan  # a link of the arm
    with pytest.raises(ValueError, match="poses are not finite"):
        draw(simulator, View("corner2", 16, 16))
