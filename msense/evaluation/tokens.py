"""What a model says of single tokens, beside its teacher: cosine of embeddings, and how often the sense is the teacher's.

Comes in: a model that reads tokens, its teacher, and any text. Goes out: means over all tokens, text by text. Holds the
embeddings of one slab of texts by both.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from msense.config import NO_SENSE
from msense.corpus import Document, cut_pieces, list_files, read_documents
from msense.corpus.files import display_uri
from msense.errors import BadInput
from msense.evaluation.models import TokenModel, slabs
from msense.evaluation.result import Result
from msense.losses import frequent_sense_accuracy

MOST_TEXTS = 2000  # the first of the corpus
COSINE, SENSES, FREQUENT = "cosine", "sense accuracy", "most frequent sense"


def measure(model: TokenModel, teacher: TokenModel, source: str, text_column: str = "text") -> Result:
    """Compare a model with its teacher, token by token.

    The score is the mean cosine over tokens, of what stands for them: their senses where the model replaces. Senses are those of
    the model's dictionary, if it has one: the teacher's sense of a token is the one nearest to the teacher's embedding.

    Args:
        model: what is measured.
        teacher: as it is; both must cut texts alike.
        source: text, any that build_dict.py reads; the first `MOST_TEXTS` documents count.
        text_column: of it.

    Raises:
        BadInput: there is no text, or the two do not cut it alike.
    """
    cosines, tokens = [], []
    right, asked, frequent = 0, 0, 0.0
    for slab in slabs(read_texts(source, text_column)):
        own, theirs = model.read(slab), teacher.read(slab)
        shown = own.senses if model.spec.replace is None else own.hidden
        if not np.array_equal(own.ids, theirs.ids) or own.senses.shape != theirs.senses.shape:
            raise BadInput(
                "the model and the teacher do not cut this text into the same tokens: compare them on sentences"
            )
        sizes = np.diff(own.offsets)
        text = np.repeat(np.arange(len(slab)), sizes)
        cosines.append(np.bincount(text, _cosines(shown, theirs.hidden), len(slab)) / np.maximum(sizes, 1))
        tokens.append(sizes)
        if model.dictionary is not None:
            wanted = model.dictionary.assign(theirs.ids, theirs.senses)
            known = wanted >= 0
            right += int((model.dictionary.assign(own.ids, own.senses) == wanted)[known].sum())
            asked += int(known.sum())
            labels = np.where(known, wanted, NO_SENSE).astype(np.uint16)
            frequent += float(frequent_sense_accuracy(own.ids, labels, model.dictionary).total)
    weights = np.concatenate(tokens).astype(np.float64)
    more = {SENSES: right / asked, FREQUENT: frequent / asked} if asked else {}
    return Result(
        COSINE, "texts", np.concatenate(cosines).tolist(), weights.tolist(), more={**more, "tokens": weights.sum()}
    )


def read_texts(source: str, text_column: str = "text", most: int = MOST_TEXTS) -> list[str]:
    """Return the first texts of a corpus.

    Raises:
        BadInput: it is not there, or has no text.
    """
    found = list(itertools.islice(_documents(source, text_column), most))
    if not found:
        raise BadInput(f"{display_uri(source)} holds no text: give another corpus")
    return found


def _documents(source: str, text_column: str) -> Iterator[str]:
    for piece in cut_pieces(list_files((source,))):
        numbered = replace(piece, first_row=max(0, piece.first_row))  # rows name documents, and nobody asks for names
        yield from (d.text for d in read_documents(numbered, text_column) if isinstance(d, Document))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of two arrays, float64 [N]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.einsum("nd,nd->n", a, b, dtype=np.float64) / np.maximum(norms, 1e-12))
