"""Our own checkpoint: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sb3_vla.checkpoints.folders import HUB, checkpoints_in, local_folder
from sb3_vla.checkpoints.weights import load_weights, read_tensors, write_weights
from sb3_vla.common.errors import DamagedError, InputError, InTheWayError, NotThereError
from sb3_vla.common.files import entries, finish_exchange, read_json, whole_folder, write_json
from sb3_vla.common.paths import local_path
from sb3_vla.models import MODELS, VLAModel, model_class
from sb3_vla.models.lora import merged_state
from sb3_vla.models.prompts import copy_tokenizer

# 2: CompactVLA attends to image and sentence alone.
FORMAT = "sb3-vla-2"
#: what tells an adapter's folder
ADAPTER_CONFIG = "adapter_config.json"
#: subfolder, and name in the configuration, of a copy of the tokenizer
TOKENIZER = "tokenizer"
#: note of a reader: whether the checkpoint came with statistics to normalize by; where not, imitation sets the data's
NORMALIZED = "normalized"
#: names in a checkpoint's folder, ours and others': a folder that holds more is not replaced
OF_A_CHECKPOINT = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json", "policy_*", TOKENIZER, "tokenizer*.json"),
    *("special_tokens_map.json", "preprocessor_config.json", "dataset_statistics.json", "dataset_stats.pkl", "vlm"),
    "README.md",
)
#: numbers of a state and of an action in the environment
ENVIRONMENT_DIM = 4
# Read at a time for a digest: weights need not fit into memory for it.
_BLOCK_BYTES = 2**20


@dataclass
class LoadedCheckpoint:
    """A model and what was saved with it.

    :param value_head: weights of the critic, if they were saved.
    :param notes: what the writer noted: how it was trained, on what.
    :param distribution: name and options of the action distribution that the model was trained with, if any.
    :param distribution_weights: what that distribution learned, if it was saved.
    """

    model: VLAModel
    model_name: str
    model_kwargs: dict[str, Any]
    value_head: dict[str, Tensor] | None
    notes: dict[str, Any]
    distribution: tuple[str, dict[str, Any]] | None = None
    distribution_weights: dict[str, Tensor] | None = None


def save_checkpoint(
    folder: str | Path,
    model: VLAModel,
    value_head: nn.Module | None = None,
    notes: Mapping[str, Any] | None = None,
    distribution: tuple[str, Mapping[str, Any]] | None = None,
    distribution_module: nn.Module | None = None,
    bf16: bool = False,
) -> None:
    """Write a checkpoint folder; it appears whole or not at all, and takes the place of one that is there.

    Adapters are merged into the weights, see :mod:`sb3_vla.models.lora`. A tokenizer that is a file on this machine is
    copied into the folder.

    :param notes: JSON values kept beside the weights.
    :param distribution: name and options of the action distribution that the model acts by.
    :param distribution_module: that distribution, for the weights that it owns.
    :param bf16: write the weights in bfloat16, for half the size; what reads them computes in float32 again.
    :raises FileExistsError: if the folder holds something else than a checkpoint.
    """
    names = {kind: name for name, kind in MODELS.items()}
    tokenizer = model.local_tokenizer()
    config: dict[str, Any] = {
        "format": FORMAT,
        "model": names[type(model)],
        "model_kwargs": model.config if tokenizer is None else {**model.config, "tokenizer": TOKENIZER},
        "notes": dict(notes or {}),
        **({} if distribution is None else {"distribution": [distribution[0], dict(distribution[1])]}),
    }
    tensors = {f"model.{key}": value for key, value in merged_state(model).items()}
    for prefix, part in (("value_head", value_head), ("distribution", distribution_module)):
        if part is not None:
            tensors.update({f"{prefix}.{key}": value for key, value in part.state_dict().items()})
    if bf16:  # statistics, by which numbers are normalized, stay exact, and so does a distribution's deviation
        rounded = {f"model.{name}" for name, _ in model.named_parameters()} | {
            key for key in tensors if key.startswith("value_head.")
        }
        tensors = {key: value.bfloat16() if key in rounded else value for key, value in tensors.items()}
    with whole_checkpoint(folder) as partial:
        write_weights(partial, tensors)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial / TOKENIZER)
        write_json(partial / "config.json", config)


def refuse_other_files(folder: Path) -> None:
    """Check that a checkpoint may be written to a folder.

    :raises FileExistsError: if it is a file, or holds something else than a checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise InTheWayError(f"{folder} is a file; a checkpoint is a folder, choose another name")
    found = [path.name for path in entries(folder)]
    others = [name for name in found if not any(fnmatch(name, pattern) for pattern in OF_A_CHECKPOINT)]
    if others or (found and "config.json" not in found):
        told = ", ".join((others or found)[:3])
        raise InTheWayError(f"{folder} holds files that are no checkpoint ({told}); choose another folder or empty it")


def whole_checkpoint(folder: str | Path) -> AbstractContextManager[Path]:
    """A folder to write a checkpoint to, which replaces the checkpoint under its name when the block ends.

    :raises FileExistsError: see :func:`refuse_other_files`.
    """
    return whole_folder(folder, refuse_other_files)


def load_checkpoint(folder: str | Path) -> LoadedCheckpoint:
    """Read a checkpoint folder of ours.

    :raises FileNotFoundError: if it is not there or a file is missing; the message names the file.
    :raises ValueError: if it is damaged, of another format, or does not fit its own configuration.
    """
    folder = local_path(folder)
    finish_exchange(folder)
    if not folder.is_dir():
        raise NotThereError(f"Checkpoint folder {folder} does not exist; expected config.json and model.safetensors")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            inside = checkpoints_in(folder)
            hint = f". Give a checkpoint in it: {', '.join(inside)}" if inside else ""
            raise NotThereError(f"Checkpoint {folder} has no {name}; it holds {sorted(os.listdir(folder))}{hint}")
    try:
        config = read_json(folder / "config.json")
        found_format = config["format"]
        name, kwargs = config["model"], config["model_kwargs"]
        if isinstance(kwargs, dict) and kwargs.get("tokenizer") == TOKENIZER and (folder / TOKENIZER).is_dir():
            kwargs = {**kwargs, "tokenizer": str((folder / TOKENIZER).resolve())}
        notes = config.get("notes", {})
        distribution = None
        if config.get("distribution") is not None:
            acts_by, options = config["distribution"]
            distribution = str(acts_by), {str(key): value for key, value in options.items()}
    except DamagedError:  # which names the file and what is wrong with it
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} is no sb3_vla checkpoint configuration: {error!r}") from error
    if found_format != FORMAT:
        raise InputError(f"{folder} has format {found_format!r}; expected {FORMAT!r}")
    tensors = read_tensors(folder / "model.safetensors")
    try:
        model = model_class(name)(**kwargs)
    except TypeError as error:
        raise InputError(f"{folder / 'config.json'} does not describe a {name!r} model: {error}") from error
    load_weights(model, _with_prefix(tensors, "model."), folder)
    value_head = _with_prefix(tensors, "value_head.") or None
    distribution_weights = _with_prefix(tensors, "distribution.") or None
    return LoadedCheckpoint(model, name, kwargs, value_head, notes, distribution, distribution_weights)


def published_kind(folder: Path) -> str | None:
    """What a configuration that is not ours says that it describes; None where it is ours, or says nothing."""
    try:
        config = read_json(place_of_configuration(folder) / "config.json")
        kind = None if "format" in config else config.get("type", config.get("model_type"))
    except (OSError, ValueError, AttributeError, TypeError):
        return None  # for our own reader to report
    return kind if isinstance(kind, str) else None


def place_of_configuration(folder: Path) -> Path:
    """The folder whose ``config.json`` describes the model: for an adapter's folder without one it is the parent."""
    adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    return folder.parent if adapter else folder


def checkpoint_digest(folder: str | Path) -> str:
    """What tells one checkpoint from another in the same folder: a digest of its files.

    :param folder: also ``hf://owner/name`` or ``hf://owner/name@revision`` on the Hugging Face hub.
    :raises FileNotFoundError: if one is missing.
    """
    if not str(folder).startswith(HUB):
        finish_exchange(local_path(folder))
    folder = local_folder(folder)
    digest = hashlib.sha256()
    # Published folders have weights in several files, or statistics beside them; an adapter's name their base.
    tensors = sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"]
    if (folder / ADAPTER_CONFIG).is_file():
        tensors += [folder / ADAPTER_CONFIG, *sorted(path for path in folder.rglob("*.bin") if path.is_file())]
    tokenizer = sorted(path for path in (folder / TOKENIZER).glob("tokenizer.*") if path.is_file())
    for path in (place_of_configuration(folder) / "config.json", *tensors, *tokenizer):
        if not path.is_file():
            raise NotThereError(f"Checkpoint {folder} has no {path.name}")
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
