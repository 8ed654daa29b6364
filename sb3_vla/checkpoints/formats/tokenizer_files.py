"""The tokenizer of a published checkpoint: found and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sb3_vla.checkpoints.formats.lerobot import step
from sb3_vla.common.errors import NotThereError
from sb3_vla.common.files import write_json
from sb3_vla.common.paths import local_path

#: subfolder of a checkpoint with a copy of its tokenizer
TOKENIZER = "tokenizer"


def write_tokenizer(folder: Path, text: str, pad_id: int = 0, named: Mapping[str, str] | None = None) -> None:
    """A folder from which transformers loads this very tokenizer.

    :param text: contents of a ``tokenizer.json``.
    :param pad_id: of the token that pads. It must be one of the tokenizer's: transformers gives one that it has not the
        number behind the last, for which a model has no embedding.
    :param named: tokens that a processor finds under these names.
    """
    from tokenizers import Tokenizer  # a heavy import, which the workers of a script are spared

    settings: dict[str, Any] = {
        # Whatever class it was published with: this one takes tokenizer.json as it is, others build parts of it anew.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": Tokenizer.from_str(text).id_to_token(pad_id),
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings | ({"extra_special_tokens": dict(named)} if named else {}))


def beginning_with(text: str, start: int) -> str:
    """A ``tokenizer.json`` by which each text is one token and then its own: the given one, or with a template for it.

    :param start: id of that token.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_str(text)
    if tokenizer.encode("a").ids == [start, *tokenizer.encode("a", add_special_tokens=False).ids]:
        return text
    token = tokenizer.id_to_token(start)
    tokenizer.post_processor = TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, start)]
    )
    return tokenizer.to_str()


def lerobot_step(settings: Mapping[str, Any], text: str, folder: Path, published: Iterable[str]) -> dict[str, Any]:
    """LeRobot's step that reads sentences with the tokenizer in a checkpoint's folder :data:`TOKENIZER`.

    Released LeRobot loads ``config.tokenizer_name`` alone, which is a name on the hub or a path, and a relative one is
    taken from the working directory. Unreleased LeRobot, and this package, find ``artifacts`` inside the checkpoint.

    :param settings: the step's other settings.
    :param folder: the checkpoint's own, not the one that it is written in.
    :param published: names on the hub. The first that has this very tokenizer, as the hub's cache on this machine
        tells, is taken, since it is found wherever the folder is moved; for any other it is the copy's full path.
    """
    from huggingface_hub import try_to_load_from_cache  # a heavy import, needed by few

    name = str(folder.absolute() / TOKENIZER)
    for there in published:
        cached = try_to_load_from_cache(there, "tokenizer.json")
        if isinstance(cached, str) and Path(cached).read_text(encoding="utf-8") == text:
            name = there
            break
    reads = step("tokenizer_processor", **settings, tokenizer_name=name)
    return {**reads, "artifacts": {"tokenizer_name": TOKENIZER}}


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
            raise NotThereError(f"There is no tokenizer {path}; expected a tokenizer.json, or a folder with one")
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
    raise NotThereError(
        f"Checkpoint {folder} has no tokenizer: no tokenizer.json in {' or '.join(place or '.' for place in places)}, "
        "there or on the hub. Put the one of its language model there, or read the checkpoint with tokenizer=<path>"
    )
