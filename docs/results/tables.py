"""The tables and the figure of results.md, from the files beside this one.

    python docs/results/tables.py                     # write them again
    python docs/results/tables.py add NAME EVALUATION.json key=value ...

A file holds one measured row: who succeeded in which trial, and how the policy was made. ``add`` makes one of what
``sb3-vla eval`` or a run wrote; its keys are those of :class:`Row`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mw_envs import DIFFICULTIES, Trial
from sb3_vla.evaluation.evaluation import trials_for
from sb3_vla.evaluation.protocols import Protocol
from sb3_vla.evaluation.published import PUBLISHED
from sb3_vla.evaluation.results import EvaluationResult, TrialResult, compare
from sb3_vla.evaluation.statistics import Estimate

FOLDER = Path(__file__).parent
HARD_TASKS = (
    *("reach-v3", "push-v3", "pick-place-v3", "peg-insert-side-v3", "basketball-v3", "bin-picking-v3", "box-close-v3"),
    *("soccer-v3", "hammer-v3", "handle-pull-side-v3", "sweep-into-v3", "stick-push-v3"),
)


@dataclass
class Row:
    """One measured policy.

    :param title: what stands in the table.
    :param order: rows are sorted by it.
    :param parameters: of the model.
    :param effort: what training it took, as in ``2 cores, 1 h``.
    :param commands: that made and measured it.
    :param commit: of this repository at which they ran.
    :param seed: of the training.
    :param machine: on which they ran.
    :param before: name of the row with which it is compared, trial by trial.
    :param note: what a reader must know.
    :param protocol: of the evaluation.
    :param trial_seed: of its trials, which are those of :func:`sb3_vla.evaluation.trials_for`.
    :param versions: of what decides the simulation.
    :param outcomes: of each task a digit a trial, 1 for success.
    """

    title: str
    order: float = 0.0
    parameters: str = ""
    effort: str = ""
    commands: list[str] = field(default_factory=list)
    commit: str = ""
    seed: int = 0
    machine: str = ""
    before: str | None = None
    note: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    trial_seed: int = 0
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    deterministic: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def result(self) -> EvaluationResult:
        """The evaluation; how long its episodes were is not kept."""
        trials = tuple(
            TrialResult(trial, digit == "1", None, self.protocol["horizon"], digit == "1")
            for task, digits in self.outcomes.items()
            for trial, digit in zip(trials_for([task], len(digits), self.trial_seed), digits, strict=True)
        )
        return EvaluationResult(Protocol(**self.protocol), trials, self.versions, self.env_kwargs, self.deterministic)


def add(name: str, evaluation: str, settings: dict[str, Any]) -> None:
    """Make a row's file of an evaluation."""
    result = EvaluationResult.from_json(evaluation)
    outcomes: dict[str, list[Trial]] = {}
    for outcome in result.trials:
        outcomes.setdefault(outcome.trial.task, []).append(outcome.trial)
    seed = min(trial.seed for trials in outcomes.values() for trial in trials)
    for task, trials in outcomes.items():
        if trials != trials_for([task], len(trials), seed):
            raise SystemExit(f"{evaluation}: the trials of {task} are not those of an evaluation")
    for needed in ("title", "commit", "commands"):
        if needed not in settings:
            raise SystemExit(f"{needed}=... is missing; a row says how it was made")
    settings.setdefault("machine", f"{len(os.sched_getaffinity(0))} cores, {_processor()}, no GPU")
    row = Row(
        **settings,
        protocol=dataclasses.asdict(result.protocol),
        trial_seed=seed,
        deterministic=result.deterministic,
        env_kwargs={key: value for key, value in result.env_kwargs.items() if key != "renderer"},
        versions=result.versions,
        outcomes={
            task: "".join("1" if result.successes[trial] else "0" for trial in trials)
            for task, trials in outcomes.items()
        },
    )
    (FOLDER / f"{name}.json").write_text(json.dumps(dataclasses.asdict(row), indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write() -> None:
    """Write ``results.md`` and ``mt50.png``."""
    rows = {path.stem: Row(**json.loads(path.read_text(encoding="utf-8"))) for path in FOLDER.glob("*.json")}
    rows = dict(sorted(rows.items(), key=lambda item: (item[1].order, item[0])))
    results = {name: row.result() for name, row in rows.items()}
    protocols = list(dict.fromkeys(row.protocol["name"] for row in rows.values()))
    parts = [
        "# Results\n\nWritten by `python docs/results/tables.py` from the files in this folder; success in percent, "
        "with 95 % intervals. Avg is the mean of the means of the four difficulty groups, as in the published tables.\n"
    ]
    for protocol in protocols:
        parts += [
            f"## {protocol}\n",
            *_overview({n: r for n, r in results.items() if rows[n].protocol["name"] == protocol}, rows),
        ]
    parts += ["## Task by task\n", *_by_task(results, rows)]
    parts += ["## How each row was made\n", *(_made(name, row) for name, row in rows.items())]
    (FOLDER / "results.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    _draw({n: r for n, r in results.items() if rows[n].protocol["name"] == "rlinf-160" and len(r.groups) == 4}, rows)


def _overview(results: dict[str, EvaluationResult], rows: dict[str, Row]) -> list[str]:
    head = [
        "",
        "parameters",
        "training",
        *(group.replace("_", " ") for group in DIFFICULTIES),
        "Avg",
        "12 hard tasks",
        "gain",
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    if next(iter(results.values())).protocol.name == "rlinf-160":
        for row in PUBLISHED:
            rates = [f"{rate:.1f}" for rate in (*row.rates, row.average)]
            lines.append(_line([f"{row.method} ({row.source})", "", "published", *rates, "", ""]))
    for name, result in results.items():
        row, groups = rows[name], result.per_difficulty()
        means = [f"{100 * groups[group].value:.1f}" if group in groups else "" for group in DIFFICULTIES]
        hard = [task for task in HARD_TASKS if task in result.tasks]
        hardest = _told(result.restricted_to(hard).mean_over_tasks()) if len(hard) == len(HARD_TASKS) else ""
        average = _told(result.average() if len(groups) == len(DIFFICULTIES) else result.mean_over_tasks())
        gain = ""
        if row.before is not None:
            paired = compare(rows[row.before].result(), result)
            change = (paired.average() if len(groups) == len(DIFFICULTIES) else paired.mean_over_tasks()).difference
            gain = f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
        lines.append(_line([f"**{row.title}**", row.parameters, row.effort, *means, f"**{average}**", hardest, gain]))
    trials = sorted({len(digits) for name in results for digits in rows[name].outcomes.values()})
    told = " or ".join(map(str, trials))
    return [
        *lines,
        "",
        f"Ours: {told} trials a task, the last weights and never the best ones. The gain is that over the policy before"
        " reinforcement learning, trial by trial.\n",
    ]


def _by_task(results: dict[str, EvaluationResult], rows: dict[str, Row]) -> list[str]:
    whole = {name: result for name, result in results.items() if len(result.groups) == 4}
    if not whole:
        return []
    lines = [_line(["", *(rows[name].title for name in whole)]), _line(["---"] * (1 + len(whole)))]
    for group in DIFFICULTIES:
        for task in next(iter(whole.values())).groups[group]:
            rates = [result.per_task().get(task) for result in whole.values()]
            lines.append(_line([task, *("" if rate is None else f"{100 * rate.rate.value:.0f}" for rate in rates)]))
    return [*lines, ""]


def _made(name: str, row: Row) -> str:
    commands = "\n".join(row.commands)
    note = f"{row.note}\n\n" if row.note else ""
    return (
        f"### {row.title}\n\n{note}`{name}.json`: commit {row.commit}, seed {row.seed}, {row.machine}; "
        f"{row.effort}.\n\n```bash\n{commands}\n```\n"
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _told(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _draw(results: dict[str, EvaluationResult], rows: dict[str, Row]) -> None:
    """Avg of MT50, published and ours, as bars."""
    bars = [(row.method, row.average / 100, None, False) for row in PUBLISHED]
    bars += [(rows[name].title, result.average().value, result.average(), True) for name, result in results.items()]
    bars.sort(key=lambda bar: bar[1])
    figure = Figure(figsize=(6.4, 0.3 * len(bars) + 0.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (_, value, interval, ours) in enumerate(bars):
        axes.barh(place, 100 * value, color="#2469b0" if ours else "#b4bbc4")
        if interval is not None:
            axes.hlines(place, 100 * interval.low, 100 * interval.high, color="#24292f", linewidth=1.2)
        axes.text(100 * value - 1, place, f"{100 * value:.1f}", ha="right", va="center", fontsize=7, color="white")
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    axes.set_xlim(0, 100)
    axes.set_xlabel("MT50, mean of the difficulty groups, % (rlinf-160)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "mt50.png")


def main(arguments: list[str]) -> None:
    """See the module."""
    if arguments[:1] == ["add"]:
        name, evaluation, *given = arguments[1:]
        import yaml

        add(name, evaluation, {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in given)})
    write()


if __name__ == "__main__":
    main(sys.argv[1:])
