"""GRPO: groups that begin alike, advantages by hand, what is masked and dropped, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from allocated import alive
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor
from toy import (
    EVERY_DISTRIBUTION,
    TINY,
    ToyEnv,
    mean_reward,
    metrics,
    same,
    stir,
    toy_demonstrations,
    toy_model_kwargs,
    toy_vec,
    weights,
)

from sb3_vla import GRPO, HoldAtEnd, SharedMemoryVecEnv
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.grpo.groups import GroupBuffer, group_advantages
from sb3_vla.policies.vla_policy import Evaluation
from sb3_vla.ppo.behavior_policy import BehaviorPolicy
from sb3_vla.rollouts.buffers import DecisionBatch


def toy_grpo(
    env: VecEnv | None = None,
    *,
    distribution: str = "gaussian",
    distribution_kwargs: dict[str, Any] | None = None,
    model: str = "compact",
    model_kwargs: dict[str, Any] = TINY,
    stirred: bool = True,
    **options: Any,
) -> GRPO:
    algorithm = GRPO(
        "VLAPolicy",
        toy_vec(4) if env is None else env,
        **{
            "group_size": 4,
            "n_groups": 2,
            "batch_size": 16,
            "n_epochs": 1,
            "seed": 0,
            "device": "cpu",
            "policy_kwargs": {
                "model": model,
                "model_kwargs": model_kwargs,
                "distribution": distribution,
                "distribution_kwargs": distribution_kwargs,
                "value_width": 32,
            },
            **options,
        },
    )
    if stirred:
        stir(algorithm.policy)
    return algorithm


def kept(algorithm: GRPO) -> GroupBuffer:
    buffer: Any = algorithm.rollout_buffer
    assert isinstance(buffer, GroupBuffer)
    return buffer


def learn(algorithm: GRPO, decisions: int) -> None:
    """Learn without writing the metrics out, which would forget them."""
    algorithm.learn(decisions, log_interval=1000)


class ScriptedEnv(ToyEnv):
    """Plays one list of decisions after the other, whatever the policy does, and begins again after the last.

    :param episodes: of each the decisions, (reward, executed steps) each, whether it succeeded, whether a time limit
        cut it.
    """

    def __init__(
        self, episodes: Sequence[tuple[Sequence[tuple[float, int]], bool | None, bool]], **options: Any
    ) -> None:
        super().__init__(**options)
        self.episodes = episodes
        self.played = -2  # learn() resets once before the first rollout
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if seed is not None or self.played < -1:  # the vector environment's own resets take nothing from the script
            self.played += 1
        return super().reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.steps += 1
        decisions, success, cut = self.episodes[max(self.played, 0) % len(self.episodes)]
        reward, executed = decisions[self.elapsed]
        self.elapsed += 1
        done = self.elapsed == len(decisions)
        info: dict[str, Any] = {"env_steps": executed, "task": "scripted"}
        if done and success is not None:
            info |= {"is_success": success, "elapsed_steps": sum(steps for _, steps in decisions)}
        return self._observe(), reward, done and not cut, done and cut, info


def scripted(*episodes: Any, hold: bool = False) -> DummyVecEnv:
    """One environment for each script; a script is one episode or a list of them."""

    def make(script: Any) -> gym.Env:
        env = ScriptedEnv(script if isinstance(script, list) else [script])
        return HoldAtEnd(env) if hold else env

    return DummyVecEnv([partial(make, script) for script in episodes])


# With the reward that is the change of success, a success that is lost again inside a chunk cancels.
LOST_AGAIN = ([(0.0, 2), (0.0, 2), (0.0, 2)], True, True)
AT_THE_LAST_STEP = ([(0.0, 2), (0.0, 2), (1.0, 2)], True, False)
TIMED_OUT = ([(0.0, 2), (0.0, 2), (0.0, 2)], False, True)
INSIDE_A_CHUNK = ([(1.0, 1)], True, False)
GROUP = (LOST_AGAIN, AT_THE_LAST_STEP, TIMED_OUT, INSIDE_A_CHUNK)
LENGTHS = (3, 3, 3, 1)


# --- The table, by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("episode_return", "advantage_type", "returns", "advantages"),
    [
        # Mean 1/2, unbiased deviation sqrt(4 / 4 / 3) = 1 / sqrt(3).
        ("reward", "standardized", (0, 1, 0, 1), [sign * math.sqrt(3) / 2 for sign in (-1, 1, -1, 1)]),
        ("reward", "leave_one_out", (0, 1, 0, 1), [-2 / 3, 2 / 3, -2 / 3, 2 / 3]),
        # Mean 3/4, unbiased deviation sqrt((3 / 16 + 9 / 16) / 3) = 1/2.
        ("success", "standardized", (1, 1, 0, 1), [0.5, 0.5, -1.5, 0.5]),
        ("success", "leave_one_out", (1, 1, 0, 1), [1 / 3, 1 / 3, -1, 1 / 3]),
    ],
)
@pytest.mark.parametrize("normalize_length", [True, False])
def test_advantages_by_hand(
    episode_return: str,
    advantage_type: str,
    returns: tuple[float, ...],
    advantages: list[float],
    normalize_length: bool,
) -> None:
    algorithm = toy_grpo(
        scripted(*GROUP),
        n_groups=1,
        episode_return=episode_return,
        advantage_type=advantage_type,
        normalize_length=normalize_length,
    )
    learn(algorithm, 1)
    # The mean length is 5/2; decisions that follow the fourth episode's end are not there.
    share = [2.5 / length if normalize_length else 1.0 for length in LENGTHS]
    expected = [a * w for a, w, length in zip(advantages, share, LENGTHS, strict=True) for _ in range(length)]
    assert kept(algorithm).advantages.tolist() == pytest.approx(expected, abs=1e-5)
    expected_returns = [r for r, length in zip(returns, LENGTHS, strict=True) for _ in range(length)]
    assert kept(algorithm).returns.tolist() == expected_returns
    batch = kept(algorithm).batch(torch.arange(10))
    assert batch.executed.tolist() == [2] * 9 + [1]
    assert batch.advantages.tolist() == pytest.approx(expected, abs=1e-5)
    assert algorithm.num_timesteps == 10 and algorithm.env_steps == 19
    found = metrics(algorithm)
    assert found["env/success_once"] == 0.75 and found["env/episode_len"] == pytest.approx((6 + 6 + 6 + 1) / 4)
    assert found["rollout/group_success_mean"] == 0.75
    assert found["rollout/group_success_std"] == pytest.approx(math.sqrt(3) / 4)
    assert found["rollout/group_return_mean"] == 0.5 and found["rollout/group_return_std"] == 0.5


FAILURE = ([(0.0, 2), (0.0, 2)], False, True)
SUCCESS = ([(0.0, 2), (1.0, 2)], True, False)
MOSTLY = [SUCCESS, SUCCESS, SUCCESS, FAILURE]
HALF = [SUCCESS, FAILURE, SUCCESS, FAILURE]
NEVER, ALWAYS = [FAILURE] * 4, [SUCCESS] * 4


def groups_of_four(*groups: list[Any]) -> DummyVecEnv:
    """Four environments that play these groups one after the other."""
    return scripted(*(list(column) for column in zip(*groups, strict=True)))


@pytest.mark.parametrize(
    ("options", "groups", "played", "kept_groups"),
    [
        # All-equal groups teach nothing; another one is played for each.
        ({"n_groups": 1}, [NEVER, ALWAYS, HALF], 3, 1),
        ({"n_groups": 2}, [HALF, NEVER, MOSTLY], 3, 2),
        # Bounds, inclusive.
        ({"n_groups": 1, "success_bounds": (0.1, 0.7)}, [MOSTLY, MOSTLY, HALF], 3, 1),
        ({"n_groups": 1, "success_bounds": (0.5, 0.75)}, [MOSTLY, HALF], 1, 1),
        ({"n_groups": 1, "success_bounds": (0.6, 1.0)}, [HALF, ALWAYS, MOSTLY], 3, 1),
        # The cap.
        ({"n_groups": 2, "max_groups": 3}, [NEVER, HALF, ALWAYS, HALF], 3, 1),
        ({"n_groups": 1}, [NEVER, NEVER, ALWAYS, HALF], 4, 1),
    ],
)
def test_groups_are_filtered_and_others_played(
    options: dict[str, Any], groups: list[list[Any]], played: int, kept_groups: int
) -> None:
    algorithm = toy_grpo(groups_of_four(*groups), **options)
    learn(algorithm, 1)
    found = metrics(algorithm)
    assert (found["rollout/groups_played"], found["rollout/groups_kept"]) == (played, kept_groups)
    assert found["rollout/groups_kept_share"] == pytest.approx(kept_groups / played)
    assert algorithm.num_timesteps == 8 * played and len(kept(algorithm)) == 8 * kept_groups
    assert kept(algorithm).advantages.sum().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("environments", [2, 4, 8])
def test_pictures_of_groups_that_teach_nothing_are_not_held(environments: int) -> None:
    """After a rollout those of the kept groups are in memory, and when the next begins, none."""
    picture = (3, 32, 32), torch.uint8

    class Counts(BaseCallback):
        begun: ClassVar[list[int]] = []
        ended: ClassVar[list[tuple[int, int, int]]] = []

        def _on_rollout_start(self) -> None:
            self.begun.append(alive(*picture))

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.ended.append((len(self.locals["played"]), self.locals["kept"], alive(*picture)))

    turn = min(environments, 4)
    scripts = [[one for group in (NEVER, HALF, ALWAYS, HALF) for one in group[i::turn]] for i in range(turn)]
    env = scripted(*scripts * (environments // turn))
    algorithm = toy_grpo(env, n_groups=2, max_groups=20)
    algorithm.learn(48, Counts(), log_interval=1000)
    size = 3 * 32 * 32
    last = environments * size  # of the last decision, which callbacks see
    assert len(Counts.begun) >= 2 and max(Counts.begun) <= last
    for played, kept_groups, held in Counts.ended:
        assert played > kept_groups >= 2 and 0 <= held - kept_groups * 4 * 2 * size <= last


def test_a_rollout_without_contrast_leaves_the_policy_alone() -> None:
    algorithm = toy_grpo(groups_of_four(NEVER), n_groups=1)
    before = weights(algorithm.policy)
    with pytest.warns(UserWarning, match="No group of this rollout was kept"):
        learn(algorithm, 1)
    assert same(weights(algorithm.policy), before) and algorithm.updates == 0
    assert metrics(algorithm)["rollout/groups_kept"] == 0 and metrics(algorithm)["rollout/groups_played"] == 4


def test_more_environments_than_a_group_play_several_at_once() -> None:
    algorithm = toy_grpo(scripted(*HALF, *NEVER, *MOSTLY), n_groups=1)
    learn(algorithm, 1)
    assert metrics(algorithm)["rollout/groups_played"] == 3
    assert metrics(algorithm)["rollout/groups_kept"] == 2  # all of a turn
    expected = [*group_advantages([1, 0, 1, 0], "standardized"), *group_advantages([1, 1, 1, 0], "standardized")]
    assert kept(algorithm).advantages.tolist() == pytest.approx([float(a) for a in expected for _ in range(2)])


def test_fewer_environments_than_a_group_take_turns() -> None:
    algorithm = toy_grpo(scripted([SUCCESS, FAILURE], [SUCCESS, INSIDE_A_CHUNK]), n_groups=1, normalize_length=False)
    learn(algorithm, 1)
    assert metrics(algorithm)["rollout/groups_played"] == 1
    expected = group_advantages([1, 1, 0, 1], "standardized").tolist()
    by_decision = [a for a, length in zip(expected, (2, 2, 2, 1), strict=True) for _ in range(length)]
    assert kept(algorithm).advantages.tolist() == pytest.approx(by_decision)


def test_an_episode_whose_worker_died_does_not_count() -> None:
    class Dying(ScriptedEnv):
        def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
            return (*super().step(action)[:4], {"worker_restarted": True, "env_steps": 0})

    env = DummyVecEnv([*(partial(ScriptedEnv, [script]) for script in HALF[:3]), partial(Dying, [FAILURE])])
    algorithm = toy_grpo(env, n_groups=1, normalize_length=False)
    learn(algorithm, 1)
    expected = group_advantages([1, 0, 1], "standardized").tolist()
    assert kept(algorithm).advantages.tolist() == pytest.approx([a for a in expected for _ in range(2)])


# --- Groups -----------------------------------------------------------------------------------------------------------


def starts_of(algorithm: GRPO, lengths: int) -> list[bytes]:
    """First pictures of the episodes that were kept, each of so many decisions."""
    buffer = kept(algorithm)
    pictures = buffer.batch(torch.arange(0, len(buffer), lengths)).observations["image"]
    return [picture.numpy().tobytes() for picture in pictures]


@pytest.mark.parametrize("num_envs", [1, 2, 4, 8])
def test_a_group_begins_alike_and_no_two_groups_do(num_envs: int) -> None:
    algorithm = toy_grpo(toy_vec(num_envs, horizon=3), n_groups=4)
    seen: set[bytes] = set()
    for updates in (1, 2):
        algorithm.learn(1, reset_num_timesteps=False)
        starts = starts_of(algorithm, lengths=3)
        groups = [starts[i : i + 4] for i in range(0, 16, 4)]
        assert len(starts) == 16 and all(len(set(group)) == 1 for group in groups)
        seen |= set(starts)
        assert len(seen) == 4 * updates


def test_a_group_that_begins_unlike_is_an_error() -> None:
    class Unseeded(ToyEnv):
        def _observe(self) -> dict[str, np.ndarray]:
            return {**super()._observe(), "state": np.random.default_rng().normal(size=4).astype(np.float32)}

    with pytest.raises(RuntimeError, match=r"both reset with seed \d+, begin with another state\. "):
        toy_grpo(DummyVecEnv([Unseeded] * 4)).learn(1)


def test_a_group_of_another_goal_is_an_error() -> None:
    class Hidden(ToyEnv):
        goal = 0

        def reset(self, **arguments: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            Hidden.goal += 1
            return super().reset(**arguments)[0], {"task": "toy", "goal": Hidden.goal}

    with pytest.raises(RuntimeError, match="begin with another goal"):
        toy_grpo(DummyVecEnv([Hidden] * 2)).learn(1)


@pytest.mark.parametrize("hold", [False, True])
def test_what_follows_an_end_is_not_played_with_hold(hold: bool) -> None:
    env = scripted(*GROUP, hold=hold)
    algorithm = toy_grpo(env, n_groups=1)
    learn(algorithm, 1)
    steps = [env.get_attr("steps", i)[0] for i in range(4)]
    assert steps == ([3, 3, 3, 1] if hold else [3, 3, 3, 3])
    assert algorithm.num_timesteps == 10


class Ragged(ToyEnv):
    """Episodes of one to four decisions, by a digit of what the policy does."""

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.horizon = self.elapsed + 1 if int(1000 * abs(action[0, 0])) % 2 else 4
        return super().step(action)


def test_holding_changes_nothing_but_the_work() -> None:
    learned = []
    for wrapper in (Ragged, lambda: HoldAtEnd(Ragged())):
        algorithm = toy_grpo(DummyVecEnv([wrapper] * 8), distribution_kwargs={"std": 0.5}, n_epochs=2)
        algorithm.learn(60)
        learned.append(weights(algorithm.policy))
        lengths = kept(algorithm)._lengths
        assert len(set(lengths)) > 1  # else there was nothing to hold
    assert same(*learned)


def test_worker_processes_change_nothing() -> None:
    learned = []
    for make in (DummyVecEnv, partial(SharedMemoryVecEnv, num_workers=1)):
        env = make([partial(ToyEnv, horizon=2)] * 4)
        algorithm = toy_grpo(env)
        learn(algorithm, 20)
        learned.append(weights(algorithm.policy))
        env.close()
    assert same(*learned)


def test_hold_at_end() -> None:
    env = HoldAtEnd(ToyEnv(horizon=2))
    action = np.zeros((2, 2), np.float32)
    first, _ = env.reset(seed=3)
    assert not np.array_equal(env.reset()[0]["image"], first["image"])  # no episode has ended
    env.reset(seed=3)
    env.step(action)
    last, reward, terminated, _, info = env.step(action)
    assert reward < 0 and terminated and "is_success" in info
    held, held_info = env.reset()
    assert held is last and held_info == {}
    for _ in range(3):
        again, reward, terminated, truncated, info = env.step(action)
        assert again is last and reward == 0 and not terminated and not truncated and info == {}
    assert np.array_equal(env.reset(seed=3)[0]["image"], first["image"])
    for _ in range(2):
        assert env.step(action)[4]["env_steps"] == 2
    env.reset()
    env.reset()  # somebody wants another episode
    assert env.step(action)[4]["env_steps"] == 2


# --- The update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "distribution", "options"), EVERY_DISTRIBUTION)
def test_ratio_is_one_before_the_first_step(
    toy_models: None, model: str, distribution: str, options: dict[str, Any]
) -> None:
    env = DummyVecEnv([partial(Ragged, executed=1)] * 8)
    algorithm = toy_grpo(
        env,
        model=model,
        model_kwargs=toy_model_kwargs(model),
        distribution=distribution,
        distribution_kwargs=options,
        batch_size=64,
    )
    learn(algorithm, 1)
    found = metrics(algorithm)
    assert 8 < len(kept(algorithm)) <= 64
    assert found["train/ratio_max"] == 1.0 and found["actor/pg_clipfrac"] == 0.0
    assert found["actor/approx_kl"] == found["train/approx_kl"] == 0.0
    # Each episode weighs the same, so that of a group's advantages nothing is left.
    assert found["actor/loss"] == pytest.approx(0.0, abs=1e-6)
    assert found["actor/grad_norm"] > 0


def test_there_is_no_critic() -> None:
    algorithm = toy_grpo(kl_coef=0.1, max_grad_norm=1e9, n_epochs=3)
    critic = weights(algorithm.policy.value_head)
    before = weights(algorithm.policy.model)
    learn(algorithm, 40)
    assert same(weights(algorithm.policy.value_head), critic) and not same(weights(algorithm.policy.model), before)
    state = algorithm.policy.optimizer.state
    assert not any(parameter in state for parameter in algorithm.policy.value_head.parameters())
    assert not {"actor/value_loss", "train/value_loss", "train/explained_variance"} & metrics(algorithm).keys()


def test_the_upper_clip_is_another() -> None:
    algorithm = toy_grpo(clip_range_high=0.28)
    ratios, advantages = (1.5, 0.5, 1.25, 0.5, 1.5), (1.0, -1.0, 2.0, 3.0, -1.0)
    mean, std = torch.zeros(5, 2, 2), torch.full((5, 2, 2), 0.5)
    found = Evaluation(torch.zeros(5), torch.tensor(ratios).log(), mean, std, None)
    old = BehaviorPolicy(5)
    old.keep(torch.arange(5), Evaluation(torch.zeros(5), torch.zeros(5), mean, std, None))
    batch = DecisionBatch(
        {}, {}, torch.full((5,), 2), mean[:, 0, 0], torch.tensor(advantages), mean[:, 0, 0], torch.arange(5)
    )
    noted: dict[str, float] = {}
    loss = algorithm._actor_loss(found, batch, old, noted)
    # min(1.5, 1.28) + min(-0.5, -0.8) + 2.5 + min(1.5, 2.4) + min(-1.5, -1.28)
    assert loss.item() == pytest.approx(-(1.28 - 0.8 + 2.5 + 1.5 - 1.5) / 5, abs=1e-6)
    assert noted["clip_fraction"] == pytest.approx(0.8)


def test_what_is_negative_has_a_bound() -> None:
    """Dual clip: the surrogate of a ratio of 3 and an advantage of -1 is not below -1.5; PPO's tests have the rest."""
    algorithm = toy_grpo(dual_clip=1.5)
    mean, std = torch.zeros(2, 2, 2), torch.full((2, 2, 2), 0.5)
    found = Evaluation(torch.zeros(2), torch.tensor([3.0, 1.1]).log(), mean, std, None)
    old = BehaviorPolicy(2)
    old.keep(torch.arange(2), Evaluation(torch.zeros(2), torch.zeros(2), mean, std, None))
    values, advantages = mean[:, 0, 0], torch.tensor([-1.0, -1.0])
    batch = DecisionBatch({}, {}, torch.full((2,), 2), values, advantages, values, torch.arange(2))
    loss = algorithm._actor_loss(found, batch, old, {})
    assert loss.item() == pytest.approx((1.5 + 1.1) / 2, abs=1e-6)


def test_micro_batches_and_parts_of_a_ratio() -> None:
    def learned(**options: Any) -> dict[str, Tensor]:
        algorithm = toy_grpo(toy_vec(4, horizon=2), batch_size=8, n_epochs=2, learning_rate=0.1, **options)
        # Adam's first steps are of full length for the smallest gradient.
        algorithm.policy.optimizer = torch.optim.SGD(algorithm.policy.parameters(), lr=0.1)
        algorithm.policy.optimizer.add_param_group({"params": []})
        learn(algorithm, 16)
        return weights(algorithm.policy)

    def furthest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
        return max((some[name] - others[name]).abs().max().item() for name in some)

    start, whole = weights(toy_grpo(toy_vec(4, horizon=2)).policy), learned()
    moved = furthest(whole, start)
    assert furthest(learned(micro_batch_size=3), whole) < 1e-3 * moved
    assert furthest(learned(logprob_type="action", clip_range=0.01), whole) > 0.01 * moved


def test_minibatches_hold_every_decision_once_and_are_equal() -> None:
    algorithm = toy_grpo(scripted(*GROUP), n_groups=1)
    learn(algorithm, 1)
    for size, parts in ((4, [4, 3, 3]), (16, [10]), (9, [5, 5])):
        minibatches = kept(algorithm).minibatches(size)
        assert [len(part) for part in minibatches] == parts
        assert torch.cat(minibatches).sort().values.tolist() == list(range(10))


def test_what_ppo_has_works_here_too() -> None:
    rehearsal = DemonstrationBatches(toy_demonstrations(), None, 2, 0, 0)
    algorithm = toy_grpo(
        toy_vec(4, action_dim=4, horizon=2),
        kl_coef=0.1,
        ent_coef=0.01,
        rehearsal=rehearsal,
        n_epochs=4,
        target_kl=1e-9,
        actor_warmup=3,
        distribution_kwargs={"learn_std": True},
    )
    learn(algorithm, 40)
    found = metrics(algorithm)
    assert {
        *("actor/loss", "actor/grad_norm", "actor/approx_kl", "actor/pg_clipfrac", "rollout/returns_mean"),
        *("rollout/advantages_mean", "rollout/groups_played", "rollout/groups_kept", "rollout/groups_kept_share"),
        *("rollout/group_success_mean", "rollout/group_success_std", "rollout/group_return_std", "env/episode_len"),
        *("env/success_once", "perf/env_steps_per_second", "perf/decisions_per_second", "perf/simulation_share"),
        *("perf/inference_share", "time/rollout_seconds", "time/update_seconds", "time/env_steps", "train/loss"),
        *("train/reference_kl", "train/entropy_loss", "train/rehearsal_loss", "train/policy_gradient_loss"),
    } <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    # The first of four epochs, one minibatch, begins at a divergence of zero; the second ends each update.
    assert algorithm._n_updates == 2 * algorithm.updates == 6
    assert found["train/actor_learning_rate"] == pytest.approx(3e-4 * 3 / 4)


def test_tasks_are_drawn_by_the_signal_they_give() -> None:
    env = toy_vec(4)
    told: list[Any] = []
    algorithm = toy_grpo(env, task_sampling="signal")
    env.env_method = lambda *arguments, **_: told.append(arguments)  # type: ignore[assignment,method-assign,misc]
    algorithm.learn(20, reset_num_timesteps=False)
    assert told and told[-1][0] == "set_task_weights" and set(told[-1][1]) <= {"Go to the left", "Go to the right"}


# --- Stable-Baselines3's contract -------------------------------------------------------------------------------------


def test_save_and_load_go_on_alike(tmp_path: Path) -> None:
    algorithm = toy_grpo(toy_vec(4, horizon=2), clip_range_high=0.28)
    learn(algorithm, 20)
    algorithm.save(tmp_path / "grpo")
    loaded = GRPO.load(tmp_path / "grpo", env=toy_vec(4, horizon=2), device="cpu")
    assert (loaded.group_size, loaded.n_groups, loaded.env_steps) == (4, 2, algorithm.env_steps)
    learned = []
    for each in (algorithm, loaded):
        torch.manual_seed(5)
        each.learn(20, reset_num_timesteps=False)
        learned.append(weights(each.policy))
    assert same(*learned)
    observation = toy_vec(1).reset()
    assert isinstance(observation, dict)
    actions = [each.predict(observation, deterministic=True)[0] for each in (algorithm, loaded)]
    assert np.array_equal(*actions) and actions[0].shape == (1, 2, 2)


def test_the_same_seed_gives_the_same_weights() -> None:
    def learned(seed: int | None) -> dict[str, Tensor]:
        algorithm = toy_grpo(toy_vec(4, horizon=2), distribution="flow_sde", seed=seed)
        learn(algorithm, 20)
        return weights(algorithm.policy)

    assert same(learned(0), learned(0))
    assert not same(learned(0), learned(1))


def test_callbacks_see_each_step_and_can_stop_it() -> None:
    class Watch(BaseCallback):
        starts = ends = 0

        def _on_rollout_start(self) -> None:
            self.starts += 1

        def _on_rollout_end(self) -> None:
            self.ends += 1

        def _on_step(self) -> bool:
            assert self.locals["dones"].shape == self.locals["rewards"].shape == (4,)
            assert len(self.locals["infos"]) == 4 and self.locals["clipped"].shape == (4, 2, 2)
            return self.n_calls < 7

    algorithm = toy_grpo(scripted(*GROUP), n_groups=1)
    watch = Watch()
    algorithm.learn(100, callback=watch)
    assert watch.n_calls == 7 and (watch.starts, watch.ends) == (3, 2)
    assert algorithm.num_timesteps == 10 + 10 + 4 and algorithm.updates == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size=1; expected at least 2"),
        ({"group_size": 3}, "4 environments for groups of group_size=3 episodes; expected a multiple"),
        ({"n_groups": 0}, "n_groups=0; expected at least 1"),
        ({"n_groups": 4, "max_groups": 3}, "max_groups=3; expected at least n_groups=4"),
        ({"success_bounds": (0.9, 0.1)}, r"success_bounds=\(0.9, 0.1\); expected 0 <= least <= greatest <= 1"),
        ({"success_bounds": (-0.1, 1.5)}, r"success_bounds=\(-0.1, 1.5\)"),
        ({"episode_return": "rewards"}, "Unknown episode_return='rewards'; did you mean 'reward'"),
        ({"advantage_type": "leave-one-out"}, "Unknown advantage_type='leave-one-out'; did you mean 'leave_one_out'"),
        ({"task_sampling": "signals"}, "did you mean 'signal'"),
        ({"dual_clip": 1.0}, "dual_clip=1.0; expected more than 1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0; expected more than 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_grpo(**options)


def test_a_stock_policy_is_refused() -> None:
    from stable_baselines3.common.policies import ActorCriticPolicy

    with pytest.raises(ValueError, match="GRPO trains VLAPolicy alone; got ActorCriticPolicy"):
        GRPO(ActorCriticPolicy, "CartPole-v1", group_size=2, device="cpu")


@pytest.mark.parametrize("options", [{"episode_return": "success"}, {"success_bounds": (0.1, 0.9)}])
def test_success_that_the_environment_does_not_tell(options: dict[str, Any]) -> None:
    silent = [(decisions, None, cut) for decisions, _, cut in HALF]
    toy_grpo(scripted(*silent), n_groups=1).learn(1)
    with pytest.raises(ValueError, match=r'does not give info\["is_success"\]'):
        toy_grpo(scripted(*silent), n_groups=1, **options).learn(1)


def test_an_episode_that_ends_without_a_word_has_not_succeeded() -> None:
    """A limit outside the environment may cut one of a group before it tells of success."""
    script = [HALF[0], HALF[1], *((decisions, None, True) for decisions, _, _ in HALF[2:])]
    successes = [float(success or 0.0) for _, success, _ in script]
    assert 0 < sum(successes) < 4
    algorithm = toy_grpo(scripted(*script), n_groups=1, normalize_length=False, episode_return="success")
    learn(algorithm, 1)
    expected = group_advantages(successes, "standardized").tolist()
    by_decision = [a for a, (decisions, *_) in zip(expected, script, strict=True) for _ in decisions]
    assert kept(algorithm).advantages.tolist() == pytest.approx(by_decision)


def test_a_group_that_ends_without_a_word_has_failed_where_others_tell() -> None:
    """A limit outside the environment may cut all of a group."""
    scripts = [[HALF[i], (HALF[i][0], None, True), HALF[i]] for i in range(len(HALF))]
    algorithm = toy_grpo(scripted(*scripts), n_groups=2, max_groups=3, episode_return="success")
    learn(algorithm, 1)
    found = metrics(algorithm)
    assert (found["rollout/groups_played"], found["rollout/groups_kept"]) == (3, 2)


def test_a_reward_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="rewards sum to nan; expected a finite number"):
        toy_grpo(toy_vec(4, reward=math.nan)).learn(1)


def test_episodes_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_vla.grpo.grpo._MOST_DECISIONS", 5)
    toy_grpo(toy_vec(4, horizon=5)).learn(1)
    with pytest.raises(RuntimeError, match="4 of 4 episodes have not ended after 5 decisions"):
        toy_grpo(toy_vec(4, horizon=6)).learn(1)


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "distribution_kwargs", "options"),
    [
        ("gaussian", {"std": 0.3}, {}),
        ("flow_sde", {"noise_level": 0.5}, {"advantage_type": "leave_one_out"}),
    ],
)
def test_learns_what_the_instruction_means(
    distribution: str, distribution_kwargs: dict[str, Any], options: dict[str, Any]
) -> None:
    """A return that only the instruction explains; ignoring it gives -0.5 at best."""
    make: Callable[[], gym.Env] = ToyEnv
    algorithm = toy_grpo(
        DummyVecEnv([make] * 16),
        distribution=distribution,
        distribution_kwargs=distribution_kwargs,
        stirred=False,
        **{"group_size": 8, "n_groups": 8, "batch_size": 32, "n_epochs": 4, "learning_rate": 1e-3, **options},
    )
    assert mean_reward(algorithm) == pytest.approx(-0.5, abs=0.01)
    algorithm.learn(16 * 64)
    assert mean_reward(algorithm) > -0.3
