"""Passages: cut at word ends, with keys that depend on the document only (tests/pipelines/test_properties.py has more)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from msense.corpus import cut_splits, list_files
from msense.corpus.chunking import cut_points, encode_texts, passage_keys, write_passages
from msense.corpus.passages import Passages, PassageSpec, read_block, read_texts
from msense.errors import InputError
from msense.tokenizer import fingerprint, special_tokens_around


def letters_tokenizer() -> Tokenizer:
    """Return a tokenizer of single letters, "ab c" as a ##b c, which makes a cut inside a word visible."""
    alphabet = "abcdefgh.,"
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, **{c: 3 + i for i, c in enumerate(alphabet)}}
    vocabulary |= {f"##{c}": 40 + i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


TOKENIZER = letters_tokenizer()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(alphabet="abcdefgh", min_size=1, max_size=4), min_size=1, max_size=30),
    st.integers(4, 10),
    st.integers(0, 3),
)
def test_no_passage_or_context_starts_inside_a_word(words: list[str], length: int, stride: int) -> None:
    text = " ".join(words)
    encoding = TOKENIZER.encode(text, add_special_tokens=False)
    for context, begin, _ in cut_points(encoding.offsets, text, length, stride):
        for opening in (context, begin):
            assert opening == 0 or text[encoding.offsets[opening][0] - 1] == " "


@pytest.mark.parametrize(
    ("text", "length", "cuts"),
    [
        ("abcdefgh", 3, [(0, 0, 3), (3, 3, 6), (6, 6, 8)]),  # a word longer than a passage
        ("ab.cd ef", 6, [(0, 0, 5), (5, 5, 7)]),
        ("ab.cdef", 5, [(0, 0, 3), (3, 3, 7)]),
    ],
)
def test_a_cut_prefers_white_space_then_punctuation_then_characters(text: str, length: int, cuts: list) -> None:
    assert cut_points(TOKENIZER.encode(text, add_special_tokens=False).offsets, text, length, 0) == cuts


def test_byte_tokens_of_one_character_stay_together() -> None:
    tokenizer = Tokenizer(
        models.BPE({chr(i): n for n, i in enumerate([*range(33, 127), *range(161, 173), *range(174, 324)])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "日本語日本語"  # three byte tokens per character
    cuts = cut_points(tokenizer.encode(text, add_special_tokens=False).offsets, text, 4, 0)
    assert [end - begin for _, begin, end in cuts] == [3] * 6


def test_keys_are_uniform_and_depend_on_document_and_seed_only() -> None:
    keys = np.concatenate([passage_keys(f"doc{i}", 5, seed=7) for i in range(4000)])
    assert (passage_keys("doc3", 5, seed=7) == keys[15:20]).all()
    assert (passage_keys("doc3", 2, seed=7) == keys[15:17]).all()
    assert not np.isin(passage_keys("doc3", 5, seed=8), keys).any()
    assert len(np.unique(keys)) == len(keys)
    shares = np.histogram(keys.astype(np.float64) / 2**64, bins=10, range=(0, 1))[0] / len(keys)
    assert np.abs(shares - 0.1).max() < 0.012  # five standard deviations


def test_special_tokens_and_fingerprint_of_a_tokenizer() -> None:
    assert special_tokens_around(TOKENIZER) == ((1,), (2,))
    other = letters_tokenizer()
    before = fingerprint(other)
    other.enable_truncation(3)
    other.enable_padding()
    assert fingerprint(other) == before == fingerprint(TOKENIZER)
    other.normalizer = normalizers.NFC()
    assert fingerprint(other) != before


def write(tmp_path: Path, text: str, spec: PassageSpec, name: str = "a.txt", **options: bool) -> tuple[Path, dict]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    (split,) = cut_splits(list_files([str(tmp_path / name)]))
    target = tmp_path / f"{name}.parquet"
    return target, write_passages(split, spec, TOKENIZER, target, **options)


def test_the_passages_file_contains_the_documents_in_order(tmp_path: Path) -> None:
    spec = PassageSpec(max_length=6, prefix=(1,), suffix=(2,), stride=1)
    target, stats = write(tmp_path, "ab cd ef\n\nc\n", spec)
    table = pq.read_table(target)
    assert table.column("document_id").to_pylist() == ["a.txt:0", "a.txt:0", "a.txt:2"]
    assert table.column("index").to_pylist() == [0, 1, 0]
    assert table.column("input_ids").to_pylist() == [[1, 3, 41, 5, 43, 2], [1, 7, 45, 2], [1, 5, 2]]
    assert table.column("context").to_pylist() == [0, 0, 0]  # one token of context would start inside "cd"
    assert stats["documents"] == 2
    assert stats["bad"] == {"empty": 1}
    assert stats["blocks"] == [13]
    assert table.column("key").to_numpy()[1] == passage_keys("a.txt:0", 2, 0)[1]
    texts, index, _ = read_texts(str(target), 0)
    assert (texts, index.tolist()) == (["ab cd", "ef", "c"], [0, 1, 0])


def test_the_text_of_a_passage_is_that_of_its_body(tmp_path: Path) -> None:
    """Not of prompt and context; encoded alone it is read like a text of its own."""
    spec = PassageSpec(max_length=8, prefix=(1,), suffix=(2,), prompt=(9,), prompt_text="g ", stride=2)
    target, _ = write(tmp_path, "  ab cd ef  gh \n", spec)
    texts, *_ = read_texts(str(target), 0)
    assert texts == ["ab cd", "ef", "gh"]
    alone = encode_texts(["ef", "", "ab cd ef gh"], spec, TOKENIZER)
    assert [alone.row(number).tolist() for number in range(3)] == [[1, 9, 7, 45, 2], [1, 2], [1, 9, 3, 41, 5, 43, 2]]
    assert alone.context.tolist() == [0, -1, 0]
    assert alone.eligible(spec).tolist() == [bool(x) for x in (1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1)]
    assert encode_texts([], spec, TOKENIZER).offsets.tolist() == [0]
    assert alone.places(np.array([2, 0])).tolist() == [7, 8, 9, 10, 11, 12, 13, 0, 1, 2, 3, 4]


def test_context_prompt_and_excluded_tokens_are_never_eligible(tmp_path: Path) -> None:
    spec = PassageSpec(max_length=8, prefix=(1,), suffix=(2,), prompt=(9,), prompt_text="g ", stride=2, excluded=(4,))
    target, _ = write(tmp_path, "ab cd ef gh\n", spec)
    passages = read_block(str(target), 0)
    assert passages.ids.tolist() == [1, 9, 3, 41, 5, 43, 2, 1, 9, 5, 43, 7, 45, 2, 1, 9, 7, 45, 9, 47, 2]
    assert passages.context.tolist() == [0, 2, 2]
    expected = [1, 0, 1, 1, 1, 1, 1, *[1, 0, 0, 0, 1, 1, 1] * 2]
    assert passages.eligible(spec).tolist() == [bool(x) for x in expected]
    excluded = replace(spec, excluded=(1, 2))
    assert not passages.eligible(excluded)[np.isin(passages.ids, [1, 2])].any()
    frame = replace(spec, skip_frame=True)
    assert not passages.eligible(frame)[[0, 6, 7, 13, 14, 20]].any()
    assert passages.eligible(frame).sum() == sum(expected) - 6


def test_every_document_has_its_own_prompt(tmp_path: Path) -> None:
    spec = PassageSpec(
        max_length=8, prefix=(1,), suffix=(2,), prompt=(9,), prompt_text="g ", prompt_column="task", stride=1
    )
    rows = [
        {"text": "ab cd ef", "task": "h h "},
        {"text": "ab", "task": ""},
        {"text": "cd"},
        {"text": "ef", "task": "a b c d e f"},
        {"text": "ef", "task": "a b c d e"},
    ]
    target, stats = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), spec, "a.jsonl")
    assert stats["bad"] == {"long prompt": 2}
    assert [row["id"] for row in stats["listed"]] == ["a.jsonl:3", "a.jsonl:4"]
    assert (
        "5 tokens of prompt leave no room for text and a stride of 1 in passages of 8" in stats["listed"][1]["detail"]
    )
    table = pq.read_table(target)
    assert table.column("prompt").to_pylist() == ["h h ", "h h ", "", "g "]
    assert table.column("text").to_pylist() == ["ab cd", "ef", "ab", "cd"]
    block = read_block(str(target), 0)
    assert block.prompts is not None
    assert block.prompts.tolist() == [4, 4, 0, 3]  # with [CLS] and [SEP], no special tokens here
    assert [block.row(n).tolist() for n in range(4)] == [
        [1, 10, 10, 3, 41, 5, 43, 2],
        [1, 10, 10, 7, 45, 2],
        [1, 3, 41, 2],
        [1, 9, 5, 43, 2],
    ]
    expected = [[1, 0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1, 1]]
    assert block.eligible(spec).tolist() == [bool(flag) for row in expected for flag in row]
    assert read_texts(str(target), 0).prompts == ["h h ", "h h ", "", "g "]
    again = encode_texts(["ab cd", "ab", "x"], spec, TOKENIZER, ["h h ", "", "h h "])
    assert [again.row(n).tolist() for n in range(3)] == [
        block.row(0).tolist(),
        block.row(2).tolist(),
        [1, 10, 10, 0, 2],
    ]
    assert again.eligible(spec)[:12].tolist() == [bool(flag) for row in (expected[0], expected[2]) for flag in row]
    both = Passages.concatenate([block.without(np.array([1])), again])
    assert both.prompts is not None
    assert both.prompts.tolist() == [4, 0, 3, 4, 0, 4]
    nothing = encode_texts([], spec, TOKENIZER, []).prompts
    assert nothing is not None
    assert len(nothing) == 0


def test_files_have_prompts_only_with_a_column_of_them(tmp_path: Path) -> None:
    spec = PassageSpec(max_length=9, prompt=(9,), prompt_text="g ")
    target, _ = write(tmp_path, "ab\n", spec)
    assert pq.read_schema(target).names[-3:] == ["text", "gaps", "lengths"]
    assert (read_block(str(target), 0).prompts, read_texts(str(target), 0).prompts) == (None, None)
    target, _ = write(tmp_path, "ab\n", replace(spec, prompt_column="task"), "b.txt")  # which a text file does not have
    assert pq.read_table(target).column("prompt").to_pylist() == ["g "]


def test_dedup_gives_equal_passages_equal_keys(tmp_path: Path) -> None:
    target, _ = write(tmp_path, "ab cd\nef\nab cd\n", PassageSpec(max_length=20, dedup=True))
    keys = read_block(str(target), 0).keys
    assert keys[0] == keys[2] != keys[1]


def test_bad_documents_on_request_and_specs_without_room_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bad document a.txt:1: empty.*--on-bad-document skip"):
        write(tmp_path, "ab\n \n", PassageSpec(max_length=9), fail_on_bad=True)
    with pytest.raises(InputError, match="max_length 4 leaves no room"):
        PassageSpec(max_length=4, prefix=(1, 2), suffix=(3,), prompt=(4,))
    with pytest.raises(InputError, match="stride 4 must be smaller than the 4 text tokens"):
        PassageSpec(max_length=4, stride=4)


def test_concatenate_and_without() -> None:
    a = Passages(
        np.array([5, 6], np.uint64), np.array([0, 1], np.int32), np.array([1, 2, 3], np.int32), np.array([0, 1, 3])
    )
    both = Passages.concatenate([a, a])
    assert both.offsets.tolist() == [0, 1, 3, 4, 6]
    left = both.without(np.array([1]))
    assert left.ids.tolist() == [1, 1, 2, 3]
    assert left.offsets.tolist() == [0, 1, 2, 4]
    assert left.keys.tolist() == [5, 5, 6]
