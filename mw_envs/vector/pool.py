"""A pool of worker processes, with several environments in each and observations in shared memory.

A process for each environment pays for a simulator's meshes, its OpenGL context and the interpreter as often. With as
many workers as cores and many environments in each they are paid for once a core, and a worker answers with one
message. Images do not go through that message but through shared memory, out of which they are copied once.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from mw_envs.errors import InputError
from mw_envs.vector.worker import Arrays, EnvFn, StepResult, Worker, WorkerDiedError, layout_of

_CLOSE_SECONDS = 5.0  # how long workers may take to finish a step and close their environments
_TERMINATE_SECONDS = 2.0
#: consecutive crashes of a worker, without a step between them, after which we give up
MAX_CONSECUTIVE_CRASHES = 3
_CALL = "call"


class WorkerPool:
    """Worker processes, each with a contiguous share of the environments.

    Steps have a ``kind``, by which several may be under way, and run in a part of each worker's environments.

    :ivar shares: numbers of the environments of each worker.
    :ivar observation_space: of one environment; ``action_space`` likewise.
    :ivar started_anew: environments whose worker died, and the info of the reset with which they began in a new one,
        until the caller takes them out or resets.

    :param env_fns: callables that make the environments, run in the workers.
    :param num_workers: processes, at most one for each environment.
    :param start_method: ``forkserver``, ``spawn`` or ``fork``; None for ``forkserver`` where there is one.
    :param autoreset_mode: when an environment whose episode has ended is reset.
    :param preload: modules that a fork server imports once for all workers.
    :param restart_workers: replace a worker that dies, instead of raising.
    :raises ValueError: if there is no environment, or ``num_workers`` is less than 1.
    :raises RuntimeError: here and in every method, if an environment fails, or a worker dies (with
        ``restart_workers``: for the third time without a step between); the message holds the environment's traceback,
        or the worker's number and exit code.
    """

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        num_workers: int,
        start_method: str | None = None,
        *,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        preload: Sequence[str] = (),
        restart_workers: bool = False,
    ) -> None:
        if num_workers < 1:
            raise InputError(f"num_workers={num_workers}; expected at least 1")
        if len(env_fns) == 0:
            raise InputError("env_fns is empty; expected at least one environment")
        workers = min(num_workers, len(env_fns))
        ends = [len(env_fns) * worker // workers for worker in range(workers + 1)]
        self.shares = [range(start, stop) for start, stop in itertools.pairwise(ends)]
        self.num_envs = len(env_fns)
        self.started_anew: dict[int, dict[str, Any]] = {}
        self.closed = False
        self._env_fns = env_fns
        self._autoreset_mode = autoreset_mode
        if start_method is None:
            start_method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        self._context: Any = mp.get_context(start_method)
        if start_method == "forkserver":  # every worker would import for itself, for seconds and 170 MB
            self._context.set_forkserver_preload(["__main__", "mw_envs.vector.worker", *preload])
        self._under_way: set[str] = set()  # kinds of steps
        # By worker: crashes since its last step, and the requests to make of a replacement.
        self._crashes = [0] * workers
        self._settings: list[dict[Any, bytes]] = [{} for _ in range(workers)]
        self.restart_workers = False  # what dies at the start would die again
        self.workers: list[Worker] = []
        try:
            for number in range(workers):
                self.workers.append(self._start(number, again=False))
            started = self._answers("start", dict.fromkeys(range(workers)))
            self._share_memory([observation_space for observation_space, _ in started.values()])
        except BaseException:
            self.close()
            raise
        self.observation_space, self.action_space = started[0]
        self.restart_workers = restart_workers

    def _start(self, number: int, again: bool) -> Worker:
        """A worker with its share of the environments; ``again`` in the place of one that died."""
        share = self.shares[number]
        others = [worker.remote for worker in self.workers if not worker.remote.closed]
        env_fns = self._env_fns[share.start : share.stop]
        return Worker(self._context, number, share, env_fns, self._autoreset_mode, others)

    def _share_memory(self, observation_spaces: Sequence[spaces.Space[Any]]) -> None:
        self._layout = layout_of(observation_spaces[0])
        for worker, space in zip(self.workers, observation_spaces, strict=True):
            if layout_of(space) != self._layout:
                raise InputError(
                    "The environments' observations must have the same shapes and types, but "
                    f"{self.workers[0].name} gives {observation_spaces[0]} and {worker.name} {space}"
                )
            worker.share_memory(self._layout)

    def is_under_way(self, kind: str) -> bool:
        """Whether a step of a kind was begun and neither ended nor given up."""
        return kind in self._under_way

    def begin_step(self, kind: str, parts: Sequence[range], actions: npt.ArrayLike) -> None:
        """Send actions, and let the workers step while the caller does something else.

        :param parts: numbers of the environments that step, for each worker a part of its share.
        :param actions: one for each of them, (environments, *shape of an action).
        :raises ValueError: if the number of actions is another.
        """
        rows = np.asarray(actions)
        count = len(numbers_of(parts))
        if len(rows) != count:
            raise InputError(f"Got {len(rows)} actions for {count} environments")
        self._check_open()
        stop = 0
        for number, part in enumerate(parts):
            start, stop = stop, stop + len(part)
            asked = self._asked(part)
            if asked:
                chosen = rows[start:stop][[part.index(i) for i in asked]]
                request = _request("step", chosen, [i - self.shares[number].start for i in asked])
                try:
                    self.workers[number].post(kind, request)
                except WorkerDiedError:
                    self._replace(number)
        self._under_way.add(kind)

    def end_step(self, kind: str, parts: Sequence[range]) -> dict[int, StepResult]:
        """Wait for a step; results by environment, of all but those that have been started anew.

        :param parts: as given to :meth:`begin_step`.
        """
        try:
            answers = self._answers(kind, dict.fromkeys(range(len(parts))))
        finally:
            self._under_way.discard(kind)
        results: dict[int, StepResult] = {}
        for number, answer in answers.items():
            self._crashes[number] = 0
            results.update(zip(self._asked(parts[number]), answer, strict=True))
        return results

    def give_up_steps(self, *kinds: str) -> None:
        """Wait for steps of these kinds that are under way, and forget their results."""
        for kind in self._under_way.intersection(kinds):
            for worker in self.workers:
                with suppress(WorkerDiedError):  # reported by the request that is coming
                    worker.give_up(kind)
            self._under_way.remove(kind)

    def reset(self, arguments: Mapping[int, tuple[int | None, dict[str, Any] | None]]) -> dict[int, dict[str, Any]]:
        """Reset some environments.

        :param arguments: seed and options by environment, each None to leave it out.
        :return: infos by environment.
        """
        chosen = [[i for i in share if i in arguments] for share in self.shares]
        answers = self._ask(
            {
                number: _request("reset", [arguments[i] for i in part], [i - self.shares[number].start for i in part])
                for number, part in enumerate(chosen)
                if part
            }
        )
        infos = {i: info for number, found in answers.items() for i, info in zip(chosen[number], found, strict=True)}
        for i in infos:
            self.started_anew.pop(i, None)
        return infos

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        indices: Sequence[int] | None = None,
        setting: tuple[str, str] | None = None,
    ) -> list[Any]:
        """Call ``function(env, *arguments)`` in the workers.

        :param function: pickled by reference.
        :param indices: of which environments; None for all.
        :param setting: kind and name of what this sets in an environment, if it is to be set again after a restart.
        :return: answers in the order of the indices.
        """
        wanted = list(range(self.num_envs) if indices is None else indices)
        places = {
            number: [place for place, i in enumerate(wanted) if i in share]
            for number, share in enumerate(self.shares)
            if any(i in share for i in wanted)
        }
        local = {
            number: tuple(wanted[place] - self.shares[number].start for place in of_worker)
            for number, of_worker in places.items()
        }
        requests = {number: _request(_CALL, (function, arguments), local[number]) for number in places}
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

    def observations(self, parts: Sequence[range]) -> Arrays:
        """The caller's own copy of the last observations of a part of each worker's environments.

        :return: by part of the observation space, (environments, *shape).
        """
        found: dict[Any, list[npt.NDArray[Any]]] = {key: [] for key in self._layout}
        for worker, part in zip(self.workers, parts, strict=True):
            for key, array in worker.arrays.items():
                found[key].append(array[part.start - worker.share.start : part.stop - worker.share.start : part.step])
        return {key: np.concatenate(pieces) for key, pieces in found.items()}

    def close(self) -> None:
        """End the workers, those that hang after some seconds by force."""
        if self.closed:
            return
        self.closed = True
        for worker in self.workers:
            try:
                worker.remote.send_bytes(_request("close", None, ()))
            except OSError:  # the worker is gone already
                pass
            worker.remote.close()  # frees a worker that is about to send a result nobody will read
        deadline = time.monotonic() + _CLOSE_SECONDS
        processes = [worker.process for worker in self.workers]
        for process in processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.terminate()
        for process in hanging:
            process.join(timeout=_TERMINATE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for worker in self.workers:
            worker.arrays = {}  # unmaps the memory

    def _ask(self, requests: Mapping[int, bytes]) -> dict[int, Any]:
        """Answers of some workers to a request each, in their order."""
        self._check_open()
        for number, request in requests.items():
            with suppress(WorkerDiedError):  # found again when the answer is wanted
                self.workers[number].post(_CALL, request)
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
                        if not self.workers[number].owes(kind):
                            if request is None:
                                break
                            self.workers[number].post(kind, request)
                        answers[number] = self.workers[number].answer(kind)
                    except WorkerDiedError:
                        self._replace(number)
            except (RuntimeError, AttributeError) as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return answers

    def _asked(self, part: range) -> list[int]:
        """Which of some environments of one worker the present step runs in."""
        return [i for i in part if i not in self.started_anew]

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("This vector environment is closed")

    def _replace(self, number: int) -> None:
        """Put a new worker in the place of one that died; its environments have begun new episodes.

        :raises RuntimeError: if workers are not replaced, or this one dies again and again.
        """
        while True:
            dead = self.workers[number]
            if not self.restart_workers:
                raise RuntimeError(dead.crash_report())
            self._crashes[number] = min(self._crashes[number] + 1, MAX_CONSECUTIVE_CRASHES)
            if self._crashes[number] == MAX_CONSECUTIVE_CRASHES:
                raise RuntimeError(
                    f"{dead.crash_report()} It died {MAX_CONSECUTIVE_CRASHES} times without a step between, so it is "
                    "not replaced again."
                )
            dead.reap()
            self.workers[number] = self._start(number, again=True)
            try:
                self._revive(number)
                return
            except WorkerDiedError:
                pass
            except BaseException:
                self.workers[number].reap()  # it waits for something else than the next request
                raise

    def _revive(self, number: int) -> None:
        """Bring a new worker's environments to where they can be stepped."""
        worker = self.workers[number]
        worker.answer("start")
        worker.share_memory(self._layout)
        reset = _request("reset", [(None, None)] * len(worker.share), range(len(worker.share)))
        for request in (*self._settings[number].values(), reset):
            worker.post(_CALL, request)
            answer = worker.answer(_CALL)
        self.started_anew.update(zip(worker.share, answer, strict=True))


def numbers_of(parts: Sequence[range]) -> list[int]:
    """Numbers of the environments of some parts, one part after another."""
    return [i for part in parts for i in part]


def _request(command: str, argument: Any, indices: Sequence[int]) -> bytes:
    return pickle.dumps((command, argument, indices))
