"""Evaluations follow their list of trials exactly, and their numbers are those of the published arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import TINY, tiny_model

import sb3_vla
from mw_envs import TASKS, Trial, decode_instruction, suite_tasks
from mw_envs.experts import ScriptedExpert
from sb3_vla.checkpoints import save_checkpoint
from sb3_vla.evaluation.evaluation import (
    PROTOCOLS,
    TRIAL_SEED,
    EvaluationResult,
    Protocol,
    TrialResult,
    VideoOptions,
    _Schedule,
    check_fit,
    compare,
    evaluate,
    find_protocol,
    make_trial_env,
    make_trial_vec_env,
    trials_for,
)
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.recording.episodes import captions
from sb3_vla.recording.videos import annotate
from sb3_vla.runs.report.charts import before_after_bars, learning_curve

EASY = ["coffee-button-v3", "door-unlock-v3"]
SMALL = {"image_size": 16}
# Unlike the environment's defaults, so that nothing passes by leaving the protocol out.
EXPERT_PROTOCOL = Protocol("expert-140", horizon=140, action_chunk=1, settle_steps=7)
EXPERT_ENV: dict[str, Any] = {"image_size": 16, "privileged_state": True}
Observation = dict[str, npt.NDArray[Any]]


class RandomPolicy:
    """Uniform actions."""

    action_space = spaces.Box(-1, 1, (5, 4), np.float32)

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def predict(
        self, observation: Observation, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[npt.NDArray[np.float32], Any]:
        shape = (len(observation["image"]), *self.action_space.shape)
        return self.generator.uniform(-1, 1, shape).astype(np.float32), None


class ExpertPolicy:
    """The scripted experts, chosen by the instruction; notes the batches it saw."""

    action_space = spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self) -> None:
        self.experts = {TASKS[task].instruction: ScriptedExpert(task) for task in EASY}
        self.starts: list[npt.NDArray[np.bool_]] = []

    def predict(
        self, observation: Observation, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[npt.NDArray[np.float32], Any]:
        self.starts.append(np.array(episode_start))
        actions = np.zeros((len(observation["instruction"]), 4), np.float32)
        for row, instruction in enumerate(map(decode_instruction, observation["instruction"])):
            if instruction:  # all zeros where an environment never had a trial
                actions[row] = self.experts[instruction].action(observation["privileged_state"][row])
        return actions, state


@pytest.fixture(scope="module")
def small_env() -> Iterator[DummyVecEnv]:
    """One environment in this process, chunk 5."""
    env = DummyVecEnv([functools.partial(make_trial_env, PROTOCOLS["rlinf-160"], SMALL)])
    yield env
    env.close()


def expert_env(count: int, protocol: Protocol = EXPERT_PROTOCOL) -> DummyVecEnv:
    return DummyVecEnv([functools.partial(make_trial_env, protocol, EXPERT_ENV)] * count)


@pytest.fixture(scope="module")
def expert_result() -> EvaluationResult:
    env = expert_env(1)
    policy = ExpertPolicy()
    result = evaluate(policy, tasks=EASY, trials_per_task=3, protocol=EXPERT_PROTOCOL, vec_env=env, progress=False)
    env.close()
    starts = np.concatenate(policy.starts)
    assert starts[0] and starts.sum() == 6, "episode_start must be set once for each trial"
    return result


# Trials, protocols and their distribution over workers


def test_trials_are_the_goals_of_one_seed_then_of_the_next() -> None:
    trials = trials_for(["reach-v3", "push-v3"], 52, seed=7)
    assert len(trials) == len(set(trials)) == 104
    assert trials[0] == Trial("reach-v3", 7, 0)
    assert trials[49:52] == [Trial("reach-v3", 7, 49), Trial("reach-v3", 8, 0), Trial("reach-v3", 8, 1)]
    assert trials[52] == Trial("push-v3", 7, 0)


def test_protocols_are_the_published_ones() -> None:
    numbers = {name: (p.horizon, p.action_chunk, p.settle_steps) for name, p in PROTOCOLS.items()}
    theirs = {"evo1-400": (400, 15, 1), "lerobot-500": (500, None, 0)}
    assert numbers == {"rlinf-160": (160, 5, 15), "rlinf-100": (100, 5, 16), **theirs}
    assert find_protocol("rlinf-100") is PROTOCOLS["rlinf-100"]
    assert "160 steps, chunk 5, 15 settle steps" in str(PROTOCOLS["rlinf-160"])


def test_schedule_deals_each_trial_once_in_any_order_of_environments() -> None:
    trials = trials_for(suite_tasks("MT10"), 7)
    for count in (1, 2, 3, 16, 100):
        schedule, order = _Schedule(trials, [range(count // 2), range(count // 2, count)]), random.Random(count)
        dealt = [schedule.next(number) for number in range(count)]
        while (index := schedule.next(order.randrange(count))) is not None:
            dealt.append(index)
        assert sorted(index for index in dealt if index is not None) == list(range(len(trials)))


@pytest.mark.parametrize(("workers", "each", "limit"), [(3, 1, 13), (4, 8, 20), (16, 8, 40)])
def test_schedule_constructs_few_scenes(workers: int, each: int, limit: int) -> None:
    """Dealt out without regard to processes, ten tasks are constructed 34 times by 4 processes, 130 times by 16."""
    trials = trials_for(suite_tasks("MT10"), 20)
    schedule = _Schedule(trials, [range(each * worker, each * (worker + 1)) for worker in range(workers)])
    constructed = set()
    for turn in range(len(trials)):
        index = schedule.next(turn % (workers * each))
        assert index is not None
        constructed.add((turn % (workers * each) // each, trials[index].task))
    assert len(constructed) <= limit


# Running


def test_expert_succeeds_and_the_list_is_followed(expert_result: EvaluationResult) -> None:
    assert [outcome.trial for outcome in expert_result.trials] == trials_for(EASY, 3)
    assert all(outcome.success and outcome.success_at_end for outcome in expert_result.trials)
    assert expert_result.average().value == 1.0
    assert set(expert_result.versions) == {"metaworld", "mujoco", "numpy", "python"}


def test_each_trial_equals_the_same_episode_run_by_hand(expert_result: EvaluationResult) -> None:
    env = gym.make("mw_envs:MetaWorldMT50-v0", horizon=140, settle_steps=7, **EXPERT_ENV)
    for outcome in expert_result.trials:
        task, seed, goal = outcome.trial
        observation, _ = env.reset(options={"task": task, "seed": seed, "goal": goal})
        expert, steps, terminated, truncated, info = ScriptedExpert(task), 0, False, False, dict[str, Any]()
        while not (terminated or truncated):
            observation, _, terminated, truncated, info = env.step(expert.action(observation["privileged_state"]))
            steps += 1
        assert (outcome.steps_to_success, outcome.length, outcome.success) == (steps, steps, info["is_success"])
    env.close()


def test_the_number_of_environments_and_workers_does_not_matter(expert_result: EvaluationResult) -> None:
    """Three environments in two processes, and eight in this one, of which two have no trial at all."""
    options: dict[str, Any] = {"tasks": EASY, "trials_per_task": 3, "protocol": EXPERT_PROTOCOL, "progress": False}
    three = evaluate(ExpertPolicy(), num_envs=3, num_workers=2, env_kwargs=EXPERT_ENV, **options)
    assert three == expert_result
    eight = evaluate(ExpertPolicy(), vec_env=expert_env(8), **options)
    assert eight == expert_result


def test_by_default_a_worker_has_eight_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []
    choices: list[dict[str, Any]] = [{}, {"num_workers": 2}, {"trials_per_task": 5}, {"num_envs": 4}]

    class Asked(Exception):
        pass

    def ask(env_fns: list[Any], start_method: str | None, *, num_workers: int | None) -> None:
        asked.append((len(env_fns), num_workers))
        raise Asked

    monkeypatch.setattr("sb3_vla.evaluation.trial_envs.SharedMemoryVecEnv", ask)
    monkeypatch.setattr("sb3_vla.evaluation.trial_envs.available_cores", lambda: 3)
    for options in choices:
        with pytest.raises(Asked):
            evaluate(RandomPolicy(), tasks=EASY, **options)
    with pytest.raises(Asked):
        make_trial_vec_env(PROTOCOLS["rlinf-160"])
    assert asked == [(24, None), (16, 2), (10, None), (4, None), (24, None)]


def test_random_actions_do_not_succeed(small_env: DummyVecEnv, untouched_global_rng: None) -> None:
    result = evaluate(RandomPolicy(), tasks=EASY, trials_per_task=2, vec_env=small_env, progress=False)
    assert not any(result.successes.values())
    assert {(outcome.length, outcome.steps_to_success) for outcome in result.trials} == {(160, None)}


def test_success_that_does_not_last() -> None:
    """The coffee button's expert draws back, and the button with it: success once, but not at the end."""
    protocol = dataclasses.replace(EXPERT_PROTOCOL, horizon=110, terminate_on_success=False)
    env = expert_env(1, protocol)
    result = evaluate(ExpertPolicy(), tasks=EASY[:1], trials_per_task=1, protocol=protocol, vec_env=env, progress=False)
    (outcome,) = result.trials
    assert outcome.success and not outcome.success_at_end
    assert outcome.length == 110 and outcome.steps_to_success is not None and outcome.steps_to_success < 60
    at_end = result.mean_success_at_end()
    assert at_end is not None and at_end.value == 0.0
    assert "at the last step" in result.to_markdown()


def test_the_policys_own_chunk() -> None:
    protocol = dataclasses.replace(PROTOCOLS["lerobot-500"], horizon=12)
    env = DummyVecEnv([functools.partial(make_trial_env, dataclasses.replace(protocol, action_chunk=5), SMALL)])
    result = evaluate(RandomPolicy(), tasks=EASY[:1], trials_per_task=1, protocol=protocol, vec_env=env, progress=False)
    assert result.protocol.action_chunk == 5
    assert result.trials[0].length == 12  # the third chunk is cut short
    with pytest.raises(ValueError, match="Silent has no action_space"):
        evaluate(Silent(None), tasks=EASY, protocol="lerobot-500")


class Silent:
    """A policy that tells nothing about itself and answers with whatever it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def predict(
        self, observation: Observation, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        return self.answer, None


def test_stable_baselines3_model(small_env: DummyVecEnv) -> None:
    """Its policy is built for images channels first, the evaluation gives them as drawn."""
    env = gym.make("mw_envs:MetaWorldMT1-v0", task=EASY[0], action_chunk=5, image_size=36)
    model = PPO("MultiInputPolicy", env, n_steps=2, batch_size=2, device="cpu")
    protocol = dataclasses.replace(PROTOCOLS["rlinf-160"], horizon=10)
    trial_env = DummyVecEnv([functools.partial(make_trial_env, protocol, {"image_size": 36})] * 2)
    result = evaluate(model, tasks=EASY, trials_per_task=1, protocol=protocol, vec_env=trial_env, progress=False)
    assert [outcome.length for outcome in result.trials] == [10, 10]
    with pytest.raises(ValueError, match=r"reads 'image' of shape \(3, 36, 36\), the environment gives \(16, 16, 3\)"):
        evaluate(model, tasks=EASY, trials_per_task=1, vec_env=small_env, progress=False)
    with pytest.raises(ValueError, match=r"decides actions of shape \(5, 4\).*executes \(4,\)"):
        evaluate(model, tasks=EASY, protocol=EXPERT_PROTOCOL, env_kwargs={"image_size": 36})


def test_a_policy_reads_instructions_of_another_length(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", tiny_model(action_dim=4, action_horizon=5))
    policy = load_policy(tmp_path / "checkpoint")
    protocol = dataclasses.replace(PROTOCOLS["rlinf-160"], horizon=10)

    def outcome(**options: Any) -> EvaluationResult:
        env = DummyVecEnv([functools.partial(make_trial_env, protocol, {"image_size": 32, **options})])
        return evaluate(policy, tasks=EASY[:1], trials_per_task=1, protocol=protocol, vec_env=env, progress=False)

    assert outcome(instruction_bytes=90).trials == outcome().trials


# What the policy sees


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations run here, in one environment."""

    def make(protocol: Protocol, env_kwargs: dict[str, Any], **_: Any) -> DummyVecEnv:
        return DummyVecEnv([functools.partial(make_trial_env, protocol, env_kwargs)])

    monkeypatch.setattr(sb3_vla.evaluation.evaluation, "make_trial_vec_env", make)


def workspace_policy(folder: Path, **view: Any) -> VLAPolicy:
    """Of a checkpoint that was trained on a crop; further notes are of its view."""
    notes = {"view": {"camera": "corner2", "crop": "workspace", **view}}
    save_checkpoint(folder, tiny_model(action_horizon=5), notes=notes)
    return load_policy(folder)


BRIEF = dataclasses.replace(PROTOCOLS["rlinf-160"], name="brief", horizon=5)


@pytest.mark.parametrize("given", [None, {}, {"image_size": 32}, {"renderer": "software"}, {"crop": "workspace"}])
def test_a_policy_is_shown_the_view_that_it_was_trained_on(
    tmp_path: Path, given: dict[str, Any] | None, in_this_process: None, recwarn: pytest.WarningsRecorder
) -> None:
    policy = workspace_policy(tmp_path / "sft")
    seen: list[Any] = []
    act = policy.predict
    policy.predict = lambda observation, **options: seen.append(observation) or act(observation, **options)  # type: ignore[func-returns-value, method-assign]
    result = evaluate(policy, tasks=EASY[:1], trials_per_task=1, protocol=BRIEF, env_kwargs=given, progress=False)
    env = gym.make("mw_envs:MetaWorldMT50-v0", image_size=32, crop="workspace")
    first, _ = env.reset(options=result.trials[0].trial._asdict())
    env.close()
    np.testing.assert_array_equal(seen[0]["image"][0], first["image"])
    assert result.env_kwargs == {"camera": "corner2", "crop": "workspace", "image_size": 32, **(given or {})}
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"crop": None}, "camera=corner2 with crop=full"),
        ({"crop": [0.1, 0.2, 0.5, 0.5]}, r"camera=corner2 with crop=\[0.1, 0.2, 0.5, 0.5\]"),
        ({"camera": "corner"}, "camera=corner with crop=workspace"),
    ],
)
def test_another_view_than_the_policys_is_told(tmp_path: Path, given: dict[str, Any], shown: str) -> None:
    policy = workspace_policy(tmp_path / "sft")
    expected = f"trained on camera=corner2 with crop=workspace, but the policy is shown {shown}"
    with pytest.warns(UserWarning, match=expected):
        assert check_fit(policy, BRIEF, given)["env_kwargs"].items() >= given.items()
    env = DummyVecEnv([functools.partial(make_trial_env, BRIEF, {"image_size": 32, **given})])
    if "camera" in given:
        shown = "camera=corner with crop=full"
    with pytest.warns(UserWarning, match=f"trained on camera=corner2 with crop=workspace.* {shown}"):
        evaluate(policy, tasks=EASY[:1], trials_per_task=1, protocol=BRIEF, vec_env=env, progress=False)
    with pytest.warns(UserWarning, match=expected):
        assert load_policy(tmp_path / "sft", view=given).view == {"camera": "corner2", "crop": "workspace", **given}


def test_an_algorithm_knows_what_its_environment_showed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def make(**options: Any) -> DummyVecEnv:
        env = functools.partial(gym.make, "mw_envs:MetaWorldMT1-v0", task=EASY[0], action_chunk=5, **options)
        return DummyVecEnv([env])

    sizes = {"n_steps": 2, "batch_size": 2, "n_epochs": 1, "device": "cpu"}
    shown = {"image_size": 32, "crop": "workspace", "privileged_state": True, "elapsed_time": True, "horizon": 5}
    made = sb3_vla.PPO("VLAPolicy", make(**shown), policy_kwargs={"model_kwargs": TINY}, **sizes)
    made.save(tmp_path / "made.zip")
    window = (17 / 144, 36 / 144, 96 / 144, 96 / 144)
    for loaded in (made, sb3_vla.PPO.load(tmp_path / "made.zip", device="cpu")):
        seen = check_fit(loaded, BRIEF, None)["env_kwargs"]
        assert seen.pop("crop") == pytest.approx(window)
        assert seen == {"camera": "corner2", "image_size": 32, "privileged_state": True, "elapsed_time": True}
        assert check_fit(loaded.policy, BRIEF, None)["env_kwargs"]["crop"] == pytest.approx(window)
    made.policy.save(str(tmp_path / "policy.pth"))
    assert VLAPolicy.load(str(tmp_path / "policy.pth"), device="cpu").view == made.policy.view
    kwargs = {"VLAPolicy": {"model_kwargs": TINY}, "MultiInputPolicy": {}}
    for name in kwargs:  # of Stable-Baselines3's own, as long as it has its environment
        stock = PPO(name, make(**{**shown, "image_size": 48}), policy_kwargs=kwargs[name], **sizes)
        assert check_fit(stock, BRIEF, None)["env_kwargs"]["crop"] == pytest.approx(window)
    other = sb3_vla.PPO.load(tmp_path / "made.zip", make(**{**shown, "crop": None}), device="cpu")
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]
    with pytest.warns(
        UserWarning, match="trained on camera=corner2 with crop=workspace, but the policy is shown .*=full"
    ):
        other.learn(2)
    assert other.policy.view["crop"] == [0, 0, 1, 1]


def test_a_folder_that_does_not_say_its_view_says_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "sft", tiny_model(action_horizon=5), notes={"view": {"render_size": 48}})
    with pytest.warns(UserWarning, match="sft does not say which view its model was trained on.*crop=workspace"):
        policy = load_policy(tmp_path / "sft")
    assert policy.view is None and check_fit(policy, BRIEF, {})["env_kwargs"] == {"image_size": 48}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = load_policy(tmp_path / "sft", view={"crop": "workspace"})
        assert check_fit(policy, BRIEF, {"crop": "workspace"})["env_kwargs"]["crop"] == "workspace"
    assert check_fit(told, BRIEF, {})["env_kwargs"] == {"image_size": 48, "camera": "corner2", "crop": "workspace"}


def test_an_algorithm_of_theirs_that_was_loaded_does_not_know_its_view(tmp_path: Path) -> None:
    shown = {"image_size": 32, "crop": "workspace", "action_chunk": 5}
    made = functools.partial(gym.make, "mw_envs:MetaWorldMT1-v0", task="reach-v3", **shown)
    kwargs: dict[str, Any] = {"policy_kwargs": {"model_kwargs": TINY}, "n_steps": 2, "batch_size": 2, "device": "cpu"}
    PPO("VLAPolicy", DummyVecEnv([made]), **kwargs).save(tmp_path / "theirs")
    loaded = PPO.load(tmp_path / "theirs", device="cpu")
    with pytest.warns(UserWarning, match="does not say which view it was trained on; camera=corner2 with crop=full"):
        check_fit(loaded, BRIEF, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit(loaded, BRIEF, {"crop": "workspace"})
        check_fit(PPO.load(tmp_path / "theirs", DummyVecEnv([made]), device="cpu"), BRIEF, None)


def test_videos_show_every_step(tmp_path: Path) -> None:
    """Two episodes of one process are filmed at the same time."""
    films = VideoOptions(tmp_path, per_task=1, fps=40)
    (tmp_path / f"coffee-button-v3_seed{TRIAL_SEED}_goal00_failure.mp4").touch()  # of an earlier evaluation
    result = evaluate(
        ExpertPolicy(),
        tasks=EASY,
        trials_per_task=2,
        protocol=EXPERT_PROTOCOL,
        vec_env=expert_env(2),
        videos=films,
        progress=False,
    )
    names = [f"{task}_seed{TRIAL_SEED}_goal00_success.mp4" for task in EASY]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, outcome in zip(names, result.trials[::2], strict=True):
        with av.open(str(tmp_path / name)) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        # The first picture, one for each step, and the last for another three quarters of a second.
        assert len(frames) == 1 + outcome.length + 30
        assert frames[0].shape[0] > 480 and frames[0].shape[1] == 480
        by_hand = make_trial_env(EXPERT_PROTOCOL, EXPERT_ENV).env.unwrapped
        by_hand.render_mode = "rgb_array"
        observation, _ = by_hand.reset(options=outcome.trial._asdict())
        expert = ScriptedExpert(outcome.trial.task)
        for step in range(21):
            if step in (0, 20):
                drawn = by_hand.render()
                assert isinstance(drawn, np.ndarray)
                # H.264 keeps the picture within a few gray levels; another frame, or text over it, differs by far more.
                assert np.abs(frames[step][:480].astype(int) - drawn).mean() < 3
            observation, *_ = by_hand.step(expert.action(observation["privileged_state"]))
        by_hand.close()


def test_environments_without_a_trial_forget_those_of_an_evaluation_broken_off(tmp_path: Path) -> None:
    env = expert_env(2)
    options: dict[str, Any] = {"protocol": EXPERT_PROTOCOL, "vec_env": env, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            Interrupting(), tasks=EASY[:1], trials_per_task=6, videos={"directory": tmp_path, "per_task": 6}, **options
        )
    result = evaluate(ExpertPolicy(), tasks=EASY[1:], trials_per_task=1, **options)
    assert [outcome.trial for outcome in result.trials] == trials_for(EASY[1:], 1)
    assert not list(tmp_path.iterdir())
    assert env.get_attr("_running") == [False, False]
    env.close()


# Bad input and broken workers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["reach-v2"]}, "reach-v3"),
        ({"tasks": []}, "tasks is empty"),
        ({"suite": "MT11"}, "MT1"),
        ({}, "either tasks"),
        ({"tasks": EASY, "suite": "MT10"}, "either tasks"),
        ({"tasks": EASY, "trials_per_task": 0}, "trials_per_task=0"),
        ({"tasks": EASY, "protocol": "rlinf-161"}, "'rlinf-161'; did you mean 'rlinf-160'"),
        ({"tasks": EASY, "num_envs": 0}, "num_envs=0"),
        ({"tasks": EASY, "env_kwargs": {"horizon": 5}}, "must not hold 'horizon'"),
        ({"tasks": EASY, "env_kwargs": {"image_sise": 5}}, "image_sise"),
        ({"tasks": EASY, "env_kwargs": {"image_size": 0}}, "image_size=0"),
        ({"tasks": EASY, "env_kwargs": {"image_size": np.int64(16)}}, "plain numbers"),
    ],
)
def test_bad_input_is_refused_before_a_worker_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(RandomPolicy(), **options)
    assert not multiprocessing.active_children()


def test_bad_actions_are_refused(small_env: DummyVecEnv) -> None:
    options: dict[str, Any] = {"tasks": EASY, "trials_per_task": 1, "vec_env": small_env, "progress": False}
    with pytest.raises(ValueError, match=r"returned actions of shape \(1, 4\).*executes \(5, 4\)"):
        evaluate(Silent(np.zeros((1, 4))), **options)
    with pytest.raises(ValueError, match=r"environment 0 \(Trial\(task='coffee-button-v3'.*not finite.*nan"):
        evaluate(Silent(np.full((1, 5, 4), np.nan)), **options)


def test_the_next_evaluation_is_not_disturbed_by_one_broken_off(small_env: DummyVecEnv, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trials_per_task": 2, "vec_env": small_env, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Breaking("interrupt"), tasks=EASY[:1], videos={"directory": tmp_path}, **options)
    result = evaluate(RandomPolicy(), tasks=EASY[1:], **options)
    assert [outcome.trial for outcome in result.trials] == trials_for(EASY[1:], 2)
    assert not list(tmp_path.iterdir())


def test_vec_env_must_fit(small_env: DummyVecEnv) -> None:
    with pytest.raises(ValueError, match="made with protocol=rlinf-160"):
        evaluate(RandomPolicy(), tasks=EASY, protocol="rlinf-100", vec_env=small_env)
    with pytest.raises(ValueError, match="made with env_kwargs="):
        evaluate(RandomPolicy(), tasks=EASY, env_kwargs={"image_size": 32}, vec_env=small_env)
    other = DummyVecEnv([lambda: gym.make("mw_envs:MetaWorldMT10-v0")])
    with pytest.raises(ValueError, match="make_trial_vec_env"):
        evaluate(RandomPolicy(), tasks=EASY, vec_env=other)


def test_error_in_the_environment_is_told(small_env: DummyVecEnv, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"Trial\(task='coffee-button-v3'.*FileExistsError"):
        evaluate(RandomPolicy(), tasks=EASY, vec_env=small_env, videos={"directory": tmp_path / "file"}, progress=False)


class Interrupting(ExpertPolicy):
    """Ctrl-C after two decisions."""

    def predict(self, *args: Any, **kwargs: Any) -> tuple[npt.NDArray[np.float32], Any]:
        if len(self.starts) == 2:
            raise KeyboardInterrupt
        return super().predict(*args, **kwargs)


class Breaking(RandomPolicy):
    """Does something bad when so many frames have been made that a video has begun to be written."""

    def __init__(self, deed: str) -> None:
        super().__init__()
        self.deed, self.decisions = deed, 0

    def predict(
        self, observation: Observation, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[npt.NDArray[np.float32], Any]:
        self.decisions += 1
        if self.decisions == 15 and self.deed == "interrupt":
            raise KeyboardInterrupt
        if self.decisions == 15:
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGKILL)
        return super().predict(observation)


def test_dead_worker_and_interrupt_leave_no_process_and_no_file(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": EASY, "num_envs": 2, "num_workers": 1, "env_kwargs": SMALL, "progress": False}
    with pytest.raises(RuntimeError, match=r"Worker 0 \(environments 0 to 1\) died with exit code -9"):
        evaluate(Breaking("kill"), videos={"directory": tmp_path}, start_method="fork", **options)
    assert not multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt):
        evaluate(Breaking("interrupt"), videos={"directory": tmp_path}, **options)
    assert not multiprocessing.active_children()
    assert not list(tmp_path.iterdir())


# Results


def result_of(successes: dict[str, list[int]], **changes: Any) -> EvaluationResult:
    """A result made up from the successes of each task."""
    outcomes = tuple(
        TrialResult(Trial(task, 3, goal), bool(success), 50 if success else None, 50 if success else 160, bool(success))
        for task, values in successes.items()
        for goal, success in enumerate(values)
    )
    result = EvaluationResult(PROTOCOLS["rlinf-160"], outcomes, {"mujoco": "3.3.0"}, {"image_size": 96})
    return dataclasses.replace(result, **changes)


def mt50_with(counts: dict[str, int]) -> EvaluationResult:
    """Ten trials a task, with so many successes in each difficulty group, spread evenly over its tasks."""
    successes = {}
    for group, count in counts.items():
        tasks = [name for name, task in TASKS.items() if task.difficulty == group]
        for number, task in enumerate(tasks):
            won = count // len(tasks) + (number < count % len(tasks))
            successes[task] = [1] * won + [0] * (10 - won)
    return result_of(successes)


@pytest.mark.parametrize(
    ("counts", "average", "over_trials", "half_width"),
    [  # published rows: SmolVLA, pi0, pi0 + PPO, with the half widths of binomial groups
        ((244, 57, 42, 32), 68.2, 75.0, 5.1),
        ((218, 57, 32, 10), 50.8, 63.4, 5.0),
        ((258, 82, 37, 42), 78.1, 83.8, 4.5),
    ],
)
def test_average_is_the_published_one(
    counts: tuple[int, ...], average: float, over_trials: float, half_width: float
) -> None:
    result = mt50_with(dict(zip(("easy", "medium", "hard", "very_hard"), counts, strict=True)))
    assert 100 * result.average().value == pytest.approx(average, abs=0.06)
    assert 100 * result.mean_over_tasks().value == pytest.approx(over_trials, abs=0.06)
    low, high = result.average().low, result.average().high
    assert 100 * (high - low) / 2 == pytest.approx(half_width, rel=0.12)
    assert Counter(task.trials for task in result.per_task().values()) == {10: 50}
    assert list(result.per_difficulty()) == ["easy", "medium", "hard", "very_hard"]


def test_missing_groups_are_left_out_and_named() -> None:
    result = result_of({"reach-v3": [1, 0], "window-open-v3": [1, 1], "pick-place-v3": [0, 0]})
    assert result.groups == {"easy": ("reach-v3", "window-open-v3"), "hard": ("pick-place-v3",)}
    assert result.average().value == pytest.approx((0.75 + 0.0) / 2)
    assert result.mean_over_tasks().value == pytest.approx(0.5)
    assert "Avg leaves out the groups without a task here: medium, very hard." in result.to_markdown()
    assert "leaves out" not in mt50_with({"easy": 1, "medium": 1, "hard": 1, "very_hard": 1}).to_markdown()


def test_json_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env_kwargs = make_trial_env(PROTOCOLS["rlinf-160"], {"crop": (0.1, 0.2, 0.5, 0.5)}).settings["env_kwargs"]
    successes = {"reach-v3": [1, 0, 1], "pick-place-v3": [0, 0, 1]}
    result = result_of(successes, env_kwargs=env_kwargs, deterministic=False)
    assert "sampled actions, crop=[0.1, 0.2, 0.5, 0.5]" in result.to_markdown()
    result.to_json(tmp_path / "deeper" / "result.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EvaluationResult.from_json("~/deeper/result.json") == result
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["result.json"]
    stored = json.loads((tmp_path / "deeper" / "result.json").read_text())
    assert stored["average"]["value"] == pytest.approx(0.5) and stored["average"]["groups"] == ["easy", "hard"]
    assert stored["per_task"]["reach-v3"]["successes"] == 2
    (tmp_path / "other.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match=r"other\.json is not a file of the format.*something else"):
        EvaluationResult.from_json(tmp_path / "other.json")
    for place, found in ((tmp_path, "is a folder"), (tmp_path / "nowhere.json", "does not exist")):
        with pytest.raises(FileNotFoundError, match=f"{found}; expected the JSON file that"):
            EvaluationResult.from_json(place)


def test_tables() -> None:
    result = result_of({"pick-place-v3": [0] * 10, "reach-v3": [1] * 8 + [0] * 2})
    lines = result.to_markdown().splitlines()
    assert lines[0].startswith("Protocol rlinf-160 (160 steps, chunk 5")
    assert lines[4:6] == ["| reach-v3 | 8/10 | 80.0 | 49.0 to 94.3 |", "| pick-place-v3 | 0/10 | 0.0 | 0.0 to 27.8 |"]
    printed = io.StringIO()
    result.print_table(Console(file=printed, width=100))
    for text in ("rlinf-160", "reach-v3", "8/10", "49.0 to 94.3", "Avg (mean of 2 groups)", "image_size=96", "3.3.0"):
        assert text in printed.getvalue()


def test_comparison(tmp_path: Path) -> None:
    before = result_of({"reach-v3": [0, 0, 0, 1, 1], "pick-place-v3": [0, 1, 0]})
    after = result_of({"reach-v3": [1, 1, 0, 1, 0], "pick-place-v3": [1, 1, 1]}, versions={"mujoco": "3.4.0"})
    comparison = compare(before, after, names=("SFT", "PPO"))
    assert comparison.per_task()["reach-v3"].difference.value == pytest.approx(0.2)
    assert comparison.average().difference.value == pytest.approx((0.2 + 2 / 3) / 2)
    assert comparison.restricted_to(["reach-v3"]).mean_over_tasks().gained == 2
    text = comparison.to_markdown(tmp_path / "comparison.md")
    assert text == (tmp_path / "comparison.md").read_text()
    assert "| reach-v3 | 40.0 | 60.0 | +20.0 |" in text and "| SFT % | PPO % |" in text
    assert "4 of 8 trials gained, 1 lost, McNemar p = 0.38" in text
    assert "PPO: 8 trials, image_size=96, mujoco 3.4.0." in text
    stored = json.loads(comparison.to_json())
    assert stored["per_task"]["reach-v3"]["gained"] == 2
    assert stored["mean_over_tasks"]["difference"]["value"] == pytest.approx((0.2 + 2 / 3) / 2)
    printed = io.StringIO()
    comparison.print_table(Console(file=printed, width=100))
    assert "+20.0" in printed.getvalue()


def test_comparison_needs_one_protocol_and_the_same_trials() -> None:
    result = result_of({"reach-v3": [1, 0, 1]})
    with pytest.raises(ValueError, match=r"rlinf-160.*rlinf-100"):
        compare(result, dataclasses.replace(result, protocol=PROTOCOLS["rlinf-100"]))
    with pytest.raises(ValueError, match=r"goal=2\) was run only before"):
        compare(result, result_of({"reach-v3": [1, 0]}))
    with pytest.raises(ValueError, match="'push-v3' was not evaluated"):
        result.restricted_to(["push-v3"])


# Figures


def test_figures(tmp_path: Path) -> None:
    before = result_of({"reach-v3": [0, 0, 1], "pick-place-v3": [0, 0, 0]})
    after = result_of({"reach-v3": [1, 0, 1], "pick-place-v3": [0, 0, 0]})
    before_after_bars(compare(before, after), tmp_path / "bars.png")
    rows: list[dict[str, float]] = [
        {"time/env_steps": 100.0 * step, "env/success_once": step / 10, "env/success_once/reach-v3": step / 20}
        for step in range(1, 8)
    ]
    rows.insert(2, {"actor/loss": 0.5})  # a row without success
    learning_curve(rows, tmp_path / "curve.png")
    for name in ("bars.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"needs 'time/env_steps'.*got \['actor/loss'\]"):
        learning_curve([{"actor/loss": 0.5}], tmp_path / "curve.png")


def test_frames_of_a_video_have_one_height_whatever_the_step() -> None:
    frame = np.zeros((480, 480, 3), np.uint8)
    for task in TASKS.values():
        trial = Trial(task.name, 0, 49)
        shapes = {
            annotate(frame, captions(task.instruction, trial, step, 500, reward, success), success).shape
            for step, reward, success in ((1, 0.0, False), (99, -5.0, False), (500, 1000.0, True))
        }
        *others, last = captions(task.instruction, trial, 500, 500, 1000.0, False)
        shapes.add(annotate(frame, [*others, f"{last} · failure"], False).shape)
        assert len(shapes) == 1, task
