"""PPO: the stock algorithm for stock policies; for VLAPolicy each term of the update against a hand computation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import Tensor
from toy import (
    TINY,
    ToyEnv,
    decisions,
    mean_reward,
    metrics,
    same,
    toy_demonstrations,
    toy_ppo,
    toy_vec,
    weights,
    whole_minibatch,
)

from sb3_vla import PPO
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.policies.vla_policy import Evaluation, VLAPolicy

DISTRIBUTIONS: list[tuple[str, dict[str, Any]]] = [
    ("gaussian", {}),
    ("gaussian", {"coherence": "offset"}),
    ("gaussian", {"learn_std": True}),
    ("flow_sde", {}),
    ("flow_sde", {"joint": True}),
    ("flow_cps", {}),
    ("flow_noise", {}),
]


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
        ("flow_sde", {"noise_level": 0.5}),
        # Of the others the gradient of the first step is tested above.
        pytest.param("gaussian", {"std": 0.3, "coherence": "offset"}, marks=pytest.mark.slow),
        pytest.param("flow_cps", {"noise_level": 0.5}, marks=pytest.mark.slow),
        pytest.param("flow_noise", {"noise_range": [0.2, 0.5]}, marks=pytest.mark.slow),
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


def test_a_stopped_update_counts_as_one_rollout() -> None:
    algorithm = toy_ppo(learning_rate=0.1, target_kl=1e-4, n_epochs=4, actor_warmup=4)
    algorithm.learn(3 * algorithm.n_steps * algorithm.n_envs)
    assert algorithm._n_updates < 12 and algorithm.updates == 3
    assert metrics(algorithm)["train/actor_learning_rate"] == pytest.approx(0.1 * 3 / 5)


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
