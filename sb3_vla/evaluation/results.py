"""
Results of evaluations: success by task, by difficulty and on average, the comparison of two, and their tables.

Nothing here simulates; :mod:`sb3_vla.evaluation.evaluation` does, and makes these.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table as RichTable

from mw_envs import DIFFICULTIES, TASKS, Trial
from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError, NotThereError
from sb3_vla.common.files import read_json, write_text
from sb3_vla.common.paths import local_path
from sb3_vla.evaluation.protocols import Protocol
from sb3_vla.evaluation.statistics import (
    Estimate,
    PairedDifference,
    average_weights,
    check_same_trials,
    paired_difference,
    success_interval,
    wilson_interval,
)

_FORMAT = "sb3-vla evaluation 1"


@dataclass(frozen=True)
class TrialResult:
    """
    The outcome of one trial.

    :param trial: task, seed and goal
    :param success: whether there was a success at any step
    :param steps_to_success: environment steps until the end of the chunk that brought success; ``None`` without success
    :param length: environment steps of the episode
    :param success_at_end: whether the last step was a success
    """

    trial: Trial
    success: bool
    steps_to_success: int | None
    length: int
    success_at_end: bool


@dataclass(frozen=True)
class TaskRate:
    """Successes of one task, and its rate with the Wilson interval."""

    successes: int
    trials: int
    rate: Estimate


class _Report(abc.ABC):
    """What has a table for the terminal and for Markdown."""

    @abc.abstractmethod
    def _table(self) -> _Table: ...

    def to_markdown(self, path: str | Path | None = None) -> str:
        """
        The table as Markdown.

        :param path: also written to this file
        :return: the text
        """
        return _written(self._table().markdown(), path)

    def print_table(self, console: Console | None = None) -> None:
        """
        Print the table to a terminal.

        :param console: where to; ``None`` takes the standard output
        """
        self._table().print(console or Console())


@dataclass(frozen=True)
class EvaluationResult(_Report):
    """
    What an evaluation measured.

    ``average()`` is the field's headline number, the mean of the means of the difficulty groups; ``mean_over_tasks()``
    counts all tasks the same. Intervals are at 95 %: a bootstrap over trials, and for a single task Wilson's.

    :param protocol: the protocol, with the chunk that was executed
    :param trials: outcomes in the order of the trials
    :param versions: versions of what decides the simulation
    :param env_kwargs: what the policy saw, as far as it was not the default
    :param deterministic: whether the policy was asked for the mode; if not, the result is one sample
    """

    protocol: Protocol
    trials: tuple[TrialResult, ...]
    versions: dict[str, str]
    env_kwargs: dict[str, Any]
    deterministic: bool = True

    @property
    def successes(self) -> dict[Trial, bool]:
        """Success by trial."""
        return {outcome.trial: outcome.success for outcome in self.trials}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, from easy to very hard."""
        return tuple(task for tasks in self.groups.values() for task in tasks)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The tasks of each difficulty group that has any here."""
        names = sorted({outcome.trial.task for outcome in self.trials})
        groups = {group: tuple(name for name in names if TASKS[name].difficulty == group) for group in DIFFICULTIES}
        return {group: tasks for group, tasks in groups.items() if tasks}

    def per_task(self) -> dict[str, TaskRate]:
        """Successes, trials and rate of each task."""
        trials = Counter(outcome.trial.task for outcome in self.trials)
        won = Counter(outcome.trial.task for outcome in self.trials if outcome.success)
        return {
            task: TaskRate(won[task], trials[task], wilson_interval(won[task], trials[task])) for task in self.tasks
        }

    def per_difficulty(self) -> dict[str, Estimate]:
        """Mean over the tasks of each difficulty group that has any here."""
        return {group: self.restricted_to(tasks).mean_over_tasks() for group, tasks in self.groups.items()}

    def average(self) -> Estimate:
        """Mean of the group means. A group without a task here is left out; :attr:`groups` has the others."""
        return self._mean(average_weights([TASKS[task].difficulty for task in self.tasks]))

    def mean_over_tasks(self) -> Estimate:
        """Mean over the tasks."""
        return self._mean(None)

    def mean_success_at_end(self) -> Estimate | None:
        """Mean over the tasks of success at the last step; ``None`` where episodes end at the first success."""
        if self.protocol.terminate_on_success:
            return None
        at_end = tuple(dataclasses.replace(outcome, success=outcome.success_at_end) for outcome in self.trials)
        return dataclasses.replace(self, trials=at_end).mean_over_tasks()

    def restricted_to(self, tasks: Sequence[str]) -> EvaluationResult:
        """
        The same measurement of some of the tasks.

        :param tasks: task names
        :return: the result with their trials only
        :raises ValueError: if there is no task, or one that was not evaluated
        """
        if not tasks:
            raise InputError("Expected at least one task, got none.")
        for task in tasks:
            if task not in self.tasks:
                raise InputError(f"Task {task!r} was not evaluated; {did_you_mean(task, self.tasks)}.")
        return dataclasses.replace(
            self, trials=tuple(outcome for outcome in self.trials if outcome.trial.task in tasks)
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """
        The result as JSON: a summary for other programs, and one line per trial.

        :param path: also written to this file
        :return: the text
        """
        head = {
            "format": _FORMAT,
            "protocol": dataclasses.asdict(self.protocol),
            "env_kwargs": self.env_kwargs,
            "deterministic": self.deterministic,
            "versions": self.versions,
            "average": self.average()._asdict() | {"groups": list(self.groups)},
            "mean_over_tasks": self.mean_over_tasks()._asdict(),
            "per_difficulty": {group: mean._asdict() for group, mean in self.per_difficulty().items()},
            "per_task": {
                task: {"successes": rate.successes, "trials": rate.trials} | rate.rate._asdict()
                for task, rate in self.per_task().items()
            },
        }
        rows = [outcome.trial._asdict() | _without(vars(outcome), "trial") for outcome in self.trials]
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "trials": [\n    {lines}\n  ]\n}}\n'
        return _written(text, path)

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationResult:
        """
        Read a result that :meth:`to_json` wrote.

        :param path: the file
        :return: an equal result
        :raises FileNotFoundError: if it is not there, or a folder
        :raises ValueError: if the file is not one
        """
        path = local_path(path)
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise NotThereError(f"{path} {found}; expected the JSON file that `sb3-vla eval output=...` wrote")
        try:
            stored = read_json(path)
            if stored["format"] != _FORMAT:
                raise InputError(f"its format is {stored['format']!r}")
            trials = tuple(
                TrialResult(Trial(row["task"], row["seed"], row["goal"]), **_without(row, *Trial._fields))
                for row in stored["trials"]
            )
            protocol = Protocol(**stored["protocol"])
            return cls(protocol, trials, stored["versions"], stored["env_kwargs"], stored["deterministic"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a file of the format {_FORMAT!r}: {error!r}.") from error

    def _mean(self, weights: npt.NDArray[np.float64] | None) -> Estimate:
        rates = self.per_task().values()
        return success_interval([rate.successes for rate in rates], [rate.trials for rate in rates], weights)

    def _table(self) -> _Table:
        rates, means = self.per_task(), self.per_difficulty()
        sections = [
            [(task, f"{rates[task].successes}/{rates[task].trials}", *_percent(rates[task].rate)) for task in tasks]
            for tasks in self.groups.values()
        ]
        summary = [(_title(group), "", *_percent(mean)) for group, mean in means.items()]
        summary.append((_average_title(self.groups), "", *_percent(self.average())))
        summary.append(("Mean over tasks", "", *_percent(self.mean_over_tasks())))
        at_end = self.mean_success_at_end()
        if at_end is not None:
            summary.append(("Mean over tasks at the last step", "", *_percent(at_end)))
        columns = ("Task", "Successes", "Success %", "95 % interval")
        return _Table(self.protocol, columns, sections, summary, [*_missing_groups(self.groups), _circumstances(self)])


@dataclass(frozen=True)
class Comparison(_Report):
    """
    Two evaluations on the same trials, made by :func:`compare`.

    :param before: the first
    :param after: the second
    :param names: their names in tables and figures
    """

    before: EvaluationResult
    after: EvaluationResult
    names: tuple[str, str] = ("before", "after")

    def per_task(self) -> dict[str, PairedDifference]:
        """Paired difference of each task."""
        return {task: self.restricted_to([task]).mean_over_tasks() for task in self.before.tasks}

    def per_difficulty(self) -> dict[str, PairedDifference]:
        """Paired difference of the mean of each difficulty group that has a task here."""
        return {group: self.restricted_to(tasks).mean_over_tasks() for group, tasks in self.before.groups.items()}

    def average(self) -> PairedDifference:
        """Paired difference of the mean of the group means."""
        weights = average_weights([TASKS[task].difficulty for task in self.before.tasks]).tolist()
        by_task = dict(zip(self.before.tasks, weights, strict=True))
        return paired_difference(self.before.successes, self.after.successes, by_task)

    def mean_over_tasks(self) -> PairedDifference:
        """Paired difference of the mean over tasks."""
        return paired_difference(self.before.successes, self.after.successes)

    def restricted_to(self, tasks: Sequence[str]) -> Comparison:
        """
        The same comparison of some of the tasks.

        :param tasks: task names
        :return: the comparison of their trials only
        :raises ValueError: if there is no task, or one that was not evaluated
        """
        return Comparison(self.before.restricted_to(tasks), self.after.restricted_to(tasks), self.names)

    def to_json(self, path: str | Path | None = None) -> str:
        """
        The comparison as JSON; the trials themselves are in the two results.

        :param path: also written to this file
        :return: the text
        """
        tasks, groups, (average, mean) = self._entries()
        content = {
            "format": "sb3-vla comparison 1",
            "protocol": dataclasses.asdict(self.before.protocol),
            "names": list(self.names),
            "average": average.json() | {"groups": list(groups)},
            "mean_over_tasks": mean.json(),
            "per_difficulty": {group: entry.json() for group, entry in groups.items()},
            "per_task": {task: entry.json() for task, entry in tasks.items()},
        }
        return _written(json.dumps(content, indent=2) + "\n", path)

    def _entries(self) -> tuple[dict[str, _Entry], dict[str, _Entry], tuple[_Entry, _Entry]]:
        """What stands in the table: by task, by group, and the two means."""
        one, other = self.before.per_task(), self.after.per_task()
        tasks = {task: _Entry(one[task].rate, other[task].rate, paired) for task, paired in self.per_task().items()}
        before, after = self.before.per_difficulty(), self.after.per_difficulty()
        groups = {group: _Entry(before[group], after[group], paired) for group, paired in self.per_difficulty().items()}
        average = _Entry(self.before.average(), self.after.average(), self.average())
        mean = _Entry(self.before.mean_over_tasks(), self.after.mean_over_tasks(), self.mean_over_tasks())
        return tasks, groups, (average, mean)

    def _table(self) -> _Table:
        tasks, groups, (average, mean) = self._entries()
        sections = [[(task, *tasks[task].cells()) for task in names] for names in self.before.groups.values()]
        summary = [(_title(group), *entry.cells()) for group, entry in groups.items()]
        summary.append((_average_title(groups), *average.cells()))
        summary.append(("Mean over tasks", *mean.cells()))
        paired = mean.paired
        notes = [
            *_missing_groups(groups),
            f"{paired.gained} of {paired.trials} trials gained, {paired.lost} lost, McNemar p = {paired.p_value:.2g}.",
            _circumstances(self.before),
        ]
        if _circumstances(self.before) != _circumstances(self.after):
            notes.append(f"{self.names[1]}: {_circumstances(self.after)}")
        columns = ("Task", f"{self.names[0]} %", f"{self.names[1]} %", "Difference", "95 % interval, paired")
        return _Table(self.before.protocol, columns, sections, summary, notes)


def compare(
    before: EvaluationResult, after: EvaluationResult, names: tuple[str, str] = ("before", "after")
) -> Comparison:
    """
    Compare two policies that ran the same trials under the same protocol.

    :param before: the first result
    :param after: the second result
    :param names: what to call them in tables and figures
    :return: the comparison
    :raises ValueError: if the protocols or the trials differ
    """
    for field in ("name", "horizon", "settle_steps"):
        one, other = getattr(before.protocol, field), getattr(after.protocol, field)
        if one != other:
            raise InputError(f"A comparison needs one protocol, but its {field} is {one!r} before and {other!r} after.")
    check_same_trials(before.successes, after.successes)
    return Comparison(before, after, names)


@dataclass(frozen=True)
class _Entry:
    """One line of a comparison."""

    before: Estimate
    after: Estimate
    paired: PairedDifference

    def json(self) -> dict[str, Any]:
        paired = vars(self.paired) | {"difference": self.paired.difference._asdict()}
        return {"before": self.before._asdict(), "after": self.after._asdict()} | paired

    def cells(self) -> tuple[str, ...]:
        return _percent(self.before)[0], _percent(self.after)[0], *_percent(self.paired.difference, sign="+")


@dataclass(frozen=True)
class _Table:
    """A table on its way to the terminal or to Markdown."""

    protocol: Protocol
    columns: tuple[str, ...]
    sections: Sequence[Sequence[tuple[str, ...]]]
    summary: Sequence[tuple[str, ...]]
    notes: list[str]

    def markdown(self) -> str:
        rows = [row for section in self.sections for row in section]
        rows += [tuple(f"**{cell}**" if cell else "" for cell in row) for row in self.summary]
        rule = ("---", *["---:"] * (len(self.columns) - 1))
        table = "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *rows))
        return "\n\n".join([f"Protocol {self.protocol}", table, *self.notes]) + "\n"

    def print(self, console: Console) -> None:
        table = RichTable()
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for section in self.sections:
            for row in section:
                table.add_row(*row)
            table.add_section()
        for row in self.summary:
            table.add_row(*row, style="bold")
        # Beside the table, not as its title and caption, which are broken at its width.
        console.print(f"Protocol {self.protocol}", style="bold", highlight=False)
        console.print(table)
        console.print("\n".join(self.notes), highlight=False)


def _percent(estimate: Estimate, sign: str = "") -> tuple[str, str]:
    value, low, high = (f"{100 * number:{sign}.1f}" for number in estimate)
    return value, f"{low} to {high}"


def _title(difficulty: str) -> str:
    return difficulty.replace("_", " ").capitalize()


def _average_title(groups: Mapping[str, Any]) -> str:
    return f"Avg (mean of {len(groups)} groups)" if len(groups) > 1 else "Avg (of one group)"


def _missing_groups(groups: Mapping[str, Any]) -> list[str]:
    missing = [group.replace("_", " ") for group in DIFFICULTIES if group not in groups]
    return [f"Avg leaves out the groups without a task here: {', '.join(missing)}."] if missing else []


def _circumstances(result: EvaluationResult) -> str:
    seen = ", ".join(f"{name}={value!r}" for name, value in result.env_kwargs.items())
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    mode = "" if result.deterministic else "sampled actions, "
    return f"{len(result.trials)} trials, {mode}{seen or 'default observations'}, {versions}."


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(path, text)
    return text
