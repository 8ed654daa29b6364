"""A worker process of :class:`~sb3_vla.SharedMemoryVecEnv`, from both ends.

Requests and answers go through a pipe, pickled. Observations lie in memory that both processes map; it has no name in
any file system, so the kernel frees it when the last of them ends, in whatever way.
"""

from __future__ import annotations

import functools
import gc
import math
import mmap
import os
import pickle
import signal
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.vec_env import CloudpickleWrapper, DummyVecEnv
from stable_baselines3.common.vec_env.util import obs_space_info

from sb3_vla.common.errors import InputError

Layout = dict[Any, tuple[tuple[int, ...], np.dtype[Any]]]
Arrays = dict[Any, npt.NDArray[Any]]

# A pipe takes this much beside a message of the same size that nobody has read yet, so that sending does not wait.
_SURELY_BUFFERED_BYTES = 32 * 1024
_ALIGNMENT_BYTES = 64


class WorkerDiedError(Exception):
    """A worker process ended without having been asked to."""


class Worker:
    """The parent's end: starts the process, sends requests, takes answers.

    A worker answers requests in the order in which they came. A request has a ``kind``; several may be under way, one
    of a kind. Answers are kept until somebody asks for them.

    :param context: of multiprocessing.
    :param number: the worker's number, for messages.
    :param share: numbers of its environments.
    :param env_fns: callables that make them.
    :param inherited: ends of other pipes that a forked process inherits and must close: left open, they would keep
        workers alive after the parent's death.
    """

    def __init__(
        self,
        context: Any,
        number: int,
        share: range,
        env_fns: Sequence[Callable[[], gym.Env]],
        inherited: Sequence[Connection],
    ) -> None:
        self._expect_start(number, share)
        self.remote, worker_remote = context.Pipe()
        inherited = [*inherited, self.remote] if context.get_start_method() == "fork" else []
        arguments = (worker_remote, inherited, [CloudpickleWrapper(env_fn) for env_fn in env_fns])
        self.process: BaseProcess = context.Process(target=work, args=arguments, daemon=True)
        try:
            self.process.start()
        except BaseException:
            self.remote.close()
            raise
        finally:
            worker_remote.close()

    def _expect_start(self, number: int, share: range) -> None:
        self.share = share
        first_to_last = f"{share[0]} to {share[-1]}" if len(share) > 1 else str(share[0])
        self.name = f"worker {number} (environments {first_to_last})"
        # A worker begins with an answer that nobody asked for: its spaces, or why it has none.
        self._owed: deque[str] = deque(["start"])
        self._answers: dict[str, bytes] = {}
        self.arrays: Arrays = {}

    def share_memory(self, layout: Layout) -> None:
        """Give the worker memory for its observations, ``arrays`` here; to be called once, after it has started."""
        memory = _allocate(layout, len(self.share))
        try:
            self.arrays = _map_arrays(memory, layout, len(self.share))
            with suppress(OSError):  # the worker is gone; the next request finds out
                send_handle(self.remote, memory, self.process.pid)
        finally:
            os.close(memory)

    def post(self, kind: str, request: bytes) -> None:
        """Send a request; one of the same kind that was broken off is given up.

        :raises WorkerDiedError: if the worker cannot read it.
        """
        self.give_up(kind)
        if len(request) > _SURELY_BUFFERED_BYTES:
            self._read_until(lambda: not self._owed)  # else both ends could wait for the other to read
        self._send(request)
        self._owed.append(kind)

    def owes(self, kind: str) -> bool:
        """Whether a request of this kind was posted whose answer nobody took yet."""
        return kind in self._owed or kind in self._answers

    def answer(self, kind: str) -> Any:
        """Wait for the answer to the posted request of a kind.

        :raises WorkerDiedError: if the worker died before it gave one.
        :raises RuntimeError: if an environment failed; AttributeError if it lacks the attribute asked for.
        """
        self._read_until(lambda: kind in self._answers)
        error_type, answer = pickle.loads(self._answers.pop(kind))
        if error_type is not None:
            raise error_type(f"An environment of {self.name} failed:\n{answer}")
        return answer

    def give_up(self, kind: str) -> None:
        """Read and forget the answer to a request that was broken off.

        :raises WorkerDiedError: if the worker died meanwhile.
        """
        if self.owes(kind):
            self._read_until(lambda: kind in self._answers)
            del self._answers[kind]

    def crash_report(self) -> str:
        """How the worker died, for an error's message."""
        self.process.join(timeout=1)
        causes: dict[int | None, str] = {
            1: 'Its message stands above; a script must make environments under `if __name__ == "__main__":`, because '
            "workers import it.",
            -signal.SIGKILL: "Mostly memory has run out: use fewer environments or fewer workers.",
        }
        return f"{self.name.capitalize()} died with exit code {self.process.exitcode}. " + causes.get(
            self.process.exitcode, "Its message, if it left one, stands above."
        )

    def reap(self) -> None:
        """Make sure that a worker which closed its pipe has also ended."""
        self.remote.close()
        self.process.kill()
        self.process.join()

    def _read_until(self, satisfied: Callable[[], bool]) -> None:
        while not satisfied():
            received = self._receive()
            self._answers[self._owed.popleft()] = received

    def _send(self, request: bytes) -> None:
        try:
            self.remote.send_bytes(request)
        except OSError as error:
            raise WorkerDiedError from error

    def _receive(self) -> bytes:
        try:
            return self.remote.recv_bytes()
        except (EOFError, OSError) as error:
            raise WorkerDiedError from error


def layout_of(space: spaces.Space[Any]) -> Layout:
    """Shapes and types of an observation's arrays, by key of a ``Dict``, index of a ``Tuple``, or None.

    :raises ValueError: if a part of the space has no fixed shape.
    """
    keys, shapes, dtypes = obs_space_info(space)
    for key in keys:
        if shapes[key] is None or dtypes[key] is None:
            part = space if key is None else space[key]  # type: ignore[index]
            raise InputError(
                f"The observation space's part {key!r} is {part}; expected a Box, Discrete, MultiDiscrete or "
                "MultiBinary, which have a fixed shape. Text fits as bytes: Box(0, 255, (length,), np.uint8)"
            )
    return {key: (tuple(shapes[key]), np.dtype(dtypes[key])) for key in keys}


def _allocate(layout: Layout, count: int) -> int:
    """File descriptor of nameless memory for ``count`` observations."""
    if hasattr(os, "memfd_create"):  # not bounded by the size of /dev/shm, which containers make small
        memory = os.memfd_create("observations")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, max(1, sum(_sizes(layout, count))))
    return memory


def _map_arrays(memory: int, layout: Layout, count: int) -> Arrays:
    """The memory as arrays (count, *shape); it stays mapped as long as they exist."""
    mapped = mmap.mmap(memory, 0)
    offsets = np.cumsum([0, *_sizes(layout, count)]).tolist()
    return {
        key: np.ndarray((count, *shape), dtype, mapped, offset)
        for (key, (shape, dtype)), offset in zip(layout.items(), offsets, strict=False)
    }


def _sizes(layout: Layout, count: int) -> list[int]:
    sizes = [count * math.prod(shape) * dtype.itemsize for shape, dtype in layout.values()]
    return [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes]


def work(remote: Connection, inherited: Sequence[Connection], env_fns: Sequence[CloudpickleWrapper]) -> None:
    """The process itself. An answer is ``(None, what was asked for)`` or ``(type of the error, its traceback)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes its workers
    for connection in inherited:
        connection.close()
    # What a forking parent left uncollected is not this process's: the end of a process group, for one, waits for
    # threads that a fork lacks.
    gc.freeze()
    envs: Share | None = None
    try:
        envs, reply = make_share(env_fns)
        remote.send_bytes(reply)
        if envs is not None:
            envs.share_memory(recv_handle(remote))
            while reply := envs.reply(remote.recv_bytes()):
                remote.send_bytes(reply)
    except (EOFError, OSError):  # the parent closed its end or died; environments' own errors do not come here
        pass
    finally:
        if envs is not None:
            envs.close()
        remote.close()


def make_share(env_fns: Sequence[CloudpickleWrapper]) -> tuple[Share | None, bytes]:
    """A worker's environments, and its first answer: their spaces. If one cannot be made, nothing and why."""
    try:
        envs = Share([fn.var for fn in env_fns])
        return envs, pickle.dumps((None, (envs.observation_space, envs.action_space)))
    except Exception:
        return None, pickle.dumps((RuntimeError, traceback.format_exc()))


class Share(DummyVecEnv):
    """A worker's environments, of which each can be reset and stepped without the others."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        super().__init__([functools.partial(_checked, env_fn) for env_fn in env_fns])
        self.layout = layout_of(self.observation_space)
        for number, env in enumerate(self.envs):
            if layout_of(env.observation_space) != self.layout:
                raise InputError(
                    f"The environments' observations must have the same shapes and types, but number {number} of this "
                    f"worker gives {env.observation_space} and number 0 {self.observation_space}"
                )

    def share_memory(self, memory: int) -> None:
        """Write observations into this memory from now on."""
        self.buf_obs = _map_arrays(memory, self.layout, self.num_envs)  # type: ignore[assignment]
        os.close(memory)

    def _save_obs(self, env_idx: int, obs: Any) -> None:
        """As in Stable-Baselines3, but what the space cannot hold is told: a picture in 0..1 would be black."""
        for key, stored in self.buf_obs.items():
            given = np.asarray(obs if key is None else obs[key])
            if given.dtype.kind == "f" and stored.dtype.kind in "iu" and (given % 1 != 0).any():
                named = "The observation" if key is None else f"The observation's {key}"
                raise InputError(
                    f"{named} has type {given.dtype} with numbers that are not whole, but its space has "
                    f"{stored.dtype}; give it as the space says, such as (255 * image).round().astype(np.uint8)"
                )
        super()._save_obs(env_idx, obs)

    def reply(self, request: bytes) -> bytes:
        """The pickled answer to a pickled request; nothing to the request to close."""
        command = ""
        try:
            command, argument, indices = pickle.loads(request)
            return b"" if command == "close" else pickle.dumps((None, self._answer(command, argument, indices)))
        except Exception as error:
            # Stable-Baselines3 asks for attributes that there may not be, and catches this.
            missing = command == "get_attr" and isinstance(error, AttributeError)
            return pickle.dumps((AttributeError if missing else RuntimeError, traceback.format_exc()))

    def _answer(self, command: str, argument: Any, indices: Sequence[int]) -> Any:
        if command == "step":
            return self._step(indices, argument)
        if command == "reset":
            return [self._reset(i, *pair) for i, pair in zip(indices, argument, strict=True)]
        if command == "has_attr":
            return [self.has_attr(argument)] * len(indices)
        if command == "get_attr":
            return self.get_attr(argument, indices)
        if command == "set_attr":
            name, value = argument
            self.set_attr(name, value, indices)
            return [None] * len(indices)
        if command == "env_is_wrapped":
            return self.env_is_wrapped(argument, indices)
        name, args, kwargs = argument
        return self.env_method(name, *args, indices=indices, **kwargs)

    def _step(self, indices: Sequence[int], actions: Sequence[Any]) -> list[tuple[Any, bool, Any, Any]]:
        """Step as ``DummyVecEnv`` does: reward, whether the episode ended, info and, if so, the info of the reset."""
        results = []
        for i, action in zip(indices, actions, strict=True):
            observation, reward, terminated, truncated, info = self.envs[i].step(action)
            done, reset_info = bool(terminated or truncated), None
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = observation
                observation, reset_info = self.envs[i].reset()
            self._save_obs(i, observation)
            results.append((reward, done, info, reset_info))
        return results

    def _reset(self, i: int, seed: int | None, options: dict[str, Any]) -> dict[str, Any]:
        maybe_options = {"options": options} if options else {}
        observation, info = self.envs[i].reset(seed=seed, **maybe_options)
        self._save_obs(i, observation)
        return info


def _checked(env_fn: Callable[[], gym.Env]) -> gym.Env:
    env = env_fn()
    layout_of(env.observation_space)  # DummyVecEnv's message would not name what is wrong
    return env
