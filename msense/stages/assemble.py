"""Stage 5: concatenate the centroid files of all shards into the dictionary folder, sorted by token.

Memory: the small arrays (20 bytes per sense), the centroids of one shard, and all exemplars while they are sorted.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from msense.config.build import BuildConfig
from msense.dictionary.format import write_dictionary, write_tokenizer
from msense.dictionary.layout import Arrays, DictionaryConfig, DictionaryFiles, TeacherName, corpus_distortion
from msense.io import filesystems, storage
from msense.io.arrays import load_arrays
from msense.io.scratch import scratch_folder
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage, StageContext
from msense.stages.exemplars import collect_contexts
from msense.teacher.spec import TeacherInfo


class _Order(NamedTuple):
    """Location of the senses of T tokens, sorted by token; all int64 [T]."""

    tokens: np.ndarray
    sizes: np.ndarray
    file: np.ndarray  # index of the centroid file
    start: np.ndarray  # first sense in that file


@dataclass(frozen=True)
class DictionaryStats:
    """The size of a dictionary."""

    tokens: int  # with senses
    senses: int
    points: int
    bytes: int


def assemble(
    run: RunFolder, info: TeacherInfo, config: BuildConfig, centroid_files: Sequence[str], context_files: Sequence[str]
) -> Row:
    """Write the dictionary of a run from the files of centroids and contexts (none without exemplars).

    Returns:
        `stats`, a `DictionaryStats`; `files`, the size and sha256 of each file.
    """
    small = [load_arrays(file, ("tokens", "sizes", "counts", "spread", "inertia")) for file in centroid_files]
    order = _order(small)
    rows = [np.arange(start, start + size) for start, size in zip(order.start, order.sizes, strict=True)]
    counts, rms_distance = (
        np.concatenate([small[file][name][own] for file, own in zip(order.file.tolist(), rows, strict=True)])
        for name in ("counts", "spread")
    )
    token_counts = load_arrays(run.thresholds)["token_counts"]
    offsets = np.cumsum(np.bincount(order.tokens + 1, weights=order.sizes, minlength=info.vocab_size + 1)).astype(
        np.int64
    )
    points = int(counts.sum())
    mean_square = math.fsum(x for arrays in small for x in arrays["inertia"].tolist()) / max(1, points)
    quality = {
        "points": float(points),
        "mean_squared_spread": mean_square,
        "corpus_distortion": corpus_distortion(Arrays(offsets, counts, rms_distance, token_counts)),
    }
    with filesystems.storage_errors(run.dictionary, "write"), _target(run) as folder:
        files = DictionaryFiles(folder)
        write_tokenizer(folder, storage.read_text(run.tokenizer))
        if context_files:
            collect_contexts(list(context_files), files.exemplars)
        chunks = _chunks(list(centroid_files), order, config.store_dtype)
        write_dictionary(folder, _config(info, config, quality), offsets, counts, rms_distance, token_counts, chunks)
        written: Row = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": storage.sha256_of(path)}
            for path in files.present()
        }
    size = sum(entry["size"] for entry in written.values())
    return {"stats": DictionaryStats(len(order.tokens), len(counts), points, size), "files": written}


class AssembleStage(Stage[DictionaryStats]):
    """Writes the dictionary folder; it has no marker of its own, as the pipeline verifies the folder when it resumes."""

    name = "dictionary"

    def __init__(
        self,
        run: RunFolder,
        info: TeacherInfo,
        config: BuildConfig,
        centroid_files: Sequence[str],
        context_files: Sequence[str],
    ) -> None:
        super().__init__(run)
        self.inputs = (info, config, centroid_files, context_files)
        self.written: Row = {}  # size and sha256 of each file

    def outputs(self) -> list[str]:
        """Return the dictionary folder."""
        return [self.run.dictionary]

    def finished(self, context: StageContext) -> list[Row | None]:
        """Return that the folder has to be written."""
        return [None]

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Write the folder in one task."""
        yield {"number": 0, **executor.run(assemble, self.run, *self.inputs)}

    def reduce(self, executor: Executor, stats: list[Row]) -> DictionaryStats:
        """Return the sizes of the dictionary."""
        self.written = stats[0]["files"]
        result: DictionaryStats = stats[0]["stats"]
        return result


def changed_files(run: RunFolder, written: dict[str, Row]) -> list[str]:
    """Return the names of files of a finished dictionary, as listed by `assemble`, that are missing or modified."""
    return [
        name
        for name, entry in written.items()
        if not storage.is_intact(storage.join(run.dictionary, name), entry, verify=True)
    ]


def _config(info: TeacherInfo, config: BuildConfig, quality: dict[str, float]) -> DictionaryConfig:
    return DictionaryConfig(
        teacher=TeacherName(name=info.name, revision=info.revision, fingerprint=info.fingerprint),
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        layer=info.layer,
        dim=info.dim,
        vocab_size=info.vocab_size,
        senses=config.senses,
        dtype=config.store_dtype,
        metric=config.metric,
        temperature_unit=quality["mean_squared_spread"],
        special_tokens=info.special_tokens,
        excluded_token_ids=info.excluded,
        pooling=info.pooling,
        normalize=info.normalize,
        prompt=info.prompt,
        max_length=info.max_length,
        max_occurrences=config.max_occurrences,
        seed=config.seed,
        quality=quality,
    )


def _order(small: list[dict[str, np.ndarray]]) -> _Order:
    tokens, sizes = (np.concatenate([a[name] for a in small]).astype(np.int64) for name in ("tokens", "sizes"))
    file = np.repeat(np.arange(len(small)), [len(a["tokens"]) for a in small])
    start = np.concatenate([np.cumsum(a["sizes"]) - a["sizes"] for a in small])
    order = np.argsort(tokens)
    return _Order(tokens[order], sizes[order], file[order], start[order])


def _chunks(files: list[str], order: _Order, dtype: str) -> Iterator[torch.Tensor]:
    """Yield the centroids sorted by token, as the longest contiguous slices of each file."""
    breaks = np.flatnonzero(np.r_[True, (np.diff(order.file) != 0) | (np.diff(order.start) != order.sizes[:-1])])
    held, centroids = -1, np.empty(0)
    for first, last in zip(breaks, [*breaks[1:], len(order.file)], strict=True):
        if order.file[first] != held:
            held = int(order.file[first])
            centroids = load_arrays(files[held], ("centroids",))["centroids"]
        rows = centroids[order.start[first] : order.start[last - 1] + order.sizes[last - 1]]
        yield torch.from_numpy(rows).view(getattr(torch, dtype))


@contextmanager
def _target(run: RunFolder) -> Iterator[Path]:
    """Yield a local folder to write to; for a remote run its files are uploaded on exit, config.json last."""
    if filesystems.is_local(run.dictionary):
        yield Path(storage.absolute(run.dictionary))
        return
    with scratch_folder() as folder:
        yield folder
        for path in sorted(filter(Path.is_file, folder.rglob("*")), key=lambda path: path.name == "config.json"):
            storage.upload(path, storage.join(run.dictionary, path.relative_to(folder).as_posix()))
