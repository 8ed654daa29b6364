"""A Ray cluster: which nodes it has, and how a process begins in a slot of a placement."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sb3_vla.ray.placement import ClusterOptions, Node, Placement, PlacementError, Slot, place

#: what a request raises whose actor, or the node of it, is gone
LOST = ("RayActorError", "ActorUnschedulableError", "ObjectLostError", "OwnerDiedError", "NodeDiedError")
_ANSWER_SECONDS = 60.0  # in which a node that lives has begun a process
_RETRY_SECONDS = 0.2


def import_ray() -> Any:
    """:raises PlacementError: if Ray is not installed."""
    try:
        import ray
    except ImportError as error:
        raise PlacementError(
            'A cluster needs Ray, which is not installed; install it with `pip install "sb3-vla[ray]"`, or leave '
            "cluster.component_placement out to train on this machine alone"
        ) from error
    return ray


class Cluster:
    """A connection to Ray with a placement that it can have.

    :param options: what is wanted.
    :param first: name of node 0; None for the node of this process.
    :raises PlacementError: if Ray is missing, no cluster answers, or it is too small.
    """

    def __init__(self, options: ClusterOptions, first: str | None = None) -> None:
        self.ray = import_ray()
        self.first: str = self.ray.get_runtime_context().get_node_id() if first is None else first
        # Nodes that began a process when they were last asked to, and nodes that did not.
        self._heard, self._silent = {self.first}, set[str]()
        self.placement: Placement = place(options, self.nodes())
        self.num_nodes = options.num_nodes

    def nodes(self) -> list[Node]:
        """Living nodes; the first one, then the others in an order that stays."""
        alive = [node for node in self.ray.nodes() if node["Alive"] and node["NodeID"] not in self._silent]
        alive.sort(key=lambda node: (node["NodeID"] != self.first, node["NodeManagerAddress"], node["NodeID"]))
        found = []
        for node in alive:
            gpus = int(node["Resources"].get("GPU", 0))
            slots = gpus or int(node["Resources"].get("CPU", 0))
            found.append(Node(node["NodeID"], slots, has_gpus=gpus > 0))
        return found

    def start(self, server: type, slot: Slot, *arguments: Any) -> Any:
        """Begin a process that holds a ``server``; where the slot's node is gone, on another one.

        :return: Ray's handle.
        """
        while (node := self._node_of(slot)).name not in self._heard:
            self._ask(node)
        return self._start(server, node, slot, *arguments)

    def restart(self, server: type, slot: Slot, *arguments: Any) -> Any:
        """As :meth:`start`, for a process that died, perhaps with its node, which Ray notices only seconds later."""
        self.forget()
        return self.start(server, slot, *arguments)

    def forget(self) -> None:
        """Ask each node again before something begins on it: one may have died, one that was only slow come round."""
        self._heard, self._silent = {self.first}, set()

    def _node_of(self, slot: Slot) -> Node:
        nodes = self.nodes()
        return nodes[slot.node % len(nodes)]

    def _start(self, server: type, node: Node, *arguments: Any) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        # A soft one would begin it elsewhere while Ray's scheduler has not heard of a node that has just joined.
        affinity = strategies.NodeAffinitySchedulingStrategy(node.name, soft=False)
        # The placement shares accelerators; Ray's own counting of them would not.
        actor = self.ray.remote(server).options(num_cpus=0, num_gpus=0, scheduling_strategy=affinity)
        return actor.remote(*arguments)

    def _ask(self, node: Node) -> None:
        """Find out whether a node begins processes: it may be dead and Ray not know, or too new for Ray's scheduler."""
        unknown = getattr(self.ray.exceptions, "ActorUnschedulableError", ())
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline and node.name in [alive.name for alive in self.nodes()]:
            probe = self._start(_Probe, node)
            try:
                self.ray.get(probe.answer.remote(), timeout=_ANSWER_SECONDS)
                self._heard.add(node.name)
                return
            except unknown:
                time.sleep(_RETRY_SECONDS)
            except self.ray.exceptions.RayError:
                break
            finally:
                self.ray.kill(probe)
        self._silent.add(node.name)

    def lost(self) -> tuple[type[Exception], ...]:
        """Types of the errors that tell of a crash of an actor or its node."""
        return tuple(getattr(self.ray.exceptions, name) for name in LOST if hasattr(self.ray.exceptions, name))


class _Probe:
    """Shows that its node lives."""

    def answer(self) -> None: ...


@contextmanager
def connected(options: ClusterOptions) -> Iterator[Cluster]:
    """A cluster, for as long as the context lasts.

    It is the one that this process is connected to; else that of the environment variable ``RAY_ADDRESS``, or one that
    was started on this machine; else, for a single node, one that begins and ends with the context.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield Cluster(options)
        return
    own = options.num_nodes == 1 and "RAY_ADDRESS" not in os.environ
    try:
        ray.init(address="local" if own else "auto", include_dashboard=False if own else None, log_to_driver=True)
    except ConnectionError as error:
        raise PlacementError(
            f"No Ray cluster answers, and cluster.num_nodes={options.num_nodes} needs one: `ray start --head` on this "
            "node, `ray start --address=...` on the others"
        ) from error
    try:
        yield Cluster(options)
    finally:
        ray.shutdown()


def settle(slot: Slot) -> None:
    """See no other accelerator of the node than the slot's. To be called before CUDA or a renderer begins."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(slot.local) if slot.is_gpu else ""
    if slot.is_gpu:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(slot.local)
