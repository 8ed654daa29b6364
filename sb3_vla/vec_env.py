"""A Stable-Baselines3 vector environment with several environments in each worker process.

``SubprocVecEnv`` starts a process for each environment. A simulator's meshes, its OpenGL context and the Python of a
process are then paid for as often; with as many workers as cores and many environments in each they are paid for once
a core, and a worker answers with one message.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import CloudpickleWrapper, DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnv,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)

_CLOSE_SECONDS = 5.0  # how long workers may take to finish a step and close their environments
_TERMINATE_SECONDS = 2.0


class WorkerVecEnv(VecEnv):
    """``n`` environments in a few worker processes, contiguous shares; otherwise as ``DummyVecEnv``.

    A call that finds a step under way (``step_async`` without ``step_wait``, or a ``step`` that Ctrl-C broke off) gives
    up that step's results. An exception in an environment reaches the caller with its traceback and leaves the workers
    running, so that ``reset`` can start anew. Workers end with :meth:`close`, and by themselves when the parent ends.

    ``shares[w]`` are the numbers of worker ``w``'s environments, ``processes[w]`` is its process.

    :param env_fns: callables that make the environments, run in the workers.
    :param num_workers: processes; None for one a core, at most one an environment.
    :param start_method: ``forkserver``, ``spawn`` or ``fork``; None for ``forkserver`` where there is one.
    :raises ValueError: if there is no environment, or ``num_workers`` is less than 1.
    :raises RuntimeError: here and in every method, if an environment fails or a worker dies; the message holds the
        environment's traceback, or the worker's number and exit code.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        num_workers: int | None = None,
        start_method: str | None = None,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers={num_workers}; expected at least 1")
        if len(env_fns) == 0:
            raise ValueError("env_fns is empty; expected at least one environment")
        workers = min(num_workers or available_cores(), len(env_fns))
        if start_method is None:
            start_method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        context: Any = mp.get_context(start_method)
        ends = [len(env_fns) * worker // workers for worker in range(workers + 1)]
        self.shares = [range(start, stop) for start, stop in itertools.pairwise(ends)]
        self._remotes: list[Connection] = []
        self._busy: list[int] = []  # workers whose answer is still to come
        self.processes: list[BaseProcess] = []
        self.waiting = self.closed = False
        try:
            for share in self.shares:
                remote, worker_remote = context.Pipe()
                self._remotes.append(remote)
                # A forked worker inherits the parent's ends of all pipes so far. Left open, they would keep the workers
                # alive after the parent's death.
                inherited = list(self._remotes) if start_method == "fork" else []
                fns = [CloudpickleWrapper(env_fns[i]) for i in share]
                process = context.Process(target=_work, args=(worker_remote, inherited, fns), daemon=True)
                process.start()
                self.processes.append(process)
                worker_remote.close()
            # Each worker begins with an answer that nobody asked for: its spaces, or why it has none.
            self._busy = list(range(workers))
            observation_space, action_space = self._receive()[0]
            super().__init__(len(env_fns), observation_space, action_space)
        except BaseException:
            self.close()
            raise

    def step_async(self, actions: np.ndarray) -> None:
        if len(actions) != self.num_envs:
            raise ValueError(f"Got {len(actions)} actions for {self.num_envs} environments")
        self._send({i: ("step", actions[share.start : share.stop]) for i, share in enumerate(self.shares)})
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        if not self.waiting:
            raise RuntimeError("No step is under way: call step_async() first, and nothing else before step_wait()")
        self.waiting = False
        observations, rewards, dones, infos, reset_infos = zip(*self._receive(), strict=True)
        self.reset_infos = _joined(reset_infos)
        return _stack(observations), np.concatenate(rewards), np.concatenate(dones), _joined(infos)

    def reset(self) -> VecEnvObs:
        pairs = list(zip(self._seeds, self._options, strict=True))
        self._send({i: ("reset", pairs[share.start : share.stop]) for i, share in enumerate(self.shares)})
        observations, reset_infos = zip(*self._receive(), strict=True)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _joined(reset_infos)
        return _stack(observations)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for remote in self._remotes:
            try:
                remote.send(("close", None))
            except OSError:  # the worker is gone already
                pass
            remote.close()  # frees a worker that is about to send a result nobody will read
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
        self._call("set_attr", (attr_name, value), indices)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        return self._call("env_method", (method_name, method_args, method_kwargs), indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._call("env_is_wrapped", wrapper_class, indices)

    def _call(self, command: str, argument: Any, indices: VecEnvIndices) -> list[Any]:
        """Ask the environments of some indices something, answers in the order of the indices."""
        try:  # a range counts negative indices from the end, as a list of environments does
            wanted = [range(self.num_envs)[i] for i in self._get_indices(indices)]
        except IndexError:
            raise IndexError(f"indices={indices} for {self.num_envs} environments") from None
        places = {
            worker: [place for place, i in enumerate(wanted) if i in share]
            for worker, share in enumerate(self.shares)
            if any(i in share for i in wanted)
        }
        self._send(
            {
                worker: (command, (argument, [wanted[place] - self.shares[worker].start for place in of_worker]))
                for worker, of_worker in places.items()
            }
        )
        answers: list[Any] = [None] * len(wanted)
        for of_worker, received in zip(places.values(), self._receive(), strict=True):
            for place, answer in zip(of_worker, received, strict=True):
                answers[place] = answer
        return answers

    def _send(self, messages: Mapping[int, tuple[str, Any]]) -> None:
        if self.closed:
            raise RuntimeError("This WorkerVecEnv is closed")
        self._give_up_answers()
        for worker, message in messages.items():
            try:
                self._remotes[worker].send(message)
            except OSError as error:
                raise self._death(worker) from error
            self._busy.append(worker)

    def _receive(self) -> list[Any]:
        """What the workers that were asked answer; a failure is raised when all have answered, for the next request."""
        answers: list[Any] = []
        failure: Exception | None = None
        while self._busy:
            worker = self._busy[0]
            try:
                received = self._remotes[worker].recv_bytes()
            except (EOFError, OSError):
                failure = failure or self._death(worker)
                received = b""
            del self._busy[0]
            if received:
                error_type, answer = pickle.loads(received)
                if error_type is not None and failure is None:
                    where = f"worker {worker} (environments {self._numbers(worker)})"
                    failure = error_type(f"An environment of {where} failed:\n{answer}")
                answers.append(answer)
        if failure is not None:
            raise failure
        return answers

    def _give_up_answers(self) -> None:
        """Read and forget what a request that was broken off still brings."""
        try:
            self._receive()
        except (RuntimeError, AttributeError):  # a worker that died is reported by the request that is coming
            pass
        self.waiting = False

    def _death(self, worker: int) -> RuntimeError:
        process = self.processes[worker]
        process.join(timeout=1)
        causes: dict[int | None, str] = {
            1: 'Its message stands above; a script must make environments under `if __name__ == "__main__":`, because '
            "workers import it.",
            -signal.SIGKILL: "Mostly memory has run out: use fewer environments or fewer workers.",
        }
        return RuntimeError(
            f"Worker {worker} (environments {self._numbers(worker)}) died with exit code {process.exitcode}. "
            + causes.get(process.exitcode, "Its message, if it left one, stands above.")
        )

    def _numbers(self, worker: int) -> str:
        share = self.shares[worker]
        return f"{share[0]} to {share[-1]}" if len(share) > 1 else str(share[0])


def available_cores() -> int:
    """The CPU cores that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(remote: Connection, inherited: Sequence[Connection], env_fns: Sequence[CloudpickleWrapper]) -> None:
    """A worker's loop: the share is a DummyVecEnv, which resets environments as Stable-Baselines3 does.

    An answer is ``(None, what was asked for)`` or ``(type of the error, its traceback)``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes its workers
    for connection in inherited:
        connection.close()
    envs: DummyVecEnv | None = None
    try:
        try:
            envs = DummyVecEnv([fn.var for fn in env_fns])
            reply = pickle.dumps((None, (envs.observation_space, envs.action_space)))
        except Exception:
            reply = pickle.dumps((RuntimeError, traceback.format_exc()))
        remote.send_bytes(reply)
        while envs is not None:
            request = remote.recv_bytes()
            reply = _reply(envs, request)
            if not reply:
                break
            remote.send_bytes(reply)
    except (EOFError, OSError):  # the parent closed its end or died; environments' own errors do not come here
        pass
    finally:
        if envs is not None:
            envs.close()
        remote.close()


def _reply(envs: DummyVecEnv, request: bytes) -> bytes:
    """The pickled answer to a pickled request; nothing to the request to close."""
    command = ""
    try:
        command, argument = pickle.loads(request)
        return b"" if command == "close" else pickle.dumps((None, _answer(envs, command, argument)))
    except Exception as error:
        # Stable-Baselines3 asks for attributes that there may not be, and catches this.
        missing = command == "get_attr" and isinstance(error, AttributeError)
        return pickle.dumps((AttributeError if missing else RuntimeError, traceback.format_exc()))


def _answer(envs: DummyVecEnv, command: str, argument: Any) -> Any:
    if command == "step":
        observation, rewards, dones, infos = envs.step(argument)
        return observation, rewards, dones, infos, envs.reset_infos
    if command == "reset":
        envs._seeds, envs._options = map(list, zip(*argument, strict=True))
        return envs.reset(), envs.reset_infos
    argument, indices = argument
    if command == "has_attr":
        return [envs.has_attr(argument)] * len(indices)
    if command == "get_attr":
        return envs.get_attr(argument, indices)
    if command == "set_attr":
        name, value = argument
        envs.set_attr(name, value, indices)
        return [None] * len(indices)
    if command == "env_is_wrapped":
        return envs.env_is_wrapped(argument, indices)
    name, args, kwargs = argument
    return envs.env_method(name, *args, indices=indices, **kwargs)


def _stack(observations: Sequence[Any]) -> VecEnvObs:
    if isinstance(observations[0], dict):
        return {key: np.concatenate([observation[key] for observation in observations]) for key in observations[0]}
    if isinstance(observations[0], tuple):
        return tuple(np.concatenate(parts) for parts in zip(*observations, strict=True))
    return np.concatenate(observations)


def _joined(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for part in lists for item in part]
