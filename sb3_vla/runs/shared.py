"""A run directory of several ranks: rank 0 writes it, the others know what stands in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sb3_vla.distributed.ranks import Ranks, join_for_good
from sb3_vla.runs.directory import RunDirectory, Stage


class SharedRun(RunDirectory):
    """A run directory for :mod:`sb3_vla.distributed.ranks`; alone, an ordinary one.

    All ranks must make it, enter its stages and ask for its latest checkpoint; what writes does nothing but on rank 0,
    whose errors all ranks raise.

    :param path: see :class:`~sb3_vla.runs.directory.RunDirectory`.
    :param config: see there.
    """

    def __init__(self, path: str | os.PathLike[str], config: object | None = None) -> None:
        self.ranks: Ranks = join_for_good()
        self.ranks.first_does(lambda: RunDirectory.__init__(self, path, config))
        if not self.ranks.leads:
            super().__init__(path)

    def _traceback_file(self) -> Path:
        rank = self.ranks.rank
        return self.path / (f"traceback-rank{rank}.txt" if rank else "traceback.txt")

    @contextmanager
    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        length: int | None = None,
        after: Sequence[str] = (),
        outputs: Sequence[str] = (),
    ) -> Iterator[Stage]:
        """See :meth:`RunDirectory.stage`; complete when rank 0's block has ended."""
        entered = super().stage(name, inputs, length=length, after=after, outputs=outputs)
        if self.ranks.count == 1:
            with entered as found:
                yield found
        elif self.ranks.leads:
            found = self.ranks.first_does(entered.__enter__)
            with _Entered(entered):
                yield found
        else:
            yield self.ranks.first_does(entered.__enter__)

    def checkpoint(self, stage: str, step: int, keep: int | None = 2) -> Any:
        """See :meth:`RunDirectory.checkpoint`; a context of None on the ranks that do not write."""
        return super().checkpoint(stage, step, keep) if self.ranks.leads else nullcontext(None)

    def latest_checkpoint(self, stage: str, check: Callable[[Path], None] | None = None) -> Path | None:
        """See :meth:`RunDirectory.latest_checkpoint`."""
        return self.ranks.first_does(lambda: super(SharedRun, self).latest_checkpoint(stage, check))

    def write_json(self, name: str, value: Any) -> Path:
        """See :meth:`RunDirectory.write_json`."""
        return super().write_json(name, value) if self.ranks.leads else self.path / name

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """See :meth:`RunDirectory.append_metrics`."""
        if self.ranks.leads:
            super().append_metrics(row)

    def rewind_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """See :meth:`RunDirectory.rewind_metrics`."""
        if self.ranks.leads:
            super().rewind_metrics(keep)


class _Entered:
    """A context that was entered already, to be left."""

    def __init__(self, entered: Any) -> None:
        self._entered = entered

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> Any:
        return self._entered.__exit__(*error)
