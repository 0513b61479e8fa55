"""In-memory construction of dictionaries by clustering embeddings or merging; holds a sorted copy of the embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from msense.clustering.allocation import CURVE_POINTS, GRID, Curves, allocate, variance_curves
from msense.clustering.budget import SenseBudget
from msense.clustering.kmeans import KMeansConfig, cluster_tokens
from msense.clustering.mcl import MCL_POINTS, MclConfig, mcl_senses
from msense.constants import MAX_DIM, MAX_VOCABULARY
from msense.dictionary.checks import check_arrays
from msense.dictionary.layout import DTYPES, Arrays, DictionaryConfig, TeacherName
from msense.errors import DictionaryError, InputError

if TYPE_CHECKING:
    import pyarrow as pa

Content = tuple[DictionaryConfig, Arrays, tuple[Tensor, ...]]  # the centroids are several [S_i, D]


def cluster_in_memory(
    ids: np.ndarray,
    points: Tensor,
    settings: KMeansConfig,
    rule: SenseBudget | MclConfig | None,
    vocab_size: int | None,
    dtype: str,
) -> Content:
    """Return the dictionary of embeddings `points` [N, D] clustered by token id [N]; see `from_embeddings`."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    size = high + 1 if vocab_size is None else vocab_size
    if low < 0 or high >= size:
        raise InputError(f"token ids range from {low} to {high}, but those of the vocabulary from 0 to {size - 1}")
    if not 0 < size <= MAX_VOCABULARY or not 0 < points.shape[1] <= MAX_DIM:
        limits = f"1 to {MAX_VOCABULARY} tokens of width 1 to {MAX_DIM}"
        raise InputError(f"{size} tokens of width {points.shape[1]} exceed the limits, {limits}: number tokens from 0")
    rows = np.argsort(ids, kind="stable")
    counts = np.bincount(ids, minlength=size)
    tokens = np.flatnonzero(counts)
    sizes = counts[tokens]
    own = points[torch.from_numpy(rows)]
    own = own.float() if own.dtype == torch.float64 else own
    known = Curves(sizes, sizes, np.empty(0))
    senses = None if rule is None else _senses(own, known, tokens, settings, rule, DTYPES[dtype].itemsize)
    clusters = cluster_tokens(own, sizes, tokens, settings, senses=senses, threads=torch.get_num_threads())
    offsets = np.cumsum(np.bincount(tokens + 1, clusters.sizes, size + 1)).astype(np.int64)
    arrays = Arrays(offsets, clusters.counts, clusters.rms_distance, counts)
    config = DictionaryConfig(
        teacher=TeacherName(name="in memory"),
        tokenizer_fingerprint="",
        layer=-1,
        dim=points.shape[1],
        vocab_size=size,
        senses=settings.k if rule is None else "mcl" if isinstance(rule, MclConfig) else "auto",
        dtype=dtype,
        metric=settings.metric,
        temperature_unit=_mean_square(arrays),
        max_occurrences=0,
        seed=settings.seed,
    )
    centroids = torch.from_numpy(clusters.centroids).to(DTYPES[dtype])
    if not torch.isfinite(centroids).all():
        largest = float(np.abs(clusters.centroids).max())
        raise InputError(f"embeddings of up to {largest:.3g} overflow {dtype}: use dtype='bfloat16' or 'float32'")
    return config, arrays, (centroids,)


def _senses(
    points: Tensor,
    known: Curves,
    tokens: np.ndarray,
    settings: KMeansConfig,
    rule: SenseBudget | MclConfig,
    value_bytes: int,
) -> np.ndarray:
    """Return the number of senses of each token, int64 [T], decided on an evenly spaced sample of its points [N, D]."""
    sampled = np.minimum(known.points, MCL_POINTS if isinstance(rule, MclConfig) else CURVE_POINTS)
    token = np.repeat(np.arange(len(sampled)), sampled)
    number = np.arange(len(token)) - (np.cumsum(sampled) - sampled)[token]
    rows = (np.cumsum(known.points) - known.points)[token] + number * known.points[token] // sampled[token]
    sample, dim = points[torch.from_numpy(rows)], points.shape[1]
    if isinstance(rule, MclConfig):
        return mcl_senses(sample, sampled, rule, token_ids=tokens)
    curves = replace(known, variance=variance_curves(sample, sampled, tokens, settings))
    return allocate(curves, GRID, rule.senses(len(tokens), dim, value_bytes), dim)


def merge_contents(contents: Sequence[Content]) -> Content:
    """Return the concatenation of each token's senses in several dictionaries, with the settings of the first."""
    first = contents[0][0]
    names = ("dim", "vocab_size", "metric", "tokenizer_fingerprint", "dtype", "layer")
    for config, _, _ in contents:
        values = [(name, getattr(first, name), getattr(config, name)) for name in names]
        values.append(("teacher fingerprint", first.teacher.fingerprint, config.teacher.fingerprint))
        if differing := [f"{name} ({x!r} and {y!r})" for name, x, y in values if x != y]:
            raise DictionaryError(f"dictionaries differ in {', '.join(differing)}: merge those of the same teacher")
    every = [arrays for _, arrays, _ in contents]
    sizes = np.stack([np.diff(arrays.offsets) for arrays in every])
    token = np.concatenate([np.repeat(np.arange(first.vocab_size), own) for own in sizes])
    order = np.argsort(token, kind="stable")
    counts = np.concatenate([arrays.counts for arrays in every])[order]
    rms_distance = np.concatenate([arrays.rms_distance for arrays in every])[order]
    offsets = np.concatenate([[0], np.cumsum(sizes.sum(axis=0))])
    united = Arrays(offsets, counts, rms_distance, np.sum([arrays.token_counts for arrays in every], axis=0))
    check_arrays(united, first)
    centroids = torch.cat([part.cpu() for _, _, parts in contents for part in parts])[torch.from_numpy(order)]
    update = {"temperature_unit": _mean_square(united), "quality": {}}
    return first.model_copy(update=update), united, (centroids,)


def merge_exemplars(tables: "Sequence[tuple[pa.Table, np.ndarray]]") -> "pa.Table":
    """Return the exemplars of several dictionaries, given with their offsets, with senses numbered as by `merge_contents`."""
    import pyarrow as pa

    earlier = np.zeros(len(tables[0][1]) - 1, np.int64)
    moved = []
    for table, offsets in tables:
        sense = table["sense"].to_numpy() + earlier[table["token"].to_numpy()]
        place = table.schema.get_field_index("sense")
        moved.append(table.set_column(place, table.schema.field(place), [pa.array(sense, pa.int32())]))
        earlier = earlier + np.diff(offsets)
    return pa.concat_tables(moved).sort_by([(name, "ascending") for name in ("token", "sense", "rank")])


def _mean_square(arrays: Arrays) -> float:
    """Return the squared RMS distance of the senses, weighted by their counts: the unit of temperatures."""
    return float(arrays.counts @ arrays.rms_distance.astype(np.float64) ** 2 / max(1, arrays.counts.sum()))
