"""
``sb3-vla doctor``: what this machine can do, what it lacks, and how to get that.

It is asked when something does not work. So this file imports nothing but the standard library, and whatever may fail,
hang or crash (torch, MuJoCo, OpenGL) is tried in a process of its own. A check that fails is one line of the answer.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 1024**3
# What the quickstart takes: its learner with the demonstrations, and each worker process with ten scenes (measured: 1.1
# GiB before the first update, 0.6 GiB); what it writes, with the caches beside it.
LEARNER_MEMORY, WORKER_MEMORY, MOST_WORKERS = 2 * GIB, 0.7 * GIB, 16
QUICKSTART_DISK, QUICKSTART_SHARED = 1 * GIB, GIB // 64
_SHOWN_PACKAGES = ("torch", "stable-baselines3", "gymnasium", "metaworld", "mujoco", "numpy")


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    :param group: the heading under which it stands
    :param name: what was looked at
    :param state: ``ok``; ``note``, for what the quickstart can do without; ``missing``, for what it needs
    :param value: what was found
    :param remedy: what to do about it; empty where there is nothing to do
    """

    group: str
    name: str
    state: str
    value: str
    remedy: str = ""


def examine(checks: Sequence[Callable[[], Iterator[Finding]]] | None = None) -> Iterator[Finding]:
    """
    Run the checks, each by itself: one that raises is reported, and the others go on.

    :param checks: None for all
    :return: what they find, as it is found
    """
    for check in CHECKS if checks is None else checks:
        try:
            yield from check()
        except Exception as error:  # whatever this machine makes it raise
            name = check.__name__.removeprefix("check_").replace("_", " ")
            yield Finding("Not checked", name, "note", f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command: print what was found.

    :param arguments: of the command line, after ``doctor``
    :return: 0 if the quickstart can run here, 1 if not
    """
    parser = argparse.ArgumentParser(prog="sb3-vla doctor", description="Say what this machine can do.")
    parser.add_argument("--json", action="store_true", help="as JSON, for other programs")
    as_json = parser.parse_args(arguments).json
    findings: list[Finding] = []
    for finding in examine():
        if not as_json:
            if not findings or finding.group != findings[-1].group:
                print(f"\n{finding.group}")
            print(f"  {finding.state:9}{finding.name:26} {finding.value}", flush=True)
            if finding.remedy:
                print(f"{'':11}-> {finding.remedy}")
        findings.append(finding)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if as_json:
        print(json.dumps({"quickstart": not missing, "findings": [asdict(finding) for finding in findings]}, indent=2))
    elif missing:
        print(f"\nThe quickstart cannot run here. It needs: {', '.join(missing)}.")
    else:
        print("\nThe quickstart can run here: sb3-vla train quickstart")
    return 1 if missing else 0


# Checks of this process's surroundings


def check_python() -> Iterator[Finding]:
    """Python's version against the range of the package."""
    from packaging.specifiers import SpecifierSet

    found, wanted = platform.python_version(), importlib.metadata.metadata("sb3-vla")["Requires-Python"] or ""
    fits = SpecifierSet(wanted).contains(found, prereleases=True)
    remedy = "install such a version, then: PYTHON=/its/path bash examples/setup.sh"
    yield _judged("Software", "Python", fits, f"{found}, wanted {wanted}", remedy)


def check_packages() -> Iterator[Finding]:
    """Installed versions against the ranges of the package; those of its extras are notes."""
    from packaging.requirements import Requirement

    metadata = importlib.metadata.metadata("sb3-vla")
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    needed = [part for part in requirements if part.marker is None or part.marker.evaluate({"extra": ""})]
    wanted_by = {"": needed}
    for extra in metadata.get_all("Provides-Extra") or []:
        if extra != "dev":
            wanted_by[extra] = [part for part in requirements if part.marker and part.marker.evaluate({"extra": extra})]
    found: dict[str, str] = {}
    for extra, parts in wanted_by.items():
        for part in parts:
            try:
                found[part.name] = importlib.metadata.version(part.name)
            except importlib.metadata.PackageNotFoundError:
                found[part.name] = ""
            fits = found[part.name] != "" and part.specifier.contains(found[part.name], prereleases=True)
            wanted = f"wanted {part.specifier}" if part.specifier else "any version will do"
            what = f'"sb3-vla[{extra}]"' if extra else f'"{part.name}{part.specifier}"'
            if extra or not fits:
                value = f"{found[part.name] or 'not installed'}, {wanted}"
                group = "Extras" if extra else "Software"
                yield _judged(group, part.name, fits, value, f"python -m pip install {what}", needed=not extra)
        if not extra:
            shown = ", ".join(f"{name} {found[name]}" for name in _SHOWN_PACKAGES if found.get(name))
            yield Finding("Software", "packages", "ok", f"{len(parts)} are needed; among them {shown}")


def check_machine() -> Iterator[Finding]:
    """Cores, memory, disk, and the shared memory through which workers send pictures."""
    from mw_envs.machine import memory, usable_cores

    cores = usable_cores()
    workers = min(cores, MOST_WORKERS)
    yield Finding("Machine", "cores", "ok", f"{cores}, so {workers} worker processes in the quickstart")
    free, total = memory()
    least, usual = (LEARNER_MEMORY + count * WORKER_MEMORY for count in (1, workers))
    value = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}; the quickstart takes about {usual / GIB:.1f}"
    remedy = "end other programs, or start it on fewer cores: taskset -c 0 sb3-vla train quickstart"
    yield _judged("Machine", "memory", free >= usual, value, remedy, needed=free < least)
    disk = shutil.disk_usage(Path.cwd())
    value = f"{disk.free / GIB:.1f} GiB free in {Path.cwd()}; the quickstart writes {QUICKSTART_DISK / GIB:.0f}"
    yield _judged("Machine", "disk", disk.free >= QUICKSTART_DISK, value, "free some, or give another run=DIRECTORY")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm")
        value = f"{shared.free / GIB:.2f} GiB free in /dev/shm"
        remedy = "in a container, start it with --shm-size=1g"
        yield _judged("Machine", "shared memory", shared.free >= QUICKSTART_SHARED, value, remedy)


def check_folders() -> Iterator[Finding]:
    """Whether what is written can be: runs, and what is kept from one start to the next."""
    value = f"runs are written below {Path.cwd()}"
    yield _judged("Folders", "runs", _writable(Path.cwd()), value, "start in a folder that you may write to")
    given = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache"))  # as it stands without a home
    models = Path(os.environ.get("HF_HOME") or caches / "huggingface")
    for name, folder, variable, without in (
        ("compiled scenes", caches / "mw_envs", "XDG_CACHE_HOME", "each change of task takes 0.1 s more"),
        ("published models", models, "HF_HOME", "they cannot be downloaded"),
    ):
        fits = folder.parts[0] != "~" and _writable(folder)
        value = f"{folder}{'' if fits else f' cannot be written: {without}'}"
        yield _judged("Folders", name, fits, value, f"set {variable} to a folder that you may write to", needed=False)


# Checks by processes of their own


def check_import() -> Iterator[Finding]:
    """Whether the package can be imported at all."""
    answer = _probe("package")
    error = answer.get("error", "")
    yield _judged("Programs", "import sb3_vla", not error, error or "works", _remedy(error, "import sb3_vla.cli.main"))


def check_renderer() -> Iterator[Finding]:
    """Whether the environment steps and is drawn, and how fast; OpenGL is a note."""
    answer = _probe("environment")
    if "error" in answer:
        code = "import gymnasium; gymnasium.make('mw_envs:MetaWorldMT1-v0', task='reach-v3').reset()"
        yield _judged("Programs", "software renderer", False, answer["error"], _remedy(answer["error"], code))
    else:
        compiled = "compiled just now" if answer["compiled_now"] else "was compiled before"
        value = f"works; {compiled}; first picture after {answer['first_seconds']:.1f} s"
        yield Finding("Programs", "software renderer", "ok", value)
        folder = answer["folder"]
        value = f"kept in {folder}" if folder else "kept nowhere: each process compiles anew, for half a minute"
        remedy = "set NUMBA_CACHE_DIR to a folder that you may write to and that stays"
        stays = folder and not Path(folder).is_relative_to(tempfile.gettempdir())
        yield _judged("Programs", "compiled renderer", bool(stays), value, remedy, needed=False)
        value = f"{answer['steps_per_second']:.0f} steps/s in one process, a 96x96 picture each 5 steps"
        yield Finding("Programs", "environment", "ok", value)
    for kind in ("egl", "osmesa"):
        answer = _probe(kind)
        value = answer.get("error", "works; not needed")
        yield _judged("Programs", f"OpenGL by {kind}", "error" not in answer, value, "", needed=False)


def check_videos() -> Iterator[Finding]:
    """The H.264 encoder that comes with PyAV."""
    answer = _probe("videos")
    value = answer.get("error", f"H.264 by PyAV {answer.get('version')}")
    remedy = "python -m pip install --force-reinstall av; or do without: evaluation.videos_per_task=0"
    yield _judged("Programs", "videos", "error" not in answer, value, remedy)
    program = shutil.which("ffmpeg")
    yield Finding("Programs", "ffmpeg program", "ok" if program else "note", f"{program or 'none'}; not needed")


def check_accelerator() -> Iterator[Finding]:
    """GPUs as torch sees them, and bfloat16."""
    answer = _probe("torch")
    if "error" in answer:
        yield Finding("Accelerator", "torch", "note", answer["error"])
        return
    for device in answer["devices"]:
        precision = "bfloat16" if device["bf16"] else "no bfloat16"
        value = f"{device['free'] / GIB:.1f} GiB free of {device['total'] / GIB:.1f}, {precision}"
        yield Finding("Accelerator", device["name"], "ok", value)
    if not answer["devices"]:
        value, remedy = "none; the quickstart needs none", ""
        if Path("/proc/driver/nvidia/version").exists():
            value = f"an NVIDIA driver is here, but torch {answer['version']} sees no GPU: {answer['reason']}"
            remedy = "python -m pip install --force-reinstall torch, without an index of CPU builds; then nvidia-smi"
        yield Finding("Accelerator", "GPU", "note", value, remedy)
    flags = _read("/proc/cpuinfo")
    has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    value = "bfloat16 in hardware" if has_bf16 else "no bfloat16 in hardware: float32"
    yield Finding("Accelerator", "processor", "ok", value)


def check_models() -> Iterator[Finding]:
    """How large the models are; what training takes is told of the recipes."""
    answer = _probe("package")
    if "error" in answer:
        yield Finding("Models", "models", "note", "unknown, since sb3_vla cannot be imported")
        return
    _, free, where = _where_the_learner_is()
    for name, sizes in answer.items():
        if "error" in sizes:
            yield Finding("Models", name, "note", f"unknown: {sizes['error']}")
            continue
        weights = sizes["bytes"]
        fits = "" if weights <= free else " (does not fit)"
        value = f"{sizes['parameters'] / 1e6:,.1f} M parameters, {weights / GIB:.1f} GiB{fits}"
        yield Finding("Models", name, "note" if fits else "ok", f"{value}; {free / GIB:.1f} free {where}")


def check_recipes() -> Iterator[Finding]:
    """Which recipes fit, by their memory plans."""
    answer = _probe("recipes")
    if "error" in answer:
        yield Finding("Recipes that fit", "recipes", "note", f"unknown: {answer['error']}")
        return
    from mw_envs.machine import available_memory

    apart, free, _ = _where_the_learner_is()
    main = available_memory()
    for name, needs in answer.items():
        if "error" in needs:
            yield Finding("Recipes that fit", name, "note", f"unknown: {needs['error']}")
            continue
        device, buffer = needs["device"], needs["buffer"]
        # Without a GPU learner and rollout share the memory.
        fits = device <= (1 - needs["headroom"]) * free and buffer + (0 if apart else device) <= main
        value = f"{'fits' if fits else 'does not fit'}: learner {device / GIB:.1f} GiB, rollout {buffer / GIB:.1f} GiB"
        remedy = "" if fits else f"sb3-vla train {name} --dry-run says what takes it; or take a recipe with compact"
        start = "" if needs["begins"] else "; from a checkpoint"
        yield Finding("Recipes that fit", name, "ok" if fits else "note", f"{value}{start}", remedy)


def _where_the_learner_is() -> tuple[bool, int, str]:
    """Whether it has memory of its own, how many bytes of it are free, and whose they are."""
    from mw_envs.machine import available_memory

    devices = _probe("torch").get("devices") or []
    if devices:
        return True, max(device["free"] for device in devices), "of the GPU"
    return False, available_memory(), "of the machine"


CHECKS = (
    check_python,
    check_packages,
    check_machine,
    check_folders,
    check_import,
    check_renderer,
    check_videos,
    check_accelerator,
    check_models,
    check_recipes,
)


# What the checks share


def _remedy(error: str, code: str) -> str:
    """What to do about a program that failed: only an import may be mended by another installation."""
    if error.startswith(("ImportError", "ModuleNotFoundError", "PackageNotFoundError", "it crashed")):
        return "install again: bash examples/setup.sh"
    return f'see all that it says: python -c "{code}"'


def _judged(group: str, name: str, fits: bool, value: str, remedy: str, *, needed: bool = True) -> Finding:
    if fits:
        return Finding(group, name, "ok", value)
    return Finding(group, name, "missing" if needed else "note", value, remedy)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _writable(folder: Path) -> bool:
    """Whether a file can be written to a folder, or to the nearest one above it that exists."""
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError:
        return False
    return True


# Probes: functions that run in a process of their own and answer with JSON values


def _probe_environment() -> dict[str, Any]:
    import gymnasium as gym
    import numpy as np

    from mw_envs.rendering.software.warming import cache_folder, compiled_before

    compiled_now = not compiled_before()
    started = time.perf_counter()
    options: dict[str, Any] = {"image_size": 96, "crop": "workspace", "action_chunk": 5, "task": "reach-v3"}
    env = gym.make("mw_envs:MetaWorldMT1-v0", **options)
    env.reset(seed=0)
    first_seconds = time.perf_counter() - started
    steps, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < 1:
        _, _, terminated, truncated, _ = env.step(np.zeros((5, 4), np.float32))
        steps += 5
        if terminated or truncated:
            env.reset()
    return {
        "first_seconds": first_seconds,
        "compiled_now": compiled_now,
        "folder": cache_folder(),
        "steps_per_second": steps / elapsed,
    }


def _probe_egl() -> dict[str, Any]:
    from mw_envs.rendering import get_renderer

    get_renderer("egl")
    return {}


def _probe_osmesa() -> dict[str, Any]:
    from mw_envs.rendering import get_renderer

    get_renderer("osmesa")
    return {}


def _probe_videos() -> dict[str, Any]:
    import av

    av.codec.Codec("libx264", "w")
    return {"version": av.__version__}


def _probe_torch() -> dict[str, Any]:
    import torch

    devices, reason = [], "it is a build without CUDA"
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
        except Exception as error:  # of a driver that is too old, or a device that is in use
            reason = str(error)
    for number in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        with torch.cuda.device(number):
            free, total = torch.cuda.mem_get_info()
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            devices.append({"name": torch.cuda.get_device_name(), "free": free, "total": total, "bf16": bf16})
    return {"version": torch.__version__, "devices": devices, "reason": reason}


def _probe_package() -> dict[str, Any]:
    import torch

    import sb3_vla.cli.main
    import sb3_vla.recipes.launch  # noqa: F401
    from sb3_vla.models import MODELS

    sizes: dict[str, Any] = {}
    for name, kind in MODELS.items():
        make: Callable[[], Any] = kind
        try:
            with torch.device("meta"):  # nothing is allocated
                model = make()
            parameters = list(model.parameters())
            sizes[name] = {
                "parameters": sum(parameter.numel() for parameter in parameters),
                "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            }
        except Exception as error:  # a model that cannot be built like this does not hide the others
            sizes[name] = {"error": f"{type(error).__name__}: {error}"}
    return sizes


def _probe_recipes() -> dict[str, Any]:
    from sb3_vla.recipes.memory import footprint
    from sb3_vla.recipes.resolve import make_plan
    from sb3_vla.recipes.schema import load_recipe, recipe_names
    from sb3_vla.runs.memory_plan import HEADROOM

    found: dict[str, Any] = {}
    for name in recipe_names():
        try:
            recipe = load_recipe(name)
            if recipe.actor.model.model_type is None:
                continue  # as large as the checkpoint that it is given
            plan = make_plan(recipe)
            stages = footprint(plan).values()
        except Exception as error:  # a model that cannot be planned does not hide the others
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        found[name] = {
            "device": max(stage.device for stage in stages),
            "buffer": max(stage.buffer for stage in stages),
            "headroom": HEADROOM,
            "begins": plan.begins,
        }
    return found


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "environment": _probe_environment,
    "egl": _probe_egl,
    "osmesa": _probe_osmesa,
    "videos": _probe_videos,
    "torch": _probe_torch,
    "package": _probe_package,
    "recipes": _probe_recipes,
}


def answer_probe(name: str) -> None:
    """Run a probe in this process, and print its answer, or what stopped it, as the last line."""
    try:
        answer = PROBES[name]()
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(answer), flush=True)


@functools.cache
def _probe(name: str, timeout: float = 600) -> dict[str, Any]:
    """The answer of a probe; ``{"error": why}`` where it failed, crashed or took too long."""
    # This file alone: importing the package may be what fails.
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('doctor', {__file__!r})\n"
        "sys.modules['doctor'] = doctor = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(doctor)\n"
        f"doctor.answer_probe({name!r})"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:.0f} s"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        answer = None
    if isinstance(answer, dict):
        return answer
    if done.returncode < 0:
        return {"error": f"it crashed with {signal.Signals(-done.returncode).name}"}
    return {"error": f"it ended with status {done.returncode}: {''.join(done.stderr.splitlines()[-1:])}"}
