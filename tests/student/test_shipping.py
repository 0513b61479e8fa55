"""Saved student folders: their contents, what is refused, and loading them with sentence-transformers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from students import KINDS, LONG, TEXTS, ids_of, one, outside, shipped
from tiny import make

from msense import SenseDictionary, SenseEncoder
from msense.errors import DictionaryError, InputError, StudentError
from msense.student import init_student, load_student, save_pretrained
from msense.student.card import student_card
from msense.student.config import StudentSettings


@pytest.mark.parametrize("senses", ["float16", "int8"])
def test_smaller_dictionaries_are_close(teacher: Path, tmp_path: Path, senses: str) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", "static", senses)
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.dictionary.config.dtype == senses
    expected = np.stack([one(student, ids_of(tmp_path / "s", text), dictionary, None) for text in TEXTS])
    error = np.linalg.norm(encoder.encode(TEXTS, replace="hard") - expected)
    assert error < 0.01 * np.linalg.norm(expected)


def test_without_a_dictionary_there_are_vectors_only(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    save_pretrained(tmp_path / "s", student, dictionary, senses="none")  # removes the earlier dictionary
    assert not (tmp_path / "s" / "dictionary").exists()
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 16)
    for use in (lambda: encoder.tokens("bank"), lambda: encoder.encode(TEXTS, replace="hard")):
        with pytest.raises(StudentError, match=r"has no dictionary, .* save it again with senses='float16'"):
            use()


def test_a_saved_folder_is_complete_without_code_and_local_paths(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", str(teacher), "int8", figures={"accuracy": 0.8125})
    files = {str(p.relative_to(tmp_path / "s")) for p in (tmp_path / "s").rglob("*") if p.is_file()}
    names = ("README.md", "config.json", "dictionary.safetensors", "exemplars.parquet", "tokenizer/tokenizer.json")
    assert files == {
        *("README.md", "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json"),
        *("tokenizer.json", *(f"dictionary/{name}" for name in names)),
    }
    changes = {"max_length": 24, "kind": teacher.name}
    assert load_student(tmp_path / "s").config == student.config.model_copy(update=changes)
    save_pretrained(tmp_path / "s", student, dictionary)
    for path in (tmp_path / "s").rglob("*"):
        assert path.is_dir() or str(teacher.parent).encode() not in path.read_bytes(), path


def test_the_card_has_metadata_and_metrics_and_cannot_be_broken_out_of(shipped_student: tuple) -> None:
    config = shipped_student[1].config
    figures = {"held-out sense accuracy": 0.8125, "a |\n# evil": 1.0, "{x}": 2.0}
    for teacher, base in (("org/name", "org/name"), ("a: b\n---\n# evil", None)):
        named = config.model_copy(update={"teacher": config.teacher.model_copy(update={"name": teacher})})
        card = student_card(named, "int8", figures)
        metadata = yaml.safe_load(card.split("---\n")[1])
        assert metadata["library_name"] == "sentence-transformers"
        assert "msense" in metadata["tags"]
        assert metadata.get("base_model") == base
        assert "\n# evil" not in card
    for expected in ("| held-out sense accuracy | 0.8125 |", "| {x} | 2 |", "trust_remote_code=True", "stored as int8"):
        assert expected in card


def test_an_interrupted_save_leaves_no_student(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    monkeypatch.setattr("msense.student.shipping.write_sentence_transformers_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(tmp_path / "s", student, dictionary)
    with pytest.raises(StudentError, match=r"config.json is missing"):
        SenseEncoder.from_pretrained(tmp_path / "s")


def test_mismatches_are_refused_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    config = (tmp_path / "s" / "config.json").read_bytes()
    unnamed = {"tokenizer_fingerprint": "", "teacher": {"name": "t"}}
    cases = [
        (make([1] * 25, **unnamed), {}, "does not match the student: it has dimension 3, not 16"),
        (make([1], 16, tokenizer_fingerprint="other"), {}, "it has tokenizer other, not "),
        (make([1] * dictionary.vocab_size, 16, **unnamed), {}, "the dictionary has no tokenizer"),
        (dictionary, {"senses": "int4"}, "invalid senses 'int4'"),
        (dictionary, {"max_length": 2}, "adds 2 special tokens to a text, but max_length is 2"),
    ]
    for other, arguments, match in cases:
        with pytest.raises(StudentError, match=match):
            save_pretrained(tmp_path / "s", student, other, **arguments)
    assert (tmp_path / "s" / "config.json").read_bytes() == config


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def other_tokenizer(path: Path) -> None:
    definition = json.loads(path.read_text())
    definition["model"]["vocab"] = {"[UNK]": 0, "bank": 1}
    edit(path, model=definition["model"], post_processor=None, added_tokens=[])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer is a pipe": (
        lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")),
        "tokenizer.json is no",
    ),
    "truncated tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 99), "not the student's tokenizer"),
    "large tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 1 << 33), f"{1 << 33} bytes"),
    "other tokenizer": (lambda f: other_tokenizer(f / "tokenizer.json"), "fingerprint"),
    "tokenizer outside": (lambda f: outside(f / "tokenizer.json"), "outside the student"),
    "no room for text": (lambda f: edit(f / "config.json", max_length=2), "adds 2 special tokens to a text"),
    "unbounded text": (lambda f: edit(f / "config.json", max_length=1 << 40), "max_length: Input should be less"),
    "unbounded prompt": (lambda f: edit(f / "config.json", prompt="x" * 70_000), "prompt: .* at most 65536"),
}
SPOILT_SENSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "other dictionary": (
        lambda f: (shutil.rmtree(f / "dictionary"), make([1] * 25).save(f / "dictionary")),
        "does not match the student: it has tokenizer",
    ),
    "truncated exemplars": (lambda f: os.truncate(f / "dictionary" / "exemplars.parquet", 99), "exemplars.parquet"),
    "dictionary outside": (lambda f: outside(f / "dictionary" / "dictionary.safetensors"), "outside the dictionary"),
}


@pytest.mark.parametrize("case", [*SPOILT, *SPOILT_SENSES])
def test_hostile_folders_are_refused(shipped_student: tuple, tmp_path: Path, case: str) -> None:
    spoil, match = (SPOILT | SPOILT_SENSES)[case]
    shutil.copytree(shipped_student[3], tmp_path / "s")
    spoil(tmp_path / "s")
    if case in SPOILT:
        with pytest.raises(StudentError, match=match):
            SenseEncoder.from_pretrained(tmp_path / "s")
        return
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")  # dictionaries are read on first use
    np.testing.assert_allclose(encoder.encode(TEXTS), shipped_student[0].encode(TEXTS), atol=1e-6)
    with pytest.raises((StudentError, DictionaryError), match=match):
        encoder.tokens("bank river the a cat")


def test_older_students_still_load(shipped_student: tuple, tmp_path: Path) -> None:
    encoder, _, _, folder = shipped_student
    shutil.copytree(folder, tmp_path / "s")
    path, modules = tmp_path / "s" / "config.json", tmp_path / "s" / "modules.json"
    config = json.loads(path.read_text())
    del config["max_length"], config["prompt"]
    path.write_text(json.dumps(config))
    loaded = load_student(tmp_path / "s").config
    assert (loaded.max_length, loaded.prompt) == (512, "")
    name = "msense.student.sentence_transformer.SenseModule"
    assert name in modules.read_text()
    modules.write_text(modules.read_text().replace(name, "msense.sentence_module.SenseModule"))
    np.testing.assert_allclose(sentence_transformer(tmp_path / "s").encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def test_max_length_is_limited_by_the_positions(teacher: Path, tmp_path: Path) -> None:
    _, dictionary = shipped(teacher, tmp_path / "s")
    config = dictionary.config.model_copy(update={"max_length": 99})
    long = SenseDictionary(config, dictionary._arrays, dictionary.ragged.parts)
    lengths = [init_student(StudentSettings(kind=kind), long, str(teacher)).config.max_length for kind in KINDS]
    assert lengths == [99, 64]


def sentence_transformer(folder: Path) -> object:
    return pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(folder), trust_remote_code=True, device="cpu"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_gives_the_same_vectors(teacher: Path, tmp_path: Path, kind: str) -> None:
    shipped(teacher, tmp_path / "s", kind, prompt="the river ")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    model = sentence_transformer(tmp_path / "s")
    texts = [*TEXTS, LONG]
    expected = encoder.encode(texts)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(texts, prompt=""), encoder.encode(texts, prompt=""), atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS[0]), expected[0], atol=1e-5)
    assert model.get_sentence_embedding_dimension() == 16
    assert model.max_seq_length == 24
    assert model.similarity(model.encode(TEXTS[:1]), model.encode(TEXTS)).shape == (1, len(TEXTS))
    model.save_pretrained(str(tmp_path / "again"))
    np.testing.assert_allclose(SenseEncoder.from_pretrained(tmp_path / "again").encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(sentence_transformer(tmp_path / "again").encode(texts), expected, atol=1e-5)
    assert not list(tmp_path.rglob("*.py"))


def test_sentence_transformers_truncates_to_max_seq_length(teacher: Path, tmp_path: Path) -> None:
    shipped(teacher, tmp_path / "s", "static")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    model = sentence_transformer(tmp_path / "s")
    model.max_seq_length = 5
    short, long = "the river bank", "the river bank near money"
    np.testing.assert_allclose(model.encode([long, short]), encoder.encode([short, short]), atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    again = sentence_transformer(tmp_path / "again")
    assert again.max_seq_length == 5
    np.testing.assert_allclose(again.encode(long), encoder.encode(short), atol=1e-5)
    for wrong in (2, 25):
        with pytest.raises(InputError, match=f"invalid max_seq_length {wrong}: use 3 to 24"):
            model.max_seq_length = wrong
    model.max_seq_length = 24
    np.testing.assert_allclose(model.encode(long), encoder.encode(long), atol=1e-5)


def test_sentence_transformers_uses_the_fast_path_of_static_students(teacher: Path, tmp_path: Path) -> None:
    shipped(teacher, tmp_path / "s", "static")
    model = sentence_transformer(tmp_path / "s")
    features = model.preprocess([*TEXTS, LONG])
    trained = model(features)  # with gradients: the module itself
    assert trained["sentence_embedding"].requires_grad
    assert model[0]._fast is None
    model.eval()
    with torch.no_grad():
        fast = model(features)
    assert model[0]._fast is not None
    assert callable(fast.data["token_embeddings"])  # not computed yet
    torch.testing.assert_close(fast["sentence_embedding"], trained["sentence_embedding"].detach(), atol=1e-5, rtol=0)
    assert set({**fast}) == set(trained)
    assert not callable(fast.data["token_embeddings"])
    assert fast.get("nothing") is None
    tokens = model.encode(TEXTS, output_value="token_embeddings")
    for actual, expected in zip(tokens, trained["token_embeddings"], strict=False):
        torch.testing.assert_close(actual, expected[: len(actual)].detach())
    assert isinstance(model.encode(TEXTS, output_value=None)[0]["token_embeddings"], torch.Tensor)
    with torch.no_grad():
        model[0].student.body.means.add_(1.0)
        changed = model(features)["sentence_embedding"]
        model.train()
        assert model[0]._fast is None
        slow = model(features)["sentence_embedding"]
    torch.testing.assert_close(changed, slow, atol=1e-5, rtol=0)
    assert not torch.allclose(changed, fast["sentence_embedding"], atol=0.1)
