"""A student's tokenizer: texts in, token ids out, cut at the longest text that the student reads.

Comes in: a tokenizer.json that nobody vouches for, then texts. Goes out: integers [n_i] a text, or one text's tokens with
their places. Holds the tokenizer and one slab of encodings.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from msense.dictionary.lookup import read_vocabulary, refused
from msense.errors import BadInput, DictionaryError, StudentError
from msense.student.config import StudentConfig
from msense.teacher import pad_batch
from msense.text import is_utf8

_SLAB = 256  # texts tokenised at a time


class TextReader:
    """Turns texts into a student's token ids."""

    def __init__(self, path: Path, config: StudentConfig) -> None:
        """Read a tokenizer.

        Args:
            path: its tokenizer.json.
            config: of the student whose it is to be.

        Raises:
            StudentError: it is damaged, hostile or not the student's, or its special tokens leave no room for text.
        """
        try:
            vocabulary = read_vocabulary(path, config.vocab_size, config.tokenizer_fingerprint)
        except (OSError, DictionaryError) as error:
            raise StudentError(f"{path} is not the student's tokenizer ({error})") from error
        self.tokenizer = vocabulary.tokenizer
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= config.vocab_size:
            raise StudentError(
                f"{path} has a token {largest}, but the student only those from 0 to {config.vocab_size - 1}: they are not "
                "of one student; copy or train it again"
            )
        special = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        if special >= config.max_length:
            raise StudentError(
                f"{path} puts {special} special tokens around a text, but config.json lets the student read "
                f"{config.max_length} tokens only: copy or train it again"
            )
        self.tokenizer.enable_truncation(config.max_length)

    def ids(self, texts: Sequence[str], prompt: str = "") -> list[np.ndarray]:
        """Return the token ids of texts, int64 [n_i], special ones too.

        Args:
            texts: of any length; what is beyond the longest text that the student reads is left out.
            prompt: put before each.

        Raises:
            BadInput: something is no text.
        """
        _check(texts, prompt)
        found: list[np.ndarray] = []
        for start in range(0, len(texts), _SLAB):
            slab = texts[start : start + _SLAB]
            with refused("fails at a text"):
                encodings = self.tokenizer.encode_batch_fast([prompt + text for text in slab] if prompt else list(slab))
            found += [np.array(encoding.ids, np.int64) for encoding in encodings]
        return found

    def encoding(self, text: str, prompt: str = "") -> Encoding:
        """Return the tokens of one text with their places in prompt + text.

        Raises:
            BadInput: it is no text.
        """
        _check([text], prompt)
        with refused("fails at a text"):
            return self.tokenizer.encode(prompt + text)


def _check(texts: Sequence[str], prompt: str) -> None:
    """Refuse what the tokenizer cannot read."""
    for place, text in enumerate((prompt, *texts), -1):
        what = f"text {place}" if place >= 0 else "the prompt"
        if not isinstance(text, str):
            raise BadInput(f"{what} is a {type(text).__name__}: give text (str), and read files first")
        if not text.isascii() and not is_utf8(text):
            raise BadInput(f"{what} holds half a surrogate pair: decode what it was read from with errors='replace'")


def padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: int64 [B, L] and mask bool [B, L], L at least 1."""
    if not any(len(row) for row in rows):
        return torch.zeros(len(rows), 1, dtype=torch.int64), torch.zeros(len(rows), 1, dtype=torch.bool)
    ids, mask = pad_batch(list(rows))
    return torch.from_numpy(ids).long(), torch.from_numpy(mask)
