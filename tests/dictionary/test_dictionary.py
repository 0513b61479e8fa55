"""SenseDictionary in memory: assignment, replacement, fit and merge."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, make

from msense.clustering.budget import SenseBudget
from msense.clustering.mcl import MclConfig
from msense.dictionary import SenseDictionary, TeacherName
from msense.dictionary.layout import DTYPES
from msense.errors import DictionaryError, InputError


def test_results_have_the_array_type_of_the_embeddings() -> None:
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
    out = np.zeros((4, 6), np.float32)[:, ::2]  # not contiguous
    assert d.replace(ids, x, out=out) is out
    np.testing.assert_array_equal(out, replaced)
    np.testing.assert_array_equal(d.replace(torch.from_numpy(ids), t).numpy(), replaced)


def test_temperature_is_relative_to_the_unit_of_the_dictionary() -> None:
    d = make([4], temperature_unit=2.0)
    ids, x = np.zeros(1, np.int64), np.array([[0.3, -0.2, 0.1]], np.float32)
    own = d.senses(0).centroids.numpy()
    for metric, scores in (("l2", -((x - own) ** 2).sum(1)), ("dot", own @ x[0])):
        w = np.exp(scores / (0.25 * 2.0))
        np.testing.assert_allclose(d.replace(ids, x, 0.25, metric=metric)[0], w @ own / w.sum(), rtol=1e-5)
    single = make([4], temperature_unit=0.0)  # each sense is a single point
    np.testing.assert_array_equal(single.replace(ids, x, 0.25), single.replace(ids, x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, i, x: d.assign(i, x[:, :2]), "width 2, but the dictionary 3"),
        (lambda d, i, x: d.assign(i[:3], x), "3 token ids do not match 4 embeddings"),
        (lambda d, i, x: d.assign(i.astype(float), x), "must be integers"),
        (lambda d, i, x: d.assign(i, x.astype(int)), "must be floating point"),
        (lambda d, i, x: d.assign(i, x[0]), "must be floating point"),
        (lambda d, i, x: d.replace(i, x, 0.0), "temperature is 0.0"),
        (lambda d, i, x: d.replace(i, x, float("nan")), "temperature is nan"),
        (lambda d, i, x: d.replace(i, x, out=x.astype(np.float64)), "must match the embeddings"),
        (lambda d, i, x: d.replace(i, x, out=x[:2]), "must match the embeddings"),
        (lambda d, i, x: d.replace(i, x, out=np.broadcast_to(np.float32(0), x.shape)), "read-only"),
        (lambda d, i, x: d.senses(3), "token 3 is not in the vocabulary"),
        (lambda d, i, x: d.from_embeddings(i + 2**22, x), "1 to 4194304 tokens"),
        (lambda d, i, x: d.lookup("bank"), "no tokenizer"),
        (lambda d, i, x: d.fingerprint, "no fingerprint: save and load"),
        (lambda d, i, x: d.save("s3://bucket/d"), "is not a local folder"),
        (lambda d, i, x: d.save("unused", dtype="int4"), "dtype is 'int4', but must be one of"),
        (lambda d, i, x: d.from_embeddings(i, x, vocab_size=1), "from 0 to 2, but those of the vocabulary from 0 to 0"),
        (lambda d, i, x: d.from_embeddings(i, x, k=3.0), "k is 3.0, but must be an integer, a SenseBudget or an MclC"),
    ],
)
def test_invalid_arguments_are_reported(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(make([2, 0, 3]), np.array([0, 1, 2, 0]), np.ones((4, 3), np.float32))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_fit_recovers_planted_senses_in_any_row_order(dtype: str) -> None:
    rng = np.random.default_rng(1)
    planted = {2: [[0, 0], [8, 8]], 5: [[-4, 4], [4, -4], [9, 9]]}
    ids = np.repeat([2, 2, 5, 5, 5], 40)
    x = np.repeat(np.concatenate(list(planted.values())), 40, axis=0) + rng.normal(scale=0.1, size=(200, 2))
    order = rng.permutation(200)
    d = SenseDictionary.from_embeddings(
        ids[order], x[order].astype(np.float32), k=np.int64(3), vocab_size=7, dtype=dtype
    )
    assert d.centroids.dtype == DTYPES[dtype]
    assert d.token_counts.tolist() == [0, 0, 80, 0, 0, 120, 0]
    assert np.diff(d.offsets).tolist() == [0, 0, 3, 0, 0, 3, 0]
    assert sorted(d.senses(5).centroids.round().tolist()) == sorted(planted[5])
    assert d.senses(5).counts.tolist() == [40, 40, 40]
    unit = (d.counts * d.rms_distance.astype(np.float64) ** 2).sum() / 200
    assert d.config.temperature_unit == pytest.approx(unit)
    replaced = d.replace(ids, x.astype(np.float32))
    assert np.abs(replaced - x).max() < 1
    assert set(d.assign(ids, x.astype(np.float32))[80:120]) == {d.assign(np.array([5]), np.array([[-4.0, 4.0]]))[0]}


def test_fit_limits_the_points_of_a_token_and_counts_all() -> None:
    x = torch.randn(50, 4)
    ids = torch.tensor([1] * 30 + [0] * 20)
    a, b = (SenseDictionary.from_embeddings(ids, x, k=3, max_occurrences=12, seed=seed) for seed in (0, 1))
    assert [a.counts[:3].sum(), a.counts[3:].sum()] == [12, 12]
    assert a.token_counts.tolist() == [20, 30]
    assert not torch.equal(a.centroids, b.centroids)
    assert_same(a, SenseDictionary.from_embeddings(ids, x, k=3, max_occurrences=12, seed=0))


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
        assert whole.config.temperature_unit == pytest.approx(np.average(whole.rms_distance**2, weights=whole.counts))


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
def test_merge_reports_incompatible_dictionaries(other: SenseDictionary, message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        make([1, 2]).merge(other)


def test_merge_rejects_too_many_senses() -> None:
    d = make([32_767], dim=1)
    both = d.merge(d)
    assert len(both) == 65_534
    with pytest.raises(DictionaryError, match="token 0 has 98301 senses of width 1, but the maximum is 65534"):
        both.merge(d)


@pytest.mark.parametrize("k", [3, SenseBudget(average=5.0), MclConfig()])
def test_fit_of_no_embeddings_is_an_empty_dictionary(k: int | SenseBudget | MclConfig) -> None:
    d = SenseDictionary.from_embeddings(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), k=k, vocab_size=7)
    assert (len(d), d.vocab_size, d.dim) == (0, 7, 4)


def test_importing_msense_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, msense; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules]);"
        "msense.SenseDictionary; print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "True False", ""]
