"""Checkpoint folders of others: where they are, the tensors in them, and whether these fit a model."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sb3_vla.common.errors import InputError, InTheWayError, NotThereError
from sb3_vla.common.paths import entries, local_path, whole_folder

HUB = "hf://"
#: checkpoints that come with the package, each a folder, by whose name it is reached
BOX = Path(__file__).parents[1] / "box"
#: of RLinf's training, in the order in which it looks for them
FULL_WEIGHTS = ("model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt")
_SHOWN = 6


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


def read_json(path: Path) -> dict:
    """An object of a JSON file; empty where there is no file.

    :raises ValueError: if it holds something else; the message names the file.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}; expected an object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Files with weights: RLinf's, or all safetensors files but those of LeRobot's processors; empty if none."""
    for name in FULL_WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    if index:
        return [folder / name for name in sorted(set(index.values()))]
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("policy_"))


def weight_names(files: Iterable[Path]) -> list[str]:
    """Names of the tensors in safetensors files; none of a file that is damaged or not there."""
    names: list[str] = []
    for path in files:
        if path.suffix == ".pt":
            return list(read_weights([path]))
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            names += file.keys()
    return names


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Tensors of all files. Nothing is unpickled but tensors.

    :raises FileNotFoundError: if a shard is missing.
    :raises ValueError: if a file is damaged, or holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            raise NotThereError(f"{path.parent} lacks {path.name}, which its index names")
        try:
            if path.suffix in (".pt", ".bin"):
                tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            else:
                tensors |= load_file(path)
        except (SafetensorError, RuntimeError, OSError, EOFError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}") from error
        except Exception as error:  # pickle.UnpicklingError has no narrower base
            raise InputError(f"{path} holds more than tensors and is not loaded: {error}") from error
    return tensors


def fit(model: nn.Module, weights: Mapping[str, Tensor], source: Path, hint: str) -> None:
    """Put weights into a model on the meta device, as float32 on the default device; other buffers are left.

    :param hint: what may be wrong, for the error.
    :raises ValueError: if a weight is missing, unexpected or of another shape.
    """
    expected = dict(model.named_parameters())
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise InputError(f"{source} does not fit {type(model).__name__}: {'; '.join(parts)}. {hint}")
    device = torch.get_default_device()
    loaded = {name: weights[name].to(device, torch.float32) for name in expected}
    model.load_state_dict(loaded, strict=False, assign=True)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when it is whole.

    :raises FileExistsError: if there is something under that name.
    """
    with whole_folder(folder, _refuse_any) as partial:
        yield partial


def _refuse_any(folder: Path) -> None:
    if entries(folder) or (folder.exists() and not folder.is_dir()):
        raise InTheWayError(f"{folder} is there already; choose another folder or empty it")


def write_json(path: Path, content: Mapping) -> None:
    """Write an object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
