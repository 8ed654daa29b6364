"""PPO: the stock algorithm for stock policies; for VLAPolicy each term of the update against a hand computation."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import Tensor, nn
from toy import TINY, ToyEnv, mean_reward, stir, toy_demonstrations, toy_ppo, toy_vec, whole_minibatch

from sb3_vla import GRPO, PPO
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.policies.vla_policy import Evaluation, VLAPolicy
from sb3_vla.ppo.behavior_policy import BehaviorPolicy
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer, DecisionBatch
from sb3_vla.rollouts.metrics import EpisodeRecord, episode_metrics

DISTRIBUTIONS: list[tuple[str, dict[str, Any]]] = [
    ("gaussian", {}),
    ("gaussian", {"coherence": "offset"}),
    ("gaussian", {"learn_std": True}),
    ("flow_sde", {}),
    ("flow_sde", {"joint": True}),
    ("flow_cps", {}),
    ("flow_noise", {}),
]


def metrics(algorithm: stable_baselines3.PPO) -> dict[str, Any]:
    """What the last update logged; Stable-Baselines3 writes it out with the next rollout."""
    return dict(algorithm.logger.name_to_value)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def decisions(algorithm: PPO) -> ChunkRolloutBuffer:
    buffer: Any = algorithm.rollout_buffer
    assert isinstance(buffer, ChunkRolloutBuffer)
    return buffer


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[key]) for key, value in first.items())


def actor(policy: VLAPolicy) -> dict[str, Tensor]:
    return {key: value for key, value in weights(policy).items() if not key.startswith("value_head.")}


# --- The first step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distribution", "options"), DISTRIBUTIONS)
def test_ratio_is_one_before_the_first_step(distribution: str, options: dict[str, Any]) -> None:
    env = toy_vec(2, horizon=2, executed=1)
    algorithm = toy_ppo(env, distribution=distribution, distribution_kwargs=options)
    algorithm.learn(16)
    found = metrics(algorithm)
    assert found["train/ratio_max"] == 1.0
    assert found["actor/approx_kl"] == found["train/approx_kl"] == 0.0
    assert found["actor/pg_clipfrac"] == 0
    assert found["actor/loss"] == pytest.approx(0.0, abs=1e-6)  # the mean of normalized advantages
    assert found["actor/grad_norm"] > 0


@pytest.mark.parametrize(("distribution", "options"), DISTRIBUTIONS)
def test_the_gradient_of_the_first_step_is_reinforce(distribution: str, options: dict[str, Any]) -> None:
    """At ratio one, d loss = -mean(advantage d log-prob), here by finite differences of the log-probability."""
    algorithm = toy_ppo(distribution=distribution, distribution_kwargs=options, ent_coef=0.0)
    algorithm.learn(16)
    policy, buffer = algorithm.policy, decisions(algorithm)
    batch = buffer.batch(torch.arange(16))
    old = algorithm._behavior_policy(buffer, [torch.arange(16)])
    whole = buffer.advantages.double()
    advantages = ((batch.advantages - whole.mean()) / (whole.std() + 1e-8)).double()
    bias = policy.model.action_out.bias

    def log_prob() -> Tensor:
        return policy.evaluate(batch.observations, batch.trace, batch.executed).log_prob.double()

    found = policy.evaluate(batch.observations, batch.trace, batch.executed)
    batch.advantages = advantages.float()
    policy.optimizer.zero_grad()
    algorithm._actor_loss(found, batch, old, {}).backward()
    gradient = bias.grad.clone()
    for i in range(2):
        with torch.no_grad():
            bias[i] += 2e-3
            above = (advantages * log_prob()).mean()
            bias[i] -= 4e-3
            below = (advantages * log_prob()).mean()
            bias[i] += 2e-3
        slope = -(above - below).item() / 4e-3
        assert gradient[i].item() == pytest.approx(slope, rel=0.02, abs=2e-3)


# --- Terms of the loss ------------------------------------------------------------------------------------------------


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


# --- What is updated --------------------------------------------------------------------------------------------------


def test_learning_rates_follow_the_schedule_by_group() -> None:
    algorithm = toy_ppo(learning_rate=lambda left: 1e-3 * left, value_lr=4e-3)
    rates: list[tuple[float, ...]] = []
    real: Callable[..., Any] = algorithm.policy.optimizer.step

    def step(*args: Any) -> Any:
        rates.append(tuple(group["lr"] for group in algorithm.policy.optimizer.param_groups))
        return real(*args)

    algorithm.policy.optimizer.step = step
    algorithm.learn(4 * 16)
    expected = [(1e-3 * left, 4e-3 * left) for left in (0.75, 0.5, 0.25, 0.0)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)
    groups = [{id(p) for p in group["params"]} for group in algorithm.policy.optimizer.param_groups]
    assert groups[1] == {id(p) for p in algorithm.policy.value_head.parameters()}
    trained = {id(p) for p in algorithm.policy.parameters() if p.requires_grad}
    assert groups[0] | groups[1] == trained and not groups[0] & groups[1]


def test_critic_warmup_leaves_the_actor_alone() -> None:
    """So the critic does not bend the features that the actor uses, either."""
    algorithm = toy_ppo(critic_warmup=2, n_epochs=2, batch_size=8)
    before, critic = actor(algorithm.policy), weights(algorithm.policy.value_head)
    algorithm.learn(32)
    assert same(actor(algorithm.policy), before)
    assert not same(weights(algorithm.policy.value_head), critic)
    algorithm.learn(16, reset_num_timesteps=False)
    assert not same(actor(algorithm.policy), before)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, [1, 2, 2]),  # of two minibatches, the second beforehand, then both in two epochs
        ({"micro_batch_size": 4}, [2, 4, 4]),
        ({"batch_size": 16}, [0, 1, 1]),
        ({"critic_warmup": 1}, [0, 2, 2]),
        ({"kl_coef": 0.1}, [1 + 2, 2, 2]),  # the reference sees both
    ],
)
def test_nothing_is_evaluated_again_that_the_update_evaluates_itself(
    options: dict[str, Any], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the weights are those, bit for bit, of an update that evaluates everything beforehand."""

    calls: list[bool] = []
    evaluate = VLAPolicy.evaluate

    def counted(*arguments: Any) -> Evaluation:
        calls.append(torch.is_grad_enabled())
        return evaluate(*arguments)

    def learned() -> PPO:
        return toy_ppo(**{"batch_size": 8, "n_epochs": 2, "learning_rate": 1e-2, **options}).learn(16)

    with monkeypatch.context() as patch:
        patch.setattr(VLAPolicy, "evaluate", counted)
        found = learned()
    assert [calls.count(False), calls.count(True)] == [passes[0], sum(passes[1:])]
    assert calls[: passes[0]] == [False] * passes[0]
    real = PPO._behavior_policy
    monkeypatch.setattr(PPO, "_behavior_policy", lambda self, buffer, minibatches, **_: real(self, buffer, minibatches))
    assert same(weights(found.policy), weights(learned().policy))


def test_actor_warmup_raises_the_actors_rate_alone() -> None:
    rates: list[tuple[float, float]] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            rates.append(tuple(group["lr"] for group in self.model.policy.optimizer.param_groups))  # type: ignore[arg-type]

    algorithm = toy_ppo(learning_rate=4e-3, value_lr=1e-2, critic_warmup=2, actor_warmup=3, n_epochs=2)
    algorithm.learn(algorithm.n_steps * algorithm.n_envs * 7, Watch())
    # As each rollout begins, the rates are those of the update before: two for the critic, then three that rise.
    assert [actor for actor, _ in rates[1:]] == pytest.approx([0.0, 0.0, 1e-3, 2e-3, 3e-3, 4e-3])
    assert [critic for _, critic in rates[1:]] == pytest.approx([1e-2] * 6)


@pytest.mark.parametrize(("distribution", "options"), DISTRIBUTIONS)
def test_noise_scale_follows_its_schedule(distribution: str, options: dict[str, Any]) -> None:
    scales: list[float] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            scales.append(self.model.policy.distribution.noise_scale)  # type: ignore[union-attr,arg-type]

    algorithm = toy_ppo(
        distribution=distribution,
        distribution_kwargs=options,
        learning_rate=0.0,
        noise_scale=lambda left: 0.5 + left / 2,
    )
    algorithm.learn(4 * algorithm.n_steps * algorithm.n_envs, Watch())
    assert scales == pytest.approx([1.0, 0.875, 0.75, 0.625])
    # Rollout and update agree on it.
    assert metrics(algorithm)["train/ratio_max"] == 1.0


class Progress(BaseCallback):
    """Keeps the factor of the noise of each rollout, and what remains of the training after it."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: list[float] = []
        self.left: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.noise.append(self.model.policy.distribution.noise_scale)  # type: ignore[union-attr,arg-type]

    def _on_rollout_start(self) -> None:
        self.left.append(self.model._current_progress_remaining)


def learned(algorithm: PPO, decisions: int, **options: Any) -> Progress:
    seen = Progress()
    algorithm.learn(decisions, seen, **options)
    return seen


def test_each_training_begins_at_the_begin_of_its_schedules(tmp_path: Path) -> None:
    algorithm = toy_ppo(learning_rate=0.0, noise_scale=lambda left: 0.4 + 0.6 * left)
    for _ in range(2):
        assert learned(algorithm, 64).noise == pytest.approx([1.0, 0.85, 0.7, 0.55])
    algorithm.save(tmp_path / "saved")
    loaded = PPO.load(tmp_path / "saved", toy_vec(), device="cpu")
    assert learned(loaded, 64).noise == pytest.approx([1.0, 0.85, 0.7, 0.55])
    # What goes on is half of 128 decisions away from the end.
    assert learned(loaded, 64, reset_num_timesteps=False).noise == pytest.approx([0.7, 0.625, 0.55, 0.475])
    # A last rollout that goes beyond the end is of the end, and leaves nothing behind.
    assert learned(algorithm, 7).noise == pytest.approx([1.0])
    assert algorithm._current_progress_remaining == 0.0
    assert learned(algorithm, 24).left == pytest.approx([1.0, 1 - 16 / 24])
    assert algorithm._current_progress_remaining == 0.0 and algorithm.num_timesteps == 32
    algorithm.learn(0)


def test_noise_that_vanishes_on_the_way_is_told() -> None:
    algorithm = toy_ppo(noise_scale=lambda left: abs(left - 0.5))
    with pytest.raises(ValueError, match=r"noise_scale is 0\.0 where 50% of the training is left; expected above 0"):
        algorithm.learn(64)


@pytest.mark.parametrize(("distribution", "options"), [("gaussian", {}), ("flow_sde", {})])
def test_divergence_penalty_holds_the_policy_at_the_reference(distribution: str, options: dict[str, Any]) -> None:
    drift = {}
    for kl_coef in (0.01, 100.0):
        algorithm = toy_ppo(
            distribution=distribution,
            distribution_kwargs=options,
            kl_coef=kl_coef,
            learning_rate=2e-3,
            n_epochs=4,
            batch_size=16,
        )
        start = weights(algorithm.policy)
        algorithm.learn(4 * 16)
        assert algorithm._reference is not None
        assert same(weights(algorithm._reference), start)  # as it was at the first update, for ever
        assert not any(p.requires_grad for p in algorithm._reference.parameters())
        drift[kl_coef] = metrics(algorithm)["train/reference_kl"]
    assert drift[0.01] > 3 * drift[100.0] > 0


def test_without_a_penalty_no_reference_is_kept() -> None:
    algorithm = toy_ppo()
    algorithm.learn(16)
    assert algorithm._reference is None
    assert "train/reference_kl" not in metrics(algorithm)


def test_rehearsal_adds_its_loss() -> None:
    rehearsal = DemonstrationBatches(toy_demonstrations(), None, 2, 2, 0)
    sizes: list[int] = []
    real = rehearsal.sample

    def sample(size: int, rows: Any, **options: Any) -> Any:
        sizes.append(size)
        return real(size, rows, **options)

    rehearsal.sample = sample  # type: ignore[method-assign]
    env = toy_vec(action_dim=4, reward=0.0)  # nothing else to learn from
    options: dict[str, Any] = {"rehearsal_batch_size": 24, "learning_rate": 3e-3, "n_epochs": 3, "seed": 1}
    algorithm = toy_ppo(env, rehearsal=rehearsal, rehearsal_coef=2.0, **options)
    assert algorithm.rehearsal is not None
    losses = []
    for _ in range(12):
        algorithm.learn(16, reset_num_timesteps=False)
        losses.append(metrics(algorithm)["train/rehearsal_loss"])
    assert sizes == [24] * 36
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    torch.manual_seed(0)
    observation, actions, mask = real(24)
    with torch.no_grad():
        expected = algorithm.policy.model.imitation_loss(observation, actions, mask)
    rehearsal.sample = lambda *_, **__: (observation, actions, mask)  # type: ignore[method-assign]
    found: defaultdict[str, list[float]] = defaultdict(list)
    indices = torch.arange(16)
    old = algorithm._behavior_policy(decisions(algorithm), [indices])
    algorithm.normalize_advantage, algorithm.vf_coef = False, 0.0
    decisions(algorithm).advantages.zero_()
    torch.manual_seed(0)
    loss, _ = algorithm._accumulate_gradient(
        decisions(algorithm), whole_minibatch(decisions(algorithm), indices), old, found
    )
    assert found["rehearsal_loss"] == [pytest.approx(expected.item(), rel=1e-6)]
    assert loss == pytest.approx(2.0 * expected.item(), rel=1e-6)


@pytest.mark.parametrize("distribution", ["gaussian", "flow_sde"])
def test_a_frozen_backbone_stays_and_is_run_once(distribution: str) -> None:
    env = toy_vec(2, horizon=2, truncates=True, privileged=True, action_dim=4)
    rehearsal = DemonstrationBatches(toy_demonstrations(), None, 2, 0, 0)
    algorithm = toy_ppo(
        env, distribution=distribution, trainable="expert", n_epochs=3, kl_coef=0.1, rehearsal=rehearsal
    )
    model = algorithm.policy.model
    frozen = {id(parameter) for parameter in model.backbone()}
    before = {name: parameter.clone() for name, parameter in algorithm.policy.named_parameters()}
    pictures = 0

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal pictures
        pictures += len(inputs[0])

    model.image_encoders["image"].register_forward_pre_hook(count)
    algorithm.learn(16)
    # Sixteen decisions, eight last observations of episodes, two of the rollout, and what is rehearsed.
    assert pictures == 16 + 8 + 2 + 3 * algorithm.rehearsal_batch_size
    assert "image" not in decisions(algorithm).observations
    for name, parameter in algorithm.policy.named_parameters():
        assert torch.equal(parameter, before[name]) is (id(parameter) in frozen), name
    assert metrics(algorithm)["train/ratio_max"] >= 1


def test_a_frozen_backbone_computes_the_same() -> None:
    found = []
    for trainable in ("all", "expert"):
        algorithm = toy_ppo(trainable=trainable)
        algorithm.learn(16)
        found.append((decisions(algorithm), metrics(algorithm)))
    for name in ("actions", "values", "returns"):
        one, two = (d.traces["action"] if name == "actions" else getattr(d, name) for d, _ in found)
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert found[0][1]["actor/value_loss"] == pytest.approx(found[1][1]["actor/value_loss"], rel=1e-4)


def test_target_kl_stops_the_update() -> None:
    epochs = {}
    for target in (None, 1e3, 1e-12):
        algorithm = toy_ppo(target_kl=target, n_epochs=5, batch_size=8, learning_rate=1e-6)
        algorithm.learn(16)
        epochs[target] = metrics(algorithm)["train/n_updates"]
    assert epochs == {None: 5, 1e3: 5, 1e-12: 1}


def test_an_outlier_among_the_ratios_does_not_stop_the_update() -> None:
    """One action far from its mean: its ratio explodes at the smallest change of the mean, the divergence does not."""
    algorithm = toy_ppo(learning_rate=5e-6)
    algorithm.learn(16)
    buffer, policy, before = decisions(algorithm), algorithm.policy, algorithm._n_updates
    buffer.traces["action"][0, 0] += 1000 * 0.2
    old = algorithm._behavior_policy(buffer, [torch.arange(16)])
    algorithm.target_kl, algorithm.n_epochs = 0.01, 4
    algorithm.train()
    assert algorithm._n_updates - before == 4
    batch = buffer.batch(torch.arange(16))
    with torch.no_grad():
        log_ratio = policy.evaluate(batch.observations, batch.trace, batch.executed).log_prob - old.log_prob
    estimate = (log_ratio.exp() - 1 - log_ratio).mean().item()  # stable_baselines3's
    assert estimate > 10 * 1.5 * algorithm.target_kl
    assert metrics(algorithm)["actor/approx_kl"] < algorithm.target_kl


def test_a_loss_that_is_not_finite_skips_the_step() -> None:
    algorithm = toy_ppo(toy_vec(reward=1e30), n_epochs=3, batch_size=8)  # its square is infinite in float32
    before = weights(algorithm.policy)
    algorithm.learn(16)
    assert metrics(algorithm)["train/skipped_steps"] == 6
    assert same(weights(algorithm.policy), before)
    with pytest.raises(RuntimeError, match="Two updates in a row had no step with a finite gradient"):
        algorithm.learn(16)
    assert same(weights(algorithm.policy), before)
    noted: defaultdict[str, list[float]] = defaultdict(list)
    for gradient in (math.inf, 1.0):
        for parameter in algorithm.policy.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        algorithm._optimizer_step(0.0, noted)
        assert same(weights(algorithm.policy), before) == (gradient == math.inf)
    assert noted["skipped_steps"] == [1.0, 0.0]


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_loss_that_is_not_finite_counts_where_its_gradient_is(number: float, micro_batch_size: int | None) -> None:
    """A clamp passes what is not a number on, but gives it a gradient of zero."""
    algorithm = toy_ppo(batch_size=8, n_epochs=2, target_kl=10.0, micro_batch_size=micro_batch_size)
    calls: list[int] = []
    plain = algorithm._value_loss

    def broken(values: Tensor, *rest: Any) -> Tensor:
        calls.append(len(values))
        loss = plain(values, *rest)
        return loss if len(calls) > 8 // calls[0] else 0.0 * loss.nan_to_num() + number  # in the first minibatch

    algorithm._value_loss = broken  # type: ignore[method-assign]
    before = weights(algorithm.policy)
    algorithm.learn(16)
    found = metrics(algorithm)
    assert found["train/skipped_steps"] == 1 and not same(weights(algorithm.policy), before)
    assert all(math.isfinite(value) for value in found.values()), found


def test_the_same_seed_gives_the_same_weights() -> None:
    def learned(seed: int) -> dict[str, Tensor]:
        algorithm = toy_ppo(distribution="flow_sde", seed=seed, n_epochs=2, batch_size=8)
        algorithm.learn(32)
        return weights(algorithm.policy)

    first = learned(0)
    assert same(first, learned(0))
    assert not same(first, learned(1))


def test_bfloat16_starts_at_ratio_one_and_trains() -> None:
    algorithm = toy_ppo(bf16=True, n_epochs=1, batch_size=16)
    before = weights(algorithm.policy)
    algorithm.learn(16)
    found = metrics(algorithm)
    # Old and new log-probabilities come from the same precision and the same minibatches.
    assert found["train/ratio_max"] == 1.0
    assert found["train/skipped_steps"] == 0 and not same(weights(algorithm.policy), before)
    assert all(p.dtype == torch.float32 for p in algorithm.policy.parameters())


# --- Rollouts ---------------------------------------------------------------------------------------------------------


class Watch(BaseCallback):
    """Keeps what the rollout saw."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[np.ndarray] = []
        self.terminal: list[list[dict[str, np.ndarray] | None]] = []
        self.starts = self.ends = 0

    def _on_rollout_start(self) -> None:
        self.starts += 1

    def _on_rollout_end(self) -> None:
        self.ends += 1

    def _on_step(self) -> bool:
        self.rewards.append(self.locals["rewards"].copy())
        self.terminal.append([info.get("terminal_observation") for info in self.locals["infos"]])
        return True


@pytest.mark.parametrize(("bootstrap", "gamma_per"), [(True, "decision"), (True, "env_step"), (False, "decision")])
def test_truncated_episodes_are_bootstrapped_in_one_call(bootstrap: bool, gamma_per: str) -> None:
    env = toy_vec(4, horizon=2, truncates=True, executed=3)
    options: dict[str, Any] = {"learning_rate": 0.0, "vf_coef": 0.0, "gamma_per": gamma_per}
    algorithm = toy_ppo(env, n_steps=4, gamma=0.9, bootstrap_truncated=bootstrap, **options)
    discount = 0.9**3 if gamma_per == "env_step" else 0.9
    torch.nn.init.normal_(algorithm.policy.value_head.layers[-1].weight)
    torch.nn.init.constant_(algorithm.policy.value_head.layers[-1].bias, 5.0)
    calls: list[int] = []
    real = algorithm.policy.predict_values

    def predict_values(observation: dict[str, Tensor]) -> Tensor:
        calls.append(len(observation["state"]))
        return real(observation)

    algorithm.policy.predict_values = predict_values
    watch = Watch()
    algorithm.learn(16, callback=watch)
    assert calls == ([4, 4, 4] if bootstrap else [4])  # after decisions 2 and 4, and at the rollout's end
    for step, (rewards, terminal) in enumerate(zip(watch.rewards, watch.terminal, strict=True)):
        for n in range(4):
            expected = float(rewards[n])
            observation = terminal[n]
            if bootstrap and observation is not None:
                tensors = {key: torch.as_tensor(value)[None] for key, value in observation.items()}
                value = real(tensors).item()
                assert abs(value) > 1e-3
                expected += discount * value
            assert decisions(algorithm).rewards[n, step].item() == pytest.approx(expected, abs=1e-5)
    assert [t is not None for row in watch.terminal for t in row] == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4


def test_terminated_episodes_are_not_bootstrapped() -> None:
    algorithm = toy_ppo(toy_vec(2, reward=0.5))
    torch.nn.init.constant_(algorithm.policy.value_head.layers[-1].bias, 100.0)
    algorithm.learn(16)
    assert (decisions(algorithm).rewards == 0.5).all()
    torch.testing.assert_close(decisions(algorithm).returns, torch.full((2, 8), 0.5), atol=1e-4, rtol=0)


def test_environment_steps_are_counted_beside_decisions() -> None:
    algorithm = toy_ppo(toy_vec(2, chunk=5, executed=3))
    watch = Watch()
    algorithm.learn(32, callback=watch)
    assert algorithm.num_timesteps == 32 and algorithm.env_steps == 96
    assert (decisions(algorithm).executed == 3).all()
    assert watch.starts == watch.ends == 2


def test_a_callback_can_stop_a_rollout() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 3

    algorithm = toy_ppo()
    before = weights(algorithm.policy)
    algorithm.learn(64, callback=Stop())
    assert algorithm.num_timesteps == 6 and same(weights(algorithm.policy), before)


def test_the_environment_gets_clipped_actions_and_the_update_the_others() -> None:
    class Bounds(BaseCallback):
        largest = 0.0

        def _on_step(self) -> bool:
            assert np.abs(self.locals["clipped_actions"]).max() <= 1
            self.largest = max(self.largest, float(np.abs(self.locals["actions"]).max()))
            return True

    algorithm = toy_ppo(distribution_kwargs={"std": 2.0})
    bounds = Bounds()
    algorithm.learn(16, callback=bounds)
    assert bounds.largest > 1.5
    assert decisions(algorithm).traces["action"].abs().max().item() == pytest.approx(bounds.largest)


def test_metric_names() -> None:
    algorithm = toy_ppo(
        toy_vec(2, horizon=2, action_dim=4),
        clip_range_vf=0.2,
        kl_coef=0.1,
        ent_coef=0.01,
        distribution_kwargs={"learn_std": True},
        rehearsal=DemonstrationBatches(toy_demonstrations(), None, 2, 0, 0),
    )
    algorithm.learn(32, log_interval=100)
    found = metrics(algorithm)
    assert {
        *("actor/loss", "actor/value_loss", "actor/grad_norm", "actor/approx_kl", "actor/pg_clipfrac"),
        *("actor/value_clip_ratio", "rollout/returns_mean", "rollout/advantages_mean", "env/episode_len"),
        *("env/success_once", "env/success_once/Go to the left", "env/success_once/Go to the right"),
        *("perf/env_steps_per_second", "perf/decisions_per_second", "perf/simulation_share", "perf/inference_share"),
        *("time/rollout_seconds", "time/update_seconds", "time/env_steps"),
        *("train/policy_gradient_loss", "train/value_loss", "train/approx_kl", "train/clip_fraction", "train/loss"),
        *("train/explained_variance", "train/n_updates", "train/clip_range", "train/clip_range_vf"),
        *("train/learning_rate", "train/entropy_loss", "train/reference_kl", "train/rehearsal_loss"),
    } <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    success = algorithm.task_success()
    assert found["env/success_once"] == pytest.approx(np.mean(list(success.values())))
    assert found["env/episode_len"] == 4  # two decisions of two steps


class Untold(gym.Wrapper):
    """Tells neither how long an episode was nor what it earned."""

    def step(self, action: Any) -> Any:
        *outcome, info = self.env.step(action)
        info.pop("elapsed_steps", None)
        return *outcome, info


def test_returns_of_an_environment_of_one_s_own_are_monitors() -> None:
    def make() -> gym.Env:
        return Untold(ToyEnv(horizon=2, reward=0.25))

    algorithm = toy_ppo(DummyVecEnv([lambda: Monitor(make())] * 2))  # type: ignore[list-item]
    algorithm.learn(16)
    found = metrics(algorithm)
    assert (found["env/return"], found["env/episode_len"], found["env/reward"]) == (0.5, 2, 0.25)
    algorithm = toy_ppo(VecMonitor(DummyVecEnv([make] * 2)))  # type: ignore[arg-type,list-item]
    algorithm.learn(16)
    assert metrics(algorithm)["env/return"] == 0.5
    # What nobody tells is not zero.
    algorithm = toy_ppo(DummyVecEnv([make] * 2))  # type: ignore[list-item]
    algorithm.learn(16)
    assert "env/success_once" in metrics(algorithm)
    assert not {"env/return", "env/episode_len", "env/reward"} & metrics(algorithm).keys()


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "options"),
    [
        ("gaussian", {"std": 0.3}),
        ("gaussian", {"std": 0.3, "coherence": "offset"}),
        ("flow_sde", {"noise_level": 0.5}),
        ("flow_cps", {"noise_level": 0.5}),
        ("flow_noise", {"noise_range": [0.2, 0.5]}),
    ],
)
def test_learns_what_the_instruction_means(distribution: str, options: dict[str, Any]) -> None:
    """A reward that only the instruction explains; ignoring it gives -0.5 at best."""
    algorithm = toy_ppo(
        toy_vec(16),
        distribution=distribution,
        distribution_kwargs=options,
        n_steps=4,
        batch_size=32,
        n_epochs=4,
        learning_rate=1e-3,
        stirred=False,
    )
    before = mean_reward(algorithm)
    algorithm.learn(16 * 64)
    after = mean_reward(algorithm)
    assert before == pytest.approx(-0.5, abs=0.01)
    assert after > -0.3


@pytest.mark.parametrize(
    ("model", "distribution", "options"),
    [
        ("toy_diffusion", "ddim", {"denoising_steps": 5, "min_std": 0.2}),
        ("toy_diffusion", "ddpm", {"denoising_steps": 5, "min_std": 0.2}),
        ("toy_tokens", "tokens", {}),
    ],
)
def test_diffusion_and_tokens_learn_it_too(
    toy_models: None, model: str, distribution: str, options: dict[str, Any]
) -> None:
    algorithm = toy_ppo(
        toy_vec(16),
        model=model,
        model_kwargs={},
        distribution=distribution,
        distribution_kwargs=options,
        n_steps=4,
        batch_size=32,
        n_epochs=4,
        learning_rate=1e-2,
    )
    algorithm.learn(16 * 256)
    assert mean_reward(algorithm) > -0.3


def ended(*told: tuple[str, bool | None], **more: Any) -> list[dict[str, Any]]:
    """Infos of episodes that ended, of which some say nothing of success."""
    return [{"task": task, **({} if success is None else {"is_success": success}), **more} for task, success in told]


def test_an_episode_that_ends_without_a_word_has_not_succeeded() -> None:
    """As where a time limit outside cuts an environment that tells of success at its own end only."""
    algorithm = toy_ppo()
    algorithm._setup_learn(1)
    infos = ended(("a", True), ("a", None), ("a", None), ("a", False), ("b", None), elapsed_steps=4, episode_return=2.0)
    algorithm._record_episodes(infos, np.ones(5, dtype=bool))
    assert algorithm.task_success() == {"a": 0.25, "b": 0.0}
    found = episode_metrics(algorithm.episodes.by_task, 5)
    assert (found["env/success_once"], found["env/success_once/a"], found["env/success_once/b"]) == (0.125, 0.25, 0.0)
    assert (found["env/episode_len"], found["env/return"]) == (4.0, 2.0)
    assert list(algorithm.ep_success_buffer) == [True, False, False, False, False]  # type: ignore[arg-type]
    weights = algorithm.episodes.task_weights()
    assert weights["a"] == pytest.approx(4 * 2 / 6 * 4 / 6) and weights["b"] == pytest.approx(4 * 1 / 3 * 2 / 3)


def test_success_that_nothing_tells_of_is_unknown() -> None:
    algorithm = toy_ppo()
    algorithm._setup_learn(1)
    algorithm._record_episodes(ended(("a", None), ("b", None)), np.ones(2, dtype=bool))
    assert algorithm.task_success() == {} and episode_metrics(algorithm.episodes.by_task, 2) == {}
    assert not algorithm.ep_success_buffer
    # Monitor tells the rest.
    algorithm._record_episodes(ended(("a", None), episode={"r": 3.0, "l": 2}), np.ones(1, dtype=bool))
    expected = {"env/return": 3.0, "env/episode_len": 2.0, "env/reward": 1.5, "env/num_trajectories": 3.0}
    assert episode_metrics(algorithm.episodes.by_task, 3) == expected


def test_the_death_of_a_worker_says_nothing_about_the_policy() -> None:
    algorithm = toy_ppo()
    algorithm._setup_learn(1)
    infos = ended(("a", True)) + ended(("a", False), ("b", False), worker_restarted=True, episode={"r": 1.0, "l": 2})
    algorithm._record_episodes(infos, np.ones(3, dtype=bool))
    assert algorithm.task_success() == {"a": 1.0} and list(algorithm.ep_success_buffer) == [True]  # type: ignore[arg-type]
    assert len(algorithm.ep_info_buffer) == 2  # type: ignore[arg-type]


def test_episodes_that_a_limit_outside_cuts_count() -> None:
    """Of four episodes each one that is cut failed; the others succeed, or not, by themselves."""
    from gymnasium.wrappers import TimeLimit
    from stable_baselines3.common.vec_env import DummyVecEnv

    makers = [partial(ToyEnv, horizon=1)] * 2 + [lambda: TimeLimit(ToyEnv(horizon=3), 1)] * 2
    algorithm = toy_ppo(DummyVecEnv(makers), n_steps=6, batch_size=24)
    told: list[float] = []

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            told.extend(float(info.get("is_success", 0.0)) for info in self.locals["infos"])
            return True

    algorithm.learn(24, callback=Count())
    assert len(told) == 24  # each step ends an episode
    assert sum(len(episodes) for episodes in algorithm.episodes.by_task.values()) == 24
    successes = sum(each.success or 0.0 for episodes in algorithm.episodes.by_task.values() for each in episodes)
    assert successes == sum(told)


def test_tasks_are_drawn_by_the_signal_they_give() -> None:
    algorithm = toy_ppo(task_sampling="signal")
    failed, solved = EpisodeRecord(0.0, 9, 0.0), EpisodeRecord(1.0, 9, 1.0)
    # Only the last 30 episodes count: what came before lags behind the policy.
    algorithm.episodes.by_task["solved"].extend([failed] * 70 + [solved] * 30)
    algorithm.episodes.by_task["open"].extend([solved] * 49 + [failed] * 15 + [solved] * 15)
    algorithm.episodes.by_task["rare"].extend([solved] * 3 + [failed] * 25)
    weights = algorithm.episodes.task_weights()
    assert weights == {
        "solved": pytest.approx(4 * 31 / 32 / 32),
        "open": 1.0,
        "rare": pytest.approx(4 * 4 / 30 * 26 / 30),
    }
    told: list[Any] = []
    assert algorithm.env is not None
    algorithm.env.env_method = lambda name, *args: told.append((name, *args))  # type: ignore[assignment]
    algorithm.learn(16)
    assert told == [("set_task_weights", weights)]
    with pytest.raises(ValueError, match="did you mean 'signal'"):
        toy_ppo(task_sampling="signals")


class Unweighted(gym.Wrapper):
    """An environment whose tasks have no weights."""

    def get_wrapper_attr(self, name: str) -> Any:
        if name == "set_task_weights":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


class Silent(gym.Wrapper):
    """An environment whose info lacks something, or all of it until an episode."""

    def __init__(self, env: gym.Env, lacks: str, until: float = math.inf) -> None:
        super().__init__(env)
        self.lacks, self.until, self.ended = lacks, until, 0

    def step(self, action: Any) -> Any:
        *outcome, info = self.env.step(action)
        if self.ended < self.until:
            del info[self.lacks]
        self.ended += outcome[2] or outcome[3]
        return *outcome, info


def test_episodes_before_the_first_that_tells_of_success_have_failed() -> None:
    def silent() -> gym.Env:
        return Silent(ToyEnv(), "is_success", until=3)

    algorithm = toy_ppo(DummyVecEnv([silent] * 2))
    algorithm.learn(16)
    assert list(algorithm.ep_success_buffer or ())[:6] == [False] * 6
    assert len(algorithm.ep_success_buffer or ()) == 16


@pytest.mark.parametrize("lacks", ["task", "is_success"])
def test_tasks_that_nobody_tells_cannot_be_drawn_by_their_signal(lacks: str) -> None:
    def silent() -> gym.Env:
        return Silent(ToyEnv(), lacks)

    algorithm = toy_ppo(DummyVecEnv([silent] * 2), task_sampling="signal")
    with pytest.warns(UserWarning, match=r'"signal" is without effect: no episode has ended with both info\["task"\]'):
        algorithm.learn(32)


@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_environments_that_cannot_draw_tasks_are_found_before_a_rollout(algorithm: type[PPO], tmp_path: Path) -> None:
    def unweighted() -> DummyVecEnv:
        return DummyVecEnv([lambda: Unweighted(ToyEnv())] * 2)  # type: ignore[list-item]

    options: dict[str, Any] = {"device": "cpu", "policy_kwargs": {"model_kwargs": TINY}, "batch_size": 16}
    options |= {"group_size": 2} if algorithm is GRPO else {"n_steps": 8}
    told = pytest.raises(ValueError, match=r"task_sampling='signal' draws tasks by .* use task_sampling='uniform'")
    with told:
        algorithm("VLAPolicy", unweighted(), task_sampling="signal", **options)
    able = algorithm("VLAPolicy", toy_vec(2), task_sampling="signal", **options)
    with told:
        able.set_env(unweighted())
    able.save(tmp_path / "saved")
    with told:
        algorithm.load(tmp_path / "saved", unweighted(), device="cpu")
    assert algorithm.load(tmp_path / "saved", unweighted(), device="cpu", task_sampling="uniform").env is not None
    assert algorithm.load(tmp_path / "saved", device="cpu").env is None  # to act with
    plain = algorithm("VLAPolicy", unweighted(), **options)
    plain.task_sampling = "signal"
    with told:
        plain.learn(16)
    assert plain.num_timesteps == 0


@pytest.mark.parametrize(
    "options",
    [
        {"kl_coef": 0.1},
        {"critic_warmup": 2},
        {"bootstrap_truncated": False},
        {"value_lr": 1e-3},
        {"bf16": True},
        {"noise_scale": 0.5},
        {"overlap": True},
        {"gamma_per": "env_step"},
        {"clip_range_high": 0.3},
        {"dual_clip": 3.0},
        {"huber_delta": 1.0},
        {"logprob_type": "action"},
        {"micro_batch_size": 8},
    ],
)
def test_options_that_a_stock_policy_would_ignore_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* acts on VLAPolicy alone"):
        PPO("MlpPolicy", "CartPole-v1", device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma_per": "env_steps"}, "'env_steps'; did you mean 'env_step'"),
        ({"clip_range_high": -0.1}, r"clip_range_high is -0\.1; expected at least 0"),
        ({"dual_clip": 1.0}, r"dual_clip=1\.0; expected more than 1, or None"),
        ({"huber_delta": 0.0}, r"huber_delta=0\.0; expected more than 0, or None"),
        ({"micro_batch_size": 0}, "micro_batch_size=0; expected more than 0, or None"),
        ({"logprob_type": "step"}, "logprob_type='step'; known: chunk"),
        ({"logprob_type": "action", "distribution_kwargs": {"coherence": "offset"}}, "use 'chunk', or coherence"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_ppo(**options)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, lambda left: left])
def test_noise_must_not_vanish(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"noise_scale is .* expected above 0"):
        toy_ppo(noise_scale=scale)


def test_a_stopped_update_counts_as_one_rollout() -> None:
    algorithm = toy_ppo(learning_rate=0.1, target_kl=1e-4, n_epochs=4, actor_warmup=4)
    algorithm.learn(3 * algorithm.n_steps * algorithm.n_envs)
    assert algorithm._n_updates < 12 and algorithm.updates == 3
    assert metrics(algorithm)["train/actor_learning_rate"] == pytest.approx(0.1 * 3 / 5)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("gamma", math.nan, "gamma=nan; expected 0 to 1"),
        ("gae_lambda", 1.5, "gae_lambda=1.5; expected 0 to 1"),
        ("ent_coef", -0.1, "ent_coef=-0.1; expected at least 0"),
        ("max_grad_norm", math.nan, "max_grad_norm=nan; expected at least 0"),
        ("learning_rate", math.inf, "learning_rate is inf at one end of training"),
        ("clip_range", math.nan, "clip_range is nan at one end of training"),
    ],
)
def test_numbers_out_of_range_are_told(option: str, value: float, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        toy_ppo(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["learning_rate", "clip_range", "clip_range_high", "clip_range_vf", "noise_scale"])
def test_a_schedule_is_any_number_or_function(option: str) -> None:
    algorithm = toy_ppo(**{option: np.float32(0.25)})  # type: ignore[arg-type]
    algorithm.learn(16)
    with pytest.raises(ValueError, match=f"{option}='0.3'; expected a number"):
        toy_ppo(**{option: "0.3"})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [functools.partial(torch.compile, backend="eager"), nn.DataParallel])
def test_a_wrapped_policy_is_refused_where_it_is_set(wrap: Callable[[nn.Module], Any]) -> None:
    algorithm = toy_ppo()
    with pytest.raises(ValueError, match=r"policy is now of class \w+; expected the VLAPolicy .*dict\(compile={}\)"):
        algorithm.policy = wrap(algorithm.policy)
    algorithm.learn(16)
    algorithm.policy = copy.deepcopy(algorithm.policy)


@pytest.mark.parametrize("part", ["model", "value_head", "distribution"])
def test_a_compiled_part_is_refused_where_it_is_set(part: str, tmp_path: Path) -> None:
    """Its weights would be saved under names that nothing reads."""
    algorithm = toy_ppo()
    with pytest.raises(ValueError, match=rf"policy\.{part} is what torch.compile.* made; .*policy\.{part}\.compile"):
        setattr(algorithm.policy, part, torch.compile(getattr(algorithm.policy, part), backend="eager"))
    algorithm.policy.value_head.compile(backend="eager")
    algorithm.learn(16)
    algorithm.save(tmp_path / "saved")
    assert PPO.load(tmp_path / "saved", device="cpu").num_timesteps == 16


def test_adam_steps_by_one_kernel(tmp_path: Path) -> None:
    """Also after an archive of a version that had it otherwise; but as is asked for."""
    algorithm = toy_ppo()
    algorithm.learn(32)
    groups = algorithm.policy.optimizer.param_groups
    assert [group["fused"] for group in groups] == [True, True]
    algorithm.save(tmp_path / "new")
    for group in groups:
        group["fused"] = None
    algorithm.save(tmp_path / "old")
    for name in ("new", "old"):
        loaded = PPO.load(tmp_path / name)
        assert [group["fused"] for group in loaded.policy.optimizer.param_groups] == [True, True]
    asked = toy_ppo(policy_kwargs={"model_kwargs": TINY, "optimizer_kwargs": {"foreach": True}}, stirred=False)
    assert [group["fused"] for group in asked.policy.optimizer.param_groups] == [None, None]
