"""Charts of a run, drawn by matplotlib: pictures for files, or SVG that takes the light or dark colors of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from sb3_vla.common.errors import InputError
from sb3_vla.common.files import whole_file
from sb3_vla.evaluation.results import Comparison
from sb3_vla.evaluation.statistics import Estimate

STEPS, SUCCESS, SECONDS = "time/env_steps", "env/success_once", "time/time_elapsed"

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # x and y, shape (n,)
Row = Mapping[str, Any]  # metrics of an iteration

# Colors of a picture; in a page each becomes the CSS variable of its name.
_COLORS = {
    "text": "#24292f",
    "line": "#e3e6ea",
    "before": "#b4bbc4",
    "after": "#5b9ddb",
    "curve": "#2469b0",
    "thin": "#8fa3b8",
    "second": "#b35900",
}
_STYLE: Any = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "figure.titlesize": 12,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _COLORS["line"]),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), _COLORS["text"]),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "font.size": 11,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sb3-vla",  # the same chart is the same text
    "text.parse_math": False,  # a name may hold a $
}
_WIDTH = 430  # of a chart in the pixels of a page, which fits a phone
_MOST_POINTS = 200  # of a curve
_MOST_NAMES = 12  # of curves that are named at their ends


@rc_context(_STYLE)
def success_chart(rows: Sequence[Row], title: str = "") -> Figure | None:
    """Success against environment steps and minutes: as logged, smoothed, of each task, and as evaluated meanwhile.

    The lowest curves are named at their ends; in a page all are, when pointed at. None where no row has both steps and
    success.
    """
    steps, rates = metric_series(rows, STEPS, SUCCESS)
    if not len(steps):
        return None
    figure, axes = _axes(300, title)
    tasks = {metric.removeprefix(f"{SUCCESS}/"): metric_series(rows, STEPS, metric) for metric in task_metrics(rows)}
    tasks = {task: (x, smoothed(y)) for task, (x, y) in tasks.items() if len(x)}
    for number, (task, curve) in enumerate(tasks.items()):
        label = "_" if number else f"each of {len(tasks)} tasks"
        axes.plot(*_thinned(*curve), color=_COLORS["thin"], linewidth=0.8, label=label, gid=f"name:{task}")
    _plot(axes, steps, rates, "an iteration")
    evaluated = metric_series(rows, STEPS, "eval/success_once")
    if len(evaluated[0]):
        axes.plot(*evaluated, "s-", color=_COLORS["second"], markersize=4, linewidth=1.2, label="evaluated")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes, figure, max(steps[-1], 1))
    ends = {_short(task): (x[-1], y[-1]) for task, (x, y) in tasks.items()}
    _name_ends(axes, dict(sorted(ends.items(), key=lambda named: named[1][1])[:_MOST_NAMES]))
    _add_minutes(axes, *metric_series(rows, STEPS, SECONDS))
    return figure


@rc_context(_STYLE)
def metric_chart(curves: Mapping[str, Curve], x_label: str = "environment steps") -> Figure:
    """Named metrics against what was done until then; the values of the first are dots, with a smoothed line."""
    figure, axes = _axes(230)
    (first, (x, y)), *others = curves.items()
    _plot(axes, x, y, first)
    for name, curve in others:
        axes.plot(*_thinned(*curve), color=_COLORS["second"], linewidth=2, label=name)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    _finish(axes, figure, max(curve[0][-1] for curve in curves.values()), x_label)
    return figure


@rc_context(_STYLE)
def task_bars(rates: Mapping[str, Sequence[Estimate]], names: Sequence[str], title: str = "") -> Figure:
    """The success of each task, from top to bottom, with a bar and 95 % interval for each named measurement."""
    thick = 0.8 / len(names)
    figure, axes = _axes(70 + len(rates) * (12 + 8 * len(names)), title)
    places = np.arange(len(rates))
    colors = ("before", "after")[-len(names) :]
    for number, (name, color) in enumerate(zip(names, colors, strict=True)):
        value, low, high = np.array([estimates[number] for estimates in rates.values()]).T
        offset = places + (number - (len(names) - 1) / 2) * thick
        axes.barh(offset, value, thick * 0.92, color=_COLORS[color], label=name)
        axes.hlines(offset, low, high, color=_COLORS["text"], linewidth=0.9)
    for place, estimates in enumerate(rates.values()):
        said = " → ".join(f"{100 * estimate.value:.0f}" for estimate in estimates)
        axes.text(1.03, place, said, va="center", fontsize=10)
    axes.set_yticks(places, [_short(task) for task in rates])
    axes.set_ylim(len(rates) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=len(names))
    return figure


def svg(figure: Figure, said: str) -> Markup:
    """A chart as an element of a page, in the page's colors and font; curves with a name tell it when pointed at.

    :param said: what a screen reader says of it.
    """
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = (
        buffer.getvalue().partition("<svg")[2].partition(">")[2].rpartition("</svg>")[0].replace("xlink:href", "href")
    )
    body = re.sub(r"(?s)<style.*?</style>|<clipPath.*?</clipPath>", "", body)  # nothing is outside of its axes
    body = re.sub(r' clip-path="[^"]*"| id="[a-z][\w.]*_\d+"| transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r'<g id="name:([^"]*)">', r'<g class="named"><title>\1</title>', body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' [dxy]="[^"]*', lambda place: re.sub(r"(\.\d)\d+", r"\1", place[0]), body)
    for name, color in _COLORS.items():
        body = body.replace(color, f"var(--{name})")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    head = Markup('<svg viewBox="0 0 {w} {h}" style="max-width:{most}px" role="img" aria-label="{said}">')
    return head.format(w=width, h=height, most=round(1.3 * width), said=said) + Markup(body + "</svg>")


def learning_curve(rows: Sequence[Row], path: str | Path, *, title: str = "") -> None:
    """Write :func:`success_chart` to a ``.png``, ``.svg`` or ``.pdf``.

    :raises ValueError: if no row has both a success rate and a number of steps.
    """
    figure = success_chart(rows, title)
    if figure is None:
        known = sorted({key for row in rows for key in row})
        raise InputError(f"A learning curve needs {STEPS!r} and {SUCCESS!r} in a row, got {known}.")
    _save(figure, path)


def before_after_bars(comparison: Comparison, path: str | Path) -> None:
    """Write :func:`task_bars` of two evaluations to a ``.png``, ``.svg`` or ``.pdf``."""
    paired = comparison.mean_over_tasks()
    value, low, high = (f"{100 * number:+.1f}" for number in paired.difference)
    title = (
        f"{comparison.names[1]} against {comparison.names[0]}: {value} ({low} to {high}) points\n"
        f"mean over {len(comparison.before.tasks)} tasks, {paired.trials} trials,\n"
        f"paired 95 % interval, protocol {comparison.before.protocol.name}"
    )
    _save(task_bars(paired_rates(comparison), comparison.names, title), path)


def paired_rates(comparison: Comparison) -> dict[str, tuple[Estimate, Estimate]]:
    """The rates of each task before and after; the tasks that gained most come first."""
    before, after = comparison.before.per_task(), comparison.after.per_task()
    rates = {task: (before[task].rate, after[task].rate) for task in before}
    return dict(sorted(rates.items(), key=lambda each: (each[1][0].value - each[1][1].value, -each[1][1].value)))


def metric_series(rows: Sequence[Row], x: str, y: str) -> Curve:
    """The values of two metrics in the rows that have both, finite: float64, shape (n,) each."""
    pairs = np.array([(row[x], row[y]) for row in rows if x in row and y in row], np.float64).reshape(-1, 2)
    finite = pairs[np.isfinite(pairs).all(axis=1)]
    return finite[:, 0], finite[:, 1]


def task_metrics(rows: Sequence[Row]) -> list[str]:
    """The names of the metrics that are the success of a task."""
    return sorted({key for row in rows for key in row if key.startswith(f"{SUCCESS}/")})


def smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centered moving average over about a tenth of a curve, over what there is of it at the ends; shape (n,)."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _axes(height: float, title: str = "") -> tuple[Figure, Axes]:
    # Without pyplot there is no global state: a figure goes with its last reference.
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    figure.suptitle(title)
    return figure, figure.add_subplot()


def _plot(axes: Axes, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], name: str) -> None:
    axes.plot(*_thinned(x, y), ".", color=_COLORS["curve"], alpha=0.5, markersize=7, markeredgewidth=0, label=name)
    axes.plot(*_thinned(x, smoothed(y)), color=_COLORS["curve"], linewidth=2.2, label="smoothed")


def _finish(axes: Axes, figure: Figure, x_high: float, x_label: str = "environment steps") -> None:
    axes.set_xlim(0, 1.02 * x_high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(x_label)
    figure.legend(loc="outside lower center", ncols=4, handlelength=1.2, columnspacing=1)


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write the names of curves, from the lowest up, beside their ends and apart enough to be read."""
    gap = 0.062
    heights = [y for _, y in ends.values()]
    for lower in range(len(heights) - 1):
        heights[lower + 1] = max(heights[lower + 1], heights[lower] + gap)
    for below_top in range(1, len(heights) + 1):
        heights[-below_top] = min(heights[-below_top], 1 - gap * (below_top - 1))
    line = {"arrowstyle": "-", "color": _COLORS["thin"], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
    for height, (name, end) in zip(heights, ends.items(), strict=True):
        place = (1.03, height)
        axes.annotate(name, end, place, textcoords=axes.transAxes, va="center", fontsize=9, arrowprops=line)


def _add_minutes(axes: Axes, steps: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> None:
    """Round minutes on top, over the steps that were done by then; they need not grow evenly."""
    if not len(steps):
        return
    minutes = seconds / 60
    ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, minutes[-1]) if tick <= minutes[-1]]
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks, [0.0, *minutes], [0.0, *steps]), [f"{tick:g}" for tick in ticks])
    top.set_xlabel("minutes")
    top.grid(False)


def _thinned(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Curve:
    """Fewer points, counted from the end, so that the last one is kept."""
    stride = -(-len(x) // _MOST_POINTS) or 1
    return x[::-1][::stride][::-1], y[::-1][::stride][::-1]


def _short(task: str) -> str:
    return task.removesuffix("-v3")


def _save(figure: Figure, path: str | Path) -> None:
    with whole_file(path) as temporary, rc_context(_STYLE):
        figure.savefig(temporary, dpi=150, facecolor="white")
