"""Gymnasium ids: what `gym.make` finds, with and without the import, and which tasks it gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec

import mw_envs
from mw_envs import ENV_IDS, suite_tasks


def test_the_ids() -> None:
    assert ENV_IDS == (
        "MetaWorldMT1-v0",
        "MetaWorldMT10-v0",
        "MetaWorldMT50-v0",
        "MetaWorldML10-v0",
        "MetaWorldML45-v0",
    )
    assert set(ENV_IDS) <= set(gym.registry)


def test_a_second_registration_does_nothing() -> None:
    before = {env_id: gym.registry[env_id] for env_id in ENV_IDS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Gymnasium warns when an id is overridden
        mw_envs.register_envs()
    assert all(gym.registry[env_id] is spec for env_id, spec in before.items())


@pytest.mark.parametrize(
    ("env_id", "kwargs", "tasks"),
    [
        ("MetaWorldMT1-v0", {"task": "hammer-v3"}, ("hammer-v3",)),
        ("MetaWorldMT10-v0", {}, suite_tasks("MT10")),
        ("MetaWorldMT10-v0", {"tasks": ["push-v3", "reach-v3"]}, ("push-v3", "reach-v3")),
        ("MetaWorldMT50-v0", {}, suite_tasks("MT50")),
        ("MetaWorldML10-v0", {}, suite_tasks("ML10")),
        ("MetaWorldML10-v0", {"split": "test"}, suite_tasks("ML10", "test")),
        ("MetaWorldML45-v0", {"split": "train"}, suite_tasks("ML45")),
        ("MetaWorldML45-v0", {"split": "test"}, suite_tasks("ML45", "test")),
    ],
)
def test_each_id_gives_its_suite(env_id: str, kwargs: dict[str, Any], tasks: tuple[str, ...]) -> None:
    env = gym.make(env_id, **kwargs)
    assert env.unwrapped.tasks == tasks  # type: ignore[attr-defined]
    env.close()


def test_a_spec_survives_its_json_form() -> None:
    env = gym.make("MetaWorldML10-v0", split="test", image_size=64, action_chunk=5)
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.observation_space == env.observation_space
    assert again.action_space == env.action_space
    assert again.unwrapped.tasks == env.unwrapped.tasks  # type: ignore[attr-defined]


def test_the_prefixed_id_works_without_an_import() -> None:
    # Making an environment must neither construct a simulation nor open a renderer: it happens before workers fork.
    program = """
import json, sys
import gymnasium as gym
bare = None
try:
    gym.make("MetaWorldMT50-v0")
except gym.error.Error as error:
    bare = type(error).__name__
env = gym.make("mw_envs:MetaWorldMT50-v0")
from mw_envs.simulation import fast_stepping as sawyer
print(json.dumps({
    "bare": bare,
    "tasks": len(env.unwrapped.tasks),
    "drawing": [name for name in ("mujoco.egl", "mujoco.osmesa", "OpenGL") if name in sys.modules],
    "simulators": sawyer.sawyer_class.cache_info().currsize,
}))
"""
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert json.loads(output) == {"bare": "NameNotFound", "tasks": 50, "drawing": [], "simulators": 0}
