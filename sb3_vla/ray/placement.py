"""Which process of which component runs on which accelerator of which node.

Accelerators are numbered through the cluster: those of node 0, then those of node 1. On nodes without a GPU, CPU slots
take their place. A placement names, for each component, the accelerators of its processes::

    {"actor,env,rollout": "all"}                            # all shared
    {"env": "0-3", "rollout": "4-7", "actor": "0-7"}        # hybrid
    {"env": "0-1", "rollout": "2", "actor": "3"}            # disjoint
    {"env": "0-1:0-5", "rollout": "2", "actor": "3"}        # six processes on two accelerators, three each

Components may share accelerators. This is the syntax of RLinf's ``cluster.component_placement``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError

COMPONENTS = ("actor", "env", "rollout")
SHARED: dict[str, str] = {"actor,env,rollout": "all"}
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_SYNTAX = "expected all, a range such as 0-3, or several with commas, each with its process ranks if wanted: 0-1:0-5"


class PlacementError(InputError):
    """A placement that the cluster cannot have. The message is complete: a command prints it and exits."""


@dataclass
class ClusterOptions:
    """Where a training runs on a Ray cluster.

    :param num_nodes: nodes that take part.
    :param component_placement: accelerators of ``actor``, ``env`` and ``rollout``, see
        :mod:`sb3_vla.ray.placement`.
    :raises PlacementError: for what no cluster can have.
    """

    num_nodes: int = 1
    component_placement: dict[str, str] = field(default_factory=lambda: dict(SHARED))

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise PlacementError(f"cluster.num_nodes={self.num_nodes}; expected at least 1")
        _by_component(self.component_placement)


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    :ivar name: how the cluster knows it.
    :ivar accelerators: GPUs, or CPU slots where there is none.
    :ivar has_gpus: which of the two they are.
    """

    name: str
    accelerators: int
    has_gpus: bool = False


@dataclass(frozen=True)
class Slot:
    """The place of one process.

    :ivar node: number of the node.
    :ivar local: number of the accelerator on its node.
    :ivar is_gpu: whether that is a GPU.
    """

    node: int
    local: int
    is_gpu: bool


Placement = dict[str, list[Slot]]


def place(options: ClusterOptions, nodes: Sequence[Node]) -> Placement:
    """Slots of each component's processes, in the order of the processes.

    :param nodes: all that there are; the first ``num_nodes`` of them are used.
    :raises PlacementError: if there are fewer nodes or accelerators than the placement names.
    """
    if len(nodes) < options.num_nodes:
        raise PlacementError(
            f"cluster.num_nodes={options.num_nodes}, but the cluster has {len(nodes)}; start Ray on the others with "
            f"`ray start --address=...`, or set cluster.num_nodes={len(nodes)}"
        )
    slots = [
        Slot(number, local, node.has_gpus)
        for number, node in enumerate(nodes[: options.num_nodes])
        for local in range(node.accelerators)
    ]
    kind = "GPUs" if any(slot.is_gpu for slot in slots) else "CPU slots"
    placement = {}
    for component, (key, text) in _by_component(options.component_placement).items():
        where = f"cluster.component_placement: {key}: {text}"
        found = _processes(where, text, len(slots))
        beyond = [rank for rank in found if rank >= len(slots)]
        if beyond:
            raise PlacementError(
                f"{where} names number {max(beyond)}, but the {options.num_nodes} node(s) have {len(slots)} {kind}; "
                f"expected numbers from 0 to {len(slots) - 1}"
            )
        placement[component] = [slots[rank] for rank in found]
    return placement


def _by_component(placement: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Key and text of each component, all of them, none twice."""
    found: dict[str, tuple[str, str]] = {}
    for key, text in placement.items():
        for component in (part.strip() for part in str(key).split(",")):
            if component not in COMPONENTS:
                raise PlacementError(
                    f"cluster.component_placement has the component {component!r}; "
                    f"{did_you_mean(component, COMPONENTS)}"
                )
            if component in found:
                raise PlacementError(
                    f"cluster.component_placement places {component} twice, by {found[component][0]!r} and {key!r}; "
                    "name each component once"
                )
            found[component] = (str(key), str(text))
            _processes(f"cluster.component_placement: {key}: {text}", str(text), 1)  # its syntax
    missing = [component for component in COMPONENTS if component not in found]
    if missing:
        raise PlacementError(
            f"cluster.component_placement does not place {', '.join(missing)}; give each of {', '.join(COMPONENTS)} "
            f"accelerators, such as {missing[0]}: all"
        )
    return found


def _processes(where: str, text: str, count: int) -> list[int]:
    """Number of the accelerator of each process.

    :param where: names the text in messages.
    :param count: accelerators of the cluster, which ``all`` means.
    """
    by_process: dict[int, int] = {}
    for entry in text.split(","):
        named, colon, processes = (part.strip() for part in entry.partition(":"))
        accelerators = range(count) if named == "all" else _range(where, named)
        ranks = _range(where, processes) if colon else range(len(by_process), len(by_process) + len(accelerators))
        if len(ranks) % len(accelerators):
            raise PlacementError(
                f"{where}: {len(ranks)} processes cannot be shared equally by {len(accelerators)} accelerators; "
                f"expected a multiple of {len(accelerators)}"
            )
        each = len(ranks) // len(accelerators)
        for position, rank in enumerate(ranks):
            if rank in by_process:
                raise PlacementError(f"{where} places process {rank} twice; name each process once")
            by_process[rank] = accelerators[position // each]
    if sorted(by_process) != list(range(len(by_process))):
        raise PlacementError(f"{where} numbers the processes {sorted(by_process)}; expected 0 to {len(by_process) - 1}")
    return [by_process[rank] for rank in sorted(by_process)]


def _range(where: str, text: str) -> range:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise PlacementError(f"{where} is not understood at {text!r}; {_SYNTAX}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise PlacementError(f"{where}: the range {text} ends before it begins; expected {last}-{first}")
    return range(first, last + 1)
