"""The views of a dictionary as plain data, against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import exemplars, make, with_tokenizer, word_piece

from msense.dictionary import Arrays, DictionaryFiles, SenseDictionary
from msense.dictionary.contexts import write_exemplars
from msense.errors import InputError
from msense.explorer.comparison import differences
from msense.explorer.overview import Bar, TokenStatistics
from msense.explorer.search import TokenSearch
from msense.explorer.sentence import LEVELS, sentence_spans
from msense.explorer.word import neighbour_views, token_view, word_page

SIZES = [0, 0, 3, 2, 1, 1, 1, 2]  # [UNK] [CLS] bank river ##s un ##ban Bank


@pytest.fixture
def dictionary(tmp_path: Path) -> SenseDictionary:
    with_tokenizer(word_piece(), tmp_path / "d", SIZES)
    rows = [(2, sense, rank) for sense in range(3) for rank in range(4)] + [(3, 1, 0)]
    write_exemplars(exemplars(rows), DictionaryFiles(tmp_path / "d").exemplars)
    return SenseDictionary.load(tmp_path / "d")


def with_arrays(d: SenseDictionary, centroids: list[list[float]], **arrays: object) -> SenseDictionary:
    own = Arrays(d.offsets, d.counts, d.rms_distance, d.token_counts)._replace(**arrays)
    return SenseDictionary(d.config, own, (torch.tensor(centroids),))


def test_a_word_page_has_senses_by_size_with_examples(dictionary: SenseDictionary) -> None:
    page = word_page(dictionary, "bank", level=0, examples=2)
    assert [token.text for token in page.tokens] == ["bank", "Bank"]
    assert (page.in_parts, page.explanation) == (False, "")
    bank = page.tokens[0]
    own = dictionary.senses(2)
    assert [sense.count for sense in bank.senses] == sorted(own.counts.tolist(), reverse=True)
    assert sum(sense.share for sense in bank.senses) == pytest.approx(1)
    for sense in bank.senses:
        assert sense.count == own.counts[sense.sense]
        assert sense.rms_distance == own.rms_distance[sense.sense]
        assert [(e.sense, e.rank) for e in sense.examples] == [(sense.sense, 0), (sense.sense, 1)]
        assert 0 <= min(sense.x, sense.y) <= max(sense.x, sense.y) <= 1
    assert bank.occurrences == dictionary.token_counts[2]


def test_words_of_several_tokens_and_unknown_ones(dictionary: SenseDictionary) -> None:
    page = word_page(dictionary, "unban")
    assert page.in_parts
    assert [token.token for token in page.tokens] == [5, 6]
    page = word_page(dictionary, "<script>")
    assert page.tokens == ()
    assert "'<script>' is unknown" in page.explanation
    with pytest.raises(InputError, match=r"level is 1\.5"):
        token_view(dictionary, 2, level=1.5)
    with pytest.raises(InputError, match="token 8 is not in the vocabulary"):
        token_view(dictionary, 8)


def test_groups_follow_the_level_and_the_map_keeps_distances() -> None:
    d = with_arrays(make([5], dim=2), [[0, 0], [9, 9], [0, 1], [9, 10], [50, 50]], counts=np.array([5, 4, 3, 2, 1]))
    groups = {level: [s.group for s in token_view(d, 0, level=level).senses] for level in (0, 0.1, 0.5, 1)}
    assert groups == {0: [0, 1, 2, 3, 4], 0.1: [0, 1, 0, 1, 2], 0.5: [0, 0, 0, 0, 1], 1: [0] * 5}
    folded = token_view(d, 0, level=0.1).groups
    assert [[sense.sense for sense in group] for group in folded] == [[0, 2], [1, 3], [4]]
    places = np.array([(s.x, s.y) for s in token_view(d, 0).senses])
    rows = d.senses(0).centroids.numpy()
    shown, true = (np.linalg.norm(x[:, None] - x, axis=2) for x in (places, rows))
    np.testing.assert_allclose(shown / shown.max(), true / true.max(), atol=1e-6)
    (alone,) = token_view(make([1]), 0).senses
    assert (alone.x, alone.y, alone.group) == (0.5, 0.5, 0)
    same = token_view(with_arrays(make([3], dim=2), [[1, 1]] * 3), 0, level=0.5)
    assert all((s.x, s.y) == (0.5, 0.5) for s in same.senses)
    assert token_view(make([1, 0]), 1).senses == ()


def test_neighbours_have_names(dictionary: SenseDictionary) -> None:
    every = dictionary.neighbours(7, 0, top=20)
    near = neighbour_views(dictionary, 7, 0, top=20)
    assert [n.text for n in near] == list(dict.fromkeys(dictionary.token_texts[n.token] for n in every))
    assert {n.token for n in near} == {2, 3, 4, 5, 6}  # each once, by its nearest sense
    assert neighbour_views(dictionary, 7, 0, top=2) == near[:2]


def test_statistics_are_those_of_plain_loops() -> None:
    d = make([2, 0, 5, 1, 9], seed=3)
    statistics = TokenStatistics(d)
    for token in range(5):
        own = d.senses(token)
        if not len(own.counts):
            assert statistics.ambiguity[token] == 0
            continue
        share = own.counts / own.counts.sum()
        assert statistics.ambiguity[token] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
        assert statistics.distortion[token] == pytest.approx((share * own.rms_distance.astype(float) ** 2).sum())
    overview = statistics.overview()
    assert (overview.tokens, overview.senses, overview.occurrences) == (4, 17, d.token_counts.sum())
    assert overview.histogram == (Bar(1, 1, 1), Bar(2, 2, 1), Bar(3, 4, 0), Bar(5, 8, 1), Bar(9, 16, 1))
    for by in ("ambiguity", "count", "distortion"):
        rows = statistics.ranked(by)
        assert sorted(row.token for row in rows) == [0, 2, 3, 4]
        assert statistics.ranked(by, limit=2, first=1) == rows[1:3]
        assert statistics.ranked(by, limit=2, first=9) == []
    assert [row.occurrences for row in statistics.ranked("count")] == sorted(d.token_counts[[0, 2, 3, 4]])[::-1]
    with pytest.raises(InputError, match="no ranking 'size'"):
        statistics.ranked("size")


def test_rare_tokens_are_not_called_ambiguous() -> None:
    d = with_arrays(make([2, 2], dim=1), [[0.0]] * 4, counts=np.array([1, 1, 90, 10]))
    assert [row.token for row in TokenStatistics(d).ranked("ambiguity")] == [1, 0]


def test_search_finds_itself_then_prefixes_then_substrings(dictionary: SenseDictionary) -> None:
    search = TokenSearch(dictionary)
    assert {hit.tokens for hit in search.find("BANK")[:2]} == {(2,), (7,)}
    assert [hit.text for hit in search.find("ri")] == ["river"]
    found = [hit.text for hit in search.find("ban")]
    assert {"bank", "Bank"} == set(found[:2])
    assert found[2:] == ["##ban"]
    (word, *_) = search.find("unban")
    assert (word.text, word.tokens, word.senses) == ("unban", (5, 6), 2)
    assert word.occurrences == dictionary.token_counts[[5, 6]].min()
    assert len(search.find("n", limit=2)) == 2
    for nothing in ("", "  ", "zzz", "\n", "a\nb", "<script>", "🙂", "x" * 10_000):
        assert search.find(nothing) == []
    assert search.find("[CLS]") == []  # it has no senses


def test_the_word_used_most_differently_comes_first() -> None:
    d = make([2, 2, 2, 0], dim=2)
    counts = {"token_counts": np.array([50, 50, 50, 50]), "rms_distance": np.full(6, 0.5, np.float32)}
    a = with_arrays(d, [[0, 0], [4, 4], [0, 0], [4, 4], [0, 0], [4, 4]], **counts)
    b = with_arrays(d, [[0, 0], [4, 4], [1, 0], [4, 4], [9, 9], [4, 4]], **counts)
    found = differences(a, b)
    assert [row.token for row in found] == [2, 1, 0]
    assert found[-1].distance == pytest.approx(1)
    assert [row.distance for row in differences(b, a)] == pytest.approx([row.distance for row in found])
    assert found[0].occurrences == (50, 50)
    assert found[0].senses == (2, 2)
    assert [row.token for row in differences(a, b, most=1)] == [0]
    assert differences(a, with_arrays(d, [[0, 0]] * 6, token_counts=np.full(4, 19))) == []
    with pytest.raises(InputError, match="dim is 2 in one dictionary and 3 in the other"):
        differences(a, make([2, 2, 2, 0]))


@pytest.mark.parametrize("text", ["The Bank,\nnear <b> zzz dogs!", "", " ", "bank " * 60])
def test_the_spans_of_a_sentence_are_its_text(shipped_student: tuple, text: str) -> None:
    encoder = shipped_student[0]
    spans = sentence_spans(encoder, text, examples=1)
    assert "".join(span.text for span in spans) == text
    assert [span.token for span in spans if span.token] == encoder.tokens(text)
    for span in spans:
        assert (span.level > 0) == bool(span.choices) == bool(span.token and span.token.sense >= 0)
        assert span.level <= LEVELS
        if span.token and span.choices:
            shown = [own for i, own in enumerate(span.token.likely) if i < 3 or own[1] >= 0.01]
            assert [(c.sense, c.probability) for c in span.choices] == shown
            assert [e.sense for e in span.choices[0].examples] == [span.token.sense]
