"""Compiled models of MetaWorld's scenes, kept on disk from one process to the next.

MuJoCo takes 0.12 s to compile a scene, and a compiled one is here again in 0.03 s. The 36 scenes of the 50 tasks are
21 MB each, most of it the robot, which they share. So one scene is stored whole, and of each other one what it has and
the first has not: 135 MB for all, below ``$XDG_CACHE_HOME`` or ``~/.cache``, which may be deleted at any time.

What is read is what was written or is not used: a file that is missing, damaged or cannot be written costs time and
nothing else. Files appear complete, so processes may read and write at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from mw_envs.errors import InputError
from mw_envs.rendering.view import explained_mujoco_import

with explained_mujoco_import():
    import metaworld
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

# The scene that is stored whole is this task's; any would do.
_WHOLE_TASK = "reach-v3"
_WHOLE_FILE = "whole.mjb"
# Content is cut where a word of four bytes, at any place, has one of 2**20 values in 2**32: so what is inserted or
# changed in one place moves no cut elsewhere. Pieces are 9 kB on average.
_MULTIPLIER, _SHIFT = np.uint32(2654435761), np.uint32(20)
_SHORTEST_PIECE = 64
_ADDED = -1  # in the place of a piece's start: it is not in the whole scene


def scene_file(task: str) -> Path:
    """The XML file of a task's scene; some tasks share one."""
    environment = ALL_V3_ENVIRONMENTS[task]
    return Path(environment.__new__(environment).model_name)  # a property that needs nothing of a constructed one


def load_model(xml: Path) -> mujoco.MjModel:
    """What MuJoCo compiles from a scene's XML file, to the last byte; from disk where it is there.

    :raises ValueError: if MuJoCo cannot compile the file.
    """
    try:
        model = _read(cache_directory(), xml.stem)
    except Exception:  # of any of the layers that read a file which is damaged or not there
        model = compile_model(xml)
        with suppress(OSError, RuntimeError):  # read-only, full; no home
            _write(cache_directory(), xml.stem, model_bytes(model))
    # What MuJoCo read the model from is free now. The C library keeps it, and would lay simulation data of 15 MB there,
    # nearly all of which is never touched but which would then be resident.
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return model


def compile_model(xml: Path) -> mujoco.MjModel:
    """The model of a scene's XML file.

    :raises ValueError: if MuJoCo cannot compile the file.
    """
    return mujoco.MjModel.from_xml_path(str(xml))


def model_bytes(model: mujoco.MjModel) -> npt.NDArray[np.uint8]:
    """A model in MuJoCo's binary format (MJB)."""
    content = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return content


@functools.cache
def cache_directory() -> Path:
    """Where models are kept; named after what they depend on, the version of MuJoCo and the content of all assets.

    :raises OSError: if the assets cannot be read.
    :raises RuntimeError: if the user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    assets = Path(metaworld.__file__).parent / "assets"
    digest = hashlib.sha256(f"{mujoco.__version__} {platform.machine()}".encode())
    for path in sorted(path for path in assets.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(assets)}\0{len(content)}\0".encode())
        digest.update(content)
    return root / "mw_envs" / f"models-{digest.hexdigest()[:24]}"


def _read(directory: Path, name: str) -> mujoco.MjModel:
    """A model from disk, which holds its bytes as runs: of the whole scene, or added ones.

    :raises Exception: of any kind, if it is not there or not what was written.
    """
    with np.load(directory / f"{name}.npz", allow_pickle=False) as stored:  # a zip file, which has checksums
        whole, runs, added = bytes(stored["whole"]), stored["runs"].tolist(), memoryview(stored["added"])
    # MuJoCo copies a file's content faster than a buffer's, and Linux copies from file to file.
    with (directory / _WHOLE_FILE).open("rb") as source, os.fdopen(os.memfd_create(name), "wb", 0) as model:
        if _digest(source) != whole:
            raise InputError(f"{source.name} is not what {name} was taken apart with")
        taken = 0
        for start, length in runs:
            if start == _ADDED:
                model.write(added[taken : taken + length])
                taken += length
            elif os.sendfile(model.fileno(), source.fileno(), start, length) != length:
                raise InputError(f"{source.name} is short")
        return mujoco.MjModel.from_binary_path(f"/proc/self/fd/{model.fileno()}")


def _write(directory: Path, name: str, content: npt.NDArray[np.uint8]) -> None:
    """Keep a model.

    :raises OSError: if that is not possible.
    """
    directory.mkdir(parents=True, exist_ok=True)
    whole = _whole_scene(directory / _WHOLE_FILE)
    known, start = {}, 0
    for piece in _pieces(whole):
        known[piece] = start
        start += len(piece)
    runs: list[list[int]] = []
    added = bytearray()
    for piece in _pieces(content):
        start = known.get(piece, _ADDED)
        if start == _ADDED:
            added += piece
        if runs and start == (_ADDED if runs[-1][0] == _ADDED else sum(runs[-1])):
            runs[-1][1] += len(piece)
        else:
            runs.append([start, len(piece)])
    with _appearing(directory / f"{name}.npz") as file:
        np.savez(
            file,
            whole=np.frombuffer(_whole_digest(), np.uint8),
            runs=np.array(runs),
            added=np.frombuffer(added, np.uint8),
        )


def _whole_scene(path: Path) -> npt.NDArray[np.uint8]:
    """The scene that is stored whole, which is written where it is not there or damaged."""
    with suppress(OSError), path.open("rb") as file:
        if _digest(file) == _whole_digest():
            return np.frombuffer(file.read(), np.uint8)
    content = model_bytes(compile_model(scene_file(_WHOLE_TASK)))
    with _appearing(path) as file:
        file.write(content.tobytes())
    return content


@functools.cache
def _whole_digest() -> bytes:
    return hashlib.sha256(model_bytes(compile_model(scene_file(_WHOLE_TASK))).tobytes()).digest()


def _pieces(content: npt.NDArray[np.uint8]) -> Iterator[bytes]:
    found = []
    for offset in range(4):
        words = np.frombuffer(content, "<u4", count=max(len(content) - offset, 0) // 4, offset=offset)
        found.append(4 * np.flatnonzero((words * _MULTIPLIER) >> _SHIFT == 1) + offset)
    cuts = np.sort(np.concatenate(found))
    cuts = cuts[np.diff(cuts, prepend=0) >= _SHORTEST_PIECE]
    for start, end in itertools.pairwise([0, *cuts.tolist(), len(content)]):
        yield content[start:end].tobytes()


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name when it is complete."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(file: IO[bytes]) -> bytes:
    """SHA-256 of a file; read once in a process, and again where it is not the same file any more."""
    status = os.fstat(file.fileno())
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _digests:
        _digests[key] = hashlib.sha256(file.read()).digest()
        file.seek(0)
    return _digests[key]


_digests: dict[tuple[int, ...], bytes] = {}
