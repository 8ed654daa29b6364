"""A trial fixes an episode bit for bit: against MetaWorld itself, whatever ran before, in every process.

The reference is a fresh environment of MetaWorld's, given its own task object: ``MT1(task, seed).train_tasks[goal]``.
All comparisons are of equality; nothing here has a tolerance.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import pickle

import gymnasium as gym
import metaworld
import mujoco
import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial.transform import Rotation

from mw_envs import TASKS, Trial
from mw_envs.sawyer import FastRotation
from mw_envs.scene import Simulator, acquire_simulator, release_simulator

# One that moves only its goal, two that reject goals near the object, one that moves bodies of the model, one with two
# objects, one that keeps views into the simulation's data as attributes.
SOME_TASKS = ["reach-v3", "push-v3", "sweep-into-v3", "door-open-v3", "hammer-v3", "lever-pull-v3"]
OTHER_TASKS = [task for task in TASKS if task not in SOME_TASKS]
EVERY_TASK = SOME_TASKS + [pytest.param(task, marks=pytest.mark.slow) for task in OTHER_TASKS]
SEED = 7
STEPS = 40

Episode = tuple[list[npt.NDArray[np.float64]], list[float], list[bool]]


@functools.cache
def benchmark(task: str, seed: int) -> metaworld.MT1:
    return metaworld.MT1(task, seed=seed)


def some_actions(trial: Trial) -> npt.NDArray[np.float32]:
    """Beyond the box on purpose: downwards and closing on average, so that objects are touched."""
    generator = np.random.default_rng([trial.goal, trial.seed])
    actions = generator.normal([0.0, 0.0, -0.5, 0.5], 1.0, size=(STEPS, 4))
    return actions.astype(np.float32)


def metaworlds_episode(trial: Trial) -> Episode:
    mt1 = benchmark(trial.task, trial.seed)
    env = mt1.train_classes[trial.task]()
    env.set_task(mt1.train_tasks[trial.goal])
    observation, _ = env.reset()
    observations, rewards, successes = [observation], [], []
    for action in some_actions(trial):
        observation, reward, _, _, info = env.step(np.clip(action, -1.0, 1.0))
        observations.append(observation)
        rewards.append(float(reward))
        successes.append(bool(info["success"]))
    return observations, rewards, successes


def our_episode(simulator: Simulator, trial: Trial) -> Episode:
    observations, rewards, successes = [simulator.place(trial)], [], []
    for action in some_actions(trial):
        observation, reward, success = simulator.step(action)
        observations.append(observation)
        rewards.append(reward)
        successes.append(success)
    return observations, rewards, successes


def assert_same(ours: Episode, reference: Episode) -> None:
    np.testing.assert_array_equal(np.stack(ours[0]), np.stack(reference[0]), strict=True)
    assert ours[1:] == reference[1:]


def fingerprint(episode: Episode) -> str:
    observations, rewards, successes = episode
    return hashlib.sha256(np.stack(observations).tobytes() + repr((rewards, successes)).encode()).hexdigest()


def fingerprint_of(trial: Trial) -> str:
    """For a process that knows nothing but the trial."""
    return fingerprint(our_episode(Simulator(trial.task), trial))


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_trial_is_metaworlds_own(task: str) -> None:
    simulator = Simulator(task)
    for goal in (0, 41, 3):
        trial = Trial(task, SEED, goal)
        assert_same(our_episode(simulator, trial), metaworlds_episode(trial))


@pytest.mark.parametrize("task", EVERY_TASK)
def test_the_fifty_goals_are_metaworlds_own(task: str) -> None:
    reference = [pickle.loads(row.data)["rand_vec"] for row in benchmark(task, SEED).train_tasks]
    np.testing.assert_array_equal(Simulator(task)._goal_table(SEED), np.array(reference), strict=True)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_what_ran_before_does_not_matter(task: str) -> None:
    trial = Trial(task, SEED, 12)
    simulator = Simulator(task)
    first = fingerprint(our_episode(simulator, trial))
    for other in (Trial(task, SEED, 30), Trial(task, SEED + 1, 12)):  # the second computes a new table of goals
        assert fingerprint(our_episode(simulator, other)) != first
    simulator.model.body_pos[:] += 0.1
    simulator.data.qpos[:] += 0.1
    simulator.data.mocap_pos[:] += 0.1
    assert fingerprint(our_episode(simulator, trial)) == first


def test_two_simulators_of_a_task_do_not_touch_each_other() -> None:
    task = "door-open-v3"
    trials = [Trial(task, SEED, 5), Trial(task, SEED, 6)]
    alone = [our_episode(Simulator(task), trial) for trial in trials]
    simulators = [Simulator(task), Simulator(task)]
    observations = [[simulator.place(trial)] for simulator, trial in zip(simulators, trials, strict=True)]
    actions = [some_actions(trial) for trial in trials]
    for step in range(STEPS):
        for number, simulator in enumerate(simulators):
            observations[number].append(simulator.step(actions[number][step])[0])
    for number in range(2):
        np.testing.assert_array_equal(np.stack(observations[number]), np.stack(alone[number][0]))


def test_a_trial_is_the_same_in_another_process() -> None:
    trials = [Trial("hammer-v3", SEED, 12), Trial("push-v3", 2**32 - 1, 49)]
    here = [fingerprint_of(trial) for trial in trials]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(fingerprint_of, trials)
        pool.close()
        pool.join()
    assert there == here
    assert here[0] != here[1]


def test_the_global_generators_are_not_touched(untouched_global_rng: None) -> None:
    env = gym.make("MetaWorldMT10-v0", tasks=["push-v3"], settle_steps=2).unwrapped
    simulator = Simulator("push-v3")
    simulator.place(Trial("push-v3", 987, 0))  # a seed that no other test has: its goals are computed here
    simulator.step(np.zeros(4, dtype=np.float32))
    env.close()


def test_the_goals_depend_on_the_seed() -> None:
    simulator = Simulator("reach-v3")
    assert not np.array_equal(simulator.place(Trial("reach-v3", 0, 0)), simulator.place(Trial("reach-v3", 1, 0)))


def test_actions_are_clipped_in_every_component() -> None:
    simulator = Simulator("reach-v3")
    trial = Trial("reach-v3", 0, 0)

    def last(action: list[float]) -> npt.NDArray[np.float64]:
        simulator.place(trial)
        for _ in range(10):
            observation, _, _ = simulator.step(np.array(action, dtype=np.float32))
        return observation

    np.testing.assert_array_equal(last([3.0, -7.0, 1.5, 25.0]), last([1.0, -1.0, 1.0, 1.0]))
    assert not np.array_equal(last([0.5, -1.0, 1.0, 1.0]), last([1.0, -1.0, 1.0, 1.0]))
    assert not np.array_equal(last([1.0, -1.0, 1.0, -1.0]), last([1.0, -1.0, 1.0, 1.0]))


def test_the_simulators_own_step_limit_does_not_count() -> None:
    simulator = Simulator("reach-v3")
    simulator.place(Trial("reach-v3", 0, 0))
    for _ in range(501):  # MetaWorld raises at 501
        simulator.step(np.zeros(4, dtype=np.float32))


def test_the_camera_stands_where_the_published_data_has_it() -> None:
    model = Simulator("reach-v3").model
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "corner2")
    np.testing.assert_allclose(model.cam_pos[camera], (0.75, 0.075, 0.7), rtol=0, atol=0)


def test_simulators_are_handed_on_within_a_process() -> None:
    simulator = acquire_simulator("drawer-open-v3")
    another = acquire_simulator("drawer-open-v3")
    assert simulator is not another
    release_simulator(simulator)
    assert acquire_simulator("drawer-open-v3") is simulator
    release_simulator(simulator)
    release_simulator(another)


def test_an_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"'reach-v2'; did you mean 'reach-v3'\?"):
        Simulator("reach-v2")


def test_rotations_are_scipys() -> None:
    generator = np.random.default_rng(0)
    signs = itertools.product((1.0, -1.0), repeat=3)
    axes = [np.eye(3)[list(order)] * s for s in signs for order in itertools.permutations(range(3))]
    turns = [matrix for matrix in axes if np.linalg.det(matrix) > 0]  # the 24 along the axes, where components tie
    assert len(turns) == 24
    for scale in ([1, 1, 1, 1], [1e-9, 1e-3, 1e-9, 1], [1, 1e-9, 1e-3, 1e-9]):
        quaternions = generator.normal(size=(500, 4)) * scale
        turns += [Rotation.from_quat(quaternion).as_matrix() for quaternion in quaternions]
    for matrix in turns:
        np.testing.assert_array_equal(
            FastRotation.from_matrix(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat()
        )
