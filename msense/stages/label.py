"""Stage 6: label every token of the chosen passages, and of spans of them, with the sense that the teacher assigns to it.

The passages are those that the plan needs, or the first by key up to a number of tokens. Embeddings are rounded as in the
dictionary's run: those that it kept are read from its files, the others by the teacher in the same batches, so that labels do
not depend on what was kept. Memory of an actor: the teacher, the dictionary, the texts of one partition and one batch.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msense.constants import NO_SENSE
from msense.corpus.passages import Passages
from msense.dictionary import SenseDictionary
from msense.errors import MsenseError
from msense.io import storage
from msense.io.arrays import save_arrays
from msense.run.folder import RunFolder
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.embedding_store import Partition, longest_first
from msense.stages.label_texts import HELD_OUT_SALT, LabelSettings, Texts, TextSelector
from msense.stages.reading import Reading, TeacherReader, batches_of, not_finite, read_kept, skipped
from msense.training.label_dataset import LabelManifest, LabelPartition, label_columns

logger = logging.getLogger(__name__)
ASSIGN_NUMBERS = 1 << 23  # hidden-state elements assigned together, as small batches cost as much as large ones
_TYPES = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16}


@dataclass(frozen=True)
class LabelStats:
    """The contents of finished labels."""

    partitions: int
    passages: int
    spans: int  # and queries
    tokens: int
    labelled: int  # tokens with a sense
    held_out: int  # passages and spans
    bytes: int
    forwarded: int  # tokens that the teacher read


class LabelActor:
    """Loads dictionary and, if it has to read, the teacher once; writes the label file of each partition it is called with."""

    def __init__(self, settings: LabelSettings) -> None:
        """Load the dictionary; raise MsenseError if it is not the one that the run was started with."""
        self.settings, self.forwarded = settings, 0
        self.selector = TextSelector(settings)
        dictionary = SenseDictionary.load(settings.dictionary)
        if dictionary.fingerprint != settings.fingerprint:
            raise MsenseError(
                f"the dictionary {settings.dictionary} changed during the run, or differs on this node: restore it, or start "
                "over with another --output"
            )
        self.dictionary = dictionary.to("cuda") if settings.embed.device == "cuda" else dictionary

    @cached_property
    def reader(self) -> TeacherReader:
        """The teacher."""
        return TeacherReader(self.settings.embed)

    def __call__(self, item: Row) -> Row:
        """Write one partition; return its stats."""
        partition = Partition(**item)
        texts = self.selector(partition)
        kinds = texts.kinds[texts.wanted]
        labelled = texts.passages.without(np.flatnonzero(~texts.wanted))
        held = texts.held_out[texts.wanted]
        stats = {
            "number": partition.number,
            "passages": len(kinds),
            "spans": int((kinds > 0).sum()),
            "tokens": len(labelled.ids),
            "held_out_passages": int(held.sum()),
        }

        def write(path: Path) -> Row:
            self.forwarded = 0
            arrays = self._label(texts, labelled, self._readings(partition, texts))
            columns = {
                "offsets": labelled.offsets,
                "ids": labelled.ids,
                "kind": kinds,
                "held_out": held.astype(np.uint8),
            }
            if self.settings.skips:
                columns["skip"] = self._skips(labelled)
            save_arrays(path, {**arrays, **columns})
            count = int((arrays["senses"] != NO_SENSE).sum())
            sizes = {"size": path.stat().st_size, "sha256": storage.sha256_of(path)}
            return {"labelled": count, "forwarded": self.forwarded, **sizes}

        return self.settings.run.publish(self.settings.run.label_file(partition.number), write, stats)

    def _skips(self, passages: Passages) -> np.ndarray:
        """Return the tokens at the start of each passage that are not pooled, int32 [P]."""
        info = self.settings.embed.info
        own = skipped(passages, info)
        return (np.full(len(passages.keys), info.skip) if own is None else own).astype(np.int32)

    def _readings(self, partition: Partition, texts: Texts) -> Iterator[Reading]:
        """Yield all wanted texts: the plan's batches that have some, from the kept file if there is one, then the others."""
        settings, passages, wanted = self.settings.embed, texts.passages, texts.wanted
        planned = batches_of(passages, texts.needed, settings)
        others = wanted.copy()
        others[texts.needed] = False
        batches = batches_of(passages, np.flatnonzero(others), settings)
        if partition.kept:
            file = self.settings.text.embeddings_file(partition.number)
            yield from read_kept(file, passages, planned, wanted, settings)
        else:
            batches = [rows for rows in planned if wanted[rows].any()] + batches
        if batches:
            self.forwarded += sum(int(passages.lengths[rows].sum()) for rows in batches)
            yield from (reading.as_kept(settings) for reading in self.reader(passages, batches))

    def _label(self, texts: Texts, labelled: Passages, readings: Iterator[Reading]) -> dict[str, np.ndarray]:
        """Return the columns of the label file that depend on embeddings."""
        settings, dim = self.settings, self.settings.embed.info.dim
        size = settings.embed.vector_dim if settings.pooled else 0
        columns = label_columns(len(labelled.keys), len(labelled.ids), size, settings.soft_targets)
        arrays: dict[str, np.ndarray] = {
            name: np.full(
                columns[name][1], NO_SENSE if name in ("senses", "soft_senses") else 0, _TYPES[columns[name][0]]
            )
            for name in ("senses", "soft_senses", "soft_weights", "pooled")
            if name in columns
        }
        place = np.cumsum(texts.wanted) - 1
        eligible = labelled.eligible(settings.embed.spec)
        held: list[tuple[np.ndarray, Tensor]] = []
        for rows, tokens, vectors in readings:
            chosen = texts.wanted[rows]
            own = place[rows[chosen]]
            if "pooled" in arrays and vectors is not None:
                self._check_finite(vectors[torch.from_numpy(chosen)])
                arrays["pooled"][own] = vectors.cpu().numpy()[chosen]
            flat = labelled.places(own)
            used = np.repeat(chosen, texts.passages.lengths[rows])
            used[used] = eligible[flat]
            held.append((flat[eligible[flat]], tokens[torch.from_numpy(used).to(tokens.device)]))
            if sum(len(places) for places, _ in held) * dim >= ASSIGN_NUMBERS:
                self._assign(labelled, held, arrays)
                held = []
        if held:
            self._assign(labelled, held, arrays)
        return arrays

    def _assign(self, passages: Passages, held: list[tuple[np.ndarray, Tensor]], arrays: dict[str, np.ndarray]) -> None:
        """Write the senses of tokens, given by their places in the partition and their embeddings, into the columns."""
        places = np.concatenate([place for place, _ in held])
        points = torch.cat([values.to(self.settings.embed.device) for _, values in held])
        ids, metric, top = torch.from_numpy(passages.ids[places]), self.settings.metric, self.settings.soft_targets
        arrays["senses"][places] = (
            self.dictionary.assign(ids, points, metric=metric).cpu().numpy()
        )  # -1 is stored as 65535
        if top:
            senses, weights = self.dictionary.top_k(ids, points, top, self.settings.temperature, metric=metric)
            arrays["soft_senses"][places] = senses.cpu().numpy()
            arrays["soft_weights"][places] = weights.half().cpu().numpy()

    def _check_finite(self, vectors: Tensor) -> None:
        if not vectors.isfinite().all():
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
        """Label the partitions of the text and of queries with the settings of `choose_passages`."""
        super().__init__(settings.run, [settings.run.label_file(partition.number) for partition in partitions])
        self.settings, self.partitions = settings, partitions

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Run the missing partitions through actors; those whose embeddings are damaged are read again."""
        text, partitions = self.settings.text, [self.partitions[number] for number in missing]
        own = [partition for partition in partitions if self.settings.reads_kept and not partition.queries]
        files = [text.embeddings_file(partition.number) for partition in own]
        counts = [
            row and (row["passages"], row["tokens"]) for row in finished("kept embeddings", text, files, executor)
        ]
        kept = {p.number for p, count in zip(own, counts, strict=True) if count == (p.passages, p.tokens)}
        if own:
            logger.info(
                "labels: the embeddings of %d of %d partitions were kept; the others are read again",
                len(kept),
                len(own),
            )
        items = [replace(partition, kept=partition.number in kept) for partition in longest_first(partitions)]
        return executor.map_actors(self.name, LabelActor, {"settings": self.settings}, list(map(asdict, items)))

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
    of_labels = ("metric", "train_tokens", "held_out", "held_out_by", "soft_targets", "pooled", "spans", "skips")
    of_teacher = ("pooling", "normalize")
    manifest = LabelManifest(
        inputs_hash=run.inputs_hash,
        dictionary=settings.fingerprint,
        **{name: getattr(dictionary.config, name) for name in of_dictionary},
        **{name: getattr(settings, name) for name in of_labels},
        **{name: getattr(settings.embed.info, name) for name in of_teacher},
        pooled_dim=settings.embed.vector_dim or None,
        temperature=settings.temperature if settings.soft_targets else None,
        held_out_salt=HELD_OUT_SALT,
        partitions=tuple(LabelPartition(**{name: row[name] for name in LabelPartition.model_fields}) for row in stats),
    )
    added = set() if settings.skips else {"skips"}  # which older versions do not know
    storage.write_json(run.label_manifest, manifest.model_dump(mode="json", by_alias=True, exclude=added))
    return label_stats(manifest, sum(row["forwarded"] for row in stats))


def label_stats(manifest: LabelManifest, forwarded: int = 0) -> LabelStats:
    """Return the totals of finished labels, for which the teacher read so many tokens."""
    rows, spans, *counts = map(manifest.total, ("passages", "spans", "tokens", "labelled", "held_out_passages", "size"))
    return LabelStats(len(manifest.partitions), rows - spans, spans, *(*counts, forwarded))
