"""Files and folders that appear complete or not at all, and JSON.

What is written gets a hidden temporary name in the same directory, is flushed to disk, and is renamed, so a kill or a
full disk leaves the previous state. A folder that cannot be renamed (a mount point), or should not be (the working
directory of a shell), keeps its place and its entries are exchanged one by one, in an order that
:func:`finish_exchange` can complete after a kill.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sb3_vla.common.errors import DamagedError, ExpectedError, NotThereError, file_errors
from sb3_vla.common.paths import local_path

# Prefix of our temporary entries inside a folder that cannot be renamed.
_OURS = ".sb3-vla-"
_READY, _PLACING, _OLD = (f"{_OURS}{name}" for name in ("ready", "placing", "old"))


def temporary_path(path: Path, process: int | None = None) -> Path:
    """The hidden name, with the same suffix, under which a process writes a file until it is complete.

    :param process: id of the process; None for this one.
    """
    return path.with_name(f".{path.stem}.{os.getpid() if process is None else process}.tmp{path.suffix}")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to ``path`` at the end and deleted on an error.

    :param path: of the file; its folder is created, and a link to a file stays one.
    :raises StorageError: if it cannot be written.
    """
    path = local_path(path).resolve()
    temporary = temporary_path(path)
    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_to_disk(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) with :func:`whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike[str], content: Any, *, indent: int | None = 2, default: Callable[[Any], Any] | None = None
) -> None:
    """Write a JSON file with :func:`whole_file`.

    :param indent: see :func:`json.dumps`.
    :param default: converts what is no JSON type; see :func:`json.dumps`.
    """
    write_text(path, json.dumps(content, indent=indent, default=default) + "\n")


def read_json(path: Path, expected: type = dict) -> Any:
    """The content of a JSON file.

    :param expected: type of the content, an object by default.
    :raises NotThereError: if there is no file.
    :raises DamagedError: if it is not JSON, or of another type.
    :raises StorageError: if the system cannot read it.
    """
    if not path.exists():
        raise NotThereError(f"There is no {path}")
    try:
        with file_errors("read", path):
            content = json.loads(path.read_bytes())
    except ValueError as error:  # of JSON or of UTF-8
        raise DamagedError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(content, expected):
        kind = "an object" if expected is dict else expected.__name__
        raise DamagedError(f"{path} is damaged: expected {kind}, found {type(content).__name__}")
    return content


def hidden_beside(folder: Path, name: str) -> Path:
    """A hidden path for what belongs to a folder: beside it, or inside one that cannot be renamed.

    :param folder: resolved.
    """
    return folder / f"{_OURS}{name}" if _stays(folder) else folder.parent / f".{folder.name}.{name}"


def entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted, without temporary ones; empty if there is no folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(_OURS)) if folder.is_dir() else []


def _any(_: Path) -> None:
    """A check that lets everything be replaced."""


@contextmanager
def whole_folder(
    folder: str | os.PathLike[str], check: Callable[[Path], None] = _any, *, keep: bool = True
) -> Iterator[Path]:
    """A folder to write into, which replaces what is under its name when the block ends.

    :param check: see :func:`begin_folder`.
    :param keep: see :func:`finish_folder`.
    :raises StorageError: if it cannot be written.
    """
    partial = begin_folder(folder, check)
    try:
        with file_errors("write", local_path(folder)):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_folder(partial, folder, check, keep=keep)


def begin_folder(folder: str | os.PathLike[str], check: Callable[[Path], None] = _any) -> Path:
    """An empty folder ``.<name>.*.partial`` to write into, for :func:`finish_folder`.

    :param check: raises if what is there must not be replaced; called before the work and after it, with the folder
        that a link to a folder points to.
    :raises StorageError: if nothing can be written there.
    """
    folder = finish_exchange(folder)
    check(folder)
    with file_errors("write", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = hidden_beside(folder, "")
        return Path(tempfile.mkdtemp(prefix=place.name, suffix=".partial", dir=place.parent))


def finish_folder(
    partial: Path, folder: str | os.PathLike[str], check: Callable[[Path], None] = _any, *, keep: bool = True
) -> None:
    """Rename a folder of :func:`begin_folder` to its final name.

    :param keep: on an error, keep what was written; the message says where.
    :raises ExpectedError: if that fails.
    """
    folder = local_path(folder).resolve()
    try:
        with file_errors("write", folder):
            partial.chmod(0o755)  # mkdtemp makes a private folder
            for path in [*partial.rglob("*"), partial]:
                flush_to_disk(path)
            check(folder)
            _put(partial, folder)
    except BaseException as error:
        if keep and isinstance(error, ExpectedError):
            kept = partial if partial.is_dir() else folder
            raise type(error)(f"{error}; what was to be there is complete in {kept}") from error
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_exchange(folder: str | os.PathLike[str]) -> Path:
    """Complete or undo the replacement of a folder by a process that was killed meanwhile.

    :return: the folder; of a link what it points to.
    """
    folder = local_path(folder).resolve()
    if not folder.exists() and _replaced(folder).is_dir():
        os.replace(_replaced(folder), folder)
    _exchange(folder)
    return folder


def finish_exchanges(parent: Path) -> None:
    """:func:`finish_exchange` for all folders in a folder."""
    for replaced in parent.glob(".*.old"):
        finish_exchange(parent / replaced.name.removeprefix(".").removesuffix(".old"))


def flush_to_disk(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(partial, folder)
    elif partial.parent == folder:
        shutil.rmtree(folder / _OLD, ignore_errors=True)  # of a writer that was killed
        os.replace(partial, folder / _READY)
        _exchange(folder)
    else:
        replaced = _replaced(folder)
        shutil.rmtree(replaced, ignore_errors=True)  # of a writer that was killed
        os.replace(folder, replaced)
        try:
            os.replace(partial, folder)
        except BaseException:
            os.replace(replaced, folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    with suppress(OSError):  # the folder is in place
        flush_to_disk(folder.parent)


def _exchange(folder: Path) -> None:
    """Replace the entries of a folder by those of ``_READY``, if that exists; each step can be repeated."""
    ready, placing, old = (folder / name for name in (_READY, _PLACING, _OLD))
    if ready.is_dir():
        old.mkdir(exist_ok=True)
        for entry in entries(folder):
            os.replace(entry, old / entry.name)
        os.replace(ready, placing)
    if placing.is_dir():
        for entry in list(placing.iterdir()):
            os.replace(entry, folder / entry.name)
        placing.rmdir()
        shutil.rmtree(old, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    """Where a folder lies at the moment when another replaces it."""
    return folder.with_name(f".{folder.name}.old") if folder.name else folder / _OLD


def _stays(folder: Path) -> bool:
    """Whether a folder cannot, or should not, be renamed."""
    if not folder.is_dir():
        return False
    with suppress(FileNotFoundError):  # the working directory may be gone
        if Path.cwd().is_relative_to(folder):
            return True
    return folder.is_mount() or folder in _mount_points() or not os.access(folder.parent, os.W_OK | os.X_OK)


def _mount_points() -> set[Path]:
    """The kernel's list, which has also bind mounts from the same file system; a device number does not tell them."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])) for line in lines}
