"""Parameters, gradients and optimiser in shards, where a replica on every rank does not fit (FSDP2, Zhao et al. 2023).

What is trained is sharded; frozen weights, which have neither gradient nor optimiser state, stay whole. In an update a
block's weights are gathered when it runs. In a rollout, whose number of decisions may differ between ranks, they are
gathered once (:func:`gathered`). Whatever is written or read is whole (:func:`whole_weights`), so that a checkpoint
fits any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

SHARDING = ("none", "fsdp")


def shard(module: nn.Module, blocks: Iterable[nn.Module], methods: Sequence[str], device_type: str, ranks: int) -> None:
    """Shard the trainable parameters of a module that is on its device, the same on all ranks; in place.

    The parameters are new ones: make the optimiser afterwards. Gradients are summed over ranks, not averaged.

    :param blocks: parts that are always run by calling them; each is gathered for itself, the rest together.
    :param methods: of the module, those that run in an update; none of them calls another one of them.
    :param device_type: ``cpu`` or ``cuda``.
    :param ranks: how many there are.
    """
    mesh = init_device_mesh(device_type, (ranks,))
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    for block in blocks:
        if any(parameter.requires_grad for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=frozen)
    fully_shard(module, mesh=mesh, ignored_params=frozen)
    for part in _units(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for method in methods:
        register_fsdp_forward_method(module, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was applied."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights on every rank, in which ranks may run the module as often as each likes; all must come and leave
    together. Does nothing to a module that is not sharded."""
    units = _units(module)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not module, recurse=False)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Plain weights on the CPU in the place of shards, for saving and loading; changes go back into the shards.

    All ranks must come and leave together, and each holds all of the weights meanwhile. Does nothing to a module that
    is not sharded.
    """
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    whole = {parameter: nn.Parameter(whole_tensor(parameter.detach()).cpu()) for _, _, parameter in places}
    before = {parameter: tensor.detach()._version for parameter, tensor in whole.items()}
    for owner, name, parameter in places:
        owner._parameters[name] = whole[parameter]
    try:
        yield
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter
        for parameter, tensor in whole.items():
            if tensor._version != before[parameter]:
                with torch.no_grad():
                    parameter.copy_(_as_shards(tensor.detach(), parameter))


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The optimiser's state by number of the parameter, without shards; all ranks must call it."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        number: {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in values.items()}
        for number, values in state.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Take a state of :func:`whole_optimizer_state`, in shards where parameters are; all ranks must call it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        number: {
            key: _as_shards(value, parameters[number])
            if isinstance(parameters[number], DTensor) and value.shape == parameters[number].shape
            else value
            for key, value in values.items()
        }
        for number, values in state.items()
    }
    optimizer.load_state_dict({"state": placed, "param_groups": optimizer.state_dict()["param_groups"]})


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor without shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_shards(tensor: Tensor, like: DTensor) -> DTensor:
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _units(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
