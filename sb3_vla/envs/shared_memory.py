"""A Stable-Baselines3 vector environment with several environments in each worker process and observations in shared
memory.

``SubprocVecEnv`` starts a process for each environment. A simulator's meshes, its OpenGL context and the Python of a
process are then paid for as often; with as many workers as cores and many environments in each they are paid for once
a core, and a worker answers with one message. Pictures do not go through that message but through shared memory, out
of which they are copied once.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnv,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_vla.common.errors import InputError
from sb3_vla.common.machine import usable_cores
from sb3_vla.distributed.ranks import ranks_on_this_machine
from sb3_vla.envs.worker import Arrays, Worker, WorkerDiedError, layout_of

_CLOSE_SECONDS = 5.0  # how long workers may take to finish a step and close their environments
_TERMINATE_SECONDS = 2.0
#: consecutive crashes of a worker, without a step between them, after which we give up
MAX_CONSECUTIVE_CRASHES = 3
_STEP = "step"
_HALF_STEPS = ("step of half 0", "step of half 1")
_CALL = "call"


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
    environments start with a reset without options; where the last reset had seeds, with seeds made from those and the
    number of crashes, so that no trial is repeated. What :meth:`set_attr` set, and the last call of each method whose
    name begins with ``set_``, are applied before; any other state of an environment is lost. A request other than a
    step, also a ``reset``, is made again in the new process.

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
        if num_workers is not None and num_workers < 1:
            raise InputError(f"num_workers={num_workers}; expected at least 1")
        if len(env_fns) == 0:
            raise InputError("env_fns is empty; expected at least one environment")
        workers = min(num_workers or available_cores(), len(env_fns))
        if start_method is None:
            start_method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        ends = [len(env_fns) * worker // workers for worker in range(workers + 1)]
        self.shares = [range(start, stop) for start, stop in itertools.pairwise(ends)]
        self.dropped_episodes = 0
        self.closed = False
        # What each kind of step runs: of each worker some environments.
        self._parts = {_STEP: self.shares, **dict(zip(_HALF_STEPS, _halve(self.shares), strict=True))}
        self._under_way: set[str] = set()  # kinds of steps
        self._env_fns = env_fns
        self._context: Any = mp.get_context(start_method)
        if start_method == "forkserver":  # every worker would import for itself, for seconds and 170 MB
            self._context.set_forkserver_preload(["__main__", "sb3_vla.envs.worker"])
        self._workers: list[Worker] = []
        # By worker: crashes since its last step, replacements, and the requests to make of a replacement.
        self._crashes, self._replaced = [0] * workers, [0] * workers
        self._settings: list[dict[Any, bytes]] = [{} for _ in range(workers)]
        # By environment: the last reset's seed, and the last observation that the caller got, with its row.
        self._seeded: list[int | None] = [None] * len(env_fns)
        self._seen: list[tuple[Arrays, int]] = [({}, 0)] * len(env_fns)
        # By environment the last info of its present episode; and what an episode's end tells, once one has ended.
        self._told: list[dict[str, Any]] = [{}] * len(env_fns)
        self._told_at_end: dict[str, None] = {"is_success": None}
        self._lost: set[int] = set()  # environments that were replaced, of which the caller does not know yet
        self.restart_workers = False  # what dies at the start would die again
        try:
            for number in range(workers):
                self._workers.append(self._start(number))
            started = self._answers("start", dict.fromkeys(range(workers)))
            self._share_memory([observation_space for observation_space, _ in started.values()])
            VecEnv.__init__(self, len(env_fns), *started[0])
        except BaseException:
            self.close()
            raise
        self.restart_workers = restart_workers

    @property
    def processes(self) -> list[BaseProcess]:  # type: ignore[override]
        """The workers' processes."""
        return [worker.process for worker in self._workers]

    @property
    def waiting(self) -> bool:  # type: ignore[override]
        """Whether a step of all environments is under way."""
        return _STEP in self._under_way

    @property
    def halves(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Numbers of the environments of each half, in the order of their actions and results.

        They are the even and the odd numbers, worker after worker; with a single environment the second is empty.
        """
        first, second = (np.array(_numbers(self._parts[kind]), np.int64) for kind in _HALF_STEPS)
        return first, second

    def step_async(self, actions: np.ndarray) -> None:
        self._give_up_steps(_STEP, *_HALF_STEPS)
        self._begin_step(_STEP, actions)

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
        self._give_up_steps(_STEP, kind)
        self._begin_step(kind, actions)

    def step_half_wait(self, half: int) -> VecEnvStepReturn:
        """Observations, rewards, dones and infos of the environments ``halves[half]``; see :meth:`step_half_async`.

        :raises RuntimeError: if no step of this half is under way.
        """
        kind = _half_step(half)
        if kind not in self._under_way:
            raise RuntimeError(f"No step of half {half} is under way: call step_half_async({half}, actions) first")
        return self._end_step(kind)

    def reset(self) -> VecEnvObs:
        self._give_up_steps(_STEP, *_HALF_STEPS)
        pairs = list(zip(self._seeds, self._options, strict=True))
        answers = self._ask(
            {
                number: _request("reset", pairs[share.start : share.stop], range(len(share)))
                for number, share in enumerate(self.shares)
            }
        )
        self.reset_infos = [info for infos in answers.values() for info in infos]
        self._told = list(self.reset_infos)
        self._seeded = list(self._seeds)
        self._reset_seeds()
        self._reset_options()
        self._lost.clear()
        return self._observe(self.shares)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for worker in self._workers:
            try:
                worker.remote.send_bytes(_request("close", None, ()))
            except OSError:  # the worker is gone already
                pass
            worker.remote.close()  # frees a worker that is about to send a result nobody will read
        deadline = time.monotonic() + _CLOSE_SECONDS
        for process in self.processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.terminate()
        for process in hanging:
            process.join(timeout=_TERMINATE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for worker in self._workers:
            worker.arrays = {}  # unmaps the memory

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"The render mode is {self.render_mode!r}; images need render_mode='rgb_array'.", stacklevel=2
            )
            return [None] * self.num_envs
        return self.env_method("render")

    def has_attr(self, attr_name: str) -> bool:
        return all(self._call("has_attr", attr_name, None))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._call("get_attr", attr_name, indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._call("set_attr", (attr_name, value), indices, setting=("attribute", attr_name))

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        setting = ("method", method_name) if method_name.startswith("set_") else None
        return self._call("env_method", (method_name, method_args, method_kwargs), indices, setting)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._call("env_is_wrapped", wrapper_class, indices)

    def _call(
        self, command: str, argument: Any, indices: VecEnvIndices, setting: tuple[str, str] | None = None
    ) -> list[Any]:
        """Ask the environments of some indices something, answers in the order of the indices.

        :param setting: kind and name of what this sets in an environment.
        """
        try:  # a range counts negative indices from the end, as a list of environments does
            wanted = [range(self.num_envs)[i] for i in self._get_indices(indices)]
        except IndexError:
            raise IndexError(f"indices={indices} for {self.num_envs} environments") from None
        places = {
            number: [place for place, i in enumerate(wanted) if i in share]
            for number, share in enumerate(self.shares)
            if any(i in share for i in wanted)
        }
        local = {
            number: tuple(wanted[place] - self.shares[number].start for place in of_worker)
            for number, of_worker in places.items()
        }
        requests = {number: _request(command, argument, local[number]) for number in places}
        received = self._ask(requests)
        if setting is not None and self.restart_workers:
            for number, request in requests.items():
                settings, key = self._settings[number], (*setting, local[number])
                settings.pop(key, None)  # what was set last is also set again last
                settings[key] = request
        answers: list[Any] = [None] * len(wanted)
        for number, of_worker in places.items():
            for place, answer in zip(of_worker, received[number], strict=True):
                answers[place] = answer
        return answers

    def _ask(self, requests: Mapping[int, bytes]) -> dict[int, Any]:
        """Answers of some workers to a request each, in their order."""
        self._check_open()
        for number, request in requests.items():
            with suppress(WorkerDiedError):  # found again when the answer is wanted
                self._workers[number].post(_CALL, request)
        return self._answers(_CALL, requests)

    def _answers(self, kind: str, requests: Mapping[int, bytes | None]) -> dict[int, Any]:
        """Wait for some workers' answers; a failure is raised when all have answered.

        :param requests: what to ask a worker that does not owe this answer, None to leave it out.
        """
        answers: dict[int, Any] = {}
        failure: Exception | None = None
        for number, request in requests.items():
            try:
                while number not in answers:
                    try:
                        if not self._workers[number].owes(kind):
                            if request is None:
                                break
                            self._workers[number].post(kind, request)
                        answers[number] = self._workers[number].answer(kind)
                    except WorkerDiedError:
                        self._replace(number)
            except (RuntimeError, AttributeError) as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return answers

    def _begin_step(self, kind: str, actions: np.ndarray) -> None:
        parts = self._parts[kind]
        count = len(_numbers(parts))
        if len(actions) != count:
            raise InputError(f"Got {len(actions)} actions for {count} environments")
        self._check_open()
        actions, stop = np.asarray(actions), 0
        for number, part in enumerate(parts):
            start, stop = stop, stop + len(part)
            asked = self._asked(part)
            if asked:
                chosen = actions[start:stop][[part.index(i) for i in asked]]
                request = _request("step", chosen, [i - self.shares[number].start for i in asked])
                try:
                    self._workers[number].post(kind, request)
                except WorkerDiedError:
                    self._replace(number)
        self._under_way.add(kind)

    def _end_step(self, kind: str) -> VecEnvStepReturn:
        parts = self._parts[kind]
        try:
            answers = self._answers(kind, dict.fromkeys(range(len(parts))))
        except Exception:
            self._under_way.discard(kind)
            raise
        self._under_way.discard(kind)
        # Reward, done, info, and the info of a reset.
        results: dict[int, tuple[Any, bool, Any, Any]] = {}
        for number, answer in answers.items():
            self._crashes[number] = 0
            results.update(zip(self._asked(parts[number]), answer, strict=True))
        numbers = _numbers(parts)
        for i in numbers:
            if i not in results:
                results[i] = self._dropped(i)
            _, done, info, reset_info = results[i]
            if done:
                self.reset_infos[i], self._told_at_end = reset_info, dict.fromkeys(info)
            self._told[i] = reset_info if done else info
        rewards, dones, infos, _ = zip(*(results[i] for i in numbers), strict=True)
        return self._observe(parts), np.array(rewards, np.float32), np.array(dones, bool), list(infos)

    def _asked(self, part: range) -> list[int]:
        """Which of some environments of one worker the present step runs in."""
        return [i for i in part if i not in self._lost]

    def _dropped(self, i: int) -> tuple[float, bool, dict[str, Any], dict[str, Any]]:
        """The result of a step that ends the episode of an environment which was replaced."""
        self._lost.remove(i)
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
        return 0.0, True, info, self.reset_infos[i]

    def _observe(self, parts: Sequence[range]) -> VecEnvObs:
        """The caller's own copy of the last observations of a part of each worker's environments."""
        found: dict[Any, list[np.ndarray]] = {key: [] for key in self._layout}
        for worker, part in zip(self._workers, parts, strict=True):
            for key, array in worker.arrays.items():
                found[key].append(array[part.start - worker.share.start : part.stop - worker.share.start : part.step])
        arrays = {key: np.concatenate(pieces) for key, pieces in found.items()}
        if self.restart_workers:
            for row, i in enumerate(_numbers(parts)):
                self._seen[i] = (arrays, row)
        return dict_to_obs(self.observation_space, dict(arrays))

    def _give_up_steps(self, *kinds: str) -> None:
        for kind in self._under_way.intersection(kinds):
            for worker in self._workers:
                with suppress(WorkerDiedError):  # reported by the request that is coming
                    worker.give_up(kind)
            self._under_way.remove(kind)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("This SharedMemoryVecEnv is closed")

    def _start(self, number: int) -> Worker:
        share = self.shares[number]
        others = [worker.remote for worker in self._workers if not worker.remote.closed]
        return Worker(self._context, number, share, self._env_fns[share.start : share.stop], others)

    def _share_memory(self, observation_spaces: Sequence[spaces.Space[Any]]) -> None:
        self._layout = layout_of(observation_spaces[0])
        for worker, space in zip(self._workers, observation_spaces, strict=True):
            if layout_of(space) != self._layout:
                raise InputError(
                    "The environments' observations must have the same shapes and types, but "
                    f"{self._workers[0].name} gives {observation_spaces[0]} and {worker.name} {space}"
                )
            worker.share_memory(self._layout)

    def _replace(self, number: int) -> None:
        """Put a new worker in the place of one that died; its environments have begun new episodes.

        :raises RuntimeError: if workers are not replaced, or this one dies again and again.
        """
        while True:
            dead = self._workers[number]
            if not self.restart_workers:
                raise RuntimeError(dead.crash_report())
            self._crashes[number] = min(self._crashes[number] + 1, MAX_CONSECUTIVE_CRASHES)
            if self._crashes[number] == MAX_CONSECUTIVE_CRASHES:
                raise RuntimeError(
                    f"{dead.crash_report()} It died {MAX_CONSECUTIVE_CRASHES} times without a step between, so it is "
                    "not replaced again."
                )
            dead.reap()
            self._replaced[number] += 1
            self._workers[number] = self._start(number)
            try:
                self._revive(number)
                return
            except WorkerDiedError:
                pass
            except BaseException:
                self._workers[number].reap()  # it waits for something else than the next request
                raise

    def _revive(self, number: int) -> None:
        """Bring a new worker's environments to where they can be stepped."""
        worker = self._workers[number]
        worker.answer("start")
        worker.share_memory(self._layout)
        seeds = [_seed_after_crashes(self._seeded[i], self._replaced[number]) for i in worker.share]
        reset = _request("reset", [(seed, {}) for seed in seeds], range(len(seeds)))
        for request in (*self._settings[number].values(), reset):
            worker.post(_CALL, request)
            answer = worker.answer(_CALL)
        self.reset_infos[worker.share.start : worker.share.stop] = answer
        self._lost.update(worker.share)


def available_cores() -> int:
    """The CPU cores that this process may use, at least 1; the ranks of a machine share them."""
    return max(1, usable_cores() // ranks_on_this_machine())


def _request(command: str, argument: Any, indices: Sequence[int]) -> bytes:
    return pickle.dumps((command, argument, indices))


def _seed_after_crashes(seed: int | None, crashes: int) -> int | None:
    return None if seed is None else int(np.random.SeedSequence([seed, crashes]).generate_state(1)[0])


def _numbers(parts: Sequence[range]) -> list[int]:
    return [i for part in parts for i in part]


def _half_step(half: int) -> str:
    if half not in (0, 1):
        raise InputError(f"half={half}; expected 0 or 1")
    return _HALF_STEPS[half]


def _halve(shares: Sequence[range]) -> tuple[list[range], list[range]]:
    """The even and the odd numbers of each share, so that the halves do not depend on the shares."""
    first, second = ([range(s.start + (s.start + odd) % 2, s.stop, 2) for s in shares] for odd in (0, 1))
    return first, second
