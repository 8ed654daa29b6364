"""Charts as inline SVG for a page: they take its light or dark colors, print sharply and need no script.

Lengths are CSS pixels of a picture that is 420 wide, which fits a phone. Classes are those of
:data:`sb3_vla.runs.report.page.STYLE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import EngFormatter, MaxNLocator

from sb3_vla.evaluation.statistics import Estimate
from sb3_vla.runs.report.page import Html, markup

_WIDTH = 420
_NAMES = 142  # room for the longest name of a task
_MOST_POINTS = 400  # of a line: one a pixel
_THOUSANDS = EngFormatter(sep="")


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    :param x: float, shape (n,).
    :param y: float, shape (n,).
    :param name: for the key; a line without one is not in it.
    :param look: ``main``, ``second``, ``thin`` or ``dots``.
    """

    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    name: str = ""
    look: str = "main"


def line_chart(lines: Sequence[Line], title: str, x_label: str, *, percent: bool = False) -> Html:
    """
    Draw lines over a common axis.

    :param lines: at least one of them has a point; points that are not finite are left out
    :param title: said above the chart and by screen readers
    :param x_label: what the horizontal axis counts
    :param percent: the values are rates, 0..1
    :return: a figure
    """
    kept = [_thinned(line) for line in lines]
    x_all, y_all = (np.concatenate([line[axis] for line in kept]) for axis in (0, 1))
    x_high = max(float(x_all.max()), 1e-9)
    y_ticks = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(
        *((0, 1) if percent else (y_all.min(), y_all.max()))
    )
    y_low, y_high = float(y_ticks[0]), float(y_ticks[-1])
    left, right, top, bottom = 46, _WIDTH - 12, 8, 168

    def place(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> str:
        across = left + (right - left) * x / x_high
        down = bottom - (bottom - top) * (y - y_low) / (y_high - y_low)
        return " ".join(f"{u:.1f},{v:.1f}" for u, v in zip(across, down, strict=True))

    parts = []
    for tick in y_ticks:
        (_, v) = place(np.array([0.0]), np.array([tick])).split(",")
        text = f"{100 * tick:.0f} %" if percent else _number(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{v}" y2="{v}"/>')
        parts.append(f'<text class="end" x="{left - 6}" y="{float(v) + 4:.1f}">{markup(text)}</text>')
    for tick in MaxNLocator(nbins=5).tick_values(0, x_high):
        if 0 <= tick <= x_high:
            u = left + (right - left) * tick / x_high
            parts.append(f'<text class="middle" x="{u:.1f}" y="{bottom + 16}">{markup(_number(tick))}</text>')
    parts.append(f'<text class="middle" x="{(left + right) / 2:.0f}" y="{bottom + 33}">{markup(x_label)}</text>')
    for line, (x, y) in zip(lines, kept, strict=True):
        if line.look == "dots":
            points = place(x, y).split()
            path = "".join(f"M{point}h0" for point in points)
            parts.append(f'<path class="dots" d="{path}"/>')
        elif len(x):
            parts.append(f'<polyline class="{line.look}" points="{place(x, y)}"/>')
    key = [(line.look, line.name) for line in lines if line.name]
    ends = [float(y[-1]) for line, (_, y) in zip(lines, kept, strict=True) if line.look == "main" and len(y)]
    said = ", ".join(f"ends at {100 * end:.0f} %" if percent else f"ends at {end:.3g}" for end in ends)
    return _figure(title, f"{title}, over {x_label}, {said}", _WIDTH, bottom + 40, parts, key)


def bars(rates: Mapping[str, Sequence[Estimate]], title: str, names: Sequence[str]) -> Html:
    """
    Draw the success of each task as one bar for each measurement, with its interval.

    :param rates: one or two rates of each task, from top to bottom
    :param title: said above the chart and by screen readers
    :param names: names of the measurements, as many as rates of a task
    :return: a figure
    """
    left, right = _NAMES, _WIDTH - 74
    height, thick = (26, 9) if len(names) > 1 else (18, 11)
    looks = ("before", "after") if len(names) > 1 else ("after",)
    bottom = 4 + height * len(rates)
    parts = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
        f'<text class="middle" x="{x:.1f}" y="{bottom + 15}">{100 * tick:.0f} %</text>'
        for tick in (0, 0.5, 1)
        for x in [left + (right - left) * tick]
    ]
    for row, (task, estimates) in enumerate(rates.items()):
        y = 4 + height * row
        parts.append(f'<text class="end" x="{left - 6}" y="{y + height / 2 + 2:.1f}">{_short(task)}</text>')
        for number, (estimate, look) in enumerate(zip(estimates, looks, strict=True)):
            value, low, high = (left + (right - left) * part for part in estimate)
            v = y + number * (thick + 1) + 1
            parts.append(f'<rect class="{look}" x="{left}" y="{v}" width="{value - left:.1f}" height="{thick}"/>')
            parts.append(f'<path class="interval" d="M{low:.1f} {v + thick / 2:.1f}H{high:.1f}"/>')
        said = " → ".join(f"{100 * estimate.value:.0f}" for estimate in estimates)
        parts.append(f'<text x="{right + 8}" y="{y + height / 2 + 2:.1f}">{said}</text>')
    key = list(zip(looks, names, strict=True))
    return _figure(title, f"{title}; the numbers are in the table of tasks", _WIDTH, bottom + 20, parts, key)


def heat_map(rates: Mapping[str, npt.NDArray[np.float64]], columns: Sequence[str], title: str, x_label: str) -> Html:
    """
    Draw how the success of each task went over time.

    :param rates: 0..1 or NaN for each column of each task, shape (columns,)
    :param columns: what each column is
    :param title: said above the chart and by screen readers
    :param x_label: what the columns count
    :return: a figure
    """
    cell, row_height = (_WIDTH - _NAMES - 8) / len(columns), 15
    bottom = row_height * len(rates)
    parts = []
    for row, (task, values) in enumerate(rates.items()):
        y = row * row_height
        parts.append(f'<text class="end" x="{_NAMES - 6}" y="{y + 11}">{_short(task)}</text>')
        for column, value in enumerate(values):
            if np.isfinite(value):
                parts.append(
                    f'<rect class="heat" x="{_NAMES + column * cell:.1f}" y="{y + 1}" width="{cell:.1f}" '
                    f'height="{row_height - 2}" fill-opacity="{min(max(value, 0.0), 1.0):.2f}">'
                    f"<title>{_short(task)}, {markup(columns[column])}: {100 * value:.0f} %</title></rect>"
                )
    parts.append(
        f'<rect class="frame" x="{_NAMES}" y="0" width="{cell * len(columns):.1f}" height="{bottom}"/>'
        f'<text x="{_NAMES}" y="{bottom + 15}">{markup(columns[0])}</text>'
        f'<text class="end" x="{_WIDTH - 8}" y="{bottom + 15}">{markup(f"{columns[-1]} {x_label}")}</text>'
    )
    scale = Html('<span class="key scale">0 %<span></span>100 %</span>')
    ends = {task: values[np.isfinite(values)] for task, values in rates.items()}
    said = ", ".join(f"{task} {100 * known[-1]:.0f} %" for task, known in ends.items() if len(known))
    return _figure(title, f"{title}, at the end: {said}", _WIDTH, bottom + 20, parts, [], scale)


def trial_map(outcomes: Mapping[str, Sequence[tuple[bool, bool]]], title: str, names: tuple[str, str]) -> Html:
    """
    Draw what became of each trial of each task: shapes tell as much as colors.

    :param outcomes: success before and after, for each trial of each task
    :param title: said above the chart and by screen readers
    :param names: what before and after are called
    :return: a figure
    """
    cell = 10
    width = _NAMES + cell * max(map(len, outcomes.values())) + 8
    shapes = {
        (True, True): ("both", "M{x} {y}h8v8h-8z", "solved by both"),
        (False, True): ("gained", "M{x} {y}h8v8h-8z", f"solved by {names[1]} only"),
        (True, False): ("lost", "M{x} {y}l8 8m0 -8l-8 8", f"solved by {names[0]} only"),
        (False, False): ("neither", "M{x} {y}m3 3h2v2h-2z", "solved by neither"),
    }
    paths = dict.fromkeys((look for look, _, _ in shapes.values()), "")
    counts = dict.fromkeys(paths, 0)
    parts = []
    for row, (task, pairs) in enumerate(outcomes.items()):
        y = row * (cell + 3) + 1
        parts.append(f'<text class="end" x="{_NAMES - 6}" y="{y + 8}">{_short(task)}</text>')
        for column, pair in enumerate(pairs):
            look, shape, _ = shapes[pair]
            paths[look] += shape.format(x=_NAMES + column * cell, y=y)
            counts[look] += 1
    parts += [f'<path class="{look}" d="{path}"/>' for look, path in paths.items()]
    key = [(look, f"{said} ({counts[look]})") for look, _, said in shapes.values()]
    said = ", ".join(text for _, text in key)
    return _figure(title, f"{title}: {said}", width, len(outcomes) * (cell + 3) + 4, parts, key)


def _figure(
    title: str,
    said: str,
    width: float,
    height: float,
    parts: Sequence[str],
    key: Sequence[tuple[str, str]],
    extra: str = "",
) -> Html:
    keys = "".join(f'<span class="key"><i class="{look}"></i>{markup(name)}</span>' for look, name in key)
    # A picture wider than a phone is moved sideways, not shrunk until it cannot be read.
    scroll = f' class="scroll" role="region" tabindex="0" aria-label="{markup(title)}"' if width > _WIDTH else ""
    return Html(
        f"<figure><figcaption>{markup(title)}</figcaption><div{scroll}>"
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{markup(said)}" '
        f'style="min-width:{0.8 * width if width > _WIDTH else 0:.0f}px;max-width:{1.35 * width:.0f}px">'
        f"{''.join(parts)}</svg></div><p>{keys}{extra}</p></figure>"
    )


def _thinned(line: Line) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    finite = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = line.x[finite], line.y[finite]
    stride = -(-len(x) // _MOST_POINTS) or 1
    # Counted from the end, so that the last point is kept.
    return x[::-1][::stride][::-1], y[::-1][::stride][::-1]


def _number(value: float) -> str:
    return str(_THOUSANDS(value)) if abs(value) >= 1000 else f"{value:g}"


def _short(task: str) -> Html:
    return markup(task.removesuffix("-v3"))
