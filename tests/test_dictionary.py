"""The dictionary class in memory: assignment, replacement, fit and merge."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, make

from msense.config import SenseBudget
from msense.dictionary import SenseDictionary, TeacherName
from msense.dictionary.format import DTYPES
from msense.errors import BadInput, DictionaryError
from msense.mcl import MclConfig


def test_numpy_in_numpy_out_and_torch_in_torch_out() -> None:
    d = make([2, 0, 3])
    ids, x = np.array([2, 1, 0, 9]), np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    x.flags.writeable = False
    number, replaced = d.assign(ids, x), d.replace(ids, x)
    assert isinstance(number, np.ndarray)
    assert number.dtype == np.int64
    assert number[[1, 3]].tolist() == [-1, -1]
    np.testing.assert_array_equal(replaced[0], d.senses(2).centroids[number[0]])
    t = torch.from_numpy(x.copy())
    assert d.assign(torch.from_numpy(ids), t).tolist() == number.tolist()
    out = np.zeros((4, 6), np.float32)[:, ::2]  # strided
    assert d.replace(ids, x, out=out) is out
    np.testing.assert_array_equal(out, replaced)
    np.testing.assert_array_equal(d.replace(torch.from_numpy(ids), t).numpy(), replaced)


def test_temperature_is_in_units_of_the_dictionary() -> None:
    d = make([4], temperature_unit=2.0)
    ids, x = np.zeros(1, np.int64), np.array([[0.3, -0.2, 0.1]], np.float32)
    own = d.senses(0).centroids.numpy()
    w = np.exp(-((x - own) ** 2).sum(1) / (0.25 * 2.0))
    np.testing.assert_allclose(d.replace(ids, x, 0.25)[0], w @ own / w.sum(), rtol=1e-5)
    w = np.exp(own @ x[0] / (0.25 * 2.0))
    np.testing.assert_allclose(d.replace(ids, x, 0.25, metric="dot")[0], w @ own / w.sum(), rtol=1e-5)
    single = make([4], temperature_unit=0.0)  # every sense a single point
    np.testing.assert_array_equal(single.replace(ids, x, 0.25), single.replace(ids, x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, i, x: d.assign(i, x[:, :2]), "width 2, the dictionary 3"),
        (lambda d, i, x: d.assign(i[:3], x), "3 token ids came with 4"),
        (lambda d, i, x: d.assign(i.astype(float), x), "must be integers"),
        (lambda d, i, x: d.assign(i, x.astype(int)), "must be floating point"),
        (lambda d, i, x: d.assign(i, x[0]), "must be floating point"),
        (lambda d, i, x: d.replace(i, x, 0.0), "temperature is 0.0"),
        (lambda d, i, x: d.replace(i, x, float("nan")), "temperature is nan"),
        (lambda d, i, x: d.replace(i, x, out=x.astype(np.float64)), "must be like the embeddings"),
        (lambda d, i, x: d.replace(i, x, out=x[:2]), "must be like the embeddings"),
        (lambda d, i, x: d.replace(i, x, out=np.broadcast_to(np.float32(0), x.shape)), "read-only"),
        (lambda d, i, x: d.senses(3), "token 3 is not in the vocabulary"),
        (lambda d, i, x: d.senses(-1), "token -1 is not"),
        (lambda d, i, x: d.find("bank"), "no tokenizer"),
        (lambda d, i, x: d.save("s3://bucket/d"), "is not a local folder"),
    ],
)
def test_wrong_use_is_named(call: Callable, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call(make([2, 0, 3]), np.array([0, 1, 2, 0]), np.ones((4, 3), np.float32))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_fit_finds_planted_senses_in_any_row_order(dtype: str) -> None:
    rng = np.random.default_rng(1)
    planted = {2: [[0, 0], [8, 8]], 5: [[-4, 4], [4, -4], [9, 9]]}
    ids = np.repeat([2, 2, 5, 5, 5], 40)
    x = np.repeat(np.concatenate(list(planted.values())), 40, axis=0) + rng.normal(scale=0.1, size=(200, 2))
    order = rng.permutation(200)
    d = SenseDictionary.fit(ids[order], x[order].astype(np.float32), k=3, vocab_size=7, dtype=dtype)
    assert d.centroids.dtype == DTYPES[dtype]
    assert d.token_counts.tolist() == [0, 0, 80, 0, 0, 120, 0]
    assert np.diff(d.offsets).tolist() == [0, 0, 3, 0, 0, 3, 0]
    assert sorted(d.senses(5).centroids.round().tolist()) == sorted(planted[5])
    assert d.senses(5).counts.tolist() == [40, 40, 40]
    unit = (d.counts * d.spread.astype(np.float64) ** 2).sum() / 200
    assert d.config.temperature_unit == pytest.approx(unit)
    assert d.config.teacher.name == "in memory"
    replaced = d.replace(ids, x.astype(np.float32))
    assert np.abs(replaced - x).max() < 1
    assert set(d.assign(ids, x.astype(np.float32))[80:120]) == {d.assign(np.array([5]), np.array([[-4.0, 4.0]]))[0]}


def test_fit_caps_the_points_of_a_token_and_counts_all() -> None:
    x = torch.randn(50, 4)
    ids = torch.tensor([1] * 30 + [0] * 20)
    a, b = (SenseDictionary.fit(ids, x, k=3, max_occurrences=12, seed=seed) for seed in (0, 1))
    assert [a.counts[:3].sum(), a.counts[3:].sum()] == [12, 12]
    assert a.token_counts.tolist() == [20, 30]
    assert not torch.equal(a.centroids, b.centroids)
    assert_same(a, SenseDictionary.fit(ids, x, k=3, max_occurrences=12, seed=0))
    with pytest.raises(BadInput, match="from 0 to 1, but the vocabulary has the tokens 0 to 0"):
        SenseDictionary.fit(ids, x, vocab_size=1)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), vocabulary=st.integers(1, 6))
def test_merge_is_associative_and_keeps_every_sense_in_order(data: st.DataObject, vocabulary: int) -> None:
    sizes = st.lists(st.integers(0, 4), min_size=vocabulary, max_size=vocabulary)
    a, b, c = (make(data.draw(sizes), seed=seed) for seed in range(3))
    whole = a.merge(b, c)
    assert_same(whole, a.merge(b).merge(c))
    assert_same(whole, a.merge(b.merge(c)))
    assert whole.token_counts.tolist() == (a.token_counts + b.token_counts + c.token_counts).tolist()
    for token in range(vocabulary):
        each = [d.senses(token) for d in (a, b, c)]
        assert torch.equal(whole.senses(token).centroids, torch.cat([own.centroids for own in each]))
        assert whole.senses(token).counts.tolist() == np.concatenate([own.counts for own in each]).tolist()
    if len(whole):
        assert whole.config.temperature_unit == pytest.approx(np.average(whole.spread**2, weights=whole.counts))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make([1, 2], dim=4), r"dim \(3 and 4\)"),
        (make([1, 2, 1]), r"vocab_size \(2 and 3\)"),
        (make([1, 2], metric="dot"), r"metric \('l2' and 'dot'\)"),
        (make([1, 2], tokenizer_fingerprint="u"), r"tokenizer_fingerprint \('t' and 'u'\)"),
        (make([1, 2], dtype="float32"), r"dtype \('float16' and 'float32'\)"),
        (make([1, 2], layer=3), r"layer \(-1 and 3\)"),
        (make([1, 2], teacher=TeacherName(name="x", fingerprint="g")), r"teacher fingerprint \('f' and 'g'\)"),
    ],
)
def test_merge_names_what_differs(other: SenseDictionary, message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        make([1, 2]).merge(other)


def test_merge_refuses_too_many_senses() -> None:
    d = make([40_000], dim=1)
    with pytest.raises(DictionaryError, match="token 0 has 80000 senses"):
        d.merge(d)


def test_fit_takes_any_integer_for_k_and_nothing_else() -> None:
    x, ids = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32), np.repeat([0, 1], 25)
    assert_same(SenseDictionary.fit(ids, x, k=np.int64(3)), SenseDictionary.fit(ids, x, k=3))
    for wrong in ("auto", 3.0, None):
        with pytest.raises(BadInput, match=f"k is {wrong!r}, but must be a whole number, a SenseBudget or an MclConf"):
            SenseDictionary.fit(ids, x, k=wrong)


@pytest.mark.parametrize("k", [3, SenseBudget(average=5.0), MclConfig()])
def test_fit_of_nothing_is_a_dictionary_of_nothing(k: int | SenseBudget | MclConfig) -> None:
    d = SenseDictionary.fit(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), k=k, vocab_size=7)
    assert (len(d), d.vocab_size, d.dim) == (0, 7, 4)


def test_importing_msense_is_light() -> None:
    code = "import sys, msense; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert light.stdout.strip() == "[]"
    code = "import sys, msense; msense.SenseDictionary; print('torch' in sys.modules, 'ray' in sys.modules)"
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert used.stdout.strip() == "True False"
