"""What readers and writers of published layouts share: files with clear errors, weights that must fit."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sb3_vla.common.errors import InputError, NotThereError


def require_file(folder: Path, name: str, purpose: str) -> Path:
    """A file of a checkpoint.

    :param purpose: what it holds, for the message.
    :raises FileNotFoundError: if it is missing; the message names it, its purpose and what is there.
    """
    path = folder / name
    if not path.is_file():
        raise NotThereError(
            f"Checkpoint {folder} has no {name} ({purpose}); it holds {sorted(os.listdir(folder))}. Copy the whole "
            "published folder"
        )
    return path


def read_json(folder: Path, name: str, purpose: str) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    :raises FileNotFoundError: if the file is missing.
    :raises ValueError: if it is damaged.
    """
    path = require_file(folder, name, purpose)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tensors(folder: Path, name: str, purpose: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file of a checkpoint.

    :raises FileNotFoundError: if it is missing.
    :raises ValueError: if it is damaged.
    """
    path = require_file(folder, name, purpose)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors may be on any device and share memory."""
    save_file(apart(tensors), path)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, contiguous, and each with a memory of its own.

    Those that are so already, which is most of a model on the CPU, are not copied.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != value.nbytes:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        found[key] = value
    return found


def tell_unreadable(folder: str | Path, reader: str, sizes: Mapping[str, tuple[Any, Any]]) -> None:
    """Warn, while a model is saved in a program's layout, that the program cannot load it.

    :param folder: where to.
    :param sizes: what the layout has no word for: by name, what the model has and what the program takes it to be.
    """
    told = [f"{name}={given} (there: {theirs})" for name, (given, theirs) in sizes.items() if given != theirs]
    if told:
        warnings.warn(
            f"{reader} cannot load {folder}, which sb3_vla reads: the model has {', '.join(told)}. Make it with the "
            "sizes in brackets if others are to load it",
            stacklevel=3,
        )


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], where: str | Path, ours: tuple[str, ...] = ()
) -> None:
    """Give a module its weights, all of them, cast to the module's precision.

    :param where: the checkpoint, for the message.
    :param ours: entries of the module, by the beginnings of their names, that the weights need not have.
    :raises ValueError: for missing, unexpected or misshapen weights; the message names the first ones.
    """
    expected = {key: value for key, value in module.state_dict().items() if not key.startswith(ours)}
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    if problems:
        raise InputError(
            f"The weights of {where} do not fit its configuration: {'; '.join(problems[:8])} ({len(problems)} in all)"
        )
    module.load_state_dict(dict(weights), strict=False)
