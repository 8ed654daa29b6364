"""Parameters, gradients and optimizer in shards, where a replica on every rank does not fit (FSDP2, Zhao et al. 2023).

Trained weights are sharded; frozen weights, which have neither gradient nor optimizer state, stay whole. In an update
(:func:`in_shards`) the weights of a block are gathered while it runs. Between updates all weights are whole on every
rank, so that rollouts and evaluations, in which ranks run the model different numbers of times, need no communication.
Checkpoints have whole weights (:func:`whole_weights`) and fit any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sb3_vla.distributed.ranks import current_ranks, is_shard

SHARDING = ("none", "fsdp")


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    methods: Sequence[str],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    ranks: int,
) -> None:
    """Shard the trainable parameters of a module, the same on all ranks, in place.

    The backward pass then sums gradients over ranks; all ranks must run it the same number of times.

    :param module: to shard, with whole weights on ``device``.
    :param blocks: submodules that are gathered one by one, which is done when they are called; the rest is gathered
        together.
    :param methods: names of the module's methods that an update calls; none of them calls another one.
    :param optimizer: of the module's parameters, without a state yet; it gets the shards.
    :param device: of the module.
    :param ranks: number of ranks.
    """
    # torch imports its compiler for these, for seconds.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh(device.type, (ranks,))
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    for block in blocks:
        if any(parameter.requires_grad for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=frozen)
    fully_shard(module, mesh=mesh, ignored_params=frozen)
    for unit in _units(module):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for method in methods:
        register_fsdp_forward_method(module, method)
    shards = dict(module.named_parameters())
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [shards[name] for name in members]
    _gather(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was applied."""
    return hasattr(module, "set_reshard_after_forward")


@contextmanager
def in_shards(module: nn.Module) -> Iterator[None]:
    """Keep weights in shards, for an update; a module that is not sharded stays as it is.

    All ranks must enter and leave the context together.
    """
    _reshard(module)
    try:
        yield
    finally:
        _gather(module)


def keep_in_step(passes: int, outputs: Callable[[], Iterable[Tensor]]) -> None:
    """Run passes of zero gradient while other ranks, which gather the same shards, have more micro-batches.

    :param passes: number of forward and backward passes.
    :param outputs: runs a forward pass and returns the tensors that are differentiated.
    """
    for _ in range(passes):
        torch.stack([0.0 * output.sum() for output in outputs()]).sum().backward()  # type: ignore[no-untyped-call]


@contextmanager
def whole_weights(module: nn.Module, everywhere: bool = False) -> Iterator[None]:
    """Replace shards by whole weights on the CPU, for saving; a module that is not sharded stays as it is.

    All ranks must enter and leave the context together.

    :param everywhere: whether every rank gets them; otherwise the first one does, and the others get empty tensors of
        the same shapes (meta device).
    """
    device = "cpu" if everywhere or current_ranks().leads else "meta"
    with in_shards(module):
        places = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if is_shard(parameter)
        ]
        for owner, name, parameter in places:
            owner._parameters[name] = nn.Parameter(whole_tensor(parameter.detach()).to(device))
        try:
            yield
        finally:
            for owner, name, parameter in places:
                owner._parameters[name] = parameter


def as_shards(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard those of some weights whose parameter in the module is sharded; all ranks must call it in
    :func:`in_shards`.

    :param state: whole weights by name.
    """
    own = dict(module.named_parameters())
    return {
        name: _distributed(tensor, own[name]) if name in own and is_shard(own[name]) else tensor
        for name, tensor in state.items()
    }


def whole_optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[int, dict[str, Any]]:
    """The whole state of an optimizer by the number of the parameter; all ranks must call it.

    Shards are gathered tensor by tensor to the CPU of the first rank; the others get an empty state.

    :param module: whose parameters are optimized.
    """
    if not is_sharded(module) or not optimizer.state:
        return optimizer.state_dict()["state"]
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    with in_shards(module):
        names = _names(optimizer, module)
        found = get_optimizer_state_dict(module, optimizer, options=_whole())
    state: Any = found.get("state", {})
    return {number: state[name] for number, name in enumerate(names) if name in state}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[int, Mapping[str, Any]]
) -> None:
    """Load a state of :func:`whole_optimizer_state`; all ranks must call it.

    For a sharded module the first rank sends its state tensor by tensor, and those of the others are ignored.

    :param module: whose parameters are optimized.
    """
    groups = optimizer.state_dict()["param_groups"]
    if not is_sharded(module) or not current_ranks().from_first(bool(state)):
        optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    optimizer.state.clear()
    with in_shards(module):
        names = _names(optimizer, module)
        named: dict[str, Any] = {
            "state": {names[number]: values for number, values in state.items()},
            "param_groups": [{**group, "params": [names[number] for number in group["params"]]} for group in groups],
        }
        options = _whole(broadcast_from_rank0=True)
        set_optimizer_state_dict(module, optimizer, named if current_ranks().leads else {}, options=options)


def _whole(**options: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, **options)


def _names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """Names of the optimizer's parameters in their order; to be called in :func:`in_shards`."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be a shard; all ranks must call it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def _distributed(tensor: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _gather(module: nn.Module) -> None:
    for unit in _units(module):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def _reshard(module: nn.Module) -> None:
    for unit in _units(module):
        unit.reshard()
        unit.set_reshard_after_forward(unit is not module, recurse=False)


def _units(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if is_sharded(part)]
