"""The learner on a cluster: one process or several, which train together as ranks that torchrun starts do."""

from __future__ import annotations

import importlib
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sb3_vla.common.errors import RankLostError
from sb3_vla.distributed.ranks import Invitation, joined
from sb3_vla.ray.connection import Cluster, settle
from sb3_vla.ray.placement import ClusterOptions, PlacementError, Slot
from sb3_vla.ray.resources import ClusterResources

T = TypeVar("T")
# How long ranks may take to say why they ended, after one of them was found to be gone.
_REASON_SECONDS = 30.0


class LearnerActor:
    """A rank in an actor.

    :param slot: where it runs.
    """

    def __init__(self, slot: Slot) -> None:
        settle(slot)

    def rendezvous_address(self) -> str:
        """See :func:`rendezvous_address`; also a sign of life."""
        return rendezvous_address()

    def work(
        self, options: ClusterOptions, first: str, invitation: Invitation, work: Callable[[ClusterResources], T]
    ) -> T:
        """Do the work as a rank.

        :param first: name of the placement's node 0.
        """
        return _as_rank(Cluster(options, first), invitation, work)


def run_learners(cluster: Cluster, options: ClusterOptions, work: Callable[[ClusterResources], T]) -> T:
    """Let the learners of a placement do a work together, each in its own slot with its part of the other slots.

    The first one is this process, where its slot is on this node: it shows here how far it is, and a signal ends all of
    them with a checkpoint. The others are actors.

    :param options: the placement.
    :param work: what each learner does in its resources, as one of :func:`sb3_vla.distributed.ranks.current_ranks`;
        picklable.
    :return: the first learner's result.
    :raises PlacementError: if several learners would share a GPU.
    :raises Exception: what one of them raised; one of :func:`lost_learners` if it died.
    """
    slots = cluster.placement["actor"]
    _check_gpus(slots)
    here = 1 if slots[0].node == 0 else 0
    actors: list[Any] = []
    answers: list[Any] = []
    try:
        actors += [cluster.start(LearnerActor, slot) for slot in slots[here:]]
        # All of them live before the first one waits for them.
        points = _get(cluster, [actor.rendezvous_address.remote() for actor in actors])
        invitations = _invitations(slots, rendezvous_address() if here else points[0], here)
        answers += [
            actor.work.remote(options, cluster.first, invitation, work)
            for actor, invitation in zip(actors, invitations[here:], strict=True)
        ]
        results = [_as_rank(cluster, invitations[0], work)] if here else []
        return [*results, *_wait_for(cluster, answers)][0]
    except lost_learners(cluster):
        _raise_reason(cluster, answers)
        raise
    finally:
        for actor in actors:
            cluster.ray.kill(actor)


def lost_learners(cluster: Cluster) -> tuple[type[Exception], ...]:
    """Types of the errors that tell of a crash of a learner or its node, to this process or to another learner."""
    return (RankLostError, *cluster.lost())


def rendezvous_address() -> str:
    """A place on this machine where ranks can meet: a port that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return f"tcp://{importlib.import_module('ray.util').get_node_ip_address()}:{port}"


def _as_rank(cluster: Cluster, invitation: Invitation, work: Callable[[ClusterResources], T]) -> T:
    with joined(invitation) as ranks:
        return work(ClusterResources.of_rank(cluster, ranks))


def _check_gpus(slots: Sequence[Slot]) -> None:
    crowded = [slot.local for slot, count in Counter(slots).items() if slot.is_gpu and count > 1]
    if crowded:
        raise PlacementError(
            f"cluster.component_placement places several actor processes on GPU {crowded[0]}; expected one learner a "
            "GPU, such as actor: 0-3"
        )


def _invitations(slots: Sequence[Slot], point: str, here: int) -> list[Invitation]:
    """What each learner needs to join the others.

    :param here: 1 if the first rank is this process, which sees all GPUs of its node; an actor sees its own alone.
    """
    by_node = Counter(slot.node for slot in slots)
    return [
        Invitation(
            rank,
            len(slots),
            local_rank=slot.local if rank < here and slot.is_gpu else 0,
            local_count=by_node[slot.node],
            rendezvous_address=point,
        )
        for rank, slot in enumerate(slots)
    ]


def _wait_for(cluster: Cluster, answers: Sequence[Any]) -> list[Any]:
    """All answers; the first error as soon as it comes."""
    waiting = list(answers)
    while waiting:
        done, waiting = cluster.ray.wait(waiting, num_returns=1)
        _get(cluster, done)
    return _get(cluster, list(answers))


def _get(cluster: Cluster, answers: list[Any]) -> list[Any]:
    try:
        return cluster.ray.get(answers)
    except Exception as error:
        cause = getattr(error, "cause", None)  # Ray puts its traceback into the text of what an actor raised
        raise (cause if isinstance(cause, Exception) else error) from None


def _raise_reason(cluster: Cluster, answers: Sequence[Any]) -> None:
    """Where a rank is gone, raise what another one raised for a reason of its own, if one did."""
    if not answers:
        return
    done, _ = cluster.ray.wait(list(answers), num_returns=len(answers), timeout=_REASON_SECONDS)
    for answer in done:
        try:
            _get(cluster, [answer])
        except lost_learners(cluster):
            continue
