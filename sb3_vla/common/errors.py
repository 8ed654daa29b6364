"""What a command tells in one message, see :mod:`mw_envs.errors`, and what can go wrong with files."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from safetensors import SafetensorError

from mw_envs.errors import ExpectedError, FailedError, InputError, InTheWayError, NotInstalledError, NotThereError

__all__ = [
    "DamagedError",
    "ExpectedError",
    "FailedError",
    "InTheWayError",
    "InputError",
    "NotInstalledError",
    "NotThereError",
    "RankLostError",
    "RunError",
    "StorageError",
    "file_errors",
    "keep_traceback",
]

_HINTS = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "free some space and start again: what was complete before is unchanged"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a directory that you may write to"),
}


class RankLostError(ExpectedError, RuntimeError):
    """Another rank has ended, or does not answer."""


class RunError(ExpectedError, RuntimeError):
    """A run directory cannot be used."""


class StorageError(RunError, OSError):
    """The system does not read or write a file."""


class DamagedError(ExpectedError, ValueError):
    """A file that is not whole: it was cut, or another one has its name."""


@contextmanager
def file_errors(action: str, path: Path) -> Iterator[None]:
    """Tell what the system says of a file.

    :param action: such as ``write``.
    :raises StorageError: in place of an :class:`OSError` or of what safetensors raises.
    """
    try:
        yield
    except ExpectedError:
        raise
    except (OSError, SafetensorError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        # safetensors tells the number in its text alone.
        number = number or next((each for each in _HINTS if f"(os error {each})" in reason), None)
        hint = f"; {_HINTS[number]}" if number in _HINTS else ""
        raise StorageError(f"cannot {action} {path}: {reason}{hint}") from error


def keep_traceback(error: BaseException, path: Path) -> Path:
    """Append an error's traceback to a file, with the time and the command.

    :return: the file.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{now}  {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}\n")
    return path
