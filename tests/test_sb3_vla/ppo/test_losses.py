"""The losses of PPO, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sb3_vla.ppo.losses import clipped_surrogate, value_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "bounded"),
    [
        (1.0, 2.0, None, -2.0, False),
        (1.1, 2.0, None, -2.2, False),  # within 1 - .2 to 1 + .3
        (1.5, 2.0, None, -2.6, False),  # no reward for going further than 1 + .3
        (0.5, 2.0, None, -1.0, False),  # a good action that has become rarer is drawn back
        (0.5, -2.0, None, 1.6, False),  # no reward for going further than 1 - .2
        (1.5, -2.0, None, 3.0, False),  # a bad action that has become likelier is pushed away
        (5.0, -2.0, 3.0, 6.0, True),  # but at most as strongly as three times its advantage
        (2.0, -2.0, 3.0, 4.0, False),
        (5.0, 2.0, 3.0, -2.6, False),  # the dual clip is of negative advantages alone
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, dual_clip: float | None, loss: float, bounded: bool) -> None:
    log_prob, old = torch.tensor([math.log(ratio) - 3.0]), torch.tensor([-3.0])
    found = clipped_surrogate(log_prob, old, torch.tensor([advantage]), torch.ones(1), 0.2, 0.3, dual_clip)
    assert found.of_decisions.item() == pytest.approx(loss, rel=1e-5)
    assert found.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert found.bounded.item() is bounded


def test_ratios_of_actions_are_summed_and_those_that_were_not_executed_count_nothing() -> None:
    log_prob = torch.log(torch.tensor([[1.1, 0.9, 7.0]]))
    found = clipped_surrogate(
        log_prob, torch.zeros(1, 3), torch.tensor([2.0]), torch.tensor([[1.0, 1.0, 0.0]]), 0.2, 0.2
    )
    assert found.of_decisions.tolist() == pytest.approx([-(2.2 + 1.8)])


def test_an_enormous_ratio_is_finite_and_has_no_gradient() -> None:
    log_prob = torch.tensor([200.0], requires_grad=True)
    found = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([-1.0]), torch.ones(1), 0.2, 0.2)
    found.of_decisions.sum().backward()
    assert torch.isfinite(found.of_decisions).all() and log_prob.grad is not None and log_prob.grad.item() == 0.0


@pytest.mark.parametrize(
    ("clip_range", "huber_delta", "loss", "share"),
    [
        (None, None, (0.5**2 + 2.0**2) / 2, None),
        (0.4, None, (0.6**2 + 2.0**2) / 2, 0.5),  # the first value moved by .5 towards its return, and counts as by .4
        (None, 1.0, (0.5**2 / 2 + (2.0 - 0.5)) / 2, None),  # above 1 the error counts linearly
    ],
)
def test_value_loss(clip_range: float | None, huber_delta: float | None, loss: float, share: float | None) -> None:
    values, old_values, returns = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])
    found, clipped = value_loss(values, old_values, returns, clip_range, huber_delta)
    assert found.item() == pytest.approx(loss)
    assert clipped == share
