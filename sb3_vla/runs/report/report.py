"""
The report of a run: one HTML page with its results, curves, videos, settings and versions.

The page (``page.html.jinja``) needs nothing beside itself: style, charts (SVG), stills and videos are in it, there is
no script, and it loads nothing. Only videos beyond a limit are linked. Of an unfinished run it shows what there is, and
says what is missing. :mod:`sb3_vla.runs.watch` serves the same page while a run goes on.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from mw_envs import DIFFICULTIES
from mw_envs.tasks import suite_tasks
from sb3_vla.common.errors import InputError
from sb3_vla.common.files import write_text
from sb3_vla.common.paths import writable_file
from sb3_vla.evaluation.published import PUBLISHED
from sb3_vla.evaluation.results import Comparison, EvaluationResult
from sb3_vla.evaluation.statistics import Estimate
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.report.charts import (
    SECONDS,
    STEPS,
    SUCCESS,
    metric_chart,
    metric_series,
    paired_rates,
    smoothed,
    success_chart,
    svg,
    task_bars,
    task_metrics,
)
from sb3_vla.runs.report.contents import Contents, Video, read_contents

_HEALTH = {
    "actor/approx_kl": "Divergence of an update (approx_kl)",
    "actor/pg_clipfrac": "Share of clipped ratios (pg_clipfrac)",
    "actor/value_loss": "Critic's loss (value_loss)",
    "train/explained_variance": "Explained variance of the critic",
    "env/episode_len": "Environment steps of an episode",
    "perf/env_steps_per_second": "Environment steps per second of a rollout",
}
_HEAT_COLUMNS = 30
_PACKAGES = ("sb3-vla", "torch", "stable-baselines3", "gymnasium", "metaworld", "mujoco", "numpy", "transformers", "av")
_MEGABYTE = 1e6
# What became of a trial, by success before and after.
_OUTCOMES = {(True, True): "both", (False, True): "gained", (True, False): "lost", (False, False): "neither"}


def write_report(run: str | Path, output: str | Path | None = None, *, embed_mb: float = 20.0) -> Path:
    """
    Write the page.

    :param run: a run directory: of ``sb3-vla train``, of the quickstart, or what has files of the same names. Shown as
        before and after are ``evaluation_before.json`` and ``evaluation_after.json``, and any ``videos/**/*.mp4``
    :param output: the HTML file; None for ``report.html`` in the run directory
    :param embed_mb: size up to which videos are put into the page, in megabytes of their files; the rest is linked
    :return: the file
    :raises RunError: if there is no such directory, it is not a run's, or the file cannot be written
    :raises ValueError: if ``embed_mb`` is negative, or ``output`` a folder
    """
    if not embed_mb >= 0:
        raise InputError(f"embed_mb={embed_mb}; expected 0, to link all videos, or more")
    contents = read_contents(RunDirectory(run))
    target = writable_file(output if output is not None else contents.path / "report.html", "output")
    left, linked = embed_mb * _MEGABYTE, 0

    def address(path: Path) -> tuple[str, bool]:
        nonlocal left, linked
        data = path.read_bytes()
        if len(data) <= left:
            left -= len(data)
            return f"data:video/mp4;base64,{base64.b64encode(data).decode()}", True
        linked += 1
        return quote(os.path.relpath(path.resolve(), target.resolve().parent)), False

    trials = trial_videos(contents.videos, address)
    notes = ["A frame for each environment step: the first trials of each task."]
    if linked:
        notes.append(
            f"{linked} of {len(contents.videos)} videos are linked and not in this page, which holds {embed_mb:g} MB "
            "of them at most (embed_mb); the links work while page and run directory stay where they are."
        )
    page = render(contents, trials, notes)
    write_text(target, page)
    return target


def render(
    run: Contents,
    trials: Sequence[Sequence[Mapping[str, Any]]],
    notes: Sequence[str],
    live: Mapping[str, Any] | None = None,
) -> str:
    """
    Fill the template.

    :param run: what there is
    :param trials: of :func:`trial_videos`
    :param notes: about the videos
    :param live: of a page that reads itself again: ``state`` in a word, ``written``, when metrics were written last in
        ISO 8601 or None, and ``seconds`` between two readings; None for the report
    :return: HTML
    """
    comparison = run.comparison
    names: Sequence[str] = ("before", "after") if comparison is None else comparison.names
    found = [run.evaluations.get(name) for name in ("before", "after")]
    measured = {label: result for label, result in zip(names, found, strict=True) if result is not None}
    rates: Mapping[str, Sequence[Estimate]]
    if comparison is None:
        rates = {task: [each.rate] for result in measured.values() for task, each in result.per_task().items()}
        names = ["success"]
    else:
        rates = paired_rates(comparison)
    trained = {metric.removeprefix(f"{SUCCESS}/") for rows in run.metrics.values() for metric in task_metrics(rows)}
    practiced = [task for task in rates if task in trained]
    return _template().render(
        name=run.path.resolve().name,
        run=run,
        live=live,
        facts={**(_progress(run, live["state"]) if live else {}), **_facts(run, measured or run.evaluations)},
        measured=measured,
        difficulties=DIFFICULTIES,
        published=PUBLISHED,
        others=any(set(result.tasks) != set(suite_tasks("MT50")) for result in measured.values()),
        practiced=practiced if len(practiced) < len(rates) else [],
        paired_rates=rates,
        bars=svg(task_bars(rates, names), "Success of each task; the numbers are in the tables") if rates else "",
        charts=list(_charts(run)),
        heat_maps=list(_heat_maps(run)),
        trial_map=_trial_map(comparison) if comparison is not None else None,
        videos=trials,
        video_notes=notes,
        **_provenance(run),
    )


@functools.cache
def _template() -> Template:
    loader = PackageLoader("sb3_vla.runs.report", ".")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template("page.html.jinja")


def trial_videos(
    videos: Sequence[Video], address: Callable[[Path], tuple[str, bool]], newest: int | None = None
) -> list[list[dict[str, Any]]]:
    """
    Videos as the template takes them, those of a trial together.

    :param videos: in the order of their trials
    :param address: of a file, and whether it is played in the page instead of being linked
    :param newest: as many trials, those filmed last first; None for all, by their names
    """
    trials = [list(group) for _, group in groupby(videos, key=lambda video: video.trial)]
    if newest is not None:
        trials.sort(key=lambda trial: max(video.changed for video in trial), reverse=True)
    shown: list[list[dict[str, Any]]] = []
    for trial in trials[:newest]:
        shown.append([])
        for video in trial:
            still, ratio = _still(video.path, video.changed)
            source, plays = address(video.path) if still else ("", False)
            look = {"still": still, "ratio": ratio, "source": source, "plays": plays}
            shown[-1].append({"video": video, "mb": f"{video.size / _MEGABYTE:.1f}", **look})
    return shown


def _facts(run: Contents, measured: Mapping[str, EvaluationResult]) -> dict[str, str]:
    """What the head of the page says: the results, and how much was done."""
    facts: dict[str, str] = {}
    if measured:
        *_, (name, last) = measured.items()
        results = list(measured.values()) if run.comparison is not None else [last]
        success = "success" if run.comparison is not None else f"success {name}"
        for means, said in (
            ([result.mean_over_tasks() for result in results], f"mean over {len(last.tasks)} tasks"),
            ([result.average() for result in results], "Avg: mean of the difficulty groups"),
        ):
            facts[f"{success}, {said}"] = " → ".join(f"{100 * mean.value:.1f}" for mean in means) + " %"
    if run.comparison is not None:
        value, low, high = (f"{100 * number:+.1f}" for number in run.comparison.mean_over_tasks().difference)
        facts["difference of the means over tasks, paired 95 %"] = f"{value} ({low} to {high})"
    steps, seconds = metric_series(run.last_metrics[1], STEPS, SECONDS)
    if len(steps):
        facts |= {
            "environment steps of training": f"{steps[-1]:,.0f}",
            "minutes of training": f"{seconds[-1] / 60:.0f}",
        }
    done = sum(bool(marker.get("complete")) for marker in run.stages.values())
    return {**facts, "stages complete": f"{done} of {len(run.stages)} begun"}


def _progress(run: Contents, state: str) -> dict[str, str]:
    """Of a run under way: how well it does just now, how far it is, and how fast."""
    stage, rows = run.last_metrics
    facts = {}
    rates = metric_series(rows, STEPS, SUCCESS)[1]
    if len(rates):
        facts["success of the latest episodes, exploring"] = f"{100 * rates[-1]:.1f} %"
    length, latest = run.stages.get(stage, {}).get("length"), rows[-20:]
    decisions, seconds = metric_series(latest, "time/total_timesteps", SECONDS)
    if length and len(decisions):
        facts[f"of {stage}"] = f"{decisions[-1] / length:.0%}"
        if state == "running" and decisions[0] < decisions[-1] < length:
            pace = (seconds[-1] - seconds[0]) / (decisions[-1] - decisions[0])
            facts["minutes left, about"] = f"{(length - decisions[-1]) * pace / 60:.0f}"
    steps, seconds = metric_series(latest, STEPS, SECONDS)
    if len(steps) and seconds[-1] > seconds[0]:
        facts["environment steps/s, updates included"] = f"{(steps[-1] - steps[0]) / (seconds[-1] - seconds[0]):,.0f}"
    return facts


def _charts(run: Contents) -> Iterator[tuple[str, Markup]]:
    """A title and a chart of each thing that was logged."""
    for stage, rows in run.metrics.items():
        success = success_chart(rows)
        if success is not None:
            last = smoothed(metric_series(rows, STEPS, SUCCESS)[1])[-1]
            title = f"Success while training, {stage}" if stage else "Success while training"
            yield title, svg(success, f"{title}, over environment steps, ends at {last:.0%}")
        for metric, title in _HEALTH.items():
            steps, values = metric_series(rows, STEPS, metric)
            if len(steps) > 1:
                said = f"{title}, over environment steps, ends at {smoothed(values)[-1]:.3g}"
                yield title, svg(metric_chart({"an iteration": (steps, values)}), said)
    losses = {name: metric_series(run.imitation, "step", f"{name}_loss") for name in ("train", "validation")}
    if len(losses["train"][0]):
        chart = metric_chart({name: curve for name, curve in losses.items() if len(curve[0])}, "optimizer steps")
        said = f"Loss of imitation, over optimizer steps, ends at {losses['train'][1][-1]:.3g}"
        yield "Loss of imitation", svg(chart, said)


def _heat_maps(run: Contents) -> Iterator[dict[str, Any]]:
    """How the success of each task went: means over a few parts of the training, and what is said of each."""
    for stage, rows in run.metrics.items():
        bins = np.array_split(np.arange(len(rows)), min(_HEAT_COLUMNS, len(rows)))
        ends = [f"{rows[part[-1]].get(STEPS, float('nan')) / 1000:.0f}k" for part in bins]
        tasks = {}
        for metric in task_metrics(rows):
            values = np.array([row.get(metric, float("nan")) for row in rows], np.float64)
            means = [np.mean(found) if len(found := values[part][np.isfinite(values[part])]) else None for part in bins]
            cells = [(mean, "" if mean is None else f"{mean:.0%}", end) for mean, end in zip(means, ends, strict=True)]
            tasks[metric.removeprefix(f"{SUCCESS}/").removesuffix("-v3")] = cells
        if tasks:
            title = f"Success of each task in the course of training{f', {stage}' if stage else ''}"
            yield {"title": title, "tasks": tasks, "first": ends[0], "last": ends[-1]}


def _trial_map(comparison: Comparison) -> dict[str, Any]:
    """What became of the trials of each task, and how often."""
    after = comparison.after.successes
    tasks: dict[str, list[str]] = {task.removesuffix("-v3"): [] for task in comparison.before.tasks}
    for trial, success in comparison.before.successes.items():
        tasks[trial.task.removesuffix("-v3")].append(_OUTCOMES[success, after[trial]])
    return {"tasks": tasks, "counts": Counter(outcome for outcomes in tasks.values() for outcome in outcomes)}


def _provenance(run: Contents) -> dict[str, Any]:
    packages, git = run.versions.get("packages"), run.versions.get("git")
    listed = packages.items() if isinstance(packages, dict) else ()
    known = {
        re.sub(r"[-_.]+", "-", name).lower(): number for name, number in listed
    }  # names are spelled in several ways
    revision = f"{git.get('revision')}{', with changes' if git.get('dirty') else ''}" if isinstance(git, dict) else "-"
    versions = {
        "started": _moment(run.versions.get("started", "-")),
        "git revision": revision,
        "Python": run.versions.get("python", "-"),
        "platform": run.versions.get("platform", "-"),
        **{name: known[name] for name in _PACKAGES if name in known},
    }
    stages = []
    for name, marker in sorted(run.stages.items(), key=lambda stage: str(stage[1].get("finished", "~"))):
        seconds = marker.get("last_attempt_seconds")
        minutes = f"{seconds / 60:.1f}" if isinstance(seconds, (int, float)) else "-"
        state = "complete" if marker.get("complete") else "not complete"
        stages.append((name, state, _moment(marker.get("finished", "-")), minutes))
    return {"stages": stages, "versions": list(versions.items()), "packages": sorted(known.items())}


def _moment(written: Any) -> str:
    """A time of a run directory without seconds; whatever else stands there as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00", str(written))
    return f"{found[1]} {found[2]} UTC" if found else str(written)


@functools.lru_cache(maxsize=256)
def _still(path: Path, changed: int) -> tuple[str | None, float]:
    """The first picture of a video as the address of an image, None where it cannot be read; height over width."""
    try:
        with av.open(str(path)) as container:
            picture = next(container.decode(video=0)).to_image()
    except (av.FFmpegError, OSError, IndexError, StopIteration):
        return None, 1.0
    ratio = picture.height / picture.width
    picture.thumbnail((320, 400))
    content = io.BytesIO()
    picture.convert("RGB").save(content, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", ratio
