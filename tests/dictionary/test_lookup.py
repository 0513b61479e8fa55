"""Look-up of words with three kinds of tokenizers, and exemplars."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import exemplars, make, with_tokenizer, word_piece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from msense.dictionary import DictionaryFiles, SenseDictionary, write_dictionary


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


def test_find_in_a_word_piece_vocabulary(tmp_path: Path) -> None:
    d = with_tokenizer(word_piece(), tmp_path, [2, 0, 3, 0, 1, 1, 1, 4])
    assert d.lookup("bank").tokens == [(2, "bank", 3), (7, "Bank", 4)]
    assert "'bank' (id 2, 3 senses), 'Bank' (id 7, 4 senses)" in d.lookup(" bank ").explain()
    assert d.lookup("BANK").tokens == [(2, "bank", 3)]  # the tokenizer lowercases it
    assert d.lookup("river").tokens == [(3, "river", 0)]
    assert not d.lookup("river").found
    assert "has no senses" in d.lookup("river").explain()
    split = d.lookup("unbans")
    assert (split.tokens, split.pieces) == ([], ["un", "##ban", "##s"])
    assert "splits it into 3 tokens (un ##ban ##s)" in split.explain()
    for unknown in ("xyz", "", "  "):
        assert (d.lookup(unknown).tokens, d.lookup(unknown).pieces) == ([], [])
        assert "unknown to the tokenizer" in d.lookup(unknown).explain()
    assert d.lookup("[UNK]").tokens == [(0, "[UNK]", 2)]


def test_find_in_a_byte_level_vocabulary(tmp_path: Path) -> None:
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    d = with_tokenizer(tokenizer, tmp_path, [1] * size)
    assert [t.token for t in d.lookup("bank").tokens] == ["bank", "Ġbank", "Bank"]
    assert [t.token for t in d.lookup("Bank").tokens] == ["Bank", "bank", "Ġbank"]
    assert "Ã©" in [t.token for t in d.lookup("é").tokens]  # a byte-level vocabulary writes é as two characters
    assert d.lookup("riv").pieces == ["r", "i", "v"]


def test_find_in_a_sentence_piece_vocabulary(tmp_path: Path) -> None:
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


def test_exemplars_are_saved_and_renumbered_by_merge(tmp_path: Path) -> None:
    for name, rows in (("a", [(0, 0, 0), (2, 1, 0), (2, 1, 1)]), ("b", [(2, 0, 0)])):
        (tmp_path / name).mkdir()
        pq.write_table(exemplars(rows), tmp_path / name / "exemplars.parquet")
        d = make([1, 0, 2] if name == "a" else [0, 0, 1])
        write_dictionary(tmp_path / name, d.config, d.offsets, d.counts, d.rms_distance, d.token_counts, [d.centroids])
    a, b = SenseDictionary.load(tmp_path / "a"), SenseDictionary.load(tmp_path / "b")
    assert [(e.sense, e.rank, e.right) for e in a.exemplars(2)] == [(1, 0, " of 2.1.0"), (1, 1, " of 2.1.1")]
    assert a.exemplars(1) == []
    merged = a.merge(b)
    assert [(e.sense, e.right) for e in merged.exemplars(2)] == [(1, " of 2.1.0"), (1, " of 2.1.1"), (2, " of 2.0.0")]
    merged.save(tmp_path / "c")
    again = SenseDictionary.load(tmp_path / "c")
    assert again.exemplars(2) == merged.exemplars(2)
    again.save(tmp_path / "d")
    assert SenseDictionary.load(tmp_path / "d").exemplars(0) == a.exemplars(0)
    make([1]).save(tmp_path / "d")  # has no exemplars: removes those of the older one
    assert SenseDictionary.load(tmp_path / "d").exemplars(0) == []
