"""Stage 5: concatenate the centroid files of all shards into the dictionary folder, sorted by token.

Memory: the small arrays (40 bytes per sense), the centroids of one shard, and all exemplars while they are sorted.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from msense.config.build import BuildConfig
from msense.dictionary.format import write_dictionary, write_tokenizer
from msense.dictionary.layout import Arrays, DictionaryConfig, DictionaryFiles, TeacherName, corpus_distortion
from msense.io import filesystems, storage
from msense.io.arrays import load_arrays
from msense.io.scratch import scratch_folder
from msense.run.folder import RunFolder
from msense.runtime.executor import Row
from msense.stages.exemplars import collect_contexts
from msense.teacher.spec import TeacherInfo


def assemble(
    run: RunFolder, info: TeacherInfo, config: BuildConfig, centroid_files: Sequence[str], context_files: Sequence[str]
) -> Row:
    """Write the dictionary of a run from the files of centroids and contexts (none without exemplars).

    Returns:
        `stats`, the size of the dictionary; `files`, the size and sha256 of each file.
    """
    small = [load_arrays(file, ("tokens", "sizes", "counts", "spread", "inertia")) for file in centroid_files]
    joined = {name: np.concatenate([arrays[name] for arrays in small]) for name in small[0]}
    order = np.argsort(joined["tokens"])
    tokens, sizes = joined["tokens"][order].astype(np.int64), joined["sizes"][order].astype(np.int64)
    starts = (np.cumsum(joined["sizes"]) - joined["sizes"])[order]  # in the concatenated files
    senses = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    counts, rms_distance = joined["counts"][senses], joined["spread"][senses]
    token_counts = load_arrays(run.thresholds)["token_counts"]
    offsets = np.r_[0, np.cumsum(np.bincount(tokens, weights=sizes, minlength=info.vocab_size))].astype(np.int64)
    points = int(counts.sum())
    quality = {
        "points": float(points),
        "mean_squared_spread": math.fsum(joined["inertia"].tolist()) / max(1, points),
        "corpus_distortion": corpus_distortion(Arrays(offsets, counts, rms_distance, token_counts)),
    }
    with filesystems.storage_errors(run.dictionary, "write"), _target(run) as folder:
        files = DictionaryFiles(folder)
        write_tokenizer(folder, storage.read_text(run.tokenizer))
        if context_files:
            collect_contexts(list(context_files), files.exemplars)
        chunks = _chunks(centroid_files, [len(arrays["counts"]) for arrays in small], starts, sizes, config.store_dtype)
        write_dictionary(folder, _config(info, config, quality), offsets, counts, rms_distance, token_counts, chunks)
        written: Row = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": storage.sha256_of(path)}
            for path in files.present()
        }
    size = sum(entry["size"] for entry in written.values())
    stats = {"tokens": len(tokens), "senses": len(counts), "points": points, "bytes": size}
    return {"stats": stats, "files": written}


def changed_files(run: RunFolder, written: dict[str, Row]) -> list[str]:
    """Return the names of files of a finished dictionary, as listed by `assemble`, that are missing or modified."""
    uris = {name: storage.join(run.dictionary, name) for name in written}
    return [name for name, uri in uris.items() if not storage.is_intact(uri, written[name], verify=True)]


def _config(info: TeacherInfo, config: BuildConfig, quality: dict[str, float]) -> DictionaryConfig:
    shared = ("tokenizer_fingerprint", "layer", "dim", "vocab_size", "special_tokens", "pooling", "normalize")
    return DictionaryConfig(
        teacher=TeacherName(name=info.name, revision=info.revision, fingerprint=info.fingerprint),
        **{name: getattr(info, name) for name in (*shared, "prompt", "max_length", "attention")},
        **config.model_dump(include={"senses", "metric", "max_occurrences", "seed"}),
        dtype=config.store_dtype,
        temperature_unit=quality["mean_squared_spread"],
        excluded_token_ids=info.excluded,
        quality=quality,
    )


def _chunks(
    files: Sequence[str], senses: list[int], starts: np.ndarray, sizes: np.ndarray, dtype: str
) -> Iterator[torch.Tensor]:
    """Yield the centroids sorted by token, as the longest contiguous slices of each file.

    `senses` has the number of each file, `starts` int64 [T] the first of each token in all files, `sizes` its number.
    """
    ends = np.cumsum(senses)
    file = np.searchsorted(ends, starts, side="right")
    breaks = np.flatnonzero(np.r_[True, (np.diff(file) != 0) | (np.diff(starts) != sizes[:-1])])
    held, centroids = -1, np.empty(0)
    for first, last in pairwise([*breaks, len(file)]):
        if file[first] != held:
            held = int(file[first])
            centroids = load_arrays(files[held], ("centroids",))["centroids"]
        before = ends[held] - senses[held]
        rows = centroids[starts[first] - before : starts[last - 1] + sizes[last - 1] - before]
        yield torch.from_numpy(rows).view(getattr(torch, dtype))


@contextmanager
def _target(run: RunFolder) -> Iterator[Path]:
    """Yield a local folder to write to; for a remote run it is uploaded on exit."""
    if filesystems.is_local(run.dictionary):
        yield Path(storage.absolute(run.dictionary))
        return
    with scratch_folder() as folder:
        yield folder
        storage.upload_folder(folder, run.dictionary)
