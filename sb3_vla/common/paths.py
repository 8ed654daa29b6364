"""The paths that settings name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sb3_vla.common.errors import InputError, file_errors


def local_path(setting: str | os.PathLike[str]) -> Path:
    """The path that a setting names: ``~`` and ``~user`` are home directories.

    :raises InputError: if there is no such user.
    """
    try:
        return Path(setting).expanduser()
    except RuntimeError as error:
        raise InputError(f"{setting}: no home directory is known for it; write the path out") from error


def writable_file(setting: str | os.PathLike[str], name: str) -> Path:
    """The path of an output file, checked before the work whose result it will hold; its folder is made.

    :param name: of the setting, for the message.
    :raises InputError: if it is a folder.
    :raises StorageError: if nothing can be written there.
    """
    path = local_path(setting)
    if path.is_dir():
        raise InputError(f"{name}={setting} is a folder; expected the name of a file")
    with file_errors("write", path):
        writable_folder(path.resolve().parent)
    return path


def writable_folder(folder: Path) -> None:
    """Make a folder, and check that this process may write to it.

    :raises OSError: if that is not so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
