"""Assignment and replacement against a loop over occurrences, and cases with results known by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msense.dictionary import assignment
from msense.dictionary.assignment import RaggedSenses, assign, ragged_batches, replace, with_senses
from msense.errors import DictionaryError, InputError

METRICS = ("l2", "dot", "cosine")


def naive_scores(x: np.ndarray, senses: np.ndarray, metric: str) -> np.ndarray:
    x, senses = x.astype(np.float64), senses.astype(np.float64)
    if metric == "l2":
        return -((x - senses) ** 2).sum(axis=1)
    if metric == "cosine":
        senses = senses / np.maximum(np.linalg.norm(senses, axis=1, keepdims=True), 1e-12)
        x = x / max(np.linalg.norm(x), 1e-12)
    return senses @ x


def own_senses(token: int, offsets: np.ndarray, table: np.ndarray) -> np.ndarray:
    known = 0 <= token < len(offsets) - 1
    return table[offsets[token] : offsets[token + 1]] if known else table[:0]


def draw_case(seed: int, tokens: int, occurrences: int, most: int, integers: bool) -> tuple:
    """Return ids (some outside the vocabulary), embeddings, offsets and senses; with integers all scores are exact."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, tokens)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    dim = int(rng.integers(1, 6))
    ids = np.minimum(rng.zipf(1.5, occurrences), tokens + 1) - 2 if occurrences else np.zeros(0, np.int64)
    if integers:
        table, x = rng.integers(-3, 4, (offsets[-1], dim)), rng.integers(-3, 4, (occurrences, dim))
    else:
        table, x = rng.normal(size=(offsets[-1], dim)), rng.normal(size=(occurrences, dim))
    return ids, x.astype(np.float32), offsets, table.astype(np.float32)


def cut(table: np.ndarray, offsets: np.ndarray, parts: int) -> RaggedSenses:
    return RaggedSenses(offsets, tuple(torch.from_numpy(p) for p in np.array_split(table, parts)))


cases = st.tuples(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 80), st.integers(0, 7))
budgets = st.sampled_from([1, 30, 1 << 18])  # one occurrence per batch, both kinds of batches, a single batch


@settings(max_examples=150, deadline=None)
@given(
    case=cases,
    integers=st.booleans(),
    metric=st.sampled_from(METRICS),
    scale=st.sampled_from([None, 1e-3, 0.7, 50.0]),
    parts=st.integers(1, 3),
    elements=budgets,
)
def test_assignment_and_replacement_match_a_loop(
    case: tuple, integers: bool, metric: str, scale: float | None, parts: int, elements: int
) -> None:
    ids, x, offsets, table = draw_case(*case, integers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(assignment.BATCH_ELEMENTS, "cpu", elements)
        senses = cut(table, offsets, parts)
        number = assign(ids, torch.from_numpy(x), senses, metric).numpy()
        got = replace(ids, torch.from_numpy(x), senses, metric, scale).numpy()
    for i, token in enumerate(ids):
        own = own_senses(token, offsets, table)
        if not len(own):
            assert number[i] == -1
            np.testing.assert_array_equal(got[i], x[i])
            continue
        s = naive_scores(x[i], own, metric)
        assert s[number[i]] >= s.max() - 1e-5
        if integers and metric != "cosine":  # exact scores: ties go to the lowest
            assert number[i] == s.argmax()
        if scale is None:
            np.testing.assert_array_equal(got[i], own[number[i]])
        else:
            w = np.exp((s - s.max()) / scale)
            slack = 1e-4 if scale > 1e-2 else 2e-2  # error of float32 scores, amplified by a small scale
            np.testing.assert_allclose(got[i], w @ own / w.sum(), atol=slack * max(1, abs(own).max()))


@settings(max_examples=60, deadline=None)
@given(case=cases, elements=budgets)
def test_every_occurrence_is_in_exactly_one_batch(case: tuple, elements: int) -> None:
    ids, x, offsets, _ = draw_case(*case, integers=True)
    seen = []
    for batch in ragged_batches(ids, offsets, x.shape[1], elements):
        for t in range(len(batch.rows)):
            filled = np.ones(batch.rows.shape[1], bool) if batch.filled is None else batch.filled[t].numpy()
            present = np.ones(batch.senses.shape[1], bool) if batch.present is None else batch.present[t].numpy()
            rows = batch.rows[t].numpy()[filled]
            token = ids[rows[0]]
            assert (ids[rows] == token).all()
            assert batch.senses[t].numpy()[present].tolist() == list(range(offsets[token], offsets[token + 1]))
            seen += rows.tolist()
    assert sorted(seen) == np.flatnonzero(with_senses(ids, offsets)).tolist()


def test_padding_and_batches_stay_small() -> None:
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, 50_000), 5_000) - 1
    offsets = np.concatenate([[0], np.cumsum(np.minimum(np.bincount(ids, minlength=5_000), 20))])
    batches = list(ragged_batches(ids, offsets, 64, 1 << 18))
    assert sum(batch.rows.numel() for batch in batches) < 1.2 * len(ids)
    assert len(batches) < 500
    many = ragged_batches(np.repeat([0, 1, 2], [2000, 900, 50]), np.array([0, 60_000, 60_700, 60_703]), 1, 1 << 18)
    assert max(batch.rows.numel() * batch.senses.shape[1] for batch in many) <= 1 << 18


def test_embeddings_far_from_zero_keep_their_nearest_sense() -> None:
    rng = np.random.default_rng(3)
    table = (1000 + rng.normal(size=(20, 384))).astype(np.float32)
    x = table[rng.integers(0, 20, 300)] + rng.normal(size=(300, 384)).astype(np.float32)
    expected = [naive_scores(row, table, "l2").argmax() for row in x]
    got = assign(np.zeros(300, np.int64), torch.from_numpy(x), cut(table, np.array([0, 20]), 1), "l2")
    assert got.tolist() == expected


def test_high_temperature_gives_the_mean_and_low_the_nearest() -> None:
    table = np.array([[0, 0], [4, 0], [0, 8]], np.float32)
    senses, ids, x = cut(table, np.array([0, 3]), 1), np.zeros(1, np.int64), torch.tensor([[3.0, 1.0]])
    assert replace(ids, x, senses, "l2", 1e9).tolist()[0] == pytest.approx([4 / 3, 8 / 3])
    assert replace(ids, x, senses, "l2", 1e-40).tolist() == [[4, 0]]
    weight = 1 / (1 + math.exp((2 - 10) / 5))  # squared distances 10, 2 and 58
    assert replace(ids, x, senses, "l2", 5.0)[0, 0].item() == pytest.approx(4 * weight, rel=1e-4)


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_keeps_dtype(dtype: torch.dtype, scale: float | None) -> None:
    x = torch.tensor([[1, 0], [9, 9], [0, 3], [8, 8], [7, 7]], dtype=dtype)
    senses = RaggedSenses(np.array([0, 2, 2]), (torch.tensor([[2, 0], [0, 2]], dtype=torch.float16),))
    out = replace(np.array([0, 1, 0, -100, 7]), x, senses, "l2", scale)
    assert out.dtype == dtype
    assert out[[1, 3, 4]].tolist() == [[9, 9], [8, 8], [7, 7]]
    if scale is None:
        assert out[[0, 2]].tolist() == [[2, 0], [0, 2]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_rejected(metric: str, value: float) -> None:
    table, x = torch.ones(3, 2), torch.ones(4, 2)
    ids, offsets = np.array([1, 0, 1, 1]), np.array([0, 1, 3])
    x[2, 1] = value
    with pytest.raises(InputError, match="embedding 2 holds NaN"):
        assign(ids, x, RaggedSenses(offsets, (table,)), metric)
    x[2, 1] = 1
    table[2, 0] = value
    with pytest.raises(DictionaryError, match="sense row 2 "):
        replace(ids, x, RaggedSenses(offsets, (table,)), metric, 1.0)
    assert assign(ids[1:2], x[1:2], RaggedSenses(offsets, (table,)), metric).tolist() == [0]  # other rows remain usable
