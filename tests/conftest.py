"""What every test shares: few threads, no process left behind, and fixtures for renderers and random generators."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

# Before torch and NumPy are imported, here and in the workers that inherit it: on a small machine a few workers with as
# many threads as there are cores each stand in one another's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

# A shell without job control starts its background jobs deaf to Ctrl-C, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXIT_SECONDS = 3.0  # how long a worker that was told to stop may take


# Files that take minutes begin first, or one of them would be running alone at the end.
LONG = ("test_quickstart", "test_launch", "test_demonstrations", "test_env", "test_recipes", "test_torchrun")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # the tests of mw_envs run without it

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def warm_fork_server() -> Iterator[None]:
    """The fork server's workers begin with all imports done and the renderer's machine code loaded, which else takes
    each of them two seconds. Commands that tests start in processes of their own have their own, ordinary one."""
    set_preload = forkserver.set_forkserver_preload

    def start(modules: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:  # the server does not get this process's sys.path in another way
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            set_preload([*modules, "warm_worker"])
            forkserver.ensure_running()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "set_forkserver_preload", start)
        yield


@pytest.fixture(scope="session")
def opengl() -> str:
    """The OpenGL renderer that works here, ``egl`` or ``osmesa``; a test that needs one is skipped where none does."""
    from mw_envs.rendering import renderer_available

    for kind in ("egl", "osmesa"):
        if renderer_available(kind):
            return kind
    pytest.skip("neither EGL nor OSMesa works on this machine")


@pytest.fixture
def toy_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy models can be chosen by name, one of each kind of prediction."""
    import toy  # the tests of mw_envs run without torch

    from sb3_vla.models import MODELS

    for name, model in toy.TOY_MODELS.items():
        monkeypatch.setitem(MODELS, name, model)


@pytest.fixture
def untouched_global_rng() -> Iterator[None]:
    """Fail a test that draws from, or seeds, one of the process's global random generators."""
    before = _global_rng_states()
    yield
    after = _global_rng_states()
    # A generator that the test itself imported has no state to compare with; request torch's by importing it first.
    changed = [name for name, state in before.items() if after[name] != state]
    if changed:
        pytest.fail(f"the test changed the global random state of: {', '.join(changed)}")


def _global_rng_states() -> dict[str, bytes]:
    states = {
        "random": repr(random.getstate()).encode(),
        "numpy": repr(
            [part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
        ).encode(),
    }
    torch = sys.modules.get("torch")  # not imported for a test that does without
    if torch is not None:
        states["torch"] = torch.random.get_rng_state().numpy().tobytes()
    return states


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail a test after which processes that it started still run.

    Those of fixtures with a wider scope are older than this fixture and not counted, nor are multiprocessing's own two
    helpers, which live until the interpreter ends.
    """
    before = set(descendants())
    yield
    deadline = time.monotonic() + EXIT_SECONDS
    while (left := {pid: command for pid, command in descendants().items() if pid not in before}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.02)
    if left:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # the next tests shall not suffer from it
        listing = "\n".join(f"  {pid}: {command}" for pid, command in left.items())
        pytest.fail(f"the test left processes behind; close its environments and workers:\n{listing}")


def descendants(of: int | None = None) -> dict[int, str]:
    """Process id and command line of every living descendant of a process, this one by default; empty where there is no
    /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            # The name in parentheses may itself hold spaces and parentheses.
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found: dict[int, str] = {}
    pending = [of or os.getpid()]
    while pending:
        parent_pid = pending.pop()
        for pid in children.get(parent_pid, []):
            pending.append(pid)
            with suppress(OSError):
                command = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
                # The fork server's workers have its command line, but they are not our children.
                helper = "multiprocessing.resource_tracker" in command or (
                    "multiprocessing.forkserver" in command and parent_pid == os.getpid()
                )
                if not helper:
                    found[pid] = command
    return found
