"""Options of PPO and GRPO that are refused, each with a message that names the value and what was expected."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from toy import TINY, ToyEnv, toy_ppo, toy_vec

from sb3_vla import GRPO, PPO


class Unweighted(gym.Wrapper):
    """An environment whose tasks have no weights."""

    def get_wrapper_attr(self, name: str) -> Any:
        if name == "set_task_weights":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


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
