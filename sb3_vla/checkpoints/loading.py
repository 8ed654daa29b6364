"""Reading a checkpoint of whatever layout."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mw_envs.tasks import did_you_mean
from sb3_vla.checkpoints import native
from sb3_vla.checkpoints.folders import HUB, checkpoints_in, hub_name, local_folder
from sb3_vla.checkpoints.formats.diffusion_policy import load_diffusion_policy
from sb3_vla.checkpoints.formats.openvla_oft import load_openvla_oft
from sb3_vla.checkpoints.formats.pi0 import NAMES, is_pi0, load_pi0
from sb3_vla.checkpoints.formats.smolvla import load_smolvla
from sb3_vla.checkpoints.formats.tinyvla import load_tinyvla
from sb3_vla.checkpoints.native import LoadedCheckpoint
from sb3_vla.common.errors import InputError, NotThereError
from sb3_vla.common.files import finish_exchange
from sb3_vla.common.paths import local_path

#: readers of published folders, by what the configuration says that it is; pi0's are told by their weights as well
READERS: dict[str, Callable[..., LoadedCheckpoint]] = {
    "diffusion": load_diffusion_policy,
    "llava_pythia": load_tinyvla,
    "openvla": load_openvla_oft,
    "smolvla": load_smolvla,
}


def load_checkpoint(
    source: str | Path, options: Mapping[str, Any] | None = None, *, weights: bool = True
) -> LoadedCheckpoint:
    """Read a checkpoint: our own, or one as others publish it.

    :param source: folder; of a published one also ``hf://owner/name`` or ``hf://owner/name@revision`` on the
        Hugging Face hub.
    :param options: of a published one, those of its reader, such as :func:`sb3_vla.checkpoints.formats.pi0.load_pi0` or
        :func:`sb3_vla.checkpoints.formats.openvla_oft.load_openvla_oft`; ours says everything itself.
    :param weights: False for what it tells besides: the model is on the meta device, where it has sizes alone. Files
        are mapped into memory then, and not read.
    :raises FileNotFoundError: if it is not there or incomplete; the message says what is missing.
    :raises ValueError: if it is damaged or does not fit its own configuration, or its reader has no such option.
    """
    if not weights:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is a no-op")
            return load_checkpoint(source, options)
    folder = _folder(source)
    kind = native.published_kind(folder)
    published = None if kind is None else READERS.get(kind)
    if published is None:
        # SmolVLA has weights of the same names as pi0, but its configuration says what it is.
        if is_pi0(folder):
            return load_pi0(folder, options)
        if kind is not None:
            raise InputError(
                f"{folder / 'config.json'} says that it is {kind!r}, which nothing here reads; expected "
                f"{', '.join(sorted((*READERS, *NAMES)))}, or a folder that sb3_vla wrote"
            )
        return native.load_checkpoint(folder)
    known = list(inspect.signature(published).parameters)[1:]
    for name in options or {}:
        if name not in known:
            hint = did_you_mean(name, known) if known else "it takes none"
            raise InputError(f"The reader of {source} has no option {name!r}; {hint}")
    return published(folder, **(options or {}))


def takes_options(source: str | Path) -> bool:
    """Whether it is in a published layout, whose reader has options for what the layout does not say."""
    folder = _folder(source)
    return native.published_kind(folder) in READERS or is_pi0(folder)


def _folder(source: str | Path) -> Path:
    if not str(source).startswith(HUB):
        finish_exchange(local_path(source))
    return local_folder(source)


def check_archive(path: object, algorithm: str = "PPO", kind: str | None = None) -> None:
    """Check that a path can be the file of a saved algorithm.

    :param path: a path, or an open file, which is not checked.
    :param algorithm: name of the algorithm's class, for the message.
    :param kind: name of the class that loads it, if another.
    :raises IsADirectoryError: if it is a folder; the message says how a checkpoint is used.
    :raises FileNotFoundError: if it is on the Hugging Face hub.
    """
    if not isinstance(path, (str, Path)):
        return
    place, on_hub = local_path(path), str(path).startswith(HUB)
    kind = kind or algorithm
    reads = f"{kind}.load reads the file that {kind}.save wrote"
    if on_hub or (place.is_dir() and (native.place_of_configuration(place) / "config.json").is_file()):
        raise (FileNotFoundError if on_hub else IsADirectoryError)(
            f"{path} is a checkpoint; {reads}. To train from it give {algorithm}('VLAPolicy', env, "
            f"policy_kwargs={{'checkpoint': {str(path)!r}}}), to act by it sb3_vla.policies.load_policy({str(path)!r})"
        )
    if place.is_dir():
        archives = sorted(str(found) for found in (*place.glob("*.zip"), Path(f"{place}.zip")) if found.is_file())
        there = f"; there is {', '.join(archives)}" if archives else ""
        checkpoints = checkpoints_in(place)
        there += f"; checkpoints in it are {', '.join(checkpoints)}" if checkpoints else ""
        raise IsADirectoryError(f"{path} is a folder; {reads}{there}")
    name = hub_name(str(path))
    if name is not None and not place.exists() and not Path(f"{place}.zip").exists():
        raise NotThereError(
            f"There is no {place}.zip; {reads}. Where a checkpoint on the Hugging Face hub is meant, give "
            f"policy_kwargs={{'checkpoint': {name!r}}} to {algorithm}"
        )
