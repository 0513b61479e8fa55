"""Folders of students: what is in them, what is refused, and sentence-transformers on them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from students import KINDS, LONG, TEXTS, ids_of, one, outside, shipped
from tiny import make

from msense import SenseDictionary, SenseEncoder
from msense.errors import BadInput, DictionaryError, StudentError
from msense.student import load_student, make_student, ship
from msense.student.config import StudentSettings


@pytest.mark.parametrize("senses", ["float16", "int8"])
def test_smaller_dictionaries_give_nearly_the_same(teacher: Path, tmp_path: Path, senses: str) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", "static", senses)
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.dictionary.config.dtype == senses
    want = np.stack([one(student, ids_of(tmp_path / "s", text), dictionary, None) for text in TEXTS])
    found = encoder.encode(TEXTS, replace="hard")
    assert np.linalg.norm(found - want) < 0.01 * np.linalg.norm(want)


def test_without_a_dictionary_there_are_vectors_and_no_senses(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    ship(tmp_path / "s", student, dictionary, senses="none")  # the older dictionary goes
    assert not (tmp_path / "s" / "dictionary").exists()
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 16)
    for use in (lambda: encoder.tokens("bank"), lambda: encoder.encode(TEXTS, replace="hard")):
        with pytest.raises(StudentError, match=r"holds no dictionary, .* ship it again with senses='float16'"):
            use()


def test_the_folder_holds_what_it_should_and_no_code(teacher: Path, tmp_path: Path) -> None:
    figures = {"held-out sense accuracy": 0.8125, "most frequent sense": 0.5, "a |\n# evil": 1.0}
    student, _ = shipped(teacher, tmp_path / "s", "static", "int8", figures=figures)
    there = sorted(str(p.relative_to(tmp_path / "s")) for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert there == [
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        *(f"dictionary/{n}" for n in ("README.md", "config.json", "dictionary.safetensors", "exemplars.parquet")),
        "dictionary/tokenizer/tokenizer.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
    ]
    again = load_student(tmp_path / "s")
    assert again.config == student.config.model_copy(update={"max_length": 24})
    card = (tmp_path / "s" / "README.md").read_text()
    head = card.split("---")[1]
    assert "library_name: sentence-transformers" in head
    assert "msense" in head
    assert "base_model: " in head
    assert "| held-out sense accuracy | 0.8125 |" in card
    assert "| a / # evil | 1 |" in card.replace("  ", " ")
    assert "trust_remote_code=True" in card
    assert "stored as int8" in card


def test_a_shipment_that_is_cut_off_is_no_student(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    monkeypatch.setattr("msense.student.shipping.write_settings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ship(tmp_path / "s", student, dictionary)
    with pytest.raises(StudentError, match=r"config.json is missing"):
        SenseEncoder.from_pretrained(tmp_path / "s")


def test_where_files_lay_is_not_told(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", str(teacher))
    assert student.config.kind == str(teacher)
    ship(tmp_path / "s", student, dictionary)
    assert SenseEncoder.from_pretrained(tmp_path / "s").config.kind == teacher.name
    for path in (tmp_path / "s").rglob("*"):
        assert path.is_dir() or str(teacher.parent).encode() not in path.read_bytes(), path


def test_what_does_not_belong_together_is_not_shipped(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    whole = (tmp_path / "s" / "config.json").read_bytes()
    with pytest.raises(StudentError, match="its width is 16, that of the dictionary is 3"):
        ship(tmp_path / "s", student, make([1] * 25, tokenizer_fingerprint="", teacher={"name": "t"}))
    with pytest.raises(StudentError, match=r"its tokenizer is .*, that of the dictionary is other"):
        ship(tmp_path / "s", student, make([1], 16, tokenizer_fingerprint="other"))
    bare = make([1] * dictionary.vocab_size, 16, tokenizer_fingerprint="", teacher={"name": "t"})
    with pytest.raises(StudentError, match="the dictionary has no tokenizer"):
        ship(tmp_path / "s", student, bare)
    with pytest.raises(StudentError, match="senses is 'int4', but must be one of"):
        ship(tmp_path / "s", student, dictionary, senses="int4")
    with pytest.raises(StudentError, match=r"2 special tokens around a text, but config.json lets the student read 2"):
        ship(tmp_path / "s", student, dictionary, max_length=2)
    assert (tmp_path / "s" / "config.json").read_bytes() == whole


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def other_tokenizer(path: Path) -> None:
    definition = json.loads(path.read_text())
    definition["model"]["vocab"] = {"[UNK]": 0, "bank": 1}
    definition["post_processor"] = None
    definition["added_tokens"] = []
    path.write_text(json.dumps(definition))


def scaled(path: Path, factor: float) -> None:
    save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 999), "cut off or no safetensors"),
    "weights of NaN": (lambda f: scaled(f / "model.safetensors", float("nan")), "holds NaN"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer is a pipe": (
        lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")),
        "tokenizer.json is no plain file",
    ),
    "tokenizer cut off": (lambda f: os.truncate(f / "tokenizer.json", 99), "not the student's tokenizer"),
    "a large tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 1 << 33), "at most .* are read"),
    "another tokenizer": (lambda f: other_tokenizer(f / "tokenizer.json"), "its fingerprint is"),
    "tokenizer outside": (lambda f: outside(f / "tokenizer.json"), "outside the student"),
    "a foreign folder": (lambda f: edit(f / "config.json", format_version=None), "states no format_version"),
    "no room for text": (lambda f: edit(f / "config.json", max_length=2), "2 special tokens around a text"),
    "a text without end": (lambda f: edit(f / "config.json", max_length=1 << 40), "max_length: Input should be less"),
    "a vast prompt": (lambda f: edit(f / "config.json", prompt="x" * 70_000), "prompt: .* at most 65536"),
}
SPOILT_SENSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another dictionary": (
        lambda f: (shutil.rmtree(f / "dictionary"), make([1] * 25).save(f / "dictionary")),
        "does not speak in this dictionary: its tokenizer is",
    ),
    "cut dictionary": (lambda f: os.truncate(f / "dictionary" / "dictionary.safetensors", 999), "cut off"),
    "no config": (lambda f: (f / "dictionary" / "config.json").unlink(), r"no config.json"),
    "cut exemplars": (lambda f: os.truncate(f / "dictionary" / "exemplars.parquet", 99), "exemplars.parquet cannot"),
    "dictionary outside": (lambda f: outside(f / "dictionary" / "dictionary.safetensors"), "outside the dictionary"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_folders_nobody_vouches_for_are_refused(shipped_student: tuple, tmp_path: Path, case: str) -> None:
    spoil, match = SPOILT[case]
    shutil.copytree(shipped_student[3], tmp_path / "s")
    spoil(tmp_path / "s")
    with pytest.raises(StudentError, match=match):
        SenseEncoder.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize("case", SPOILT_SENSES)
def test_dictionaries_nobody_vouches_for_are_refused(shipped_student: tuple, tmp_path: Path, case: str) -> None:
    spoil, match = SPOILT_SENSES[case]
    shutil.copytree(shipped_student[3], tmp_path / "s")
    spoil(tmp_path / "s")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    np.testing.assert_allclose(encoder.encode(TEXTS), shipped_student[0].encode(TEXTS), atol=1e-6)
    with pytest.raises((StudentError, DictionaryError), match=match):
        encoder.tokens("bank river the a cat")


def test_a_student_of_before_still_loads(shipped_student: tuple, tmp_path: Path) -> None:
    shutil.copytree(shipped_student[3], tmp_path / "s")
    path = tmp_path / "s" / "config.json"
    config = json.loads(path.read_text())
    del config["max_length"], config["prompt"]
    path.write_text(json.dumps(config))
    assert (load_student(tmp_path / "s").config.max_length, load_student(tmp_path / "s").config.prompt) == (512, "")


def test_a_student_reads_no_more_than_its_positions(teacher: Path, tmp_path: Path) -> None:
    _, dictionary = shipped(teacher, tmp_path / "s")
    long = SenseDictionary(
        dictionary.config.model_copy(update={"max_length": 99}), dictionary._arrays, dictionary.ragged.parts
    )
    lengths = [make_student(StudentSettings(kind=kind), long, str(teacher)).config.max_length for kind in KINDS]
    assert lengths == [99, 64]


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_gives_the_same(teacher: Path, tmp_path: Path, kind: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    shipped(teacher, tmp_path / "s", kind, prompt="the river ")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        library.SentenceTransformer(str(tmp_path / "s"), device="cpu")
    model = library.SentenceTransformer(str(tmp_path / "s"), trust_remote_code=True, device="cpu")
    texts = [*TEXTS, LONG]
    np.testing.assert_allclose(model.encode(texts), encoder.encode(texts), atol=1e-5)
    np.testing.assert_allclose(model.encode(texts, prompt=""), encoder.encode(texts, prompt=""), atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS[0]), encoder.encode(TEXTS[0]), atol=1e-5)
    assert model.get_sentence_embedding_dimension() == 16
    assert model.max_seq_length == 24
    assert model.similarity(model.encode(TEXTS[:1]), model.encode(TEXTS)).shape == (1, len(TEXTS))
    model.save_pretrained(str(tmp_path / "again"))
    again = SenseEncoder.from_pretrained(tmp_path / "again")
    np.testing.assert_allclose(again.encode(texts), encoder.encode(texts), atol=1e-5)
    second = library.SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(second.encode(texts), encoder.encode(texts), atol=1e-5)
    assert not list(tmp_path.rglob("*.py"))


def test_sentence_transformers_reads_as_much_as_it_is_told(teacher: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    shipped(teacher, tmp_path / "s", "static")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    model = library.SentenceTransformer(str(tmp_path / "s"), trust_remote_code=True, device="cpu")
    model.max_seq_length = 5
    assert model.max_seq_length == 5
    short, cut = "the river bank", "the river bank near money"
    np.testing.assert_allclose(model.encode([cut, short]), encoder.encode([short, short]), atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    again = library.SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert again.max_seq_length == 5
    np.testing.assert_allclose(again.encode(cut), encoder.encode(short), atol=1e-5)
    for wrong in (2, 25):
        with pytest.raises(BadInput, match=f"max_seq_length is {wrong}, but must be from 3 to 24"):
            model.max_seq_length = wrong
    model.max_seq_length = 24
    np.testing.assert_allclose(model.encode(cut), encoder.encode(cut), atol=1e-5)


def test_sentence_transformers_takes_static_students_without_padding(teacher: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    shipped(teacher, tmp_path / "s", "static")
    model = library.SentenceTransformer(str(tmp_path / "s"), trust_remote_code=True, device="cpu")
    features = model.preprocess([*TEXTS, LONG])
    trained = model(features)  # with gradients: by the module
    assert trained["sentence_embedding"].requires_grad
    assert model[0]._fast is None
    model.eval()
    with torch.no_grad():
        fast = model(features)
    assert model[0]._fast is not None
    assert not dict.__contains__(fast, "token_embeddings")
    torch.testing.assert_close(fast["sentence_embedding"], trained["sentence_embedding"].detach(), atol=1e-5, rtol=0)
    assert set({**fast}) == set(trained)
    assert fast.get("nothing") is None
    tokens = model.encode(TEXTS, output_value="token_embeddings")
    for own, wanted in zip(tokens, trained["token_embeddings"], strict=False):
        torch.testing.assert_close(own, wanted[: len(own)].detach())
    assert "token_embeddings" in model.encode(TEXTS, output_value=None)[0]
    with torch.no_grad():
        model[0].student.body.means.add_(1.0)
        changed = model(features)["sentence_embedding"]
        model.train()
        assert model[0]._fast is None
        slow = model(features)["sentence_embedding"]
    torch.testing.assert_close(changed, slow, atol=1e-5, rtol=0)
    assert not torch.allclose(changed, fast["sentence_embedding"], atol=0.1)
