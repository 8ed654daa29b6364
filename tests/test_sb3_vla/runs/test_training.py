"""train: what it refuses before it starts anything."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import TINY, tiny_model, toy_demonstrations, toy_vec
from trainings import grpo, ppo

from mw_envs.rendering import RendererUnavailableError
from sb3_vla import PPO
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.models import CompactVLA
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.views import view_of
from sb3_vla.runs import training
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.settings import Annealed, Training
from sb3_vla.runs.training import train
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig


def start(tmp_path: Path, config: Training, **options: Any) -> None:
    save_checkpoint(tmp_path / "start", tiny_model(action_horizon=5))
    run = RunDirectory(tmp_path / "run", {})
    train(run, "rl", config, checkpoint=tmp_path / "start", output=tmp_path / "rl", **options)


def test_rehearsal_needs_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rehearsal_coef=0.5 needs demonstrations"):
        start(tmp_path, ppo(rehearsal_coef=0.5), suite="MT10")


@pytest.mark.parametrize("shift", [0, 3])
def test_rehearsal_shifts_pictures_as_imitation_did(
    shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*given: Any) -> None:
        raise Captured(given[3])

    monkeypatch.setattr(training, "DemonstrationBatches", capture)
    config = ppo(rehearsal_coef=0.5)
    with pytest.raises(Captured, match=str(SFTConfig.shift)):  # of a checkpoint that does not say it
        start(tmp_path, config, suite="MT10", demonstrations=toy_demonstrations())
    imitation = SFTConfig(model_kwargs=TINY, steps=1, batch_size=4, shift=shift, bf16=False, device="cpu")
    sft(toy_demonstrations(), imitation, output=tmp_path / "sft", progress=False)
    options: dict[str, Any] = {"suite": "MT10", "demonstrations": toy_demonstrations(), "output": tmp_path / "rl"}
    with pytest.raises(Captured, match=str(shift)):
        train(RunDirectory(tmp_path / "run", {}), "rl", config, checkpoint=tmp_path / "sft", **options)


@pytest.mark.parametrize("tasks", [None, ["reach-v3", "push-v3"]])
def test_mt1_practises_one_task(tmp_path: Path, tasks: list[str] | None) -> None:
    with pytest.raises(ValueError, match="MT1 is a single task"):
        start(tmp_path, ppo(), suite="MT1", tasks=tasks)


def test_a_renderer_that_cannot_be_had_is_refused_before_there_are_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'vulkan'"):
        start(tmp_path, ppo(), suite="MT10", renderer="vulkan")

    def missing_library(_: str) -> None:
        raise RendererUnavailableError("no EGL here")

    monkeypatch.setattr("mw_envs.rendering.choice._create", missing_library)
    monkeypatch.setattr("mw_envs.rendering.choice._renderers", {})
    with pytest.raises(RendererUnavailableError, match=r"^no EGL here$"):
        start(tmp_path, ppo(), suite="MT10", renderer="egl")


def test_a_split_that_a_suite_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Suite MT10 has no split 'tset'"):
        start(tmp_path, ppo(), suite="MT10", split="tset")


class Captured(Exception):
    pass


@pytest.mark.parametrize("make", [ppo, grpo])
def test_settings_reach_environments_policy_and_algorithm(
    make: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def vec_env(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        make = makers[0].args[0] if makers[0].func is training._holding else makers[0]
        found.update(make.keywords, num_workers=num_workers, num_envs=len(makers))
        return toy_vec(len(makers), chunk=5, action_dim=4)

    def construct(self: PPO, policy: str, env: DummyVecEnv, **options: Any) -> None:
        found.update(options)
        raise Captured

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    given = make(env={"horizon": 77, "reward": "dense"}, num_workers=3, num_envs=8, trainable="all", clip_range=0.125)
    monkeypatch.setattr(given.algorithm, "__init__", construct)
    with pytest.raises(Captured):
        start(tmp_path, given, suite="MT10", model_kwargs=None)
    options = found.pop("policy_kwargs")
    assert found.items() >= {**given.arguments, **given.env, "num_workers": 3, "num_envs": 8}.items()
    assert options.items() >= given.policy.items() and options["optimizer_class"] is torch.optim.AdamW
    assert options["checkpoint"] == str(tmp_path / "start")
    assert found["clip_range"] == 0.125 and options["trainable"] == "all"
    assert found["privileged_state"] is True and found["elapsed_time"] is True


def test_what_decides_a_result_and_what_does_not() -> None:
    assert ppo().deciding() == ppo(num_workers=3, keep_checkpoints=None, device="cpu", compile={}).deciding()
    assert ppo(iterations=3).deciding() == ppo(iterations=4).deciding()  # a second start may go further
    for changed in (
        ppo(seed=1),
        ppo(trainable="all"),
        ppo(horizon=80),
        ppo(num_envs=8),
        ppo(learning_rate=1e-4),
        grpo(),
    ):
        assert changed.deciding() != ppo().deciding()


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
        start(tmp_path, ppo(num_envs=4, n_steps=4, batch_size=16, device="cpu"), suite="MT10")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_learning_rates_are_those_of_torch_s_schedulers(kind: str) -> None:
    count, first, last = 20, 5e-6, 1e-6
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=first)
    schedulers = {
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer, 1, last / first, count),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count, last),
    }
    ours = Annealed(first, last, kind)
    for number in range(count + 1):
        assert ours(1 - number / count) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), number
        optimizer.step()
        schedulers[kind].step()


def test_the_critic_may_do_without_the_simulators_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vec_env(makers: list[Any], num_workers: int | None) -> None:
        assert makers[0].keywords["privileged_state"] is False
        raise Captured

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    with pytest.raises(Captured):
        start(tmp_path, ppo(env={"privileged_state": False}), suite="MT10")


def test_the_result_notes_the_view_that_was_practised_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vec_env(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        return toy_vec(len(makers), chunk=5, action_dim=4, privileged=True)

    monkeypatch.setattr(training, "SharedMemoryVecEnv", vec_env)
    seen = {"crop": "workspace", "camera": "corner", "image_size": 32}
    config = ppo(iterations=1, num_envs=1, n_steps=2, batch_size=2, n_epochs=1, device="cpu", env=seen)
    start(tmp_path, config, suite="MT10", progress=False)
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
        start(tmp_path, ppo(rehearsal_coef=0.5), suite="MT10", demonstrations=data)


@pytest.mark.slow
def test_mt1_trains(tmp_path: Path) -> None:
    config = ppo(
        iterations=1, num_envs=2, num_workers=1, n_steps=4, batch_size=8, n_epochs=1, horizon=15, critic_warmup=0
    )
    start(tmp_path, config, suite="MT1", tasks=["reach-v3"], progress=False)
    assert (tmp_path / "rl" / "model.safetensors").is_file()


@pytest.mark.slow
def test_groups_of_metaworld_begin_alike_and_train(tmp_path: Path) -> None:
    config = grpo(
        total_decisions=1, num_envs=4, num_workers=2, horizon=15, group_size=2, n_groups=2, batch_size=8, n_epochs=1
    )
    # Of a policy that knows nothing all groups fail alike.
    with pytest.warns(UserWarning, match="No group of this rollout was kept"):
        start(tmp_path, config, suite="MT10", tasks=["reach-v3", "drawer-open-v3"], progress=False)
    rows = RunDirectory(tmp_path / "run").metrics()
    assert rows[-1]["rollout/groups_played"] == 8 and rows[-1]["time/env_steps"] == 8 * 2 * 15
    saved = load_checkpoint(tmp_path / "rl")
    assert saved.value_head is None and saved.notes["grpo"]["env_steps"] == 240
