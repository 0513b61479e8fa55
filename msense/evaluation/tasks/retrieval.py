"""Retrieval: documents ranked for queries by the cosine of vectors, by BM25, and by both together.

Measures nDCG@10, recall@100 and MRR@10 per query by trec_eval (package pytrec_eval), as BEIR and MTEB do: ties are ordered by
descending id, and a query whose judgements are all 0 counts as 0. Memory: see `beir` and `search`.
"""

from collections.abc import Sequence

import numpy as np

from msense.evaluation.models import Model, encode_as
from msense.evaluation.result import Result
from msense.evaluation.search import KEPT, Bm25, Hits, fuse, nearest, ordered
from msense.evaluation.tasks.beir import RetrievalData, read_retrieval

MAIN, RECALL, MRR = "nDCG@10", "recall@100", "MRR@10"
_BLOCK = 1 << 14  # documents whose vectors are held at once
_MEASURES = {MAIN: ("ndcg_cut.10", "ndcg_cut_10", KEPT), RECALL: ("recall.100", "recall_100", KEPT)}
_MEASURES |= {MRR: ("recip_rank", "recip_rank", 10)}  # trec_eval's, its name in the output, hits that count


def measure(model: Model | Bm25, source: str, split: str, bm25: Bm25) -> list[Result]:
    """Return the result of a model and, for one with vectors, that of its fusion with BM25.

    Raises:
        InputError: the data are missing or invalid; see `beir.read_retrieval`.
    """
    data = read_retrieval(source, split)
    ids = np.array(data.document_ids, object)
    own = model if isinstance(model, Bm25) else bm25
    lexical = ordered(own.search(data.documents, data.queries), ids)
    if isinstance(model, Bm25):
        return [score(lexical, data)]
    starts = range(0, len(data.documents), _BLOCK)
    blocks = (encode_as(model, "document", data.documents[start : start + _BLOCK]) for start in starts)
    dense = ordered(nearest(encode_as(model, "query", data.queries), blocks), ids)
    return [score(dense, data), score(ordered(fuse(dense, lexical), ids), data)]


def score(found: Sequence[Hits], data: RetrievalData) -> Result:
    """Return a result with a value per query of the hits of all queries, ordered."""
    import pytrec_eval  # optional

    ids = np.array(data.document_ids, object)
    values = {}
    for name, (measured, key, depth) in _MEASURES.items():
        run = {
            query: dict(zip(ids[hits.documents[:depth]], hits.scores[:depth].tolist(), strict=True))
            for query, hits in zip(data.query_ids, found, strict=True)
        }
        scores = pytrec_eval.RelevanceEvaluator(data.judgements, {measured}).evaluate(run)
        values[name] = [float(scores[query][key]) for query in data.query_ids]
    more = {name: float(np.mean(values[name])) for name in (RECALL, MRR)}
    return Result(MAIN, "queries", values[MAIN], names=data.query_ids, more=more)
