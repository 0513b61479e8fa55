"""Token-level fidelity to the teacher: cosine of embeddings, and share of tokens with the teacher's sense.

Memory: the token embeddings of one slab of texts, from both models.
"""

import itertools
from dataclasses import replace

import numpy as np

from msense.corpus import Document, cut_splits, list_files, read_documents
from msense.errors import InputError
from msense.evaluation.models import TokenModel, iter_slabs
from msense.evaluation.result import Result
from msense.io.filesystems import display_uri
from msense.training.losses import frequent_sense_accuracy

MAX_TEXTS = 2000  # the first documents of the corpus
COSINE, SENSES, FREQUENT = "cosine", "sense accuracy", "most frequent sense"


def measure(model: TokenModel, teacher: TokenModel, source: str, text_column: str = "text") -> Result:
    """Compare a model with the plain teacher token by token; the score is the mean cosine over tokens.

    If the model replaces, its senses are compared with the teacher's embeddings. With a dictionary, the teacher's sense of a
    token is the one assigned to the teacher's embedding. Of the corpus `source`, the first `MAX_TEXTS` documents are used.

    Raises:
        InputError: there is no text, or the tokenizations differ.
    """
    cosines, sizes = [], []
    right, total, frequent = 0, 0, 0.0
    for slab in iter_slabs(read_texts(source, text_column)):
        own, reference = model.read(slab), teacher.read(slab)
        output = own.senses if model.spec.replace is None else own.hidden
        if not np.array_equal(own.ids, reference.ids) or own.senses.shape != reference.senses.shape:
            raise InputError(
                "model and teacher split this text into different tokens: compare them on sentences instead"
            )
        sizes.append(np.diff(own.offsets))
        sums = np.bincount(own.texts, _cosines(output, reference.hidden), len(slab))
        cosines.append(sums / np.maximum(sizes[-1], 1))
        if model.dictionary is not None:
            wanted = model.dictionary.assign(reference.ids, reference.senses)
            known = wanted >= 0
            right += int((model.dictionary.assign(own.ids, own.senses) == wanted)[known].sum())
            total += int(known.sum())
            labels = wanted[known].astype(np.uint16)
            frequent += float(frequent_sense_accuracy(own.ids[known], labels, model.dictionary).total)
    weights = np.concatenate(sizes).astype(np.float64)
    more: dict[str, int | float] = {SENSES: right / total, FREQUENT: frequent / total} if total else {}
    more["tokens"] = int(weights.sum())
    return Result(COSINE, "texts", np.concatenate(cosines).tolist(), weights.tolist(), more=more)


def read_texts(source: str, text_column: str = "text") -> list[str]:
    """Return the first texts of a corpus; InputError if it is missing or has no text."""
    # row numbers are needed for the names of documents only
    splits = (replace(split, first_row=max(0, split.first_row)) for split in cut_splits(list_files((source,))))
    documents = (document for split in splits for document in read_documents(split, text_column))
    texts = list(itertools.islice((d.text for d in documents if isinstance(d, Document)), MAX_TEXTS))
    if not texts:
        raise InputError(f"{display_uri(source)} contains no text: use another corpus")
    return texts


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of corresponding rows, float64 [N]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.einsum("nd,nd->n", a, b, dtype=np.float64) / np.maximum(norms, 1e-12))
