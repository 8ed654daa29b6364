"""Weights in one ``model.safetensors`` or in several files with an index, as transformers writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sb3_vla.checkpoints.formats.layout import read_json, read_tensors, require_file, write_json, write_tensors
from sb3_vla.common.errors import InputError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, from one file or from those that its index names.

    :raises FileNotFoundError: if a file is missing; the message names it.
    :raises ValueError: if one is damaged or lacks a tensor that the index says it has.
    """
    if not (folder / _INDEX).is_file():
        return read_tensors(folder, _WHOLE, f"the weights, where there is no {_INDEX}")
    places = read_json(folder, _INDEX, "which file holds which weights").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{folder / _INDEX} has no weight_map; copy it again")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        require_file(folder, name, f"weights that {_INDEX} names")
    for name in sorted(set(places.values())):
        found = read_tensors(folder, name, "weights")
        lacking = [key for key, place in places.items() if place == name and key not in found]
        if lacking:
            raise InputError(f"{folder / name} lacks {', '.join(lacking[:4])} ({len(lacking)} in all); copy it again")
        weights.update(found)
    return weights


def write_weights(folder: Path, weights: Mapping[str, Tensor], max_bytes: int | None = None) -> None:
    """Write weights into one file, or into files of at most ``max_bytes`` where that is given and not enough.

    :param max_bytes: of tensors in a file; one that is larger has a file of its own.
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
        write_tensors(folder / _WHOLE, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        places.update(dict.fromkeys(shard, name))
    total = sum(value.nbytes for value in weights.values())
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
