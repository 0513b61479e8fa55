"""Replacing embeddings by senses over one matrix product with the same 500,000 embeddings, held twice."""

import numpy as np
import torch

from benchmarks.shared import Bench, Figures, Tokens
from benchmarks.timing import in_turn
from msense import SenseDictionary
from msense.stages.embedding_store import Duplicates, cut_partitions, partition_passages

COUNT, TURNS = 500_000, 5


def replace(bench: Bench) -> Figures:
    """Time hard and soft replacement over a product with 20 vectors, on one thread."""
    bench.build()
    dictionary = SenseDictionary.load(bench.run.dictionary)
    ids, embeddings = _stream(bench, bench.tokens())
    torch.set_num_threads(1)
    other = torch.randn(embeddings.shape[1], 20)
    given, out = torch.from_numpy(embeddings), np.empty_like(embeddings)
    dictionary.replace(ids[:1000], embeddings[:1000])
    ways = {
        "product": lambda: given @ other,
        "hard": lambda: dictionary.replace(ids, embeddings, out=out),
        "soft": lambda: dictionary.replace(ids, embeddings, temperature=1 / 3, out=out),
    }
    turns = in_turn(ways, TURNS)
    return {
        "replace.ratio": turns.ratio("hard", "product"),
        "replace.embeddings_per_s": len(ids) / turns.median("hard"),
        "replace.soft_over_hard": turns.ratio("soft", "hard"),
    }


def _stream(bench: Bench, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Return the corpus's first tokens, each with the embedding of a random occurrence of that token."""
    partitions = cut_partitions(bench.run.blocks, tokens.points.shape[1])
    ids = np.concatenate([partition_passages(bench.run, own, Duplicates(bench.run)).ids for own in partitions])
    ids = np.resize(ids[np.isin(ids, tokens.ids)], COUNT)
    place, start = np.searchsorted(tokens.ids, ids), np.cumsum(tokens.sizes) - tokens.sizes
    chosen = start[place] + np.random.default_rng(0).integers(0, 2**31, COUNT) % tokens.sizes[place]
    return ids, tokens.points[chosen].astype(np.float32)
