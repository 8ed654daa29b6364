"""train: what it refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import tiny_model, toy_vec

from sb3_vla import training
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.config import ConfigError, load_config
from sb3_vla.run import RunDirectory
from sb3_vla.training import GRPOConfig, PPOConfig, train


def start(tmp_path: Path, config: PPOConfig | GRPOConfig, **options: Any) -> None:
    save_checkpoint(tmp_path / "start", tiny_model(action_horizon=5))
    run = RunDirectory(tmp_path / "run", config)
    train(run, "rl", config, checkpoint=tmp_path / "start", output=tmp_path / "rl", **options)


def test_rehearsal_needs_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rehearsal_coef=0.5 needs demonstrations"):
        start(tmp_path, PPOConfig(rehearsal_coef=0.5), suite="MT10")


@pytest.mark.parametrize("tasks", [None, ["reach-v3", "push-v3"]])
def test_mt1_practises_one_task(tmp_path: Path, tasks: list[str] | None) -> None:
    with pytest.raises(ValueError, match="MT1 practises one task"):
        start(tmp_path, PPOConfig(), suite="MT1", tasks=tasks)


@pytest.mark.parametrize("name", ["iterations", "checkpoint_interval", "batch_size"])
def test_settings_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=rf"ppo.{name}=0; expected at least 1"):
        PPOConfig(**{name: 0})
    with pytest.raises(ConfigError, match=rf"ppo.{name}=0; expected at least 1"):
        load_config(PPOConfig, overrides=[f"{name}=0"])


class Captured(Exception):
    pass


def test_settings_reach_environments_and_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {}

    def vec_env(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        arguments.update(makers[0].keywords, num_workers=num_workers)
        return toy_vec(len(makers), chunk=5, action_dim=4)

    def ppo(policy: str, env: DummyVecEnv, **options: Any) -> None:
        arguments.update(options)
        raise Captured

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    monkeypatch.setattr(training, "PPO", ppo)
    changes: dict[str, Any] = {
        "gamma_per": "env_step",
        "bootstrap_truncated": True,
        "clip_range_high": 0.3,
        "dual_clip": 3.0,
        "clip_range_vf": 0.2,
        "huber_delta": 1.0,
        "logprob_type": "action",
        "normalize_advantage": False,
        "micro_batch_size": 8,
        "target_kl": 0.5,
        "ent_coef": 0.25,
        "max_grad_norm": 0.75,
        "critic_warmup": 7,
        "actor_warmup": 8,
        "overlap": True,
        "value_lr": 0.125,
        "horizon": 77,
        "num_workers": 3,
    }
    config = PPOConfig(**changes, privileged_critic=False)
    for name, value in changes.items():
        assert value != getattr(PPOConfig(), name)
    with pytest.raises(Captured):
        start(tmp_path, config, suite="MT10")
    assert {name: arguments[name] for name in changes} == changes
    assert arguments["privileged_state"] is False and arguments["elapsed_time"] is True


@pytest.mark.parametrize("name", ["total_decisions", "groups", "checkpoint_interval"])
def test_settings_of_no_groups(name: str) -> None:
    with pytest.raises(ValueError, match=rf"grpo.{name}=0; expected at least 1"):
        GRPOConfig(**{name: 0})


@pytest.mark.slow
def test_mt1_trains(tmp_path: Path) -> None:
    config = PPOConfig(
        iterations=1, num_envs=2, num_workers=1, decisions=4, batch_size=8, epochs=1, horizon=15, critic_warmup=0
    )
    start(tmp_path, config, suite="MT1", tasks=["reach-v3"], progress=False)
    assert (tmp_path / "rl" / "model.safetensors").is_file()


@pytest.mark.slow
def test_groups_of_metaworld_begin_alike_and_train(tmp_path: Path) -> None:
    config = GRPOConfig(
        total_decisions=1, num_envs=4, num_workers=2, horizon=15, group_size=2, groups=2, batch_size=8, epochs=1
    )
    # Of a policy that knows nothing all groups fail alike.
    with pytest.warns(UserWarning, match="No group of this rollout was kept"):
        start(tmp_path, config, suite="MT10", tasks=["reach-v3", "drawer-open-v3"], progress=False)
    rows = RunDirectory(tmp_path / "run", config).metrics()
    assert rows[-1]["rollout/groups_played"] == 8 and rows[-1]["time/env_steps"] == 8 * 2 * 15
    saved = load_checkpoint(tmp_path / "rl")
    assert saved.value_head is None and saved.notes["grpo"]["env_steps"] == 240
