"""Passages as arrays: how they are specified, and how a block of a passages file is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from msense.constants import MAX_INT32
from msense.errors import InputError
from msense.io.arrays import open_parquet

BLOCK_TOKENS = 1 << 15
_KINDS = {"key": pa.uint64(), "document_id": pa.string(), "index": pa.int32(), "context": pa.int32()}
_PLACES = {"gaps": pa.list_(pa.int32()), "lengths": pa.list_(pa.int32())}  # see `token_places`; 0.6 bytes per token
SCHEMA = pa.schema({**_KINDS, "input_ids": pa.list_(pa.int32()), "text": pa.string(), **_PLACES})  # text of the body
# with --prompt-column: the prompt of the passage's document, and its tokens as `Passages.prompts` counts them
PROMPTED_SCHEMA = pa.schema([*SCHEMA, pa.field("prompt", pa.string()), pa.field("prompt_length", pa.int32())])


class PassageOptions(BaseModel):
    """How the documents of a corpus become passages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_column: str = Field("text", description="column of the text in jsonl, parquet and csv files")
    id_column: str = Field(
        "id", description="column of document ids; id is used only if present; none: rows are numbered"
    )
    prompt_column: str | None = Field(
        None,
        description="column of the instruction before each document's text in jsonl, parquet and csv files: an empty one is "
        "none, and where it is null or missing --prompt counts, as for txt and pydocs; default: --prompt for all",
    )
    dedup: bool = Field(False, description="read passages of the same content once (ids are then not compared)")
    stride: int = Field(
        0, ge=0, le=MAX_INT32, description="context tokens repeated from the passage before; never sampled twice"
    )
    sample: float = Field(
        1.0, gt=0, le=1, description="share of the documents to read; with --dry-run the whole is estimated from it"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")


@dataclass(frozen=True)
class PassageSpec:
    """How documents are cut into passages; the same for every input split of a run.

    A passage is prefix + prompt + context + body + suffix: prefix and suffix are the tokenizer's special tokens, the
    context repeats the last tokens of the previous passage (`stride`). Prompt and text are tokenized as one string, as a
    token may start with the prompt's last space; `prompt` has the tokens of the prompt alone. With a `prompt_column`, it is
    the prompt of the documents that have none of their own.

    Example:
        >>> PassageSpec(max_length=128, prefix=(101,), suffix=(102,)).body_length
        126
    """

    max_length: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    stride: int = 0
    seed: int = 0
    dedup: bool = False
    text_column: str = "text"
    sample: float = 1.0
    id_column: str = "id"
    prompt_column: str | None = None
    prompt_text: str = ""
    skip_frame: bool = False  # never sample or label prefix and suffix, whatever their tokens
    include_frame: bool = True  # see `tokenizer.skipped_tokens`

    def __post_init__(self) -> None:
        if self.body_length < 1:
            raise InputError(
                f"max_length {self.max_length} leaves no room for text after {len(self.prompt)} tokens of prompt and "
                f"{len(self.prefix) + len(self.suffix)} special tokens: raise --max-length or shorten --prompt"
            )
        if self.stride >= self.body_length:
            raise InputError(
                f"stride {self.stride} must be smaller than the {self.body_length} text tokens of a passage: lower it"
            )

    @property
    def body_length(self) -> int:
        """Maximum number of text tokens in a passage, context included."""
        return self.room(len(self.prompt))

    def room(self, prompt: int) -> int:
        """Return the maximum number of text tokens after a prompt of so many tokens."""
        return self.max_length - len(self.prefix) - prompt - len(self.suffix)


@dataclass(frozen=True)
class Passages:
    """A block of P passages with T tokens, as flat arrays.

    Example:
        >>> block = read_block("passages/00000.parquet", 0)
        >>> first = block.ids[block.offsets[0] : block.offsets[1]]
    """

    keys: np.ndarray  # uint64 [P]
    # int32 [P], tokens between the place after `PassageSpec.prompt` and the body: context, and those by which the passage's
    # prompt is longer; negative if it is shorter, as when its last token is text
    context: np.ndarray
    ids: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int64 [P + 1], start of each passage in ids
    # int32 [P], the tokens at the start that are not pooled where those of prompts are not; None: all have the same prompt
    prompts: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each passage, int64 [P]."""
        return np.diff(self.offsets)

    def row(self, number: int) -> np.ndarray:
        """Return the token ids of one passage, int32 [L]."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]

    def rows(self) -> np.ndarray:
        """Return the passage of each token, int64 [T]."""
        return np.repeat(np.arange(len(self.keys)), self.lengths)

    def positions(self) -> np.ndarray:
        """Return the position of each token in its passage, int64 [T]."""
        return np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], self.lengths)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return the places in `ids` of the tokens of these rows, one row after the other, int64 [n]."""
        lengths = self.lengths[rows]
        starts = np.cumsum(lengths) - lengths
        return np.repeat(self.offsets[rows] - starts, lengths) + np.arange(lengths.sum())

    def eligible(self, spec: PassageSpec) -> np.ndarray:
        """Return which tokens may be sampled and labelled, bool [T]: not prompt, context, frame or excluded tokens."""
        position, start = self.positions(), len(spec.prefix)
        body = start + len(spec.prompt) + np.repeat(self.context, self.lengths)
        skipped = (position >= start) & (position < body)
        if spec.skip_frame:
            skipped |= (position < start) | (position >= np.repeat(self.lengths, self.lengths) - len(spec.suffix))
        return ~skipped & ~np.isin(self.ids, np.asarray(spec.excluded, dtype=np.int32))

    def without(self, rows: np.ndarray) -> "Passages":
        """Return the block without the passages of these rows."""
        if not len(rows):
            return self
        kept = np.ones(len(self.keys), dtype=bool)
        kept[rows] = False
        offsets = np.r_[0, np.cumsum(self.lengths[kept])].astype(np.int64)
        prompts = None if self.prompts is None else self.prompts[kept]
        return Passages(self.keys[kept], self.context[kept], self.ids[np.repeat(kept, self.lengths)], offsets, prompts)

    @staticmethod
    def of_rows(
        keys: np.ndarray, context: Sequence[int], rows: Sequence[np.ndarray], prompts: np.ndarray | None = None
    ) -> "Passages":
        """Return passages from the key, the context and the token ids of each, and the lengths of their own prompts."""
        ids = np.concatenate([np.zeros(0, np.int32), *rows])
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Passages(keys, np.array(context, dtype=np.int32), ids, offsets, prompts)

    @staticmethod
    def concatenate(blocks: "list[Passages]") -> "Passages":
        """Concatenate blocks, all or none of which have prompts of their own."""
        own = [b.prompts for b in blocks if b.prompts is not None]
        starts = np.cumsum([0, *(len(b.ids) for b in blocks)])
        return Passages(
            np.concatenate([b.keys for b in blocks]),
            np.concatenate([b.context for b in blocks]),
            np.concatenate([b.ids for b in blocks]),
            np.concatenate([b.offsets[:-1] + s for b, s in zip(blocks, starts, strict=False)] + [starts[-1:]]),
            np.concatenate(own) if own else None,
        )


def read_block(uri: str, block: int) -> Passages:
    """Read one block (row group) of a passages file, without the document ids and texts."""
    table = open_parquet(uri).read_row_group(block, columns=["key", "context", "input_ids", "prompt_length"])
    lists = table.column("input_ids").combine_chunks()
    return Passages(
        table.column("key").to_numpy(),
        table.column("context").to_numpy(),
        lists.flatten().to_numpy(zero_copy_only=False),
        lists.offsets.to_numpy().astype(np.int64),
        table.column("prompt_length").to_numpy() if "prompt_length" in table.column_names else None,
    )


def as_gaps(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of tokens, int32 [L], as stored: characters from the token before, and of the token."""
    return starts - np.concatenate([stops[:1] * 0, stops[:-1]]), stops - starts


def token_places(gaps: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters [start, stop) of a passage's text of each of its tokens, int64 [L] each.

    Those of tokens without text are empty: of prompt and context at 0, of the suffix at the end of the text.
    """
    stops = np.cumsum(gaps + lengths)
    return stops - lengths, stops


class PassageTexts(NamedTuple):
    """What a passages file has of a block's P passages beside their tokens."""

    texts: list[str]
    places: np.ndarray  # int32 [P], index of each passage in its document
    prompts: list[str] | None  # None: all have `PassageSpec.prompt_text`


def read_texts(uri: str, block: int) -> PassageTexts:
    """Read the texts of a block's passages, their places in documents, and their prompts."""
    table = open_parquet(uri).read_row_group(block, columns=["text", "index", "prompt"])
    own = table.column("prompt").to_pylist() if "prompt" in table.column_names else None
    return PassageTexts(table.column("text").to_pylist(), table.column("index").to_numpy(), own)
