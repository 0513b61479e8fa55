"""Dictionaries made in memory: clustered from embeddings, or united from others.

Comes in: token ids [N] and embeddings [N, D], or the contents of dictionaries. Goes out: config, small arrays and
centroids. Holds all of them, and a sorted copy of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from msense.allocation import Curves, allocate
from msense.config import MAX_DIM, MAX_VOCABULARY, SenseBudget
from msense.dictionary.checks import check_arrays
from msense.dictionary.format import DTYPES, Arrays, DictionaryConfig, TeacherName
from msense.errors import BadInput, DictionaryError
from msense.kmeans import CURVE_POINTS, GRID, KMeansConfig, cluster_tokens, variance_curves
from msense.mcl import MCL_POINTS, MclConfig, mcl_senses

if TYPE_CHECKING:
    import pyarrow as pa

Content = tuple[DictionaryConfig, Arrays, tuple[Tensor, ...]]  # of a dictionary, the centroids in parts [S_i, D]


def cluster_in_memory(
    ids: np.ndarray,
    points: Tensor,
    settings: KMeansConfig,
    rule: SenseBudget | MclConfig | None = None,
    vocab_size: int | None = None,
    max_occurrences: int = 0,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
) -> Content:
    """Cluster each token's embeddings.

    Args:
        ids: int64 [N], in any order.
        points: floating point [N, D].
        settings: of k-means.
        rule: how many senses each token gets; None: `settings.k`.
        vocab_size: number V of tokens; None: the largest id + 1.
        max_occurrences: rows clustered a token at most, chosen at random; 0 = all.
        dtype: of the centroids.

    Raises:
        BadInput: token ids outside the vocabulary.
        MsenseError: an embedding is NaN or infinite.
    """
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    size = high + 1 if vocab_size is None else vocab_size
    if low < 0 or high >= size:
        raise BadInput(f"token ids go from {low} to {high}, but the vocabulary has the tokens 0 to {size - 1}")
    if not 0 < size <= MAX_VOCABULARY or not 0 < points.shape[1] <= MAX_DIM:
        raise BadInput(
            f"a vocabulary of {size} tokens and embeddings of width {points.shape[1]} were given; a dictionary has at most "
            f"{MAX_VOCABULARY} tokens and width {MAX_DIM}: number the tokens from 0 on, and give embeddings [N, D]"
        )
    rows = _sample(ids, max_occurrences, settings.seed)
    tokens, sizes = np.unique(ids[rows], return_counts=True)
    own = points[torch.from_numpy(rows)]
    own = own.float() if own.dtype == torch.float64 else own
    counts = np.bincount(ids, minlength=size)
    known = Curves(sizes, counts[tokens], np.empty(0))
    senses = None if rule is None else _senses(own, known, tokens, settings, rule, DTYPES[dtype].itemsize)
    clusters = cluster_tokens(own, sizes, tokens, settings, senses=senses, threads=torch.get_num_threads())
    starts = np.zeros(size + 1, np.int64)
    starts[tokens + 1] = clusters.sizes
    arrays = Arrays(np.cumsum(starts), clusters.counts, clusters.spread, counts)
    config = DictionaryConfig(
        teacher=TeacherName(name="in memory"),
        tokenizer_fingerprint="",
        layer=-1,
        dim=points.shape[1],
        vocab_size=size,
        senses=settings.k if rule is None else "mcl" if isinstance(rule, MclConfig) else "auto",
        dtype=dtype,
        metric=settings.metric,
        temperature_unit=_mean_squared_spread(arrays),
        max_occurrences=max_occurrences,
        seed=settings.seed,
    )
    return config, arrays, (torch.from_numpy(clusters.centroids).to(DTYPES[dtype]),)


def _senses(
    points: Tensor,
    known: Curves,
    tokens: np.ndarray,
    settings: KMeansConfig,
    rule: SenseBudget | MclConfig,
    value_bytes: int,
) -> np.ndarray:
    """Return each token's number of senses, int64 [T], from evenly spaced rows of its points [N, D]."""
    wanted = np.minimum(known.points, MCL_POINTS if isinstance(rule, MclConfig) else CURVE_POINTS)
    token = np.repeat(np.arange(len(wanted)), wanted)
    number = np.arange(len(token)) - (np.cumsum(wanted) - wanted)[token]
    rows = (np.cumsum(known.points) - known.points)[token] + number * known.points[token] // wanted[token]
    looked_at, dim = points[torch.from_numpy(rows)], points.shape[1]
    if isinstance(rule, MclConfig):
        return mcl_senses(looked_at, wanted, rule, token_ids=tokens)
    curves = replace(known, variance=variance_curves(looked_at, wanted, tokens, settings))
    return allocate(curves, GRID, rule.senses(len(tokens), dim, value_bytes), dim)


def unite(contents: Sequence[Content]) -> Content:
    """Put each token's senses of several dictionaries one after the other; settings are the first one's.

    Raises:
        DictionaryError: they do not fit together, naming what differs, or a token gets too many senses.
    """
    first = contents[0][0]
    for config, _, _ in contents[1:]:
        _check_alike(first, config)
    every = [arrays for _, arrays, _ in contents]
    sizes = np.stack([np.diff(arrays.offsets) for arrays in every])
    offsets = np.concatenate([[0], np.cumsum(sizes.sum(axis=0))])
    start = offsets[:-1] + np.cumsum(sizes, axis=0) - sizes  # where each one's senses of each token go
    places = [
        np.repeat(s - arrays.offsets[:-1], k) + np.arange(len(arrays.counts))
        for s, k, arrays in zip(start, sizes, every, strict=True)
    ]
    order = np.argsort(np.concatenate(places))
    counts = np.concatenate([arrays.counts for arrays in every])[order]
    spread = np.concatenate([arrays.spread for arrays in every])[order]
    united = Arrays(offsets, counts, spread, np.sum([arrays.token_counts for arrays in every], axis=0))
    check_arrays(united, first)
    centroids = torch.empty(len(order), first.dim, dtype=DTYPES.get(first.dtype, torch.float32))
    for (_, _, parts), place in zip(contents, places, strict=True):
        rows = torch.from_numpy(place).split([len(part) for part in parts])
        for part, own in zip(parts, rows, strict=True):
            centroids[own] = part.cpu()
    update = {"temperature_unit": _mean_squared_spread(united), "quality": {}}
    return first.model_copy(update=update), united, (centroids,)


def unite_exemplars(tables: "Sequence[tuple[pa.Table, np.ndarray]]") -> "pa.Table":
    """Put exemplars together, numbering senses as `unite` does.

    Args:
        tables: of each dictionary its exemplars and its offsets, int64 [V+1].
    """
    import pyarrow as pa

    earlier = np.zeros(len(tables[0][1]) - 1, np.int64)
    moved = []
    for table, offsets in tables:
        sense = table["sense"].to_numpy() + earlier[table["token"].to_numpy()]
        place = table.schema.get_field_index("sense")
        moved.append(table.set_column(place, table.schema.field(place), [pa.array(sense, pa.int32())]))
        earlier = earlier + np.diff(offsets)
    return pa.concat_tables(moved).sort_by([(name, "ascending") for name in ("token", "sense", "rank")])


def _mean_squared_spread(arrays: Arrays) -> float:
    """Return the unit of temperatures: each sense's squared spread, weighted by its count."""
    return float(arrays.counts @ arrays.spread.astype(np.float64) ** 2 / max(1, arrays.counts.sum()))


def _sample(ids: np.ndarray, cap: int, seed: int) -> np.ndarray:
    """Return the rows to cluster, by token and then in their order; at most `cap` a token, 0 = all."""
    if not cap:
        return np.argsort(ids, kind="stable")
    order = np.lexsort((np.random.default_rng(seed).random(len(ids)), ids))
    rank = np.arange(len(ids)) - np.searchsorted(ids[order], ids[order])
    chosen = np.sort(order[rank < cap])
    return chosen[np.argsort(ids[chosen], kind="stable")]


def _check_alike(a: DictionaryConfig, b: DictionaryConfig) -> None:
    names = ("dim", "vocab_size", "metric", "tokenizer_fingerprint", "dtype", "layer")
    facts = [(name, getattr(a, name), getattr(b, name)) for name in names]
    facts.append(("teacher fingerprint", a.teacher.fingerprint, b.teacher.fingerprint))
    differing = [f"{name} ({x!r} and {y!r})" for name, x, y in facts if x != y]
    if differing:
        raise DictionaryError(
            f"these dictionaries differ in {', '.join(differing)}: only those of one teacher can be merged"
        )
