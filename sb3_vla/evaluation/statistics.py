"""
Intervals for success rates, and the comparison of two policies on the same trials.

A trial is a success or a failure, so one task is a binomial sample (Wilson interval). A group of tasks, or a whole
suite, is a weighted mean of the rates of its tasks: the trials are resampled within each task and never across tasks,
because the tasks are chosen, not drawn. The intervals therefore say what other trials of *these* tasks would give, not
what other tasks, or another training seed, would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mw_envs import Trial
from sb3_vla.common.errors import InputError

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A measured value and the limits of its interval, all in 0..1 for a rate and -1..1 for a difference of rates."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """
    How much one policy is better than another on the same trials.

    :param difference: mean over the tasks of the rate after minus the rate before, with its paired interval
    :param gained: trials that failed before and succeed after
    :param lost: trials that succeeded before and fail after
    :param trials: trials compared
    :param p_value: exact two-sided McNemar test over all trials, that is, of ``gained`` against ``lost``
    """

    difference: Estimate
    gained: int
    lost: int
    trials: int
    p_value: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """
    Success rate of one task with its Wilson score interval, which stays inside 0..1 and has a width at 0 and at 1, too.

    :param successes: number of successes, 0..``trials``
    :param trials: number of trials, at least 1
    :param confidence: coverage wanted, between 0 and 1
    :return: the rate and its limits
    :raises ValueError: if a count or the confidence is out of range
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(
            f"Expected at least 1 trial and 0..trials successes, got {successes} successes of {trials} trials."
        )
    from scipy.stats import binomtest  # a heavy import, needed by few

    low, high = binomtest(successes, trials).proportion_ci(_checked_confidence(confidence), method="wilson")
    return Estimate(successes / trials, float(low), float(high))


def average_weights(groups: Sequence[str]) -> npt.NDArray[np.float64]:
    """
    Weights of the tasks in the mean of the group means: every group counts the same, and so does every task in a group.

    :param groups: the group of each task, length T
    :return: weights that sum to 1, shape ``(T,)``
    :raises ValueError: if there is no task
    """
    if not groups:
        raise InputError("Expected at least one task, got none.")
    sizes = {group: list(groups).count(group) for group in groups}
    return np.array([1 / (len(sizes) * sizes[group]) for group in groups])


def bootstrap_interval(
    outcomes: Sequence[npt.ArrayLike],
    weights: npt.ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """
    Weighted mean of the task means with a percentile bootstrap interval; trials are resampled within each task.

    The same input gives the same interval: the generator is this call's own.

    :param outcomes: one array per task with the outcome of each of its trials: 0 or 1, or a difference of these
    :param weights: weight of each task, shape ``(T,)``; ``None`` weighs all tasks alike
    :param confidence: coverage wanted, between 0 and 1
    :param resamples: number of bootstrap resamples
    :param seed: seed of the resampling
    :return: the weighted mean and its limits; they coincide where no task has two different outcomes
    :raises ValueError: if there is no task, a task has no trial, or the weights do not fit
    """
    arrays = [np.asarray(values, dtype=np.float64).ravel() for values in outcomes]
    if not arrays or any(values.size == 0 for values in arrays):
        raise InputError(
            f"Expected at least one trial for each task, got the counts {[values.size for values in arrays]}."
        )
    task_weights = _checked_weights(weights, len(arrays))
    tail = (1 - _checked_confidence(confidence)) / 2

    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for weight, values in zip(task_weights, arrays, strict=True):
        # Only how often each distinct outcome is drawn matters, so a resample is one multinomial draw.
        distinct, counts = np.unique(values, return_counts=True)
        draws = generator.multinomial(values.size, counts / values.size, size=resamples)
        means += weight * (draws @ distinct) / values.size
    value = sum(weight * values.mean() for weight, values in zip(task_weights, arrays, strict=True))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))


def success_interval(successes: Sequence[int], trials: Sequence[int], weights: npt.ArrayLike | None = None) -> Estimate:
    """
    Weighted mean of the success rates of several tasks, with an interval that is honest at 0 and 1.

    It is the bootstrap over trials, except where that has nothing to resample: for a single task, and where no task has
    both successes and failures, the Wilson limits of the tasks are combined instead (the squares of their weighted
    distances from the rates are summed), so that ten successes of ten are not reported as certainty. With 10 trials a
    task, the bootstrap of a 50-task average covers about 93 % instead of 95 %; a group of five tasks near 0 or 1 needs
    more than 10 trials a task.

    :param successes: number of successes of each task, length T
    :param trials: number of trials of each task, length T
    :param weights: weight of each task, shape ``(T,)``; ``None`` weighs all tasks alike
    :return: the weighted rate and its limits
    :raises ValueError: if the lengths differ or a count is out of range
    """
    if len(successes) != len(trials):
        raise InputError(
            f"Expected one count of trials for each task, got {len(successes)} tasks and {len(trials)} counts."
        )
    per_task = [wilson_interval(won, total) for won, total in zip(successes, trials, strict=True)]
    task_weights = _checked_weights(weights, len(per_task))
    if len(per_task) > 1 and any(0 < won < total for won, total in zip(successes, trials, strict=True)):
        outcomes = [np.repeat([1.0, 0.0], [won, total - won]) for won, total in zip(successes, trials, strict=True)]
        return bootstrap_interval(outcomes, task_weights)
    values, lows, highs = np.array(per_task).T
    value = float(task_weights @ values)
    low = value - float(np.linalg.norm(task_weights * (values - lows)))
    high = value + float(np.linalg.norm(task_weights * (highs - values)))
    return Estimate(value, max(0.0, low), min(1.0, high))


def paired_difference(
    before: Mapping[Trial, bool],
    after: Mapping[Trial, bool],
    weights: Mapping[str, float] | None = None,
) -> PairedDifference:
    """
    Compare two policies that were measured on exactly the same trials.

    Pairing removes the difficulty of the trials from the comparison, so the interval is narrower than that of two
    separate measurements. The bootstrap resamples pairs within each task; where all trials of a task changed alike,
    that task adds no width.

    :param before: success of the first policy in each trial
    :param after: success of the second policy in each trial
    :param weights: weight of each task; ``None`` takes the plain mean over tasks
    :return: the difference with its interval, the trials gained and lost, and McNemar's p
    :raises ValueError: if there is no trial, or a trial is in only one of the two
    """
    check_same_trials(before, after)
    changes: dict[str, list[int]] = {}
    for trial, success in before.items():
        changes.setdefault(trial.task, []).append(int(after[trial]) - int(success))
    task_weights = None if weights is None else [weights[task] for task in changes]
    difference = bootstrap_interval(list(changes.values()), task_weights)
    every_change = [change for task_changes in changes.values() for change in task_changes]
    gained, lost = every_change.count(1), every_change.count(-1)
    return PairedDifference(difference, gained, lost, len(every_change), mcnemar_p_value(gained, lost))


def mcnemar_p_value(gained: int, lost: int) -> float:
    """
    Exact two-sided McNemar test: could a fair coin have split the changed trials like this?

    :param gained: trials that only the second policy solved
    :param lost: trials that only the first policy solved
    :return: the p value in 0..1; 1 when no trial changed
    """
    from scipy.stats import binomtest  # a heavy import, needed by few

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def check_same_trials(before: Mapping[Trial, Any], after: Mapping[Trial, Any]) -> None:
    """
    Refuse to compare measurements on different trials.

    :param before: anything by trial
    :param after: anything by trial
    :raises ValueError: naming the first trial that is missing in one of the two, or if there is none at all
    """
    if not before and not after:
        raise InputError("Expected at least one trial to compare, got none.")
    for one, other, where in ((before, after, "only before"), (after, before, "only after")):
        missing = next((trial for trial in one if trial not in other), None)
        if missing is not None:
            raise InputError(
                f"A paired comparison needs the same trials before and after, but {missing} was run {where} "
                f"({len(before)} trials before, {len(after)} after). Evaluate both with the same tasks, trials per "
                "task and trial seed."
            )


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InputError(f"Expected a confidence between 0 and 1, such as 0.95, got {confidence}.")
    return confidence


def _checked_weights(weights: npt.ArrayLike | None, tasks: int) -> npt.NDArray[np.float64]:
    if tasks == 0:
        raise InputError("Expected at least one task, got none.")
    if weights is None:
        return np.full(tasks, 1 / tasks)
    checked = np.asarray(weights, dtype=np.float64)
    if checked.shape != (tasks,):
        raise InputError(f"Expected one weight for each of {tasks} tasks, got the shape {checked.shape}.")
    return checked
