"""SenseDictionary in memory: assignment, replacement, clustering, merge, look-up of words, exemplars."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, exemplars, make, with_tokenizer, word_piece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from msense.clustering.budget import SenseBudget
from msense.clustering.mcl import MclConfig
from msense.dictionary import DictionaryFiles, SenseDictionary, TeacherName
from msense.dictionary.contexts import write_exemplars
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
    np.testing.assert_array_equal(d.replace(torch.from_numpy(ids), t).numpy(), replaced)


def test_temperature_is_relative_to_the_unit_of_the_dictionary() -> None:
    d = make([4], temperature_unit=2.0)
    ids, x = np.zeros(1, np.int64), np.array([[0.3, -0.2, 0.1]], np.float32)
    own = d.senses(0).centroids.numpy()
    for metric, scores in (("l2", -((x - own) ** 2).sum(1)), ("dot", own @ x[0])):
        w = np.exp(scores / (0.25 * 2.0))
        np.testing.assert_allclose(d.replace(ids, x, 0.25, metric=metric)[0], w @ own / w.sum(), rtol=1e-5)
    for unit in (0.0, 5e-324, 1e-44, 1e77):  # 0: each sense is a single point; the others exceed float32
        extreme = make([4], temperature_unit=unit)
        expected = own.mean(0, keepdims=True) if unit > 1 else extreme.replace(ids, x)
        np.testing.assert_allclose(extreme.replace(ids, x, 0.25), expected, rtol=1e-5)


def with_metric(d: SenseDictionary, metric: str) -> SenseDictionary:
    """Change the metric without validation."""
    return SenseDictionary(d.config.model_copy(update={"metric": metric}), d._arrays, d.ragged.parts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, i, x: d.assign(i, x[:, :2]), "width 2, but the dictionary 3"),
        (lambda d, i, x: d.assign(i[:3], x), "3 token ids do not match 4 embeddings"),
        (lambda d, i, x: d.assign(i.astype(float), x), "must be integers"),
        (lambda d, i, x: d.assign(i, x.astype(int)), "must be floating point"),
        (lambda d, i, x: d.replace(i, x, 0.0), "temperature is 0.0"),
        (lambda d, i, x: d.replace(i, x, float("nan")), "temperature is nan"),
        (lambda d, i, x: d.replace(i, x, "1"), "temperature is '1'"),
        (lambda d, i, x: d.assign(i, x, metric="Cosine"), "metric is 'Cosine', but must be one of l2, dot, cosine"),
        (lambda d, i, x: d.replace(i, x, metric=""), "metric is ''"),
        (lambda d, i, x: d.top_k(torch.from_numpy(i), torch.from_numpy(x), 1, 1.0, metric="ip"), "metric is 'ip'"),
        (lambda d, i, x: with_metric(d, "L2").assign(i, x), "metric is 'L2'"),
        (lambda d, i, x: d.from_embeddings(i, x, metric="euclidean"), "metric is 'euclidean'"),
        (lambda d, i, x: d.merge(with_metric(d, "L2")), "differ in metric"),
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


@pytest.mark.parametrize("k", [3, SenseBudget(average=2.0), MclConfig()])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_changes_nothing(k: int | SenseBudget | MclConfig, default: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    ids, x = rng.integers(0, 5, 80), rng.normal(size=(80, 3)).astype(np.float32)
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            d = SenseDictionary.from_embeddings(ids, x, k=k, dtype="float32")
            weights = d.top_k(torch.from_numpy(ids), torch.from_numpy(x), 2, 0.3)[1]
            results.append([d.centroids.numpy(), d.replace(ids, x, 0.3), weights.numpy(), d.assign(ids, x)])
        finally:
            torch.set_default_dtype(torch.float32)
    for before, after in zip(*results, strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_fit_recovers_planted_senses_in_any_row_order(dtype: str) -> None:
    rng = np.random.default_rng(1)
    planted = {2: [[0, 0], [8, 8]], 5: [[-4, 4], [4, -4], [9, 9]]}
    ids = np.repeat([2, 2, 5, 5, 5], 40)
    x = np.repeat(np.concatenate(list(planted.values())), 40, axis=0) + rng.normal(scale=0.1, size=(200, 2))
    x, order = x.astype(np.float32), rng.permutation(200)
    d = SenseDictionary.from_embeddings(ids[order], x[order], k=np.int64(3), vocab_size=7, dtype=dtype)
    assert d.centroids.dtype == DTYPES[dtype]
    assert d.token_counts.tolist() == [0, 0, 80, 0, 0, 120, 0]
    assert np.diff(d.offsets).tolist() == [0, 0, 3, 0, 0, 3, 0]
    assert sorted(d.senses(5).centroids.round().tolist()) == sorted(planted[5])
    assert d.senses(5).counts.tolist() == [40, 40, 40]
    unit = (d.counts * d.rms_distance.astype(np.float64) ** 2).sum() / 200
    assert d.config.temperature_unit == pytest.approx(unit)
    assert np.abs(d.replace(ids, x) - x).max() < 1


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
    ("change", "message"),
    [
        ({"dim": 4}, r"dim \(3 and 4\)"),
        ({"vocab_size": 3}, r"vocab_size \(2 and 3\)"),
        ({"metric": "dot"}, r"metric \('l2' and 'dot'\)"),
        ({"tokenizer_fingerprint": "u"}, r"tokenizer_fingerprint \('t' and 'u'\)"),
        ({"dtype": "float32"}, r"dtype \('float16' and 'float32'\)"),
        ({"layer": 3}, r"layer \(-1 and 3\)"),
        ({"teacher": TeacherName(name="x", fingerprint="g")}, r"teacher fingerprint \('f' and 'g'\)"),
    ],
)
def test_merge_reports_incompatible_dictionaries(change: dict, message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        make([1, 2]).merge(make([1, 2], **change))


def test_merge_rejects_too_many_senses() -> None:
    d = make([32_767], dim=1)
    both = d.merge(d)
    with pytest.raises(DictionaryError, match="token 0 has 98301 senses of width 1, but the maximum is 65534"):
        both.merge(d)


@pytest.mark.parametrize("k", [3, SenseBudget(average=5.0), MclConfig()])
def test_fit_of_no_embeddings_is_an_empty_dictionary(k: int | SenseBudget | MclConfig) -> None:
    d = SenseDictionary.from_embeddings(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), k=k, vocab_size=7)
    assert (len(d), d.vocab_size, d.dim) == (0, 7, 4)


def test_importing_msense_is_lazy_and_never_loads_ray() -> None:
    code = (
        "import sys, msense; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules]); "
        "msense.SenseDictionary; msense.SenseEncoder; "
        "print([m for m in ('torch', 'ray', 'sentence_transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "['torch']", ""]


def byte_level() -> Tokenizer:
    tokens = [*"bankBrivé", "Ã", "©", "Ġ", "ba", "an", "nk", "bank", "Ġbank", "Ba", "Bank", "é"]
    merges = [("b", "a"), ("n", "k"), ("ba", "nk"), ("Ġ", "bank"), ("B", "a"), ("Ba", "nk"), ("Ã", "©")]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*tokens, "Ã©"]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece() -> Tokenizer:
    vocabulary = [("<unk>", 0.0), ("▁bank", -1.0), ("▁", -3.0), ("ri", -2.0), ("ver", -2.0), ("bank", -2.5)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def test_lookup_in_a_word_piece_vocabulary(tmp_path: Path) -> None:
    d = with_tokenizer(word_piece(), tmp_path, [2, 0, 3, 0, 1, 1, 1, 4])
    assert d.lookup("bank").tokens == [(2, "bank", 3), (7, "Bank", 4)]
    assert "'bank' (id 2, 3 senses), 'Bank' (id 7, 4 senses)" in d.lookup(" bank ").explain()
    assert d.lookup("BANK").tokens == [(2, "bank", 3)]  # the tokenizer lowercases it
    assert d.lookup("river").tokens == [(3, "river", 0)]
    assert "has no senses" in d.lookup("river").explain()
    split = d.lookup("unbans")
    assert (split.tokens, split.pieces) == ([], ["un", "##ban", "##s"])
    assert "splits it into 3 tokens (un ##ban ##s)" in split.explain()
    for unknown in ("xyz", "", "  "):
        assert (d.lookup(unknown).tokens, d.lookup(unknown).pieces) == ([], [])
        assert "unknown to the tokenizer" in d.lookup(unknown).explain()
    assert d.lookup("[UNK]").tokens == [(0, "[UNK]", 2)]


def test_lookup_in_a_byte_level_vocabulary(tmp_path: Path) -> None:
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    d = with_tokenizer(tokenizer, tmp_path, [1] * size)
    assert [t.token for t in d.lookup("bank").tokens] == ["bank", "Ġbank", "Bank"]
    assert [t.token for t in d.lookup("Bank").tokens] == ["Bank", "bank", "Ġbank"]
    assert "Ã©" in [t.token for t in d.lookup("é").tokens]  # a byte-level vocabulary writes é as two characters
    assert d.lookup("riv").pieces == ["r", "i", "v"]


def test_lookup_in_a_sentence_piece_vocabulary(tmp_path: Path) -> None:
    d = with_tokenizer(sentence_piece(), tmp_path, [0, 5, 0, 0, 0, 2])
    assert d.lookup("bank").tokens == [(5, "bank", 2), (1, "▁bank", 5)]
    assert d.lookup("river").pieces == ["▁", "ri", "ver"]
    assert d.lookup("xyz").pieces == []


@pytest.mark.parametrize("dropped", ["truncation", "version"])  # neither changes the tokenizer
def test_the_same_tokenizer_serialized_differently_is_accepted(tmp_path: Path, dropped: str) -> None:
    d = with_tokenizer(word_piece(), tmp_path, [1] * 8)
    path = DictionaryFiles(tmp_path).tokenizer
    definition = json.loads(path.read_text())
    del definition[dropped]
    path.write_text(json.dumps(definition, indent=2))
    assert d.lookup("bank").tokens == [(2, "bank", 1), (7, "Bank", 1)]


def test_exemplars_are_written_in_small_row_groups_with_a_footer_that_is_read(tmp_path: Path) -> None:
    make([1] * 300 + [64]).save(tmp_path)
    rows = [(token, 0, rank) for token in range(300) for rank in range(500)]
    write_exemplars(exemplars([*rows, *((300, sense, 0) for sense in range(64))]), tmp_path / "exemplars.parquet")
    assert pq.read_metadata(tmp_path / "exemplars.parquet").num_row_groups == 32
    read = SenseDictionary.load(tmp_path)
    assert [e.rank for e in read.exemplars(299)] == list(range(500))
    assert [e.sense for e in read.exemplars(300)] == list(range(64))


def test_exemplars_are_saved_and_renumbered_by_merge(tmp_path: Path) -> None:
    for name, sizes, rows in (("a", [1, 0, 2], [(0, 0, 0), (2, 1, 0), (2, 1, 1)]), ("b", [0, 0, 1], [(2, 0, 0)])):
        make(sizes).save(tmp_path / name)
        pq.write_table(exemplars(rows), tmp_path / name / "exemplars.parquet")
    a, b = SenseDictionary.load(tmp_path / "a"), SenseDictionary.load(tmp_path / "b")
    assert [(e.sense, e.rank, e.right) for e in a.exemplars(2)] == [(1, 0, " of 2.1.0"), (1, 1, " of 2.1.1")]
    assert a.exemplars(1) == []
    merged = a.merge(b)
    assert [(e.sense, e.right) for e in merged.exemplars(2)] == [(1, " of 2.1.0"), (1, " of 2.1.1"), (2, " of 2.0.0")]
    merged.save(tmp_path / "c")
    assert SenseDictionary.load(tmp_path / "c").exemplars(2) == merged.exemplars(2)
    SenseDictionary.load(tmp_path / "c").save(tmp_path / "d")
    assert SenseDictionary.load(tmp_path / "d").exemplars(0) == a.exemplars(0)
    make([1]).save(tmp_path / "d")  # has no exemplars: removes those of the older one
    assert SenseDictionary.load(tmp_path / "d").exemplars(0) == []


def test_the_texts_of_tokens_are_those_in_a_text(tmp_path: Path) -> None:
    d = with_tokenizer(word_piece(), tmp_path / "a", [1] * 9)
    assert d.token_texts == ["[UNK]", "[CLS]", "bank", "river", "##s", "un", "##ban", "Bank", ""]
    assert d.pieces("unbans") == [5, 6, 4]
    assert d.pieces("zzz") == []
    vocab = {"[UNK]": 0, "Ġbank": 1, "Ã©t": 2, "Ġ": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.ByteLevel()
    assert with_tokenizer(tokenizer, tmp_path / "b", [1] * 4).token_texts == ["[UNK]", "bank", "ét", "Ġ"]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("a", "b" * 1000)])
    with pytest.raises(DictionaryError, match=r"decoder that may make tokens 1e\+03 times longer"):
        _ = with_tokenizer(tokenizer, tmp_path / "c", [1] * 4).token_texts
