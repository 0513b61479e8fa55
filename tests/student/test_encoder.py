"""Saved students: files, refused folders, sentence-transformers, the hub, and what SenseEncoder returns."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from students import KINDS, LONG, TEXTS, dictionary_of, ids_of, one, outside, shipped
from tiny import make
from tokenizers import Tokenizer

from msense import SenseDictionary, SenseEncoder
from msense.errors import DictionaryError, InputError, MsenseError, StudentError
from msense.student import encoder as encoder_module
from msense.student import init_student, load_student, save_pretrained
from msense.student.config import StudentSettings
from msense.student.files import student_folder
from msense.student.layout import StudentFiles
from msense.student.shipping import student_card
from msense.student.tokenizer import pad_ids
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.pooling import POOLINGS, SentenceHead, pool, pool_rows


def test_without_a_dictionary_there_are_vectors_only(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    save_pretrained(tmp_path / "s", student, dictionary, senses="none")  # removes the earlier dictionary
    assert not (tmp_path / "s" / "dictionary").exists()
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 16)
    for use in (lambda: encoder.tokens("bank"), lambda: encoder.encode(TEXTS, replace="hard")):
        with pytest.raises(StudentError, match=r"has no dictionary, .* save it again with senses='float16'"):
            use()


def test_a_table_reads_texts_whole_and_says_that_it_has_no_senses(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", "table", senses="none")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    ids = Tokenizer.from_file(str(tmp_path / "s" / "tokenizer.json")).encode(LONG, add_special_tokens=False).ids
    assert len(ids) > 20 * dictionary.config.max_length
    expected = torch.nn.functional.normalize(student.body.table()[ids].mean(0), dim=0)
    np.testing.assert_allclose(encoder.encode(LONG, normalize_embeddings=True), expected.detach().numpy(), atol=1e-5)
    with pytest.raises(StudentError, match="a table knows no senses"):
        encoder.tokens("bank")


def test_a_saved_folder_is_complete_without_code_and_local_paths(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", str(teacher), "int8", figures={"accuracy": 0.8125})
    files = {str(p.relative_to(tmp_path / "s")) for p in (tmp_path / "s").rglob("*") if p.is_file()}
    names = ("README.md", "config.json", "dictionary.safetensors", "exemplars.parquet", "tokenizer/tokenizer.json")
    assert files == {
        *("README.md", "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json"),
        *("1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("senses/config.json", "senses/head.safetensors", *(f"senses/dictionary/{name}" for name in names)),
    }
    assert load_student(tmp_path / "s").config == student.config.model_copy(update={"kind": teacher.name})
    for senses in ("int8", "float16"):
        assert SenseDictionary.load(tmp_path / "s").config.dtype == senses
        save_pretrained(tmp_path / "s", student, dictionary)  # float16 by default
    for path in (tmp_path / "s").rglob("*"):
        assert path.is_dir() or str(teacher.parent).encode() not in path.read_bytes(), path


def test_the_card_has_metadata_and_metrics_and_cannot_be_broken_out_of(shipped_student: tuple) -> None:
    config = shipped_student[1].config
    figures = {"held-out sense accuracy": 0.8125, "a |\n# evil": 1.0, "{x}": 2.0}
    for teacher, base in (("org/name", "org/name"), ("a: b\n---\n# evil", None)):
        named = config.model_copy(update={"teacher": config.teacher.model_copy(update={"name": teacher})})
        card = student_card(named, "int8", figures, "it has\nlayers")
        metadata = yaml.safe_load(card.split("---\n")[1])
        assert metadata["library_name"] == "sentence-transformers"
        assert metadata.get("base_model") == base
        assert "\n# evil" not in card
    for expected in ("| held-out sense accuracy | 0.8125 |", "| {x} | 2 |", "trust_remote_code=True", "stored as int8"):
        assert expected in card
    assert "because it has layers: `modules.json` names" in card
    assert "trust_remote_code" not in student_card(config, "int8", figures)


def test_an_interrupted_save_leaves_no_student(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    monkeypatch.setattr("msense.student.shipping.student_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(tmp_path / "s", student, dictionary)
    with pytest.raises(StudentError, match=r"config.json is missing"):
        SenseEncoder.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_former_student_stays(teacher: Path, tmp_path: Path, kind: str) -> None:
    for former in KINDS:
        folder = tmp_path / former
        shipped(teacher, folder, former)
        if former != "table":
            SenseEncoder.from_pretrained(folder).save_onnx(StudentFiles(folder).onnx)
            assert StudentFiles(folder).onnx in StudentFiles(folder).present(exemplars=False)
        StudentFiles(folder).config.unlink()  # as an interrupted save leaves it
        shipped(teacher, folder, kind)
        shipped(teacher, tmp_path / "new", kind)
        names = [{path.relative_to(own) for path in own.rglob("*")} for own in (folder, tmp_path / "new")]
        assert names[0] == names[1]
        assert SenseDictionary.load(folder).config == SenseDictionary.load(StudentFiles(folder).dictionary).config


def test_mismatches_are_refused_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s")
    config = (tmp_path / "s" / "config.json").read_bytes()
    unnamed = {"tokenizer_fingerprint": "", "teacher": {"name": "t"}}
    cases = [
        (make([1] * 25, **unnamed), {}, "does not match the student .*: it has dimension 3, not 16"),
        (make([1], 16, tokenizer_fingerprint="other"), {}, "it has tokenizer other, not "),
        (make([1] * dictionary.vocab_size, 16, **unnamed), {}, "the dictionary has no tokenizer"),
        (dictionary, {"senses": "int4"}, "invalid senses 'int4'"),
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


def other_dictionary(folder: Path) -> None:
    shutil.rmtree(folder)
    make([1] * 25).save(folder)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "other tokenizer": (lambda f: other_tokenizer(f / "tokenizer.json"), "not the student's tokenizer .*fingerprint"),
    "tokenizer outside": (lambda f: outside(f / "tokenizer.json"), "outside the student"),
    "no room for text": (
        lambda f: edit(StudentFiles(f).config, max_length=2),
        "adds 2 special tokens to a text|has max_length 2, but",
    ),
    "prompts": (
        lambda f: edit(f / "config_sentence_transformers.json", prompts={"a": 3}),
        r"prompts.a: .*valid string",
    ),
    "default prompt": (
        lambda f: edit(f / "config_sentence_transformers.json", default_prompt_name="none"),
        r"has no prompt 'none', its default_prompt_name: correct the name",
    ),
    "other dictionary": (
        lambda f: other_dictionary(StudentFiles(f).dictionary),
        "does not match the student .*: it has tokenizer",
    ),
    "dictionary outside": (
        lambda f: outside(StudentFiles(f).dictionary / "dictionary.safetensors"),
        "outside the dictionary",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_hostile_folders_are_refused(shipped_student: tuple, tmp_path: Path, case: str) -> None:
    spoil, match = SPOILT[case]
    shutil.copytree(shipped_student[3], tmp_path / "s")
    spoil(tmp_path / "s")
    if "dictionary" in case:  # is read on first use
        encoder = SenseEncoder.from_pretrained(tmp_path / "s")
        np.testing.assert_allclose(encoder.encode(TEXTS), shipped_student[0].encode(TEXTS), atol=1e-6)
    with pytest.raises((StudentError, DictionaryError), match=match):
        SenseEncoder.from_pretrained(tmp_path / "s").tokens("bank river the a cat")


def test_max_length_is_limited_by_the_positions(teacher: Path, tmp_path: Path) -> None:
    _, dictionary = shipped(teacher, tmp_path / "s")
    config = dictionary.config.model_copy(update={"max_length": 99})
    long = SenseDictionary(config, dictionary._arrays, dictionary.ragged.parts)
    lengths = [init_student(StudentSettings(kind=kind), long, str(teacher)).config.max_length for kind in KINDS]
    assert lengths == [99, 64]


def test_push_uploads_a_students_own_files_without_exemplars(
    shipped_student: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = MagicMock()
    api.return_value.upload_folder.return_value = "https://hub/commit"
    monkeypatch.setattr("huggingface_hub.HfApi", api)
    shutil.copytree(shipped_student[3], tmp_path / "s")
    own = StudentFiles(tmp_path / "s").config.parent.relative_to(tmp_path / "s")
    for name in ("training.json", "secret.txt", "evil.py", own / "dictionary/notes.json"):
        (tmp_path / "s" / name).write_text("{}")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.push_to_hub("me/student", private=True, token="hf_secret") == "https://hub/commit"
    dictionary = ("README.md", "config.json", "dictionary.safetensors", "tokenizer/tokenizer.json")
    files = [
        *("README.md", "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json"),
        *("tokenizer.json", *((own / "dictionary" / name).as_posix() for name in dictionary)),
    ]
    if encoder.config.kind == "layers:1":
        files += ["1_Pooling/config.json", "senses/config.json", "senses/head.safetensors"]
        files += ["sentence_bert_config.json", "tokenizer_config.json"]
    api.assert_called_with(token="hf_secret")
    api().create_repo.assert_called_with("me/student", private=True, exist_ok=True)
    uploaded = api().upload_folder.call_args.kwargs
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/student", tmp_path / "s")
    assert sorted(uploaded["allow_patterns"]) == sorted(files)
    encoder.push_to_hub("me/student", exemplars=True)
    uploaded = api().upload_folder.call_args.kwargs
    assert sorted(uploaded["allow_patterns"]) == sorted([*files, (own / "dictionary/exemplars.parquet").as_posix()])
    api().create_repo.side_effect = OSError("no route")
    with pytest.raises(MsenseError, match=r"cannot push to 'me/student' \(no route\): check the name") as refusal:
        encoder.push_to_hub("me/student", token="hf_secret")
    assert "hf_secret" not in str(refusal.value) + caplog.text
    outside(tmp_path / "s" / "README.md")
    with pytest.raises(StudentError, match="outside the student"):
        encoder.push_to_hub("me/student")


def test_student_loads_from_the_hub(shipped_student: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _, _, folder = shipped_student
    repository = tmp_path / "models--me--student"
    snapshot = repository / "snapshots" / "0123"
    requests: list[tuple] = []

    def download(name: str, revision: str, token: str, **_: object) -> str:
        """Lay out a student as the hub's cache does: links from the snapshot to blobs."""
        requests.append((name, revision, token))
        (repository / "blobs").mkdir(parents=True)
        for number, path in enumerate(p for p in folder.rglob("*") if p.is_file()):
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(shutil.copy(path, repository / "blobs" / str(number)))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    downloaded = SenseEncoder.from_pretrained("me/student", revision="v1", token="hf_secret")
    assert requests == [("me/student", "v1", "hf_secret")]
    np.testing.assert_array_equal(downloaded.encode(TEXTS), encoder.encode(TEXTS))
    assert downloaded.tokens("bank the river") == encoder.tokens("bank the river")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere"))
    with pytest.raises(StudentError, match="outside the student"):
        SenseEncoder.from_pretrained(snapshot)


def test_unavailable_student_is_an_error_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to https://user:pw@hub/x?token=1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(StudentError, match=r"cannot load student 'me/student': .*no route to https://hub/x") as refusal:
        SenseEncoder.from_pretrained("me/student")
    assert "token=" not in str(refusal.value)
    for name in (tmp_path / "nowhere", "/no/where", "./x", "a/b/c"):
        with pytest.raises(StudentError, match="no such folder: check the path"):
            SenseEncoder.from_pretrained(name)
    with pytest.raises(StudentError, match="is not a valid name"):
        student_folder("x" * 5000)


def test_encode_equals_the_module_in_any_order_and_batch(shipped_student: tuple) -> None:
    encoder, student, _, folder = shipped_student
    texts = [*TEXTS, LONG]
    expected = np.stack([one(student, ids_of(folder, text)) for text in texts])
    for batch_size in (1, 3, 32):
        vectors = encoder.encode(texts, batch_size=batch_size)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_allclose(encoder.encode([texts[i] for i in order]), expected[order], atol=1e-5)
    assert len(ids_of(folder, LONG)) == encoder.config.max_length == 24


def test_small_batches_change_nothing(
    shipped_student: tuple, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    encoder, *_ = shipped_student
    texts = [*TEXTS, LONG] * 9
    plain, replaced, tokens = encoder.encode(texts), encoder.encode(texts, replace="soft"), encoder.tokens(LONG)
    for name, value in {"_STATIC_TOKENS": 16, "_REPLACED": 16 * 30, "_CHUNK": 17}.items():
        monkeypatch.setattr(encoder_module, name, value)
    monkeypatch.setattr("msense.student.tokenizer._TEXTS_AT_A_TIME", 4)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 20)
    np.testing.assert_allclose(encoder.encode(texts), plain, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts, replace="soft", batch_size=3), replaced, atol=1e-5)
    assert [(t.token_id, t.sense) for t in encoder.tokens(LONG)] == [(t.token_id, t.sense) for t in tokens]
    assert capfd.readouterr().err == ""
    encoder.encode(texts, show_progress_bar=True)
    assert "encode" in capfd.readouterr().err


def test_shapes_and_types_are_those_of_sentence_transformers(shipped_student: tuple) -> None:
    encoder, *_ = shipped_student
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 16)
    assert encoder.encode([]).shape == encoder.encode([], replace="hard").shape == (0, 16)
    for single in (encoder.encode(TEXTS[0]), encoder.encode(TEXTS[0], convert_to_numpy=False).numpy()):
        np.testing.assert_allclose(single, vectors[0], atol=1e-5, strict=True)
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    np.testing.assert_array_equal(tensor.numpy(), vectors)
    tensor.requires_grad_()  # not an inference tensor
    rows = encoder.encode(TEXTS, convert_to_numpy=False)
    assert torch.equal(torch.stack(rows), tensor)
    unit = encoder.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(unit, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-6)
    assert np.isfinite(encoder.encode("")).all()


@pytest.mark.parametrize(("how", "temperature"), [("hard", None), ("soft", 1 / 3), ("soft", 2.0)])
def test_replaced_vectors_equal_the_dictionarys(shipped_student: tuple, how: str, temperature: float | None) -> None:
    encoder, student, dictionary, folder = shipped_student
    expected = np.stack([one(student, ids_of(folder, text), dictionary, temperature) for text in TEXTS])
    given = {} if temperature in (None, 1 / 3) else {"temperature": temperature}  # 1/3 is the default
    np.testing.assert_allclose(encoder.encode(TEXTS, replace=how, **given), expected, atol=1e-5)
    assert not np.allclose(expected, encoder.encode(TEXTS), atol=0.1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0]])
def test_pool_rows_equals_pool(how: str, normalize: bool, lengths: list[int]) -> None:
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    hidden = torch.randn(len(lengths), 5, 4, generator=torch.Generator().manual_seed(0))
    expected = pool(hidden, mask, how, normalize=normalize)
    torch.testing.assert_close(pool_rows(hidden[mask], torch.tensor(lengths), how, normalize=normalize), expected)


def test_tokens_known_by_hand(shipped_student: tuple) -> None:
    encoder, student, dictionary, folder = shipped_student
    text = "The bank , zzz running"
    tokens = encoder.tokens(text)
    assert [t.token for t in tokens] == ["the", "bank", ",", "[UNK]", "run", "##ning"]
    assert [text[t.start : t.end] for t in tokens] == ["The", "bank", ",", "zzz", "run", "ning"]
    ids = ids_of(folder, text)
    assert [t.token_id for t in tokens] == ids[1:-1].tolist()
    with torch.no_grad():
        senses = student(*pad_ids([ids])).senses[0, 1:-1]
    assert any(t.sense >= 0 for t in tokens)
    for token, embedding in zip(tokens, senses, strict=True):
        own = dictionary.senses(token.token_id).centroids
        if not len(own):
            assert (token.sense, token.probability, token.exemplar, token.likely) == (-1, 0.0, None, ())
            continue
        scores = -((own - embedding) ** 2).sum(1).double()
        shares = torch.softmax(scores / (20.0 / 3), dim=0)
        assert token.sense == int(scores.argmax())
        assert token.probability == pytest.approx(float(shares.max()), rel=1e-3)
        assert token.likely[0] == (token.sense, token.probability)
        assert [sense for sense, _ in token.likely] == scores.sort(descending=True, stable=True).indices[:8].tolist()
        for sense, probability in token.likely:
            assert probability == pytest.approx(float(shares[sense]), rel=1e-3, abs=1e-6)
        assert token.exemplar == f"a river [bank] of {token.token_id}.{token.sense}.0"
    assert encoder.tokens("") == []
    assert len(encoder.tokens(LONG)) == 22


@pytest.mark.parametrize("kind", KINDS)
def test_prompts(teacher: Path, tmp_path: Path, kind: str) -> None:
    shipped(teacher, tmp_path / "s", kind, prompt="the river ")
    encoder = SenseEncoder.from_pretrained(str(tmp_path / "s"))
    for prompt, given in (("the river ", {}), ("a cat ", {"prompt": "a cat "})):
        expected = encoder.encode([prompt + text for text in TEXTS], prompt="")
        np.testing.assert_allclose(encoder.encode(TEXTS, **given), expected, atol=1e-6)
    assert not np.allclose(encoder.encode(TEXTS, prompt=""), encoder.encode(TEXTS), atol=0.1)
    for tokens in (encoder.tokens("bank money"), encoder.tokens("bank money", prompt="")):
        assert [(t.token, t.start, t.end) for t in tokens] == [("bank", 0, 4), ("money", 5, 10)]


def test_named_prompts(teacher: Path, tmp_path: Path) -> None:
    shipped(teacher, tmp_path / "s")
    edit(tmp_path / "s" / "config_sentence_transformers.json", prompts={"query": "the cat ", "x": "a "})
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert (encoder.prompts, encoder.default_prompt_name) == ({"query": "the cat ", "x": "a "}, None)
    plain, query, x = (encoder.encode(TEXTS, prompt=prompt) for prompt in ("", "the cat ", "a "))
    np.testing.assert_array_equal(encoder.encode(TEXTS), plain)
    np.testing.assert_array_equal(encoder.encode(TEXTS, prompt_name="x"), x)
    np.testing.assert_array_equal(encoder.encode(TEXTS, prompt_name="document"), encoder.encode(TEXTS))
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), query)
    np.testing.assert_array_equal(encoder.encode_query(TEXTS, prompt="a "), x)
    np.testing.assert_array_equal(encoder.encode_document(TEXTS), plain)


def test_truncated_vectors(shipped_student: tuple) -> None:
    whole, short = shipped_student[0], SenseEncoder.from_pretrained(shipped_student[3], truncate_dim=5)
    vectors = whole.encode(TEXTS)
    np.testing.assert_array_equal(short.encode(TEXTS), vectors[:, :5])
    np.testing.assert_array_equal(whole.encode(TEXTS, truncate_dim=3), vectors[:, :3])
    np.testing.assert_array_equal(short.encode(TEXTS, truncate_dim=99), vectors)
    assert short.get_sentence_embedding_dimension() == short.get_embedding_dimension() == 5
    unit = short.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    with pytest.raises(InputError, match="invalid truncate_dim -1"):
        SenseEncoder.from_pretrained(shipped_student[3], truncate_dim=-1)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_encode_many_reads_few_chunks_ahead(shipped_student: tuple, num_workers: int, capfd: Any) -> None:
    encoder, read = shipped_student[0], []
    texts = [f"{text} cat" for text in TEXTS] * 20

    def read_texts() -> Iterator[str]:
        for text in texts:
            read.append(text)
            yield text

    parts = encoder.encode_many(read_texts(), chunk_size=7, num_workers=num_workers, show_progress_bar=True)
    first = next(parts)
    assert (len(first), len(read)) == (7, 7 * (1 if num_workers == 1 else num_workers + 1))
    vectors = np.concatenate([first, *parts])
    assert "encode" in capfd.readouterr().err
    np.testing.assert_allclose(vectors, encoder.encode(texts), atol=1e-5)
    assert [part.shape for part in encoder.encode_many(texts, chunk_size=100, truncate_dim=3)] == [(100, 3), (40, 3)]
    assert [part.dtype for part in encoder.encode_many(["a", "b"], precision="binary")] == [np.int8]
    for wrong, match in (
        ({"texts": "a"}, "texts has type str"),
        ({"chunk_size": 0}, "invalid chunk_size 0"),
        ({"num_workers": 0}, "invalid num_workers 0"),
        ({"precision": "int8"}, "the ranges of int8 and uint8 are those of all vectors"),
        ({"precision": "int4"}, "invalid precision 'int4'"),
        ({"batch_size": 0}, "invalid batch_size 0"),
        ({"chunk_size": 1 << 80}, "invalid chunk_size 12089"),
        ({"convert_to_tensor": True}, "encode_many yields arrays, and has no convert_to_tensor"),
        ({"texts": ["a", None]}, "text 1 has type NoneType"),
    ):
        with pytest.raises(InputError, match=match):
            encoder.encode_many(**{"texts": ["a"], **wrong})
    with pytest.raises(InputError, match="text 8 has type int"):
        list(encoder.encode_many(iter(["a"] * 8 + [3]), chunk_size=3, num_workers=num_workers))


def test_a_student_without_senses_replaces_nothing(teacher: Path, tmp_path: Path) -> None:
    shipped(teacher, tmp_path / "s", "table")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    for call in (lambda: encoder.encode([], replace="soft"), lambda: encoder.encode_many(["a"], replace="hard")):
        with pytest.raises(StudentError, match="a table knows no senses"):
            call()


def test_errors_number_the_texts_of_all_chunks(shipped_student: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msense.student.encoder._CHUNK", 3)
    for texts in (["a"] * 7 + [None], iter(["a"] * 7 + [None]), iter(["a"] * 7 + ["\ud800"])):
        with pytest.raises(InputError, match=r"^text 7 (has type NoneType|contains an unpaired surrogate)"):
            shipped_student[0].encode(texts)


@pytest.mark.parametrize("how", POOLINGS)
def test_passages_may_skip_different_numbers_of_tokens(how: str) -> None:
    torch.manual_seed(0)
    hidden, mask = (
        torch.randn(4, 5, 3),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]) > 0,
    )
    skip = torch.tensor([3, 0, 1, 2])  # of the last, all
    rows = [hidden[0, 3:], hidden[1, :3], hidden[2, 3:], torch.zeros(1, 3)]
    expected = {"mean": lambda row: row.mean(0), "cls": lambda row: row[0], "lasttoken": lambda row: row[-1]}[how]
    own = torch.stack([expected(row) for row in rows])
    torch.testing.assert_close(pool(hidden, mask, how, normalize=False, skip=skip), own)
    head = SentenceHead(how, normalize=True, skip=1)
    torch.testing.assert_close(head(hidden, mask, skip), torch.nn.functional.normalize(own, dim=1))


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_devices_that_are_not_there_are_refused(shipped_student: tuple, device: str) -> None:
    with pytest.raises(InputError, match=f"device '{device}'"):
        SenseEncoder.from_pretrained(shipped_student[3], device=device)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize(
    ("kind", "pooling"),
    [*((kind, pooling) for kind in ("static", "layers:1") for pooling in POOLINGS), ("table", "mean")],
)
def test_onnx_gives_the_same_vectors(
    make_teacher: Callable[..., Path], tmp_path: Path, kind: str, pooling: str, include_prompt: bool
) -> None:
    import onnxruntime

    teacher = make_teacher("bert", pooling=pooling)
    edit(teacher / "1_Pooling" / "config.json", include_prompt=include_prompt)
    student, _ = shipped(teacher, tmp_path / "s", kind, prompt="the river ")
    assert (student.config.pooling, student.config.include_prompt) == (pooling, include_prompt or kind == "table")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    before = encoder.encode(TEXTS)
    encoder.save_onnx(tmp_path / "s" / "onnx" / "model.onnx")
    np.testing.assert_array_equal(encoder.encode(TEXTS), before)
    session = onnxruntime.InferenceSession(str(tmp_path / "s" / "onnx" / "model.onnx"))
    for texts in (TEXTS, TEXTS[:1], [LONG, "a"], ["a cat"] * 3):
        ids, mask = pad_ids(encoder._reader.ids(texts, encoder.config.prompt))
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
        tokens, vectors = session.run(["token_embeddings", "sentence_embedding"], inputs)
        np.testing.assert_allclose(vectors, encoder.encode(texts), atol=1e-5)
        assert tokens.shape == (*ids.shape, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_is_the_teachers(make_teacher: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    student, _ = shipped(make_teacher("llama", pooling="lasttoken"), tmp_path / "s", kind)
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.config.pooling == "lasttoken"
    expected = np.stack([one(student, ids_of(tmp_path / "s", text)) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "lasttoken"])
def test_a_student_without_attention_pools_the_mean(make_teacher: Callable[..., Path], pooling: str) -> None:
    teacher = make_teacher("bert", pooling=pooling)
    expected = {
        ("static", "auto"): "mean",
        ("static", "teacher"): pooling,
        ("layers:1", "auto"): pooling,
        ("layers:1", "mean"): "mean",
        ("table", "auto"): "mean",
    }
    for (kind, own), found in expected.items():
        settings = StudentSettings(kind=kind, pooling=own)
        student = init_student(settings, dictionary_of(teacher, max_length=24), str(teacher))
        assert (student.config.pooling, student.sentence_head.pooling) == (found, found)


@pytest.mark.parametrize("kind", ["static", "layers:1", "table"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_two_bytes(teacher: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    from sentence_transformers import SentenceTransformer

    senses = "none" if kind == "table" else "float32"
    student, _ = shipped(teacher, tmp_path / "s", kind, senses)
    exact = SenseEncoder.from_pretrained(tmp_path / "s").encode(TEXTS)
    shipped(teacher, tmp_path / "half", kind, senses, dtype=dtype)
    sizes = [StudentFiles(tmp_path / name).weights.stat().st_size for name in ("s", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    vectors = SenseEncoder.from_pretrained(tmp_path / "half").encode(TEXTS)
    assert 0 < np.abs(vectors - exact).max() < 0.05 * np.abs(exact).max()
    assert StudentFiles(tmp_path / "half").portable == StudentFiles(tmp_path / "s").portable
    other = SentenceTransformer(str(tmp_path / "half"), trust_remote_code=kind == "static", device="cpu")
    np.testing.assert_allclose(other.encode(TEXTS), vectors, atol=0.1 * np.abs(exact).max())
    next(student.parameters()).data[0] = 1e6
    with pytest.raises(StudentError, match="float16 cannot hold"):
        save_pretrained(tmp_path / "large", student, SenseDictionary.load(tmp_path / "s-dictionary"), dtype="float16")


def test_dtypes(shipped_student: tuple) -> None:
    encoder, _, _, folder = shipped_student
    exact, rounded = encoder.encode(TEXTS), SenseEncoder.from_pretrained(folder, dtype="bfloat16")
    vectors = rounded.encode(TEXTS)
    assert vectors.dtype == np.float32
    if encoder.config.kind == "static":  # has no slow layers
        np.testing.assert_array_equal(vectors, exact)
    else:
        assert 1e-5 < np.abs(vectors - exact).max() < 0.1 * np.abs(exact).max()
    replaced = rounded.encode(TEXTS, replace="soft")
    np.testing.assert_allclose(replaced, encoder.encode(TEXTS, replace="soft"), atol=0.3)
    with pytest.raises(InputError, match=r"invalid dtype 'int4'"):
        SenseEncoder.from_pretrained(folder, dtype="int4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_of_torch_changes_nothing(shipped_student: tuple, dtype: torch.dtype) -> None:
    encoder, _, _, folder = shipped_student
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            for each in (encoder, SenseEncoder.from_pretrained(folder)):
                every = [each.encode(TEXTS), each.encode(TEXTS, replace="soft"), each.encode(TEXTS, replace="hard")]
                results.append((every, each.tokens(TEXTS[0])))
        finally:
            torch.set_default_dtype(torch.float32)
    for every, tokens in results:
        assert all(vectors.dtype == np.float32 for vectors in every)
        np.testing.assert_array_equal(every, results[0][0])
        assert tokens == results[0][1]


def test_texts_of_any_iterable_are_encoded(shipped_student: tuple) -> None:
    encoder, *_ = shipped_student
    expected = encoder.encode(["a cat", "money"])
    column = pd.Series(["a cat", "money"], index=[5, 6])
    for texts in (
        ("a cat", "money"),
        iter(["a cat", "money"]),
        np.array(["a cat", "money"]),
        column,
        column.to_dict().values(),
    ):
        np.testing.assert_array_equal(encoder.encode(texts), expected)
    np.testing.assert_allclose(encoder.encode(["a cat", "money"], batch_size=np.int64(1)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"texts": None}, "texts has type NoneType: give a str, or a list of them"),
        ({"texts": 3.5}, "texts has type float"),
        ({"texts": b"a"}, "texts has type bytes"),
        ({"texts": bytearray(b"a")}, "texts has type bytearray"),
        ({"texts": {"a": 1}}, "texts has type dict"),
        ({"texts": np.array("a")}, "texts has type ndarray"),
        ({"texts": pd.DataFrame({"text": ["a"]})}, "texts has type DataFrame"),
        ({"texts": ["a", None]}, "text 1 has type NoneType"),
        ({"texts": ["a", 1]}, "text 1 has type int: give a str"),
        ({"texts": ["\ud800"]}, "text 0 contains an unpaired surrogate: decode"),
        ({"prompt": 3}, "the prompt has type int"),
        ({"prompt": False}, "the prompt has type bool"),
        ({"prompt_name": ["query"]}, r"no prompt \['query'\]"),
        ({"batch_size": np.array([3])}, "invalid batch_size array"),
        ({"replace": "firm"}, "invalid replace 'firm'"),
        ({"batch_size": 0}, "invalid batch_size 0"),
        ({"batch_size": None}, "invalid batch_size None"),
        ({"truncate_dim": 0}, "invalid truncate_dim 0: use an integer from 1 to 2147483647"),
        ({"prompt_name": "none"}, r"no prompt 'none': use one of \(\), or give `prompt`"),
        ({"precision": "int4"}, "invalid precision 'int4'"),
        ({"precision": "int8"}, "one vector has no range for int8: encode several texts"),
        ({"replace": "soft", "temperature": 0}, "temperature is 0"),
        ({"replace": "soft", "temperature": "1"}, "temperature is '1'"),
    ],
)
def test_invalid_arguments_are_refused(shipped_student: tuple, arguments: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        shipped_student[0].encode(**{"texts": ["a"], **arguments})
