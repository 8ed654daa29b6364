"""The worker pool as a Gymnasium vector environment."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from mw_envs.errors import InputError
from mw_envs.machine import usable_cores
from mw_envs.vector.pool import WorkerPool
from mw_envs.vector.worker import EnvFn, call_method, get_attr, layout_of

_STEP = "step"


class SharedMemoryVectorEnv(gym.vector.VectorEnv[Any, npt.NDArray[Any], npt.NDArray[Any]]):
    """``n`` environments in a few worker processes, with observations in shared memory; else as ``SyncVectorEnv``.

    Gives the observations, rewards float64 (n,), terminations and truncations bool (n,), and infos of
    :class:`gymnasium.vector.SyncVectorEnv` for the same seeds and actions. An exception in an environment reaches the
    caller with its traceback and leaves the workers running, so that ``reset`` can start anew. Workers end with
    ``close``, and by themselves when the parent ends.

    :param env_fns: callables that make the environments, run in the workers.
    :param autoreset_mode: ``NextStep``: the step after an episode's end ignores its action and resets; ``SameStep``:
        the step that ends an episode resets, with the last observation and info in ``infos["final_obs"]`` and
        ``infos["final_info"]``; ``Disabled``: ``reset(options={"reset_mask": mask})`` resets those of ``mask``.
    :param num_workers: processes; None for one for each core that this process may use, at most one an environment.
    :param start_method: ``forkserver``, ``spawn`` or ``fork``; None for ``forkserver`` where there is one.
    :raises ValueError: if there is no environment, ``num_workers`` is less than 1, ``autoreset_mode`` is unknown, or a
        part of the observation or the action has no fixed shape.
    :raises RuntimeError: here and in every method, if the environments' spaces differ, an environment fails, or a
        worker dies; the message holds the environment's traceback, or the worker's number and exit code.
    """

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_workers: int | None = None,
        start_method: str | None = None,
    ) -> None:
        try:
            mode = AutoresetMode(autoreset_mode)
        except ValueError:
            known = ", ".join(mode.value for mode in AutoresetMode)
            raise InputError(f"autoreset_mode={autoreset_mode!r}; expected one of {known}") from None
        workers = usable_cores() if num_workers is None else num_workers
        self._pool = WorkerPool(env_fns, workers, start_method, autoreset_mode=mode)
        try:
            self.num_envs = len(env_fns)
            self.single_observation_space = self._common("observation_space")
            self.single_action_space = self._common("action_space")
            if isinstance(self.single_action_space, (spaces.Dict, spaces.Tuple)):
                raise InputError(f"The action space is {self.single_action_space}; expected one that is a single array")
            layout_of(self.single_action_space)
            self.observation_space = batch_space(self.single_observation_space, self.num_envs)
            self.action_space = batch_space(self.single_action_space, self.num_envs)
            self.render_mode = self.get_attr("render_mode")[0]
            self.metadata = {**self.get_attr("metadata")[0], "autoreset_mode": mode}
        except BaseException:
            self.close()
            raise

    def _common(self, name: str) -> Any:
        first, *others = self.get_attr(name)
        for number, other in enumerate(others, start=1):
            if other != first:
                raise RuntimeError(
                    f"The environments must have the same {name}, but number {number} has {other} and number 0 {first}"
                )
        return first

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environments.

        :param seed: of each environment, or of the first one, from which the others count up.
        :param options: for all of them; ``reset_mask``, bool (n,), says which ones are reset.
        :return: observations and infos.
        :raises ValueError: if the number of seeds is another, or ``reset_mask`` is no such array or all False.
        """
        seeds = list(range(seed, seed + self.num_envs)) if isinstance(seed, (int, np.integer)) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise InputError(f"Got {len(seeds)} seeds for {self.num_envs} environments")
        chosen = np.ones(self.num_envs, bool)
        if options is not None and "reset_mask" in options:
            chosen = np.asarray(options["reset_mask"])
            options = {name: value for name, value in options.items() if name != "reset_mask"}
            if chosen.shape != (self.num_envs,) or chosen.dtype != np.bool_ or not chosen.any():
                raise InputError(
                    f"options['reset_mask'] is {chosen!r}; expected bool, shape ({self.num_envs},), not all False"
                )
        found = self._pool.reset(
            {i: (None if seeds is None else seeds[i], options) for i in np.flatnonzero(chosen).tolist()}
        )
        infos: dict[str, Any] = {}
        for i, info in found.items():
            infos = self._add_info(infos, info, i)
        return self._observations(), infos

    def step(
        self, actions: npt.NDArray[Any]
    ) -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """Step each environment.

        :param actions: (n, *shape of an action).
        :return: observations, rewards, terminations, truncations and infos.
        :raises ValueError: if the number of actions is another.
        """
        self._pool.give_up_steps(_STEP)  # which Ctrl-C broke off
        self._pool.begin_step(_STEP, self._pool.shares, actions)
        results = self._pool.end_step(_STEP, self._pool.shares)
        infos: dict[str, Any] = {}
        for i, (_, _, _, info, final) in results.items():
            if final is not None:
                infos = self._add_info(infos, {"final_obs": final[0], "final_info": final[1]}, i)
            infos = self._add_info(infos, info, i)
        rewards, terminations, truncations, _, _ = zip(*results.values(), strict=True)
        return (
            self._observations(),
            np.array(rewards, np.float64),
            np.array(terminations, np.bool_),
            np.array(truncations, np.bool_),
            infos,
        )

    def _observations(self) -> Any:
        arrays = self._pool.observations(self._pool.shares)
        if isinstance(self.single_observation_space, spaces.Dict):
            return arrays
        return tuple(arrays.values()) if isinstance(self.single_observation_space, spaces.Tuple) else arrays[None]

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of each environment or of its wrappers.

        :return: what they return; an attribute that is no method is returned itself.
        """
        return tuple(self._pool.call(call_method, name, args, kwargs))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of each environment or of its wrappers.

        :raises AttributeError: if there is none of this name.
        """
        return tuple(self._pool.call(get_attr, name))

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of each environment or of its wrappers.

        :param values: a list or tuple with a value for each environment, or the value for all.
        :raises ValueError: if the number of values is another.
        """
        each = values if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(each) != self.num_envs:
            raise InputError(f"Got {len(each)} values of {name} for {self.num_envs} environments")
        for i, value in enumerate(each):
            self._pool.call(call_method, "set_wrapper_attr", (name, value), {}, indices=[i])

    def render(self) -> tuple[Any, ...]:
        """What each environment renders, such as uint8 (height, width, 3)."""
        return self.call("render")

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each environment's generator."""
        return self.get_attr("np_random_seed")

    @property  # type: ignore[misc]  # as Gymnasium's own vector environments, it has no setter
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Copies of the environments' generators."""
        return self.get_attr("np_random")

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers."""
        self._pool.close()


def make_vector_env(
    num_envs: int,
    *,
    suite: str,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    num_workers: int | None = None,
    start_method: str | None = None,
    **kwargs: Any,
) -> SharedMemoryVectorEnv:
    """MetaWorld environments in worker processes: what ``gym.make_vec("mw_envs:MetaWorldMT50-v0", n)`` calls.

    :param num_envs: number of environments.
    :param suite: ``MT1``, ``MT10``, ``MT50``, ``ML10`` or ``ML45``; an id has its own.
    :param autoreset_mode: and ``num_workers``, ``start_method``: see :class:`SharedMemoryVectorEnv`.
    :param kwargs: of ``gym.make``, so of :class:`mw_envs.env.MetaWorldEnv`.
    :raises ValueError: for a value that does not fit.
    """
    make = functools.partial(gym.make, f"mw_envs:MetaWorld{suite}-v0", disable_env_checker=True, **kwargs)
    make().close()  # an argument that does not fit is told here, and not as the traceback of a worker
    return SharedMemoryVectorEnv(
        [make] * num_envs, autoreset_mode=autoreset_mode, num_workers=num_workers, start_method=start_method
    )
