"""Reading a checkpoint of whatever layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_vla.checkpoints import native
from sb3_vla.checkpoints.native import LoadedCheckpoint
from sb3_vla.checkpoints.pi0 import is_pi0, load_pi0


def load_checkpoint(source: str | Path, options: Mapping[str, Any] | None = None) -> LoadedCheckpoint:
    """Read a checkpoint: our own, or pi0 and pi0.5 as openpi, LeRobot, RLinf and transformers publish them.

    :param source: folder; of a published one also ``owner/name`` or ``owner/name@revision`` on the Hugging Face hub.
    :param options: of a published one, see :func:`sb3_vla.checkpoints.pi0.load_pi0`; ours says everything itself.
    :raises FileNotFoundError: if it is not there or incomplete; the message says what is missing.
    :raises ValueError: if it is damaged or does not fit its own configuration.
    """
    if takes_options(source):
        return load_pi0(source, options)
    return native.load_checkpoint(source)


def takes_options(source: str | Path) -> bool:
    """Whether this is a pi0 or pi0.5 as others publish it, which may need to be told what it does not say."""
    # SmolVLA has weights of the same names, but its configuration says what it is.
    return native.published_reader(Path(source)) is None and is_pi0(source)
