"""The tokenizer of a published checkpoint: found and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sb3_vla.checkpoints.layout import write_json
from sb3_vla.paths import local_path


def write_tokenizer(folder: Path, text: str, pad_token: str) -> None:
    """A folder that transformers' tokenizers load from."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad_token}
    write_json(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})


def find_tokenizer(folder: Path, places: Sequence[str], given: str | Path | None) -> str:
    """Contents of the ``tokenizer.json`` of a checkpoint.

    :param places: folders inside the checkpoint, or names on the hub, in this order.
    :param given: what the caller wants instead.
    :raises FileNotFoundError: if there is none; the message says where it was looked for.
    """
    if given is not None:
        path = local_path(given)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"There is no tokenizer {path}; expected a tokenizer.json, or a folder with one")
        return path.read_text(encoding="utf-8")
    for place in places:
        path = folder / place / "tokenizer.json"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    from huggingface_hub import hf_hub_download

    for place in places:
        try:
            return Path(hf_hub_download(place, "tokenizer.json")).read_text(encoding="utf-8")
        except (OSError, ValueError):  # no such name there, or no network
            continue
    raise FileNotFoundError(
        f"Checkpoint {folder} has no tokenizer: no tokenizer.json in {' or '.join(place or '.' for place in places)}, "
        "there or on the hub. Put the one of its language model there, or read the checkpoint with tokenizer=<path>"
    )
