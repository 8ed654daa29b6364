"""What a run directory holds so far, read without ever writing to it, and what it lacks."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sb3_vla.common.errors import RunError
from sb3_vla.evaluation.results import Comparison, EvaluationResult, compare
from sb3_vla.runs.directory import RunDirectory

# Any of these makes a folder a run's.
_MARKS = ("config.yaml", "versions.json", "metrics.jsonl")
_VIDEO = re.compile(
    r"(?:iteration-(?P<iteration>\d+)_)?(?P<task>.+)_seed(?P<seed>\d+)_goal(?P<goal>\d+)_(?P<outcome>success|failure)"
)


@dataclass(frozen=True)
class Video:
    """
    A video of a run.

    :param path: the file
    :param changed: when, in nanoseconds
    :param size: in bytes
    :param trial: what it is of; the same text is the same trial
    :param iteration: of a training, or 0
    :param outcome: ``success``, ``failure`` or nothing
    """

    path: Path
    changed: int
    size: int
    trial: str
    iteration: int = 0
    outcome: str = ""

    @property
    def folder(self) -> str:
        """The folder's name, such as ``before``."""
        return self.path.parent.name

    @property
    def order(self) -> tuple[str, int, str]:
        """By trial, and before comes before after."""
        return self.trial, {"before": 0, "after": 1}.get(self.folder, 2), str(self.path)


@dataclass
class Contents:
    """What there is in a run directory; ``missing`` says what is not, and how to make it."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    imitation: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    comparison: Comparison | None = None
    videos: list[Video] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The command that began the run, to be pasted into a shell."""
        return pasteable(self.versions.get("command"))

    @property
    def last_metrics(self) -> tuple[str, list[dict[str, Any]]]:
        """The stage that was the last to log, and its rows."""
        return next(reversed(self.metrics.items()), ("", []))


def read_contents(directory: RunDirectory) -> Contents:
    """
    Read a run directory, whose run may be under way.

    :raises RunError: if it is not a run's
    """
    run = Contents(directory.path)
    if not any((run.path / mark).exists() for mark in _MARKS):
        raise RunError(f"{run.path} is not a run directory: it has none of {', '.join(_MARKS)}; give one that has")
    run.config_text, run.config = _read_config(run)
    run.versions = _read_json(directory, run, "versions.json", {})
    for path in sorted((run.path / "stages").glob("*.json")):
        run.stages[path.stem] = _read_json(directory, run, f"stages/{path.name}", {})
    try:
        for row in directory.metrics():
            run.metrics.setdefault(str(row.get("stage", "")), []).append(_numbers(row))
    except (RunError, AttributeError) as error:
        run.missing.append(f"The metrics: {error}")
    if (run.path / "sft_history.json").exists():
        history = _read_json(directory, run, "sft_history.json", [])
        run.imitation = [_numbers(row) for row in history if isinstance(row, dict)]
    for path in sorted(run.path.glob("evaluation_*.json")):
        try:
            result = EvaluationResult.from_json(path)
            result.average()
            run.evaluations[path.stem.removeprefix("evaluation_")] = result
        except (OSError, KeyError, ValueError) as error:  # KeyError: of a task that MetaWorld does not have
            run.missing.append(f"{path.name}, which cannot be read: {error}")
    run.videos = find_videos(run.path)
    run.comparison = _compared(directory, run)
    _note_missing(run)
    return run


def find_videos(run: Path) -> list[Video]:
    """The videos of a run that lie in its directory; what a link leads to elsewhere is none of them."""
    found = []
    for path in (run / "videos").rglob("*.mp4"):
        if path.name.startswith(".") or not path.is_file() or not path.resolve().is_relative_to(run.resolve()):
            continue
        with suppress(FileNotFoundError):  # deleted by a writer that keeps its folder small
            about = path.stat()
            match = _VIDEO.fullmatch(path.stem)
            if match is None:
                found.append(Video(path, about.st_mtime_ns, about.st_size, path.stem))
                continue
            trial = f"{match['task']}, goal {int(match['goal'])}, seed {match['seed']}"
            numbers = about.st_mtime_ns, about.st_size
            found.append(Video(path, *numbers, trial, int(match["iteration"] or 0), match["outcome"]))
    return sorted(found, key=lambda video: video.order)


def pasteable(command: Any) -> str:
    """The text of a command, given by its arguments as Python has them, that a shell runs."""
    if not isinstance(command, list) or not command:
        return str(command or "")
    program, *arguments = map(str, command)
    if program.endswith(("bin/sb3-vla", "sb3_vla/__main__.py")):
        words = ["sb3-vla"]
    else:
        words = ["python", program] if program.endswith(".py") else [program]
    return shlex.join([*words, *arguments])


def _read_config(run: Contents) -> tuple[str, dict[str, Any]]:
    try:
        text = (run.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        run.missing.append(f"config.yaml: {error}")
        return "", {}
    return text, config if isinstance(config, dict) else {}


def _read_json(directory: RunDirectory, run: Contents, name: str, empty: Any) -> Any:
    try:
        value = directory.read_json(name)
        if not isinstance(value, type(empty)):
            raise RunError(f"{name} holds a {type(value).__name__}, expected a {type(empty).__name__}")
    except RunError as error:
        run.missing.append(f"{name}: {error}")
        return empty
    return value


def _compared(directory: RunDirectory, run: Contents) -> Comparison | None:
    before, after = run.evaluations.get("before"), run.evaluations.get("after")
    if before is None or after is None:
        return None
    names = ("before", "after")
    if (run.path / "comparison.json").exists():
        named = _read_json(directory, run, "comparison.json", {}).get("names")
        if isinstance(named, list) and len(named) == 2:
            names = (str(named[0]), str(named[1]))
    try:
        return compare(before, after, names)
    except ValueError as error:
        run.missing.append(f"The comparison of before and after: {error}")
        return None


def _note_missing(run: Contents) -> None:
    """Say what is not there, and which command makes it."""
    again = f" The same command goes on: {run.command}" if run.command else ""
    for stage, marker in run.stages.items():
        if not marker.get("complete"):
            # Not asked of the run directory, which may then move checkpoints of a writer that is at work.
            folders = (run.path / "checkpoints" / stage).glob("step-*")
            latest = max((path.name for path in folders if re.fullmatch(r"step-\d+", path.name)), default=None)
            reached = f", its last checkpoint is {latest}" if latest is not None else ""
            run.missing.append(f"The rest of stage {stage!r}: it is not complete{reached}.{again}")
    if not run.stages:
        run.missing.append(f"Any stage: none has begun.{again}")
    if not run.metrics:
        run.missing.append("Learning curves of reinforcement learning: metrics.jsonl has no row yet.")
    trained = next((name for name in ("ppo", "grpo") if (run.path / name).is_dir()), "ppo")
    for name, checkpoint in (("before", _start(run)), ("after", run.path / trained)):
        if name not in run.evaluations and not (run.path / f"evaluation_{name}.json").exists():
            command = _evaluation_command(run, name, checkpoint) if Path(checkpoint).is_dir() else None
            run.missing.append(
                f"The evaluation {name} training, evaluation_{name}.json" + (f": {command}" if command else ".")
            )
    if not run.videos:
        run.missing.append("Videos: sb3-vla eval writes them with videos=FOLDER, here into the folder videos.")


def _start(run: Contents) -> str:
    """The checkpoint that a training began with, as far as the configuration tells."""
    model = (run.config.get("actor") or {}).get("model") or {}  # of a recipe
    return str(run.config.get("checkpoint") or model.get("model_path") or run.path / "sft")


def _evaluation_command(run: Contents, name: str, checkpoint: str | Path) -> str | None:
    """What measures a checkpoint on the tasks that the run is about; None where nothing tells them yet."""
    inputs = [marker["inputs"] for marker in run.stages.values() if isinstance(marker.get("inputs"), dict)]
    places = [place for given in (*inputs, run.config) for place in (*given.values(), given) if isinstance(place, dict)]
    where = next((place for place in places if "suite" in place), None)
    if where is None:
        return None
    settings = {"checkpoint": checkpoint, "suite": where["suite"], "split": where.get("split")}
    if where["suite"] == "MT1":
        settings["suite"] = "MT50"
    if where.get("tasks"):
        settings["tasks"] = f"[{', '.join(where['tasks'])}]"
    settings |= {"output": run.path / f"evaluation_{name}.json", "videos": run.path / "videos" / name}
    return shlex.join(["sb3-vla", "eval", *(f"{key}={value}" for key, value in settings.items() if value is not None)])


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in row.items() if isinstance(value, (int, float))}
