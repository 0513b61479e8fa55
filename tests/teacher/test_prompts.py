"""Prompts, frames and texts become the same tokens as in the model's own library, for every family of tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizer_families import FAMILIES, PROMPTS, texts
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from msense.config.build import BuildConfig
from msense.corpus import WHOLE, InputSplit
from msense.corpus.chunking import write_passages
from msense.corpus.passages import read_block
from msense.stages.passages import passage_spec
from msense.teacher.spec import TeacherInfo, load_teacher_info
from msense.tokenizer import prompt_length, special_tokens_around

PROMPTED = ["query: ", "Ein Satz über", " ", "文書: "]
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>"}


def teacher(folder: Path, family: str) -> Path:
    """Write a folder of a tokenizer and a tiny model."""
    own = PreTrainedTokenizerFast(tokenizer_object=FAMILIES[family](), model_max_length=512, **NAMES)
    own.save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(own) + 3, **sizes)).save_pretrained(folder)
    return folder


def passages(
    folder: Path, prompt: str, rows: list[str], own: list[str] | None = None, **options: object
) -> tuple[list[list[int]], TeacherInfo, Path]:
    """Return the token ids of the passages of each text, one row per text, with a prompt for all or their `own`."""
    config = BuildConfig(prompt=prompt, **options)
    info, tokenizer = load_teacher_info(str(folder), config)
    prompts = [{}] * len(rows) if own is None else [{"task": prompt} for prompt in own]
    records = [{"text": text, **prompt} for text, prompt in zip(rows, prompts, strict=True)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    split = InputSplit(str(folder / "texts.jsonl"), "t", "jsonl", 0, WHOLE, 0)
    write_passages(split, passage_spec(info, config), tokenizer, folder / "p.parquet")
    found: list[list[int]] = [[] for _ in rows]
    for row in pq.read_table(folder / "p.parquet").to_pylist():
        found[int(row["document_id"].rpartition(":")[2])] += row["input_ids"]
    return found, info, folder / "p.parquet"


def different(folder: Path, count: int) -> int:
    """Return how many of `count` texts with each prompt have other tokens than in the tokenizer's own library.

    Compared are passages, of which labels are made, and what students and evaluation read.
    """
    library = AutoTokenizer.from_pretrained(folder)
    rows = texts(count)
    wrong = 0
    for prompt in ["", *PROMPTS]:
        own, _, _ = passages(folder, prompt, rows)
        expected = library([prompt + text for text in rows])["input_ids"]
        blank = [not text.strip() for text in rows]  # not documents
        wrong += sum(a != b for a, b, skipped in zip(own, expected, blank, strict=True) if not skipped)
        read = load_teacher_info(str(folder), BuildConfig(prompt=prompt))[1].encode_batch(
            [prompt + row for row in rows]
        )
        wrong += sum(encoding.ids != ids for encoding, ids in zip(read, expected, strict=True))
    return wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_text_are_tokenized_as_one_string(tmp_path: Path, family: str) -> None:
    assert different(teacher(tmp_path, family), 20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_texts_are_tokenized_as_one_string(tmp_path: Path, family: str) -> None:
    assert different(teacher(tmp_path, family), 200) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_documents_are_read_as_that_of_all(tmp_path: Path, family: str) -> None:
    folder, rows = teacher(tmp_path, family), [text for text in texts(12) if text.strip()]
    prompts = [["", *PROMPTED][number % (len(PROMPTED) + 1)] for number in range(len(rows))]
    found, info, path = passages(folder, "q", rows, prompts, prompt_column="task")
    block, spec = read_block(str(path), 0), passage_spec(info, BuildConfig(prompt_column="task"))
    assert block.prompts is not None
    for number, (text, prompt) in enumerate(zip(rows, prompts, strict=True)):
        (own,), alone, file = passages(folder, prompt, [text])
        assert found[number] == own
        expected = read_block(str(file), 0).eligible(passage_spec(alone, BuildConfig(prompt=prompt)))
        assert block.eligible(spec)[block.offsets[number] : block.offsets[number + 1]].tolist() == expected.tolist()
        tokenizer = load_teacher_info(str(folder), BuildConfig())[1]
        assert int(block.prompts[number]) == prompt_length(tokenizer, prompt, info.max_length)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_is_read_for_any_tokenizer(family: str) -> None:
    tokenizer = FAMILIES[family]()
    before, after = special_tokens_around(tokenizer)
    for text in texts(20):
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).ids == [*before, *bare, *after]


@pytest.mark.parametrize("family", ["BERT uncased", "Llama 3", "XLM-R", "Gemma"])
@pytest.mark.parametrize("prompt", ["query: ", "Ein Satz über"])
def test_every_passage_of_a_long_text_has_the_prompt_which_is_never_eligible(
    tmp_path: Path, family: str, prompt: str
) -> None:
    folder = teacher(tmp_path, family)
    (text,) = [" ".join(texts(30)).replace("\n", " ").strip()]
    _, info, path = passages(folder, prompt, [text], max_length=40, stride=5)
    config = BuildConfig(prompt=prompt, max_length=40, stride=5)
    spec = passage_spec(info, config)
    block = read_block(str(path), 0)
    assert len(block.keys) > 3
    assert block.lengths.max() <= 40
    tokenizer = load_teacher_info(str(folder), config)[1]
    encoding = tokenizer.encode(prompt + text, add_special_tokens=False)
    lead = sum(end <= len(prompt) for _, end in encoding.offsets[: len(info.prompt_ids)])
    start = len(info.prefix)
    for number in range(len(block.keys)):
        assert block.row(number)[start : start + lead].tolist() == encoding.ids[:lead]
    eligible = block.eligible(spec)
    assert not eligible[block.positions() < start + lead][
        block.positions()[block.positions() < start + lead] >= start
    ].any()
    own = block.ids[eligible & (block.positions() >= start) & ~np.isin(block.ids, [*info.prefix, *info.suffix])]
    assert own.tolist() == [i for i in encoding.ids[lead:] if i not in (*info.prefix, *info.suffix)]


def test_the_frame_of_a_decoder_is_never_eligible(tmp_path: Path, make_teacher: Callable[..., Path]) -> None:
    folder = make_teacher("llama")
    info, _ = load_teacher_info(str(folder), BuildConfig(special_tokens="include"))
    assert info.decoder
    assert passage_spec(info, BuildConfig()).skip_frame
