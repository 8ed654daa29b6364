"""Figures of a run: its learning curve, a comparison of two evaluations, and pictures side by side."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from PIL import Image

from sb3_vla.common.errors import InputError
from sb3_vla.evaluation.results import Comparison
from sb3_vla.evaluation.statistics import Estimate
from sb3_vla.recording.videos import Frame, annotate, atomic_path

_BEFORE, _AFTER, _CURVE, _TASK, _TEXT = "#b4bbc4", "#5b9ddb", "#2469b0", "#8fa3b8", "#24292f"
_DPI = 150
_WIDTH = 6.4  # inches; at 150 dpi a little more than the width of a README


def learning_curve(
    rows: str | Path | Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "",
    success: str = "env/success_once",
    env_steps: str = "time/env_steps",
    seconds: str = "time/time_elapsed",
) -> None:
    """
    Draw success against environment steps, with the minutes on a second axis: raw, smoothed, and thin for each task.

    :param rows: metrics in order, as dictionaries or as a CSV file with a header; a row may lack a metric
    :param path: the picture, ``.png``, ``.svg`` or ``.pdf``
    :param title: title of the figure
    :param success: name of the success rate (0..1); ``<success>/<task>`` are the tasks' own
    :param env_steps: name of the number of environment steps so far
    :param seconds: name of the seconds since the start; without it there is no second axis
    :raises ValueError: if no row has both a success rate and a number of steps
    """
    table = _read_csv(rows) if isinstance(rows, (str, Path)) else list(rows)
    steps, rates = metric_series(table, env_steps, success)
    if not len(steps):
        known = sorted({key for row in table for key in row})
        raise InputError(f"A learning curve needs {env_steps!r} and {success!r} in a row, got {known}.")
    figure, axes = _figure(4.0, title)
    tasks = sorted({key for row in table for key in row if key.startswith(f"{success}/")})
    for number, task in enumerate(tasks):
        x, y = metric_series(table, env_steps, task)
        label = f"each of {len(tasks)} tasks" if number == 0 else None
        axes.plot(x, smoothed(y), color=_TASK, linewidth=0.8, alpha=0.55, label=label)
    axes.plot(steps, rates, ".", color=_CURVE, alpha=0.4, markersize=5, label="success rate while training")
    axes.plot(steps, smoothed(rates), color=_CURVE, linewidth=2.4, label="smoothed")
    axes.set_ylim(0, 1)
    axes.set_xlim(0, 1.02 * max(steps[-1], 1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("environment steps", fontsize=9)
    axes.set_ylabel("success", fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False, fontsize=8)
    _add_minutes(axes, *metric_series(table, env_steps, seconds))
    _save(figure, path)


def before_after_bars(comparison: Comparison, path: str | Path) -> None:
    """
    Draw the success of each task before and after, with 95 % intervals; the tasks that gained most come first.

    :param comparison: two evaluations on the same trials
    :param path: the picture, ``.png``, ``.svg`` or ``.pdf``
    """
    before, after = comparison.before.per_task(), comparison.after.per_task()
    gains = {task: after[task].rate.value - before[task].rate.value for task in before}
    tasks = sorted(gains, key=lambda task: (-gains[task], -after[task].rate.value, task))
    paired = comparison.mean_over_tasks()
    difference = _points(paired.difference)
    title = (
        f"{comparison.names[1]} against {comparison.names[0]}: {difference} points\n"
        f"mean over {len(tasks)} tasks, {paired.trials} trials, paired 95 % interval, protocol "
        f"{comparison.before.protocol.name}"
    )
    figure, axes = _figure(1.3 + 0.25 * len(tasks), title)
    places = np.arange(len(tasks))
    for rates, offset, color, name in (
        (before, -0.2, _BEFORE, comparison.names[0]),
        (after, 0.2, _AFTER, comparison.names[1]),
    ):
        estimates = [rates[task].rate for task in tasks]
        values = np.array([estimate.value for estimate in estimates])
        errors = np.array([[rate.value - rate.low, rate.high - rate.value] for rate in estimates]).T
        axes.barh(places + offset, values, 0.38, color=color, label=name)
        axes.errorbar(values, places + offset, xerr=errors, fmt="none", ecolor=_TEXT, elinewidth=0.8, capsize=1.5)
    axes.set_yticks(places, [task.removesuffix("-v3") for task in tasks])
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("success, with 95 % intervals", fontsize=9)
    axes.grid(False, axis="y")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)
    _save(figure, path)


def contact_sheet(frames: Sequence[Frame], captions: Sequence[str], path: str | Path, *, columns: int = 4) -> None:
    """
    Put pictures side by side, each with its caption below.

    :param frames: uint8 pictures ``(H, W, 3)`` of one size
    :param captions: a caption for each picture
    :param path: the picture, ``.png`` or ``.jpg``
    :param columns: pictures in a row
    :raises ValueError: if there is no picture, a caption is missing, or the sizes differ
    """
    if len(frames) == 0 or len(frames) != len(captions) or len({frame.shape for frame in frames}) != 1:
        shapes = sorted({frame.shape for frame in frames})
        raise InputError(
            f"Expected pictures of one size with a caption each, got {len(frames)} pictures of the shapes {shapes} and "
            f"{len(captions)} captions."
        )
    cells = [annotate(frame, [caption]) for frame, caption in zip(frames, captions, strict=True)]
    gap, columns = max(2, frames[0].shape[1] // 60), min(columns, len(cells))
    height, width = max(cell.shape[0] for cell in cells) + gap, cells[0].shape[1] + gap
    rows = -(-len(cells) // columns)
    sheet = np.full((rows * height - gap, columns * width - gap, 3), 255, np.uint8)
    for number, cell in enumerate(cells):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = cell[-1, 0]  # goes on below a shorter caption
        sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary)


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    # Without pyplot there is no global state: the figure goes with its last reference, and threads may draw.
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, color=_TEXT)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_TEXT)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _add_minutes(axes: Axes, steps: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> None:
    """Write the minutes over the ticks of the steps; they need not grow evenly."""
    if not len(steps):
        return
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= min(high, steps[-1])]
    minutes = np.interp(ticks, [0.0, *steps], [0.0, *seconds / 60])
    top = axes.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{minute:.0f}" if minutes[-1] >= 100 else f"{minute:.1f}" for minute in minutes])
    top.set_xlabel("minutes", fontsize=9)
    top.spines["top"].set_visible(False)
    top.tick_params(labelsize=8, colors=_TEXT, length=0)


def metric_series(
    table: Sequence[Mapping[str, Any]], x: str, y: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """
    The values of two metrics in the rows that have both, finite.

    :param table: metrics in order, as dictionaries; values may be text that holds a number
    :param x: name of the one
    :param y: name of the other
    :return: two arrays, float64, shape (n,)
    """
    pairs = [
        (float(row[x]), float(row[y])) for row in table if row.get(x) not in (None, "") and row.get(y) not in (None, "")
    ]
    finite = np.array([pair for pair in pairs if np.isfinite(pair).all()]).reshape(-1, 2)
    return finite[:, 0], finite[:, 1]


def smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """
    Centered moving average over about a tenth of a curve, over what there is of it at the ends.

    :param values: float64, shape (n,)
    :return: float64, shape (n,)
    """
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _read_csv(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _points(estimate: Estimate) -> str:
    value, low, high = (f"{100 * number:+.1f}" for number in estimate)
    return f"{value} ({low} to {high})"
