"""How a command ends: well, by a signal, or by an error, of which it tells what whoever called it can use."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sb3_vla.common.config import ConfigError
from sb3_vla.common.errors import ExpectedError, RankLostError, RunError, keep_traceback
from sb3_vla.common.signals import Stopped, stopped_by_signals


def run_command(
    work: Callable[[], object], *, again: str, show_traceback: bool = False, errors: Console | None = None
) -> int:
    """Do a work, and tell on the terminal how it ended if it did not end well.

    An :class:`~sb3_vla.common.errors.ExpectedError` is told by its message. Any other error is a fault of this
    software, or of the machine: its traceback is kept in a file, that of the run directory where there is one.

    :param again: what the same command does after a signal, such as ``the same command goes on``.
    :param show_traceback: print the traceback of an error.
    :param errors: where an error is told; None for the standard error output.
    :return: the exit status: 0, 2 for an error, 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        with stopped_by_signals():
            work()
    except Stopped as stopped:
        Console().print(f"\ninterrupted by {escape(str(stopped))}; {again}", highlight=False, soft_wrap=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        Console().print("\ninterrupted")
        return 130
    except Exception as error:
        from sb3_vla.distributed.local_ranks import (
            leave_reason,  # which imports torch, as a work does and --help does not
        )

        if not isinstance(error, RankLostError):
            leave_reason(f"{error}" if isinstance(error, ExpectedError) else f"{type(error).__name__}: {error}")
        # What every rank finds in the same settings is said once.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, (ConfigError, RunError)):
            _tell(error, show_traceback, errors or Console(stderr=True))
        return 2
    return 0


def _tell(error: Exception, show_traceback: bool, console: Console) -> None:
    message = str(error)
    if not isinstance(error, ExpectedError):
        kept = getattr(error, "kept_in", None) or _keep(error)
        where = f"; its traceback is in {kept}" if kept else ""
        message = f"{type(error).__name__}: {message}{where} (--traceback shows it)"
    if show_traceback:
        traceback.print_exception(error)
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _keep(error: Exception) -> Path | None:
    try:
        descriptor, name = tempfile.mkstemp(prefix="sb3-vla-traceback-", suffix=".txt")
        os.close(descriptor)
        return keep_traceback(error, Path(name))
    except OSError:  # as on a full disk
        return None
