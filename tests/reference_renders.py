"""MuJoCo's own pictures of the tasks, as a reference for renderers: drawn by OpenGL now, or stored small.

    python tests/reference_renders.py --table              how far the software renderer is from each of them
    python tests/reference_renders.py --sheet sheet.png    both, one below the other, to look at
    python tests/reference_renders.py --write              the stored pictures anew, after a change of versions

All of these need OpenGL and take about three minutes. The pictures show three moments of an episode that a scripted
expert plays: after the reset, half-way, and at success. The stored ones are averages over squares of 5x5 pixels.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mw_envs import TASKS, Trial
from mw_envs.experts import ScriptedExpert
from mw_envs.rendering import Renderer, View, renderer_available
from mw_envs.rendering.software.renderer import SoftwareRenderer
from mw_envs.simulation.scene import Simulator

Picture = npt.NDArray[np.uint8]

STORED = Path(__file__).parent / "data" / "reference_renders.npz"
SIZE = 480
BOX = 5  # pixels along a side of what becomes one stored pixel
CAMERA = "corner2"
OTHER_CAMERAS = ("topview", "corner3", "gripperPOV")
# Tasks that the other cameras see as well: with a textured tool, with glass, with a goal that is high up.
TASKS_OF_OTHER_CAMERAS = ("hammer-v3", "window-open-v3", "basketball-v3")
MOMENTS = ("reset", "half-way", "success")
VERSIONS = {package: version(package) for package in ("mujoco", "metaworld")}
_PATCH = 3  # stored pixels along a side of the region in which the pictures are to agree
_SETTLE_STEPS = 15
_EPISODE_STEPS = 500
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class Moments(NamedTuple):
    """Three moments of an episode.

    :param trial: which episode.
    :param states: MuJoCo's integration states, float64 (3, n).
    :param sites: where MetaWorld shows its markers, which it moves after the simulation, meters, float64 (3, sites, 3).
    """

    trial: Trial
    states: npt.NDArray[np.float64]
    sites: npt.NDArray[np.float64]


class Likeness(NamedTuple):
    """How far one picture is from another, both averaged over squares of 5x5 pixels.

    :param mean: mean absolute difference, 0..255.
    :param worst: the largest such mean over 3x3 squares; a small thing that is missing shows here.
    """

    mean: float
    worst: float


def cameras_of(task: str) -> tuple[str, ...]:
    """The cameras that a task is drawn through."""
    return (CAMERA, *OTHER_CAMERAS) if task in TASKS_OF_OTHER_CAMERAS else (CAMERA,)


def pooled(picture: Picture) -> npt.NDArray[np.float64]:
    """A picture's averages over squares of 5x5 pixels, (..., height / 5, width / 5, 3)."""
    *outer, height, width, _ = picture.shape
    return picture.reshape(*outer, height // BOX, BOX, width // BOX, BOX, 3).mean(axis=(-4, -2))


def likeness(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating | np.uint8]) -> Likeness:
    """How far two pooled pictures are from each other."""
    distance = np.abs(one - other).mean(-1)
    patches = np.lib.stride_tricks.sliding_window_view(distance, (_PATCH, _PATCH))
    return Likeness(float(distance.mean()), float(patches.mean((-2, -1)).max()))


def play(task: str) -> Moments:
    """The moments of an episode at whose first goal of ten the scripted expert succeeds.

    :raises RuntimeError: if it reaches none.
    """
    simulator, expert = Simulator(task), ScriptedExpert(task)
    for goal in range(10):
        trial = Trial(task, 0, goal)
        observation = simulator.place(trial)
        for _ in range(_SETTLE_STEPS):
            observation, _, _ = simulator.step(np.zeros(4, np.float32))
        shown = [_shown(simulator)]
        for _ in range(_EPISODE_STEPS):
            observation, _, success = simulator.step(expert.action(observation))
            shown.append(_shown(simulator))
            if success:
                states, sites = zip(*(shown[step] for step in (0, len(shown) // 2, -1)), strict=True)
                return Moments(trial, np.stack(states), np.stack(sites))
    raise RuntimeError(f"The expert of {task} reaches none of ten goals")


def _shown(simulator: Simulator) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    state = np.empty(mujoco.mj_stateSize(simulator.model, _STATE))
    mujoco.mj_getState(simulator.model, simulator.data, state, _STATE)
    return state, simulator.data.site_xpos.copy()


def show(simulator: Simulator, moments: Moments) -> Iterator[None]:
    """Take a simulator to each moment in turn, ready to be drawn.

    :raises ValueError: if its model is not the one that the states are of.
    """
    simulator.place(moments.trial)
    size = mujoco.mj_stateSize(simulator.model, _STATE)
    if moments.states.shape[1] != size:
        raise ValueError(
            f"A state of {moments.trial.task} has {size} numbers, the stored one {moments.states.shape[1]}: the model "
            "has changed; draw the pictures anew: python tests/reference_renders.py --write"
        )
    for state, sites in zip(moments.states, moments.sites, strict=True):
        mujoco.mj_setState(simulator.model, simulator.data, state, _STATE)
        mujoco.mj_forward(simulator.model, simulator.data)
        simulator.data.site_xpos[:] = sites
        yield


def view_of(camera: str, size: int = SIZE) -> View:
    """The full view of a camera as the environments show it."""
    return View(camera, size, size, rotated=camera.startswith("corner"))


def drawn(moments: Moments, cameras: Sequence[str], renderer: Renderer, size: int = SIZE) -> Picture:
    """A renderer's pictures of the moments, uint8 (cameras, 3, size, size, 3)."""
    simulator = Simulator(moments.trial.task)
    pictures = [
        [renderer.render(simulator.model, simulator.data, view_of(camera, size), simulator.scene) for camera in cameras]
        for _ in show(simulator, moments)
    ]
    return np.stack(pictures, axis=1)


# In a process of its own: OpenGL is chosen when MuJoCo is imported, and whoever compares need not have it.
_STOCK = """
import sys
import mujoco
import numpy as np

model_file, moments_file, pictures_file, size, *cameras = sys.argv[1:]
model = mujoco.MjModel.from_binary_path(model_file)
moments = np.load(moments_file)
data = mujoco.MjData(model)
pictures = []
with mujoco.Renderer(model, int(size), int(size)) as renderer:
    for state, sites in zip(moments["states"], moments["sites"]):
        mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(model, data)
        data.site_xpos[:] = sites
        for camera in cameras:
            renderer.update_scene(data, camera=camera)
            pictures.append(renderer.render())
np.savez(pictures_file, pictures=np.stack(pictures))
"""


def stock(moments: Moments, cameras: Sequence[str], opengl: str, size: int = SIZE) -> Picture:
    """MuJoCo's pictures of the moments at default quality, as the environments turn them; as :func:`drawn`.

    :param opengl: ``egl`` or ``osmesa``.
    """
    simulator = Simulator(moments.trial.task)
    simulator.place(moments.trial)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("model.mjb", "moments.npz", "pictures.npz")]
        mujoco.mj_saveModel(simulator.model, files[0], None)
        np.savez(files[1], states=moments.states, sites=moments.sites)
        command = [sys.executable, "-c", _STOCK, *files, str(size), *cameras]
        subprocess.run(command, check=True, env={**os.environ, "MUJOCO_GL": opengl})
        pictures = np.load(files[2])["pictures"].reshape(len(MOMENTS), len(cameras), size, size, 3).swapaxes(0, 1)
    return np.stack(
        [
            of_camera[:, ::-1, ::-1] if view_of(camera).rotated else of_camera
            for camera, of_camera in zip(cameras, pictures, strict=True)
        ]
    )


def stored() -> tuple[dict[str, str], dict[str, tuple[Moments, Picture]]]:
    """The versions of the packages that the stored pictures are of, and moments and pooled pictures by task."""
    with np.load(STORED) as file:
        versions = {package: str(file[package]) for package in VERSIONS}
        pictures = {
            task: (
                Moments(Trial(task, 0, int(file[f"{task}/goal"])), file[f"{task}/states"], file[f"{task}/sites"]),
                file[f"{task}/pictures"],
            )
            for task in TASKS
        }
    return versions, pictures


def _write(references: dict[str, tuple[Moments, Picture]]) -> None:
    arrays: dict[str, npt.ArrayLike] = {}
    for task, (moments, pictures) in references.items():
        arrays[f"{task}/goal"] = moments.trial.goal
        arrays[f"{task}/states"], arrays[f"{task}/sites"] = moments.states, moments.sites
        arrays[f"{task}/pictures"] = np.rint(pooled(pictures)).astype(np.uint8)
    np.savez_compressed(STORED, **VERSIONS, **arrays)  # type: ignore[arg-type]
    print(f"{STORED}: {STORED.stat().st_size / 1e6:.2f} MB")


def _table(references: dict[str, tuple[Moments, Picture]], own: dict[str, Picture]) -> None:
    """Mean absolute difference of every picture at 480x480, and the worst patch of any moment."""
    titles = "".join(f"{moment:>10}" for moment in MOMENTS)
    print(f"{'mean absolute difference of 255':44}{titles}{'worst patch':>14}")
    errors, usual = [], []
    for task, (_, pictures) in references.items():
        for camera, ours, theirs in zip(cameras_of(task), own[task], pictures, strict=True):
            means = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(ours, theirs, strict=True)]
            worst = max(likeness(pooled(a), pooled(b)).worst for a, b in zip(ours, theirs, strict=True))
            print(f"{task:32}{camera:12}" + "".join(f"{mean:10.2f}" for mean in means) + f"{worst:14.1f}")
            errors += means
            usual += means if camera == CAMERA else []
    print(f"{CAMERA}: median {np.median(usual):.2f}, largest {max(usual):.2f}; all cameras: largest {max(errors):.2f}")


def _sheet(references: dict[str, tuple[Moments, Picture]], own: dict[str, Picture], path: Path) -> None:
    """All tasks, four in a row, each with its three moments: ours above, MuJoCo's below."""
    columns, side, title = 4, SIZE // 4, 14
    width, height = len(MOMENTS) * side + 8, 2 * side + title
    sheet = Image.new("RGB", (columns * width, -(-len(references) // columns) * height), "white")
    for number, (task, (_, pictures)) in enumerate(references.items()):
        left, top = number % columns * width, number // columns * height
        ImageDraw.Draw(sheet).text((left + 2, top + 1), task, fill="black")
        for row, of_one in enumerate((own[task][0], pictures[0])):
            for column, picture in enumerate(of_one):
                small = Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), Image.Resampling.BOX)
                sheet.paste(small, (left + column * side, top + title + row * side))
    sheet.save(path)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the differences of all pictures")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of all tasks there")
    parser.add_argument("--write", action="store_true", help=f"write {STORED.name} anew")
    options = parser.parse_args()
    if not (options.table or options.sheet or options.write):
        parser.error("nothing to do: give --table, --sheet or --write")
    opengl = next((kind for kind in ("egl", "osmesa") if renderer_available(kind)), None)
    if opengl is None:
        parser.error("neither EGL nor OSMesa works on this machine, and MuJoCo's own pictures need one of them")
    warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")  # experts' gains, MetaWorld's own
    references, own, renderer = {}, {}, SoftwareRenderer()
    for task in TASKS:
        moments = play(task)
        references[task] = moments, stock(moments, cameras_of(task), opengl)
        if options.table or options.sheet:
            own[task] = drawn(moments, cameras_of(task), renderer)
    if options.write:
        _write(references)
    if options.table:
        _table(references, own)
    if options.sheet:
        _sheet(references, own, options.sheet)


if __name__ == "__main__":
    main()
