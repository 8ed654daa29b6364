"""Instructions as PaliGemma's tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sb3_vla.common.errors import NotThereError
from sb3_vla.common.paths import local_path

BOS = 2
_REMEMBERED = 4096


class PromptTokenizer:
    """Text to token ids, padded on the right; the tokenizer is loaded when it is first needed.

    :param source: a folder with ``tokenizer.json``, that file, a SentencePiece ``.model`` file (needs the
        ``sentencepiece`` package), or a repository on the Hugging Face hub, ``owner/name`` or ``owner/name@revision``.
    :param length: tokens kept, with padding.
    """

    def __init__(self, source: str, length: int) -> None:
        self.source = source
        self.length = length
        self._encode: Callable[[str], list[int]] | None = None
        self._remembered: dict[tuple[str, ...], list[int]] = {}

    def __call__(self, prompts: Sequence[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
        """Tokens of prompts, each of parts that are tokenized one by one and follow a beginning-of-sentence token.

        :return: ids, int64 (N, length), and which of them are no padding, bool (N, length).
        :raises FileNotFoundError: if there is no tokenizer.
        """
        tokens = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        valid = torch.zeros(len(prompts), self.length, dtype=torch.bool)
        for row, parts in enumerate(prompts):
            ids = self._ids(parts)[: self.length]
            tokens[row, : len(ids)] = torch.tensor(ids)
            valid[row, : len(ids)] = True
        return tokens, valid

    def _ids(self, parts: tuple[str, ...]) -> list[int]:
        if parts not in self._remembered:
            if self._encode is None:
                self._encode = _load(self.source)
            if len(self._remembered) >= _REMEMBERED:  # prompts that hold the state are ever new
                self._remembered.clear()
            self._remembered[parts] = [BOS, *(token for part in parts for token in self._encode(part))]
        return self._remembered[parts]


def clean(sentence: str) -> str:
    """A sentence as openpi writes it into a prompt."""
    return sentence.strip().replace("_", " ").replace("\n", " ")


def find_tokenizer_file(folder: Path) -> Path | None:
    """A tokenizer in a folder, or in its subfolder ``tokenizer``; None for none."""
    for place in (folder, folder / "tokenizer"):
        for name in ("tokenizer.json", "paligemma_tokenizer.model", "tokenizer.model"):
            if (place / name).is_file():
                return place / name
    return None


def local_tokenizer_file(source: str) -> Path | None:
    """The file of a tokenizer, see :class:`PromptTokenizer`, if it is on this machine; nothing is fetched."""
    path = local_path(source)
    return path if path.is_file() else find_tokenizer_file(path)


def is_hub_name(source: str) -> bool:
    """Whether this could be a repository on the Hugging Face hub, ``owner/name`` or ``owner/name@revision``."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two places name the same tokenizer, or hold copies of it."""
    files = local_tokenizer_file(one), local_tokenizer_file(other)
    if files[0] is None or files[1] is None:
        return one == other
    return files[0].read_bytes() == files[1].read_bytes()


def copy_tokenizer(file: Path, folder: Path) -> None:
    """A tokenizer's file, and what Hugging Face keeps beside it, into a new folder in which it is found."""
    folder.mkdir()
    if file.suffix == ".model":
        shutil.copyfile(file, folder / "tokenizer.model")
        return
    shutil.copyfile(file, folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)


def tokenizer_file(source: str) -> Path:
    """The file of a tokenizer, see :class:`PromptTokenizer`; it is fetched from the hub if need be.

    :raises FileNotFoundError: if there is none.
    """
    path, found = local_path(source), local_tokenizer_file(source)
    if found is not None:
        return found
    advice = (
        "Give tokenizer=FOLDER with tokenizer.json, a SentencePiece file such as openpi's paligemma_tokenizer.model, "
        "or a hub repository such as google/paligemma-3b-pt-224 (gated: accept its license and log in first)"
    )
    if path.is_dir() or not is_hub_name(source):
        raise NotThereError(f"No PaliGemma tokenizer at {source!r}. {advice}")
    from huggingface_hub import hf_hub_download  # a heavy import, needed by few

    repository, _, revision = source.partition("@")
    try:
        return Path(hf_hub_download(repository, "tokenizer.json", revision=revision or None))
    except Exception as error:  # gated, offline, unknown: all mean that there is no tokenizer
        raise NotThereError(f"No PaliGemma tokenizer at {source!r}: {error}. {advice}") from error


def _load(source: str) -> Callable[[str], list[int]]:
    path = tokenizer_file(source)
    if path.suffix == ".model":
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise NotThereError(
                f"{path} is a SentencePiece model, which needs `pip install sentencepiece`; "
                "or give tokenizer=FOLDER with tokenizer.json"
            ) from error
        return SentencePieceProcessor(model_file=str(path)).encode  # type: ignore[no-any-return]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
