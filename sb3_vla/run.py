"""A run directory: what a command was asked to do, what it has done, and how to go on after an interrupt.

::

    config.yaml                     the resolved configuration
    versions.json                   packages, Python, platform, git revision, command line
    metrics.jsonl                   one row per line
    stages/sft.json                 the marker of a stage: its inputs and whether it is complete
    checkpoints/sft/step-00000400/  a complete checkpoint; a half-written one has another name

Every file appears whole or not at all (written under a temporary name, flushed to the disk, renamed), so a kill or a
full disk leaves the previous state. One process writes to a run directory at a time.
"""

from __future__ import annotations

import dataclasses
import errno
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import Any

from sb3_vla.config import to_yaml


class RunError(RuntimeError):
    """A run directory cannot be used. The message is complete: a command prints it and exits."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is left to do in a stage: nothing (``done``), the rest from the latest checkpoint (``resumed``), or all."""

    done: bool
    resumed: bool


class RunDirectory:
    """A directory that holds everything about one run.

    :param path: the directory; made where needed if there is a configuration
    :param config: dataclass instance or mapping, written to ``config.yaml`` beside a new ``versions.json``;
        None opens an existing run and writes neither
    :raises RunError: the path is a file, cannot be written, or (without a configuration) does not exist
    """

    def __init__(self, path: str | os.PathLike[str], config: object | None = None) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"the run directory {self.path} is a file; choose another name")
        if config is not None:
            _write_atomically(self.path / "config.yaml", to_yaml(config))
            self.write_json("versions.json", versions())
        elif not self.path.is_dir():
            raise RunError(f"there is no run directory {self.path}")

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON types, dataclasses, paths, NumPy and torch values to a file such as ``"eval/sft.json"``."""
        _write_atomically(self.path / name, json.dumps(value, indent=2, default=_to_json) + "\n")
        return self.path / name

    def read_json(self, name: str) -> Any:
        """Read a file of ``write_json``.

        :raises RunError: it does not exist or is not JSON
        """
        with _clear_errors("read", self.path / name):
            return _parse((self.path / name).read_bytes(), f"{self.path / name}")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``; half a row that a kill left behind is dropped first."""
        line = json.dumps(dict(row), default=_to_json) + "\n"
        path = self.path / "metrics.jsonl"
        with _clear_errors("append to", path), open(path, "ab+") as file:
            if file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
            file.write(line.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl`` in order, without half a last one; empty where there is no file."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        with _clear_errors("read", path):  # what follows the last newline is empty or half a row
            lines = path.read_bytes().split(b"\n")[:-1]
        return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]

    def rewind_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows for which ``keep`` is false: those behind the checkpoint from which a run goes on."""
        rows = [row for row in self.metrics() if keep(row)]
        _write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    @contextmanager
    def stage(
        self, name: str, inputs: Mapping[str, Any], *, after: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> Iterator[Stage]:
        """One step of a pipeline, done once per set of inputs::

            with run.stage("sft", {"sft": config.sft}, after=["collect"], outputs=["sft/model.safetensors"]) as stage:
                if not stage.done:
                    latest = run.latest_checkpoint("sft")  # None unless stage.resumed
                    ...

        It is complete when the block ends without an exception. With other inputs it starts afresh, and the earlier
        checkpoints are renamed to ``checkpoints/<name>.replaced-<n>``.

        :param inputs: whatever decides the result, and only that; JSON types and dataclasses
        :param after: stages that must be complete; if one of them is repeated with other inputs, so is this one
        :param outputs: paths below the run directory without which the stage does not count as complete
        :raises RunError: a stage in ``after`` is not complete, or the block did not make one of ``outputs``
        """
        for needed in after:
            if not self.done(needed):
                raise RunError(f"stage {name!r} needs {needed!r}, which is not complete in {self.path}; run it first")
        basis = {"inputs": inputs, "after": {needed: self._marker(needed)["fingerprint"] for needed in after}}
        canonical = json.dumps(basis, sort_keys=True, default=_to_json)
        marker = {"fingerprint": hashlib.sha256(canonical.encode()).hexdigest(), **json.loads(canonical)}
        same = self._marker(name).get("fingerprint") == marker["fingerprint"]
        if same and self.done(name) and not self._missing(outputs):
            yield Stage(done=True, resumed=False)
            return
        if not same:
            self._set_checkpoints_aside(name)
        self.write_json(f"stages/{name}.json", {"complete": False, **marker})
        start = time.monotonic()
        yield Stage(done=False, resumed=same)
        if self._missing(outputs):
            raise RunError(f"stage {name!r} ended without {', '.join(self._missing(outputs))} in {self.path}")
        times = {"finished": _now(), "last_attempt_seconds": round(time.monotonic() - start, 3)}
        self.write_json(f"stages/{name}.json", {"complete": True, **times, **marker})

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
        temporary, replaced = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.replaced.tmp")
        with _clear_errors("write", final):
            final.parent.mkdir(parents=True, exist_ok=True)
            _put_back(final.parent)
            for leftover in final.parent.glob(".*.tmp"):  # of a kill
                shutil.rmtree(leftover)
            temporary.mkdir()
            try:
                yield temporary
                for path in [*temporary.rglob("*"), temporary]:
                    _flush_to_disk(path)
                if final.exists():  # a folder can only be renamed onto an empty one
                    final.rename(replaced)
                temporary.rename(final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _flush_to_disk(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            if keep is not None:
                others = [path for path in _checkpoints_by_step(final.parent) if path != final]
                for old in others[: max(len(others) - (keep - 1), 0)]:
                    shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")), ignore_errors=True)

    def latest_checkpoint(self, stage: str) -> Path | None:
        """The complete checkpoint of a stage with the highest step, or None."""
        folder = self.path / "checkpoints" / stage
        _put_back(folder)
        return next(reversed(_checkpoints_by_step(folder)), None)

    def _set_checkpoints_aside(self, stage: str) -> None:
        current = self.path / "checkpoints" / stage
        if current.exists():
            names = (current.with_name(f"{stage}.replaced-{number}") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            with _clear_errors("rename", current):
                current.rename(aside)
            warnings.warn(
                f"{stage} has other settings than before in {self.path}: it starts afresh, and its earlier checkpoints "
                f"are in {aside}; stages/{stage}.json tells the settings",
                stacklevel=4,
            )


def _checkpoints_by_step(folder: Path) -> list[Path]:
    """A stage's complete checkpoints, the highest step last."""
    complete = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def _put_back(folder: Path) -> None:
    """Undo a replacement of a checkpoint whose writer was killed between taking it away and putting the new one."""
    for replaced in folder.glob(".step-*.replaced.tmp"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".replaced.tmp")
        if not final.exists():
            replaced.rename(final)


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


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with _clear_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            _flush_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_to_disk(path.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _clear_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "; free some space and start again: what was complete before is unchanged"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "; choose a directory that you may write to"
        raise RunError(f"cannot {action} {path}: {error.strerror or error}{hint}") from error
