"""With Stable-Baselines3's own policies, PPO is its PPO bit for bit: everything that either holds or has drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import (
    FakeImageEnv,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_vla import PPO, SharedMemoryVecEnv

Make = Callable[[], VecEnv]


def pendulum() -> gym.Env:
    # Episodes that a limit cuts within a rollout, so that their last observations are bootstrapped.
    return Monitor(gym.make("Pendulum-v1", max_episode_steps=11))


def cartpole() -> gym.Env:
    return Monitor(gym.make("CartPole-v1"))


class Seeded(gym.Wrapper):
    """Stable-Baselines3's toy environments draw from their spaces, which a reset does not seed."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self.observation_space.seed(seed)
            self.action_space.seed(seed)
        return self.env.reset(seed=seed, options=options)


def pictures(discrete: bool = True) -> gym.Env:
    return Seeded(FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=discrete))


def classes() -> gym.Env:
    return Seeded(IdentityEnvMultiDiscrete(dim=3, ep_length=9))


def bits() -> gym.Env:
    return Seeded(IdentityEnvMultiBinary(dim=3, ep_length=9))


def maze() -> gym.Env:
    np.random.seed(0)  # its pictures are drawn as it is made
    return SimpleMultiObsEnv(random_start=True)


class Words(gym.Env):
    """Every kind of observation that stock policies preprocess otherwise: pictures, numbers, classes, bits."""

    observation_space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (36, 36, 3), np.uint8),
            "state": spaces.Box(-np.inf, np.inf, (3,), np.float32),
            "word": spaces.MultiDiscrete([5, 4]),
            "bits": spaces.MultiBinary(3),
        }
    )
    action_space = spaces.Box(-1, 1, (1, 4), np.float32)  # a chunk of one action

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.elapsed = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> Any:
        self.elapsed += 1
        observation = self.observation_space.sample()
        reward = float((action * observation["state"][0]).sum())
        return observation, reward, self.elapsed == 7, False, {"is_success": reward > 0}


def dummy(make: Callable[[], gym.Env], count: int = 2) -> VecEnv:
    return DummyVecEnv([make] * count)


CASES: dict[str, tuple[str, Make, dict[str, Any]]] = {
    "box": ("MlpPolicy", partial(dummy, pendulum), {}),
    "discrete": ("MlpPolicy", partial(dummy, cartpole), {}),
    "multi-discrete": ("MlpPolicy", partial(dummy, classes), {}),
    "multi-binary": ("MlpPolicy", partial(dummy, bits), {}),
    "pictures": ("CnnPolicy", partial(dummy, pictures), {"n_epochs": 1}),
    "pictures, box": ("CnnPolicy", partial(dummy, partial(pictures, discrete=False)), {"n_epochs": 1}),
    "frame stack": ("CnnPolicy", lambda: VecFrameStack(dummy(pictures), 3), {"n_epochs": 1}),
    "dict": ("MultiInputPolicy", partial(dummy, maze), {"n_epochs": 1}),
    "dict of all kinds": ("MultiInputPolicy", partial(dummy, Words), {"n_epochs": 1}),
    "gSDE": ("MlpPolicy", partial(dummy, pendulum), {"use_sde": True, "sde_sample_freq": 4}),
    "squashed gSDE": (
        "MlpPolicy",
        partial(dummy, pendulum),
        {"use_sde": True, "policy_kwargs": {"squash_output": True, "net_arch": [8]}},
    ),
    "VecNormalize": ("MlpPolicy", lambda: VecNormalize(dummy(pendulum)), {}),
    "VecMonitor": ("MultiInputPolicy", lambda: VecMonitor(dummy(Words)), {"n_epochs": 1}),
    "SubprocVecEnv": ("MlpPolicy", lambda: SubprocVecEnv([pendulum] * 2, "fork"), {}),
    "SharedMemoryVecEnv": ("MultiInputPolicy", lambda: SharedMemoryVecEnv([Words] * 2, "fork"), {"n_epochs": 1}),
    "one epoch": ("MlpPolicy", partial(dummy, pendulum), {"n_epochs": 1}),
    "target_kl": ("MlpPolicy", partial(dummy, pendulum), {"target_kl": 1e-3, "learning_rate": 3e-3}),
    "value clip": ("MlpPolicy", partial(dummy, pendulum), {"clip_range_vf": 0.1, "ent_coef": 0.01}),
    "raw advantages": ("MlpPolicy", partial(dummy, pendulum), {"normalize_advantage": False, "max_grad_norm": 5.0}),
    "schedules": (
        "MlpPolicy",
        partial(dummy, pendulum),
        {
            "learning_rate": lambda left: 1e-3 * left,
            "clip_range": lambda left: 0.1 + 0.1 * left,
            "clip_range_vf": lambda left: 0.2 + left,
        },
    ),
    "a remainder": ("MlpPolicy", partial(dummy, pendulum), {"batch_size": 24}),
    "an environment's name": ("MlpPolicy", "CartPole-v1", {}),  # type: ignore[dict-item]
}


class Rows(KVWriter):
    """Keeps what is logged, without what a clock says."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        clocks = ("time/fps", "time/time_elapsed")
        self.rows.append({"step": step, **{k: v for k, v in key_values.items() if k not in clocks}})

    def close(self) -> None: ...


class Buffers(BaseCallback):
    """Keeps every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        names = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")
        rollout = {name: getattr(buffer, name) for name in names}
        self.rollouts.append(torch.utils._pytree.tree_map(np.copy, rollout))


def everything(algorithm_class: type[stable_baselines3.PPO], case: str, second: int) -> dict[str, Any]:
    """What a training holds at its end; both draw from global generators, which the constructor seeds."""
    policy, make, options = CASES[case]
    env: Any = make() if callable(make) else make
    rows, buffers = Rows(), Buffers()
    algorithm = algorithm_class(
        policy,
        env,
        **{"n_steps": 16, "batch_size": 8, "n_epochs": 3, "seed": 3, "device": "cpu", **options},  # type: ignore[arg-type]
    )
    algorithm.set_logger(Logger(None, [rows]))
    try:
        algorithm.learn(64, buffers)
        algorithm.learn(second, buffers, reset_num_timesteps=False)
        assert algorithm.env is not None
        normalize = algorithm.get_vec_normalize_env()
        return {
            "weights": algorithm.policy.state_dict(),
            "optimizer": algorithm.policy.optimizer.state_dict(),
            "rollouts": buffers.rollouts,
            "logged": rows.rows,
            "last logged": {k: v for k, v in algorithm.logger.name_to_value.items() if not k.startswith("time/")},
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "random": random.getstate(),
            "action space": algorithm.action_space.np_random.bit_generator.state,
            "drawn from it": [algorithm.action_space.sample() for _ in range(2)],
            "last observation": algorithm._last_obs,
            "next observations": [algorithm.env.step([algorithm.action_space.sample()] * algorithm.n_envs)[0]],
            "normalization": [] if normalize is None else [normalize.obs_rms.mean, normalize.ret_rms.var],  # type: ignore[union-attr]
            "episodes": [{k: v for k, v in e.items() if k != "t"} for e in algorithm.ep_info_buffer or ()],
            "successes": list(algorithm.ep_success_buffer or ()),
            "counters": (algorithm.num_timesteps, algorithm._n_updates, algorithm._current_progress_remaining),
        }
    finally:
        if algorithm.env is not None:
            algorithm.env.close()


def differences(one: Any, two: Any, place: str = "") -> list[str]:
    """Where two nested values are not the same to the last bit, NaN included."""
    if type(one) is not type(two):
        return [f"{place}: {type(one)} and {type(two)}"]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{place}: {sorted(map(str, one))} and {sorted(map(str, two))}"]
        return [d for key in one for d in differences(one[key], two[key], f"{place}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [f"{place}: {len(one)} and {len(two)} items"]
        return [d for i, pair in enumerate(zip(one, two, strict=True)) for d in differences(*pair, f"{place}/{i}")]
    if isinstance(one, (torch.Tensor, np.ndarray, float, np.generic)):
        one, two = np.asarray(one), np.asarray(two)
        same = one.shape == two.shape and one.dtype == two.dtype and one.tobytes() == two.tobytes()
        return [] if same else [f"{place}: {one} and {two}"]
    return [] if one == two else [f"{place}: {one} and {two}"]


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("case", CASES)
def test_stock_policies_learn_as_in_stable_baselines3_bit_for_bit(case: str) -> None:
    ours = everything(PPO, case, second=64)
    theirs = everything(stable_baselines3.PPO, case, second=64)
    assert differences(ours, theirs) == []
    assert len(theirs["rollouts"]) == theirs["counters"][0] // theirs["rollouts"][0]["rewards"].size >= 4
    assert len(theirs["logged"]) == len(theirs["rollouts"]) and len(theirs["logged"][-1]) >= 8
    if case == "target_kl":  # it stopped some
        assert theirs["counters"][1] < 3 * len(theirs["rollouts"])


@pytest.mark.parametrize("change", [{"seed": 4}, {"learning_rate": 3.01e-4}, {"n_epochs": 2}])
def test_the_comparison_sees_small_changes(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, make, options = CASES["box"]
    monkeypatch.setitem(CASES, "changed", (policy, make, {**options, **change}))
    found = differences(everything(PPO, "changed", 64), everything(PPO, "box", 64))
    assert any(difference.startswith("/weights") for difference in found)


@pytest.mark.parametrize("force_reset", [True, False])
@pytest.mark.parametrize("case", ["box", "dict of all kinds", "schedules"])
def test_saved_with_the_one_and_loaded_with_the_other_it_goes_on_bit_for_bit(
    tmp_path: Path, case: str, force_reset: bool
) -> None:
    found = []
    for first, second in ((PPO, stable_baselines3.PPO), (stable_baselines3.PPO, PPO)):
        policy, make, options = CASES[case]
        env = make()
        options = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 3, "device": "cpu", **options}
        first(policy, env, **options).learn(64).save(tmp_path / "saved")
        loaded = second.load(tmp_path / "saved", env, "cpu", force_reset=force_reset)
        assert type(loaded) is second and (loaded._last_obs is None) is force_reset
        loaded.learn(64, reset_num_timesteps=False)
        assert loaded.num_timesteps == 128
        found.append([loaded.policy.state_dict(), loaded.policy.optimizer.state_dict(), torch.get_rng_state()])
        env.close()
    assert differences(*found) == []
