"""Replacing embeddings by senses, against a product of the same embeddings. Holds 500,000 embeddings twice."""

import time

import numpy as np

from benches.shared import Bench, Figures
from msense import SenseDictionary
from msense.occurrences import Duplicates, cut_units, unit_passages


def replace(bench: Bench) -> Figures:
    """Replacing 500k embeddings by their nearest senses over one product with 20 vectors, both on one thread."""
    import torch

    bench.build()
    dictionary = SenseDictionary.load(bench.run.dictionary)
    tokens, points = bench.points()
    ids, embeddings = _stream(bench, tokens, points, 500_000)
    torch.set_num_threads(1)
    other = torch.randn(embeddings.shape[1], 20)
    given, out = torch.from_numpy(embeddings), np.empty_like(embeddings)
    dictionary.replace(ids[:1000], embeddings[:1000])
    ratios, seconds = [], []
    for _ in range(5):
        began = time.perf_counter()
        given @ other
        middle = time.perf_counter()
        dictionary.replace(ids, embeddings, out=out)
        seconds.append(time.perf_counter() - middle)
        ratios.append(seconds[-1] / (middle - began))
    soft = time.perf_counter()
    dictionary.replace(ids, embeddings, temperature=1 / 3, out=out)
    soft = time.perf_counter() - soft
    median = int(np.argsort(ratios)[2])
    return {
        "replace.ratio": ratios[median],
        "replace.embeddings_per_s": len(ids) / seconds[median],
        "replace.soft_over_hard": soft / seconds[median],
    }


def _stream(bench: Bench, tokens: np.ndarray, points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the corpus's first `count` tokens, each with the embedding of some occurrence of that token."""
    units = cut_units(bench.run.blocks, points.shape[1])
    ids = np.concatenate([unit_passages(bench.run, unit, Duplicates(bench.run)).ids for unit in units])
    token, start, number = np.unique(tokens, return_index=True, return_counts=True)
    ids = np.resize(ids[np.isin(ids, token)], count)
    place = np.searchsorted(token, ids)
    chosen = start[place] + np.random.default_rng(0).integers(0, 2**31, count) % number[place]
    return ids, points[chosen].astype(np.float32)
