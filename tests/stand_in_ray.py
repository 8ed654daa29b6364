"""The part of Ray that sb3_vla.cluster calls, on processes of this machine.

With it what is ours can be tested where Ray, an optional extra, is not installed: real processes, real kills, requests
in order, results pickled. The same tests run on Ray's own simulated cluster where it is installed.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, wait
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import cloudpickle


class RayActorError(Exception):
    """The actor, or its node, is gone."""


class _Handle:
    def __init__(self, ray: StandInRay, node: str, server: type, arguments: tuple[Any, ...]) -> None:
        self._near, far = mp.get_context("forkserver").Pipe()
        self._pending: deque[Future[Any]] = deque()
        self._lock = threading.Lock()
        self._dead = False
        self.node, self.server = node, server
        work = cloudpickle.dumps((server, arguments))
        self.process = mp.get_context("forkserver").Process(target=_serve, args=(far, work), daemon=True)
        self.process.start()
        far.close()
        threading.Thread(target=self._read, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Future[Any]:
        values = [argument.result() if isinstance(argument, Future) else argument for argument in arguments]
        future: Future[Any] = Future()
        with self._lock:
            if not self._dead:
                self._pending.append(future)
                with suppress(OSError):  # its reader tells
                    self._near.send_bytes(cloudpickle.dumps((name, values)))
                return future
        future.set_exception(RayActorError())
        return future

    def _read(self) -> None:
        while True:
            try:
                failed, value = cloudpickle.loads(self._near.recv_bytes())
            except (EOFError, OSError):
                break
            future = self._pending.popleft()
            future.set_exception(value) if failed else future.set_result(value)
        with self._lock:
            self._dead = True
            for future in self._pending:
                future.set_exception(RayActorError())


def _serve(connection: Any, work: bytes) -> None:
    server, arguments = cloudpickle.loads(work)
    made = server(*arguments)
    try:
        while True:
            name, values = cloudpickle.loads(connection.recv_bytes())
            try:
                answer = (False, getattr(made, name)(*values))
            except Exception as error:
                answer = (True, error)
            connection.send_bytes(cloudpickle.dumps(answer))
    except (EOFError, OSError):
        pass


class StandInRay:
    """To be put into ``sys.modules["ray"]``.

    :param slots: CPU slots of each node.
    """

    __path__: list[str] = []

    def __init__(self, *slots: int) -> None:
        mp.get_context("forkserver").set_forkserver_preload(["toy", "sb3_vla.cluster.launch"])
        self.slots = {f"node {number}": count for number, count in enumerate(slots)}
        self.dead: set[str] = set()
        self.actors: list[_Handle] = []
        self.exceptions = SimpleNamespace(RayActorError=RayActorError)
        strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
        self.util = SimpleNamespace(scheduling_strategies=strategies)

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "node 0")

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": name, "NodeManagerAddress": "", "Alive": name not in self.dead, "Resources": {"CPU": count}}
            for name, count in self.slots.items()
        ]

    def remote(self, server: type) -> Any:
        def start(node: str, arguments: tuple[Any, ...]) -> _Handle:
            self.actors.append(_Handle(self, node, server, arguments))
            return self.actors[-1]

        def options(num_cpus: int, num_gpus: int, scheduling_strategy: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: start(scheduling_strategy, arguments))

        return SimpleNamespace(options=options)

    def put(self, value: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(cloudpickle.loads(cloudpickle.dumps(value)))
        return future

    def get(self, answer: Any) -> Any:
        return [self.get(one) for one in answer] if isinstance(answer, list) else answer.result()

    def wait(self, answers: list[Future[Any]], num_returns: int, timeout: float) -> None:
        wait(answers, timeout=timeout)

    def kill(self, actor: _Handle) -> None:
        actor.process.kill()
        actor.process.join()

    def kill_node(self, name: str) -> None:
        """SIGKILL all that runs on a node, and take it out of the cluster."""
        self.dead.add(name)
        for actor in self.actors:
            if actor.node == name and actor.process.is_alive():
                os.kill(actor.process.pid or 0, signal.SIGKILL)
                actor.process.join()

    def shutdown(self) -> None:
        for actor in self.actors:
            self.kill(actor)
