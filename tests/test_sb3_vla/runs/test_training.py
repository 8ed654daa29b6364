"""train: what it refuses before it starts anything."""

from __future__ import annotations

import functools
import gc
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import TINY, tiny_model, toy_demonstrations, toy_vec

from mw_envs.rendering import RendererUnavailableError
from sb3_vla import GRPO, PPO
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.common.config import ConfigError, load_config
from sb3_vla.models import CompactVLA
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.views import view_of
from sb3_vla.runs import training
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.settings import GRPOConfig, PPOConfig
from sb3_vla.runs.training import train
from sb3_vla.sft.imitation import SFTConfig, sft


def start(tmp_path: Path, config: PPOConfig | GRPOConfig, **options: Any) -> None:
    save_checkpoint(tmp_path / "start", tiny_model(action_horizon=5))
    run = RunDirectory(tmp_path / "run", config)
    train(run, "rl", config, checkpoint=tmp_path / "start", output=tmp_path / "rl", **options)


def test_rehearsal_needs_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rehearsal_coef=0.5 needs demonstrations"):
        start(tmp_path, PPOConfig(rehearsal_coef=0.5), suite="MT10")


@pytest.mark.parametrize("shift", [0, 3])
def test_rehearsal_shifts_pictures_as_imitation_did(
    shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*given: Any) -> None:
        raise Captured(given[3])

    monkeypatch.setattr(training, "DemonstrationBatches", capture)
    config = PPOConfig(rehearsal_coef=0.5)
    with pytest.raises(Captured, match=str(SFTConfig.shift)):  # of a checkpoint that does not say it
        start(tmp_path, config, suite="MT10", demonstrations=toy_demonstrations())
    imitation = SFTConfig(model_kwargs=TINY, steps=1, batch_size=4, shift=shift, bf16=False, device="cpu")
    sft(toy_demonstrations(), imitation, output=tmp_path / "sft", progress=False)
    options: dict[str, Any] = {"suite": "MT10", "demonstrations": toy_demonstrations(), "output": tmp_path / "rl"}
    with pytest.raises(Captured, match=str(shift)):
        train(RunDirectory(tmp_path / "run", config), "rl", config, checkpoint=tmp_path / "sft", **options)


@pytest.mark.parametrize("tasks", [None, ["reach-v3", "push-v3"]])
def test_mt1_practises_one_task(tmp_path: Path, tasks: list[str] | None) -> None:
    with pytest.raises(ValueError, match="MT1 is a single task"):
        start(tmp_path, PPOConfig(), suite="MT1", tasks=tasks)


def test_a_renderer_that_cannot_be_had_is_refused_before_there_are_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'vulkan'"):
        start(tmp_path, PPOConfig(), suite="MT10", renderer="vulkan")

    def missing_library(_: str) -> None:
        raise RendererUnavailableError("no EGL here")

    monkeypatch.setattr("mw_envs.rendering.choice._create", missing_library)
    monkeypatch.setattr("mw_envs.rendering.choice._renderers", {})
    with pytest.raises(RendererUnavailableError, match=r"^no EGL here$"):
        start(tmp_path, PPOConfig(), suite="MT10", renderer="egl")


def test_a_split_that_a_suite_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Suite MT10 has no split 'tset'"):
        start(tmp_path, PPOConfig(), suite="MT10", split="tset")


@pytest.mark.parametrize("name", ["iterations", "checkpoint_interval", "batch_size"])
def test_settings_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=rf"ppo.{name}=0; expected at least 1"):
        PPOConfig(**{name: 0})
    with pytest.raises(ConfigError, match=rf"ppo.{name}=0; expected at least 1"):
        load_config(PPOConfig, overrides=[f"{name}=0"])


def test_no_checkpoint_to_go_on_from() -> None:
    with pytest.raises(ValueError, match=r"grpo\.keep_checkpoints=0; expected at least 1, or null for all"):
        GRPOConfig(keep_checkpoints=0)


class Captured(Exception):
    pass


SHARED_CHANGES: dict[str, Any] = {
    "batch_size": 32,
    "clip_range": 0.125,
    "clip_range_high": 0.3,
    "dual_clip": 3.0,
    "logprob_type": "action",
    "micro_batch_size": 8,
    "target_kl": 0.5,
    "ent_coef": 0.25,
    "kl_coef": 0.75,
    "max_grad_norm": 0.75,
    "actor_warmup": 8,
    "task_sampling": "uniform",
    "rehearsal_batch_size": 3,
    "bf16": None,
    "device": "cpu",
    "sharding": "fsdp",
    "seed": 11,
}
PPO_CHANGES: dict[str, Any] = {
    "value_lr": 0.125,
    "gamma": 0.9,
    "gamma_per": "env_step",
    "gae_lambda": 0.8,
    "bootstrap_truncated": True,
    "clip_range_vf": 0.2,
    "huber_delta": 1.0,
    "normalize_advantage": False,
    "critic_warmup": 7,
    "overlap": True,
}
GRPO_CHANGES: dict[str, Any] = {
    "group_size": 4,
    "max_groups": 50,
    "success_bounds": (0.1, 0.9),
    "episode_return": "success",
    "advantage_type": "leave_one_out",
    "normalize_length": False,
}
ENVIRONMENT_CHANGES = {"horizon": 77, "num_workers": 3}
# What reaches the algorithm by another name or another way, and what is for the run.
OTHERWISE = {
    *("num_envs", "epochs", "learning_rate", "lr_scheduler", "final_learning_rate", "final_noise_scale"),
    *("trainable", "distribution", "distribution_kwargs", "rehearsal_coef", "checkpoint_interval", "keep_checkpoints"),
    *("iterations", "decisions", "privileged_critic", "total_decisions", "groups"),
    *("lora", "frozen_bf16", "gradient_checkpointing", "compile", "cache_perception"),
}


@pytest.mark.parametrize(
    ("algorithm", "config_class", "own_changes"), [(PPO, PPOConfig, PPO_CHANGES), (GRPO, GRPOConfig, GRPO_CHANGES)]
)
def test_settings_reach_environments_and_algorithm(
    algorithm: type[PPO],
    config_class: type[PPOConfig] | type[GRPOConfig],
    own_changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments: dict[str, Any] = {}

    def vec_env(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        make = makers[0].args[0] if algorithm is GRPO else makers[0]
        arguments.update(make.keywords, num_workers=num_workers)
        return toy_vec(len(makers), chunk=5, action_dim=4)

    @functools.wraps(algorithm.__init__)
    def construct(self: PPO, policy: str, env: DummyVecEnv, **options: Any) -> None:
        arguments.update(options)
        raise Captured

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    monkeypatch.setattr(algorithm, "__init__", construct)
    changes = SHARED_CHANGES | own_changes
    config = config_class(**changes, **ENVIRONMENT_CHANGES, epochs=6, learning_rate=0.5, final_noise_scale=0.25)
    for name, value in changes.items():
        assert value != getattr(config_class(), name)
    with pytest.raises(Captured):
        start(tmp_path, config, suite="MT10")
    expected = changes | ENVIRONMENT_CHANGES
    assert {name: arguments[name] for name in expected} == expected
    assert arguments["n_epochs"] == 6
    assert (arguments["learning_rate"](1.0), arguments["learning_rate"](0.0)) == (0.5, config.final_learning_rate)
    assert (arguments["noise_scale"](1.0), arguments["noise_scale"](0.0)) == (1.0, 0.25)
    assert arguments["n_steps" if algorithm is PPO else "n_groups"] == (128 if algorithm is PPO else 12)
    assert arguments["privileged_state"] is True and arguments["elapsed_time"] is True
    # A field that is new is in one of these lists.
    assert {item.name for item in fields(config)} == {*expected, *OTHERWISE} & {item.name for item in fields(config)}


def test_the_model_at_the_start_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the algorithm learns there are as many models, and bytes of parameters, as its policy has."""

    def alive() -> list[CompactVLA]:
        gc.collect()
        return [each for each in gc.get_objects() if isinstance(each, CompactVLA)]

    earlier = alive()  # of other tests

    def learn(algorithm: PPO, *_: Any, **__: Any) -> None:
        made = [each for each in alive() if not any(each is other for other in earlier)]
        assert [each is algorithm.policy.model for each in made] == [True]
        raise Captured

    monkeypatch.setattr(training, "SharedMemoryVecEnv", lambda makers, num_workers: toy_vec(4, chunk=5, action_dim=4))
    monkeypatch.setattr(PPO, "learn", learn)
    with pytest.raises(Captured):
        start(tmp_path, PPOConfig(num_envs=4, decisions=4, batch_size=16, device="cpu"), suite="MT10")


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_torch_s_schedulers(kind: str) -> None:
    count, first, last = 20, 5e-6, 1e-6
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=first)
    schedulers = {
        "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1),
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer, 1, last / first, count),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count, last),
    }
    ours = PPOConfig(learning_rate=first, lr_scheduler=kind, final_learning_rate=last).arguments()["learning_rate"]
    for number in range(count + 1):
        assert ours(1 - number / count) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), number
        optimizer.step()
        schedulers[kind].step()


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown grpo.lr_scheduler='cosin'; did you mean 'cosine'"):
        GRPOConfig(lr_scheduler="cosin")


def test_the_critic_may_do_without_the_simulators_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vec_env(makers: list[Any], num_workers: int | None) -> None:
        assert makers[0].keywords["privileged_state"] is False
        raise Captured

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    with pytest.raises(Captured):
        start(tmp_path, PPOConfig(privileged_critic=False), suite="MT10")


def test_the_result_notes_the_view_that_was_practised_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vec_env(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        return toy_vec(len(makers), chunk=5, action_dim=4, privileged=True)

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    config = PPOConfig(iterations=1, num_envs=1, decisions=2, batch_size=2, epochs=1, device="cpu")
    seen = {"crop": "workspace", "camera": "corner", "image_size": 32}
    start(tmp_path, config, suite="MT10", progress=False, env_kwargs=seen)
    assert view_of(load_checkpoint(tmp_path / "rl").notes) == seen
    assert load_policy(tmp_path / "rl").view == {"crop": "workspace", "camera": "corner"}


def test_rehearsal_of_another_view_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vec_env(makers: list[Any], num_workers: int | None) -> None:
        raise Captured

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    data = toy_demonstrations()
    data.camera = {"camera": "corner2", "crop": "workspace"}
    expected = (
        "for rehearsal show camera=corner2 with crop=workspace, but the policy is shown camera=corner2 with crop=full"
    )
    with pytest.raises(Captured), pytest.warns(UserWarning, match=expected):
        start(tmp_path, PPOConfig(rehearsal_coef=0.5), suite="MT10", demonstrations=data)


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
