"""Stage 6: label every token of the chosen passages with the sense that the teacher assigns to it.

The passages are those that the plan needs, or the first by key up to a number of tokens. Memory of an actor: the teacher,
the dictionary, one partition (about `PARTITION_BYTES`) and one batch of hidden states.
"""

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
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage, StageContext
from msense.stages.embed import EmbedSettings, load_teacher
from msense.stages.embedding_store import TARGET_PARTITIONS, Duplicates, Partition, group_blocks
from msense.stages.plan import Selected, iter_blocks, sliced, write_blocks
from msense.stages.sampling import select
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.model import embed_tokens
from msense.teacher.pooling import pool
from msense.training.label_dataset import LabelManifest, LabelPartition, label_columns, label_size

PARTITION_BYTES = (1 << 19, 256 << 20)  # minimum and maximum of the target size of a partition
HELD_OUT_SALT = 0x68656C64  # documents are held out by a hash independent of the passage keys
KEY_BINS_BITS = 20
ASSIGN_NUMBERS = 1 << 23  # hidden-state elements assigned together, as small batches cost as much as large ones
_ROW = ("piece", "block", "passages", "tokens")
_TYPES = {"U16": np.uint16, "F16": np.float16}


@dataclass(frozen=True)
class LabelSettings:
    """Arguments of the tasks and actors of this stage."""

    run: RunFolder  # where the labels are written
    text: RunFolder  # with the passages and their plan
    embed: EmbedSettings  # teacher and passage layout
    dictionary: str
    fingerprint: str  # of the dictionary
    pooling: str
    normalize: bool
    pooled: bool
    soft_targets: int
    metric: Metric
    temperature: float
    held_out: float
    train_tokens: int | None
    last_key: int | None = None  # of the passages to label; None = those that the plan needs


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


class SelectionStage(Stage[SelectionStats]):
    """Chooses the passages to label, and writes the number chosen from each block.

    `settings` has the key of the last passage to label once the stage has run.
    """

    name = "choosing passages"

    def __init__(self, settings: LabelSettings, blocks: Sequence[int]) -> None:
        """Choose from passages files with these numbers of blocks."""
        super().__init__(settings.run)
        self.settings = settings
        self.splits = [(split, count) for split, count in enumerate(blocks) if count]

    def outputs(self) -> list[str]:
        """Return the table of blocks."""
        return [self.run.label_blocks]

    def finished(self, context: StageContext) -> list[Row | None]:
        """Return that the choice has to be made, as it is fast and depends on the settings."""
        return [None]

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Choose the passages.

        Raises:
            InputError: `train_tokens` is smaller than the first passages.
        """
        slices = sliced(self.splits, 2 * executor.resources.tasks)
        if self.settings.train_tokens is not None:
            by_key = executor.get(executor.reduce("labels: keys", _count_keys, slices, self.settings))
            self.settings = replace(self.settings, last_key=by_key.last(self.settings.train_tokens))
        counted = executor.reduce("labels: passages", _count_passages, slices, self.settings)
        yield {"number": 0, **executor.run(_write_blocks, counted, self.run)}

    def reduce(self, executor: Executor, stats: list[Row]) -> SelectionStats:
        """Return the numbers of passages and tokens.

        Raises:
            InputError: no passage was chosen.
        """
        result = SelectionStats(stats[0]["passages"], stats[0]["tokens"])
        if not result.tokens:
            raise InputError("no passage of this text is to be labelled: use another text or --train-tokens")
        return result


@dataclass
class _Tokens:
    """Mergeable token counts of the passages, binned by the leading bits of their keys."""

    counts: np.ndarray  # int64 [2^KEY_BINS_BITS]

    def merge(self, other: "_Tokens") -> None:
        self.counts = self.counts + other.counts

    def last(self, tokens: int) -> int:
        """Return the last key of the leading bins that hold at most `tokens` tokens."""
        total = np.cumsum(self.counts)
        bins = int(np.searchsorted(total, tokens, side="right"))
        if not bins or not total[bins - 1]:
            least = int(total[total > 0][:1].sum())
            raise InputError(f"--train-tokens {tokens} is too small for the first passages: set it to at least {least}")
        return (bins << (64 - KEY_BINS_BITS)) - 1


def _count_keys(splits: list[tuple[int, int]], settings: LabelSettings) -> _Tokens:
    counts = np.zeros(1 << KEY_BINS_BITS, np.int64)
    for _, _, passages in iter_blocks(settings.text, splits):
        bins = (passages.keys >> np.uint64(64 - KEY_BINS_BITS)).astype(np.int64)
        counts += np.bincount(bins, passages.lengths, len(counts)).astype(np.int64)
    return _Tokens(counts)


def _count_passages(splits: list[tuple[int, int]], settings: LabelSettings) -> Selected:
    selector, rows = PassageSelector(settings), []
    for split, block in ((split, block) for split, count in splits for block in range(count)):
        passages, chosen = selector(split, block)
        rows.append((split, block, len(chosen), passages.lengths[chosen].sum()))
    return Selected(np.zeros(0, np.int64), np.array(rows, dtype=np.int64))


def _write_blocks(counted: Selected, run: RunFolder) -> Row:
    passages, tokens = counted.blocks[:, 2:].sum(axis=0).tolist()
    write = partial(write_blocks, counted.blocks, _ROW)
    return run.publish(run.label_blocks, write, {"passages": passages, "tokens": tokens})


class PassageSelector:
    """Reads blocks and selects the passages to label; keeps the plan's thresholds in memory."""

    def __init__(self, settings: LabelSettings) -> None:
        self.settings = settings
        self.duplicates = Duplicates(settings.text)
        self.threshold = load_arrays(settings.text.thresholds, ("threshold",))["threshold"]

    def __call__(self, split: int, block: int) -> tuple[Passages, np.ndarray]:
        """Return the passages of a block, and the rows to label, increasing int64."""
        passages = read_block(self.settings.text.passages_file(split), block)
        if self.settings.last_key is not None:
            rows = np.flatnonzero(passages.keys <= np.uint64(self.settings.last_key))
        else:
            embed = self.settings.embed
            rows = np.unique(passages.rows()[select(passages, self.threshold, embed.spec, embed.per_passage)])
        return passages, np.setdiff1d(rows, self.duplicates.of(split, block))

    def partition(self, partition: Partition) -> tuple[Passages, np.ndarray]:
        """Return the passages of a partition to label, and whether each is held out, bool [P]."""
        parts, held = [], []
        for split, block in zip(partition.splits, partition.blocks, strict=True):
            passages, rows = self(split, block)
            parts.append(passages.without(np.setdiff1d(np.arange(len(passages.keys)), rows)))
            held.append(_held_out(self.settings.text.passages_file(split), block, self.settings.held_out)[rows])
        return Passages.concatenate(parts), np.concatenate(held)


def _held_out(uri: str, block: int, share: float) -> np.ndarray:
    """Return which passages of a block belong to held-out documents, bool [P]."""
    column = open_parquet(uri).read_row_group(block, columns=["document_id"]).column("document_id").combine_chunks()
    documents = column.dictionary_encode()
    drawn = [
        xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed=HELD_OUT_SALT) < share * 2**64
        for name in documents.dictionary.to_pylist()
    ]
    return np.array(drawn, dtype=bool)[documents.indices.to_numpy()]


def cut_label_partitions(settings: LabelSettings) -> list[Partition]:
    """Cut the chosen passages into partitions of similar size in bytes; depends on data and config only."""
    table = read_columns(settings.run.label_blocks, list(_ROW))
    dim = settings.embed.info.dim if settings.pooled else 0
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
            arrays = self._label(passages, partition.number)
            save_arrays(path, {**arrays, "held_out": held.astype(np.uint8)})
            labelled = int((arrays["senses"] != NO_SENSE).sum())
            return {"labelled": labelled, "size": path.stat().st_size, "sha256": storage.sha256_of(path)}

        return self.settings.run.publish(self.settings.run.label_file(partition.number), write, stats)

    def _label(self, passages: Passages, partition: int) -> dict[str, np.ndarray]:
        """Embed passages and return the columns of their label file except `held_out`."""
        settings = self.settings
        dim = settings.embed.info.dim if settings.pooled else 0
        columns = label_columns(len(passages.keys), len(passages.ids), dim, settings.soft_targets)
        arrays = {
            name: np.full(shape, NO_SENSE if name in ("senses", "soft_senses") else 0, _TYPES[kind])
            for name, (kind, shape) in columns.items()
            if kind in _TYPES
        }
        eligible = passages.eligible(settings.embed.spec)
        places: list[np.ndarray] = []
        points: list[Tensor] = []
        rows = [passages.row(number) for number in range(len(passages.keys))]
        for batch, hidden in embed_tokens(self.teacher, rows, TOKEN_BUDGET[settings.embed.device]):
            mask = torch.from_numpy(batch.mask).to(hidden.device)
            if settings.pooled:
                vectors = pool(hidden, mask, settings.pooling, normalize=settings.normalize).half()
                self._check_finite(vectors, partition)
                arrays["pooled"][batch.rows] = vectors.cpu().numpy()
            flat = np.concatenate([np.arange(passages.offsets[r], passages.offsets[r + 1]) for r in batch.rows])
            wanted = eligible[flat]
            places.append(flat[wanted])
            points.append(hidden[mask][torch.from_numpy(wanted).to(hidden.device)])
            if sum(len(p) for p in places) * settings.embed.info.dim >= ASSIGN_NUMBERS:
                self._assign(passages, np.concatenate(places), torch.cat(points), arrays, partition)
                places, points = [], []
        if places:
            self._assign(passages, np.concatenate(places), torch.cat(points), arrays, partition)
        return {**arrays, "offsets": passages.offsets, "ids": passages.ids.astype(np.int32)}

    def _assign(
        self, passages: Passages, places: np.ndarray, points: Tensor, arrays: dict[str, np.ndarray], partition: int
    ) -> None:
        """Write the senses of the tokens at these positions of the partition into the columns."""
        self._check_finite(points, partition)
        ids = torch.from_numpy(passages.ids[places])
        arrays["senses"][places] = _stored(self.dictionary.assign(ids, points, metric=self.settings.metric))
        if top := self.settings.soft_targets:
            senses, weights = self.dictionary.top_k(
                ids, points, top, self.settings.temperature, metric=self.settings.metric
            )
            arrays["soft_senses"][places] = _stored(senses)
            arrays["soft_weights"][places] = weights.half().cpu().numpy()

    def _check_finite(self, embeddings: Tensor, partition: int) -> None:
        if not embeddings.isfinite().all():
            dtype = self.settings.embed.dtype
            remedy = "" if dtype == "float32" else "use --dtype float32 with a new --output, or "
            raise MsenseError(
                f"label partition {partition}: the teacher's {dtype} embeddings are NaN, infinite or too large for float16; "
                f"{remedy}check its weights"
            )


def _stored(senses: Tensor) -> np.ndarray:
    """Return sense numbers as they are stored, uint16; -1 (none) becomes 65535."""
    return np.asarray(senses.cpu().numpy().astype(np.uint16))


def are_finished(run: RunFolder, executor: Executor) -> bool:
    """Return whether the labels of a run are complete and every checksum matches."""
    manifest = storage.read_json(run.label_manifest)
    if manifest is None or manifest.get("made_of") != run.inputs_hash:
        return False
    files = [run.label_senses, *(run.label_file(n) for n in range(len(manifest["units"])))]
    return all(stats is not None for stats in finished("labels", run, files, executor, repair=False))


class LabelStage(Stage[LabelStats]):
    """Writes the labels of a run."""

    name = "labels"

    def __init__(self, settings: LabelSettings, partitions: Sequence[Partition]) -> None:
        """Label the partitions of `cut_label_partitions` with the settings of `SelectionStage`."""
        super().__init__(settings.run)
        self.settings, self.partitions = settings, partitions

    def outputs(self) -> list[str]:
        """Return one label file per partition."""
        return [self.run.label_file(partition.number) for partition in self.partitions]

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Run the missing partitions through teacher actors."""
        items = [asdict(self.partitions[number]) for number in missing]
        yield from executor.map_actors(self.name, LabelActor, {"settings": self.settings}, items)

    def reduce(self, executor: Executor, stats: list[Row]) -> LabelStats:
        """Write the manifest and return its totals."""
        result: LabelStats = executor.run(_write_manifest, self.settings, stats)
        return result


def _write_manifest(settings: LabelSettings, stats: list[Row]) -> LabelStats:
    """Write the number of senses of every token, and the manifest with the stats of all partitions."""
    run, dictionary = settings.run, SenseDictionary.load(settings.dictionary)
    sizes = np.diff(dictionary.offsets).astype(np.int32)
    run.publish(run.label_senses, lambda path: save_arrays(path, {"senses": sizes}))
    config = dictionary.config
    manifest = LabelManifest(
        inputs_hash=run.inputs_hash,
        dictionary=settings.fingerprint,
        teacher=config.teacher,
        tokenizer_fingerprint=config.tokenizer_fingerprint,
        vocab_size=config.vocab_size,
        dim=config.dim,
        metric=settings.metric,
        temperature_unit=config.temperature_unit,
        temperature=settings.temperature if settings.soft_targets else None,
        train_tokens=settings.train_tokens,
        held_out=settings.held_out,
        held_out_salt=HELD_OUT_SALT,
        soft_targets=settings.soft_targets,
        pooled=settings.pooled,
        pooling=settings.pooling,
        normalize=settings.normalize,
        partitions=tuple(LabelPartition(**{name: row[name] for name in LabelPartition.model_fields}) for row in stats),
    )
    storage.write_json(run.label_manifest, manifest.model_dump(mode="json", by_alias=True))
    return label_stats(manifest)


def label_stats(manifest: LabelManifest) -> LabelStats:
    """Return the totals of finished labels."""
    counts = ("passages", "tokens", "labelled", "held_out_passages", "size")
    return LabelStats(len(manifest.partitions), *map(manifest.total, counts))
