"""Search: the documents most similar to each query by vectors, by BM25, and by both together.

Memory of `nearest`: the vectors of the queries and of one block of documents, 4·1,024·(block + depth) bytes of scores, and 12
bytes per hit; of `Bm25`: the words of all documents, 8 bytes per word of a document in the index, and a score per document.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from msense.errors import InputError, MsenseError
from msense.text import words

DEPTH, KEPT = 1000, 100  # hits that are found per query, and those that remain once equal scores are ordered
K1, B = 1.2, 0.75  # Lucene's defaults
_QUERIES = 1024  # whose scores are held at once


class Hits(NamedTuple):
    """Documents that were found for one query."""

    documents: np.ndarray  # int64 [k], their numbers
    scores: np.ndarray  # float32 [k]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [n, D] scaled to length 1 (zeros stay zeros), float32; MsenseError if one is not finite."""
    if not np.isfinite(vectors).all():
        raise MsenseError("the model returned a vector with NaN or infinite values: check its weights")
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray], depth: int = DEPTH) -> list[Hits]:
    """Return the `depth` documents of the highest cosine for each query, by exact search.

    Args:
        queries: vectors, float [Q, D].
        blocks: vectors of consecutive documents, float [n, D] each.
        depth: hits per query.
    """
    chunks = torch.from_numpy(unit(queries)).split(_QUERIES)
    best = [(chunk.new_empty(len(chunk), 0), torch.empty(len(chunk), 0, dtype=torch.int64)) for chunk in chunks]
    start = 0
    for block in blocks:
        documents = torch.from_numpy(unit(block))
        best = [_merged(old, chunk @ documents.T, start, depth) for old, chunk in zip(best, chunks, strict=True)]
        start += len(documents)
    return [Hits(own.numpy(), score.numpy()) for scores, rows in best for score, own in zip(scores, rows, strict=True)]


def _merged(
    best: tuple[torch.Tensor, torch.Tensor], scores: torch.Tensor, start: int, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and numbers of the best documents so far and of a block from document `start` on."""
    scores, rows = scores.topk(min(depth, scores.shape[1]))
    scores, rows = torch.cat([best[0], scores], 1), torch.cat([best[1], rows + start], 1)
    scores, order = scores.topk(min(depth, scores.shape[1]))
    return scores, rows.gather(1, order)


class Bm25:
    """BM25 (Robertson and Zaragoza 2009) in Lucene's form, with its defaults, by the package bm25s.

    Words are those of `msense.text.words`: neither spaces nor English are assumed, and no word is left out. They are stemmed only
    on request.

    Example:
        >>> Bm25().search(["a river bank", "a cat"], ["cats", "the cat"])[1].documents
        array([1])
    """

    def __init__(self, stemmer: str | None = None) -> None:
        """Choose the language of a Snowball stemmer, or none; InputError if there is none for it."""
        self._stem: Callable[[list[str]], list[str]] = lambda own: own
        if stemmer:
            import Stemmer  # optional

            if stemmer not in (known := Stemmer.algorithms()):
                raise InputError(f"bm25,{stemmer}: no such stemmer; use one of {', '.join(known)}, or bm25 without")
            self._stem = Stemmer.Stemmer(stemmer).stemWords

    @cached_property
    def _package(self) -> Any:
        import bm25s  # optional

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs debugging messages by default
        return bm25s

    def search(self, documents: Sequence[str], queries: Sequence[str], depth: int = DEPTH) -> list[Hits]:
        """Return up to `depth` documents that share a word with each query."""
        split = [[self._stem(words(text)) for text in texts] for texts in (documents, queries)]
        if not any(split[0]):
            return [Hits(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
        index = self._package.BM25(k1=K1, b=B, method="lucene", csc_backend="scipy")
        index.index(split[0], show_progress=False)
        found = index.retrieve(split[1], k=min(depth, len(documents)), backend_selection="numpy", show_progress=False)
        rows = zip(found.documents, found.scores, strict=True)
        return [Hits(own[score > 0].astype(np.int64), score[score > 0]) for own, score in rows]


def ordered(found: Sequence[Hits], ids: np.ndarray, depth: int = KEPT) -> list[Hits]:
    """Return the first `depth` hits of each query by descending score and, for equal scores, descending id, as in trec_eval.

    Args:
        found: hits of every query.
        ids: str or object [N], ids of the documents.
        depth: hits per query.
    """
    places = np.argsort(np.argsort(ids))
    orders = [np.lexsort((-places[hits.documents], -hits.scores))[:depth] for hits in found]
    return [Hits(hits.documents[order], hits.scores[order]) for hits, order in zip(found, orders, strict=True)]


def fuse(a: Sequence[Hits], b: Sequence[Hits]) -> list[Hits]:
    """Return the hits of two searches for the same queries by the sum of their min-max normalised scores (Lee 1997)."""
    return [_fused(*pair) for pair in zip(a, b, strict=True)]


def _fused(a: Hits, b: Hits) -> Hits:
    documents, inverse = np.unique(np.concatenate([a.documents, b.documents]), return_inverse=True)
    sums = np.bincount(inverse, np.concatenate([_normalised(own.scores) for own in (a, b)]), len(documents))
    return Hits(documents, sums.astype(np.float32))


def _normalised(scores: np.ndarray) -> np.ndarray:
    """Return scores from 0 (the lowest) to 1 (the highest); 1 if all are equal."""
    return (scores - scores.min()) / np.ptp(scores) if len(scores) and np.ptp(scores) else np.ones(len(scores))
