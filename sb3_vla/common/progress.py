"""The progress bar of long work in the terminal."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(shown: bool, transient: bool = False) -> Progress:
    """A bar with description, count, time elapsed and left, and a note: ``add_task(description, total=..., note="")``.

    :param shown: False for a bar that does nothing.
    :param transient: whether it disappears at the end.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    note = TextColumn("{task.fields[note]}")
    return Progress(*columns, TimeRemainingColumn(), note, disable=not shown, transient=transient)
