"""Shipped students as encoders: the module's own numbers in any order and company, senses by hand, folders checked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file, save_file
from students import shipped
from tiny import make
from tokenizers import Tokenizer

from msense import SenseDictionary, SenseEncoder, hub
from msense import encoder as encoder_module
from msense.errors import BadInput, DictionaryError, MsenseError, StudentError
from msense.pooling import POOLINGS, pool, pool_rows
from msense.student import Student, load_student, make_student, ship
from msense.student.config import StudentSettings
from msense.student.tokenizer import padded

TEXTS = ["the river bank", "", "a cat sat on the mat , running", "money", "zzz of deep", "is near " * 3, "dogs !"]
LONG = " ".join(WORDS * 200)
KINDS = ["static", "layers:1"]


@pytest.fixture(scope="module")
def teacher(make_teacher: Callable[..., Path]) -> Path:
    return make_teacher("bert")


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SenseEncoder, Student, SenseDictionary, Path]:
    folder = tmp_path_factory.mktemp("shipped") / "student"
    student, dictionary = shipped(teacher, folder, request.param)
    return SenseEncoder.from_pretrained(folder), student, dictionary, folder


def ids_of(folder: Path, text: str) -> np.ndarray:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(24)
    return np.array(tokenizer.encode(text).ids)


@torch.no_grad()
def one(
    student: Student, ids: np.ndarray, dictionary: SenseDictionary | None = None, t: float | None = None
) -> np.ndarray:
    """Embed one text by the module itself, replaced if there is a dictionary."""
    rows, mask = padded([ids])
    hidden, senses = student(rows, mask)
    if dictionary is not None:
        hidden = dictionary.replace(rows[0], senses[0], t)[None]
    return student.sentence(hidden, mask)[0].numpy()


def test_encode_is_the_module_in_any_order_and_company(whole: tuple) -> None:
    encoder, student, _, folder = whole
    want = np.stack([one(student, ids_of(folder, text)) for text in [*TEXTS, LONG]])
    for batch_size in (1, 3, 32):
        found = encoder.encode([*TEXTS, LONG], batch_size=batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, want, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(want))
    again = encoder.encode([[*TEXTS, LONG][i] for i in order])
    np.testing.assert_allclose(again, want[order], atol=1e-5)
    assert not np.allclose(want[0], want[3], atol=0.1)
    assert len(ids_of(folder, LONG)) == encoder.config.max_length == 24


def test_many_texts_take_several_steps(
    whole: tuple, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    encoder, *_ = whole
    want = encoder.encode(TEXTS * 9)
    monkeypatch.setattr(encoder_module, "_STATIC_TOKENS", 16)
    monkeypatch.setattr("msense.student.tokenizer._SLAB", 4)
    monkeypatch.setitem(encoder_module.TOKEN_BUDGET, "cpu", 20)
    np.testing.assert_allclose(encoder.encode(TEXTS * 9), want, atol=1e-5)
    assert capfd.readouterr().err == ""
    np.testing.assert_allclose(encoder.encode(TEXTS, show_progress_bar=True), want[: len(TEXTS)], atol=1e-5)
    printed = capfd.readouterr()
    assert "encode" in printed.err
    assert printed.out == ""


def test_shapes_and_types_are_those_of_sentence_transformers(whole: tuple) -> None:
    encoder, *_ = whole
    every = encoder.encode(TEXTS)
    assert every.shape == (len(TEXTS), 16)
    assert encoder.encode([]).shape == (0, 16)
    assert encoder.encode([], convert_to_tensor=True).shape == (0, 16)
    for single in (encoder.encode(TEXTS[0]), encoder.encode(TEXTS[0], convert_to_numpy=False).numpy()):
        assert single.shape == (16,)
        np.testing.assert_allclose(single, every[0], atol=1e-5)
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), every)
    tensor.requires_grad_()  # it is not of inference mode
    rows = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(rows, list)
    assert torch.equal(torch.stack(rows), tensor)
    unit = encoder.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(unit, every / np.linalg.norm(every, axis=1, keepdims=True), atol=1e-6)
    assert np.isfinite(encoder.encode("")).all()


@pytest.mark.parametrize(("how", "temperature"), [("hard", None), ("soft", 1 / 3), ("soft", 2.0)])
def test_replaced_vectors_are_those_of_the_dictionary(whole: tuple, how: str, temperature: float | None) -> None:
    encoder, student, dictionary, folder = whole
    want = np.stack([one(student, ids_of(folder, text), dictionary, temperature) for text in TEXTS])
    told = {} if temperature in (None, 1 / 3) else {"temperature": temperature}
    np.testing.assert_allclose(encoder.encode(TEXTS, replace=how, **told), want, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[2], replace=how, **told), want[2], atol=1e-5)
    assert not np.allclose(want, encoder.encode(TEXTS), atol=0.1)
    assert encoder.encode([], replace=how).shape == (0, 16)


def test_batches_replaced_together_or_one_by_one_are_the_same(whole: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, *_ = whole
    want = encoder.encode([*TEXTS, LONG] * 9, replace="soft")
    monkeypatch.setattr(encoder_module, "_REPLACED", 16 * 30)  # numbers: 30 tokens
    found = encoder.encode([*TEXTS, LONG] * 9, replace="soft", batch_size=3, show_progress_bar=True)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0]])
def test_pooling_without_padding_is_pooling(how: str, normalize: bool, lengths: list[int]) -> None:
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    hidden = torch.randn(len(lengths), 5, 4, generator=torch.Generator().manual_seed(0))
    want = pool(hidden, mask, how, normalize=normalize)
    torch.testing.assert_close(pool_rows(hidden[mask], torch.tensor(lengths), how, normalize=normalize), want)


def test_tokens_known_by_hand(whole: tuple) -> None:
    encoder, student, dictionary, folder = whole
    text = "The bank , zzz running"
    found = encoder.tokens(text)
    assert [t.token for t in found] == ["the", "bank", ",", "[UNK]", "run", "##ning"]
    assert [text[t.start : t.end] for t in found] == ["The", "bank", ",", "zzz", "run", "ning"]
    ids = ids_of(folder, text)
    assert [t.token_id for t in found] == ids[1:-1].tolist()
    rows, mask = padded([ids])
    with torch.no_grad():
        senses = student(rows, mask).senses[0, 1:-1]
    assert any(t.sense >= 0 for t in found)
    for token, embedding in zip(found, senses, strict=True):
        own = dictionary.senses(token.token_id).centroids
        if not len(own):
            assert (token.sense, token.probability, token.exemplar) == (-1, 0.0, None)
            continue
        scores = -((own - embedding) ** 2).sum(1).double()
        shares = torch.softmax(scores / (20.0 / 3), dim=0)
        assert token.sense == int(scores.argmax())
        assert token.probability == pytest.approx(float(shares.max()), rel=1e-3)
        assert token.exemplar == f"a river [bank] of {token.token_id}.{token.sense}.0"
    assert all(t.exemplar is None for t in encoder.tokens(text, exemplars=False))
    assert encoder.tokens("") == []
    assert len(encoder.tokens(LONG)) == 22


def test_tokens_of_many_senses_are_weighed_in_pieces(whole: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, *_ = whole
    want = encoder.tokens(LONG)
    monkeypatch.setattr(encoder_module, "_WEIGHTS", 7)
    for a, b in zip(encoder.tokens(LONG), want, strict=True):
        assert (a.token_id, a.sense, a.exemplar) == (b.token_id, b.sense, b.exemplar)
        assert a.probability == pytest.approx(b.probability, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts(teacher: Path, tmp_path: Path, kind: str) -> None:
    shipped(teacher, tmp_path / "s", kind, prompt="the river ")
    encoder = SenseEncoder.from_pretrained(str(tmp_path / "s"))
    bare = encoder.encode(TEXTS, prompt="")
    np.testing.assert_allclose(
        encoder.encode(TEXTS), encoder.encode(["the river " + t for t in TEXTS], prompt=""), atol=1e-6
    )
    np.testing.assert_allclose(
        encoder.encode(TEXTS, prompt="a cat "), encoder.encode(["a cat " + t for t in TEXTS], prompt=""), atol=1e-6
    )
    assert not np.allclose(bare, encoder.encode(TEXTS), atol=0.1)
    found = encoder.tokens("bank money")
    assert [(t.token, t.start, t.end) for t in found] == [("bank", 0, 4), ("money", 5, 10)]
    bare = encoder.tokens("bank money", prompt="")
    assert [(t.token, t.start, t.end) for t in bare] == [("bank", 0, 4), ("money", 5, 10)]


@pytest.mark.parametrize("pooling", ["cls", "lasttoken"])
def test_other_poolings(make_teacher: Callable[..., Path], tmp_path: Path, pooling: str) -> None:
    teacher = make_teacher("llama", pooling=pooling + ("_token" if pooling == "cls" else ""))
    for kind in KINDS:
        student, _ = shipped(teacher, tmp_path / kind, kind)
        encoder = SenseEncoder.from_pretrained(tmp_path / kind)
        assert encoder.config.pooling == pooling
        want = np.stack([one(student, ids_of(tmp_path / kind, text)) for text in TEXTS])
        np.testing.assert_allclose(encoder.encode(TEXTS), want, atol=1e-5)


def test_a_text_without_any_token_is_zero(teacher: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        student, _ = shipped(teacher, tmp_path / kind, kind)
        for pooling in ("mean", "cls", "lasttoken"):
            config = student.config.model_copy(update={"pooling": pooling})
            bare = Student(config)
            bare.load_state_dict(student.state_dict())
            rows, mask = padded([np.array([], np.int64)])
            with torch.no_grad():
                assert not bare.eval().sentence(bare(rows, mask).hidden, mask).any()


def test_dtypes(whole: tuple) -> None:
    encoder, _, _, folder = whole
    want = encoder.encode(TEXTS)
    able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if encoder.config.kind == "static" or able:
        rough = SenseEncoder.from_pretrained(folder, dtype="bfloat16")
        found = rough.encode(TEXTS)
        assert found.dtype == np.float32
        assert 1e-5 < np.abs(found - want).max() < 0.1 * np.abs(want).max()
        hard = rough.encode(TEXTS, replace="soft")
        np.testing.assert_allclose(hard, encoder.encode(TEXTS, replace="soft"), atol=0.3)
    else:
        with pytest.raises(BadInput, match="does not compute in bfloat16: give dtype='float32'"):
            SenseEncoder.from_pretrained(folder, dtype="bfloat16")
    with pytest.raises(BadInput, match=r"dtype is 'int4', but must be"):
        SenseEncoder.from_pretrained(folder, dtype="int4")


def test_wrong_arguments_are_refused(whole: tuple) -> None:
    encoder, *_ = whole
    for texts, match in (
        ([1], "text 0 is a int: give text"),
        (["a", None], "text 1 is a NoneType"),
        (["\ud800"], "text 0 holds half a surrogate pair: decode"),
    ):
        with pytest.raises(BadInput, match=match):
            encoder.encode(texts)
    with pytest.raises(BadInput, match="the prompt is a int"):
        encoder.encode(["a"], prompt=3)
    with pytest.raises(BadInput, match="replace is 'firm' and batch_size 32, but must be"):
        encoder.encode(["a"], replace="firm")
    with pytest.raises(BadInput, match="batch_size 0"):
        encoder.encode(["a"], batch_size=0)
    with pytest.raises(BadInput, match="the temperature is 0"):
        encoder.encode(["a"], replace="soft", temperature=0)


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


def outside(path: Path) -> None:
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


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
def test_folders_nobody_vouches_for_are_refused(whole: tuple, tmp_path: Path, case: str) -> None:
    spoil, match = SPOILT[case]
    shutil.copytree(whole[3], tmp_path / "s")
    spoil(tmp_path / "s")
    with pytest.raises(StudentError, match=match):
        SenseEncoder.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize("case", SPOILT_SENSES)
def test_dictionaries_nobody_vouches_for_are_refused(whole: tuple, tmp_path: Path, case: str) -> None:
    spoil, match = SPOILT_SENSES[case]
    shutil.copytree(whole[3], tmp_path / "s")
    spoil(tmp_path / "s")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    np.testing.assert_allclose(encoder.encode(TEXTS), whole[0].encode(TEXTS), atol=1e-6)
    with pytest.raises((StudentError, DictionaryError), match=match):
        encoder.tokens("bank river the a cat")


def test_a_student_of_before_still_loads(whole: tuple, tmp_path: Path) -> None:
    shutil.copytree(whole[3], tmp_path / "s")
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


class FakeApi:
    """Stands for the hub."""

    calls: list[tuple[str, dict]]

    def __init__(self, token: str | None = None) -> None:
        FakeApi.calls = [("token", {"token": token})]

    def create_repo(self, repo_id: str, **told: object) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **told}))

    def upload_folder(self, **told: object) -> str:
        from huggingface_hub.utils import filter_repo_objects

        root = Path(str(told["folder_path"]))
        paths = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
        sent = sorted(filter_repo_objects(paths, allow_patterns=told["allow_patterns"]))
        self.calls.append(("upload", {"repo_id": told["repo_id"], "sent": sent}))
        return "https://hub/commit"


def test_pushing_leaves_exemplars_and_other_files_at_home(
    whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    shutil.copytree(whole[3], tmp_path / "s")
    for name in ("training.json", "secret.txt", "evil.py", "dictionary/notes.json"):
        (tmp_path / "s" / name).write_text("{}")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.push_to_hub("me/student", private=True, token="hf_secret") == "https://hub/commit"
    assert FakeApi.calls[:2] == [
        ("token", {"token": "hf_secret"}),
        ("create", {"repo_id": "me/student", "private": True, "exist_ok": True}),
    ]
    sent = FakeApi.calls[2][1]["sent"]
    assert sent == [
        *("README.md", "config.json", "config_sentence_transformers.json"),
        *("dictionary/README.md", "dictionary/config.json", "dictionary/dictionary.safetensors"),
        *("dictionary/tokenizer/tokenizer.json", "model.safetensors", "modules.json", "tokenizer.json"),
    ]
    encoder.push_to_hub("me/student", exemplars=True)
    assert set(FakeApi.calls[2][1]["sent"]) - set(sent) == {"dictionary/exemplars.parquet"}
    assert "hf_secret" not in caplog.text
    outside(tmp_path / "s" / "README.md")
    with pytest.raises(StudentError, match="outside the student"):
        encoder.push_to_hub("me/student")


def test_a_hub_that_refuses_is_told(whole: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    for error, match in (
        (OSError("no route"), "'me/student' could not be pushed .no route.: check the connection"),
        (HFValidationError("bad"), "'me/student' is no name for the hub"),
    ):

        class Broken(FakeApi):
            def create_repo(self, repo_id: str, reason: Exception = error, **told: object) -> None:
                raise reason

        monkeypatch.setattr("huggingface_hub.HfApi", Broken)
        with pytest.raises(MsenseError, match=match) as refusal:
            whole[0].push_to_hub("me/student", token="hf_secret")
        assert "hf_secret" not in str(refusal.value)


def test_a_student_by_its_name_on_the_hub(whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--me--student"
    snapshot = repository / "snapshots" / "0123"
    asked: list[tuple] = []

    def download(name: str, **told: object) -> str:
        """Lay a student out as the hub's cache does: links from the snapshot to blobs."""
        asked.append((name, told["revision"], told["token"]))
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(p for p in whole[3].rglob("*") if p.is_file()):
            link = snapshot / path.relative_to(whole[3])
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, repository / "blobs" / str(number))
            link.symlink_to(repository / "blobs" / str(number))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    encoder = SenseEncoder.from_pretrained("me/student", revision="v1", token="hf_secret")
    assert asked == [("me/student", "v1", "hf_secret")]
    np.testing.assert_array_equal(encoder.encode(TEXTS), whole[0].encode(TEXTS))
    assert encoder.tokens("bank the river") == whole[0].tokens("bank the river")
    encoder.save(tmp_path / "copy", exemplars=False)
    assert not [p for p in (tmp_path / "copy").rglob("*") if p.is_symlink() or p.suffix in (".parquet", ".py")]
    copy = SenseEncoder.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(copy.encode(TEXTS), whole[0].encode(TEXTS))
    assert all(t.exemplar is None for t in copy.tokens("bank the river"))
    with pytest.raises(BadInput, match="is where this student lies"):
        copy.save(tmp_path / "copy")
    (snapshot / "model.safetensors").unlink()
    shutil.copy(whole[3] / "model.safetensors", tmp_path / "elsewhere")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StudentError, match="outside the student"):
        SenseEncoder.from_pretrained(snapshot)


def test_a_student_that_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to https://user:pw@hub/x?token=1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        StudentError, match="'me/student' is no folder here and could not be had from the hub"
    ) as refusal:
        SenseEncoder.from_pretrained("me/student")
    assert "pw@" not in str(refusal.value)
    for name in (tmp_path / "nowhere", "/no/where", "./x", "a/b/c"):
        with pytest.raises(StudentError, match="there is no such folder"):
            SenseEncoder.from_pretrained(name)
    with pytest.raises(StudentError, match="no usable name"):
        hub.student_folder("x" * 5000)


def test_it_is_imported_when_asked_for_and_without_ray() -> None:
    code = (
        "import sys, msense; assert 'torch' not in sys.modules and 'ray' not in sys.modules; "
        "from msense import SenseEncoder; assert 'ray' not in sys.modules; assert 'sentence_transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
