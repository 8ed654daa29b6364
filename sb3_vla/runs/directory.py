"""A run directory: what a command was asked to do, what it has done, and how to go on after an interrupt.

::

    config.yaml                     the resolved configuration
    versions.json                   packages, Python, platform, git revision, command line
    metrics.jsonl                   one row per line
    traceback.txt                   of errors that nobody expected
    stages/sft.json                 the marker of a stage: its inputs and whether it is complete
    checkpoints/sft/step-00000400/  a complete checkpoint; a half-written one has another name
    replaced/sft-1/                 what a stage left that was begun anew with other settings

Every file appears whole or not at all (written under a temporary name, flushed to the disk, renamed), so a kill or a
full disk leaves the previous state. One process writes to a run directory at a time: it holds the lock ``.lock``, which
the kernel takes from a process that ends, however it ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sb3_vla.common.config import to_yaml
from sb3_vla.common.errors import DamagedError, ExpectedError, NotThereError, RunError, file_errors, keep_traceback
from sb3_vla.common.files import finish_exchanges, read_json, whole_folder, write_json, write_text
from sb3_vla.common.paths import local_path

if TYPE_CHECKING:
    from typing_extensions import Self

# How long a process that is about to end may keep the lock.
_PATIENCE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is left to do in a stage: nothing (``done``), the rest from the latest checkpoint (``resumed``), or all."""

    done: bool
    resumed: bool


class RunDirectory:
    """A directory that holds everything about one run.

    With a configuration it is this process's own until :meth:`close`, as at the end of a ``with`` block, or until the
    object is gone. An error that leaves the block without being expected has its traceback kept in ``traceback.txt``,
    and gets the file as its attribute ``kept_in``.

    :param path: the directory; made where needed if there is a configuration
    :param config: dataclass instance or mapping, written to ``config.yaml`` beside a new ``versions.json``;
        None opens an existing run and writes neither
    :raises RunError: the path is a file, cannot be written, is another process's, holds a ``config.yaml`` of something
        else, or (without a configuration) does not exist
    """

    def __init__(self, path: str | os.PathLike[str], config: object | None = None) -> None:
        self.path = local_path(path)
        self.close: Callable[[], object] = lambda: None
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"the run directory {self.path} is a file; choose another name")
        if config is not None:
            if (self.path / "config.yaml").exists() and not (self.path / "versions.json").exists():
                raise RunError(
                    f"{self.path} holds a config.yaml that is not of a run (there is no versions.json beside it); "
                    "choose another directory"
                )
            self.close = weakref.finalize(self, _hold(self.path))
            write_text(self.path / "config.yaml", to_yaml(config))
            self.write_json("versions.json", versions())
        elif not self.path.is_dir():
            raise RunError(f"there is no run directory {self.path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        fault = error.__cause__ if isinstance(error, KeyboardInterrupt) else error  # what followed a signal
        if isinstance(fault, Exception) and not isinstance(fault, ExpectedError):
            with suppress(OSError):  # as on a full disk
                fault.kept_in = keep_traceback(fault, self._traceback_file())  # type: ignore[attr-defined]
        self.close()

    def _traceback_file(self) -> Path:
        return self.path / "traceback.txt"

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON types, dataclasses, paths, NumPy and torch values to a file such as ``"eval/sft.json"``."""
        write_json(self.path / name, value, default=_to_json)
        return self.path / name

    def read_json(self, name: str) -> Any:
        """Read a file of ``write_json``.

        :raises RunError: it does not exist or is not JSON
        """
        try:
            return read_json(self.path / name, object)
        except NotThereError as error:
            raise RunError(f"{error}") from error
        except DamagedError as error:
            raise RunError(f"{error}; delete it to go on") from error

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``; half a row that a kill left behind is dropped first."""
        line = json.dumps(dict(row), default=_to_json) + "\n"
        path = self.path / "metrics.jsonl"
        with file_errors("append to", path), open(path, "ab+") as file:
            if file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
            file.write(line.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl`` in order, without half a last one; empty where there is no file."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        with file_errors("read", path):  # what follows the last newline is empty or half a row
            lines = path.read_bytes().split(b"\n")[:-1]
        return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]

    def rewind_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows for which ``keep`` is false: those behind the checkpoint from which a run goes on."""
        rows = [row for row in self.metrics() if keep(row)]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

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
        """One step of a pipeline, done once per set of inputs::

            with run.stage("sft", {"sft": config.sft}, after=["collect"], outputs=["sft/model.safetensors"]) as stage:
                if not stage.done:
                    latest = run.latest_checkpoint("sft")  # None unless stage.resumed
                    ...

        It is complete when the block ends without an exception. With other inputs it starts afresh: the earlier
        checkpoints are renamed to ``checkpoints/<name>.replaced-<n>``, outputs and metrics go to
        ``replaced/<name>-<n>``. They come back if the block raises before it has made anything, as for a setting that
        nobody knows, and the stage is what it was.

        :param inputs: whatever decides the result, and only that; JSON types and dataclasses
        :param length: how far the stage goes, of one that can go on from its last checkpoint: with a greater one it
            does, and a smaller one is another input
        :param after: stages that must be complete; if one of them is repeated with other inputs, so is this one
        :param outputs: paths below the run directory without which the stage does not count as complete
        :raises RunError: a stage in ``after`` is not complete, the block did not make one of ``outputs``, or another
            process has the directory
        """
        release = _hold(self.path)
        try:
            for needed in after:
                if not self.done(needed):
                    raise RunError(
                        f"stage {name!r} needs {needed!r}, which is not complete in {self.path}; run it first"
                    )
            basis = {"inputs": inputs, "after": {needed: self._marker(needed)["fingerprint"] for needed in after}}
            canonical = _canonical(basis)
            fingerprint = fingerprint_of({"basis": canonical, "length": length})
            marker = {"fingerprint": fingerprint, "length": length, **json.loads(canonical)}
            before = self._marker(name)
            same = before.get("fingerprint") == fingerprint
            if same and self.done(name) and not self._missing(outputs):
                yield Stage(done=True, resumed=False)
                return
            if not same and self._goes_further(name, length, before):
                same = _canonical({part: before[part] for part in basis}) == canonical
            put_back = (lambda: None) if same else self._set_aside(name, outputs, _differences(before, marker))
            found = self._left(name, outputs), self._checkpoints(name)
            self.write_json(f"stages/{name}.json", {"complete": False, **marker})
            start = time.monotonic()
            try:
                yield Stage(done=False, resumed=same)
            except BaseException:
                if before and found == (self._left(name, outputs), self._checkpoints(name)):
                    put_back()
                    self.write_json(f"stages/{name}.json", before)
                raise
            if self._missing(outputs):
                raise RunError(f"stage {name!r} ended without {', '.join(self._missing(outputs))} in {self.path}")
            times = {"finished": _now(), "last_attempt_seconds": round(time.monotonic() - start, 3)}
            self.write_json(f"stages/{name}.json", {"complete": True, **times, **marker})
        finally:
            release()

    def done(self, name: str) -> bool:
        """Whether a stage is complete, whatever its inputs were."""
        return bool(self._marker(name).get("complete"))

    def _marker(self, name: str) -> dict[str, Any]:
        marker_file = f"stages/{name}.json"
        return self.read_json(marker_file) if (self.path / marker_file).exists() else {}

    def _missing(self, outputs: Sequence[str]) -> list[str]:
        return [output for output in outputs if not (self.path / output).exists()]

    @contextmanager
    def checkpoint(self, stage: str, step: int, keep: int | None = 2) -> Iterator[Path]:
        """Write a checkpoint, a folder of any files, as a whole; then delete the stage's oldest::

            with run.checkpoint("ppo", 400) as folder:  # empty; in the end it becomes checkpoints/ppo/step-00000400
                save_file(tensors, folder / "model.safetensors")

        :param keep: how many stay: this one, and of the others those of the highest steps; None for all
        """
        final = self.path / "checkpoints" / stage / f"step-{step:08d}"
        with file_errors("write", final):
            finish_exchanges(final.parent)
            for leftover in final.parent.glob(".*.partial"):  # of a kill
                shutil.rmtree(leftover)
        with whole_folder(final, keep=False) as partial:
            yield partial
        if keep is None:
            return
        others = [path for path in _checkpoints_by_step(final.parent) if path != final]
        with file_errors("write", final):
            for old in others[: max(len(others) - (keep - 1), 0)]:
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")), ignore_errors=True)

    def latest_checkpoint(self, stage: str, check: Callable[[Path], None] | None = None) -> Path | None:
        """The complete checkpoint of a stage with the highest step, or None.

        :param check: raises :class:`~sb3_vla.common.errors.DamagedError` for a folder that is not whole; that one is
            told and renamed to ``step-<n>.damaged``, and the one before it is taken
        :raises RunError: none of them is whole
        """
        damaged: list[tuple[Path, DamagedError]] = []
        for found in reversed(self._checkpoints(stage)):
            try:
                if check is not None:
                    check(found)
            except DamagedError as error:
                damaged.append((found, error))
                continue
            for path, reason in damaged:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                warnings.warn(f"{reason}; {stage} goes on from {found.name} before it. See {aside}", stacklevel=3)
            return found
        if damaged:
            raise RunError(
                f"{damaged[0][1]}; no checkpoint of {stage} before it is whole: copy it again, or delete "
                f"{damaged[0][0].parent} to begin the stage anew"
            )
        return None

    def _checkpoints(self, stage: str) -> list[Path]:
        """The complete checkpoints of a stage by their steps."""
        folder = self.path / "checkpoints" / stage
        finish_exchanges(folder)
        return _checkpoints_by_step(folder)

    def _goes_further(self, stage: str, length: int | None, before: Mapping[str, Any]) -> bool:
        reached = before.get("length")
        further = length is not None and reached is not None and length > reached
        return further and (not self.done(stage) or bool(self._checkpoints(stage)))

    def _left(self, stage: str, outputs: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
        """What is there of a stage: paths below the run directory, and rows of metrics."""
        places = (*outputs, f"tensorboard/{stage}", f"checkpoints/{stage}")
        rows = [row for row in self.metrics() if row.get("stage") == stage]
        return [place for place in places if (self.path / place).exists()], rows

    def _set_aside(self, stage: str, outputs: Sequence[str], differences: str) -> Callable[[], None]:
        """Move away what a stage with other inputs has left, so that nothing of it is lost.

        :return: what undoes it.
        """
        found, rows = self._left(stage, outputs)
        if not (found or rows):
            return lambda: None
        checkpoints = f"checkpoints/{stage}"
        folders = (
            (self.path / f"{checkpoints}.replaced-{number}", self.path / "replaced" / f"{stage}-{number}")
            for number in itertools.count(1)
        )
        earlier, results = next(pair for pair in folders if not (pair[0].exists() or pair[1].exists()))
        told = []
        if rows or found != [checkpoints]:
            told.append(f"its earlier results are in {results}")
            self.write_json(f"replaced/{results.name}/{stage}.json", self._marker(stage))
            write_text(results / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        moves = [(self.path / place, earlier if place == checkpoints else results / place) for place in found]
        for place, target in moves:
            with file_errors("rename", place):
                target.parent.mkdir(parents=True, exist_ok=True)
                place.rename(target)
        if rows:
            self.rewind_metrics(lambda row: row.get("stage") != stage)
        if checkpoints in found:
            told.append(f"its earlier checkpoints are in {earlier}")
        warnings.warn(
            f"{stage} has other settings than before in {self.path}{differences}: it starts afresh, and "
            f"{', and '.join(told)}; stages/{stage}.json tells the settings",
            stacklevel=4,
        )

        def put_back() -> None:
            for place, target in moves:
                with file_errors("rename", target):
                    target.rename(place)
            for row in rows:
                self.append_metrics(row)
            shutil.rmtree(results, ignore_errors=True)
            warnings.warn(f"{stage} made nothing with these settings; what was there before is back", stacklevel=2)

        return put_back


def fingerprint_of(inputs: Any) -> str:
    """A text that tells inputs of a stage from others."""
    return hashlib.sha256(_canonical(inputs).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_to_json)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first few settings that differ, for a message."""

    def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield path, value
            return
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}".removeprefix("."))

    parts = ("inputs", "length", "after")
    old, new = (dict(leaves({part: marker.get(part) for part in parts}, "")) for marker in (before, now))
    missing = object()
    changed = [path for path in {**old, **new} if old.get(path, missing) != new.get(path, missing)]
    told = [f"{path.removeprefix('inputs.')}={new.get(path)!r}, not {old.get(path)!r}" for path in changed]
    return f" ({'; '.join(told[:3])}{', ...' if len(told) > 3 else ''})" if before and told else ""


def _hold(folder: Path) -> Callable[[], None]:
    """Make a run directory this process's own until the function that comes back is called.

    :raises RunError: if it is another process's; the message says whose
    """
    place = folder.resolve()  # a link may point to what is not there yet
    with file_errors("write", folder / ".lock"):
        place.mkdir(parents=True, exist_ok=True)
        # One object a folder and process, which counts how often it is held.
        lock = FileLock(place / ".lock", timeout=_PATIENCE_SECONDS, thread_local=False, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{folder} is in use by {_holder(place)}; wait until it has ended, or choose another directory"
            ) from None
    holder = {"process": os.getpid(), "host": platform.node(), "since": _now(), "command": sys.argv}
    write_json(place / ".lock.json", holder)
    return lock.release


def _holder(folder: Path) -> str:
    try:
        found = read_json(folder / ".lock.json")
        command = " ".join(found["command"])
        return f"process {found['process']} on {found['host']} since {found['since']} ({command})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _checkpoints_by_step(folder: Path) -> list[Path]:
    """A stage's complete checkpoints, the highest step last."""
    complete = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def versions() -> dict[str, Any]:
    """What a result depends on besides its configuration: ``packages`` (all that are installed), ``python``,
    ``platform``, ``git`` (``revision`` and ``dirty``; None outside a checkout), ``command``, ``started`` (UTC).

    Environment variables are left out, because they may hold secrets.
    """
    return {
        "packages": dict(sorted((dist.name.lower(), dist.version) for dist in importlib.metadata.distributions())),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_state(),
        "command": sys.argv,
        "started": _now(),
    }


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not some repository around an installed package
        return {"revision": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and torch
        return value.tolist()
    raise TypeError(f"{value!r} ({type(value).__name__}) does not go into JSON; convert it to numbers, text or lists")


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise RunError(f"{where} is damaged: not JSON ({error}); delete it to go on") from error
