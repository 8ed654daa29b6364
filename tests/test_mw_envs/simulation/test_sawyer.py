"""What stands for a function of MetaWorld's or SciPy's gives its results to the last bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from mw_envs import TASKS, Trial
from mw_envs.experts import ScriptedExpert
from mw_envs.simulation.fast_stepping import FastRotation, tolerance
from mw_envs.simulation.scene import Simulator


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


def assert_tolerances_equal(*args: Any, **kwargs: Any) -> None:
    ours, reference = tolerance(*args, **kwargs), reward_utils.tolerance(*args, **kwargs)
    assert type(ours) is type(reference)
    np.testing.assert_array_equal(ours, reference)


def test_tolerances_are_metaworlds() -> None:
    generator = np.random.default_rng(0)
    for x, lower, width, margin in generator.exponential([0.3, 0.1, 0.1, 0.3], size=(3000, 4)):
        for value in (np.float64(x), x.item(), np.float64(lower), np.float64(lower + width), np.float64(-x)):
            bounds = (lower.item(), (lower + width).item())
            assert_tolerances_equal(value, bounds=bounds, margin=margin, sigmoid="long_tail")
    for margin in (0, 0.0, 1e-300, np.inf, np.float64(0.2)):
        for x in (
            0,
            0.0,
            -0.0,
            1,
            1e200,
            np.inf,
            -np.inf,
            np.nan,
            np.float32(0.3),
            np.array(0.3),
            np.array([0.1, 2.0]),
        ):
            with np.errstate(all="ignore"):
                assert_tolerances_equal(x, (0, 0.2), margin, "long_tail")
                assert_tolerances_equal(x, (-np.inf, 0.2), margin=margin, sigmoid="gaussian")
                assert_tolerances_equal(x, margin=margin)
                assert_tolerances_equal(x, (0, 0.2), margin, "long_tail", 0.2)


@pytest.mark.parametrize("wrong", [{"bounds": (0.2, 0.1), "margin": 0.1}, {"margin": -0.1}])
def test_tolerances_refuse_what_metaworlds_refuse(wrong: dict[str, Any]) -> None:
    for function in (tolerance, reward_utils.tolerance):
        with pytest.raises(ValueError, match=r"[Ll]ower|margin"):
            function(0.15, sigmoid="long_tail", **wrong)


def test_touching_is_metaworlds() -> None:
    task = "pick-place-v3"
    simulator, expert = Simulator(task), ScriptedExpert(task)
    observation = simulator.place(Trial(task, 0, 0))
    sawyer = simulator._sawyer
    number = sawyer._get_id_main_object()
    seen = []
    for _ in range(100):
        observation, _, _ = simulator.step(expert.action(observation))
        seen.append(sawyer.touching_object(number))
        assert seen[-1] == SawyerXYZEnv.touching_object(sawyer, number)
    assert set(seen) == {True, False}


@pytest.mark.parametrize("task", TASKS)
def test_success_does_not_depend_on_whether_the_reward_is_wanted(task: str) -> None:
    simulator, expert, generator = Simulator(task), ScriptedExpert(task), np.random.default_rng(0)
    seen = set()
    for goal, noise in ((0, 0.0), (1, 0.0), (2, 0.5)):
        observation = simulator.place(Trial(task, 0, goal))
        sawyer = simulator._sawyer
        for _ in range(150):
            action = (expert.action(observation) + generator.normal(size=4) * noise).astype(np.float32)
            observation, reward, success = simulator.step(action, reward_wanted=False)
            assert np.isnan(reward)
            action = np.clip(action, -1.0, 1.0)
            shorter = sawyer.evaluate_state(observation, action)[1]["success"]
            sawyer.reward_wanted = True
            full = sawyer.evaluate_state(observation, action)[1]["success"]
            assert success == bool(shorter) == bool(full)
            seen.add(success)
    assert seen == {False, True}


def test_a_reward_that_was_not_wanted_before_is_the_same() -> None:
    task, rows = "bin-picking-v3", []
    for wanted_before in (True, False):
        simulator, expert = Simulator(task), ScriptedExpert(task)
        observation = simulator.place(Trial(task, 0, 0))
        for _ in range(40):
            observation, _, _ = simulator.step(expert.action(observation), wanted_before)
        rows.append([])
        for _ in range(40):
            observation, reward, success = simulator.step(expert.action(observation))
            rows[-1].append((*observation, reward, success))
    assert rows[0] == rows[1]
