"""A training on a cluster: its learners where the placement says, begun again where one of them or its node dies."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_vla.common.errors import FailedError
from sb3_vla.distributed.ranks import current_ranks
from sb3_vla.ray.connection import Cluster, connected
from sb3_vla.ray.learners import lost_learners, run_learners
from sb3_vla.ray.placement import ClusterOptions, PlacementError, place
from sb3_vla.ray.resources import ClusterResources
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.settings import Training
from sb3_vla.runs.shared import SharedRun
from sb3_vla.runs.training import train

#: consecutive crashes of the learner, without a checkpoint between them, after which we give up
MAX_CONSECUTIVE_CRASHES = 3
#: how long a cluster that lost nodes may take to have enough of them again
_RETURN_SECONDS = 600.0
_LOOK_AGAIN_SECONDS = 2.0


def train_on_cluster(
    options: ClusterOptions,
    run: RunDirectory,
    stage: str,
    training: Training,
    **arguments: Any,
) -> None:
    """Train with environments, copies of the policy and learners placed on a Ray cluster.

    Otherwise as :func:`~sb3_vla.runs.training.train`.

    With one learner, the weights that come out are those of a training on one machine; with several, which share the
    environments and each minibatch as ranks under torchrun do, they are the same up to rounding. A learner in a slot of
    this node is this process, see :func:`~sb3_vla.ray.learners.run_learners`. Where one dies, or its node, the
    training goes on from its last checkpoint, on other nodes or when there are enough of them again. The run directory
    and checkpoints must lie where all nodes see them.

    :param options: the placement.
    :param arguments: as of ``train``.
    :raises PlacementError: for a placement that the cluster cannot have.
    """
    if current_ranks().count > 1:
        raise PlacementError(
            f"cluster.component_placement under torchrun with {current_ranks().count} ranks; leave one of the two out"
        )
    with connected(options) as cluster:
        crashes, latest = 0, run.latest_checkpoint(stage)
        while True:
            try:
                run_learners(cluster, options, functools.partial(_train, run.path, stage, training, arguments))
                return
            except lost_learners(cluster) as error:
                crashes = crashes + 1 if run.latest_checkpoint(stage) == latest else 1
                latest = run.latest_checkpoint(stage)
                if crashes == MAX_CONSECUTIVE_CRASHES:
                    raise FailedError(
                        f"A learner died {crashes} times without a checkpoint between; Ray's log of its node says why. "
                        "The same command goes on from the last checkpoint"
                    ) from error
                warnings.warn("A learner or its node died; training goes on from its last checkpoint", stacklevel=2)
                arguments = {**arguments, "resume": True}
                _wait_for_nodes(cluster, options)


def _train(
    folder: Path,
    stage: str,
    training: Training,
    arguments: Mapping[str, Any],
    resources: ClusterResources,
) -> None:
    """What each learner does."""
    train(SharedRun(folder), stage, training, resources=resources, **arguments)


def _wait_for_nodes(cluster: Cluster, options: ClusterOptions) -> None:
    deadline = time.monotonic() + _RETURN_SECONDS
    cluster.forget()
    while True:
        try:
            cluster.placement = place(options, cluster.nodes())
            return
        except PlacementError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_AGAIN_SECONDS)
