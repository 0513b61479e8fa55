"""Spans: sentences of many languages, and what is drawn from a passage."""

import pytest

from msense.corpus.spans import KINDS, sentences, spans_of

SENTENCES = {
    "English": ["It costs 3.50.", "Why?!", '"Yes!"', "he said (twice).", "J. Smith, e.g. this one, went to www.a.org."],
    "German": ["Die Straße ist lang.", "„Komm!“", "Er ging…"],
    "Spanish": ["¿Qué tal?", "¡Bien!"],
    "Chinese": ["他说：“你好。”", "然后走了！", "真的？！", "圆周率是3．14。", "对"],
    "Japanese": ["今日は晴れです。", "「行こう！」", "と言った｡"],
    "Hindi": ["यह है।", "वह था॥"],
    "Arabic": ["كيف حالك؟", "بخير۔"],
    "Armenian": ["Զեյթուն։", "Այո։"],
    "Amharic": ["ሰላም።", "እንዴት፧"],
    "Burmese": ["မြန်မာ။", "နိုင်ငံ။"],
    "Tibetan": ["བཀྲ་ཤིས།", "བདེ་ལེགས།"],
    "Khmer": ["ខ្មែរ។", "ភាសា។"],
    "Thai": ["สวัสดีครับ"],
}
WITHOUT_SPACES = ("Chinese", "Japanese", "Burmese", "Tibetan", "Khmer")


def cut(text: str) -> list[str]:
    return [text[start:stop] for start, stop in sentences(text)]


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences(language: str) -> None:
    wanted = SENTENCES[language]
    assert cut("".join(wanted) if language in WITHOUT_SPACES else " ".join(wanted)) == wanted
    assert cut("\r\n ".join(wanted)) == wanted


def test_line_breaks_end_sentences_and_blank_text_has_none() -> None:
    assert cut("one\ntwo\u2028three\x0bfour. \n\n five") == ["one", "two", "three", "four.", "five"]
    assert cut(" \n ") == cut("") == []
    assert len(sentences("." * 100_000 + "a" + ".”" * 100_000 + "a")) == 1  # in linear time


TEXT = "A title\nOne two three. Four five six! Seven eight nine? Ten eleven twelve. Seven eight nine? The end."


def spans(key: int = 1, opens: bool = True, **shares: float) -> list[tuple[str, str]]:
    return [(KINDS[kind], text) for kind, text in spans_of(TEXT, key, shares, opens_document=opens)]


def test_spans_are_parts_of_the_passage_each_once() -> None:
    found = spans(sentence=1, run=1, title=1)
    assert found[0] == ("title", "A title")
    own = [text for kind, text in found if kind == "sentence"]
    assert own == ["One two three.", "Four five six!", "Seven eight nine?", "Ten eleven twelve.", "The end."]
    runs = [text for kind, text in found if kind == "run"]
    assert all(text in TEXT and 2 <= len(cut(text)) <= 4 for text in runs)
    assert sum(map(len, map(cut, runs))) in (6, 7)
    assert len({text for _, text in found}) == len(found)
    assert ("sentence", "A title") in spans(opens=False, sentence=1, title=1)
    assert not list(spans_of("Only one sentence.", 1, {"sentence": 1, "run": 1, "title": 1}, opens_document=True))


def test_shares_are_drawn_by_key_and_kind() -> None:
    everything = [span for key in range(300) for span in spans(key, sentence=1)]
    half = [span for key in range(300) for span in spans(key, sentence=0.5)]
    assert 0.4 < len(half) / len(everything) < 0.6
    assert [s for key in range(9) for s in spans(key, sentence=0.5, run=1) if s[0] == "sentence"] == [
        s for key in range(9) for s in spans(key, sentence=0.5)
    ]
    assert len({tuple(spans(key, run=1)) for key in range(50)}) > 3
    assert spans() == []
