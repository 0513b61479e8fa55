"""The tokens of a text with their senses, as `SenseEncoder.tokens` returns them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from msense.constants import DEFAULT_TEMPERATURE
from msense.dictionary import SenseDictionary
from msense.dictionary.contexts import Exemplar
from msense.text import clean

_LIKELY = 8  # senses listed per token


@dataclass(frozen=True)
class TokenSense:
    """A token of a text and its sense."""

    token: str  # as written in the vocabulary
    token_id: int
    start: int  # offset in the text, in characters
    end: int  # exclusive
    sense: int  # index of its nearest sense; -1 for a token without senses
    probability: float  # softmax(score / (temperature · unit)) among the token's senses; 0 without senses
    nearest: Exemplar | None  # example of that sense, if the dictionary has one
    likely: tuple[tuple[int, float], ...] = ()  # the most likely senses with their probabilities, likeliest first

    @property
    def exemplar(self) -> str | None:
        """The nearest example in the corpus's own text, on one line, its word in brackets."""
        if (own := self.nearest) is None:
            return None
        word = own.word.lstrip()
        space = " " * (len(own.word) - len(word))  # some tokens of older dictionaries include the space before
        return re.sub(r"\s+", " ", f"{clean(own.left)}{space}[{clean(word).strip()}]{clean(own.right)}")


def kept_tokens(encoding: Encoding, prompt: str) -> list[int]:
    """Return the indices of tokens that are neither special nor of the prompt."""
    places = zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
    return [i for i, (special, (a, b)) in enumerate(places) if not special and b > max(a, len(prompt))]


def token_senses(
    dictionary: SenseDictionary, encoding: Encoding, kept: Sequence[int], embeddings: Tensor, prompt: str
) -> list[TokenSense]:
    """Return the senses of some tokens of a text, from their sense embeddings, float32 [n, D]."""
    ids = np.array(encoding.ids, np.int64)[list(kept)]
    most = int(np.diff(dictionary.offsets)[ids].max(initial=1))  # probabilities are over all senses of a token
    numbers, weights = dictionary.top_k(torch.from_numpy(ids), embeddings, most, DEFAULT_TEMPERATURE)
    senses, shares = numbers[:, :_LIKELY].tolist(), weights[:, :_LIKELY].tolist()
    nearest = _nearest_exemplars(dictionary, set(zip(ids.tolist(), (own[0] for own in senses), strict=True)))
    return [
        TokenSense(
            token=encoding.tokens[place],
            token_id=encoding.ids[place],
            start=max(encoding.offsets[place][0] - len(prompt), 0),
            end=encoding.offsets[place][1] - len(prompt),
            sense=own[0],
            probability=share[0],
            nearest=nearest.get((encoding.ids[place], own[0])),
            likely=tuple((sense, p) for sense, p in zip(own, share, strict=True) if sense >= 0),
        )
        for place, own, share in zip(kept, senses, shares, strict=True)
    ]


def _nearest_exemplars(dictionary: SenseDictionary, pairs: set[tuple[int, int]]) -> dict[tuple[int, int], Exemplar]:
    """Return the nearest exemplar of each (token, sense) that has one."""
    nearest: dict[tuple[int, int], Exemplar] = {}
    for token in {token for token, sense in pairs if sense >= 0}:
        for exemplar in dictionary.exemplars(token):  # ordered by distance
            if (pair := (token, exemplar.sense)) in pairs:
                nearest.setdefault(pair, exemplar)
    return nearest
