"""Stage 6: label every token of the chosen passages with the sense that the teacher assigns to it.

The passages are those that the plan needs, or the first by key up to a number of tokens. Memory of an actor: the teacher,
the dictionary, one partition (about `PARTITION_BYTES`) and one batch of hidden states.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from msense.constants import NO_SENSE, Metric
from msense.corpus.passages import Passages, read_block
from msense.dictionary import SenseDictionary
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.io.arrays import load_arrays, open_parquet, read_columns, save_arrays
from msense.run.folder import RunFolder
from msense.run.journal import timed
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage, StageContext
from msense.stages.embed import EmbedSettings, load_teacher, not_finite
from msense.stages.embedding_store import TARGET_PARTITIONS, Duplicates, Partition, group_blocks
from msense.stages.plan import Tally, iter_blocks, sliced, write_blocks
from msense.stages.sampling import select
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.model import embed_tokens
from msense.teacher.pooling import load_head
from msense.training.label_dataset import (
    HELD_OUT_BY,
    HeldOutBy,
    LabelManifest,
    LabelPartition,
    label_columns,
    label_size,
)

logger = logging.getLogger(__name__)
PARTITION_BYTES = (1 << 19, 256 << 20)  # minimum and maximum of the target size of a partition
HELD_OUT_SALT = 0x68656C64  # documents are held out by a hash independent of the passage keys
HELD_OUT_FACTOR = 3  # by which the held-out share of the text may differ from the wanted one
_KEY_SALT = np.uint64(0x9E3779B97F4A7C15)  # odd: mixes the lower bits of passage keys into the upper ones
KEY_BINS_BITS = 20
ASSIGN_NUMBERS = 1 << 23  # hidden-state elements assigned together, as small batches cost as much as large ones
_ROW = ("piece", "block", "passages", "tokens")
_TYPES = {"U16": np.uint16, "F16": np.float16}


@dataclass(frozen=True)
class LabelSettings:
    """Settings of the tasks and actors of this stage."""

    run: RunFolder  # where the labels are written
    text: RunFolder  # with the passages and their plan
    embed: EmbedSettings  # teacher and passage layout
    dictionary: str
    fingerprint: str  # of the dictionary
    pooled: bool
    pooled_dim: int  # size of a sentence vector
    soft_targets: int
    metric: Metric
    temperature: float
    held_out: float
    train_tokens: int | None
    last_key: int | None = None  # of the passages to label; None = those that the plan needs
    held_out_by: HeldOutBy = "documents"


@dataclass(frozen=True)
class SelectionStats:
    """The numbers of chosen passages and their tokens."""

    passages: int
    tokens: int


@dataclass(frozen=True)
class LabelStats:
    """The contents of finished labels."""

    partitions: int
    passages: int
    tokens: int
    labelled: int  # tokens with a sense
    held_out: int  # passages
    bytes: int


def choose_passages(
    settings: LabelSettings, blocks: Sequence[int], context: StageContext
) -> tuple[LabelSettings, SelectionStats]:
    """Choose the passages to label, and write the number of each of these numbers of blocks; every driver repeats it.

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
        counted = executor.reduce("labels: passages", _count_passages, slices, settings)
        written = executor.run(_write_blocks, counted, settings.run)
        chosen = SelectionStats(written["passages"], written["tokens"])
        if not chosen.tokens:
            raise InputError("no passage of this text is to be labelled: use another text or --train-tokens")
        by = _choose_held_out(written["held"], chosen.tokens, settings.held_out)
        settings = replace(settings, held_out_by=by)
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
    selector, rows = PassageSelector(settings), []
    held = np.zeros(len(HELD_OUT_BY), np.int64)  # tokens
    for split, block in ((split, block) for split, count in splits for block in range(count)):
        passages, chosen = selector(split, block)
        rows.append((split, block, len(passages.keys), len(passages.ids)))
        uri = settings.text.passages_file(split)
        held += [passages.lengths[_held_out(uri, block, settings.held_out, by)[chosen]].sum() for by in HELD_OUT_BY]
    return Tally(held, np.array(rows, dtype=np.int64))


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


def _write_blocks(counted: Tally, run: RunFolder) -> Row:
    passages, tokens = counted.rows[:, 2:].sum(axis=0).tolist()
    write = partial(write_blocks, counted.rows, _ROW)
    return run.publish(
        run.label_blocks, write, {"passages": passages, "tokens": tokens, "held": counted.counts.tolist()}
    )


class PassageSelector:
    """Reads blocks and selects the passages to label; keeps the plan's thresholds in memory."""

    def __init__(self, settings: LabelSettings) -> None:
        self.settings = settings
        self.duplicates = Duplicates(settings.text)
        self.threshold = load_arrays(settings.text.thresholds, ("threshold",))["threshold"]

    def __call__(self, split: int, block: int) -> tuple[Passages, np.ndarray]:
        """Return the passages of a block to label, and which of the block's passages they are, bool [P]."""
        passages, embed = read_block(self.settings.text.passages_file(split), block), self.settings.embed
        if self.settings.last_key is not None:
            chosen = passages.keys <= np.uint64(self.settings.last_key)
        else:
            chosen = np.zeros(len(passages.keys), dtype=bool)
            chosen[passages.rows()[select(passages, self.threshold, embed.spec, embed.per_passage)]] = True
        chosen[self.duplicates.of(split, block)] = False
        return passages.without(np.flatnonzero(~chosen)), chosen

    def partition(self, partition: Partition) -> tuple[Passages, np.ndarray]:
        """Return the passages of a partition to label, and whether each is held out, bool [P]."""
        parts, held = [], []
        for split, block in zip(partition.splits, partition.blocks, strict=True):
            passages, chosen = self(split, block)
            parts.append(passages)
            uri, settings = self.settings.text.passages_file(split), self.settings
            held.append(_held_out(uri, block, settings.held_out, settings.held_out_by)[chosen])
        return Passages.concatenate(parts), np.concatenate(held)


def _held_out(uri: str, block: int, share: float, by: HeldOutBy) -> np.ndarray:
    """Return which passages of a block are held out, bool [P]: those of held-out documents, or of their own account."""
    table = open_parquet(uri).read_row_group(block, columns=["key" if by == "passages" else "document_id"])
    column = table.column(0).combine_chunks()
    if by == "passages":
        return np.asarray(column.to_numpy() * _KEY_SALT < np.float64(share) * 2**64)
    documents = column.dictionary_encode()
    drawn = [
        xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed=HELD_OUT_SALT) < share * 2**64
        for name in documents.dictionary.to_pylist()
    ]
    return np.array(drawn, dtype=bool)[documents.indices.to_numpy()]


def cut_label_partitions(settings: LabelSettings) -> list[Partition]:
    """Cut the chosen passages into partitions of similar size in bytes; depends on data and config only."""
    table = read_columns(settings.run.label_blocks, list(_ROW))
    dim = settings.pooled_dim if settings.pooled else 0
    size = label_size(table["passages"], table["tokens"], dim, settings.soft_targets)
    some = size > 0
    target = int(np.clip(size.sum() // TARGET_PARTITIONS, *PARTITION_BYTES))
    return group_blocks(table["piece"][some], table["block"][some], size[some], table["tokens"][some], target)


class LabelActor:
    """Loads teacher and dictionary once, and writes the label file of each partition it is called with."""

    def __init__(self, settings: LabelSettings) -> None:
        """Load teacher and dictionary; raise MsenseError if either differs from the one the run was started with."""
        self.settings = settings
        self.chooser = PassageSelector(settings)
        self.teacher = load_teacher(settings.embed)
        dictionary = SenseDictionary.load(settings.dictionary)
        if dictionary.fingerprint != settings.fingerprint:
            raise MsenseError(
                f"the dictionary {settings.dictionary} changed during the run, or differs on this node: restore it, or start "
                "over with another --output"
            )
        self.dictionary = dictionary.to("cuda") if settings.embed.device == "cuda" else dictionary
        self.head = load_head(settings.embed.teacher, settings.embed.info).to(settings.embed.device)

    def __call__(self, item: Row) -> Row:
        """Write one partition; return its stats."""
        partition = Partition(**item)
        passages, held = self.chooser.partition(partition)
        stats = {
            "number": partition.number,
            "passages": len(passages.keys),
            "tokens": len(passages.ids),
            "held_out_passages": int(held.sum()),
        }

        def write(path: Path) -> Row:
            arrays = self._label(passages)
            save_arrays(path, {**arrays, "held_out": held.astype(np.uint8)})
            labelled = int((arrays["senses"] != NO_SENSE).sum())
            return {"labelled": labelled, "size": path.stat().st_size, "sha256": storage.sha256_of(path)}

        return self.settings.run.publish(self.settings.run.label_file(partition.number), write, stats)

    def _label(self, passages: Passages) -> dict[str, np.ndarray]:
        """Embed passages and return the columns of their label file except `held_out`."""
        settings, dim = self.settings, self.settings.embed.info.dim
        size = settings.pooled_dim if settings.pooled else 0
        columns = label_columns(len(passages.keys), len(passages.ids), size, settings.soft_targets)
        arrays = {
            name: np.full(shape, NO_SENSE if name in ("senses", "soft_senses") else 0, _TYPES[kind])
            for name, (kind, shape) in columns.items()
            if kind in _TYPES
        }
        eligible = passages.eligible(settings.embed.spec)
        held: list[tuple[np.ndarray, Tensor]] = []
        rows = [passages.row(number) for number in range(len(passages.keys))]
        for batch, hidden in embed_tokens(self.teacher, rows, TOKEN_BUDGET[settings.embed.device]):
            mask = torch.from_numpy(batch.mask).to(hidden.device)
            if settings.pooled:
                with torch.no_grad():
                    vectors = self.head(hidden, mask).half()
                self._check_finite(vectors)
                arrays["pooled"][batch.rows] = vectors.cpu().numpy()
            flat = np.concatenate([np.arange(passages.offsets[r], passages.offsets[r + 1]) for r in batch.rows])
            wanted = eligible[flat]
            held.append((flat[wanted], hidden[mask][torch.from_numpy(wanted).to(hidden.device)]))
            if sum(len(places) for places, _ in held) * dim >= ASSIGN_NUMBERS:
                self._assign(passages, held, arrays)
                held = []
        if held:
            self._assign(passages, held, arrays)
        return {**arrays, "offsets": passages.offsets, "ids": passages.ids.astype(np.int32)}

    def _assign(self, passages: Passages, held: list[tuple[np.ndarray, Tensor]], arrays: dict[str, np.ndarray]) -> None:
        """Write the senses of tokens, given by their places in the partition and their embeddings, into the columns."""
        places, points = np.concatenate([place for place, _ in held]), torch.cat([values for _, values in held])
        self._check_finite(points)
        ids, metric, top = torch.from_numpy(passages.ids[places]), self.settings.metric, self.settings.soft_targets
        arrays["senses"][places] = (
            self.dictionary.assign(ids, points, metric=metric).cpu().numpy()
        )  # -1 is stored as 65535
        if top:
            senses, weights = self.dictionary.top_k(ids, points, top, self.settings.temperature, metric=metric)
            arrays["soft_senses"][places] = senses.cpu().numpy()
            arrays["soft_weights"][places] = weights.half().cpu().numpy()

    def _check_finite(self, embeddings: Tensor) -> None:
        if not embeddings.isfinite().all():
            raise MsenseError(not_finite(self.settings.embed.dtype, "NaN, infinite or too large for float16"))


def are_finished(run: RunFolder, executor: Executor) -> bool:
    """Return whether the labels of a run are complete and every checksum matches."""
    manifest = storage.read_json(run.label_manifest)
    if manifest is None or manifest.get("made_of") != run.inputs_hash:
        return False
    files = [run.label_senses, *(run.label_file(n) for n in range(len(manifest["units"])))]
    return all(stats is not None for stats in finished("labels", run, files, executor))


class LabelStage(Stage[LabelStats]):
    """Writes the labels of a run."""

    name = "labels"

    def __init__(self, settings: LabelSettings, partitions: Sequence[Partition]) -> None:
        """Label the partitions of `cut_label_partitions` with the settings of `choose_passages`."""
        super().__init__(settings.run, [settings.run.label_file(partition.number) for partition in partitions])
        self.settings, self.partitions = settings, partitions

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Run the missing partitions through teacher actors."""
        items = [asdict(self.partitions[number]) for number in missing]
        return executor.map_actors(self.name, LabelActor, {"settings": self.settings}, items)

    def reduce(self, executor: Executor, stats: list[Row]) -> LabelStats:
        """Write the manifest and return its totals."""
        result: LabelStats = executor.run(_write_manifest, self.settings, stats)
        return result


def _write_manifest(settings: LabelSettings, stats: list[Row]) -> LabelStats:
    """Write the number of senses of every token, and the manifest with the stats of all partitions."""
    run, dictionary = settings.run, SenseDictionary.load(settings.dictionary)
    sizes = np.diff(dictionary.offsets).astype(np.int32)
    run.publish(run.label_senses, lambda path: save_arrays(path, {"senses": sizes}))
    of_dictionary = ("teacher", "tokenizer_fingerprint", "vocab_size", "dim", "temperature_unit")
    of_labels = ("metric", "train_tokens", "held_out", "held_out_by", "soft_targets", "pooled", "pooled_dim")
    of_teacher = ("pooling", "normalize")
    manifest = LabelManifest(
        inputs_hash=run.inputs_hash,
        dictionary=settings.fingerprint,
        **{name: getattr(dictionary.config, name) for name in of_dictionary},
        **{name: getattr(settings, name) for name in of_labels},
        **{name: getattr(settings.embed.info, name) for name in of_teacher},
        temperature=settings.temperature if settings.soft_targets else None,
        held_out_salt=HELD_OUT_SALT,
        partitions=tuple(LabelPartition(**{name: row[name] for name in LabelPartition.model_fields}) for row in stats),
    )
    storage.write_json(run.label_manifest, manifest.model_dump(mode="json", by_alias=True))
    return label_stats(manifest)


def label_stats(manifest: LabelManifest) -> LabelStats:
    """Return the totals of finished labels."""
    counts = ("passages", "tokens", "labelled", "held_out_passages", "size")
    return LabelStats(len(manifest.partitions), *map(manifest.total, counts))
