"""Properties of a tokenizer that several packages need: its fingerprint and the special tokens around a text."""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer

from msense.errors import InputError


def fingerprint(tokenizer: Tokenizer | dict[str, Any]) -> str:
    """Return the hexadecimal sha256 of a tokenizer or its parsed tokenizer.json, without truncation and padding."""
    definition = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
    bare = {**definition, "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def special_tokens_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that the tokenizer adds before and after a text."""
    body = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), None)
    if start is None:
        raise InputError(
            "the teacher's tokenizer changes the tokens of a text when it adds special tokens, so passages cannot be cut "
            "with it: use another teacher"
        )
    return tuple(whole[:start]), tuple(whole[start + len(body) :])
