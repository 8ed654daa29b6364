"""Where settings point, and how a finished folder gets there.

What takes long to make is written under a hidden name, and takes its place when it is whole. A folder takes the place
of another one by being renamed, which a mount point does not allow, and which would pull the ground from under a shell
in it; there the entries change places one by one, in an order from which :func:`finish_exchange` goes on after a kill.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sb3_vla.common.errors import ExpectedError, InputError, file_errors

# Begins the names of what is ours, and passing, inside a folder that cannot be renamed.
_OURS = ".sb3-vla-"
_READY, _PLACING, _OLD = (f"{_OURS}{name}" for name in ("ready", "placing", "old"))


def local_path(setting: str | os.PathLike[str]) -> Path:
    """The path that a setting means: ``~`` and ``~user`` are home directories.

    :raises InputError: if there is no such user.
    """
    try:
        return Path(setting).expanduser()
    except RuntimeError as error:
        raise InputError(f"{setting}: no home directory is known for it; write the path out") from error


def writable_file(setting: str | os.PathLike[str], name: str) -> Path:
    """The path of a file that is to be written after a work, found out before it.

    :param name: of the setting, for the message.
    :raises InputError: if it is a folder.
    :raises StorageError: if nothing can be written there.
    """
    path = local_path(setting)
    if path.is_dir():
        raise InputError(f"{name}={setting} is a folder; expected the name of a file")
    place = path.resolve().parent
    with file_errors("write", path):
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


def hidden_beside(folder: Path, name: str) -> Path:
    """A hidden path for what belongs to a folder: beside it, or in it where it cannot be renamed.

    :param folder: resolved.
    """
    return folder / f"{_OURS}{name}" if _stays(folder) else folder.parent / f".{folder.name}.{name}"


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in the order of the names, but for what is passing; nothing where there is no folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(_OURS)) if folder.is_dir() else []


@contextmanager
def whole_folder(folder: str | os.PathLike[str], check: Callable[[Path], None]) -> Iterator[Path]:
    """A folder to write into, which takes its name, and the place of what is there, when all is written.

    :param check: see :func:`begin_folder`.
    :raises StorageError: if it cannot be written.
    """
    partial = begin_folder(folder, check)
    try:
        with file_errors("write", local_path(folder)):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_folder(partial, folder, check)


def begin_folder(folder: str | os.PathLike[str], check: Callable[[Path], None]) -> Path:
    """An empty folder to write into, for :func:`finish_folder`.

    :param check: raises if what is there may not be replaced; it is asked before the work and after it, with the
        folder that a link to a folder points to.
    :raises StorageError: if nothing can be written there.
    """
    folder = finish_exchange(folder)
    check(folder)
    with file_errors("write", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = hidden_beside(folder, "")
        return Path(tempfile.mkdtemp(prefix=place.name, suffix=".partial", dir=place.parent))


def finish_folder(partial: Path, folder: str | os.PathLike[str], check: Callable[[Path], None]) -> None:
    """Give a folder of :func:`begin_folder` its name.

    :raises ExpectedError: if that fails; what was written is kept, and the message says where.
    """
    folder = local_path(folder).resolve()
    try:
        with file_errors("write", folder):
            partial.chmod(0o755)  # mkdtemp makes a private folder
            for path in [*partial.rglob("*"), partial]:
                flush_to_disk(path)
            check(folder)
            _put(partial, folder)
    except ExpectedError as error:
        kept = partial if partial.is_dir() else folder
        raise type(error)(f"{error}; what was to be there is complete in {kept}") from error
    except BaseException:  # a signal
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_exchange(folder: str | os.PathLike[str]) -> Path:
    """Bring a folder to the state that a writer left undone who was killed while it took its place.

    :return: the folder; of a link what it points to.
    """
    folder = local_path(folder).resolve()
    if not folder.exists() and _replaced(folder).is_dir():
        os.replace(_replaced(folder), folder)
    _exchange(folder)
    return folder


def flush_to_disk(path: Path) -> None:
    """Have the system write a file or a folder's list of names."""
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
    with suppress(OSError):  # it has its name
        flush_to_disk(folder.parent)


def _exchange(folder: Path) -> None:
    """Put the entries of ``_READY``, where there is one, in the place of the others; each step can be repeated."""
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
    """Where a folder lies for the instant in which another takes its place."""
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
    """As the kernel lists them: also those of a folder of the same file system, which a device number does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])) for line in lines}
