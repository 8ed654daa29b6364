"""
The report of a run: one HTML page with its results, curves, videos, settings and versions.

The page needs nothing beside itself: style, charts (SVG), stills and videos are in it, there is no script, and it loads
nothing. Only videos beyond a limit are linked. Of an unfinished run it shows what there is, and says what is missing.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import numpy as np
import yaml

from mw_envs import DIFFICULTIES
from mw_envs.tasks import suite_tasks
from sb3_vla.common.errors import InputError
from sb3_vla.common.paths import local_path
from sb3_vla.evaluation.published import PUBLISHED
from sb3_vla.evaluation.results import Comparison, EvaluationResult, compare
from sb3_vla.evaluation.statistics import Estimate, PairedDifference
from sb3_vla.recording.videos import atomic_path
from sb3_vla.runs.directory import RunDirectory, RunError
from sb3_vla.runs.report.charts import Line, bars, heat_map, line_chart, trial_map
from sb3_vla.runs.report.figures import metric_series, smoothed
from sb3_vla.runs.report.page import STYLE, Html, bullets, details, markup, paragraphs, table

# Any of these makes a folder a run's.
_MARKS = ("config.yaml", "versions.json", "metrics.jsonl")
_STEPS, _SUCCESS = "time/env_steps", "env/success_once"
_HEALTH = {
    "actor/approx_kl": "divergence of an update (approx_kl)",
    "actor/pg_clipfrac": "share of clipped ratios (pg_clipfrac)",
    "actor/value_loss": "critic's loss (value_loss)",
    "train/explained_variance": "explained variance of the critic",
    "env/episode_len": "environment steps of an episode",
    "perf/env_steps_per_second": "environment steps per second",
}
_HEAT_COLUMNS = 30
_PACKAGES = ("sb3-vla", "torch", "stable-baselines3", "gymnasium", "metaworld", "mujoco", "numpy", "transformers", "av")
_VIDEO = re.compile(r"(?P<task>.+)_seed(?P<seed>\d+)_goal(?P<goal>\d+)_(?P<outcome>success|failure)")
_MEGABYTE = 1e6


@dataclass
class _Run:
    """What a run directory holds so far, and what it lacks."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    imitation: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    comparison: Comparison | None = None
    videos: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(run: str | Path, output: str | Path | None = None, *, embed_mb: float = 20.0) -> Path:
    """
    Write the page.

    :param run: a run directory: of ``sb3-vla train``, of the quickstart, or what has files of the same names. Shown as
        before and after are ``evaluation_before.json`` and ``evaluation_after.json``, and any ``videos/**/*.mp4``
    :param output: the HTML file; None for ``report.html`` in the run directory
    :param embed_mb: size up to which videos are put into the page, in megabytes of their files; the rest is linked
    :return: the file
    :raises RunError: if there is no such directory, it is not a run's, or the file cannot be written
    :raises ValueError: if ``embed_mb`` is negative
    """
    if not embed_mb >= 0:
        raise InputError(f"embed_mb={embed_mb}; expected 0, to link all videos, or more")
    content = _read(RunDirectory(run))
    target = local_path(output) if output is not None else content.path / "report.html"
    page = _page(content, target, embed_mb * _MEGABYTE)
    try:
        with atomic_path(target) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"cannot write the report {target}: {reason}; choose a file with output=...") from error
    return target


# What there is


def _read(directory: RunDirectory) -> _Run:
    run = _Run(directory.path)
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
    films = (run.path / "videos").rglob("*.mp4")
    run.videos = [path for path in films if path.is_file() and not path.name.startswith(".")]
    run.comparison = _compared(directory, run)
    _note_missing(directory, run)
    return run


def _read_config(run: _Run) -> tuple[str, dict[str, Any]]:
    try:
        text = (run.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        run.missing.append(f"config.yaml: {error}")
        return "", {}
    return text, config if isinstance(config, dict) else {}


def _read_json(directory: RunDirectory, run: _Run, name: str, empty: Any) -> Any:
    try:
        value = directory.read_json(name)
        if not isinstance(value, type(empty)):
            raise RunError(f"{name} holds a {type(value).__name__}, expected a {type(empty).__name__}")
    except RunError as error:
        run.missing.append(f"{name}: {error}")
        return empty
    return value


def _compared(directory: RunDirectory, run: _Run) -> Comparison | None:
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


def _note_missing(directory: RunDirectory, run: _Run) -> None:
    """Say what is not there, and which command makes it."""
    again = f" The same command goes on: {_command(run)}" if run.versions.get("command") else ""
    for stage, marker in run.stages.items():
        if not marker.get("complete"):
            latest = directory.latest_checkpoint(stage)
            reached = f", its last checkpoint is {latest.name}" if latest is not None else ""
            run.missing.append(f"The rest of stage {stage!r}: it is not complete{reached}.{again}")
    if not run.stages:
        run.missing.append(f"Any stage: none has begun.{again}")
    if not run.metrics:
        run.missing.append("Learning curves of reinforcement learning: metrics.jsonl has no row yet.")
    for name, checkpoint in (("before", run.config.get("checkpoint", run.path / "sft")), ("after", run.path / "ppo")):
        if name not in run.evaluations and not (run.path / f"evaluation_{name}.json").exists():
            made_by = f": {_evaluation_command(run, name, checkpoint)}" if Path(str(checkpoint)).is_dir() else "."
            run.missing.append(f"The evaluation {name} training, evaluation_{name}.json{made_by}")
    if not run.videos:
        run.missing.append("Videos: sb3-vla eval writes them with videos=FOLDER, here into the folder videos.")


def _command(run: _Run) -> str:
    command = run.versions.get("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")


def _evaluation_command(run: _Run, name: str, checkpoint: Any) -> str:
    collected = run.config.get("collect")  # the quickstart's suite stands there
    where = collected if isinstance(collected, dict) else run.config
    settings = {"checkpoint": checkpoint, "suite": where.get("suite", "MT10"), "split": where.get("split")}
    if settings["suite"] == "MT1":
        settings |= {"suite": "MT50", "tasks": where.get("tasks")}
    settings |= {"output": run.path / f"evaluation_{name}.json", "videos": run.path / "videos" / name}
    return shlex.join(["sb3-vla", "eval", *(f"{key}={value}" for key, value in settings.items() if value is not None)])


# The page


def _page(run: _Run, target: Path, embed_bytes: float) -> str:
    title = f"{run.path.resolve().name} · sb3-vla"
    sections = (
        ("What is missing", bullets(run.missing)),
        ("Success by difficulty", _by_difficulty(run)),
        ("Before and after, on the same trials", _paired(run)),
        ("Learning curves", _curves(run)),
        ("Where and when it succeeds", _maps(run)),
        ("Videos", _videos(run, target, embed_bytes)),
        ("How it was made", _provenance(run)),
    )
    body = "".join(f"<section><h2>{markup(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # The page itself forbids scripts and downloads, whatever is in the files that it was made of.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:; media-src data:">'
        f"<title>{markup(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><header><h1>{markup(run.path.resolve().name)}</h1>{_headline(run)}</header>{body}</main></body>"
        "</html>\n"
    )


def _headline(run: _Run) -> Html:
    facts: dict[str, str] = {}
    if run.comparison is not None:
        one, other = run.comparison.before.mean_over_tasks(), run.comparison.after.mean_over_tasks()
        facts["success, mean over tasks"] = f"{100 * one.value:.1f} → {100 * other.value:.1f} %"
        facts["difference, paired 95 %"] = _difference(run.comparison.mean_over_tasks().difference)
    elif run.evaluations:
        name = next((name for name in ("after", "before") if name in run.evaluations), next(iter(run.evaluations)))
        facts[f"success {name}, mean over tasks"] = _percent(run.evaluations[name].mean_over_tasks())
    for rows in run.metrics.values():
        steps, seconds = metric_series(rows, _STEPS, "time/time_elapsed")
        if len(steps):
            facts["environment steps of training"] = f"{steps[-1]:,.0f}"
            facts["minutes of training"] = f"{seconds[-1] / 60:.0f}"
    done = sum(bool(marker.get("complete")) for marker in run.stages.values())
    facts["stages complete"] = f"{done} of {len(run.stages)} begun"
    cells = "".join(f"<div><dt>{markup(name)}</dt><dd>{markup(value)}</dd></div>" for name, value in facts.items())
    return Html(f'<dl class="facts">{cells}</dl>')


def _by_difficulty(run: _Run) -> Html:
    header = ("", *(group.replace("_", " ").capitalize() for group in DIFFICULTIES), "Avg")
    names = run.comparison.names if run.comparison is not None else ("before", "after")
    called = dict(zip(("before", "after"), names, strict=True))
    ours = {name: run.evaluations[name] for name in ("before", "after") if name in run.evaluations}
    rows = []
    for name, result in ours.items():
        groups = result.per_difficulty()
        cells = [_stacked(groups[group]) if group in groups else "-" for group in DIFFICULTIES]
        label = Html(f"<strong>{markup(called[name])}</strong> <small>measured here</small>")
        rows.append((label, *cells, _stacked(result.average())))
    published = [
        (Html(f"{markup(row.method)} <small>published, {markup(row.source)}</small>"), *row.rates, row.average)
        for row in PUBLISHED
    ]
    notes = [str(result.protocol) for result in ours.values()]
    text = [f"Measured here: protocol {note}." for note in dict.fromkeys(notes)]
    for name, result in ours.items():
        per_task = {rate.trials for rate in result.per_task().values()}
        trials = f"{min(per_task)}" if len(per_task) == 1 else f"{min(per_task)} to {max(per_task)}"
        text.append(f"{called[name]}: {len(result.tasks)} tasks, {trials} trials each.")
    if not ours:
        text.append("Nothing was measured here yet.")
    text.append(
        "Published rows were not measured here. They are of all 50 tasks of MT50, those of pi0 and pi0.5 with 10 "
        "trials each, which leave about five points of uncertainty of the average. Avg is the mean of the groups."
    )
    if any(set(result.tasks) != set(suite_tasks("MT50")) for result in ours.values()):
        text.append("The tasks measured here are others, so the levels cannot be compared with those rows.")
    rates = table("Success in percent by difficulty, with 95 % intervals", header, rows, published)
    return Html(rates + paragraphs(text))


def _paired(run: _Run) -> Html:
    comparison = run.comparison
    if comparison is None:
        only = next((run.evaluations[name] for name in ("after", "before") if name in run.evaluations), None)
        if only is None:
            return Html("")
        rates = {task: [rate.rate] for task, rate in only.per_task().items()}
        return Html(
            paragraphs(["Only one of the two was measured."]) + bars(rates, "Success of each task", ["success"])
        )
    before, after, paired = comparison.before.per_task(), comparison.after.per_task(), comparison.per_task()
    order = sorted(paired, key=lambda task: (-paired[task].difference.value, task))
    header = ("", comparison.names[0], comparison.names[1], "Difference", "Gained, lost")
    groups_before, groups_after = comparison.before.per_difficulty(), comparison.after.per_difficulty()
    groups = [
        (group.replace("_", " ").capitalize(), *_pair(groups_before[group], groups_after[group], difference))
        for group, difference in comparison.per_difficulty().items()
    ]
    averages = (comparison.before.average(), comparison.after.average(), comparison.average())
    groups.append(("Avg, mean of the groups", *_pair(*averages)))
    means = {"Mean over tasks": comparison}
    trained = [task for task in _trained_tasks(run) if task in comparison.before.tasks]
    if trained and len(trained) < len(comparison.before.tasks):
        means[f"Mean over the {len(trained)} tasks in training"] = comparison.restricted_to(trained)
    for name, part in means.items():
        estimates = (part.before.mean_over_tasks(), part.after.mean_over_tasks(), part.mean_over_tasks())
        groups.append((name, *_pair(*estimates)))
    everything = comparison.mean_over_tasks()
    tasks = [(task, *_pair(before[task].rate, after[task].rate, paired[task])) for task in order]
    said = (
        f"{everything.trials} trials were run by both: {everything.gained} gained, {everything.lost} lost, exact "
        f"McNemar test p = {everything.p_value:.2g}. Intervals are at 95 %; those of differences resample the pairs."
    )
    by_group = table("Success in percent before and after, and the paired difference", header, groups)
    per_task = details("Table of tasks", table("Success of each task in percent", header, tasks))
    chart = bars(
        {task: [before[task].rate, after[task].rate] for task in order},
        "Success of each task, with 95 % intervals",
        comparison.names,
    )
    return Html(by_group + paragraphs([said]) + chart + per_task)


def _curves(run: _Run) -> Html:
    charts = []
    for stage, rows in run.metrics.items():
        steps, rates = metric_series(rows, _STEPS, _SUCCESS)
        if len(steps):
            lines = []
            for number, metric in enumerate(_task_metrics(rows)):
                at, values = metric_series(rows, _STEPS, metric)
                lines.append(Line(at, smoothed(values), "" if number else "each task", "thin"))
            lines += [Line(steps, rates, "an iteration", "dots"), Line(steps, smoothed(rates), "smoothed", "main")]
            title = f"Success while training, {stage}" if stage else "Success while training"
            charts.append(line_chart(lines, title, "environment steps", percent=True))
        for metric, title in _HEALTH.items():
            steps, values = metric_series(rows, _STEPS, metric)
            if len(steps) > 1:
                lines = [Line(steps, values, "", "dots"), Line(steps, smoothed(values))]
                charts.append(line_chart(lines, title.capitalize(), "environment steps"))
    steps, losses = metric_series(run.imitation, "step", "train_loss")
    if len(steps):
        lines = [Line(steps, smoothed(losses), "training", "main")]
        validated = metric_series(run.imitation, "step", "validation_loss")
        if len(validated[0]):
            lines.append(Line(*validated, "validation", "second"))
        charts.append(line_chart(lines, "Loss of imitation", "optimizer steps"))
    return Html(f'<div class="charts">{"".join(charts)}</div>' if charts else "")


def _maps(run: _Run) -> Html:
    charts = []
    for stage, rows in run.metrics.items():
        tasks = [name.removeprefix(f"{_SUCCESS}/") for name in _task_metrics(rows)]
        if not tasks:
            continue
        bins = [part for part in np.array_split(np.arange(len(rows)), min(_HEAT_COLUMNS, len(rows))) if len(part)]
        rates = {}
        for task in tasks:
            values = np.array([_number(row.get(f"{_SUCCESS}/{task}")) for row in rows])
            rates[task] = np.array([_mean(values[part]) for part in bins])
        ends = [_number(rows[part[-1]].get(_STEPS)) for part in bins]
        columns = [f"{end / 1000:.0f}k" if np.isfinite(end) else "?" for end in ends]
        title = f"Success of each task in the course of training{f', {stage}' if stage else ''}"
        charts.append(heat_map(rates, columns, title, "environment steps"))
    if run.comparison is not None:
        after = run.comparison.after.successes
        outcomes: dict[str, list[tuple[bool, bool]]] = {task: [] for task in run.comparison.before.tasks}
        for trial, success in run.comparison.before.successes.items():
            outcomes[trial.task].append((success, after[trial]))
        charts.append(trial_map(outcomes, "Each trial of each task; a column is a goal", run.comparison.names))
    return Html("".join(charts))


def _videos(run: _Run, target: Path, embed_bytes: float) -> Html:
    shown, linked, used = [], 0, 0
    for path in sorted(run.videos, key=_video_order):
        name, size = path.relative_to(run.path).as_posix(), path.stat().st_size
        match = _VIDEO.fullmatch(path.stem)
        said = "{task}, goal {goal}: {outcome}".format_map(match.groupdict()) if match else path.stem
        caption = f"<figcaption>{markup(path.parent.name)}: {markup(said)}</figcaption>"
        still = _still(path)
        if still is None:
            shown.append(f'<figure class="video"><p class="still">cannot be read: {markup(name)}</p>{caption}</figure>')
            continue
        if used + size <= embed_bytes:
            used += size
            data = base64.b64encode(path.read_bytes()).decode()
            film = (
                f'<video controls muted playsinline preload="metadata" poster="{still}" '
                f'aria-label="{markup(said)}" src="data:video/mp4;base64,{data}"></video>'
            )
        else:
            linked += 1
            address = markup(quote(os.path.relpath(path.resolve(), target.resolve().parent)))
            film = (
                f'<a href="{address}"><img src="{still}" alt="first picture of {markup(name)}">'
                f"{size / _MEGABYTE:.1f} MB, linked</a>"
            )
        shown.append(f'<figure class="video">{film}{caption}</figure>')
    if not shown:
        return Html("")
    notes = ["A frame for each environment step, in the order of the trials: the first trials of each task."]
    if linked:
        notes.append(
            f"{linked} of {len(shown)} videos are linked and not in this page, which holds {embed_bytes / _MEGABYTE:g} "
            "MB of them at most (embed_mb); the links work while page and run directory stay where they are."
        )
    return Html(f'{paragraphs(notes)}<div class="videos">{"".join(shown)}</div>')


def _provenance(run: _Run) -> Html:
    versions = run.versions
    packages = versions.get("packages")
    # The names of packages are spelt in several ways.
    known = {_normal(name): number for name, number in packages.items()} if isinstance(packages, dict) else {}
    git = versions.get("git")
    revision = f"{git.get('revision')}{', with changes' if git.get('dirty') else ''}" if isinstance(git, dict) else "-"
    facts = {
        "started": _moment(versions.get("started", "-")),
        "git revision": revision,
        "Python": versions.get("python", "-"),
        "platform": versions.get("platform", "-"),
        **{name: known[name] for name in _PACKAGES if name in known},
    }
    stages = []
    for name, marker in sorted(run.stages.items(), key=lambda stage: str(stage[1].get("finished", "~"))):
        state = "complete" if marker.get("complete") else "not complete"
        stages.append((name, state, _moment(marker.get("finished", "-")), _minutes(marker.get("last_attempt_seconds"))))
    every = [(name, number) for name, number in sorted(known.items())]
    return Html(
        f"<h3>Command</h3><pre>{markup(_command(run) or 'not known')}</pre>"
        + table("Stages", ("", "State", "Finished", "Minutes"), stages, words=True)
        + table("Versions", ("", "Version"), list(facts.items()), words=True)
        + details(f"All {len(every)} packages", table("Packages", ("", "Version"), every))
        + details("Configuration", f"<pre>{markup(run.config_text)}</pre>")
    )


# Texts and numbers


def _stacked(estimate: Estimate) -> Html:
    value, low, high = (f"{100 * number:.1f}" for number in estimate)
    return Html(f"{value}<small>{low} to {high}</small>")


def _pair(before: Estimate, after: Estimate, paired: PairedDifference) -> tuple[Html, Html, Html, str]:
    value, low, high = (f"{100 * number:+.1f}" for number in paired.difference)
    difference = Html(f"<strong>{value}</strong><small>{low} to {high}</small>")
    return _stacked(before), _stacked(after), difference, f"+{paired.gained}, -{paired.lost}"


def _percent(estimate: Estimate) -> str:
    value, low, high = (f"{100 * number:.1f}" for number in estimate)
    return f"{value} % ({low} to {high})"


def _difference(estimate: Estimate) -> str:
    value, low, high = (f"{100 * number:+.1f}" for number in estimate)
    return f"{value} ({low} to {high})"


def _task_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith(f"{_SUCCESS}/")})


def _trained_tasks(run: _Run) -> list[str]:
    return sorted({key.removeprefix(f"{_SUCCESS}/") for rows in run.metrics.values() for key in _task_metrics(rows)})


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in row.items() if isinstance(value, (int, float))}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _mean(values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _minutes(seconds: Any) -> str:
    return f"{seconds / 60:.1f}" if isinstance(seconds, (int, float)) else "-"


def _moment(written: Any) -> str:
    """A time of a run directory without seconds; whatever else stands there as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00", str(written))
    return f"{found[1]} {found[2]} UTC" if found else str(written)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", str(name)).lower()


def _video_order(path: Path) -> tuple[str, int, str]:
    """By task, and before comes before after."""
    match = _VIDEO.fullmatch(path.stem)
    folders = ("before", "after")
    place = folders.index(path.parent.name) if path.parent.name in folders else len(folders)
    return (match["task"] if match else path.stem), place, str(path)


def _still(path: Path) -> str | None:
    """The first picture of a video as the address of an image; None where it cannot be read."""
    try:
        with av.open(str(path)) as container:
            picture = next(container.decode(video=0)).to_image()
    except (av.FFmpegError, OSError, IndexError, StopIteration):
        return None
    picture.thumbnail((320, 400))
    content = io.BytesIO()
    picture.convert("RGB").save(content, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
