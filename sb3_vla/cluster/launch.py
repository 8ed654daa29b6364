"""A training on a cluster: its learner where the placement says, and begun again where its node dies."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from sb3_vla.cluster.connection import Cluster, connected, settle
from sb3_vla.cluster.placement import ClusterOptions, PlacementError, Slot, place
from sb3_vla.cluster.seat import Seat
from sb3_vla.distributed import current_ranks
from sb3_vla.run import RunDirectory
from sb3_vla.training import GRPOConfig, PPOConfig, train

#: deaths of the learner in a row, without a checkpoint between them, that are not put up with
_TOO_MANY_DEATHS = 3
#: how long a cluster that lost nodes may take to have enough of them again
_RETURN_SECONDS = 600.0
_LOOK_AGAIN_SECONDS = 2.0


def train_on_cluster(
    options: ClusterOptions,
    run: RunDirectory,
    stage: str,
    config: PPOConfig | GRPOConfig,
    **arguments: Any,
) -> None:
    """:func:`~sb3_vla.training.train` with environments, copies of the policy and learner placed on a Ray cluster.

    The weights that come out are those of a training on one machine. A learner in a slot of this node is this process;
    elsewhere it is an actor, and where its node dies it goes on from its last checkpoint on another node, or when there
    are enough nodes again. The run directory and checkpoints must lie where all nodes see them. There is one learner;
    where the placement names several accelerators for ``actor`` it takes the first, with a warning.

    :param options: the placement.
    :param arguments: as of ``train``.
    :raises PlacementError: for a placement that the cluster cannot have.
    """
    if current_ranks().count > 1:
        raise PlacementError(
            f"cluster.component_placement under torchrun with {current_ranks().count} ranks; leave one of the two out"
        )
    with connected(options) as cluster:
        slot = _learner(cluster)
        if slot.node == 0:
            if slot.is_gpu:
                torch.cuda.set_device(slot.local)
            train(run, stage, config, seat=_seat(cluster), **arguments)
        else:
            _train_elsewhere(cluster, options, slot, run, stage, config, arguments)


class ActorWorker:
    """The learner in an actor.

    :param slot: where it runs.
    """

    def __init__(self, slot: Slot) -> None:
        settle(slot)

    def train(
        self,
        options: ClusterOptions,
        first: str,
        run: RunDirectory,
        stage: str,
        config: PPOConfig | GRPOConfig,
        arguments: dict[str, Any],
    ) -> None:
        """See :func:`train_on_cluster`.

        :param first: name of the placement's node 0.
        """
        train(run, stage, config, seat=_seat(Cluster(options, first)), **arguments)


def _train_elsewhere(
    cluster: Cluster,
    options: ClusterOptions,
    slot: Slot,
    run: RunDirectory,
    stage: str,
    config: PPOConfig | GRPOConfig,
    arguments: dict[str, Any],
) -> None:
    deaths, latest = 0, run.latest_checkpoint(stage)
    while True:
        learner = cluster.start(ActorWorker, slot)
        try:
            cluster.ray.get(learner.train.remote(options, cluster.first, run, stage, config, arguments))
            return
        except cluster.lost() as error:
            deaths = deaths + 1 if run.latest_checkpoint(stage) == latest else 1
            latest = run.latest_checkpoint(stage)
            if deaths == _TOO_MANY_DEATHS:
                raise RuntimeError(
                    f"The learner died {deaths} times without a checkpoint between; Ray's log of its node says why. "
                    "The same command goes on from the last checkpoint"
                ) from error
            warnings.warn("The learner or its node died; it goes on from its last checkpoint", stacklevel=3)
            arguments = {**arguments, "resume": True}
            _wait_for_nodes(cluster, options)
        finally:
            cluster.ray.kill(learner)


def _wait_for_nodes(cluster: Cluster, options: ClusterOptions) -> None:
    deadline = time.monotonic() + _RETURN_SECONDS
    while True:
        try:
            cluster.placement = place(options, cluster.nodes())
            return
        except PlacementError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_AGAIN_SECONDS)


def _learner(cluster: Cluster) -> Slot:
    first, *others = cluster.placement["actor"]
    if others:
        warnings.warn(
            f"cluster.component_placement places {len(others) + 1} actor processes, but on a cluster one learner "
            "trains, on the first of their accelerators; several learners train under torchrun",
            stacklevel=3,
        )
    return first


def _seat(cluster: Cluster) -> Seat:
    return Seat(cluster, cluster.placement["env"], cluster.placement["rollout"])
