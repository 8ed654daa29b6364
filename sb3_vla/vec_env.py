"""A Stable-Baselines3 vector environment with several environments in each worker process.

``SubprocVecEnv`` starts a process for each environment. A simulator's meshes, its OpenGL context and the Python of a
process are then paid for as often; with as many workers as cores and many environments in each they are paid for once
a core, and a worker answers with one message.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
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


class WorkerVecEnv(VecEnv):
    """``n`` environments in a few worker processes, contiguous shares; otherwise as ``SubprocVecEnv``.

    :param env_fns: callables that make the environments, run in the workers.
    :param num_workers: processes; None for one a core, at most one an environment.
    :param start_method: ``forkserver``, ``spawn`` or ``fork``; None for ``forkserver`` where there is one.
    :raises RuntimeError: if a worker fails; the message holds its traceback.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        num_workers: int | None = None,
        start_method: str | None = None,
    ) -> None:
        if len(env_fns) == 0:
            raise ValueError("env_fns is empty; expected at least one environment")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers={num_workers}; expected at least 1")
        workers = min(num_workers or mp.cpu_count(), len(env_fns))
        if start_method is None:
            start_method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        context = mp.get_context(start_method)
        self._shares = [share.tolist() for share in np.array_split(np.arange(len(env_fns)), workers)]
        self._remotes: list[Connection] = []
        self._processes: list[Any] = []
        self.waiting = self.closed = False
        for share in self._shares:
            remote, worker_remote = context.Pipe()
            process = context.Process(  # type: ignore[attr-defined]
                target=_work, args=(worker_remote, remote, [CloudpickleWrapper(env_fns[i]) for i in share]), daemon=True
            )
            process.start()
            worker_remote.close()
            self._remotes.append(remote)
            self._processes.append(process)
        try:
            observation_space, action_space = self._ask([("spaces", None)] * workers)[0]
        except BaseException:
            self.close()
            raise
        super().__init__(len(env_fns), observation_space, action_space)

    def step_async(self, actions: np.ndarray) -> None:
        for worker, share in enumerate(self._shares):
            self._send(worker, ("step", actions[share]))
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        results = [self._receive(worker) for worker in range(len(self._shares))]
        self.waiting = False
        observations, rewards, dones, infos, reset_infos = zip(*results, strict=True)
        self.reset_infos = _joined(reset_infos)
        return _stack(observations), np.concatenate(rewards), np.concatenate(dones), _joined(infos)  # type: ignore[return-value]

    def reset(self) -> VecEnvObs:
        results = self._ask(
            [("reset", ([self._seeds[i] for i in share], [self._options[i] for i in share])) for share in self._shares]
        )
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _joined([infos for _, infos in results])
        return _stack([observation for observation, _ in results])

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for remote in self._remotes:
            try:
                remote.send(("close", None))
            except OSError:  # the worker is gone already
                pass
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
                process.join()
        for remote in self._remotes:
            remote.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            return [None] * self.num_envs
        return self.env_method("render")

    def has_attr(self, attr_name: str) -> bool:
        return all(self._call("has_attr", attr_name, None))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._call("get_attr", attr_name, indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._call("set_attr", (attr_name, value), indices)

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any) -> list[Any]:
        return self._call("env_method", (method_name, method_args, method_kwargs), indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._call("env_is_wrapped", wrapper_class, indices)

    def _call(self, command: str, argument: Any, indices: VecEnvIndices) -> list[Any]:
        """Ask the environments of some indices something, answers in the order of the indices."""
        wanted = list(self._get_indices(indices))
        answers: dict[int, Any] = {}
        asked = []
        for worker, share in enumerate(self._shares):
            local = [share.index(i) for i in wanted if i in share]
            if local:
                self._send(worker, (command, (argument, local)))
                asked.append((worker, [share[i] for i in local]))
        for worker, numbers in asked:
            answers.update(zip(numbers, self._receive(worker), strict=True))
        return [answers[i] for i in wanted]

    def _ask(self, messages: Sequence[tuple[str, Any]]) -> list[Any]:
        for worker, message in enumerate(messages):
            self._send(worker, message)
        return [self._receive(worker) for worker in range(len(messages))]

    def _send(self, worker: int, message: tuple[str, Any]) -> None:
        try:
            self._remotes[worker].send(message)
        except OSError as error:
            raise self._death(worker) from error

    def _receive(self, worker: int) -> Any:
        try:
            ok, answer = self._remotes[worker].recv()
        except (EOFError, OSError) as error:
            raise self._death(worker) from error
        if not ok:
            raise RuntimeError(f"Environment worker {worker} failed:\n{answer}")
        return answer

    def _death(self, worker: int) -> RuntimeError:
        self._processes[worker].join(timeout=1)
        return RuntimeError(
            f"Environment worker {worker} (environments {self._shares[worker]}) died, exit code "
            f"{self._processes[worker].exitcode}; -9 is mostly a lack of memory: use fewer environments or workers"
        )


def _work(remote: Connection, parent_remote: Connection, env_fns: list[CloudpickleWrapper]) -> None:
    """A worker's loop: the share is a DummyVecEnv, which resets environments as Stable-Baselines3 does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes its workers
    parent_remote.close()  # so that the parent's end closes when the parent dies, and with it this loop
    envs: DummyVecEnv | None = None
    try:
        envs = DummyVecEnv([fn.var for fn in env_fns])
        while True:
            command, argument = remote.recv()
            if command == "close":
                break
            remote.send((True, _answer(envs, command, argument)))
    except EOFError:
        pass
    except Exception:
        try:
            remote.send((False, traceback.format_exc()))
        except OSError:
            pass
    finally:
        if envs is not None:
            envs.close()
        remote.close()


def _answer(envs: DummyVecEnv, command: str, argument: Any) -> Any:
    if command == "step":
        observation, rewards, dones, infos = envs.step(argument)
        return observation, rewards, dones, infos, envs.reset_infos
    if command == "reset":
        envs._seeds, envs._options = argument
        return envs.reset(), envs.reset_infos
    if command == "spaces":
        return envs.observation_space, envs.action_space
    argument, indices = argument
    if command == "has_attr":
        return [envs.has_attr(argument)] * len(indices)
    if command == "get_attr":
        return envs.get_attr(argument, indices)
    if command == "set_attr":
        envs.set_attr(*argument, indices)
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
