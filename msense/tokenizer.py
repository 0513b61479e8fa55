"""Properties of a tokenizer that several packages need: its fingerprint and the special tokens around a text."""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from msense.errors import InputError


def fingerprint(tokenizer: Tokenizer | dict[str, Any]) -> str:
    """Return the hexadecimal sha256 of a tokenizer or its parsed tokenizer.json, without truncation and padding."""
    definition = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
    bare = {**definition, "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def special_tokens_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that the tokenizer's template adds before and after a text.

    Raises:
        InputError: the template changes or repeats the text.
    """
    marker = Tokenizer(WordLevel({"text": 0}, unk_token="text")).encode("text")
    whole = tokenizer.post_process(marker)
    places = [place for place, sequence in enumerate(whole.sequence_ids) if sequence is not None]
    if len(places) != 1:
        raise InputError(
            "the teacher's tokenizer changes the tokens of a text when it adds special tokens, so passages cannot be cut "
            "with it: use another teacher"
        )
    return tuple(whole.ids[: places[0]]), tuple(whole.ids[places[0] + 1 :])


def prompt_length(tokenizer: Tokenizer, prompt: str, max_length: int | None = None) -> int:
    """Return how many tokens at the start of a text are those of a prompt, as sentence-transformers counts them.

    The tokens of the prompt alone, truncated to `max_length`, including special tokens, except one at the end.
    """
    if not prompt:
        return 0
    ids = tokenizer.encode(prompt).ids
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return min(len(ids), max_length or len(ids)) - bool(ids and ids[-1] in special)


def skipped_tokens(
    tokenizer: Tokenizer, prompt: str, max_length: int | None = None, *, include_prompt: bool, include_frame: bool
) -> int:
    """Return how many tokens at the start of a text are not pooled.

    Those of a prompt are, unless `include_prompt`, as sentence-transformers counts them. Unless `include_frame`, all before
    the text are, as LLM2Vec counts them: those of the tokenizer's template, and those of a prompt without a space at its end,
    which is the text's.
    """
    if include_frame:
        return 0 if include_prompt else prompt_length(tokenizer, prompt, max_length)
    own = prompt.rstrip(" ")
    count = len(special_tokens_around(tokenizer)[0])
    count += len(tokenizer.encode(own, add_special_tokens=False).ids) if own else 0
    return min(count, max_length or count)
