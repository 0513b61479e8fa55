"""Which texts are labelled: passages that the plan needs, or the first by key, with their spans; and queries.

Memory: the plan's thresholds and the texts of one partition.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from msense.constants import Metric
from msense.corpus.chunking import encode_texts
from msense.corpus.passages import Passages, read_block, read_texts
from msense.corpus.spans import KINDS, MIN_PASSAGE, MIN_TOKENS, spans_of
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import load_arrays, open_parquet
from msense.io.hashing import hash64
from msense.run.folder import RunFolder
from msense.run.journal import timed
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import StageContext
from msense.stages.embedding_store import Duplicates, Partition, partition_passages
from msense.stages.passages import PassageStage
from msense.stages.plan import Tally, iter_blocks, sliced
from msense.stages.reading import EmbedSettings
from msense.stages.sampling import select
from msense.training.label_dataset import HELD_OUT_BY, HeldOutBy

logger = logging.getLogger(__name__)
HELD_OUT_SALT = 0x68656C64  # documents are held out by a hash independent of the passage keys
HELD_OUT_FACTOR = 3  # by which the held-out share of the text may differ from the wanted one
_KEY_SALT = np.uint64(0x9E3779B97F4A7C15)  # odd: mixes the lower bits of passage keys into the upper ones
KEY_BINS_BITS = 20
QUERY_BLOCKS = 16  # of a partition of queries
SAMPLED_BLOCKS = 16  # of which a dry run counts the spans


@dataclass(frozen=True)
class LabelSettings:
    """Settings of the tasks and actors of this stage."""

    run: RunFolder  # where the labels are written
    text: RunFolder  # with the passages and their plan
    embed: EmbedSettings  # teacher and passage layout
    reads_kept: bool  # whether the embeddings kept in the text's run may be used
    dictionary: str
    fingerprint: str  # of the dictionary
    pooled: bool
    soft_targets: int
    metric: Metric
    temperature: float
    held_out: float
    train_tokens: int | None
    spans: dict[str, float]  # shares by kind
    last_key: int | None = None  # of the passages to label; None = those that the plan needs
    held_out_by: HeldOutBy = "documents"
    skips: bool = False  # whether labels have the tokens of each text that are not pooled, which differ


@dataclass(frozen=True)
class SelectionStats:
    """The numbers of chosen passages and their tokens."""

    passages: int
    tokens: int


class QueryStage(PassageStage):
    """Writes the passages of queries, of which the first of each query is labelled."""

    name = "queries"


def query_partitions(blocks: Sequence[int], first: int) -> list[Partition]:
    """Group the blocks of the queries, given their number in every file, into partitions numbered from `first`."""
    places = [(split, block) for split, count in enumerate(blocks) for block in range(count)]
    groups = [places[start : start + QUERY_BLOCKS] for start in range(0, len(places), QUERY_BLOCKS)]
    return [
        Partition(number, [split for split, _ in group], [block for _, block in group], queries=True)
        for number, group in enumerate(groups, first)
    ]


def choose_passages(
    settings: LabelSettings, blocks: Sequence[int], context: StageContext
) -> tuple[LabelSettings, SelectionStats]:
    """Choose the passages to label among these numbers of blocks; every driver repeats it.

    Returns:
        The settings with the key of the last passage to label, and the numbers chosen.

    Raises:
        InputError: no passage was chosen, or `train_tokens` is smaller than the first passages.
    """
    executor, name = context.executor, "choosing passages"
    with timed(context.summary, name) as shown:
        slices = sliced(blocks, 2 * executor.resources.tasks)
        if settings.train_tokens is not None:
            by_key = executor.get(executor.reduce("labels: keys", _count_keys, slices, settings))
            settings = replace(settings, last_key=_last_key(by_key.counts, settings.train_tokens))
        counts = executor.get(executor.reduce("labels: passages", _count_passages, slices, settings)).counts.tolist()
        chosen, held = SelectionStats(*counts[:2]), counts[2:]
        if not chosen.tokens:
            raise InputError("no passage of this text is to be labelled: use another text or --train-tokens")
        settings = replace(settings, held_out_by=_choose_held_out(held, chosen.tokens, settings.held_out))
        context.journal.add(name, made=1)
        shown.update(asdict(chosen))
    return settings, chosen


def _count_keys(splits: list[tuple[int, int]], settings: LabelSettings) -> Tally:
    """Count the tokens of passages by the leading bits of their keys, int64 [2^KEY_BINS_BITS]."""
    counts = np.zeros(1 << KEY_BINS_BITS, np.int64)
    for _, _, passages in iter_blocks(settings.text, splits):
        bins = (passages.keys >> np.uint64(64 - KEY_BINS_BITS)).astype(np.int64)
        counts += np.bincount(bins, passages.lengths, len(counts)).astype(np.int64)
    return Tally(counts)


def _last_key(counts: np.ndarray, tokens: int) -> int:
    """Return the last key of the leading bins that hold at most `tokens` tokens."""
    total = np.cumsum(counts)
    bins = int(np.searchsorted(total, tokens, side="right"))
    if not bins or not total[bins - 1]:
        least = int(total[total > 0][:1].sum())
        raise InputError(f"--train-tokens {tokens} is too small for the first passages: set it to at least {least}")
    return (bins << (64 - KEY_BINS_BITS)) - 1


def _count_passages(splits: list[tuple[int, int]], settings: LabelSettings) -> Tally:
    """Count the chosen passages, their tokens, and the tokens held out by document and by passage."""
    selector, counts = TextSelector(settings), np.zeros(2 + len(HELD_OUT_BY), np.int64)
    for split, block in ((split, block) for split, count in splits for block in range(count)):
        passages = partition_passages(settings.text, place := Partition(0, [split], [block]), selector.duplicates)
        chosen = selector.chosen(passages)
        lengths = passages.lengths[chosen]
        held = [lengths[selector.held_out(place, by)[chosen]].sum() for by in HELD_OUT_BY]
        counts += [len(lengths), lengths.sum(), *held]
    return Tally(counts)


def sample_spans(settings: LabelSettings, partitions: Sequence[Partition], tokens: int, executor: Executor) -> Row:
    """Return the numbers of spans and of their tokens by kind, estimated from a few blocks of so many chosen tokens."""
    places = [place for partition in partitions for place in zip(partition.splits, partition.blocks, strict=True)]
    sampled = places[:: max(1, -(-len(places) // SAMPLED_BLOCKS))]
    counts = executor.get(executor.reduce("labels: spans", _count_spans, sampled, settings)).counts.reshape(2, -1)
    estimated = np.round(counts * (tokens / max(1, counts[1, 0]))).astype(int)
    names = [(number, name) for number, name in enumerate(KINDS) if name in settings.spans]
    return {name: {"spans": int(estimated[0, number]), "tokens": int(estimated[1, number])} for number, name in names}


def _count_spans(place: tuple[int, int], settings: LabelSettings) -> Tally:
    texts = TextSelector(settings)(Partition(0, [place[0]], [place[1]]))
    kinds, lengths = texts.kinds[texts.wanted], texts.passages.lengths[texts.wanted]
    return Tally(
        np.r_[np.bincount(kinds, minlength=len(KINDS)), np.bincount(kinds, lengths, len(KINDS)).astype(np.int64)]
    )


def _choose_held_out(held: list[int], tokens: int, share: float) -> HeldOutBy:
    """Return what is held out as a whole: documents, or passages if documents give far more or less text than wanted.

    `held` are the tokens held out by document and by passage.

    Raises:
        InputError: nothing would be left to train on.
    """
    by_document = share * tokens / HELD_OUT_FACTOR <= held[0] <= share * tokens * HELD_OUT_FACTOR and held[0] < tokens
    number = 0 if by_document else 1
    if held[number] == tokens:
        raise InputError(f"--held-out {share} leaves nothing of this text to train on: lower it, or use more text")
    if share and not held[number]:
        logger.warning("no passage is held out for validation: this text has too few for --held-out %g", share)
    elif number:
        logger.info("passages are held out, not documents, as these differ too much in length or are too few")
    return HELD_OUT_BY[number]


@dataclass(frozen=True)
class Texts:
    """The texts of a partition: T passages, then their spans."""

    passages: Passages
    needed: np.ndarray  # int64, increasing: those that the plan needs, which are read together
    wanted: np.ndarray  # bool [T], to be labelled
    kinds: np.ndarray  # uint8 [T], places in `KINDS`
    held_out: np.ndarray  # bool [T]


class TextSelector:
    """Selects the texts to label; keeps the plan's thresholds in memory."""

    def __init__(self, settings: LabelSettings) -> None:
        self.settings = settings
        self.duplicates = Duplicates(settings.text)
        self.threshold = load_arrays(settings.text.thresholds, ("threshold",))["threshold"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer."""
        return Tokenizer.from_str(storage.read_text(self.settings.run.tokenizer))

    def __call__(self, partition: Partition) -> Texts:
        """Return the texts of a partition."""
        if partition.queries:
            return self._queries(partition)
        passages = partition_passages(self.settings.text, partition, self.duplicates)
        needed, chosen = self._needed(passages), self.chosen(passages)
        held = self.held_out(partition, self.settings.held_out_by)
        spans, kinds, of = self._spans(partition, passages, chosen)
        return Texts(
            Passages.concatenate([passages, spans]),
            needed,
            np.r_[chosen, np.ones(len(kinds), dtype=bool)],
            np.r_[np.zeros(len(chosen), dtype=np.uint8), kinds],
            np.r_[held, held[of]],
        )

    def _needed(self, passages: Passages) -> np.ndarray:
        """Return the passages that the plan needs, increasing int64."""
        embed = self.settings.embed
        return np.unique(passages.rows()[select(passages, self.threshold, embed.spec, embed.per_passage)])

    def chosen(self, passages: Passages) -> np.ndarray:
        """Return which passages are labelled, bool [P]."""
        if self.settings.last_key is not None:
            return np.asarray(passages.keys <= np.uint64(self.settings.last_key))
        chosen = np.zeros(len(passages.keys), dtype=bool)
        chosen[self._needed(passages)] = True
        return chosen

    def held_out(self, partition: Partition, by: HeldOutBy) -> np.ndarray:
        """Return which passages of a partition are held out, bool [P]."""
        run, share = self.settings.text, self.settings.held_out
        places = zip(partition.splits, partition.blocks, strict=True)
        drop = self.duplicates.of
        held = [np.delete(_held_out(run.passages_file(p), b, share, by), drop(p, b)) for p, b in places]
        return np.concatenate(held)

    def _spans(
        self, partition: Partition, passages: Passages, chosen: np.ndarray
    ) -> tuple[Passages, np.ndarray, np.ndarray]:
        """Return the spans of the chosen passages, their kinds, uint8, and the passage of each, int64."""
        found: list[tuple[int, int, str, str]] = []  # passage, kind, text, prompt of the passage
        spec, start = self.settings.embed.spec, 0
        frame = len(spec.prefix) + len(spec.prompt) + len(spec.suffix)
        chosen = chosen & (passages.lengths - frame - passages.context >= MIN_PASSAGE)
        for split, block in zip(partition.splits, partition.blocks, strict=True) if self.settings.spans else ():
            texts, index, prompts = read_texts(self.settings.text.passages_file(split), block)
            rows = np.delete(np.arange(len(texts)), self.duplicates.of(split, block))
            for number, row in enumerate(rows.tolist(), start):
                if chosen[number]:
                    key, first = int(passages.keys[number]), index[row] == 0
                    spans = spans_of(texts[row], key, self.settings.spans, opens_document=first)
                    prompt = prompts[row] if prompts else ""
                    found += [(number, kind, text, prompt) for kind, text in spans]
            start += len(rows)
        own = None if spec.prompt_column is None else [prompt for *_, prompt in found]
        encoded = encode_texts([text for _, _, text, _ in found], spec, self.tokenizer, own)
        short = np.flatnonzero(encoded.lengths - frame - encoded.context < MIN_TOKENS)
        of, kinds = np.array([row[:2] for row in found], dtype=np.int64).reshape(-1, 2).T
        return encoded.without(short), np.delete(kinds, short).astype(np.uint8), np.delete(of, short)

    def _queries(self, partition: Partition) -> Texts:
        """Return the passages of a partition of queries, the first of each of which is labelled."""
        run = RunFolder(self.settings.run.queries)
        places = list(zip(partition.splits, partition.blocks, strict=True))
        passages = Passages.concatenate([read_block(run.passages_file(split), block) for split, block in places])
        index = np.concatenate([read_texts(run.passages_file(split), block).places for split, block in places])
        kinds = np.full(len(index), KINDS.index("query"), dtype=np.uint8)
        held = _drawn(passages.keys, self.settings.held_out)
        return Texts(passages, np.zeros(0, dtype=np.int64), index == 0, kinds, held)


def _drawn(keys: np.ndarray, share: float) -> np.ndarray:
    """Return which passages with these keys, uint64 [P], are held out of their own account, bool [P]."""
    return np.asarray(keys * _KEY_SALT < np.float64(share) * 2**64)


def _held_out(uri: str, block: int, share: float, by: HeldOutBy) -> np.ndarray:
    """Return which passages of a block are held out, bool [P]: those of held-out documents, or of their own account."""
    table = open_parquet(uri).read_row_group(block, columns=["key" if by == "passages" else "document_id"])
    column = table.column(0).combine_chunks()
    if by == "passages":
        return _drawn(column.to_numpy(), share)
    documents = column.dictionary_encode()
    drawn = [
        hash64(name.encode("utf-8", "surrogatepass"), seed=HELD_OUT_SALT) < share * 2**64
        for name in documents.dictionary.to_pylist()
    ]
    return np.array(drawn, dtype=bool)[documents.indices.to_numpy()]
