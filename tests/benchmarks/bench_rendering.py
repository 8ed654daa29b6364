"""Pictures per second of the software renderer, and of MuJoCo's OpenGL in the same run, on one core.

    python tests/benchmarks/bench_rendering.py                           all tasks, about two minutes
    python tests/benchmarks/bench_rendering.py --tasks 5 --seconds 0.1   a glance

Each task is drawn at three moments of a scripted expert's episode in turn, so that no two pictures that follow one
another are the same. What happens once (the first picture of a process, of a task, of a view) is timed by itself.
MuJoCo's OpenGL is ``mujoco.Renderer`` at default quality. Both run on one core: the process is tied to it. Where other
processes run as well, the rate of processor time is the one to look at; targets are for it.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import mujoco
import numpy as np

from mw_envs import TASKS, Trial
from mw_envs.experts import ScriptedExpert
from mw_envs.rendering import CROPS, View, get_renderer, renderer_available
from mw_envs.simulation.scene import Simulator

VIEWS = {
    "480": View("corner2", 480, 480),
    "224": View("corner2", 224, 224),
    "96": View("corner2", 96, 96),
    "96 workspace": View("corner2", 96, 96, CROPS["workspace"]),
}
MOMENTS = (0, 40, 80)  # environment steps of the expert
OPENGL_TASKS = 3
TARGETS = {"480": 150.0, "224": 300.0}  # pictures per second
COMPILE_TARGET, START_TARGET = 60.0, 3.0  # seconds

# A process's life up to its first picture; it prints how long the picture itself took.
_FIRST_PICTURE = """
import time
from mw_envs import Trial
from mw_envs.rendering import View, get_renderer
from mw_envs.simulation.scene import Simulator

simulator = Simulator("reach-v3")
simulator.place(Trial("reach-v3", 0, 0))
start = time.perf_counter()
get_renderer("software").render(simulator.model, simulator.data, View("corner2", 480, 480), simulator.scene)
print(time.perf_counter() - start)
"""


def posed(task: str) -> tuple[Simulator, list[mujoco.MjData]]:
    """A simulator, and its data at three moments."""
    simulator, expert = Simulator(task), ScriptedExpert(task)
    observation = simulator.place(Trial(task, 0, 0))
    poses = []
    for step in range(MOMENTS[-1] + 1):
        if step in MOMENTS:
            poses.append(copy.copy(simulator.data))
        observation, _, _ = simulator.step(expert.action(observation))
    return simulator, poses


class Rate(NamedTuple):
    """Pictures per second of the clock, and of processor time."""

    wall: float
    cpu: float


def rate_of(draw: Callable[[mujoco.MjData], Any], poses: Sequence[mujoco.MjData], seconds: float) -> Rate:
    """The rate of drawing the poses in turn for so long, after once that does not count."""
    for data in poses:
        draw(data)
    pictures, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds or pictures < len(poses):
        draw(poses[pictures % len(poses)])
        pictures += 1
    return Rate(pictures / elapsed, pictures / (time.process_time() - cpu_start))


def software_rates(tasks: Sequence[str], seconds: float) -> tuple[dict[str, list[Rate]], list[float]]:
    """The rates by view, one a task; and the seconds that each task's first picture at 480 px takes."""
    renderer = get_renderer("software")
    rates: dict[str, list[Rate]] = {name: [] for name in VIEWS}
    first = []
    for task in tasks:
        simulator, poses = posed(task)
        start = time.perf_counter()
        renderer.render(simulator.model, poses[0], VIEWS["480"], simulator.scene)
        first.append(time.perf_counter() - start)
        for name, view in VIEWS.items():

            def draw(data: mujoco.MjData, simulator: Simulator = simulator, view: View = view) -> object:
                return renderer.render(simulator.model, data, view, simulator.scene)

            rates[name].append(rate_of(draw, poses, seconds))
    return rates, first


def opengl_rates(tasks: Sequence[str], seconds: float, core: int) -> dict[str, list[Rate]]:
    """As :func:`software_rates`, of full views, by MuJoCo's OpenGL; runs in a process of its own."""
    _tie_to(core)
    rates: dict[str, list[Rate]] = {}
    for task in tasks:
        simulator, poses = posed(task)
        for name, view in VIEWS.items():
            if view.crop != CROPS["full"]:
                continue
            with mujoco.Renderer(simulator.model, view.height, view.width) as renderer:

                def draw(data: mujoco.MjData, renderer: mujoco.Renderer = renderer) -> object:
                    renderer.update_scene(data, camera="corner2")
                    return renderer.render()

                rates.setdefault(name, []).append(rate_of(draw, poses, seconds))
    return rates


@contextmanager
def _opengl_process(platform_name: str) -> Iterator[ProcessPoolExecutor]:
    """A process for whom MuJoCo's OpenGL is this platform's, chosen when it imports MuJoCo."""
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = platform_name
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        if before is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = before


def process_seconds(cache: str) -> tuple[float, float]:
    """Seconds of a process that draws one picture, from its start, and of that picture alone."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _FIRST_PICTURE], env=environment, capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return elapsed, float(done.stdout)


def _tie_to(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def _verdict(value: float, target: float, unit: str, at_least: bool) -> str:
    met = value >= target if at_least else value <= target
    return f"target {'>=' if at_least else '<='} {target:g} {unit}: {'met' if met else 'MISSED'}"


def _print_machine(core: int) -> None:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    packages = " ".join(f"{name} {version(name)}" for name in ("mujoco", "metaworld", "numpy", "numba"))
    print(f"{cpu}, {os.cpu_count()} cores, on core {core}; Python {platform.python_version()}, {packages}")


def _print_start() -> None:
    with tempfile.TemporaryDirectory() as cache:
        whole, picture = process_seconds(cache)
        print(f"first process ever, compiling: {whole:6.1f} s, of which the picture {picture:.1f} s; ", end="")
        print(_verdict(whole, COMPILE_TARGET, "s", at_least=False))
        whole, picture = min(process_seconds(cache) for _ in range(3))
        print(f"a later process:               {whole:6.1f} s, of which the picture {picture:.1f} s; ", end="")
        print(_verdict(whole, START_TARGET, "s", at_least=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=len(TASKS), metavar="N", help="of the 50, at even distances")
    parser.add_argument("--seconds", type=float, default=0.3, help="measured for each task and view (OpenGL: 3 times)")
    parser.add_argument("--no-start", action="store_true", help="leave out the times of a process's start")
    options = parser.parse_args()
    if not 1 <= options.tasks <= len(TASKS):
        parser.error(f"--tasks {options.tasks}; expected 1 to {len(TASKS)}")
    warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")  # experts' gains, MetaWorld's own
    names = list(TASKS)
    tasks = [names[i * len(names) // options.tasks] for i in range(options.tasks)]

    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    _print_machine(core)
    if not options.no_start:
        _print_start()  # on all cores, as a user starts it
    _tie_to(core)
    rates, first = software_rates(tasks, options.seconds)
    print(
        f"a task's first picture at 480 px: median {1e3 * np.median(first):.0f} ms, largest {1e3 * max(first):.0f} ms"
    )

    stock: dict[str, list[Rate]] = {}
    compared = tasks[:: max(1, len(tasks) // OPENGL_TASKS)][:OPENGL_TASKS]
    opengl = next((kind for kind in ("egl", "osmesa") if renderer_available(kind)), None)
    if opengl is None:
        print("MuJoCo's OpenGL: neither EGL nor OSMesa works on this machine")
    else:
        with _opengl_process(opengl) as pool:
            stock = pool.submit(opengl_rates, compared, 3 * options.seconds, core).result()
        print(f"MuJoCo's OpenGL: {opengl}, default quality, {', '.join(compared)}")

    print(f"\npictures/s, {len(tasks)} tasks: of processor time (median, least, most), of the clock (median)")
    print(f"{'px':>14}{'median':>9}{'min':>8}{'max':>8}{'clock':>8}{'OpenGL':>9}{'clock':>8}{'ratio':>8}")
    for name, values in rates.items():
        wall, cpu = np.transpose(values)
        line = f"{name:>14}{np.median(cpu):9.0f}{cpu.min():8.0f}{cpu.max():8.0f}{np.median(wall):8.0f}"
        if name in stock:
            stock_wall, stock_cpu = np.median(stock[name], axis=0)
            ours = np.median([values[tasks.index(task)].cpu for task in compared])
            line += f"{stock_cpu:9.1f}{stock_wall:8.1f}{ours / stock_cpu:7.0f}x"
        if name in TARGETS:
            line = f"{line:72}  {_verdict(float(np.median(cpu)), TARGETS[name], 'pictures/s', at_least=True)}"
        print(line)


if __name__ == "__main__":
    main()
