"""Documents with instructions of their own: one dictionary and one student for the texts of several tasks."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from documents import write_table
from executors import small_partitions
from faulty import Corpus, MakeTeacher
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from msense import SenseDictionary, SenseEncoder
from msense.corpus.spans import KINDS
from msense.errors import InputError
from msense.teacher.model import Teacher
from msense.training.label_dataset import LabelSet

pytestmark = pytest.mark.usefixtures("in_process")
TASKS = {"dog: ": "sentiment.jsonl", "the money deep of: ": "intents.parquet"}  # dog and money are in no text
SAME = "the money of "


def texts_of(seed: int, count: int = 30) -> list[str]:
    """Return texts of three to five sentences, some of them long enough for spans."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(["the", "bank", "river", "of", "is", "near", "full", "cat", "sat"], k=9)) + "."

    return [" ".join(sentence() for _ in range(draw.randint(3, 5))) for _ in range(count)]


def tasks_in(folder: Path, instructions: dict[str, str]) -> Path:
    """Write the texts of one task in every file, jsonl or parquet, given the names of files by instruction."""
    folder.mkdir()
    for seed, (instruction, name) in enumerate(instructions.items()):
        rows = [
            {"text": text, "instruction": instruction, "id": f"{seed}-{n}"} for n, text in enumerate(texts_of(seed))
        ]
        if name.endswith("jsonl"):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            write_table(folder / name, **{column: [row[column] for row in rows] for column in rows[0]})
    return folder


def corpus_in(folder: Path, make_teacher: MakeTeacher, *, include_prompt: bool) -> Corpus:
    """Return a corpus whose teacher pools by the mean, with or without the tokens of prompts."""
    corpus = Corpus(folder, make_teacher("bert", pooling="mean_tokens"))
    path = corpus.teacher / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"include_prompt": include_prompt}))
    corpus.settings |= {"max_occurrences": 200, "senses": 3, "dedup": False}
    return corpus


def vocabulary_of(corpus: Corpus) -> dict[str, int]:
    """Return the teacher's tokens."""
    return Tokenizer.from_file(str(corpus.teacher / "tokenizer.json")).get_vocab()


def passages_of(corpus: Corpus, name: str) -> pa.Table:
    """Return the passages of a build."""
    folder = corpus.folder / name / "passages"
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, make_teacher: MakeTeacher) -> Corpus:
    """A dictionary "dict" and a student "student" of two tasks, and of a query, for a teacher that leaves out prompts."""
    corpus = corpus_in(tmp_path_factory.mktemp("tasks"), make_teacher, include_prompt=False)
    texts = tasks_in(corpus.folder / "tasks", TASKS)
    (corpus.folder / "queries.txt").write_text("is the cat near the bank\n")
    with small_partitions():
        corpus.build("dict", corpus=(str(texts),), prompt_column="instruction")
        given = {"queries": (str(corpus.folder / "queries.txt"),), "held_out": 0.2, "epochs": 1}
        corpus.distill("student", student="static", **given)
    return corpus


def test_instructions_are_read_but_neither_sampled_labelled_nor_pooled(tasks: Corpus) -> None:
    labels = LabelSet.open(str(tasks.folder / "student"))
    batch = labels.read(np.arange(len(labels.lengths)))
    dictionary, vocabulary = SenseDictionary.load(tasks.folder / "dict"), vocabulary_of(tasks)
    assert [int(dictionary.token_counts[vocabulary[word]]) for word in ("dog", "money")] == [0, 0]
    starts = {  # [CLS] and an instruction
        (2, vocabulary["dog"], 1): 3,
        (2, *(vocabulary[word] for word in ("the", "money", "deep", "of")), 1): 6,
    }
    options = {"revision": None, "layer": -1, "dtype": "float32", "device": "cpu"}
    hidden = Teacher(str(tasks.teacher), **options).embed(batch.ids.numpy(), batch.mask.numpy())
    seen = set()
    assert batch.skip is not None
    for row in range(len(batch.ids)):
        ids, senses = batch.ids[row][batch.mask[row]].tolist(), batch.senses[row][batch.mask[row]].tolist()
        own = next((length for start, length in starts.items() if tuple(ids[: len(start)]) == start), 0)
        kind = KINDS[labels.kinds[row]]
        seen.add((kind, own))
        assert int(batch.skip[row]) == own
        assert set(senses[1:own]) <= {-1}
        assert all(sense >= 0 for token, sense in zip(ids[own:], senses[own:], strict=True) if token > 3)
        expected = hidden[row, own : len(ids)].mean(0)
        torch.testing.assert_close(batch.pooled[row], expected, atol=2e-3, rtol=2e-3)
    assert {pair for pair in seen if pair[0] != "title"} == {
        ("query", 0),
        *((kind, own) for kind in ("passage", "sentence", "run") for own in (3, 6)),
    }


def test_the_student_reads_an_instruction_and_a_text_as_its_passage(tasks: Corpus) -> None:
    encoder = SenseEncoder.from_pretrained(tasks.folder / "student")
    assert (encoder.config.prompt, encoder.config.skip, encoder.config.include_prompt) == ("", 0, False)
    rows = passages_of(tasks, "dict").to_pylist()
    texts = {f"{seed}-{n}": text for seed in range(len(TASKS)) for n, text in enumerate(texts_of(seed))}
    assert {row["prompt"] for row in rows} == set(TASKS)
    whole = [row for row in rows if row["text"] == texts[row["document_id"].rpartition("#")[2]]]
    assert len(whole) > len(TASKS)
    for row in whole:
        (ids,) = encoder._reader.ids([row["text"]], row["prompt"])
        assert ids.tolist() == row["input_ids"]
        assert encoder.config.skipped(encoder._reader.tokenizer, row["prompt"]) == row["prompt_length"]
    vectors = [encoder.encode("the cat sat", prompt=prompt) for prompt in ("", *TASKS)]
    assert all(np.isfinite(vector).all() and np.abs(vector).max() > 0 for vector in vectors)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_column_with_one_prompt_gives_what_the_prompt_gives(
    tmp_path: Path, make_teacher: MakeTeacher, include_prompt: bool
) -> None:
    corpus = corpus_in(tmp_path, make_teacher, include_prompt=include_prompt)
    texts = str(tasks_in(tmp_path / "tasks", {SAME: "a.jsonl"}))
    students, labels = {}, {}
    for name, given in {"prompt": {"prompt": SAME}, "column": {"prompt_column": "instruction"}}.items():
        corpus.build(name, corpus=(texts,), **given)
        corpus.distill(
            f"{name}-student", dictionary=str(tmp_path / name), student="static", held_out=0.2, epochs=1, soft_targets=2
        )
        students[name] = load_file(tmp_path / f"{name}-student" / "student" / "model.safetensors")
        labels[name] = LabelSet.open(str(tmp_path / f"{name}-student"))
    one, other = (corpus.files(name) for name in ("prompt", "column"))
    arrays = [name for name in one if name.endswith((".safetensors", ".parquet", "tokenizer.json"))]
    assert len(arrays) == 3
    assert [name for name in arrays if one[name] != other[name]] == []
    passages = [passages_of(corpus, name) for name in ("prompt", "column")]
    for column in ("key", "input_ids", "text", "gaps", "lengths"):
        assert passages[0].column(column).equals(passages[1].column(column)), column
    before = [
        passage.column("context").to_numpy() for passage in passages
    ]  # the second counts the prompt's tokens as well
    assert (before[1] - before[0]).tolist() == [len(SAME.split())] * len(before[0])
    assert set(passages[1].column_names) - set(passages[0].column_names) == {"prompt", "prompt_length"}
    batches = [own.read(np.arange(len(own.lengths))) for own in labels.values()]
    for name in ("ids", "mask", "senses", "pooled", "soft_senses", "soft_weights", "spans"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name
    assert (batches[0].skip, batches[1].skip is None) == (None, include_prompt)
    assert students["prompt"].keys() == students["column"].keys()
    for name, value in students["prompt"].items():
        np.testing.assert_allclose(value, students["column"][name], atol=1e-6)


@pytest.mark.parametrize("given", [{"prompt_column": "task"}, {}])
def test_another_text_is_labelled_with_its_own_instructions(tasks: Corpus, tmp_path: Path, given: dict) -> None:
    rows = [{"text": text, "task": "river is "} for text in texts_of(9, 6)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.label(str(tmp_path / "run"), corpus=(str(tmp_path / "other.jsonl"),), held_out=0, **given)
    labels = LabelSet.open(str(tmp_path / "run"))
    batch = labels.read(np.arange(len(labels.lengths)))
    vocabulary = vocabulary_of(tasks)
    start = torch.tensor([2, vocabulary["river"], vocabulary["is"]])
    assert bool((batch.ids[:, :3] == start).all()) == bool(given)
    assert (None if batch.skip is None else batch.skip.unique().tolist()) == ([3] if given else None)


def test_another_column_is_another_run_and_a_missing_one_is_named(tasks: Corpus, tmp_path: Path) -> None:
    texts = str(tasks.folder / "tasks")
    assert tasks.build("dict", corpus=(texts,), prompt_column="instruction")["dictionary"].endswith("dict/dictionary")
    with pytest.raises(InputError, match=r"config\.prompt_column: 'instruction' before, None now"):
        tasks.build("dict", corpus=(texts,))
    with pytest.raises(
        InputError, match=r"no column 'task'; available: .*'instruction'.*; choose one with --prompt-column"
    ):
        tasks.build(str(tmp_path / "other"), corpus=(texts,), prompt_column="task")
