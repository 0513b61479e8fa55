"""Merged teachers are LLM2Vec's: its tokens, embeddings and vectors, as it computed them itself (see fixtures/llm2vec)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llm2vec_folders import EXPECTED, NAMES, PAIRS, write_folders, write_pooling
from students import dictionary_of

from msense import SenseDictionary, SenseEncoder
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.config.merge import MergeConfig
from msense.dictionary.format import write_tokenizer
from msense.evaluation.models import TeacherModel
from msense.evaluation.spec import Spec
from msense.pipelines.build import build_dictionary
from msense.pipelines.distill import distill_student
from msense.pipelines.merge import merge_teacher
from msense.student import StudentSettings, init_student, save_pretrained
from msense.teacher.batching import pad_batch
from msense.teacher.model import Teacher
from msense.teacher.pooling import load_head
from msense.teacher.spec import TeacherOptions, load_teacher_info
from msense.training.label_dataset import LabelSet

FOUND: dict[str, Any] = json.loads(EXPECTED.read_text(encoding="utf-8"))
INSTRUCTIONS = tuple(dict.fromkeys(instruction for instruction, _ in PAIRS))
Merge = Callable[..., str]


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """Return the merged teacher of a kind and a pooling of LLM2Vec."""
    made: dict[tuple[str, str], str] = {}

    def merged(kind: str, mode: str = "mean") -> str:
        if (kind, mode) not in made:
            folder = tmp_path_factory.mktemp("llm2vec")
            _, *adapters = write_folders(folder, kind)
            write_pooling(adapters[1], mode)
            given = {"adapter": tuple(map(str, adapters)), "llm2vec": kind, "output": str(folder / "merged")}
            made[kind, mode] = merge_teacher(MergeConfig(**given))["output"]
        return made[kind, mode]

    return merged


def load(folder: str) -> Teacher:
    return Teacher(folder, revision=None, layer=-1, dtype="float32", device="cpu")


def prompt_of(instruction: str) -> str:
    """Return an instruction as LLM2Vec joins it to a text."""
    return f"{instruction} " if instruction else ""


def cases(kind: str, mode: str, instruction: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the texts with an instruction, and what LLM2Vec made of each."""
    found = zip(PAIRS, FOUND[kind][mode], strict=True)
    texts, rows = zip(*((text, row) for (own, text), row in found if own == instruction), strict=True)
    return list(texts), list(rows)


def vectors(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["vector"] for row in rows], np.float32)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize("mode", ["mean", "bos_token", "eos_token", "last_token"])
@pytest.mark.parametrize("kind", NAMES)
def test_texts_have_the_tokens_and_vectors_of_llm2vec(merge: Merge, kind: str, mode: str, instruction: str) -> None:
    folder = merge(kind, mode)
    texts, rows = cases(kind, mode, instruction)
    info, tokenizer = load_teacher_info(folder, TeacherOptions(prompt=prompt_of(instruction)))
    ids = [tokenizer.encode(info.prompt + text).ids for text in texts]
    assert ids == [row["ids"] for row in rows]
    skipped = {len(row["ids"]) - row["pooled"] for row in rows}
    assert {info.skip} == ({0} if mode == "bos_token" else skipped)
    teacher, head = load(folder), load_head(folder, info)
    for side in ("left", "right"):
        batch, mask = pad_batch([np.array(row) for row in ids], side=side)
        pooled = head(teacher.embed(batch, mask), torch.from_numpy(mask))
        np.testing.assert_allclose(pooled.detach().numpy(), vectors(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", NAMES)
def test_token_embeddings_are_those_of_llm2vec_under_any_padding(merge: Merge, kind: str, side: str) -> None:
    rows = FOUND[kind]["mean"]
    ids, mask = pad_batch([np.array(row["ids"]) for row in rows], side=side)
    assert not mask.all()
    hidden = load(merge(kind)).embed(ids, mask).numpy()
    for number, row in enumerate(rows):
        np.testing.assert_allclose(hidden[number][mask[number]], np.array(row[side]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", NAMES)
def test_evaluated_teachers_and_students_of_all_layers_give_the_vectors_of_llm2vec(
    merge: Merge, kind: str, tmp_path: Path
) -> None:
    folder = merge(kind)
    teacher = TeacherModel(Spec("teacher", "teacher", teacher=folder, dtype="float32"), "cpu", threads=1)
    texts, rows = cases(kind, "mean", "")
    np.testing.assert_allclose(teacher.encode(texts), vectors(rows), atol=1e-5, rtol=0)
    dictionary_of(Path(folder), prompt="", max_length=teacher.info.max_length).save(tmp_path / "dictionary")
    write_tokenizer(tmp_path / "dictionary", teacher.tokenizer.to_str())
    dictionary = SenseDictionary.load(tmp_path / "dictionary")
    student = init_student(StudentSettings(kind="layers:2"), dictionary, folder)
    save_pretrained(tmp_path / "student", student, dictionary, senses="float32")
    encoder = SenseEncoder.from_pretrained(tmp_path / "student")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    opened = sentence_transformers.SentenceTransformer(str(tmp_path / "student"), device="cpu", trust_remote_code=True)
    for instruction in INSTRUCTIONS:
        texts, rows = cases(kind, "mean", instruction)
        for model in (encoder, opened):
            given = np.asarray(model.encode(texts, prompt=prompt_of(instruction)))
            np.testing.assert_allclose(given, vectors(rows), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", NAMES)
def test_passages_with_instructions_of_their_own_have_llm2vecs_vectors(merge: Merge, tmp_path: Path, kind: str) -> None:
    """One run over the texts of all instructions, as in the paper, gives what LLM2Vec gives for each."""
    rows = [{"id": str(n), "text": text, "task": prompt_of(own)} for n, (own, text) in enumerate(PAIRS) if text]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    given = {"corpus": (str(tmp_path / "texts.jsonl"),), "prompt_column": "task", "teacher": merge(kind)}
    settings = {"dtype": "float32", "senses": 2, "local": True, "workers": 1, "keep_embeddings": "all"}
    build_dictionary(BuildConfig(**given, **settings, output=str(tmp_path / "d")))
    distill_student(
        DistillConfig(
            dictionary=str(tmp_path / "d"),
            student="static",
            epochs=1,
            held_out=0,
            spans={},
            output=str(tmp_path / "s"),
            local=True,
            workers=1,
            dtype="float32",
        )
    )
    labels = LabelSet.open(str(tmp_path / "s"))
    batch = labels.read(np.arange(len(labels.lengths)))
    own = {tuple(row["ids"]): row["vector"] for (_, text), row in zip(PAIRS, FOUND[kind]["mean"], strict=True) if text}
    assert len(batch.ids) == len(own)
    for ids, mask, vector in zip(batch.ids, batch.mask, batch.pooled, strict=True):
        expected = np.array(own[tuple(ids[mask].tolist())])
        np.testing.assert_allclose(vector.numpy(), expected, atol=2e-3 * np.abs(expected).max())  # stored in float16
