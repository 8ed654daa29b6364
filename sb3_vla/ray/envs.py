"""Environments in Ray actors behind a Stable-Baselines3 vector environment."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import CloudpickleWrapper

from mw_envs.vector.pool import WorkerPool
from mw_envs.vector.worker import AnyEnv, Arrays, EnvFn, Layout, Worker, WorkerDiedError, make_envs
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
from sb3_vla.ray.connection import Cluster, settle
from sb3_vla.ray.placement import PlacementError, Slot

_CLOSE_SECONDS = 5.0


class EnvActor:
    """The far end: several environments, which run whole chunks.

    :param slot: where it runs.
    :param env_fns: callables that make the environments.
    """

    def __init__(self, slot: Slot, env_fns: Sequence[CloudpickleWrapper[AnyEnv]]) -> None:
        settle(slot)
        self._envs, self._first = make_envs(env_fns, AutoresetMode.SAME_STEP)

    def start(self) -> tuple[bytes, list[int], Arrays]:
        """The environments' spaces, or why there are none."""
        return self._first, [], {}

    def answer(self, request: bytes) -> tuple[bytes, list[int], Arrays]:
        """The answer to a request of :class:`~mw_envs.vector.worker.Worker`, and the observations that it changed.

        :return: answer, numbers of the environments that were observed anew, and their observations.
        """
        assert self._envs is not None
        reply = self._envs.reply(request)
        command, _, indices = pickle.loads(request)
        rows = list(indices) if command in ("step", "reset") else []
        return reply, rows, {key: array[rows] for key, array in self._envs.arrays.items()} if rows else {}

    def close(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()


class RayWorker(Worker):
    """The near end: a worker as :class:`~sb3_vla.SharedMemoryVecEnv` knows it, on some node.

    Observations come through Ray's object store, and are copied out of it when an answer is read.
    """

    def __init__(
        self,
        cluster: Cluster,
        number: int,
        share: range,
        env_fns: Sequence[EnvFn],
        slot: Slot,
        again: bool,
    ) -> None:
        self._expect_start(number, share)
        self._cluster = cluster
        start = cluster.restart if again else cluster.start
        self.actor = start(EnvActor, slot, [CloudpickleWrapper(env_fn) for env_fn in env_fns])
        self._under_way: deque[Any] = deque([self.actor.start.remote()])

    def share_memory(self, layout: Layout) -> None:
        """Make room for the observations."""
        self.arrays = {key: np.zeros((len(self.share), *shape), dtype) for key, (shape, dtype) in layout.items()}

    def crash_report(self) -> str:
        """How the worker died, for an error's message."""
        return f"{self.name.capitalize()} died; Ray's log of its node says why. Usually it ran out of memory."

    def reap(self) -> None:
        """End the actor if it still runs."""
        self._cluster.ray.kill(self.actor)

    def _send(self, request: bytes) -> None:
        try:
            self._under_way.append(self.actor.answer.remote(request))
        except self._cluster.lost() as error:
            raise WorkerDiedError from error

    def _receive(self) -> bytes:
        try:
            reply, rows, observations = self._cluster.ray.get(self._under_way.popleft())
        except self._cluster.lost() as error:
            raise WorkerDiedError from error
        for key, array in observations.items():
            self.arrays[key][rows] = array
        return reply


class RayWorkerPool(WorkerPool):
    """A pool whose workers are Ray actors, one per slot.

    :param cluster: the connection.
    :param env_fns: callables that make the environments, run in the actors.
    :param slots: where the actors run.
    """

    def __init__(self, cluster: Cluster, env_fns: Sequence[EnvFn], slots: Sequence[Slot]) -> None:
        self._cluster = cluster
        self._slots = list(slots)
        super().__init__(env_fns, len(slots), "spawn", restart_workers=True)

    def _start(self, number: int, again: bool) -> Worker:
        share = self.shares[number]
        env_fns = self._env_fns[share.start : share.stop]
        return RayWorker(self._cluster, number, share, env_fns, self._slots[number], again)

    def close(self) -> None:
        """End the actors."""
        if self.closed:
            return
        self.closed = True
        closing = [worker.actor.close.remote() for worker in self.workers if isinstance(worker, RayWorker)]
        if closing:
            self._cluster.ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for worker in self.workers:
            worker.reap()
            worker.arrays = {}


class RayVecEnv(SharedMemoryVecEnv):
    """``n`` environments in one Ray actor per slot, contiguous shares; otherwise as ``SharedMemoryVecEnv``.

    An actor that dies, or whose node does, is replaced, on another node if need be; its episodes are dropped and
    counted in ``dropped_episodes``, those of the others go on.

    :param cluster: the connection.
    :param env_fns: callables that make the environments, run in the actors.
    :param slots: where the actors run.
    :raises PlacementError: if there are fewer environments than slots.
    :raises RuntimeError: as ``SharedMemoryVecEnv`` does.
    """

    def __init__(self, cluster: Cluster, env_fns: Sequence[Callable[[], gym.Env]], slots: Sequence[Slot]) -> None:
        if len(env_fns) < len(slots):
            raise PlacementError(
                f"cluster.component_placement places {len(slots)} env processes, but there are {len(env_fns)} "
                f"environments; expected at least one for each: more environments, or at most {len(env_fns)} processes"
            )
        self._use(RayWorkerPool(cluster, env_fns, slots))

    @property
    def processes(self) -> list[BaseProcess]:  # type: ignore[override]
        """None of this machine's own."""
        return []
