"""The part of Ray that sb3_vla.ray calls, on processes of this machine.

With it what is ours can be tested where Ray, an optional extra, is not installed: real processes, real kills, requests
in order, results pickled. The same tests run on Ray's own simulated cluster where it is installed.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import time
from collections import deque
from contextlib import suppress
from multiprocessing import connection
from types import SimpleNamespace
from typing import Any

import cloudpickle

_FORK = mp.get_context("fork")
# Near ends of this process's actors, which a fork inherits: while it holds one, its actor does not see the other's end.
_NEAR: list[Any] = []


class RayError(Exception):
    """All of Ray's own."""


class RayActorError(RayError):
    """The actor, or its node, is gone."""


class _Answer:
    """What an actor will answer, or a value that is there."""

    def __init__(self, handle: _Handle | None, value: Any = None) -> None:
        self.handle, self.value = handle, value
        self.error: Exception | None = None

    def get(self) -> Any:
        while self.handle is not None:
            self.handle.read()
        if self.error is not None:
            raise self.error
        return self.value


class _Handle:
    def __init__(self, node: str, server: type, arguments: tuple[Any, ...]) -> None:
        self.near, far = _FORK.Pipe()
        self.pending: deque[_Answer] = deque()
        self.node = node
        _NEAR.append(self.near)
        # No daemon, because an actor may start actors of its own; they end with it.
        self.process = _FORK.Process(target=_serve, args=(far, cloudpickle.dumps((server, arguments))), daemon=False)
        self.process.start()
        far.close()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> _Answer:
        values = [argument.get() if isinstance(argument, _Answer) else argument for argument in arguments]
        self.pending.append(_Answer(self))
        with suppress(OSError):  # found when the answer is read
            self.near.send_bytes(cloudpickle.dumps((name, values)))
        return self.pending[-1]

    def read(self) -> None:
        """Take the oldest answer that was not taken; all of them if the process is dead."""
        try:
            failed, value = cloudpickle.loads(self.near.recv_bytes())
            answer = self.pending.popleft()
            answer.handle = None
            answer.error, answer.value = (value, None) if failed else (None, value)
        except (EOFError, OSError):
            while self.pending:
                answer = self.pending.popleft()
                answer.handle, answer.error = None, RayActorError()


def _serve(far: Any, work: bytes) -> None:
    while _NEAR:
        _NEAR.pop().close()
    # A process group that the parent has left waits for its threads when it is collected, and a fork has none of them.
    gc.freeze()
    server, arguments = cloudpickle.loads(work)
    made = server(*arguments)
    try:
        while True:
            name, values = cloudpickle.loads(far.recv_bytes())
            try:
                answer = (False, getattr(made, name)(*values))
            except Exception as error:
                answer = (True, error)
            far.send_bytes(cloudpickle.dumps(answer))
    except (EOFError, OSError):
        os._exit(0)


class StandInRay:
    """To be put into ``sys.modules["ray"]``.

    :param slots: CPU slots of each node.
    """

    def __init__(self, *slots: int) -> None:
        self.slots = {f"node {number}": count for number, count in enumerate(slots)}
        self.dead: set[str] = set()
        self.unnoticed = 0  # calls of nodes() for which a killed node still counts as living
        self.actors: list[_Handle] = []
        self.exceptions = SimpleNamespace(RayActorError=RayActorError, RayError=RayError)
        strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
        self.util = SimpleNamespace(scheduling_strategies=strategies, get_node_ip_address=lambda: "127.0.0.1")

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "node 0")

    def nodes(self) -> list[dict[str, Any]]:
        known = set() if self.unnoticed > 0 else self.dead
        self.unnoticed -= len(self.dead)
        return [
            {"NodeID": name, "NodeManagerAddress": "", "Alive": name not in known, "Resources": {"CPU": count}}
            for name, count in self.slots.items()
        ]

    def remote(self, server: type) -> Any:
        def start(node: str, arguments: tuple[Any, ...]) -> _Handle:
            self.actors.append(_Handle(node, server, arguments))
            if node in self.dead:  # what is begun there dies with it
                os.kill(self.actors[-1].process.pid or 0, signal.SIGKILL)
            return self.actors[-1]

        def options(num_cpus: int, num_gpus: int, scheduling_strategy: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: start(scheduling_strategy, arguments))

        return SimpleNamespace(options=options)

    def put(self, value: Any) -> _Answer:
        return _Answer(None, cloudpickle.loads(cloudpickle.dumps(value)))

    def get(self, answer: Any, timeout: float | None = None) -> Any:
        return [one.get() for one in answer] if isinstance(answer, list) else answer.get()

    def wait(
        self, answers: list[_Answer], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[_Answer], list[_Answer]]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while sum(answer.handle is None for answer in answers) < num_returns:
            near = {answer.handle.near: answer.handle for answer in answers if answer.handle is not None}
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = connection.wait(list(near), left)
            if not ready:
                break
            for one in ready:
                near[one].read()  # type: ignore[index]
        done = [answer for answer in answers if answer.handle is None]
        return done, [answer for answer in answers if answer.handle is not None]

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
