"""Cutting of documents into passages, and the passages file of an input split.

A document is tokenized and cut at word ends into passages of at most `max_length` tokens, stored in input order in row
groups ("blocks") of about 32k tokens, the grain of partitions. Memory: one batch of documents and one block.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Encoding, Tokenizer

from msense.constants import LISTED_BAD_DOCUMENTS
from msense.corpus import BadDocument, Document, InputSplit, read_documents
from msense.corpus.passages import BLOCK_TOKENS, PROMPTED_SCHEMA, SCHEMA, Passages, PassageSpec, as_gaps
from msense.errors import InputError
from msense.io.hashing import hash64
from msense.tokenizer import skipped_tokens

BATCH_DOCUMENTS = 256
CACHED_PROMPTS = 256  # of at most `MAX_PROMPT` characters
SLICE_CHARACTERS = 1 << 18
_ItemT = TypeVar("_ItemT")
_Offsets = list[tuple[int, int]]  # characters [start, stop) of each token


def passage_keys(document_id: str, count: int, seed: int) -> np.ndarray:
    """Return the keys of a document's passages, uint64 [count]: a 64-bit hash of (seed, document id, index).

    The index is mixed in with the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    base = hash64(document_id.encode("utf-8", "surrogatepass"), seed=seed)
    z = np.uint64(base) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def cut_points(offsets: _Offsets, text: str, length: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut one tokenized text into passages.

    Args:
        offsets: of its tokens, without special tokens.
        text: the text, or a prompt and the text.
        length: maximum number of tokens in a passage, context included.
        stride: desired context tokens before the body of every passage but the first.

    Returns:
        (context start, body start, end) of each passage, in tokens. Bodies are consecutive. A passage starts after white
        space if possible, else outside a run of letters and digits, else (in a long word) between two characters.
    """
    total = len(offsets)
    if total <= length:
        return [(0, 0, total)] if total else []
    cuts, begin, context = [], 0, 0
    while begin < total:
        end = min(total, begin - context + length)
        if end < total:
            end = _word_end(offsets, text, begin + 1, end)
            if context and not _between_words(offsets, text, end):
                context = 0  # the next word fits only without context
                continue
        cuts.append((begin - context, begin, end))
        begin = end
        context = begin - _context_start(offsets, text, max(0, begin - stride), begin) if stride else 0
    return cuts


def _word_end(offsets: _Offsets, text: str, first: int, last: int) -> int:
    """Return the last token in [first, last] at which a passage may start, by the best kind of border available.

    The last half is searched first, so that a space far back does not cause a short passage.
    """
    for start, borders in (((first + last) // 2, (_after_space, _between_words)), (first, _BORDERS)):
        for border in borders:
            for token in range(last, start - 1, -1):
                if border(offsets, text, token):
                    return token
    return last


def _context_start(offsets: _Offsets, text: str, first: int, last: int) -> int:
    """Return the first token in [first, last) that starts a word, else `last` (no context)."""
    return next((t for t in range(first, last) if t == 0 or _after_space(offsets, text, t)), last)


def _after_space(offsets: _Offsets, text: str, token: int) -> bool:
    start, stop = offsets[token]
    is_border = start < stop and start >= offsets[token - 1][1]
    return is_border and (text[start].isspace() or (start > 0 and text[start - 1].isspace()))


def _between_words(offsets: _Offsets, text: str, token: int) -> bool:
    start, stop = offsets[token]
    inside = start > 0 and text[start - 1].isalnum() and start < stop and text[start].isalnum()
    return start >= offsets[token - 1][1] and not inside


def _between_characters(offsets: _Offsets, text: str, token: int) -> bool:
    return offsets[token][0] >= offsets[token - 1][1]


_BORDERS = (_after_space, _between_words, _between_characters)


class Piece(NamedTuple):
    """A passage of a document."""

    context: int  # as `Passages.context`
    ids: np.ndarray  # int32 [L]
    text: str  # of the body
    gaps: np.ndarray  # int32 [L], with `lengths` the place of each token in the text, as in the passages file
    lengths: np.ndarray  # int32 [L]


class Prompt(NamedTuple):
    """What stands before a text."""

    text: str
    tokens: int  # of it alone
    length: int  # tokens at the start of a passage that are not pooled where those of prompts are not


def prompt_reader(spec: PassageSpec, tokenizer: Tokenizer) -> Callable[[str | None], Prompt]:
    """Return a function that returns the prompt of a document, given its own text, or None for that of the spec."""

    @lru_cache(CACHED_PROMPTS)
    def read(text: str) -> Prompt:
        tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        counted = {"include_prompt": False, "include_frame": spec.include_frame}
        return Prompt(text, tokens, skipped_tokens(tokenizer, text, spec.max_length, **counted))

    return lambda text: read(spec.prompt_text if text is None else text)


@dataclass
class BlockWriter:
    """Buffer of passages that writes a row group whenever a block is full."""

    writer: pq.ParquetWriter
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # in the order of the columns
    tokens: int = 0
    blocks: list[int] = field(default_factory=list)  # number of tokens of each block written
    passages: int = 0

    def add(self, key: np.uint64, document_id: str, index: int, piece: Piece, prompt: tuple[str, int] | None) -> None:
        """Add one passage, with its prompt's text and length in a file that has them; write the block when it is full."""
        self.rows.append((key, document_id, index, *piece, *(prompt or ())))
        self.tokens += len(piece.ids)
        if self.tokens >= BLOCK_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered passages as one block."""
        if not self.rows:
            return
        schema = self.writer.schema
        columns = [
            pa.array(column, kind) for column, kind in zip(zip(*self.rows, strict=True), schema.types, strict=True)
        ]
        table = pa.Table.from_arrays(columns, schema=schema)
        self.writer.write_table(table, row_group_size=len(self.rows))
        self.blocks.append(self.tokens)
        self.passages += len(self.rows)
        self.rows, self.tokens = [], 0


def write_passages(
    split: InputSplit, spec: PassageSpec, tokenizer: Tokenizer, path: Path, fail_on_bad: bool = False
) -> dict[str, Any]:
    """Write the passages file of one input split.

    Args:
        split: input split.
        spec: how to cut passages.
        tokenizer: tokenizer of the teacher.
        path: local file to write.
        fail_on_bad: raise at the first bad document instead of counting it.

    Returns:
        Counts: documents, passages, tokens, blocks (tokens of each), bad (number by reason), listed (the first 100 bad
        documents of each reason).

    Raises:
        InputError: a bad document, when `fail_on_bad`.
    """
    bad: Counter[str] = Counter()
    listed: list[dict[str, str]] = []
    documents = tokens = 0
    schema = SCHEMA if spec.prompt_column is None else PROMPTED_SCHEMA
    prompt_of = prompt_reader(spec, tokenizer)
    with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as parquet:
        blocks = BlockWriter(parquet)
        read = read_documents(split, spec.text_column, spec.sample, spec.seed, spec.id_column, spec.prompt_column)
        items = (_with_room(item, spec, prompt_of) if isinstance(item, Document) else item for item in read)
        for batch in _batches(items, _characters):
            for item in batch:
                if not isinstance(item, BadDocument):
                    continue
                if fail_on_bad:
                    message = f"bad document {item.id}: {item.reason} {item.detail}".rstrip()
                    raise InputError(f"{message}; skip bad documents with --on-bad-document skip")
                bad[item.reason] += 1
                if bad[item.reason] <= LISTED_BAD_DOCUMENTS:
                    listed.append(asdict(item))
            good = [item for item in batch if isinstance(item, Document)]
            documents += len(good)
            prompts = [prompt_of(item.prompt) for item in good]
            tokens += _add_documents(good, prompts, spec, tokenizer, blocks)
        blocks.flush()
    counts = {"documents": documents, "passages": blocks.passages, "tokens": tokens, "blocks": blocks.blocks}
    return {**counts, "bad": dict(bad), "listed": listed}


def _with_room(
    document: Document, spec: PassageSpec, prompt_of: Callable[[str | None], Prompt]
) -> Document | BadDocument:
    """Return a document, or what is wrong with it if its prompt leaves no room for text."""
    tokens = prompt_of(document.prompt).tokens
    if spec.room(tokens) > spec.stride:
        return document
    needed = f" and a stride of {spec.stride}" if spec.stride else ""
    detail = f"{tokens} tokens of prompt leave no room for text{needed} in passages of {spec.max_length} tokens"
    return BadDocument(document.id, "long prompt", detail)


def _characters(item: Document | BadDocument) -> int:
    return len(item.text) + len(item.prompt or "") if isinstance(item, Document) else 0


def _batches(items: Iterable[_ItemT], characters: Callable[[_ItemT], int]) -> Iterator[list[_ItemT]]:
    """Group items by their number and characters, to bound the memory of a batch."""
    batch: list[_ItemT] = []
    total = 0
    for item in items:
        batch.append(item)
        total += characters(item)
        if len(batch) >= BATCH_DOCUMENTS or total >= SLICE_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _slices(text: str) -> Iterator[str]:
    """Split a very long text at white space into slices that are tokenized separately."""
    start = 0
    while len(text) - start > SLICE_CHARACTERS:
        end = start + SLICE_CHARACTERS
        space = max(text.rfind(c, start + 1, end) for c in " \n\t")
        end = space if space > 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def _add_documents(
    documents: list[Document], prompts: list[Prompt], spec: PassageSpec, tokenizer: Tokenizer, blocks: BlockWriter
) -> int:
    """Tokenize, cut and add documents with their prompts; return the number of tokens in their passages."""
    passages: list[list[Piece]] = [[] for _ in documents]
    slices = ((number, text) for number, document in enumerate(documents) for text in _slices(document.text))
    for group in _batches(slices, lambda numbered: len(numbered[1])):
        cut = _pieces([(text, prompts[number]) for number, text in group], spec, tokenizer)
        for (number, _), pieces in zip(group, cut, strict=True):
            passages[number] += pieces
    tokens = 0
    for document, prompt, its_passages in zip(documents, prompts, passages, strict=True):
        own = None if spec.prompt_column is None else (prompt.text, prompt.length)
        keys = passage_keys(document.id, len(its_passages), spec.seed)
        for index, piece in enumerate(its_passages):
            key = hash64(piece.ids.tobytes(), seed=spec.seed) if spec.dedup else keys[index]
            blocks.add(np.uint64(key), document.id, index, piece, own)
            tokens += len(piece.ids)
    return tokens


def encode_texts(
    texts: Sequence[str], spec: PassageSpec, tokenizer: Tokenizer, prompts: Sequence[str] | None = None
) -> Passages:
    """Return the first passage of each text, with the key 0: the text itself unless it is too long.

    `prompts` are those of the texts; None: all have that of the spec.
    """
    frame, none = np.array((*spec.prefix, *spec.suffix), dtype=np.int32), np.zeros(0, dtype=np.int32)
    given = list(map(prompt_reader(spec, tokenizer), [None] * len(texts) if prompts is None else prompts))
    first = [
        next(pieces, Piece(-len(spec.prompt), frame, "", none, none))
        for group in _batches(zip(texts, given, strict=True), lambda pair: len(pair[0]) + len(pair[1].text))
        for pieces in _pieces(group, spec, tokenizer)
    ]
    keys, lengths = np.zeros(len(first), np.uint64), np.array([prompt.length for prompt in given], dtype=np.int32)
    own = None if prompts is None else lengths
    return Passages.of_rows(keys, [piece.context for piece in first], [piece.ids for piece in first], own)


def _pieces(texts: Sequence[tuple[str, Prompt]], spec: PassageSpec, tokenizer: Tokenizer) -> Iterator[Iterator[Piece]]:
    """Yield the passages of each text with its prompt."""
    prompted = [prompt.text + text for text, prompt in texts]
    encodings = tokenizer.encode_batch(prompted, add_special_tokens=False)
    for encoding, whole, (_, prompt) in zip(encodings, prompted, texts, strict=True):
        yield _cut(encoding, whole, prompt, spec)


def _cut(encoding: Encoding, text: str, given: Prompt, spec: PassageSpec) -> Iterator[Piece]:
    """Yield the passages of a prompt and text that were tokenized as one string.

    A token that reaches from the prompt into the text, such as one that starts with the prompt's last space, is text.
    """
    ids, offsets = np.array(encoding.ids, dtype=np.int32), encoding.offsets
    limit, end = min(given.tokens, len(ids)), len(given.text)
    prompt = next((place for place in range(limit) if offsets[place][1] > end), limit) if end else 0
    frame = np.array((*spec.prefix, *ids[:prompt]), dtype=np.int32), np.array(spec.suffix, dtype=np.int32)
    length = spec.room(prompt)
    last = len(offsets) - prompt
    bounds = np.array(offsets, dtype=np.int32).reshape(-1, 2)

    def character(token: int) -> int:
        """Return where the text of a token of the body starts."""
        return len(text) if token == last else max(offsets[prompt + token][0], end) if token else end

    for context, begin, stop in cut_points(offsets[prompt:], text, length, spec.stride):
        body = ids[prompt + context : prompt + stop]
        passage, before = np.concatenate([frame[0], body, frame[1]]), len(frame[0]) + begin - context
        first, last_character = character(begin), character(stop)
        first += len(text[first:last_character]) - len(text[first:last_character].lstrip())
        own = text[first:last_character].rstrip()
        places = np.zeros((len(passage), 2), dtype=np.int32)
        places[before : before + stop - begin] = (bounds[prompt + begin : prompt + stop] - first).clip(0, len(own))
        places[before + stop - begin :] = len(own)
        yield Piece(prompt - len(spec.prompt) + begin - context, passage, own, *as_gaps(*places.T))
