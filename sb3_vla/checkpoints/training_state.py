"""Everything an interrupted training needs to go on: weights, optimizer, generators, counters.

Tensors in safetensors, the rest in JSON, in a folder that the caller makes appear whole (``RunDirectory.checkpoint``).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sb3_vla.checkpoints.frozen_weights import Unfrozen
from sb3_vla.checkpoints.weights import read_tensors, tensor_names, write_tensors
from sb3_vla.common.errors import DamagedError, InputError
from sb3_vla.common.files import read_json, write_json
from sb3_vla.distributed.fsdp import load_optimizer_state

_TENSORS, _VALUES = "training_state.safetensors", "training_state.json"


def save_training_state(
    folder: Path,
    modules: Mapping[str, nn.Module | Unfrozen],
    optimizer_state: Mapping[int, Mapping[str, Any]],
    values: Mapping[str, Any],
) -> None:
    """Write the state of a training: what is given, and the process's generators (torch, CUDA, NumPy, Python).

    :param modules: modules by name, or those parts of them that are not elsewhere.
    :param optimizer_state: as ``whole_optimizer_state`` gives it.
    :param values: JSON values to get back, such as counters.
    """
    tensors: dict[str, Tensor] = {"torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda_rng.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    for name, module in modules.items():
        tensors.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})
    for index, state in optimizer_state.items():
        tensors.update({f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()})
    write_tensors(folder / _TENSORS, tensors)
    generators = {"numpy": np.random.get_state(legacy=False), "python": random.getstate()}
    contents = {"generators": generators, "values": dict(values)}
    write_json(folder / _VALUES, contents, indent=None, default=lambda value: value.tolist())


def load_training_state(
    folder: Path, modules: Mapping[str, nn.Module | Unfrozen], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Bring modules, optimizer and the process's generators to a saved state.

    :param modules: of which the first has the optimizer's parameters.
    :return: the values saved with it.
    :raises DamagedError: if a file is missing or not whole; nothing was changed then.
    :raises ValueError: if the folder holds the state of other modules.
    """
    contents = _read_values(folder)
    tensors = read_tensors(folder / _TENSORS)
    torch.set_rng_state(tensors.pop("torch_rng"))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for key, tensor in tensors.items():
        owner, _, rest = key.partition(".")
        if owner == "optimizer":
            index, _, name = rest.partition(".")
            optimizer_state.setdefault(int(index), {})[name] = tensor
        elif owner == "cuda_rng":
            if int(rest) < torch.cuda.device_count():
                torch.cuda.set_rng_state(tensor, int(rest))
        elif owner in weights:
            weights[owner][rest] = tensor
        else:
            raise InputError(f"{folder} holds the state of {owner!r}; expected {', '.join(modules)}")
    for name, module in modules.items():
        try:
            module.load_state_dict(weights[name])
        except RuntimeError as error:
            raise InputError(f"{folder} does not hold the state of this {name}: {error}") from error
    trained: Any = next(iter(modules.values()))
    load_optimizer_state(optimizer, trained, optimizer_state)
    np.random.set_state(contents["generators"]["numpy"])
    version, internal, gauss = contents["generators"]["python"]
    random.setstate((version, tuple(internal), gauss))
    return contents["values"]


def check_training_state(folder: Path) -> None:
    """Find out whether a saved state is whole, without reading its tensors.

    :raises DamagedError: if a file is missing, empty or cut; the message names it.
    """
    _read_values(folder)
    tensor_names(folder / _TENSORS)


def _read_values(folder: Path) -> dict[str, Any]:
    for name in (_VALUES, _TENSORS):
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing")
    return read_json(folder / _VALUES)
