"""Tokenize texts with a student's tokenizer, whose tokenizer.json is validated first."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from msense.dictionary.lookup import Vocabulary, tokenizer_errors
from msense.errors import DictionaryError, InputError, StudentError
from msense.student.config import LONGEST, StudentConfig
from msense.teacher.batching import pad_batch
from msense.text import is_utf8

_TEXTS_AT_A_TIME = 1024


class StudentTokenizer:
    """A student's tokenizer; texts are truncated to `config.max_length` tokens, and a table's have no special tokens."""

    def __init__(self, path: Path, config: StudentConfig) -> None:
        """Load a tokenizer.json; raise StudentError if it is damaged, another's, or leaves no room for text."""
        try:
            vocabulary = Vocabulary(path, config.vocab_size, config.tokenizer_fingerprint)
        except DictionaryError as error:
            raise StudentError(f"{path} is not the student's tokenizer ({error})") from error
        self.tokenizer = vocabulary.tokenizer
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        self.special_tokens = not config.is_table
        special = self.tokenizer.num_special_tokens_to_add(is_pair=False) * self.special_tokens
        if largest >= config.vocab_size:
            raise StudentError(
                f"{path} has token id {largest}, but the student {config.vocab_size} tokens: copy it again"
            )
        if special >= config.max_length:
            excess = f"adds {special} special tokens to a text, but max_length is {config.max_length}"
            raise StudentError(f"{path} {excess}: train the student again")
        self.rows = largest + 1  # of an embedding table of all its tokens
        self.truncation_side = config.truncation_side
        self.truncate(config.max_length)

    def truncate(self, max_length: int) -> None:
        """Truncate texts to at most `max_length` tokens."""
        if max_length >= LONGEST:
            self.tokenizer.no_truncation()
        else:
            self.tokenizer.enable_truncation(max_length, direction=self.truncation_side)

    def ids(self, texts: Sequence[str], prompt: str = "", first: int = 0) -> list[np.ndarray]:
        """Return the token ids of prompt + text for each text, int64 [n_i].

        Raises:
            InputError: a text is invalid; the error numbers the texts from `first`.
        """
        check_text("the prompt", prompt)
        check_chunk(texts, first)
        rows: list[np.ndarray] = []
        encode = self.tokenizer.encode_batch_fast
        for start in range(0, len(texts), _TEXTS_AT_A_TIME):
            some = texts[start : start + _TEXTS_AT_A_TIME]
            some = [prompt + text for text in some] if prompt else list(some)
            with tokenizer_errors("fails at a text"):
                encodings = encode(some, add_special_tokens=self.special_tokens)
            ends = list(accumulate(map(len, encodings)))
            ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64, ends[-1])
            rows += [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return rows

    def encoding(self, text: str, prompt: str = "") -> Encoding:
        """Return the tokens of one text with their offsets in prompt + text; raise InputError for invalid text."""
        check_text("the prompt", prompt)
        check_text("the text", text)
        with tokenizer_errors("fails at a text"):
            return self.tokenizer.encode(prompt + text, add_special_tokens=self.special_tokens)


def check_chunk(texts: Sequence[str], first: int) -> None:
    """Raise InputError for texts, numbered from `first`, that the tokenizer cannot read."""
    with suppress(TypeError):  # all at once, which takes a tenth of the time
        if is_utf8("".join(texts)):
            return
    for number, text in enumerate(texts, first):
        check_text(f"text {number}", text)


def check_text(name: str, text: object) -> None:
    """Raise InputError for a value that is no text, or that UTF-8 cannot encode."""
    if not isinstance(text, str):
        raise InputError(f"{name} has type {type(text).__name__}: give a str (of a file, its contents)")
    if not is_utf8(text):
        raise InputError(f"{name} contains an unpaired surrogate: decode its source with errors='replace'")


def pad_ids(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: int64 [B, L] and mask bool [B, L], L at least 1."""
    ids, mask = pad_batch(rows)
    return torch.from_numpy(ids).long(), torch.from_numpy(mask)
