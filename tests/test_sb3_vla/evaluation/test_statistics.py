"""Intervals and paired comparison against closed forms, published values and brute force."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from mw_envs import Trial
from sb3_vla.evaluation.statistics import (
    average_weights,
    bootstrap_interval,
    mcnemar_p_value,
    paired_difference,
    success_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),  # textbook values, four digits
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_known_values(successes: int, trials: int, low: float, high: float) -> None:
    estimate = wilson_interval(successes, trials)
    assert estimate.value == successes / trials
    assert estimate.low == pytest.approx(low, abs=5e-5)
    assert estimate.high == pytest.approx(high, abs=5e-5)


def test_wilson_limits_solve_the_score_equation() -> None:
    """The limits are the rates p at which (rate - p)^2 = z^2 p (1 - p) / n."""
    z = 1.6448536269514722
    for trials in (1, 7, 50):
        for successes in range(trials + 1):
            estimate = wilson_interval(successes, trials, confidence=0.9)
            for limit in (estimate.low, estimate.high):
                score = (estimate.value - limit) ** 2 - z * z * limit * (1 - limit) / trials
                assert score == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {trials} trials"):
        wilson_interval(successes, trials)


def test_confidence_out_of_range() -> None:
    with pytest.raises(ValueError, match="95"):
        wilson_interval(1, 2, confidence=95)


def test_average_weights_are_the_mean_of_group_means() -> None:
    rates = np.array([0.1, 0.5, 0.9, 0.4, 0.2, 1.0])
    groups = ["easy", "hard", "easy", "easy", "medium", "hard"]
    expected = np.mean([np.mean([0.1, 0.9, 0.4]), np.mean([0.5, 1.0]), 0.2])
    assert average_weights(groups) @ rates == pytest.approx(expected, abs=1e-12)


def test_bootstrap_equals_every_possible_resample() -> None:
    """Two tasks with two and three trials have 4 x 27 equally likely resamples: take the quantiles of those."""
    outcomes, weights = [[0, 1], [1, 0, 1]], [0.25, 0.75]
    means = sorted(
        0.25 * np.mean(one) + 0.75 * np.mean(two)
        for one in itertools.product(outcomes[0], repeat=2)
        for two in itertools.product(outcomes[1], repeat=3)
    )
    estimate = bootstrap_interval(outcomes, weights, confidence=0.5, resamples=20_000)
    assert estimate.value == pytest.approx(0.25 * 0.5 + 0.75 * 2 / 3)
    assert estimate.low == pytest.approx(np.quantile(means, 0.25), abs=1e-9)
    assert estimate.high == pytest.approx(np.quantile(means, 0.75), abs=1e-9)


def test_bootstrap_equals_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    outcomes = [(generator.random(20) < rate).astype(float) for rate in (0.1, 0.5, 0.8, 0.95)]
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    loop = [
        sum(
            weight * generator.choice(values, values.size).mean()
            for weight, values in zip(weights, outcomes, strict=True)
        )
        for _ in range(4000)
    ]
    estimate = bootstrap_interval(outcomes, weights)
    # Quantiles of 4,000 resamples have a standard error of about .0025 here.
    np.testing.assert_allclose([estimate.low, estimate.high], np.quantile(loop, [0.025, 0.975]), atol=0.01)


def test_bootstrap_near_the_normal_interval_when_large() -> None:
    outcomes = [np.repeat([1.0, 0.0], [600, 400]), np.repeat([1.0, 0.0], [300, 700])]
    half = 1.959964 * math.sqrt(0.25 * (0.6 * 0.4 + 0.3 * 0.7) / 1000)
    estimate = bootstrap_interval(outcomes)
    assert estimate.value == pytest.approx(0.45)
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.05)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.05)


def test_bootstrap_is_repeatable(untouched_global_rng: None) -> None:
    outcomes = [np.repeat([1.0, 0.0], [won, 20 - won]) for won in (3, 7, 11, 18)]
    weights = [0.11, 0.23, 0.29, 0.37]
    assert bootstrap_interval(outcomes, weights) == bootstrap_interval(outcomes, weights)
    assert bootstrap_interval(outcomes, weights, seed=1) != bootstrap_interval(outcomes, weights, seed=2)


def test_bootstrap_of_fifty_tasks_is_fast() -> None:
    outcomes = [np.repeat([1.0, 0.0], [1 + task % 49, 49 - task % 49]) for task in range(50)]
    start = time.perf_counter()
    bootstrap_interval(outcomes)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("outcomes", "weights", "message"),
    [
        ([], None, "at least one trial"),
        ([[1], []], None, "at least one trial"),
        ([[1], [0]], [1.0], "one weight for each of 2"),
    ],
)
def test_bootstrap_refuses(outcomes: list[list[int]], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(outcomes, weights)


def test_success_interval_is_the_bootstrap_where_that_can_see_something() -> None:
    expected = bootstrap_interval([[1, 0, 1, 0], [1, 1, 1, 1]], [0.3, 0.7])
    assert success_interval([2, 4], [4, 4], [0.3, 0.7]) == expected


def test_success_interval_keeps_a_width_at_zero_and_one() -> None:
    assert success_interval([7], [10]) == pytest.approx(wilson_interval(7, 10))
    never = success_interval([0, 0], [10, 10])
    wilson = wilson_interval(0, 10)
    assert never.value == never.low == 0
    assert never.high == pytest.approx(math.hypot(wilson.high / 2, wilson.high / 2))
    assert success_interval([10, 0], [10, 10]).high == pytest.approx(0.5 + wilson.high / 2)


def outcomes_of(task: str, successes: list[int]) -> dict[Trial, bool]:
    return {Trial(task, 5, goal): bool(success) for goal, success in enumerate(successes)}


def test_paired_difference_counts_and_interval() -> None:
    before = outcomes_of("reach-v3", [0, 0, 0, 1, 1]) | outcomes_of("push-v3", [0, 1, 0])
    after = outcomes_of("reach-v3", [1, 1, 0, 1, 0]) | outcomes_of("push-v3", [1, 1, 1])
    paired = paired_difference(before, after)
    assert (paired.gained, paired.lost, paired.trials) == (4, 1, 8)
    assert paired.difference.value == pytest.approx((1 / 5 + 2 / 3) / 2)
    # Brute force over trial pairs: resample index by index, the same indices before and after.
    generator = np.random.default_rng(0)
    reach, push = np.array([1, 1, 0, 0, -1]), np.array([1, 0, 1])
    loop = (
        reach[generator.integers(0, 5, (20_000, 5))].mean(1) + push[generator.integers(0, 3, (20_000, 3))].mean(1)
    ) / 2
    expected = np.quantile(loop, [0.025, 0.975])
    np.testing.assert_allclose([paired.difference.low, paired.difference.high], expected, atol=0.02)


def test_paired_difference_weights() -> None:
    before = outcomes_of("reach-v3", [0, 0]) | outcomes_of("push-v3", [0, 1])
    after = outcomes_of("reach-v3", [1, 1]) | outcomes_of("push-v3", [1, 1])
    paired = paired_difference(before, after, weights={"push-v3": 0.8, "reach-v3": 0.2})
    assert paired.difference.value == pytest.approx(0.8 * 0.5 + 0.2 * 1.0)


def test_pairing_ignores_the_order_and_narrows_the_interval() -> None:
    generator = np.random.default_rng(0)
    successes = list(generator.integers(0, 2, 60))
    improved = [1 if index < 5 else success for index, success in enumerate(successes)]
    before, after = outcomes_of("reach-v3", successes), outcomes_of("reach-v3", improved)
    shuffled = dict(reversed(after.items()))
    paired = paired_difference(before, after)
    assert paired_difference(before, shuffled) == paired
    unpaired = wilson_interval(sum(improved), 60).high - wilson_interval(sum(improved), 60).low
    assert paired.difference.high - paired.difference.low < unpaired / 2


def test_paired_difference_names_the_first_differing_trial() -> None:
    before, after = outcomes_of("reach-v3", [0, 1, 1]), outcomes_of("reach-v3", [0, 1])
    with pytest.raises(ValueError, match=r"goal=2\) was run only before"):
        paired_difference(before, after)
    with pytest.raises(ValueError, match=r"goal=2\) was run only after"):
        paired_difference(after, before)
    with pytest.raises(ValueError, match="at least one trial"):
        paired_difference({}, {})


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (6, 0, 2 / 64),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (1000, 900, 0.0231),  # the normal approximation with continuity correction gives .0231
    ],
)
def test_mcnemar(gained: int, lost: int, expected: float) -> None:
    assert mcnemar_p_value(gained, lost) == pytest.approx(expected, abs=2e-4)
    assert mcnemar_p_value(lost, gained) == mcnemar_p_value(gained, lost)
