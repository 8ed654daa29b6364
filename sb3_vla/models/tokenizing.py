"""Instructions as token ids, by the tokenizer file of a published model or byte by byte.

A model holds the text of its ``tokenizer.json``, so that a checkpoint of it needs no other file and no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mw_envs.tasks import decode_instruction
from sb3_vla.common.errors import InputError


class InstructionTokenizer:
    """Observed instructions to token ids.

    :param text: contents of a ``tokenizer.json`` of Hugging Face's tokenizers.
    :param template: the prompt, with ``{}`` where the sentence goes.
    :param max_length: ids kept; what is longer loses its end. None for all.
    :param lower: whether the sentence is written in lower case.
    :param line: whether it ends in a newline, which it gets where it has none.
    :raises ValueError: if the text is no tokenizer.
    """

    def __init__(
        self, text: str, template: str, max_length: int | None, lower: bool = False, line: bool = False
    ) -> None:
        # A heavy import, which the workers of a script that imports this module are spared.
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"tokenizer is not the contents of a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.template, self.max_length, self.lower, self.line = template, max_length, lower, line
        self.size: int = self._tokenizer.get_vocab_size()
        self._known: dict[bytes, list[int]] = {}

    def __call__(self, instruction: Tensor) -> list[list[int]]:
        """Token ids of each row of uint8 (N, L); few different sentences are met, and each is tokenized once."""
        return [self._ids(row) for row in instruction.cpu().numpy()]

    def special(self, token: str) -> int:
        """Id of a special token.

        :raises ValueError: if the tokenizer has none of that name.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"The tokenizer has no token {token!r}; use the one that the model was published with")
        return found

    def _ids(self, row: np.ndarray) -> list[int]:
        key = row.tobytes()
        if key not in self._known:
            sentence = decode_instruction(row)
            if self.line and not sentence.endswith("\n"):
                sentence += "\n"
            prompt = self.template.format(sentence.lower() if self.lower else sentence)
            self._known[key] = self._tokenizer.encode(prompt).ids[: self.max_length]
        return self._known[key]


def byte_tokenizer(special: Sequence[str], start: str | None = None) -> str:
    """A ``tokenizer.json`` of the special tokens, in the order of their ids, and then one token for each byte.

    :param start: the special token that begins every text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    # ByteLevel writes a byte as the character of that number where it can be seen, and as one from 256 on elsewhere.
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    alphabet = [chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
        )
    return tokenizer.to_str()
