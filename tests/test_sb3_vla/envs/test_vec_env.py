"""SharedMemoryVecEnv does what DummyVecEnv does, whole or by halves, and leaves nothing behind however it ends."""

from __future__ import annotations

import copy
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from sb3_vla.envs.shared_memory import SharedMemoryVecEnv, available_cores

KINDS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-10, 10, (2, 3), np.float64),
    "discrete": spaces.Discrete(1000),
    "dict": spaces.Dict({"z": spaces.Box(0, 255, (4,), np.uint8), "a": spaces.Box(-1, 1, (2,), np.float32)}),
    "tuple": spaces.Tuple((spaces.Box(-1, 1, (2,), np.float32), spaces.MultiBinary(3))),
    "multi": spaces.MultiDiscrete([3, 400]),
    "image": spaces.Box(0, 255, (8, 6, 3), np.uint8),
    "text": spaces.Text(8),
}
DEADLY = 7.0  # an action, here
ARRAYS = [kind for kind in KINDS if kind != "text"]


class Toy(gym.Env[Any, npt.NDArray[np.float32]]):
    """Random observations; episodes of two to five steps; infos that tell what the environment was given."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, kind: str = "dict", render_mode: str | None = None) -> None:
        self.observation_space = copy.deepcopy(KINDS[kind])  # its generator is this environment's own
        self.metadata = {"render_modes": ["rgb_array"]}
        self.render_mode = render_mode
        self.color = 7

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps_left = int(self.np_random.integers(2, 6))
        return self.observation_space.sample(), {"seed": seed, "options": options, "length": self.steps_left}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps_left -= 1
        over = self.steps_left == 0
        terminated = over and bool(self.np_random.integers(2))
        info = {"action": np.array(action), "left": self.steps_left}
        return self.observation_space.sample(), float(action.sum()) / 3, terminated, over and not terminated, info

    def render(self) -> npt.NDArray[np.uint8]:  # type: ignore[override]
        return np.full((4, 4, 3), self.color, np.uint8)

    def add(self, first: int, second: int = 0) -> int:
        return self.color + first + second

    def fail(self, message: str) -> None:
        raise FileNotFoundError(message)

    def end_process(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def process(self) -> int:
        return os.getpid()

    def wait(self, seconds: float, answer: int = 0) -> bytes:
        time.sleep(seconds)
        return bytes(answer)

    @property
    def unpicklable(self) -> Any:
        return threading.Lock()


class SlowToy(Toy):
    """Takes long for a step when the action says so, and then sends more than a pipe holds."""

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        time.sleep(float(action[0]))
        return observation, reward, terminated, truncated, info | {"ballast": bytes(4_000_000)}


def toys(count: int, kind: str = "dict", **kwargs: Any) -> list[Callable[[], gym.Env[Any, Any]]]:
    return [functools.partial(Toy, kind, **kwargs)] * count


@pytest.fixture
def five() -> Iterator[SharedMemoryVecEnv]:
    """Five environments in two workers: 0 to 1, and 2 to 4."""
    env = SharedMemoryVecEnv(toys(5), start_method="fork", num_workers=2)
    yield env
    env.close()


class Mortal(Toy):
    """Kills its process when an action, or a file, says so."""

    def __init__(self, deadly: Path | None = None) -> None:
        super().__init__()
        self.deadly = deadly

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.deadly is not None:
            with suppress(FileNotFoundError):  # only one of the workers that come at the same time finds it
                self.deadly.unlink()
                self.end_process()
        return super().reset(seed=seed, options=options)

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action[0] == DEADLY:
            os._exit(3)
        return super().step(action)

    def set_color(self, color: int) -> None:
        self.color = color


class Broad(SlowToy):
    """Reads and says more than a pipe holds."""

    action_space = spaces.Box(-1, 1, (100_000,), np.float32)


def shared_memories() -> int:
    """How many workers' memories this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:observations")


def living(pids: list[int]) -> list[int]:
    """Those of some processes that run."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def assert_equal(one: Any, other: Any) -> None:
    """Equal values, types, shapes and dtypes, all the way down; a plain dict may be an OrderedDict."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert type(one) is type(other) and len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)
    else:
        assert type(one) is type(other) and one == other


def assert_same_course(one: VecEnv, other: VecEnv, steps: int) -> int:
    """Step both with the same actions and compare everything they give; the number of episodes that ended."""
    assert one.observation_space == other.observation_space and one.action_space == other.action_space
    generator, ended = np.random.default_rng(0), 0
    assert_equal(one.reset(), other.reset())
    assert_equal(one.reset_infos, other.reset_infos)
    for _ in range(steps):
        actions = generator.uniform(-1, 1, (one.num_envs, *one.action_space.shape)).astype(np.float32)  # type: ignore[misc]
        stepped = one.step(actions)
        assert_equal(stepped, other.step(actions))
        assert_equal(one.reset_infos, other.reset_infos)
        ended += int(stepped[2].sum())
    return ended


# As DummyVecEnv


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_equals_dummy_vec_env(kind: str, workers: int) -> None:
    dummy = DummyVecEnv(toys(5, kind))
    env = SharedMemoryVecEnv(toys(5, kind), start_method="fork", num_workers=workers)
    assert [len(share) for share in env.shares] == {1: [5], 2: [2, 3], 5: [1] * 5, 9: [1] * 5}[workers]
    for one in (dummy, env):
        one.seed(3)
    assert assert_same_course(env, dummy, 12) > 5
    # A second reset: with options per environment, no seeds, then with nothing.
    for one in (dummy, env):
        one.set_options([{"number": number} if number != 1 else {} for number in range(5)])
    assert_same_course(env, dummy, 3)
    assert [info["options"] for info in dummy.reset_infos].count(None) > 0
    assert_same_course(env, dummy, 1)
    env.close()
    dummy.close()


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_start_methods_and_functions_that_pickle_refuses(start_method: str) -> None:
    class Local(Toy):
        pass

    number = 3
    functions: list[Callable[[], gym.Env[Any, Any]]] = [lambda: Local("box"), lambda: Monitor(Local("box"))]
    env = SharedMemoryVecEnv(
        [*functions, lambda: gym.wrappers.TimeLimit(Local("box"), number)], start_method, num_workers=1
    )
    assert env.env_is_wrapped(Monitor) == [False, True, False]
    dummy = DummyVecEnv([lambda: Local("box")] * 3)
    for one in (dummy, env):
        one.seed(3)
    assert_equal(env.reset(), dummy.reset())
    env.close()
    assert not living([process.pid or 0 for process in env.processes])


def test_it_is_a_subproc_vec_env_for_stable_baselines3() -> None:
    env = make_vec_env(Toy, 3, seed=5, vec_env_cls=SharedMemoryVecEnv, vec_env_kwargs={"start_method": "fork"})
    dummy = make_vec_env(Toy, 3, seed=5, vec_env_cls=DummyVecEnv)
    assert isinstance(env, SubprocVecEnv)
    assert_equal(env.reset(), dummy.reset())
    env.close()
    dummy.close()


def test_metaworld() -> None:
    """Environments of one process share simulators and an OpenGL context; the processes do not see each other."""
    make = functools.partial(
        gym.make, "mw_envs:MetaWorldMT10-v0", tasks=["reach-v3", "push-v3"], image_size=24, horizon=5, action_chunk=2
    )
    dummy = DummyVecEnv([make] * 3)
    env = SharedMemoryVecEnv([make] * 3, num_workers=2)
    for one in (dummy, env):
        one.seed(5)
        one.set_options([{"task": "reach-v3", "goal": 1}, {"task": "push-v3", "goal": 2}, {"task": "push-v3"}])
    assert assert_same_course(env, dummy, 4) == 3
    assert [info["task"] for info in env.reset_infos] == [info["task"] for info in dummy.reset_infos]
    env.close()
    dummy.close()


def assert_same_arrays(one: dict[str, npt.NDArray[Any]], other: dict[str, npt.NDArray[Any]]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], strict=True)


TRIALS = [
    {"task": "reach-v3", "goal": 4, "seed": 1},
    {"task": "drawer-open-v3", "goal": 2, "seed": 0},
    {"task": "reach-v3", "goal": 3, "seed": 0},
    {"task": "push-v3", "goal": 1, "seed": 2},
]


def test_a_trial_is_the_same_in_any_process_order_and_number_of_workers() -> None:
    make = functools.partial(
        gym.make, "mw_envs:MetaWorldMT10-v0", image_size=40, horizon=6, action_chunk=2, privileged_state=True
    )
    actions = np.random.default_rng(0).uniform(-1, 1, (3, len(TRIALS), 2, 4)).astype(np.float32)
    single = make()
    expected: list[list[dict[str, Any]]] = []
    for i, trial in enumerate(TRIALS):
        course = [single.reset(options=trial)[0]]
        course += [single.step(action[i])[0] for action in actions]
        expected.append(course)
    single.close()
    assert len({course[0]["image"].tobytes() for course in expected}) == len(TRIALS)
    for workers in (1, 2, 3):
        order = np.roll(np.arange(len(TRIALS)), workers)[::-1]  # environment i runs trial order[i]
        env = SharedMemoryVecEnv([make] * len(TRIALS), "fork", num_workers=workers)
        for by_halves in (False, True):
            env.set_options([TRIALS[i] for i in order])
            observations: Any = env.reset()
            for i, trial in enumerate(order):
                assert_same_arrays(row(observations, i), expected[trial][0])
            for step, action in enumerate(actions):
                if by_halves:
                    for half in (0, 1):
                        env.step_half_async(half, action[order][env.halves[half]])
                    infos = [{}] * len(TRIALS)
                    for half in (0, 1):
                        part, _, _, part_infos = env.step_half_wait(half)
                        for place, i in enumerate(env.halves[half]):
                            infos[i] = part_infos[place]
                            for key in observations:
                                observations[key][i] = part[key][place]
                else:
                    observations, _, _, infos = env.step(action[order])
                for i, trial in enumerate(order):
                    found = infos[i].get("terminal_observation", row(observations, i))
                    assert_same_arrays(found, expected[trial][step + 1])
        env.close()


def test_methods_and_attributes_over_the_border_of_workers(five: SharedMemoryVecEnv) -> None:
    dummy = DummyVecEnv(toys(5))
    for env in (five, dummy):
        env.set_attr("color", 1, indices=[1, 2])
        env.set_attr("color", 4, indices=4)
        env.set_attr("color", 5, indices=-2)
        assert env.get_attr("color") == [7, 1, 1, 5, 4]
        assert env.get_attr("color", indices=[4, 0, 2]) == [4, 7, 1]
        assert env.get_attr("color", indices=[-1, 4, 0, 4]) == [4, 4, 7, 4]
        assert env.get_attr("color", indices=[]) == []
        assert env.get_attr("color", indices=np.array([3, 1])) == [5, 1]
        assert env.env_method("add", 10, second=100, indices=(3, 1)) == [115, 111]
        assert env.env_method("add", 10) == [17, 11, 11, 15, 14]
        assert env.env_is_wrapped(Monitor, indices=[0, 4]) == [False, False]
        with pytest.raises(IndexError):
            env.get_attr("color", indices=5)
        with pytest.raises(AttributeError, match="hue"):
            env.get_attr("hue")
        assert env.get_attr("color", indices=0) == [7], "nothing may be left of the refused calls"


def test_has_attr_asks_every_environment(five: SharedMemoryVecEnv) -> None:
    assert five.has_attr("color") and not five.has_attr("hue")
    five.set_attr("extra", 1, indices=[0, 1, 2, 3])
    assert not five.has_attr("extra")
    five.set_attr("extra", 1, indices=4)
    assert five.has_attr("extra")
    assert five.has_attr("unpicklable"), "what stays in the worker need not be sent"


def test_images() -> None:
    env = SharedMemoryVecEnv(toys(3, render_mode="rgb_array"), start_method="fork", num_workers=2)
    env.set_attr("color", 9, indices=2)
    assert env.render_mode == "rgb_array"
    assert [int(image.mean()) for image in env.get_images() if image is not None] == [7, 7, 9]
    tiled = env.render()
    assert tiled is not None and tiled.shape == (8, 8, 3)
    env.close()


def test_no_images_without_the_render_mode(five: SharedMemoryVecEnv) -> None:
    with pytest.warns(UserWarning, match="rgb_array"):
        assert five.get_images() == [None] * 5


def test_workers_by_default() -> None:
    assert available_cores() >= 1
    env = SharedMemoryVecEnv(toys(2), start_method="fork")
    assert len(env.processes) == min(2, available_cores())
    env.close()


def test_what_workers_give_is_the_callers_own(five: SharedMemoryVecEnv) -> None:
    """A result that is kept does not change with the next step."""
    five.seed(0)
    results = [five.reset(), *(five.step(np.zeros((5, 2), np.float32)) for _ in range(6))]
    kept = copy.deepcopy(results)
    for _ in range(6):
        five.step(np.zeros((5, 2), np.float32))
    five.reset()
    five.close()
    assert_equal(results, kept)
    ends = [info for _, _, _, infos in results[1:] for info in infos if "terminal_observation" in info]
    assert len(ends) >= 5


def test_memory_is_freed(five: SharedMemoryVecEnv) -> None:
    assert shared_memories() == 2
    five.close()
    assert shared_memories() == 0
    other = SharedMemoryVecEnv(toys(2), "fork")
    other.reset()
    assert shared_memories() == len(other.processes)
    del other
    assert shared_memories() == 0


# Halves


@pytest.mark.parametrize(("count", "workers"), [(5, 1), (5, 2), (6, 3), (4, 4), (2, 2)])
def test_halves_share_every_worker(count: int, workers: int) -> None:
    env = SharedMemoryVecEnv(toys(count), "fork", num_workers=workers)
    first, second = env.halves
    assert sorted([*first, *second]) == list(range(count))
    assert abs(len(first) - len(second)) <= 1
    for share in env.shares:
        assert abs(len(set(share) & set(first)) - len(set(share) & set(second))) <= 1
    env.close()


@pytest.mark.parametrize("kind", ["dict", "tuple", "image"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_halves_equal_the_whole(kind: str, workers: int) -> None:
    whole = DummyVecEnv(toys(5, kind))
    env = SharedMemoryVecEnv(toys(5, kind), "fork", num_workers=workers)
    for one in (whole, env):
        one.seed(3)
    generator, ended = np.random.default_rng(0), 0
    assert_equal(env.reset(), whole.reset())
    actions = generator.uniform(-1, 1, (12, 5, 2)).astype(np.float32)
    for half in (0, 1):
        env.step_half_async(half, actions[0][env.halves[half]])
    for step in range(12):
        expected, ended = whole.step(actions[step]), ended + len(whole.buf_dones.nonzero()[0])
        for half in (0, 1) if step % 2 else (1, 0):  # in any order, not only as begun
            rows = env.halves[half]
            observations, rewards, dones, infos = env.step_half_wait(half)
            assert env.get_attr("color") == [7] * 5  # which leaves alone what is under way
            if step < 11:
                env.step_half_async(half, actions[step + 1][rows])
            for part, all_of_it in zip(arrays_of(observations), arrays_of(expected[0]), strict=True):
                np.testing.assert_array_equal(part, all_of_it[rows], strict=True)
            assert_equal((rewards, dones), (expected[1][rows], expected[2][rows]))
            assert_equal(infos, [expected[3][i] for i in rows])
            assert_equal([env.reset_infos[i] for i in rows], [whole.reset_infos[i] for i in rows])
    assert ended > 5
    # And back to whole steps.
    assert_equal(env.step(actions[0]), whole.step(actions[0]))
    env.close()


def arrays_of(observations: Any) -> list[npt.NDArray[Any]]:
    if isinstance(observations, dict):
        return list(observations.values())
    return list(observations) if isinstance(observations, tuple) else [observations]


def test_halves_out_of_turn(five: SharedMemoryVecEnv) -> None:
    five.reset()
    first, second = (np.zeros((len(half), 2), np.float32) for half in five.halves)
    with pytest.raises(ValueError, match="half=2; expected 0 or 1"):
        five.step_half_async(2, first)
    with pytest.raises(ValueError, match="Got 5 actions for 2"):
        five.step_half_async(1, np.zeros((5, 2), np.float32))
    with pytest.raises(RuntimeError, match=r"call step_half_async\(0, actions\) first"):
        five.step_half_wait(0)
    five.step_half_async(0, first)
    five.step_half_async(1, second)
    five.step_half_async(0, first + 1)  # gives up the step before of this half alone
    assert [info["action"][0] for half in (0, 1) for info in five.step_half_wait(half)[3]] == [1, 1, 1, 0, 0]
    for half, actions in enumerate((first, second)):
        five.step_half_async(half, actions)
    five.reset()  # gives up both
    for half in (0, 1):
        with pytest.raises(RuntimeError, match="No step of half"):
            five.step_half_wait(half)
    five.step_async(np.zeros((5, 2), np.float32))
    five.step_half_async(1, second)
    with pytest.raises(RuntimeError, match="No step is under way"):
        five.step_wait()
    five.step_half_wait(1)


def test_halves_of_a_single_environment() -> None:
    env = SharedMemoryVecEnv(toys(1), "fork")
    assert [half.tolist() for half in env.halves] == [[0], []]
    env.close()


@pytest.mark.timeout(60)
def test_halves_with_messages_larger_than_a_pipe_holds() -> None:
    """A worker that sends its answer while the parent sends the next actions must not stop both."""
    env = SharedMemoryVecEnv([Broad] * 2, "fork", num_workers=1)
    env.reset()
    actions = np.zeros((1, 100_000), np.float32)
    env.step_half_async(0, actions)
    for half in (1, 0, 1, 0):
        env.step_half_async(half, actions)
        assert env.step_half_wait(1 - half)[3][0]["ballast"] == bytes(4_000_000)
    env.step_half_wait(0)
    env.close()


# Bad input, failures, deaths


def test_bad_arguments(five: SharedMemoryVecEnv) -> None:
    with pytest.raises(ValueError, match="env_fns is empty"):
        SharedMemoryVecEnv([])
    with pytest.raises(ValueError, match="num_workers=0"):
        SharedMemoryVecEnv(toys(1), num_workers=0)
    with pytest.raises(ValueError, match="Got 4 actions for 5"):
        five.step(np.zeros((4, 2), np.float32))
    with pytest.raises(RuntimeError, match=r"call step_async\(\) first"):
        five.step_wait()
    with pytest.raises(RuntimeError, match=r"InputError: The observation space's part None is Text.*as bytes: Box"):
        SharedMemoryVecEnv(toys(2, "text"), "fork")
    for workers in (1, 2):
        with pytest.raises((ValueError, RuntimeError), match="must have the same shapes and types"):
            SharedMemoryVecEnv([*toys(1, "box"), *toys(1, "dict")], "fork", num_workers=workers)
    toy = Toy()
    with pytest.raises(RuntimeError, match="same instance"):
        SharedMemoryVecEnv([lambda: toy] * 2, start_method="fork", num_workers=1)


def test_an_error_comes_with_its_traceback_and_the_workers_go_on(five: SharedMemoryVecEnv) -> None:
    five.seed(0)
    five.reset()
    with pytest.raises(RuntimeError, match=r"(?s)worker 1 \(environments 2 to 4\).*in fail\n.*FileNotFoundError: no x"):
        five.env_method("fail", "no x", indices=[1 + 1])
    with pytest.raises(RuntimeError, match="worker 0"):
        five.env_method("fail", "all of them")
    with pytest.raises(RuntimeError, match="cannot pickle"):
        five.get_attr("unpicklable")
    bad = np.zeros((5, 2), object)
    bad[0, 0] = "x"  # the step of the first worker fails, that of the second does not
    with pytest.raises(RuntimeError, match=r"(?s)worker 0 \(environments 0 to 1\).*TypeError"):
        five.step(bad)
    dummy = DummyVecEnv(toys(5))
    for env in (five, dummy):
        env.seed(9)
    assert assert_same_course(five, dummy, 6) > 0


class Shrinking(gym.ObservationWrapper[Any, Any, Any]):
    """Gives pictures in 0..1, or in whole numbers, under a space of bytes."""

    def __init__(self, env: gym.Env, factor: float) -> None:
        super().__init__(env)
        self.factor = factor

    def observation(self, observation: Any) -> Any:
        return {**observation, "image": observation["image"] * self.factor}


def test_a_picture_that_the_space_cannot_hold() -> None:
    """Stable-Baselines3 would make it black."""
    space = spaces.Dict(
        {"image": spaces.Box(0, 255, (2, 2, 3), np.uint8), "state": spaces.Box(-1, 1, (2,), np.float32)}
    )

    def make(factor: float) -> gym.Env:
        toy = Toy()
        toy.observation_space = copy.deepcopy(space)
        return Shrinking(toy, factor)

    env = SharedMemoryVecEnv([functools.partial(make, 1.0)], "fork")
    try:
        assert env.reset()["image"].dtype == np.uint8  # type: ignore[index,call-overload]
    finally:
        env.close()
    env = SharedMemoryVecEnv([functools.partial(make, 1 / 255)], "fork")
    try:
        with pytest.raises(
            RuntimeError, match="The observation's image has type float64 with numbers that are not whole"
        ):
            env.reset()
    finally:
        env.close()


def test_a_request_that_cannot_be_sent(five: SharedMemoryVecEnv) -> None:
    """The first worker has been asked to reset when the second's options turn out to be impossible."""
    five.set_options([{}] * 4 + [{"lock": threading.Lock}])
    five._options[4] = {"lock": threading.Lock()}
    with pytest.raises(TypeError, match="pickle"):
        five.reset()
    five.set_options()
    dummy = DummyVecEnv(toys(5))
    for env in (five, dummy):
        env.seed(9)
    assert assert_same_course(five, dummy, 6) > 0


def test_a_step_that_was_not_waited_for_is_given_up(five: SharedMemoryVecEnv) -> None:
    five.reset()
    five.step_async(np.zeros((5, 2), np.float32))
    five.reset()
    with pytest.raises(RuntimeError, match=r"not reset\(\) before step_wait"):
        five.step_wait()
    five.step_async(np.zeros((5, 2), np.float32))
    five.step_async(np.ones((5, 2), np.float32))
    assert [info["action"][0] for info in five.step_wait()[3]] == [1] * 5
    five.step_async(np.zeros((5, 2), np.float32))
    dummy = DummyVecEnv(toys(5))
    for env in (five, dummy):
        env.seed(9)
    assert assert_same_course(five, dummy, 6) > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_named(five: SharedMemoryVecEnv, victim: int) -> None:
    share = ["0 to 1", "2 to 4"][victim]
    message = rf"Worker {victim} \(environments {share}\) died with exit code -9.*memory"
    pids = [process.pid or 0 for process in five.processes]
    five.reset()
    os.kill(pids[victim], signal.SIGKILL)
    for _ in range(2):  # again and again, and not as something else
        with pytest.raises(RuntimeError, match=message):
            five.step(np.zeros((5, 2), np.float32))
    five.close()
    assert not living(pids)
    with pytest.raises(RuntimeError, match="is closed"):
        five.reset()


def test_a_worker_that_dies_at_work(five: SharedMemoryVecEnv) -> None:
    with pytest.raises(RuntimeError, match=r"Worker 1 .* died with exit code -9"):
        five.env_method("end_process", indices=[0 + 3])
    assert five.env_method("process", indices=[0, 1]) == [five.processes[0].pid] * 2


# Replaced workers


class Left:
    """Part of a cycle: ended by the collector, in whichever process that runs."""

    def __init__(self, note: Path) -> None:
        self.note, self.cycle = note, self

    def __del__(self) -> None:
        self.note.write_text(str(os.getpid()))


class CollectingToy(Toy):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        gc.collect()
        return super().reset(seed=seed, options=options)


def test_a_forked_worker_leaves_the_parents_garbage_alone(tmp_path: Path) -> None:
    note = tmp_path / "ended by"
    gc.collect()
    gc.disable()
    try:
        Left(note)
        env = SharedMemoryVecEnv([CollectingToy], "fork")
        env.reset()
        env.close()
        assert not note.exists()
        gc.collect()
    finally:
        gc.enable()
    assert note.read_text() == str(os.getpid())


def restarting(start_method: str = "fork", deadly: Path | None = None) -> SharedMemoryVecEnv:
    """Five environments in two workers, 0 to 1 and 2 to 4, that may die."""
    mortal = functools.partial(Mortal, deadly)
    return SharedMemoryVecEnv([mortal] * 5, start_method, num_workers=2, restart_workers=True)


def row(observations: Any, i: int) -> dict[str, npt.NDArray[Any]]:
    return {key: value[i] for key, value in observations.items()}


def without_death(seed: int, actions: npt.NDArray[np.float32]) -> tuple[list[Any], DummyVecEnv]:
    """The course of the same environments where nobody dies."""
    dummy = DummyVecEnv([Mortal] * 5)
    dummy.seed(seed)
    dummy.reset()
    return [(*dummy.step(action), copy.deepcopy(dummy.reset_infos)) for action in actions], dummy


@pytest.mark.parametrize(("start_method", "how"), [("fork", "idle"), ("fork", "in step"), ("forkserver", "in step")])
def test_a_worker_is_replaced_and_the_others_lose_nothing(start_method: str, how: str) -> None:
    generator = np.random.default_rng(1)
    actions = generator.uniform(-1, 1, (12, 5, 2)).astype(np.float32)
    expected, _ = without_death(11, actions)
    env = restarting(start_method)
    env.seed(11)
    last = env.reset()
    env.set_attr("color", 1)
    env.env_method("set_color", 2, indices=[3])
    env.set_attr("color", 3, indices=[4])
    killed = env.processes[1].pid
    for step, action in enumerate(actions):
        given = action.copy()
        if step == 3 and how == "idle":
            os.kill(killed or 0, signal.SIGKILL)
        elif step == 3:
            given[4] = DEADLY
        observations, rewards, dones, infos = env.step(given)
        for i in (0, 1):
            assert_equal(row(observations, i), row(expected[step][0], i))
            assert (rewards[i], dones[i]) == (expected[step][1][i], expected[step][2][i])
            assert_equal(infos[i], expected[step][3][i])
            assert_equal(env.reset_infos[i], expected[step][4][i])
        for i in (2, 3, 4):
            assert infos[i].get("worker_restarted", False) == (step == 3)
            if step == 3:
                assert rewards[i] == 0 and dones[i]
                assert infos[i]["TimeLimit.truncated"] and infos[i]["env_steps"] == 0
                assert_equal(infos[i]["terminal_observation"], row(last, i))
                # A trial of its own, not the one with which the last reset began.
                assert env.reset_infos[i]["seed"] is None and env.reset_infos[i]["options"] is None
        last = observations
    assert env.dropped_episodes == 3
    assert env.get_attr("color") == [1, 1, 1, 2, 3]
    assert env.processes[1].pid != killed and not living([killed or 0])
    env.close()


class Telling(Mortal):
    """Says everywhere which step it is, and at an episode's end alone whether that succeeded."""

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            info |= {"is_success": True, "score": 7}
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("steps", [0, 1, 8])
def test_the_info_of_a_replaced_environment_has_every_key(steps: int) -> None:
    """Wrappers of Stable-Baselines3 look some up in the info of each episode that ends."""
    env = SharedMemoryVecEnv([Telling] * 5, "fork", num_workers=2, restart_workers=True)
    monitor = VecMonitor(env, info_keywords=("is_success", "left", "score") if steps == 8 else ("is_success",))
    monitor.seed(3)
    monitor.reset()
    seen: set[str] = set()
    infos: list[dict[str, Any]] = []
    for _ in range(steps):
        _, _, dones, infos = monitor.step(np.zeros((5, 2), np.float32))
        seen.update(*infos)
    assert steps != 8 or {"score", "episode", "terminal_observation"} <= seen
    deadly = np.zeros((5, 2), np.float32)
    deadly[4] = DEADLY
    left = [None if not steps or dones[i] else infos[i]["left"] for i in range(5)]
    _, _, dones, infos = monitor.step(deadly)
    for i in env.shares[1]:
        assert dones[i] and infos[i]["worker_restarted"] and infos[i]["is_success"] is False
        assert infos[i]["episode"]["is_success"] is False
        assert seen - {"episode"} <= set(infos[i])
        assert infos[i].get("left") == left[i]
    env.close()


@pytest.mark.parametrize("dying", [0, 1])
def test_a_worker_is_replaced_between_halves(dying: int) -> None:
    """Both halves of its environments are lost, each told of in its own step; the others go on."""
    actions = np.random.default_rng(1).uniform(-1, 1, (6, 5, 2)).astype(np.float32)
    expected, _ = without_death(11, actions)
    env = restarting()
    env.seed(11)
    env.reset()
    victim = int(env.halves[dying][-1])
    assert victim in env.shares[1]
    told: list[tuple[int, int]] = []
    for step in range(6):
        for half in (0, 1):
            given = actions[step].copy()
            given[victim] = DEADLY if step == 2 else given[victim]
            env.step_half_async(half, given[env.halves[half]])
            if step == 2 and half == 0:
                time.sleep(0.3)  # the death of half 0 is found when half 1 is begun
        for half in (0, 1):
            observations, rewards, _, infos = env.step_half_wait(half)
            for place, i in enumerate(env.halves[half]):
                if i in env.shares[0]:
                    assert_equal(row(observations, place), row(expected[step][0], i))
                    assert rewards[place] == expected[step][1][i]
                elif infos[place].get("worker_restarted"):
                    told.append((step, int(i)))
    assert sorted(i for _, i in told) == [2, 3, 4]
    assert {step for step, _ in told} <= {2, 3}
    assert env.dropped_episodes == 3
    env.close()


def test_requests_are_made_again_in_the_new_worker(tmp_path: Path) -> None:
    env = restarting(deadly=tmp_path / "deadly")
    dummy = DummyVecEnv([Mortal] * 5)
    for one in (env, dummy):
        one.seed(4)
    (tmp_path / "deadly").touch()  # the first environment to be reset dies of it
    assert_equal(env.reset(), dummy.reset())
    assert_equal(env.reset_infos, dummy.reset_infos)
    assert env.dropped_episodes == 0, "an episode that has not begun is not lost"
    assert_same_course(env, dummy, 4)
    os.kill(env.processes[0].pid or 0, signal.SIGKILL)
    assert env.env_method("process", indices=[0, 1]) == [env.processes[0].pid] * 2
    infos = env.step(np.zeros((5, 2), np.float32))[3]
    assert [info.get("worker_restarted", False) for info in infos] == [True, True, False, False, False]
    env.close()


def test_a_worker_that_dies_again_and_again() -> None:
    env = restarting()
    env.reset()
    deadly = np.zeros((5, 2), np.float32)
    deadly[0] = DEADLY
    for _ in range(3):  # with a step between, as often as one likes
        env.step(deadly)
        env.step(np.zeros((5, 2), np.float32))
    assert env.dropped_episodes == 6
    env.step(deadly)
    env.step(deadly)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Worker 0 .* exit code 3.* died 3 times without a step between"):
            env.step(deadly)
    with pytest.raises(RuntimeError, match=r"Worker 1 .* exit code -9.* died 3 times"):
        env.env_method("end_process", indices=[2])
    env.close()


def test_a_replacement_that_cannot_be_made(tmp_path: Path) -> None:
    """Its environment fails: the cause is told, and no process is left."""

    def make() -> Mortal:
        if (tmp_path / "gone").exists():
            raise OSError("the disk is full")
        return Mortal()

    env = SharedMemoryVecEnv([make] * 2, "fork", num_workers=1, restart_workers=True)
    env.reset()
    (tmp_path / "gone").touch()
    os.kill(env.processes[0].pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"(?s)worker 0.*OSError: the disk is full"):
        env.step(np.zeros((2, 2), np.float32))
    env.close()


# Ends


def test_closing_while_others_are_in_the_middle_of_a_step() -> None:
    """step_async fails at a dead worker; the others work and then have more to say than a pipe holds."""
    env = SharedMemoryVecEnv([SlowToy] * 4, start_method="fork", num_workers=4)
    env.reset()
    pids = [process.pid or 0 for process in env.processes]
    os.kill(pids[2], signal.SIGKILL)
    env.processes[2].join()
    with pytest.raises(RuntimeError, match=r"Worker 2 \(environments 2\)"):
        env.step_async(np.full((4, 2), 0.3, np.float32))
    env.close()
    env.close()
    assert not living(pids)
    # Not terminated after having been waited for in vain, because nobody took their results.
    assert [process.exitcode for process in env.processes] == [0, 0, -9, 0]


def test_a_worker_that_hangs_is_terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mw_envs.vector.pool._CLOSE_SECONDS", 1.0)
    env = SharedMemoryVecEnv([SlowToy] * 2, start_method="fork", num_workers=2)
    env.reset()
    env.step_async(np.array([[100, 0], [0, 0]], np.float32))
    env.close()
    assert env.processes[0].exitcode == -signal.SIGTERM and env.processes[1].exitcode is not None


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_constructor_that_fails_closes_all_workers(start_method: str) -> None:
    """With the cause, also when that worker has ended long before the others have started."""

    def fail() -> Toy:
        raise OSError("no such robot")

    before = set(_children())
    with pytest.raises(RuntimeError, match=r"(?s)worker 0 \(environments 0\).*in fail\n.*OSError: no such robot"):
        SharedMemoryVecEnv([fail, *toys(2)], num_workers=3, start_method=start_method)
    assert not living([pid for pid in _children() if pid not in before])


def test_a_function_that_cannot_be_sent_closes_all_workers() -> None:
    lock = threading.Lock()

    def locked() -> Toy:
        with lock:
            return Toy()

    before = set(_children())
    with pytest.raises(TypeError, match="pickle"):
        SharedMemoryVecEnv([*toys(1), locked], num_workers=2, start_method="forkserver")
    assert not living([pid for pid in _children() if pid not in before])
    env = SharedMemoryVecEnv([locked], start_method="fork")  # nothing is sent here
    env.close()


def _children() -> list[int]:
    """Processes that multiprocessing has started from this one and not seen end."""
    return [process.pid or 0 for process in multiprocessing.active_children()]


def test_workers_end_with_the_environments_last_reference() -> None:
    env = SharedMemoryVecEnv(toys(3), start_method="fork", num_workers=3)
    pids = [process.pid or 0 for process in env.processes]
    del env
    deadline = time.monotonic() + 5
    while living(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not living(pids)


SCRIPT = """
import os, signal, sys, time
import gymnasium as gym, numpy as np
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv

class Slow(gym.Env):
    observation_space = action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        time.sleep(0.05)
        return np.zeros(1, np.float32), 0.0, False, False, {}

if __name__ == "__main__":
    env = SharedMemoryVecEnv([Slow] * 4, sys.argv[1], num_workers=2, restart_workers=True)
    env.reset()
    if sys.argv[1] == "fork":  # the replacement inherits more pipes than a first worker does
        os.kill(env.processes[0].pid, signal.SIGKILL)
        env.step(np.zeros((4, 1), np.float32))
    print(*[process.pid for process in env.processes], flush=True)
    while True:
        env.step(np.zeros((4, 1), np.float32))
"""


@pytest.mark.parametrize(
    ("start_method", "sent"),
    [
        ("fork", signal.SIGINT),
        ("fork", signal.SIGKILL),
        ("forkserver", signal.SIGINT),
        ("spawn", signal.SIGKILL),
    ],
)
def test_nothing_outlives_the_parent(tmp_path: Path, start_method: str, sent: signal.Signals) -> None:
    """No worker, no complaint of multiprocessing's about a leak, and no memory, for it has no name that could stay."""
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), start_method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(living(pids)) == 2
        maps = Path(f"/proc/{parent.pid}/maps").read_text()
        assert maps.count("memfd:observations") == 2 and "/dev/shm" not in maps
        time.sleep(0.2)
        if sent == signal.SIGINT:
            os.killpg(parent.pid, sent)  # as a terminal does: to the parent and its workers
        else:
            parent.send_signal(sent)
        _, errors = parent.communicate(timeout=60)
        assert errors.count("KeyboardInterrupt") == (1 if sent == signal.SIGINT else 0), errors
        assert "resource_tracker" not in errors and "leaked" not in errors, errors
        deadline = time.monotonic() + 5
        while living(pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not living(pids)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
