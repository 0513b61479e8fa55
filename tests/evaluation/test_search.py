"""Lexical and exact vector search, their fusion, and the words of many languages."""

import numpy as np
import pytest

from msense.errors import InputError, MsenseError
from msense.evaluation.search import Bm25, Hits, fuse, nearest, ordered, unit
from msense.text import words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't PANIC: v2.0, snake_case!", ["don", "t", "panic", "v2", "0", "snake", "case"]),
        ("Die Straße im Donau\u00addelta", ["die", "strasse", "im", "donaudelta"]),
        ("Café CAFE\u0301 ﬁn", ["café", "café", "fin"]),
        ("我爱北京。GPU版", ["我爱", "爱北", "北京", "gpu", "版"]),
        ("東京タワーへ行く", ["東京", "京タ", "タワ", "ワー", "ーへ", "へ行", "行く"]),
        ("ﾄｳｷｮｳ", ["トウ", "ウキ", "キョ", "ョウ"]),
        ("ง่ายนิด ๒๐", ["ง่า", "าย", "ยนิ", "นิด", "๒๐"]),
        ("ភាសាខ្មែរ", ["ភាសា", "សាខ្មែ", "ខ្មែរ"]),
        ("اللغة العربيّة", ["اللغة", "العربيّة"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("Pizza 🍕🍕 🇩🇪 ❤️", ["pizza", "🍕", "🍕", "🇩🇪", "❤"]),
        ("水 …", ["水"]),
        (" \u200b—", []),
    ],
)
def test_words_of_many_languages(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


def test_ascii_text_is_split_as_any_other() -> None:
    text = "".join(map(chr, range(128))) + " It's 3.5 % of A_b"
    assert words(text + " é")[:-1] == words(text)


def test_vectors_are_scaled_and_must_be_finite() -> None:
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    with pytest.raises(MsenseError, match="NaN or infinite"):
        unit(np.array([[1.0, np.nan]]))


@pytest.mark.parametrize(("depth", "size"), [(5, 7), (5, 1000), (40, 13), (1000, 50)])
def test_search_in_blocks_equals_sorting_all_cosines(depth: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msense.evaluation.search._QUERIES", 4)
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(9, 6)), rng.normal(size=(200, 6)) * rng.uniform(0.1, 9, (200, 1))
    found = nearest(queries, (documents[start : start + size] for start in range(0, 200, size)), depth)
    cosines = unit(queries) @ unit(documents).T
    for hits, row in zip(found, cosines, strict=True):
        assert hits.documents.tolist() == np.argsort(-row)[:depth].tolist()
        np.testing.assert_allclose(hits.scores, row[hits.documents], rtol=1e-5)


def test_equal_scores_are_ordered_by_descending_id() -> None:
    hits = Hits(np.array([0, 2, 1, 3]), np.array([0.5, 0.5, 0.9, 0.5], np.float32))
    (own,) = ordered([hits], np.array(["10", "a", "9", "2"], object), 3)
    assert own.documents.tolist() == [1, 2, 3]


def test_bm25_has_the_scores_of_its_formula() -> None:
    documents = ["The river bank", "a bank, a bank and money", "cats", ""]
    first, unknown, empty = Bm25().search(documents, ["BANK money", "zebra", ""])
    lengths, mean = np.array([3, 6]), 10 / 4

    def gain(counts: np.ndarray, documents_with_word: int) -> np.ndarray:
        idf = np.log(1 + (4 - documents_with_word + 0.5) / (documents_with_word + 0.5))
        return idf * counts / (counts + 1.2 * (1 - 0.75 + 0.75 * lengths / mean))

    wanted = gain(np.array([1, 2]), 2) + gain(np.array([0, 1]), 1)
    assert first.documents.tolist() == [1, 0]
    np.testing.assert_allclose(first.scores, wanted[[1, 0]], rtol=1e-5)
    assert len(unknown.documents) == len(empty.documents) == 0  # a document without a common word is no hit
    assert [len(hits.documents) for hits in Bm25().search(["", "…"], ["a"])] == [0]
    assert Bm25().search(["東京都の人口", "京都の寺"], ["京都"], 1)[0].documents.tolist() == [1]


def test_words_are_stemmed_on_request() -> None:
    documents, queries = ["running cats", "a dog"], ["the cat runs"]
    assert [len(Bm25(language).search(documents, queries)[0].documents) for language in (None, "english")] == [0, 1]
    with pytest.raises(InputError, match=r"bm25,klingon: no such stemmer; use one of .*english"):
        Bm25("klingon")


def test_fusion_adds_normalised_scores() -> None:
    a = Hits(np.array([4, 1, 7]), np.array([9.0, 6.0, 5.0], np.float32))  # 1, 0.25, 0
    b = Hits(np.array([1, 3]), np.array([0.2, 0.1], np.float32))  # 1, 0
    none = Hits(np.empty(0, np.int64), np.empty(0, np.float32))
    both, single, alone, nothing = fuse([a, a, none, none], [b, Hits(np.array([7]), b.scores[:1]), b, none])
    assert dict(zip(both.documents.tolist(), both.scores.tolist(), strict=True)) == {1: 1.25, 3: 0, 4: 1, 7: 0}
    assert dict(zip(single.documents.tolist(), single.scores.tolist(), strict=True)) == {1: 0.25, 4: 1, 7: 1}
    assert (alone.documents.tolist(), alone.scores.tolist(), len(nothing.documents)) == ([1, 3], [1, 0], 0)
