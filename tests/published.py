"""Tiny checkpoints in published layouts, made from what the original programs wrote and from reproducible weights."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocated import Allocated
from PIL import Image
from reference_weights import reference_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mw_envs import encode_instruction
from sb3_vla.checkpoints import load_checkpoint

DATA = Path(__file__).parent / "data"


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Recorded tensors and files of a model."""
    return load_file(DATA / f"{name}.safetensors"), json.loads((DATA / f"{name}.json").read_text())


def picture(png: Tensor) -> Tensor:
    """A recorded picture, uint8 (3, h, w)."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png.numpy().tobytes())))).permute(2, 0, 1)


def instructions(sentences: list[str]) -> Tensor:
    return torch.stack([torch.from_numpy(encode_instruction(sentence)) for sentence in sentences])


def weights_of(shapes: Mapping[str, list[int]], seed: int) -> dict[str, Tensor]:
    return {name: reference_weight(name, tuple(shape), seed) for name, shape in shapes.items()}


def write_files(folder: Path, files: Mapping[str, Any]) -> None:
    """JSON files by their paths in the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, changes: Mapping[str, Tensor], drop: str | None = None) -> None:
    tensors = {**load_file(path), **changes}
    save_file({key: value for key, value in tensors.items() if key != drop}, path)


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names, types and every bit agree."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Of names and shapes."""
    lines = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def assert_told_without_weights(folder: str | Path, options: Mapping[str, Any] | None = None) -> None:
    """What a checkpoint tells is the same without its weights, which take no memory then."""
    whole = load_checkpoint(folder, options)
    with Allocated() as memory:
        found = load_checkpoint(folder, options, weights=False)
    assert (found.model_name, found.model_kwargs, found.notes) == (whole.model_name, whole.model_kwargs, whole.notes)
    assert found.distribution == whole.distribution and found.model.config == whole.model.config
    tensors, expected = found.model.state_dict(), whole.model.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    assert all(tensor.is_meta for tensor in tensors.values())
    assert memory.most < 0.05 * sum(tensor.nbytes for tensor in expected.values())
