"""What decides the result of a run: contents in place of paths, and settings that are no mere circumstances."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_vla.checkpoints import checkpoint_digest
from sb3_vla.checkpoints.folders import HUB, local_folder
from sb3_vla.checkpoints.native import place_of_configuration
from sb3_vla.common.errors import NotThereError
from sb3_vla.common.paths import local_path

# Of larger files, which are weights, images and videos, the name and the size: what describes them lies beside them.
_READ_BYTES = 2**22
#: options of a model that are paths
_PATHS = ("tokenizer", "norm_stats")


def checkpoint_identity(source: str | Path | None) -> str | None:
    """What tells a checkpoint from another one in the same place, and is the same by whatever path it is reached.

    :param source: a folder, or a name on the Hugging Face hub, which stands for itself.
    :raises FileNotFoundError: if there is no such folder.
    """
    if source is None or str(source).startswith(HUB):
        return None if source is None else str(source)
    folder = local_folder(source)
    if (place_of_configuration(folder) / "config.json").is_file():
        return checkpoint_digest(folder)
    return _digest(folder)  # of RLinf's, whose weights say what they are


def data_identity(root: str | Path | None) -> str | None:
    """What tells a dataset from another one, by whatever path it is reached.

    :raises FileNotFoundError: if there is none.
    """
    return None if root is None else _digest(dataset_folder(root))


def dataset_folder(root: str | Path) -> Path:
    """:raises FileNotFoundError: if there is no such folder."""
    folder = local_path(root)
    if not folder.is_dir():
        raise NotThereError(f"There is no dataset {folder}: expected a folder with meta/info.json")
    return folder


def deciding_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model, with the contents of files and folders that are here in place of their paths."""
    paths = {key: local_path(options[key]) for key in _PATHS if options.get(key)}
    return {**options, **{key: _digest(path) for key, path in paths.items() if path.exists()}}


def without(settings: Mapping[str, Any] | None, *names: str) -> dict[str, Any] | None:
    """Settings without some of them."""
    return None if settings is None else {name: value for name, value in settings.items() if name not in names}


def _digest(place: Path) -> str:
    files = [place]
    if place.is_dir():
        inside = [(path, path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
        files = sorted(path for path, name in inside if not any(part.startswith(".") for part in name.parts))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place)} {size}\n".encode())
        if size <= _READ_BYTES:
            digest.update(path.read_bytes())
    return digest.hexdigest()
