"""Reading a checkpoint of whatever layout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mw_envs.tasks import did_you_mean
from sb3_vla.checkpoints import native
from sb3_vla.checkpoints.folders import HUB, local_folder
from sb3_vla.checkpoints.native import LoadedCheckpoint
from sb3_vla.checkpoints.pi0 import is_pi0, load_pi0


def load_checkpoint(source: str | Path, options: Mapping[str, Any] | None = None) -> LoadedCheckpoint:
    """Read a checkpoint: our own, or one as others publish it.

    :param source: folder; of a published one also ``hf://owner/name`` or ``hf://owner/name@revision`` on the
        Hugging Face hub.
    :param options: of a published one, those of its reader, such as :func:`sb3_vla.checkpoints.pi0.load_pi0` or
        :func:`sb3_vla.checkpoints.openvla_oft.load_openvla_oft`; ours says everything itself.
    :raises FileNotFoundError: if it is not there or incomplete; the message says what is missing.
    :raises ValueError: if it is damaged or does not fit its own configuration, or its reader has no such option.
    """
    folder = local_folder(source) if str(source).startswith(HUB) else Path(source).expanduser()
    published = native.published_reader(folder)
    if published is None:
        # SmolVLA has weights of the same names as pi0, but its configuration says what it is.
        return load_pi0(folder, options) if is_pi0(folder) else native.load_checkpoint(folder)
    known = list(inspect.signature(published).parameters)[1:]
    for name in options or {}:
        if name not in known:
            hint = did_you_mean(name, known) if known else "it takes none"
            raise ValueError(f"The reader of {source} has no option {name!r}; {hint}")
    return published(folder, **(options or {}))


def takes_options(source: str | Path) -> bool:
    """Whether others have published it, so that it may need to be told what it does not say."""
    folder = local_folder(source) if str(source).startswith(HUB) else Path(source).expanduser()
    return native.published_reader(folder) is not None or is_pi0(folder)
