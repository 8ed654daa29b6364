"""The Gymnasium vector environment does what Gymnasium's own do, in worker processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

import mw_envs
from mw_envs.vector import SharedMemoryVectorEnv

ROOT = Path(__file__).parents[3]
SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-10, 10, (2, 3), np.float64),
    "discrete": spaces.Discrete(1000),
    "dict": spaces.Dict({"z": spaces.Box(0, 255, (4,), np.uint8), "a": spaces.Box(-1, 1, (2,), np.float32)}),
    "tuple": spaces.Tuple((spaces.Box(-1, 1, (2,), np.float32), spaces.MultiBinary(3))),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "discrete": spaces.Discrete(5),
    "multi": spaces.MultiDiscrete([3, 4]),
}
SMALL: dict[str, Any] = {"tasks": ["reach-v3", "push-v3"], "image_size": 32, "settle_steps": 1, "horizon": 4}


class Toy(gym.Env[Any, Any]):
    """Random observations; episodes of two to five steps; infos of all kinds, some now and then."""

    def __init__(self, kind: str = "dict", actions: str = "box", render_mode: str | None = None) -> None:
        self.observation_space, self.action_space = SPACES[kind], ACTIONS[actions]
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
        self.render_mode = render_mode
        self.color = 7

    def _observation(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps_left = int(self.np_random.integers(2, 6))
        return self._observation(), {"seed": seed, "options": options, "length": self.steps_left}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps_left -= 1
        over = self.steps_left == 0
        terminated = over and bool(self.np_random.integers(2))
        info: dict[str, Any] = {"action": np.array(action), "nested": {"left": self.steps_left}, "word": "x"}
        if self.steps_left % 2:
            info["odd"] = float(self.steps_left)
        return self._observation(), float(np.sum(action)) / 3, terminated, over and not terminated, info

    def render(self) -> npt.NDArray[np.uint8]:  # type: ignore[override]
        return np.full((4, 4, 3), self.color, np.uint8)

    def fail(self, message: str) -> None:
        raise FileNotFoundError(message)


def toys(count: int, *args: Any, **kwargs: Any) -> list[Callable[[], gym.Env[Any, Any]]]:
    return [functools.partial(Toy, *args, **kwargs)] * count


@pytest.fixture
def five() -> Iterator[SharedMemoryVectorEnv]:
    env = SharedMemoryVectorEnv(toys(5, render_mode="rgb_array"), start_method="fork", num_workers=2)
    yield env
    env.close()


def assert_same_course(env: VectorEnv, sync: VectorEnv, steps: int) -> int:
    """Reset and step both alike and compare everything they give; the number of episodes that ended."""
    for one, other in ((env.observation_space, sync.observation_space), (env.action_space, sync.action_space)):
        assert one == other
    assert env.single_observation_space == sync.single_observation_space
    assert env.metadata == sync.metadata and env.num_envs == sync.num_envs
    mode = env.metadata["autoreset_mode"]
    seeds = [11 + 3 * i for i in range(env.num_envs)]
    assert data_equivalence(env.reset(seed=seeds), sync.reset(seed=seeds), exact=True)  # type: ignore[arg-type]
    assert env.np_random_seed == sync.np_random_seed == tuple(seeds)
    assert data_equivalence(env.reset(seed=5, options={"goal": 3}), sync.reset(seed=5, options={"goal": 3}), exact=True)
    env.action_space.seed(0)
    ended = 0
    for _ in range(steps):
        actions = env.action_space.sample()
        stepped, expected = env.step(actions), sync.step(actions)
        assert data_equivalence(stepped, expected, exact=True)
        assert stepped[0] in env.observation_space
        assert [array.dtype for array in stepped[1:4]] == [np.float64, bool, bool]
        over = stepped[2] | stepped[3]
        ended += int(over.sum())
        if mode is AutoresetMode.DISABLED and over.any():
            masked = [{"reset_mask": over.copy()}, {"reset_mask": over.copy()}]
            assert data_equivalence(env.reset(options=masked[0]), sync.reset(options=masked[1]), exact=True)
        assert ("final_obs" in stepped[4]) == (mode is AutoresetMode.SAME_STEP and bool(over.any()))
        if "final_obs" in stepped[4]:
            assert (stepped[4]["_final_obs"] == over).all() and (stepped[4]["_final_info"] == over).all()
    return ended


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    ("kind", "actions", "workers"),
    [("dict", "box", 2), ("box", "discrete", 1), ("tuple", "multi", 5), ("discrete", "box", 3)],
)
def test_equals_gymnasiums_sync_vector_env(mode: AutoresetMode, kind: str, actions: str, workers: int) -> None:
    sync = SyncVectorEnv(toys(5, kind, actions), autoreset_mode=mode)
    env = SharedMemoryVectorEnv(
        toys(5, kind, actions), autoreset_mode=mode.value, num_workers=workers, start_method="fork"
    )
    assert assert_same_course(env, sync, 12) > 4
    env.close()
    env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_make_vec_gives_the_trajectories_of_sync_in_metaworld(mode: AutoresetMode) -> None:
    sync = gym.make_vec(
        "MetaWorldMT50-v0", 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **SMALL
    )
    env = gym.make_vec(
        "mw_envs:MetaWorldMT50-v0",
        num_envs=3,
        vectorization_mode="vector_entry_point",
        autoreset_mode=mode,
        num_workers=2,
        **SMALL,
    )
    try:
        assert isinstance(env, SharedMemoryVectorEnv)
        assert env.spec is not None and env.spec.id == "MetaWorldMT50-v0"
        assert assert_same_course(env, sync, 6) >= 3
        sync.set_attr("horizon", 9)
        env.set_attr("horizon", 9)
        assert env.get_attr("horizon") == sync.get_attr("horizon") == (9, 9, 9)
    finally:
        env.close()
        sync.close()


def test_make_vec_takes_it_by_itself_and_passes_arguments_on() -> None:
    env = gym.make_vec(
        "MetaWorldMT1-v0", 2, task="push-v3", image_size=24, action_chunk=5, num_workers=1, start_method="fork"
    )
    assert isinstance(env, SharedMemoryVectorEnv) and env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.action_space.shape == (2, 5, 4)
    observations, infos = env.reset(options={"task": "push-v3", "goal": 4})
    assert observations["image"].shape == (2, 24, 24, 3)
    assert infos["goal"].tolist() == [4, 4] and infos["_goal"].all() and list(infos["task"]) == ["push-v3"] * 2
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"autoreset_mode": "never"}, "autoreset_mode='never'; expected one of NextStep, SameStep, Disabled"),
        ({"num_workers": 0}, "num_workers=0; expected at least 1"),
        ({"crop": "nowhere"}, "nowhere"),
        ({"tasks": []}, "tasks is empty"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make_vec("MetaWorldMT50-v0", 2, **arguments)
    with pytest.raises(ValueError, match="env_fns is empty"):
        gym.make_vec("MetaWorldMT50-v0", 0)


def test_wrappers_of_gymnasium(five: SharedMemoryVectorEnv) -> None:
    env = DictInfoToList(RecordEpisodeStatistics(five))
    sync = DictInfoToList(RecordEpisodeStatistics(SyncVectorEnv(toys(5, render_mode="rgb_array"))))
    for one in (env, sync):
        one.reset(seed=1)
        one.action_space.seed(2)
    told = 0
    for _ in range(12):
        actions = env.action_space.sample()
        infos, expected = env.step(actions)[4], sync.step(actions)[4]
        for info, wanted in zip(infos, expected, strict=True):
            assert ("episode" in info) == ("episode" in wanted)
            if "episode" in info:
                told += 1
                assert (info["episode"]["r"], info["episode"]["l"]) == (wanted["episode"]["r"], wanted["episode"]["l"])
    assert told > 5


def test_methods_attributes_and_images(five: SharedMemoryVectorEnv) -> None:
    sync = SyncVectorEnv(toys(5, render_mode="rgb_array"))
    for env in (five, sync):
        env.reset(seed=3)
        env.set_attr("color", 2)
        env.set_attr("steps_left", [5, 6, 7, 8, 9])
        assert env.get_attr("color") == (2,) * 5 and env.call("steps_left") == (5, 6, 7, 8, 9)
        assert env.call("has_wrapper_attr", "nothing") == (False,) * 5
        with pytest.raises(ValueError):
            env.set_attr("color", [1, 2])
    assert five.render_mode == sync.render_mode == "rgb_array"
    assert data_equivalence(five.render(), sync.render(), exact=True)
    assert [generator.random() for generator in five.np_random] == [generator.random() for generator in sync.np_random]


def test_what_it_gives_is_the_callers_own(five: SharedMemoryVectorEnv) -> None:
    first, _ = five.reset(seed=0)
    before = {key: array.copy() for key, array in first.items()}
    five.step(five.action_space.sample())
    assert data_equivalence(first, before, exact=True)


def test_bad_calls(five: SharedMemoryVectorEnv) -> None:
    with pytest.raises(ValueError, match="Got 2 seeds for 5 environments"):
        five.reset(seed=[1, 2])
    for mask in (np.zeros(5, bool), np.ones(5, int), np.ones(4, bool)):
        with pytest.raises(ValueError, match="reset_mask"):
            five.reset(options={"reset_mask": mask})
    five.reset(seed=0)
    with pytest.raises(ValueError, match="Got 4 actions for 5 environments"):
        five.step(np.zeros((4, 2), np.float32))
    with pytest.raises(AttributeError, match="nothing"):
        five.get_attr("nothing")
    with pytest.raises(RuntimeError, match=r"(?s)worker 0 \(environments 0 to 1\).*in fail\n.*FileNotFoundError: no x"):
        five.call("fail", "no x")
    assert assert_same_course(five, SyncVectorEnv(toys(5)), 6) > 0, "the workers go on"
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        for _ in range(2):
            five.step(np.zeros((5, 2), np.float32))
    five.close()
    with pytest.raises(RuntimeError, match="closed"):
        five.reset()


def test_environments_that_do_not_fit_together() -> None:
    for other in ("dict", "tuple"):
        with pytest.raises((ValueError, RuntimeError), match="same shapes and types"):
            SharedMemoryVectorEnv([*toys(1, "box"), *toys(1, other)], start_method="fork", num_workers=1)
    with pytest.raises(RuntimeError, match="the same action_space, but number 1 has Discrete"):
        SharedMemoryVectorEnv([*toys(1), *toys(1, "dict", "discrete")], start_method="fork", num_workers=1)
    assert not multiprocessing.active_children()


def test_a_finished_episode_is_not_stepped_where_resets_are_disabled() -> None:
    env = SharedMemoryVectorEnv(toys(2), autoreset_mode="Disabled", start_method="fork")
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"ResetNeeded.*reset_mask"):
        for _ in range(6):
            env.step(env.action_space.sample())
    env.close()


def test_neither_torch_nor_stable_baselines3_is_imported() -> None:
    program = """
import sys
import gymnasium as gym
if __name__ == "__main__":
    env = gym.make_vec("mw_envs:MetaWorldMT10-v0", 2, num_workers=1, image_size=16)
    env.reset(seed=0)
    assert not {"torch", "stable_baselines3", "sb3_vla"} & set(sys.modules)
"""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": paths}, timeout=200)


def test_the_ids_have_a_vector_entry_point() -> None:
    for env_id in mw_envs.ENV_IDS:
        assert gym.spec(env_id).vector_entry_point == "mw_envs.vector:make_vector_env"
