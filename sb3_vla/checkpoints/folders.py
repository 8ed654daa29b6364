"""Checkpoint folders: where they are, and the files that they must have."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sb3_vla.common.errors import InTheWayError, NotThereError
from sb3_vla.common.files import entries, read_json, whole_folder
from sb3_vla.common.paths import local_path

HUB = "hf://"
#: checkpoints that come with the package, each a folder, by whose name it is reached
BOX = Path(__file__).parents[1] / "box"


def local_folder(source: str | Path) -> Path:
    """A checkpoint's folder; ``hf://owner/name`` or ``hf://owner/name@revision`` is fetched from the Hugging Face hub.

    A name among :func:`boxed_checkpoints` is that of one that comes with the package, unless there is a folder here.

    :raises FileNotFoundError: if there is none; the message says what there is, and what to give instead.
    """
    if not str(source).startswith(HUB):
        folder = local_path(source)
        if not folder.exists() and str(source) in boxed_checkpoints():
            return BOX / str(source)
        if folder.is_file():
            raise NotThereError(f"{folder} is {_kind_of_file(folder)}")
        if not folder.is_dir():
            raise NotThereError(
                f"Checkpoint folder {folder} does not exist; expected config.json and model.safetensors in it"
                f"{_elsewhere(str(source))}"
            )
        return folder
    from huggingface_hub import snapshot_download  # a heavy import, needed by few

    repository, _, revision = str(source).removeprefix(HUB).partition("@")
    patterns = ["*.json", "*.safetensors", "*.pt", "*.model", "*.pkl"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # gated, offline, unknown: all mean that there is no checkpoint
        raise NotThereError(f"Checkpoint {source} could not be fetched from the hub: {error}") from error


def boxed_checkpoints() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in BOX.glob("*/config.json"))


def is_saved_algorithm(path: Path) -> bool:
    """Whether it is a zip that an algorithm of Stable-Baselines3 saved itself to."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "_stable_baselines3_version" in archive.namelist()


def checkpoints_in(folder: Path) -> list[str]:
    """The folders in a folder that hold a checkpoint."""
    return sorted(str(path.parent) for path in folder.glob("*/config.json"))


def hub_name(source: str) -> str | None:
    """What looks like a repository on the Hugging Face hub, as it is to be written; None for what does not."""
    name = re.fullmatch(
        r"(?:hf:/{0,2}|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+(?:@[\w.-]+)?)/?", source
    )
    return None if name is None or name[1].startswith(".") else HUB + name[1]


def _kind_of_file(path: Path) -> str:
    """What a file is that is given as a checkpoint, and what to do instead."""
    if is_saved_algorithm(path):
        return (
            f"an algorithm that was saved; a checkpoint is a folder. Load it with PPO.load({str(path)!r}), or make a "
            "checkpoint of it: sb3_vla.checkpoints.save_checkpoint(folder, model.policy.model, "
            "notes=model.policy.notes)"
        )
    if (path.parent / "config.json").is_file():
        return f"a file; a checkpoint is the folder with its config.json: {path.parent}"
    return "a file; a checkpoint is a folder with config.json and model.safetensors"


def _elsewhere(source: str) -> str:
    """Where a checkpoint may be that is not there."""
    archive = local_path(f"{source}.zip")
    if archive.is_file():
        return f". {archive} is {_kind_of_file(archive)}"
    name, boxed = hub_name(source), boxed_checkpoints()
    own = f". With the package comes {', '.join(boxed)}" if boxed else ""
    return f"{own}. For one on the Hugging Face hub write {name or HUB + 'owner/name'}"


def require_file(folder: Path, name: str, purpose: str) -> Path:
    """The path of a file that a checkpoint must have.

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


def read_part(folder: Path, name: str, purpose: str) -> dict[str, Any]:
    """The JSON object in a file that a checkpoint must have; see :func:`require_file`.

    :raises DamagedError: if it is damaged.
    """
    return read_json(require_file(folder, name, purpose))


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


def new_folder(folder: str | Path) -> AbstractContextManager[Path]:
    """A folder to write into, which gets its name when the block ends.

    :raises FileExistsError: if there is something under that name.
    """
    return whole_folder(folder, _refuse_any)


def _refuse_any(folder: Path) -> None:
    if entries(folder) or (folder.exists() and not folder.is_dir()):
        raise InTheWayError(f"{folder} is there already; choose another folder or empty it")
