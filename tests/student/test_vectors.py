"""Precisions and similarities: known values, and those of sentence-transformers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from msense.errors import InputError
from msense.student.vectors import quantize, similarity, similarity_pairwise

VECTORS = np.random.default_rng(0).normal(size=(9, 20)).astype(np.float32)
VECTORS[:, 3] = 1.5  # without a range


def test_precisions_known_by_hand() -> None:
    vectors = np.array([[0.0, 1, -1], [255, 1, 1]])
    assert quantize(vectors, "uint8").tolist() == [[0, 0, 0], [255, 0, 255]]
    assert quantize(vectors, "int8").tolist() == [[-128, -128, -128], [127, -128, 127]]
    assert quantize(vectors, "ubinary").tolist() == [[0b01000000], [0b11100000]]
    assert quantize(vectors, "binary").tolist() == [[64 - 128], [224 - 128]]
    with pytest.raises(InputError, match="one vector has no range for uint8"):
        quantize(vectors[:1], "uint8")


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precisions_are_those_of_sentence_transformers(precision: str) -> None:
    util = pytest.importorskip("sentence_transformers.util")
    for vectors in (VECTORS, VECTORS[:0]):
        expected = util.quantize_embeddings(vectors, precision)
        np.testing.assert_array_equal(quantize(vectors, precision), expected, strict=True)


def test_similarities_known_by_hand() -> None:
    a, b = np.array([[3.0, 4], [0, 2]]), torch.tensor([[0.0, 1.0]])
    assert similarity(a, b)[:, 0].tolist() == pytest.approx([0.8, 1.0])
    assert similarity(a, b, "dot").tolist() == [[4], [2]]
    assert similarity(a[0], list(b), "euclidean").tolist() == [[pytest.approx(-(18**0.5))]]
    assert similarity_pairwise(a, a[::-1], "manhattan").tolist() == [-5, -5]


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_are_those_of_sentence_transformers(kind: str) -> None:
    util = pytest.importorskip("sentence_transformers.util")
    names = {"cosine": "cos_sim", "dot": "dot_score"}
    name = names.get(kind, f"{kind}_sim")
    other = VECTORS[::-1].copy()
    for function, pairs in ((similarity, ""), (similarity_pairwise, "pairwise_")):
        expected = getattr(util, f"{pairs}{name}")(VECTORS, other)
        torch.testing.assert_close(function(VECTORS, other, kind), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("compare", [similarity, similarity_pairwise])
def test_what_is_no_vectors_of_one_size_is_refused(compare: Callable[..., torch.Tensor]) -> None:
    one = np.ones((2, 3))
    for wrong, match in (
        ((one, one, "euclidian"), "invalid similarity 'euclidian': use one of"),
        ((one, np.ones((2, 4))), "vectors have 3 and 4 numbers"),
        ((["a text", "b"], one), "no vectors to compare"),
        ((None, one), "no vectors to compare"),
        (([[1.0], [1.0, 2.0]], one), "no vectors to compare"),
        ((np.ones((1, 2, 3)), one), r"vectors have shape \(1, 2, 3\)"),
        ((np.float32(3), one), r"vectors have shape \(\)"),
    ):
        with pytest.raises(InputError, match=match):
            compare(*wrong)
    assert similarity([], one).shape == (0, 2)
    assert similarity(one, np.ones((0, 3)), "manhattan").shape == (2, 0)
    assert similarity_pairwise([], []).shape == (0,)
    with pytest.raises(InputError, match="3 and 2 vectors are no pairs"):
        similarity_pairwise(np.ones((3, 3)), one)
