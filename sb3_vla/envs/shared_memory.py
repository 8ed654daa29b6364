"""Environments in worker processes as a Stable-Baselines3 vector environment."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnv,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)
from stable_baselines3.common.vec_env.patch_gym import _patch_env
from stable_baselines3.common.vec_env.util import dict_to_obs

from mw_envs.machine import usable_cores
from mw_envs.vector.pool import WorkerPool, numbers_of
from mw_envs.vector.worker import Arrays, StepResult, call_method, get_attr
from sb3_vla.common.errors import InputError
from sb3_vla.distributed.ranks import ranks_on_this_machine

_STEP = "step"
_HALF_STEPS = ("step of half 0", "step of half 1")


class SharedMemoryVecEnv(SubprocVecEnv):
    """``n`` environments in a few worker processes, contiguous shares; otherwise as ``DummyVecEnv``.

    ``reset``, and the beginning of a step, give up what an earlier step still brings (``step_async`` without
    ``step_wait``, or a ``step`` that Ctrl-C broke off); other calls leave a step under way alone. An exception in an
    environment reaches the caller with its traceback and leaves the workers running, so that ``reset`` can start anew.
    Workers end with :meth:`close`, and by themselves when the parent ends.

    **Halves.** ``halves`` are the numbers of two halves of the environments, and every worker has a part in both. With
    :meth:`step_half_async` and :meth:`step_half_wait` all workers simulate one half while the caller decides for the
    other. Each environment gets and gives what it would with :meth:`step`.

    **Restarts.** With ``restart_workers=True`` a worker that dies is replaced, and the others notice nothing. What its
    environments were doing is lost: their episodes end in the step that is under way or comes next, as if a time limit
    had cut them, for the death says nothing about the policy. The reward is 0, the ``terminal_observation`` is the last
    observation that the caller got, and the info holds ``worker_restarted=True``, ``TimeLimit.truncated=True`` and
    ``env_steps=0``: nothing is known to have been executed. All else in it is as the caller last got it, and None where
    that is known of an episode's end only (``is_success`` is False). ``dropped_episodes`` counts them. The new
    environments start with a reset without seed and options. What :meth:`set_attr` set, and the last call of each
    method whose name begins with ``set_``, are applied before; any other state of an environment is lost. A request
    other than a step, also a ``reset``, is made again in the new process.

    :ivar shares: numbers of the environments of each worker.
    :ivar dropped_episodes: episodes that ended because their worker died.

    :param env_fns: callables that make the environments, run in the workers.
    :param start_method: ``forkserver``, ``spawn`` or ``fork``; None for ``forkserver`` where there is one.
    :param num_workers: processes; None for one a core, at most one an environment.
    :param restart_workers: replace a worker that dies, instead of raising.
    :raises ValueError: if there is no environment, or ``num_workers`` is less than 1.
    :raises RuntimeError: here and in every method, if an environment fails, or a worker dies (with
        ``restart_workers``: for the third time without a step between); the message holds the environment's traceback,
        or the worker's number and exit code.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        start_method: str | None = None,
        *,
        num_workers: int | None = None,
        restart_workers: bool = False,
    ) -> None:
        self._use(
            WorkerPool(
                [functools.partial(_made_by, env_fn) for env_fn in env_fns],
                available_cores() if num_workers is None else num_workers,
                start_method,
                preload=[__name__],
                restart_workers=restart_workers,
            )
        )

    def _use(self, pool: WorkerPool) -> None:
        self._pool = pool
        # What each kind of step runs: of each worker some environments.
        self._parts = {_STEP: pool.shares, **dict(zip(_HALF_STEPS, _halve(pool.shares), strict=True))}
        self.dropped_episodes = 0
        # By environment the last observation that the caller got, with its row; the last info of its present episode;
        # and what an episode's end tells, once one has ended.
        self._seen: list[tuple[Arrays, int]] = [({}, 0)] * pool.num_envs
        self._told: list[dict[str, Any]] = [{}] * pool.num_envs
        self._told_at_end: dict[str, None] = {"is_success": None}
        try:
            VecEnv.__init__(self, pool.num_envs, pool.observation_space, pool.action_space)
        except BaseException:
            pool.close()
            raise

    @property
    def shares(self) -> list[range]:
        """Numbers of the environments of each worker."""
        return self._pool.shares

    @property
    def processes(self) -> list[BaseProcess]:  # type: ignore[override]
        """The workers' processes."""
        return [worker.process for worker in self._pool.workers]

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """Whether :meth:`close` was called."""
        return self._pool.closed

    @property
    def waiting(self) -> bool:  # type: ignore[override]
        """Whether a step of all environments is under way."""
        return self._pool.is_under_way(_STEP)

    @property
    def halves(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Numbers of the environments of each half, in the order of their actions and results.

        They are the even and the odd numbers, worker after worker; with a single environment the second is empty.
        """
        first, second = (np.array(numbers_of(self._parts[kind]), np.int64) for kind in _HALF_STEPS)
        return first, second

    def step_async(self, actions: np.ndarray) -> None:
        self._pool.give_up_steps(_STEP, *_HALF_STEPS)
        self._pool.begin_step(_STEP, self._parts[_STEP], actions)

    def step_wait(self) -> VecEnvStepReturn:
        if not self.waiting:
            raise RuntimeError("No step is under way: call step_async() first, and not reset() before step_wait()")
        return self._end_step(_STEP)

    def step_half_async(self, half: int, actions: np.ndarray) -> None:
        """Begin a step of a half of the environments, whatever the other half does.

        :param half: 0 or 1.
        :param actions: of the environments ``halves[half]``.
        :raises ValueError: if there is no such half, or the number of actions is wrong.
        """
        kind = _half_step(half)
        self._pool.give_up_steps(_STEP, kind)
        self._pool.begin_step(kind, self._parts[kind], actions)

    def step_half_wait(self, half: int) -> VecEnvStepReturn:
        """Observations, rewards, dones and infos of the environments ``halves[half]``; see :meth:`step_half_async`.

        :raises RuntimeError: if no step of this half is under way.
        """
        kind = _half_step(half)
        if not self._pool.is_under_way(kind):
            raise RuntimeError(f"No step of half {half} is under way: call step_half_async({half}, actions) first")
        return self._end_step(kind)

    def reset(self) -> VecEnvObs:
        self._pool.give_up_steps(_STEP, *_HALF_STEPS)
        pairs = zip(self._seeds, self._options, strict=True)
        infos = self._pool.reset({i: (seed, options or None) for i, (seed, options) in enumerate(pairs)})
        self.reset_infos = list(infos.values())
        self._told = list(self.reset_infos)
        self._reset_seeds()
        self._reset_options()
        return self._observe(self.shares)

    def close(self) -> None:
        self._pool.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"The render mode is {self.render_mode!r}; images need render_mode='rgb_array'.", stacklevel=2
            )
            return [None] * self.num_envs
        return self.env_method("render")

    def has_attr(self, attr_name: str) -> bool:
        return all(self._pool.call(operator.methodcaller("has_wrapper_attr", attr_name)))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._pool.call(get_attr, attr_name, indices=self._numbers(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._pool.call(setattr, attr_name, value, indices=self._numbers(indices), setting=("attribute", attr_name))

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        setting = ("method", method_name) if method_name.startswith("set_") else None
        arguments = (method_name, method_args, method_kwargs)
        return self._pool.call(call_method, *arguments, indices=self._numbers(indices), setting=setting)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._pool.call(is_wrapped, wrapper_class, indices=self._numbers(indices))

    def _numbers(self, indices: VecEnvIndices) -> list[int]:
        try:  # a range counts negative indices from the end, as a list of environments does
            return [range(self.num_envs)[i] for i in self._get_indices(indices)]
        except IndexError:
            raise IndexError(f"indices={indices} for {self.num_envs} environments") from None

    def _end_step(self, kind: str) -> VecEnvStepReturn:
        parts = self._parts[kind]
        found = self._pool.end_step(kind, parts)
        rewards, dones, infos = [], [], []
        for i in numbers_of(parts):
            reward, done, info, reset_info = _as_in_sb3(found[i]) if i in found else self._dropped(i)
            if done:
                self.reset_infos[i], self._told_at_end = reset_info, dict.fromkeys(info)
            self._told[i] = reset_info if done else info
            rewards.append(reward)
            dones.append(done)
            infos.append(info)
        return self._observe(parts), np.array(rewards, np.float32), np.array(dones, bool), infos

    def _dropped(self, i: int) -> tuple[float, bool, dict[str, Any], dict[str, Any]]:
        """The result of a step that ends the episode of an environment whose worker was replaced."""
        self.dropped_episodes += 1
        arrays, row = self._seen[i]
        last = {**self._told_at_end, **self._told[i]}
        if "is_success" in last:
            last["is_success"] = bool(last["is_success"])
        info = {
            **last,
            "worker_restarted": True,
            "env_steps": 0,
            "TimeLimit.truncated": True,
            "terminal_observation": dict_to_obs(
                self.observation_space, {key: array[row].copy() for key, array in arrays.items()}
            ),
        }
        return 0.0, True, info, self._pool.started_anew.pop(i)

    def _observe(self, parts: Sequence[range]) -> VecEnvObs:
        arrays = self._pool.observations(parts)
        if self._pool.restart_workers:
            for row, i in enumerate(numbers_of(parts)):
                self._seen[i] = (arrays, row)
        return dict_to_obs(self.observation_space, dict(arrays))


def available_cores() -> int:
    """The CPU cores that this process may use, at least 1; the ranks of a machine share them."""
    return max(1, usable_cores() // ranks_on_this_machine())


def _made_by(env_fn: Callable[[], gym.Env]) -> gym.Env:
    """An environment, in Gymnasium's interface where it has that of OpenAI's Gym."""
    return _patch_env(env_fn())


def _as_in_sb3(result: StepResult) -> tuple[Any, bool, dict[str, Any], Any]:
    """Reward, whether the episode ended, info and, if so, the info of the reset; as ``DummyVecEnv`` has them."""
    reward, terminated, truncated, info, final = result
    reset_info = None
    if final is not None:
        reset_info, (last_observation, info) = info, final
    info["TimeLimit.truncated"] = truncated and not terminated
    if final is not None:
        info["terminal_observation"] = last_observation
    return reward, final is not None, info, reset_info


def _half_step(half: int) -> str:
    if half not in (0, 1):
        raise InputError(f"half={half}; expected 0 or 1")
    return _HALF_STEPS[half]


def _halve(shares: Sequence[range]) -> tuple[list[range], list[range]]:
    """The even and the odd numbers of each share, so that the halves do not depend on the shares."""
    first, second = ([range(s.start + (s.start + odd) % 2, s.stop, 2) for s in shares] for odd in (0, 1))
    return first, second
