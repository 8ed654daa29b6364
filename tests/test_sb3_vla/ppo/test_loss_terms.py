"""Terms of PPO's loss against hand computations, and their gradients over minibatches and micro-batches."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from toy import TINY, decisions, metrics, same, stir, toy_demonstrations, toy_ppo, toy_vec, weights, whole_minibatch

from sb3_vla import PPO
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.policies.vla_policy import Evaluation
from sb3_vla.ppo.behavior_policy import BehaviorPolicy
from sb3_vla.rollouts.buffers import DecisionBatch


def batch_of(values: list[float], advantages: list[float], returns: list[float]) -> DecisionBatch:
    count = len(values)
    return DecisionBatch(
        observations={},
        trace={},
        executed=torch.full((count,), 2),
        values=torch.tensor(values),
        advantages=torch.tensor(advantages),
        returns=torch.tensor(returns),
        indices=torch.arange(count),
    )


def evaluation(log_prob: list[float], **options: Any) -> Evaluation:
    mean = torch.zeros(len(log_prob), 2, 2)
    return Evaluation(
        **{
            "values": torch.zeros(len(log_prob)),
            "log_prob": torch.tensor(log_prob),
            "mean": mean,
            "std": torch.full_like(mean, 0.5),
            "entropy": None,
            **options,
        }
    )


def old_policy(log_prob: list[float], reference_mean: Tensor | None = None) -> BehaviorPolicy:
    mean, std = torch.zeros(len(log_prob), 2, 2), torch.full((len(log_prob), 2, 2), 0.5)
    old = known(Evaluation(mean[:, 0, 0], torch.tensor(log_prob), mean, std, None))
    if reference_mean is not None:
        old.reference = known(Evaluation(mean[:, 0, 0], torch.tensor(log_prob), reference_mean, std, None))
    return old


def known(found: Evaluation) -> BehaviorPolicy:
    old = BehaviorPolicy(len(found.mean))
    old.keep(torch.arange(len(found.mean)), found)
    return old


def test_clipped_surrogate_by_hand() -> None:
    algorithm = toy_ppo(normalize_advantage=False)
    # ratios 1.5, 0.5, 1.1, 0.5
    new = evaluation([math.log(r) for r in (1.5, 0.5, 1.1, 0.5)])
    noted: dict[str, float] = {}
    batch = batch_of([0.0] * 4, [1.0, -1.0, 2.0, 3.0], [0.0] * 4)
    loss = algorithm._actor_loss(new, batch, old_policy([0.0] * 4), noted)
    # min(1.5, 1.2) + min(-0.5, -0.8) + 2.2 + min(1.5, 2.4)
    assert loss.item() == pytest.approx(-(1.2 - 0.8 + 2.2 + 1.5) / 4, abs=1e-6)
    assert noted["clip_fraction"] == 0.75
    assert noted["ratio_max"] == pytest.approx(1.5)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_advantages_are_normalized_over_the_minibatch(micro_batch_size: int | None) -> None:
    algorithm = toy_ppo(batch_size=8, micro_batch_size=micro_batch_size, learning_rate=0.0)
    given: list[DecisionBatch] = []
    real = algorithm._actor_loss

    def actor_loss(found: Evaluation, batch: DecisionBatch, *rest: Any) -> Tensor:
        given.append(batch)
        return real(found, batch, *rest)

    algorithm._actor_loss = actor_loss  # type: ignore[method-assign,assignment]
    algorithm.learn(16)
    per_minibatch = 1 if micro_batch_size is None else 3
    assert len(given) == 2 * per_minibatch
    for batches in (given[:per_minibatch], given[per_minibatch:]):
        indices = torch.cat([batch.indices for batch in batches])
        raw = decisions(algorithm).advantages.flatten()[indices].double()
        expected = (raw - raw.mean()) / raw.std()
        found = torch.cat([batch.advantages for batch in batches]).double()
        assert len(found) == 8
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_asymmetric_clip_and_dual_clip_by_hand() -> None:
    algorithm = toy_ppo(normalize_advantage=False, clip_range_high=0.5, dual_clip=3.0)
    # ratio, advantage, surrogate: the rise is clipped at 1.5, the fall at 0.8, and what is negative at 3 A.
    table = [(1.4, 1.0, 1.4), (2.0, 1.0, 1.5), (0.5, -1.0, -0.8), (2.0, -1.0, -2.0), (8.0, -0.5, -1.5), (8.0, 0.0, 0.0)]
    ratios, advantages, surrogates = (list(column) for column in zip(*table, strict=True))
    new = evaluation([math.log(ratio) for ratio in ratios])
    noted: dict[str, float] = {}
    batch = batch_of([0.0] * 6, advantages, [0.0] * 6)
    loss = algorithm._actor_loss(new, batch, old_policy([0.0] * 6), noted)
    assert loss.item() == pytest.approx(-sum(surrogates) / 6, abs=1e-6)
    assert noted["clip_fraction"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_out_of_range_gives_a_finite_gradient(advantage: float) -> None:
    algorithm = toy_ppo(normalize_advantage=False)
    log_prob = torch.tensor([200.0, 0.0], requires_grad=True)
    batch = batch_of([0.0] * 2, [advantage] * 2, [0.0] * 2)
    new = replace(evaluation([0.0, 0.0]), log_prob=log_prob)
    algorithm._actor_loss(new, batch, old_policy([0.0, 0.0]), {}).backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [0.0, -advantage / 2]


def test_ratios_of_actions_and_tokens_by_hand() -> None:
    """Two decisions of two actions of two dimensions; of the second decision one action was run."""
    ratios = torch.tensor([[[1.1, 1.5], [0.5, 1.0]], [[0.9, 1.3], [1.0, 1.0]]])
    batch = batch_of([0.0] * 2, [2.0, -1.0], [0.0] * 2)
    batch.executed = torch.tensor([2, 1])
    # clipped at 0.8 and 1.2
    expected = {
        "token": (2 * (1.1 + 1.2 + 0.5 + 1.0) - (0.9 + 1.3)) / 2,
        "action": (2 * (1.2 + 0.5) - 1.17) / 2,  # ratios 1.65, 0.5; 1.17
        "chunk": (2 * 0.825 - 1.17) / 2,
    }
    fractions = {"token": 3 / 6, "action": 2 / 3, "chunk": 0.0}
    for logprob_type, surrogate in expected.items():
        algorithm = toy_ppo(normalize_advantage=False, logprob_type=logprob_type)
        log_prob = ratios.log()
        log_prob = {"token": log_prob, "action": log_prob.sum(2), "chunk": log_prob.sum((1, 2))}[logprob_type]
        old = old_policy([0.0, 0.0])
        old.log_prob = torch.zeros_like(log_prob)
        noted: dict[str, float] = {}
        loss = algorithm._actor_loss(replace(evaluation([0.0] * 2), log_prob=log_prob), batch, old, noted)
        assert loss.item() == pytest.approx(-surrogate, abs=1e-6), logprob_type
        assert noted["clip_fraction"] == pytest.approx(fractions[logprob_type]), logprob_type


def gradient(algorithm: PPO, count: int = 16) -> dict[str, Tensor]:
    """Of the loss of a whole rollout, in the order of the buffer, against its own weights."""
    indices = torch.arange(count)
    algorithm.clip_range_vf = FloatSchedule(0.05)
    old = algorithm._behavior_policy(decisions(algorithm), [indices])
    algorithm._accumulate_gradient(
        decisions(algorithm), whole_minibatch(decisions(algorithm), indices), old, defaultdict(list)
    )
    return {name: p.grad.clone() for name, p in algorithm.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model", "distribution", "types"),
    [
        ("compact", "gaussian", ("action", "token")),
        ("compact", "flow_sde", ("action", "token", "denoising_step")),
        ("toy_tokens", "tokens", ("action", "token")),
    ],
)
def test_every_type_of_ratio_starts_with_the_same_gradient(
    toy_models: None, model: str, distribution: str, types: tuple[str, ...]
) -> None:
    options: dict[str, Any] = {"model": model, "distribution": distribution}
    options["model_kwargs"] = {} if model == "toy_tokens" else TINY
    algorithm = toy_ppo(toy_vec(2, horizon=2, executed=1), **options)
    algorithm.learn(16)
    expected = gradient(algorithm)
    assert max(g.abs().max().item() for g in expected.values()) > 1e-3
    for logprob_type in types:
        algorithm.logprob_type = logprob_type
        found = gradient(algorithm)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    # And they are different algorithms from the second step on.
    ends = []
    for logprob_type in ("chunk", *types):
        algorithm = toy_ppo(logprob_type=logprob_type, n_epochs=4, learning_rate=1e-3, **options)
        algorithm.learn(16)
        assert metrics(algorithm)["train/skipped_steps"] == 0
        ends.append(weights(algorithm.policy))
    same_step = distribution == "flow_sde"  # one random step: its ratio is the chunk's
    assert sum(same(ends[0], other) for other in ends[1:]) == same_step


@pytest.mark.parametrize("logprob_type", ["action", "token"])
def test_ratios_of_parts_are_one_before_the_first_step(logprob_type: str) -> None:
    algorithm = toy_ppo(logprob_type=logprob_type, micro_batch_size=5)
    algorithm.learn(16)
    found = metrics(algorithm)
    assert found["train/ratio_max"] == 1.0 and found["actor/pg_clipfrac"] == 0 and found["actor/approx_kl"] == 0


@pytest.mark.parametrize("size", [1, 5, 8])
def test_micro_batches_add_up_to_the_minibatch(size: int) -> None:
    """With every term of the loss, ratios and values that have moved, and a last micro-batch that is smaller."""
    options: dict[str, Any] = {"learn_std": True}
    rehearsal = DemonstrationBatches(toy_demonstrations(), None, 2, 0, 0)
    algorithm = toy_ppo(
        toy_vec(2, horizon=3, truncates=True, action_dim=4),
        distribution_kwargs=options,
        logprob_type="action",
        kl_coef=0.1,
        ent_coef=0.1,
        huber_delta=0.1,
        dual_clip=2.0,
        rehearsal=rehearsal,
        n_epochs=2,
    )
    algorithm.learn(16)
    indices = torch.randperm(16)
    old = algorithm._behavior_policy(decisions(algorithm), [indices])
    stir(algorithm.policy, 0.01, seed=3)
    algorithm.clip_range_vf = FloatSchedule(0.05)
    found = {}
    for micro_batch_size in (None, size):
        algorithm.micro_batch_size = micro_batch_size
        rehearsal.generator = np.random.default_rng(0)
        torch.manual_seed(0)
        record: defaultdict[str, list[float]] = defaultdict(list)
        loss, kl = algorithm._accumulate_gradient(
            decisions(algorithm), whole_minibatch(decisions(algorithm), indices), old, record
        )
        assert len(record["ratio_max"]) == (1 if micro_batch_size is None else math.ceil(16 / size))
        assert 0 < np.mean(record["clip_fraction"]) < 1 and len(record["rehearsal_loss"]) == 1
        found[micro_batch_size] = loss, kl, {n: p.grad.clone() for n, p in algorithm.policy.named_parameters()}
    whole, parts = found[None], found[size]
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert whole[1] is not None and parts[1] == pytest.approx(whole[1], rel=1e-4)
    summed, at_once = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (parts[2], whole[2]))
    assert (summed - at_once).norm() < 1e-5 * at_once.norm()


def test_entropy_and_reference_terms_by_hand() -> None:
    learned = {"distribution_kwargs": {"learn_std": True}}
    algorithm = toy_ppo(normalize_advantage=False, ent_coef=0.3, kl_coef=0.7, policy_kwargs=learned)
    new = evaluation([0.0, 0.0], entropy=torch.tensor([2.0, 4.0]))
    batch = batch_of([0.0] * 2, [0.0] * 2, [0.0] * 2)
    batch.executed = torch.tensor([2, 1])
    noted: dict[str, float] = {}
    reference = torch.full((2, 2, 2), 0.5)  # one deviation away in each of 4 and 2 executed numbers
    loss = algorithm._actor_loss(new, batch, old_policy([0.0, 0.0], reference), noted)
    kl = (4 * 0.5 + 2 * 0.5) / 2
    assert loss.item() == pytest.approx(-0.3 * 3.0 + 0.7 * kl, abs=1e-6)
    assert noted["reference_kl"] == pytest.approx(kl) and noted["entropy_loss"] == pytest.approx(-3.0)


def test_value_loss_by_hand() -> None:
    algorithm = toy_ppo()
    batch = batch_of([0.0, 1.0, 2.0], [0.0] * 3, [1.0, 1.0, 1.0])
    values = torch.tensor([0.5, 0.9, 1.0])
    noted: dict[str, float] = {}
    assert algorithm._value_loss(values, batch, noted).item() == pytest.approx((0.25 + 0.01 + 0) / 3)
    algorithm.huber_delta = 0.3  # 0.3 (0.5 - 0.15), and half the square of 0.1
    assert algorithm._value_loss(values, batch, noted).item() == pytest.approx((0.105 + 0.005 + 0) / 3)
    algorithm.huber_delta = None
    # Clipped to 0.2 around the old values: 0.2, 0.9, 1.8.
    algorithm.clip_range_vf = FloatSchedule(0.2)
    assert algorithm._value_loss(values, batch, noted).item() == pytest.approx((0.64 + 0.01 + 0.64) / 3)
    assert noted["value_clip_ratio"] == pytest.approx(2 / 3)
