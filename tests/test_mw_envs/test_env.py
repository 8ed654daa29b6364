"""The environment's contract: spaces, chunks, rewards, ends, trials, errors, and every kind of vector environment."""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
import pickle
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.wrappers import RecordVideo, TimeLimit
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecVideoRecorder

import mw_envs.env
import mw_envs.simulation.scene
from mw_envs import TASKS, Trial, decode_instruction, suite_tasks
from mw_envs.env import MetaWorldEnv
from mw_envs.experts import ScriptedExpert
from mw_envs.rendering import Scene, View, get_renderer
from mw_envs.simulation.scene import Simulator

# Pressing the handle takes the expert some 35 steps; held on to, the handle then leaves the success region again.
EXPERT_TASK = "handle-press-v3"
EXPERT_TRIAL = {"task": EXPERT_TASK, "goal": 3, "seed": 0}
EXPERT_HORIZON = 90


class FakeSimulator:
    """Succeeds at the scripted steps, counted from the reset; step n is worth n, and the hand is n millimeters high."""

    def __init__(self, task: str, success_at: set[int]) -> None:
        self.task = task
        self.success_at = success_at
        self.model = self.data = self  # so that the fake renderer sees the steps
        self.scene = Scene(task)
        self.steps = 0
        self.actions: list[npt.NDArray[np.float32]] = []
        self.trials: list[Trial] = []

    def observation(self) -> npt.NDArray[np.float64]:
        return np.array([0.0, 0.6, self.steps / 1000] + [1.0] * 36)

    def place(self, trial: Trial) -> npt.NDArray[np.float64]:
        self.steps = 0
        self.trials.append(trial)
        return self.observation()

    def step(
        self, action: npt.NDArray[np.float32], reward_wanted: bool = True
    ) -> tuple[npt.NDArray[np.float64], float, bool]:
        self.steps += 1
        self.actions.append(action.copy())
        reward = float(self.steps) if reward_wanted else np.nan
        return self.observation(), reward, self.steps in self.success_at


class Fakes:
    """The simulators and the renderer in place of the real ones; a picture's values are the steps since the reset."""

    def __init__(self) -> None:
        self.success_at: set[int] = set()
        self.in_use: list[FakeSimulator] = []
        self.views: list[View] = []

    def acquire(self, task: str) -> FakeSimulator:
        self.in_use.append(FakeSimulator(task, self.success_at))
        return self.in_use[-1]

    def release(self, simulator: FakeSimulator) -> None:
        self.in_use.remove(simulator)

    def render(self, model: FakeSimulator, data: FakeSimulator, view: View, scene: Scene) -> npt.NDArray[np.uint8]:
        assert scene is model.scene
        self.views.append(view)
        return np.full((view.height, view.width, 3), model.steps, dtype=np.uint8)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes()
    monkeypatch.setattr(mw_envs.env, "acquire_simulator", fakes.acquire)
    monkeypatch.setattr(mw_envs.env, "release_simulator", fakes.release)
    monkeypatch.setattr(mw_envs.env, "get_renderer", lambda kind: fakes)
    return fakes


def fake_env(**kwargs: Any) -> MetaWorldEnv:
    return MetaWorldEnv(**{"suite": "MT10", "image_size": 4, "settle_steps": 0, **kwargs})


def still(env: gym.Env) -> npt.NDArray[np.float32]:
    return np.zeros(env.action_space.shape or (), dtype=np.float32)


# Checkers, spaces and observations


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"action_chunk": 5, "image_size": 96, "crop": "workspace"},
        {"privileged_state": True, "elapsed_time": True, "reward": "dense", "image_size": 64},
        {"action_chunk": 5, "privileged_state": True, "elapsed_time": True, "reward": "difference", "image_size": 64},
        {"image_size": (48, 64), "terminate_on_success": False, "record_frames": True},
    ],
    ids=["default", "chunk", "critic", "chunk-critic", "frames"],
)
def test_both_environment_checkers_are_silent(kwargs: dict[str, Any]) -> None:
    make = functools.partial(gym.make, "MetaWorldMT10-v0", tasks=["reach-v3", "drawer-open-v3"], **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(make(render_mode="rgb_array").unwrapped)
        sb3_check_env(make(), warn=True)


def test_the_default_spaces() -> None:
    env = MetaWorldEnv("MT50")
    assert isinstance(env.observation_space, gym.spaces.Dict)
    image, state = env.observation_space["image"], env.observation_space["state"]
    assert list(env.observation_space) == ["image", "instruction", "state"]
    assert image == gym.spaces.Box(0, 255, (480, 480, 3), np.uint8)
    assert (state.shape, state.dtype) == ((4,), np.float32)
    assert env.observation_space["instruction"] == gym.spaces.Box(0, 255, (64,), np.uint8)
    assert env.action_space == gym.spaces.Box(-1, 1, (4,), np.float32)
    assert MetaWorldEnv("MT50", action_chunk=5).action_space == gym.spaces.Box(-1, 1, (5, 4), np.float32)


def test_what_is_observed() -> None:
    env = MetaWorldEnv("MT10", image_size=(24, 40), privileged_state=True, elapsed_time=True, horizon=8, settle_steps=0)
    observation, info = env.reset(options={"task": "push-v3", "goal": 4, "seed": 9})
    simulator = Simulator("push-v3")
    reference = simulator.place(Trial("push-v3", 9, 4))
    for elapsed in range(3):
        assert observation in env.observation_space
        np.testing.assert_array_equal(observation["state"], reference[:4].astype(np.float32))
        np.testing.assert_array_equal(observation["privileged_state"], reference.astype(np.float32))
        np.testing.assert_array_equal(
            observation["image"],
            get_renderer().render(simulator.model, simulator.data, View("corner2", 24, 40), simulator.scene),
        )
        assert decode_instruction(observation["instruction"]) == info["instruction"] == TASKS["push-v3"].instruction
        assert observation["elapsed_time"] == pytest.approx(elapsed / 8)
        action = np.array([1.0, -1.0, 0.5, 1.0], dtype=np.float32)
        observation, _, _, _, info = env.step(action)
        reference, _, _ = simulator.step(action)
    env.close()


def test_observations_do_not_change_afterwards(fakes: Fakes) -> None:
    env = fake_env(privileged_state=True, elapsed_time=True)
    observation, _ = env.reset(seed=0)
    copy = {key: value.copy() for key, value in observation.items()}
    env.step(still(env))
    assert all(np.array_equal(observation[key], copy[key]) for key in copy)


# Chunks

Step = tuple[dict[str, Any], float, bool, bool, dict[str, Any]]


def run(actions: npt.NDArray[np.float32], **kwargs: Any) -> list[Step]:
    """All steps of the expert's trial, the actions in chunks; the last chunk is filled up with what must not be run."""
    env = gym.make(
        "MetaWorldMT1-v0",
        task=EXPERT_TASK,
        image_size=32,
        privileged_state=True,
        elapsed_time=True,
        horizon=EXPERT_HORIZON,
        **kwargs,
    )
    env.reset(options=EXPERT_TRIAL)
    chunk = kwargs.get("action_chunk", 1)
    padded = np.concatenate([actions, np.ones((-len(actions) % chunk, 4), dtype=np.float32)])
    steps: list[Step] = []
    for action in padded.reshape(-1, *(env.action_space.shape or ())):
        observation, reward, terminated, truncated, info = env.step(action)
        steps.append((observation, float(reward), terminated, truncated, info))
        if terminated or truncated:
            break
    env.close()
    return steps


@pytest.fixture(scope="module")
def expert_actions() -> npt.NDArray[np.float32]:
    """The expert's actions up to its success."""
    env = MetaWorldEnv("MT1", task=EXPERT_TASK, image_size=32, privileged_state=True, horizon=EXPERT_HORIZON)
    expert = ScriptedExpert(EXPERT_TASK)
    observation, _ = env.reset(options=EXPERT_TRIAL)
    actions = []
    terminated = truncated = False
    while not (terminated or truncated):
        actions.append(expert.action(observation["privileged_state"]))
        observation, _, terminated, truncated, _ = env.step(actions[-1])
    env.close()
    assert terminated
    return np.stack(actions)


@pytest.mark.parametrize("reward", ["sparse", "difference", "dense"])
@pytest.mark.parametrize("chunk", [4, 5])
def test_a_chunk_is_so_many_single_steps(expert_actions: npt.NDArray[np.float32], chunk: int, reward: str) -> None:
    singles = run(expert_actions, reward=reward)
    chunks = run(expert_actions, reward=reward, action_chunk=chunk)
    assert len(singles) == len(expert_actions)
    assert len(chunks) == -(-len(expert_actions) // chunk)
    for number, (observation, total, terminated, truncated, info) in enumerate(chunks):
        group = singles[number * chunk : (number + 1) * chunk]
        last = group[-1]
        for key, value in observation.items():
            np.testing.assert_array_equal(value, last[0][key], strict=True)
        assert total == functools.reduce(lambda sum_so_far, step: sum_so_far + step[1], group, 0.0)
        assert (terminated, truncated) == last[2:4]
        assert info == {**last[4], "env_steps": len(group)}
    assert chunks[-1][2]
    assert chunks[-1][4]["success"]
    assert chunks[-1][4]["elapsed_steps"] == len(expert_actions)


def test_one_of_these_chunks_ends_inside(expert_actions: npt.NDArray[np.float32]) -> None:
    assert {len(expert_actions) % chunk for chunk in (4, 5)} != {0}


def test_a_chunk_stops_at_success_and_shows_that_moment(fakes: Fakes) -> None:
    fakes.success_at |= {8}
    env = fake_env(action_chunk=5, horizon=20)
    env.reset(seed=0)
    actions = np.linspace(-1, 1, 40, dtype=np.float32).reshape(2, 5, 4)
    observation, reward, terminated, truncated, info = env.step(actions[0])
    assert (observation["image"].max(), reward, terminated, truncated, info["env_steps"]) == (5, 0.0, False, False, 5)
    assert (info["is_success"], info["episode_return"]) == (False, 0.0)
    observation, reward, terminated, truncated, info = env.step(actions[1])
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["env_steps"], info["elapsed_steps"], info["is_success"], info["success"]) == (3, 8, True, True)
    assert info["episode_return"] == 1.0
    assert (observation["image"].min(), observation["image"].max()) == (8, 8)
    assert observation["state"][2] == np.float32(0.008)
    np.testing.assert_array_equal(fakes.in_use[0].actions, actions.reshape(-1, 4)[:8])


def test_a_chunk_stops_at_the_horizon(fakes: Fakes) -> None:
    env = fake_env(action_chunk=5, horizon=7, elapsed_time=True)
    env.reset(seed=0)
    observation, _, terminated, truncated, info = env.step(still(env))
    assert (terminated, truncated) == (False, False)
    assert observation["elapsed_time"] == pytest.approx(5 / 7)
    observation, reward, terminated, truncated, info = env.step(still(env))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert (info["env_steps"], info["elapsed_steps"], info["is_success"], info["success_once"]) == (2, 7, False, False)
    assert observation["image"].max() == 7
    assert observation["elapsed_time"] == 1


def test_success_at_the_horizon_is_no_truncation(fakes: Fakes) -> None:
    fakes.success_at |= {7}
    env = fake_env(action_chunk=7, horizon=7)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(still(env))
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)


def test_one_frame_per_decision(fakes: Fakes) -> None:
    env = fake_env(action_chunk=5, settle_steps=15)
    env.reset(seed=0)
    assert len(fakes.views) == 1
    for decision in range(3):
        env.step(still(env))
        assert len(fakes.views) == 2 + decision
    fakes.success_at |= {15 + 15 + 2}
    assert env.step(still(env))[4]["env_steps"] == 2
    assert len(fakes.views) == 5  # also where the episode ends inside the chunk


def test_settle_steps_are_not_counted(fakes: Fakes) -> None:
    fakes.success_at |= {3}  # while settling: it is nobody's success
    env = fake_env(settle_steps=6, horizon=5, elapsed_time=True)
    observation, info = env.reset(seed=0)
    assert fakes.in_use[0].steps == 6
    assert not np.any(fakes.in_use[0].actions)
    assert (info["elapsed_steps"], info["env_steps"], info["success"], info["success_once"]) == (0, 0, False, False)
    assert observation["elapsed_time"] == 0
    assert observation["image"].max() == 6
    ends = [env.step(still(env))[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]


# Rewards and ends

FLICKER = {3, 4, 7, 10}
CHANGES = [0, 0, 1, 0, -1, 0, 1, -1, 0, 1]  # of success, step by step


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize(
    ("kwargs", "by_step"),
    [
        ({"reward": "sparse"}, [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ({"reward": "difference"}, CHANGES),
        ({"reward": "difference", "reward_coef": 5.0}, [5 * change for change in CHANGES]),
        ({"reward": "dense"}, [step / 10 for step in range(1, 11)]),
    ],
)
def test_rewards_by_hand(fakes: Fakes, kwargs: dict[str, Any], by_step: list[float], chunk: int) -> None:
    fakes.success_at |= FLICKER
    env = fake_env(terminate_on_success=False, horizon=10, action_chunk=chunk, **kwargs)
    for _ in range(2):  # an episode leaves nothing to the next
        env.reset(seed=0)
        rewards = [env.step(still(env))[1] for _ in range(10 // chunk)]
        assert rewards == pytest.approx(np.reshape(by_step, (-1, chunk)).sum(axis=1).tolist(), abs=1e-12)


def test_without_an_end_at_success_the_episode_runs_on(fakes: Fakes) -> None:
    fakes.success_at |= FLICKER
    env = fake_env(terminate_on_success=False, horizon=12)
    env.reset(seed=0)
    steps = [env.step(still(env)) for _ in range(12)]
    assert [info["success"] for *_, info in steps] == [step in FLICKER for step in range(1, 13)]
    assert [info["success_once"] for *_, info in steps] == [step >= 3 for step in range(1, 13)]
    assert not any(terminated for _, _, terminated, _, _ in steps)
    assert [truncated for *_, truncated, _ in steps] == [False] * 11 + [True]
    # Success means ever, though it has passed.
    assert [info["is_success"] for *_, info in steps] == [step >= 3 for step in range(1, 13)]


def test_a_limit_from_outside_cuts_episodes_that_tell_all_the_same(fakes: Fakes) -> None:
    fakes.success_at |= {4}
    env = TimeLimit(fake_env(terminate_on_success=False, action_chunk=2), 3)
    _, info = env.reset(seed=0)
    assert (info["is_success"], info["episode_return"], info["elapsed_steps"]) == (False, 0.0, 0)
    steps = [env.step(still(env)) for _ in range(3)]
    assert [truncated for *_, truncated, _ in steps] == [False, False, True]
    told = [(info["is_success"], info["episode_return"], info["elapsed_steps"]) for *_, info in steps]
    assert told == [(False, 0.0, 2), (True, 1.0, 4), (True, 1.0, 6)]
    assert {frozenset(info) for *_, info in steps} == {frozenset(env.reset()[1])}  # all keys at every time


def test_the_real_simulator_flickers_too(expert_actions: npt.NDArray[np.float32]) -> None:
    upwards = np.tile(np.array([0, 0, 1, 0], dtype=np.float32), (EXPERT_HORIZON - len(expert_actions), 1))
    actions = np.concatenate([expert_actions, upwards])
    steps = run(actions, terminate_on_success=False, reward="difference")
    assert len(steps) == EXPERT_HORIZON
    successes = [info["success"] for *_, info in steps]
    assert successes.index(True) == len(expert_actions) - 1
    assert [reward for _, reward, *_ in steps] == np.diff([0, *successes]).tolist()
    assert steps[-1][4]["is_success"]


def test_stepping_needs_a_reset(fakes: Fakes) -> None:
    fakes.success_at |= {2}
    env = fake_env()
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\)"):
        env.step(still(env))
    env.reset(seed=0)
    env.step(still(env))
    assert env.step(still(env))[2]
    for _ in range(2):
        with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\)"):
            env.step(still(env))
    env.reset()
    env.step(still(env))
    env.close()
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\)"):
        env.step(still(env))


# Trials


def trials_of(env: MetaWorldEnv, resets: int, seed: int) -> list[Trial]:
    infos = [env.reset(seed=seed)[1]] + [env.reset()[1] for _ in range(resets - 1)]
    return [Trial(info["task"], info["trial_seed"], info["goal"]) for info in infos]


def test_the_same_seed_gives_the_same_trials(fakes: Fakes) -> None:
    first, again, other = (trials_of(fake_env(), 30, seed) for seed in (5, 5, 6))
    assert first == again
    assert [trial[0::2] for trial in first] != [trial[0::2] for trial in other]
    assert len({trial.goal for trial in first}) > 10
    assert all(trial.seed == 5 and trial.task in suite_tasks("MT10") and 0 <= trial.goal < 50 for trial in first)


def test_without_a_seed_every_environment_has_its_own(fakes: Fakes) -> None:
    seeds = {fake_env().reset()[1]["trial_seed"] for _ in range(5)}
    assert len(seeds) == 5


def test_options_pin_the_trial(fakes: Fakes) -> None:
    env = fake_env()
    env.reset(seed=1)
    _, info = env.reset(seed=3, options={"task": "push-v3", "goal": 7})
    assert fakes.in_use[0].trials[-1] == ("push-v3", 3, 7)
    assert (info["task"], info["trial_seed"], info["goal"]) == ("push-v3", 3, 7)
    env.reset(seed=4, options={"task": "reach-v3", "goal": np.int64(49), "seed": 2**32 - 1})
    assert fakes.in_use[0].trials[-1] == ("reach-v3", 2**32 - 1, 49)
    # The option is for this reset alone; what a reset without one uses is the last seed of the generator.
    assert env.reset()[1]["trial_seed"] == 4
    goals = {env.reset(options={"task": "push-v3"})[1]["goal"] for _ in range(20)}
    assert len(goals) > 5
    tasks = {env.reset(options={"goal": 0})[1]["task"] for _ in range(20)}
    assert len(tasks) > 3


def test_the_length_of_instructions(fakes: Fakes) -> None:
    env = fake_env(instruction_bytes=100)
    observation, info = env.reset(seed=0)
    assert env.observation_space["instruction"].shape == observation["instruction"].shape == (100,)
    assert env.observation_space.contains(observation)
    assert decode_instruction(observation["instruction"]) == info["instruction"]
    with pytest.raises(ValueError, match=r"task drawer-open-v3 must be 1 to 8 .*: 'Open a drawer'; .*=13 or more"):
        fake_env(tasks=["drawer-open-v3"], instruction_bytes=8)
    with pytest.raises(ValueError, match="instruction_bytes=0; expected a whole number of at least 1"):
        fake_env(instruction_bytes=0)


def test_a_group_of_pinned_trials_is_one_trial() -> None:
    options = {"task": "push-v3", "goal": 11, "seed": 2}
    envs = [MetaWorldEnv("MT10", image_size=16, privileged_state=True) for _ in range(2)]
    for env, seed in zip(envs, (0, 1), strict=True):
        env.reset(seed=seed)  # each worker's own generator
    first, second = (env.reset(options=options)[0] for env in envs)
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])
    for env in envs:
        env.close()


def test_weights_change_how_often_a_task_is_drawn(fakes: Fakes) -> None:
    names = ["reach-v3", "push-v3", "pick-place-v3", "door-open-v3"]
    env = fake_env(tasks=names, task_weights={"push-v3": 3.0, "door-open-v3": 0.0})
    expected = np.array([1.0, 3.0, 1.0, 0.0]) / 5
    counts = Counter(trial.task for trial in trials_of(env, 2000, seed=0))
    assert counts["door-open-v3"] == 0
    observed = np.array([counts[name] for name in names[:3]])
    wanted = 2000 * expected[:3]
    # Chi square with 2 degrees of freedom exceeds 13.8 once in a thousand; the seed is fixed.
    assert float(((observed - wanted) ** 2 / wanted).sum()) < 13.8
    uniform = Counter(trial.task for trial in trials_of(fake_env(tasks=names), 2000, seed=0))
    observed = np.array([uniform[name] for name in names])
    assert float(((observed - 500) ** 2 / 500).sum()) < 16.3


def test_weights_change_at_the_next_reset(fakes: Fakes) -> None:
    env = fake_env(tasks=["reach-v3", "push-v3"], task_weights={"push-v3": 0})
    assert env.reset(seed=0)[1]["task"] == "reach-v3"
    env.set_task_weights({"reach-v3": 0})
    assert env.step(still(env))[4]["task"] == "reach-v3"
    assert {env.reset()[1]["task"] for _ in range(20)} == {"push-v3"}
    env.set_task_weights({})
    assert {env.reset()[1]["task"] for _ in range(20)} == {"push-v3", "reach-v3"}
    # A pinned task is placed whatever it weighs.
    env.set_task_weights({"reach-v3": 0})
    assert env.reset(options={"task": "reach-v3"})[1]["task"] == "reach-v3"


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_snapshot_goes_on_bit_for_bit(chunk: int) -> None:
    """Through the rest of an episode, and two more whose tasks and goals the generator draws."""
    tasks = ["push-v3", "drawer-close-v3", "door-open-v3"]  # the last two: hinges, and parts that resets move

    def make() -> gym.Env:
        options = {"tasks": tasks, "action_chunk": chunk, "horizon": 14, "image_size": 16, "settle_steps": 2}
        return gym.make("mw_envs:MetaWorldMT10-v0", privileged_state=True, elapsed_time=True, **options)

    def play(env: gym.Env, actions: list[npt.NDArray[np.float32]]) -> list[Any]:
        seen: list[Any] = []
        for action in actions:
            seen.append(env.step(action))
            if seen[-1][2] or seen[-1][3]:
                seen.append(env.reset())
        return seen

    env, generator = make(), np.random.default_rng(0)
    actions = list(generator.uniform(-1, 1, (64, *(env.action_space.shape or ()))).astype(np.float32))
    env.reset(seed=5)
    env.unwrapped.set_task_weights({"push-v3": 5.0})  # type: ignore[attr-defined]
    last = play(env, actions[:24])[-1][0]
    snapshot = json.loads(json.dumps(env.get_wrapper_attr("snapshot")()))
    assert 0 < len(snapshot["actions"]) < 14
    other = make()
    other.reset(seed=77)
    play(other, actions[:3])
    seen, info = other.reset(options={"snapshot": snapshot})
    assert data_equivalence(seen, last, exact=True) and info["env_steps"] == 0
    assert other.get_wrapper_attr("snapshot")() == snapshot
    expected = play(env, actions[24:])
    assert data_equivalence(play(other, actions[24:]), expected, exact=True)
    assert sum(len(entry) == 2 for entry in expected) >= 2
    env.close()
    other.close()


def test_a_snapshot_of_nothing_is_refused(fakes: Fakes) -> None:
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        fake_env().snapshot()


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda env: pickle.loads(pickle.dumps(env)),
    "cloudpickle": lambda env: pickle.loads(cloudpickle.dumps(env)),
}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "cloudpickle"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_copy_goes_on_as_the_environment_does(how: str, chunk: int) -> None:
    """And neither disturbs the other; the environment runs through its end, and the next task is drawn."""
    options = {"tasks": ["push-v3", "drawer-close-v3"], "horizon": 9, "image_size": 16, "settle_steps": 2}
    env = gym.make("mw_envs:MetaWorldMT10-v0", action_chunk=chunk, reward="dense", privileged_state=True, **options)
    env.reset(seed=5)
    env.unwrapped.set_task_weights({"push-v3": 3.0})  # type: ignore[attr-defined]
    actions = np.random.default_rng(0).uniform(-1, 1, (6, *(env.action_space.shape or ()))).astype(np.float32)

    def play(env: gym.Env, actions: npt.NDArray[np.float32]) -> list[Any]:
        seen: list[Any] = []
        for action in actions:
            seen.append(env.step(action))
            if seen[-1][2] or seen[-1][3]:
                seen.append(env.reset())
        return seen

    play(env, actions[:2])
    twin = COPIES[how](env)
    kept = COPIES[how](env)
    expected = play(env, np.concatenate([actions[2:]] * 3))
    assert data_equivalence(play(twin, np.concatenate([actions[2:]] * 3)), expected, exact=True)
    assert sum(len(entry) == 2 for entry in expected) >= 1
    twin.close()
    env.close()
    assert data_equivalence(play(kept, np.concatenate([actions[2:]] * 3)), expected, exact=True)
    kept.close()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_environment_that_has_no_episode(fakes: Fakes, how: str) -> None:
    fresh = COPIES[how](fake_env(action_chunk=2))
    assert len(fakes.in_use) == 0 and fresh.action_space.shape == (2, 4) and fresh.metadata["render_fps"] == 40
    with pytest.raises(gym.error.ResetNeeded):
        fresh.step(still(fresh))
    fresh.reset(seed=0)
    ended = fake_env(horizon=1)
    ended.reset(seed=0)
    ended.step(still(ended))
    with pytest.raises(gym.error.ResetNeeded, match="has ended"):
        COPIES[how](ended).step(still(ended))
    ended.close()
    closed = COPIES[how](ended)
    assert len(fakes.in_use) == 2  # fresh's, and that of the copy of the ended one
    with pytest.raises(gym.error.ResetNeeded):
        closed.step(still(closed))


def test_a_shallow_copy_has_its_own_episode(fakes: Fakes) -> None:
    env = fake_env(horizon=20)
    env.reset(seed=0)
    env.step(still(env))
    twin = copy.copy(env)
    twin.step(np.ones(4, np.float32))
    assert (len(env.snapshot()["actions"]), len(twin.snapshot()["actions"])) == (1, 2)
    assert [len(simulator.actions) for simulator in fakes.in_use] == [1, 2]


def test_a_change_of_task_hands_the_simulator_back(fakes: Fakes) -> None:
    env = fake_env()
    env.reset(options={"task": "reach-v3"})
    env.reset(options={"task": "push-v3"})
    assert [simulator.task for simulator in fakes.in_use] == ["push-v3"]
    env.close()
    env.close()
    assert fakes.in_use == []


# Pictures for people


def test_recorded_frames(fakes: Fakes) -> None:
    fakes.success_at |= {7}
    env = fake_env(action_chunk=5, record_frames=True)
    _, info = env.reset(seed=0)
    assert (info["frames"].shape, info["frames"].dtype) == ((1, 480, 480, 3), np.uint8)
    _, _, _, _, info = env.step(still(env))
    assert info["frames"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    _, _, _, _, info = env.step(still(env))
    assert info["frames"][:, 0, 0, 0].tolist() == [6, 7]
    assert info["frames"].shape == (2, 480, 480, 3)
    assert info["frame_rewards"] == [0.0, 1.0]  # success is at the seventh step


@pytest.mark.parametrize("chunk", [4, 5])
def test_recorded_frames_are_what_single_steps_show(expert_actions: npt.NDArray[np.float32], chunk: int) -> None:
    actions = expert_actions[:7]
    options: dict[str, Any] = {"task": EXPERT_TASK, "image_size": 32, "horizon": EXPERT_HORIZON}
    single = MetaWorldEnv("MT1", render_mode="rgb_array", **options)
    chunks = MetaWorldEnv("MT1", record_frames=True, action_chunk=chunk, **{**options, "horizon": len(actions)})
    for env in (single, chunks):
        env.reset(options=EXPERT_TRIAL)
    padded = np.concatenate([actions, np.ones((-len(actions) % chunk, 4), dtype=np.float32)])
    recorded = [chunks.step(part)[4] for part in padded.reshape(-1, chunk, 4)]
    assert [info["env_steps"] for info in recorded] == [chunk, len(actions) - chunk]
    frames = np.concatenate([info["frames"] for info in recorded])
    assert len(frames) == len(actions)
    for action, frame in zip(actions, frames, strict=True):
        single.step(action)
        np.testing.assert_array_equal(frame, single.render())
    single.close()
    chunks.close()


def test_render_shows_the_full_view() -> None:
    env = MetaWorldEnv("MT10", render_mode="rgb_array", image_size=32, crop="workspace", record_frames=True)
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\)"):
        env.render()
    _, info = env.reset(seed=0, options={"task": "reach-v3"})
    picture = env.render()
    assert picture is not None
    assert (picture.shape, picture.dtype) == ((480, 480, 3), np.uint8)
    np.testing.assert_array_equal(picture, info["frames"][0])
    default, _ = MetaWorldEnv("MT10").reset(seed=0, options={"task": "reach-v3", "goal": info["goal"]})
    np.testing.assert_array_equal(picture, default["image"])
    env.close()


@pytest.mark.parametrize(("chunk", "rate"), [(1, 80), (5, 16), (3, 80 / 3)])
def test_videos_of_others_play_at_real_speed(
    fakes: Fakes, chunk: int, rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They ask for the library that would write the file.
    monkeypatch.setitem(sys.modules, "moviepy", types.ModuleType("moviepy"))
    clips = types.SimpleNamespace(ImageSequenceClip=None)
    monkeypatch.setitem(sys.modules, "moviepy.video.io.ImageSequenceClip", clips)

    def make() -> gym.Env:
        return TimeLimit(fake_env(action_chunk=chunk, render_mode="rgb_array"), 4)

    assert RecordVideo(make(), str(tmp_path)).frames_per_sec == pytest.approx(rate)
    recorder = VecVideoRecorder(DummyVecEnv([make]), str(tmp_path), lambda _: False)
    assert recorder.frames_per_sec == pytest.approx(rate)
    assert MetaWorldEnv.metadata["render_fps"] == 80


def test_render_without_a_mode_says_so(fakes: Fakes) -> None:
    env = fake_env()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suite": "MT5"}, r"suite 'MT5'; did you mean 'MT50'"),
        ({"suite": "ML10", "split": "val"}, "ML10 has no split 'val'; expected one of train, test"),
        ({"suite": "MT50", "split": "test"}, "MT50 has no split 'test'"),
        ({"suite": "MT1"}, 'MetaWorldMT1-v0", task="reach-v3"'),
        ({"suite": "MT1", "task": "reach-v2"}, "'reach-v2'; did you mean 'reach-v3'"),
        ({"suite": "MT1", "task": "reach-v3", "tasks": ["reach-v3"]}, "neither tasks nor split"),
        ({"task": "reach-v3"}, r"task='reach-v3' belongs to MetaWorldMT1-v0; for MT10 use tasks=\['reach-v3'\]"),
        ({"tasks": ["hammer-v3"]}, "'hammer-v3' is not in the train split of MT10"),
        ({"tasks": []}, "tasks is empty"),
        ({"task_weights": {"push-v2": 1}}, "task_weights names 'push-v2'; did you mean 'push-v3'"),
        ({"task_weights": {"push-v3": -1}}, r"not negative and not all zero; got \{'push-v3': -1\}"),
        ({"task_weights": {"push-v3": float("nan")}}, "must be finite"),
        ({"task_weights": dict.fromkeys(suite_tasks("MT10"), 0)}, "not all zero"),
        ({"action_chunk": 0}, "action_chunk=0; expected a whole number of at least 1"),
        ({"action_chunk": 2.5}, r"action_chunk=2\.5; expected a whole number"),
        ({"horizon": 0}, "horizon=0; expected a whole number of at least 1"),
        ({"horizon": float("inf")}, "horizon=inf; expected a whole number"),
        ({"horizon": None}, "horizon=None; expected a whole number"),
        ({"settle_steps": -1}, "settle_steps=-1; expected a whole number of at least 0"),
        ({"image_size": 0}, "image_size=0; expected a whole number of at least 1"),
        ({"image_size": (64, 0)}, "image_size=0; expected"),
        ({"image_size": (64, 64, 3)}, r"image_size=\(64, 64, 3\); expected one number or \(height, width\)"),
        ({"image_size": "96"}, "image_size='96'; expected a whole number"),
        ({"image_size": True}, "image_size=True; expected a whole number"),
        ({"camera": "corner5"}, "camera 'corner5'; did you mean 'corner"),
        ({"crop": "workplace"}, "crop 'workplace'; did you mean 'workspace'"),
        ({"crop": (0, 0, 2, 1)}, r"crop=\(0, 0, 2, 1\); expected \(top, left, height, width\)"),
        ({"reward": "spares"}, "reward 'spares'; did you mean 'sparse'"),
        ({"reward_coef": float("nan")}, "reward_coef=nan; expected a finite number"),
        ({"reward_coef": "five"}, "reward_coef='five'; expected a finite number"),
        ({"terminate_on_success": "false"}, "terminate_on_success='false'; expected True or False"),
        ({"privileged_state": 1}, "privileged_state=1; expected True or False"),
        ({"elapsed_time": "yes"}, "elapsed_time='yes'; expected True or False"),
        ({"record_frames": None}, "record_frames=None; expected True or False"),
        ({"renderer": "elg"}, "renderer 'elg'; did you mean 'egl'"),
        ({"render_mode": "human"}, "render_mode='human'; expected None or 'rgb_array'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaWorldEnv(**{"suite": "MT10", **kwargs})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goals": 3}, "reset option 'goals'; did you mean 'goal'"),
        ({"task": "reach-v2"}, "'reach-v2'; did you mean 'reach-v3'"),
        ({"task": "hammer-v3"}, "Task 'hammer-v3' is not in this environment"),
        ({"goal": 50}, "goal=50; expected a whole number from 0 to 49"),
        ({"goal": -1}, "goal=-1; expected"),
        ({"goal": 1.5}, r"goal=1\.5; expected"),
        ({"goal": float("nan")}, "goal=nan; expected"),
        ({"goal": "3"}, "goal='3'; expected"),
        ({"goal": True}, "goal=True; expected"),
        ({"seed": -1}, "seed=-1; expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296; expected"),
        ({"snapshot": {}}, r"'snapshot' is not what snapshot\(\) of such an environment gave: 'trial'"),
        ({"snapshot": 3}, "'snapshot' is not what"),
        ({"snapshot": {}, "goal": 3}, r"'snapshot' goes alone; got also \['goal'\]"),
        (
            {"snapshot": {"trial": ["hammer-v3", 0, 0], "task_probabilities": [1.0]}},
            "is of other tasks than reach-v3, push-v3",
        ),
    ],
)
def test_reset_options_that_make_no_sense_are_refused(fakes: Fakes, options: dict[str, Any], message: str) -> None:
    env = fake_env()
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options=options)
    env.reset()  # and nothing is left of them


def test_a_seed_out_of_range_is_refused_and_forgotten(fakes: Fakes) -> None:
    env = fake_env()
    with pytest.raises(ValueError, match="seed=4294967296; expected a whole number from 0 to 4294967295"):
        env.reset(seed=2**32)
    env.reset()


@pytest.mark.parametrize(
    ("chunk", "action", "message"),
    [
        (1, np.zeros(3), r"shape \(3,\); expected \(4,\) \(action_chunk=1\)"),
        (1, np.zeros((1, 4)), r"shape \(1, 4\); expected \(4,\)"),
        (5, np.zeros((4, 4)), r"shape \(4, 4\); expected \(5, 4\) \(action_chunk=5\)"),
        (5, np.zeros(20), r"shape \(20,\); expected \(5, 4\)"),
        (1, np.array([0, np.nan, 0, 0]), r"not finite: \[0.0, nan, 0.0, 0.0\]"),
        (5, np.full((5, 4), np.inf), "not finite"),
    ],
)
def test_actions_that_make_no_sense_are_refused(
    fakes: Fakes, chunk: int, action: npt.NDArray[np.float64], message: str
) -> None:
    env = fake_env(action_chunk=chunk)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action.astype(np.float32))
    assert fakes.in_use[0].steps == 0  # not even the chunk's sound part was run
    env.step(still(env))


def test_experts() -> None:
    with pytest.raises(ValueError, match="'reach-v2'; did you mean 'reach-v3'"):
        ScriptedExpert("reach-v2")
    observation = Simulator("door-open-v3").place(Trial("door-open-v3", 0, 0))
    action = ScriptedExpert("door-open-v3").action(observation.astype(np.float32))
    assert (action.shape, action.dtype) == ((4,), np.float32)
    assert np.abs(action).max() <= 1
    raw = np.asarray(ScriptedExpert("door-open-v3")._policy.get_action(observation))
    assert np.abs(raw).max() > 1  # so the clipping has something to do
    np.testing.assert_allclose(action, np.clip(raw, -1, 1), atol=1e-5)  # the observation above was rounded


# Vector environments

VECTOR_KWARGS: dict[str, Any] = {
    "tasks": ["reach-v3", "drawer-open-v3"],
    "image_size": 32,
    "crop": "workspace",
    "action_chunk": 2,
    "horizon": 6,
    "privileged_state": True,
    "reward": "dense",  # one that is not 0 at once
}
PINNED = [{"task": "reach-v3", "goal": 7, "seed": 5}, {"task": "drawer-open-v3", "goal": 8, "seed": 5}]
VECTOR_ACTIONS = np.random.default_rng(0).uniform(-1, 1, (4, 2, 2, 4)).astype(np.float32)


def makers() -> list[Callable[[], gym.Env]]:
    return [functools.partial(gym.make, "mw_envs:MetaWorldMT10-v0", **VECTOR_KWARGS)] * 2


def sb3_rollout(envs: VecEnv) -> list[Any]:
    """Two episodes' parts of two environments: pinned trials, an end, the automatic reset, a step after it."""
    try:
        envs.seed(3)
        envs.set_options(PINNED)  # type: ignore[arg-type]
        record: list[Any] = [envs.reset(), list(envs.reset_infos)]
        for actions in VECTOR_ACTIONS:
            observation, rewards, dones, infos = envs.step(actions)
            record += [observation, rewards.astype(np.float32), dones, infos]  # DummyVecEnv's rewards are float32
        record.append(list(envs.reset_infos))
        return record
    finally:
        envs.close()


def assert_equal(a: Any, b: Any) -> None:
    """Equality of nested records of arrays, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    else:
        np.testing.assert_array_equal(a, b, strict=isinstance(a, np.ndarray))


@pytest.fixture(scope="module")
def in_this_process() -> list[Any]:
    """What DummyVecEnv gives; from here on this process has rendered."""
    return sb3_rollout(DummyVecEnv(makers()))


def test_dummy_vec_env(in_this_process: list[Any]) -> None:
    first, infos = in_this_process[:2]
    assert [(info["task"], info["goal"], info["trial_seed"]) for info in infos] == [
        (pinned["task"], pinned["goal"], pinned["seed"]) for pinned in PINNED
    ]
    assert first["image"].shape == (2, 32, 32, 3)
    assert all((rewards > 0).all() for rewards in in_this_process[3:-1:4])
    dones, infos = in_this_process[2 + 2 * 4 + 2], in_this_process[2 + 2 * 4 + 3]
    assert dones.tolist() == [True, True]
    assert all(info["TimeLimit.truncated"] and info["elapsed_steps"] == 6 for info in infos)
    assert all(not info["is_success"] for info in infos)
    # A single environment's own last observation is what SB3 hands on as the terminal one.
    env = gym.make("MetaWorldMT10-v0", **VECTOR_KWARGS)
    env.reset(options=PINNED[1])
    for actions in VECTOR_ACTIONS[:3]:
        observation, *_ = env.step(actions[1])
    assert_equal(infos[1]["terminal_observation"], observation)
    env.close()


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_subproc_vec_env(in_this_process: list[Any], start_method: str) -> None:
    # Under fork the workers come from a process with an OpenGL context of its own, which they must not use.
    assert_equal(sb3_rollout(SubprocVecEnv(makers(), start_method=start_method)), in_this_process)


@pytest.mark.parametrize("start_method", ["no process", "fork", "forkserver", "spawn"])
def test_gymnasium_vector_envs(in_this_process: list[Any], start_method: str) -> None:
    options: dict[str, Any] = {"vectorization_mode": "sync"}
    if start_method != "no process":
        options = {"vectorization_mode": "async", "vector_kwargs": {"context": start_method}}
    envs = gym.make_vec("mw_envs:MetaWorldMT10-v0", num_envs=2, **options, **VECTOR_KWARGS)
    try:
        envs.reset(seed=3)
        observation, infos = envs.reset(options=PINNED[0])
        assert infos["task"].tolist() == ["reach-v3"] * 2
        for key, value in in_this_process[0].items():
            np.testing.assert_array_equal(observation[key], [value[0]] * 2)  # one set of options for both
        for step, actions in enumerate(VECTOR_ACTIONS[:3]):
            observation, rewards, terminated, truncated, infos = envs.step(actions[[0, 0]])
            assert rewards.astype(np.float32).tolist() == [in_this_process[2 + 4 * step + 1][0]] * 2
            assert infos["env_steps"].tolist() == [2, 2]
        terminal = in_this_process[2 + 2 * 4 + 3][0]["terminal_observation"]
        for key, value in terminal.items():
            np.testing.assert_array_equal(observation[key], [value] * 2)
        assert (terminated.tolist(), truncated.tolist()) == ([False, False], [True, True])
        observation, _, terminated, truncated, infos = envs.step(VECTOR_ACTIONS[3])  # Gymnasium's own reset
        assert infos["elapsed_steps"].tolist() == [0, 0]
    finally:
        envs.close()


def play_in_thread(task: str) -> list[dict[str, npt.NDArray[Any]]]:
    """Two episodes of an environment that the thread makes for itself."""
    env = gym.make("mw_envs:MetaWorldMT1-v0", task=task, image_size=48, horizon=4, privileged_state=True)
    seen = []
    for seed in range(2):
        seen.append(env.reset(seed=seed)[0])
        seen += [env.step(np.full(4, 0.5, np.float32))[0] for _ in range(4)]
    env.close()
    return seen


@pytest.mark.parametrize("first", ["alone", "together"])
def test_threads_with_an_environment_each(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Simulators, their goals and the renderer are the process's; here it has none of them yet."""
    for name in ("_idle", "_goal_tables"):
        monkeypatch.setattr(f"mw_envs.simulation.scene.{name}", type(getattr(mw_envs.simulation.scene, name))())
    monkeypatch.setattr("mw_envs.rendering.choice._renderers", {})
    tasks = ["reach-v3", "drawer-open-v3", "push-v3", "reach-v3"]
    played: dict[str, Any] = {}
    for how in (first, "together" if first == "alone" else "alone"):
        if how == "alone":
            played[how] = list(map(play_in_thread, tasks))
        else:
            with ThreadPoolExecutor(len(tasks)) as pool:
                played[how] = list(pool.map(play_in_thread, tasks))
    assert data_equivalence(played["together"], played["alone"], exact=True)


def test_task_weights_through_a_vector_environment(fakes: Fakes) -> None:
    envs = DummyVecEnv(
        [functools.partial(gym.make, "MetaWorldMT10-v0", image_size=4, tasks=["reach-v3", "push-v3"])] * 2
    )
    envs.env_method("set_task_weights", {"reach-v3": 0.0})
    for _ in range(5):
        envs.reset()
        assert [info["task"] for info in envs.reset_infos] == ["push-v3"] * 2
    envs.close()


EIGHT = [
    "reach-v3",
    "push-v3",
    "door-open-v3",
    "drawer-open-v3",
    "button-press-v3",
    "hammer-v3",
    "soccer-v3",
    "sweep-v3",
]


def views_of(*tasks: str) -> list[list[npt.NDArray[np.uint8]]]:
    """Pictures of three moments in each task, the environments taking turns."""
    kwargs: dict[str, Any] = {"image_size": 48, "crop": "workspace", "action_chunk": 5, "settle_steps": 0}
    envs = [MetaWorldEnv("MT50", **kwargs) for _ in tasks]
    pictures = [
        [env.reset(options={"task": task, "goal": 1, "seed": 0})[0]["image"]]
        for env, task in zip(envs, tasks, strict=True)
    ]
    for _ in range(2):
        for env, seen in zip(envs, pictures, strict=True):
            seen.append(env.step(np.full((5, 4), 0.7, dtype=np.float32))[0]["image"])
    for env in envs:
        env.close()
    return pictures


@pytest.fixture
def one_task_a_process() -> Iterator[Callable[[], Any]]:
    """Opens a pool whose processes draw with a renderer of their own, and with the simulators that are idle here."""
    with ExitStack() as stack:

        def opened() -> Any:
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1))
            stack.callback(pool.join)
            stack.callback(pool.close)
            return pool

        yield opened


def test_many_environments_in_a_process_do_not_disturb_each_other(one_task_a_process: Callable[[], Any]) -> None:
    together = views_of(*EIGHT)
    alone = [pictures for (pictures,) in one_task_a_process().map(views_of, EIGHT, chunksize=1)]
    assert_equal(together, alone)
    assert len({pictures[0].tobytes() for pictures in together}) == 8
    assert all(not np.array_equal(pictures[0], pictures[-1]) for pictures in together)
