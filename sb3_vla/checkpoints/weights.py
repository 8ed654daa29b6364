"""Weights of a checkpoint: read, written, and checked against a model.

They are in one ``model.safetensors``, or in several files with an index as transformers writes them; RLinf's training
and adapters have a PyTorch file, of which nothing is unpickled but tensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sb3_vla.checkpoints.folders import require_file
from sb3_vla.common.errors import DamagedError, InputError
from sb3_vla.common.files import read_json, write_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: of RLinf's training, in the order in which it looks for them
FULL_WEIGHTS = ("model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt")
_SHOWN = 4


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a checkpoint; empty if there are none.

    RLinf's, else those that the index names, else ``model.safetensors``, else all other safetensors files but those of
    LeRobot's processors.

    :raises DamagedError: if the index is not whole.
    """
    for name in FULL_WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    places = _index(folder)
    if places:
        return [folder / name for name in sorted(set(places.values()))]
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("policy_"))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by their names in the files.

    :raises FileNotFoundError: if a file is missing; the message names it.
    :raises DamagedError: if one is damaged, or lacks a tensor that the index says it has.
    """
    files = weight_files(folder) or [require_file(folder, WHOLE, f"the weights, where there is no {INDEX}")]
    for path in files:
        require_file(folder, str(path.relative_to(folder)), f"weights that {INDEX} names")
    weights: dict[str, Tensor] = {}
    for path in files:
        weights |= read_tensors(path)
    lacking = [key for key in _index(folder) if key not in weights] if files[0].suffix != ".pt" else []
    if lacking:
        raise DamagedError(
            f"The files that {folder / INDEX} names lack {', '.join(lacking[:_SHOWN])} ({len(lacking)} in all); copy "
            "the folder again"
        )
    return weights


def _index(folder: Path) -> dict[str, str]:
    """The file of each weight; empty if there is no index."""
    if not (folder / INDEX).is_file():
        return {}
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DamagedError(f"{folder / INDEX} has no weight_map; copy it again")
    return places


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file.

    :raises DamagedError: if it is damaged, or holds more than tensors.
    """
    with _damage_told(path):
        if path.suffix in (".pt", ".bin"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return load_file(path)


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a file, of which safetensors are not read for it.

    :raises DamagedError: if it is damaged, or holds more than tensors.
    """
    if path.suffix in (".pt", ".bin"):
        return list(read_tensors(path))
    with _damage_told(path), safe_open(path, "pt") as file:  # which compares the sizes
        return list(file.keys())


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, RuntimeError, OSError, EOFError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    except Exception as error:  # pickle.UnpicklingError has no narrower base
        raise DamagedError(f"{path} holds more than tensors and is not loaded: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors may be on any device and share memory."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != value.nbytes:  # each needs memory of its own
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        found[key] = value
    save_file(found, path, metadata={"format": "pt"})  # which transformers asks for


def write_weights(folder: Path, weights: Mapping[str, Tensor], max_bytes: int | None = None) -> None:
    """Write weights into one file, or into several with an index.

    :param max_bytes: of tensors in a file; a larger tensor has a file of its own. None for one file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in weights.items():
        if shards[-1] and max_bytes is not None and size + value.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    if len(shards) == 1:
        write_tensors(folder / WHOLE, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        places.update(dict.fromkeys(shard, name))
    total = sum(value.nbytes for value in weights.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """How weights differ from the expected ones, by names and shapes, for a message; empty if they fit."""
    kinds = (
        ("missing ", [name for name in expected if name not in weights]),
        ("unexpected ", [name for name in weights if name not in expected]),
        (
            "",
            [
                f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
                for name, value in expected.items()
                if name in weights and weights[name].shape != value.shape
            ],
        ),
    )
    return "; ".join(f"{kind}{', '.join(found[:_SHOWN])} ({len(found)} in all)" for kind, found in kinds if found)


def check_weights(
    module: nn.Module, weights: Mapping[str, Tensor], where: Path, optional: tuple[str, ...] = (), hint: str = ""
) -> None:
    """Check that weights are those of a module.

    :param where: the checkpoint, for the message.
    :param optional: entries of the module, by the beginnings of their names, that the weights need not have.
    :param hint: what may be wrong, for the message.
    :raises InputError: if a weight is missing, unexpected or of another shape.
    """
    expected = {key: value for key, value in module.state_dict().items() if not key.startswith(optional)}
    told = misfits(expected, weights)
    if told:
        raise InputError(f"The weights of {where} do not fit {type(module).__name__}: {told}. {hint}".rstrip())


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], where: Path, optional: tuple[str, ...] = ()) -> None:
    """Give a module its weights, cast to the module's precision; see :func:`check_weights`."""
    check_weights(module, weights, where, optional)
    module.load_state_dict(dict(weights), strict=False)
