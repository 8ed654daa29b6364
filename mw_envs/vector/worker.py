"""A worker process that runs several environments, from both ends.

Requests and answers go through a pipe, pickled. Observations lie in memory that both processes map; it has no name in
any file system, so the kernel frees it when the last of them ends, in whatever way.
"""

from __future__ import annotations

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
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import CloudpickleWrapper

from mw_envs.errors import InputError

AnyEnv = gym.Env[Any, Any]
EnvFn = Callable[[], AnyEnv]
Layout = dict[Any, tuple[tuple[int, ...], np.dtype[Any]]]
Arrays = dict[Any, npt.NDArray[Any]]
#: Reward, terminated, truncated, the info of the observation in memory, and with same-step autoreset, where the episode
#: ended, its last observation and info.
StepResult = tuple[Any, bool, bool, dict[str, Any], tuple[Any, dict[str, Any]] | None]

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
    :param autoreset_mode: when an environment whose episode has ended is reset.
    :param inherited: ends of other pipes that a forked process inherits and must close: left open, they would keep
        workers alive after the parent's death.
    """

    def __init__(
        self,
        context: Any,
        number: int,
        share: range,
        env_fns: Sequence[EnvFn],
        autoreset_mode: AutoresetMode,
        inherited: Sequence[Connection],
    ) -> None:
        self._expect_start(number, share)
        self.remote, worker_remote = context.Pipe()
        inherited = [*inherited, self.remote] if context.get_start_method() == "fork" else []
        wrapped = [CloudpickleWrapper(env_fn) for env_fn in env_fns]
        arguments = (worker_remote, inherited, wrapped, autoreset_mode)
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
            -signal.SIGKILL: "Usually the machine ran out of memory: use fewer environments or fewer workers.",
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
            received: bytes = self.remote.recv_bytes()
            return received
        except (EOFError, OSError) as error:
            raise WorkerDiedError from error


def layout_of(space: spaces.Space[Any]) -> Layout:
    """Shapes and types of an observation's arrays, by key of a ``Dict``, index of a ``Tuple``, or None.

    :raises ValueError: if a part of the space has no fixed shape.
    """
    if isinstance(space, spaces.Dict):
        parts: dict[Any, spaces.Space[Any]] = dict(space.spaces)
    elif isinstance(space, spaces.Tuple):
        parts = dict(enumerate(space.spaces))
    else:
        parts = {None: space}
    layout: Layout = {}
    for key, part in parts.items():
        if part.shape is None or part.dtype is None:
            raise InputError(
                f"The observation space's part {key!r} is {part}; expected a Box, Discrete, MultiDiscrete or "
                "MultiBinary, which have a fixed shape. Text fits as bytes: Box(0, 255, (length,), np.uint8)"
            )
        layout[key] = (tuple(part.shape), np.dtype(part.dtype))
    return layout


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


def work(
    remote: Connection,
    inherited: Sequence[Connection],
    env_fns: Sequence[CloudpickleWrapper[AnyEnv]],
    autoreset_mode: AutoresetMode,
) -> None:
    """The process itself. An answer is ``(None, what was asked for)`` or ``(type of the error, its traceback)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes its workers
    for connection in inherited:
        connection.close()
    # What a forking parent left uncollected is not this process's: the end of a process group, for one, waits for
    # threads that a fork lacks.
    gc.freeze()
    envs: WorkerEnvs | None = None
    try:
        envs, reply = make_envs(env_fns, autoreset_mode)
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


def make_envs(env_fns: Sequence[EnvFn], autoreset_mode: AutoresetMode) -> tuple[WorkerEnvs | None, bytes]:
    """A worker's environments, and its first answer: their spaces. If one cannot be made, None and why."""
    try:
        envs = WorkerEnvs([env_fn() for env_fn in env_fns], autoreset_mode)
        return envs, pickle.dumps((None, (envs.envs[0].observation_space, envs.envs[0].action_space)))
    except Exception:
        return None, pickle.dumps((RuntimeError, traceback.format_exc()))


class WorkerEnvs:
    """A worker's environments, of which each can be reset and stepped without the others.

    :ivar arrays: the last observation of each environment, by part of the observation, (environments, *shape).

    :param envs: the environments.
    :param autoreset_mode: when an environment whose episode has ended is reset.
    :raises ValueError: if observations have no fixed shape, or not the same; or one environment is there twice.
    """

    def __init__(self, envs: Sequence[AnyEnv], autoreset_mode: AutoresetMode) -> None:
        self.envs = envs
        self._autoreset_mode = autoreset_mode
        self._ended = [False] * len(envs)
        self._layout = layout_of(envs[0].observation_space)
        for number, env in enumerate(envs):
            if layout_of(env.observation_space) != self._layout:
                raise InputError(
                    f"The environments' observations must have the same shapes and types, but number {number} of this "
                    f"worker gives {env.observation_space} and number 0 {envs[0].observation_space}"
                )
        if len({id(env.unwrapped) for env in envs}) < len(envs):
            raise InputError(
                "Two of env_fns returned the same instance of an environment; expected a new one at each call, "
                "such as lambda: gym.make(...) in place of lambda: env"
            )
        self.arrays = {key: np.zeros((len(envs), *shape), dtype) for key, (shape, dtype) in self._layout.items()}

    def share_memory(self, memory: int) -> None:
        """Write observations into this memory from now on.

        :param memory: its file descriptor, which is closed.
        """
        self.arrays = _map_arrays(memory, self._layout, len(self.envs))
        os.close(memory)

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()

    def reply(self, request: bytes) -> bytes:
        """The pickled answer to a pickled request; nothing to the request to close."""
        command, argument = "", (None,)
        try:
            command, argument, indices = pickle.loads(request)
            return b"" if command == "close" else pickle.dumps((None, self._answer(command, argument, indices)))
        except Exception as error:
            # Callers ask for attributes that there may not be, and catch this.
            missing = command == "call" and argument[0] is get_attr and isinstance(error, AttributeError)
            return pickle.dumps((AttributeError if missing else RuntimeError, traceback.format_exc()))

    def _answer(self, command: str, argument: Any, indices: Sequence[int]) -> list[Any]:
        if command == "step":
            return [self._step(i, action) for i, action in zip(indices, argument, strict=True)]
        if command == "reset":
            return [self._reset(i, *pair) for i, pair in zip(indices, argument, strict=True)]
        function, arguments = argument
        return [function(self.envs[i], *arguments) for i in indices]

    def _step(self, i: int, action: Any) -> StepResult:
        if self._ended[i] and self._autoreset_mode is AutoresetMode.NEXT_STEP:
            return 0.0, False, False, self._reset(i), None
        if self._ended[i] and self._autoreset_mode is AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded("The episode has ended: reset(options={'reset_mask': mask}) begins a new one")
        observation, reward, terminated, truncated, info = self.envs[i].step(action)
        if (terminated or truncated) and self._autoreset_mode is AutoresetMode.SAME_STEP:
            return reward, terminated, truncated, self._reset(i), (observation, info)
        self._ended[i] = bool(terminated or truncated)
        self._observe(i, observation)
        return reward, terminated, truncated, info, None

    def _reset(self, i: int, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        maybe_options = {} if options is None else {"options": options}
        observation, info = self.envs[i].reset(seed=seed, **maybe_options)
        self._ended[i] = False
        self._observe(i, observation)
        return info

    def _observe(self, i: int, observation: Any) -> None:
        """Store an observation; what the space cannot hold is told, since an image in 0..1 would become black."""
        for key, stored in self.arrays.items():
            given = np.asarray(observation if key is None else observation[key])
            if given.dtype.kind == "f" and stored.dtype.kind in "iu" and (given % 1 != 0).any():
                named = "The observation" if key is None else f"The observation's {key}"
                raise InputError(
                    f"{named} has type {given.dtype} with numbers that are not whole, but its space has "
                    f"{stored.dtype}; give it as the space says, such as (255 * image).round().astype(np.uint8)"
                )
            stored[i] = given


def get_attr(env: AnyEnv, name: str) -> Any:
    """An attribute of an environment or of one of its wrappers."""
    return env.get_wrapper_attr(name)


def call_method(env: AnyEnv, name: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """What a method of an environment or of one of its wrappers returns; as in Gymnasium, else the attribute itself."""
    found = env.get_wrapper_attr(name)
    return found(*arguments, **keywords) if callable(found) else found
