"""The layouts of saved students: what sentence-transformers, transformers and older versions of msense read and wrote."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import write_family
from safetensors.torch import load_file, save_file
from students import LONG, TEXTS, learnt, outside, shipped, write_old

from msense import SenseEncoder
from msense.errors import InputError, StudentError
from msense.student import Student, init_student, load_student, save_pretrained
from msense.student.config import StudentSettings
from msense.student.layout import StudentFiles
from msense.teacher.pooling import ProjectionConfig


@pytest.mark.parametrize("kind", ["static", "layers:1", "table"])
def test_older_students_still_load(teacher: Path, tmp_path: Path, kind: str) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", kind)
    write_old(tmp_path / "old", student, dictionary)
    path, modules = tmp_path / "old" / "config.json", tmp_path / "old" / "modules.json"
    config = json.loads(path.read_text())
    for added in ("prompt", "include_prompt", "skip", "projections", "truncate_dim", "truncation_side"):
        del config[added]
    path.write_text(json.dumps(config))
    encoder, new = (SenseEncoder.from_pretrained(tmp_path / name) for name in ("old", "s"))
    expected = encoder.encode([*TEXTS, LONG])
    np.testing.assert_allclose(expected, new.encode([*TEXTS, LONG]), atol=1e-6)
    if kind != "table":
        assert encoder.tokens(TEXTS[0]) == new.tokens(TEXTS[0])
    for name in ("msense.sentence_module", "msense.student.sentence_transformer"):
        modules.write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": f"{name}.SenseModule"}]))
        model = sentence_transformer(tmp_path / "old", trust_remote_code=True)
        np.testing.assert_allclose(model.encode([*TEXTS, LONG]), expected, atol=1e-5)
    save_pretrained(tmp_path / "old", student, dictionary)  # in the new layout, without the old files
    assert files_of(tmp_path / "old") == files_of(tmp_path / "s")


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sentence_transformer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=trust_remote_code, device="cpu")


PORTABLE = {
    "bert": {},
    "bert, cls, prompt": {"pooling": "cls_token", "prompt": "the river "},
    "roberta, last token": {"kind": "roberta", "pooling": "lasttoken"},
    "t5": {"kind": "t5"},
    "llama, prompt": {"kind": "llama", "prompt": "the river "},
}


@pytest.mark.parametrize("kind", ["layers:1", "table"])
@pytest.mark.parametrize("case", PORTABLE)
def test_students_open_in_sentence_transformers_without_a_flag(
    make_teacher: Callable[..., Path], tmp_path: Path, case: str, kind: str
) -> None:
    teacher = make_teacher(**{key: value for key, value in PORTABLE[case].items() if key != "prompt"})
    shipped(teacher, tmp_path / "s", kind, prompt=PORTABLE[case].get("prompt", ""))
    encoder, model = SenseEncoder.from_pretrained(tmp_path / "s"), sentence_transformer(tmp_path / "s")
    texts = [*TEXTS, LONG]
    expected = encoder.encode(texts)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
    for options in ({"prompt": ""}, {"prompt": "a cat "}, {"normalize_embeddings": True}, {"truncate_dim": 5}):
        np.testing.assert_allclose(model.encode(texts, **options), encoder.encode(texts, **options), atol=1e-5)
    for name in ("encode_query", "encode_document"):
        np.testing.assert_allclose(getattr(model, name)(texts), getattr(encoder, name)(texts), atol=1e-5)
    np.testing.assert_allclose(model.encode(""), encoder.encode(""), atol=1e-5)
    assert model.get_embedding_dimension() == encoder.get_sentence_embedding_dimension() == 16
    assert model.max_seq_length == encoder.max_seq_length == (24 if kind == "layers:1" else math.inf)
    model.save_pretrained(str(tmp_path / "again"))
    with pytest.raises(
        StudentError, match=r"sentence-transformers copies only its own files .*copy the folder senses/"
    ):
        SenseEncoder.from_pretrained(tmp_path / "again")
    shutil.copytree(tmp_path / "s" / "senses", tmp_path / "again" / "senses")
    again = SenseEncoder.from_pretrained(tmp_path / "again")
    np.testing.assert_allclose(again.encode(texts), expected, atol=1e-5)
    if kind == "layers:1":
        assert again.tokens(TEXTS[0]) == encoder.tokens(TEXTS[0])
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize(
    ("kind", "file", "changes", "match"),
    [
        ("layers:1", "sentence_bert_config.json", {"max_seq_length": 6}, "max_length 24, .* beside it 6"),
        (
            "layers:1",
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            "cls",
        ),
        ("layers:1", "1_Pooling/config.json", {"include_prompt": False}, "include_prompt True, .* beside it False"),
        ("layers:1", "modules.json", "Normalize", "normalization False, .* beside it True"),
        ("table", "modules.json", "Normalize", "normalization False, .* beside it True"),
        ("table", "modules.json", "Dense", "layers after pooling 0, .* beside it 1"),
    ],
)
def test_settings_that_only_one_reader_would_see_are_refused(
    make_teacher: Callable[..., Path], tmp_path: Path, kind: str, file: str, changes: Any, match: str
) -> None:
    shipped(make_teacher("bert", pooling="mean_tokens"), tmp_path / "s", kind, prompt="the river ")
    path = tmp_path / "s" / file
    content = json.loads(path.read_text())
    if isinstance(changes, str):
        content.append({"idx": 9, "name": "9", "path": "", "type": f"sentence_transformers.models.{changes}"})
    else:
        content |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(StudentError, match=match):
        SenseEncoder.from_pretrained(tmp_path / "s")


def test_transformers_reads_the_body_and_weights_are_stored_once(teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    student, _ = shipped(teacher, tmp_path / "s", "layers:1", senses="none")
    body = AutoModel.from_pretrained(tmp_path / "s")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "s")(TEXTS, padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = student(inputs["input_ids"], mask).hidden
        torch.testing.assert_close(body(**inputs).last_hidden_state[mask], expected[mask], atol=1e-5, rtol=0)
    sizes = [path.stat().st_size for path in (tmp_path / "s").rglob("*.safetensors")]
    assert sum(sizes) < 4 * sum(p.numel() for p in student.parameters()) + 4096 * len(sizes)


def test_adaptor_projections_and_normalization_are_modules(make_teacher: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder, other = make_teacher("bert"), make_teacher("bert")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=25, max_position_embeddings=64, **sizes)).save_pretrained(other)
    layers = [{"in_features": 16, "out_features": 12}, {"in_features": 12, "out_features": 6, "activation": "Identity"}]
    layers[0] |= {"residual": True, "bias": False}
    _, dictionary = shipped(folder, tmp_path / "whole", str(other))
    for kind, modules in (
        (str(other), ["Transformer", "Pooling", "Dense", "Dense", "Dense", "Normalize"]),
        ("table", ["StaticEmbedding", "Dense", "Dense", "Normalize"]),
    ):
        plain = init_student(StudentSettings(kind=kind), dictionary, str(folder))
        config = plain.config.model_copy(
            update={"projections": tuple(ProjectionConfig(**layer) for layer in layers), "normalize": True}
        )
        student = learnt(Student(config.model_copy(update={"truncate_dim": 5})))
        save_pretrained(tmp_path / "s", student, dictionary)
        encoder, model = SenseEncoder.from_pretrained(tmp_path / "s"), sentence_transformer(tmp_path / "s")
        assert [type(module).__name__ for module in model] == modules
        assert encoder.encode(TEXTS).shape == (len(TEXTS), 5)
        np.testing.assert_allclose(model.encode([*TEXTS, LONG]), encoder.encode([*TEXTS, LONG]), atol=1e-5)
    save_pretrained(tmp_path / "s", plain, dictionary, senses="none")  # replaces it
    assert not list((tmp_path / "s").glob("*_Dense/*"))


def test_families_that_read_padding_keep_the_class_of_msense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_family(tmp_path / "teacher", "fnet")
    shipped(tmp_path / "teacher", tmp_path / "s", "layers:1")
    for text in (caplog.text, (tmp_path / "s" / "README.md").read_text()):
        assert "a fnet model reads padding" in text
    assert not {"1_Pooling/config.json", "sentence_bert_config.json", "tokenizer_config.json"} & files_of(
        tmp_path / "s"
    )
    expected = SenseEncoder.from_pretrained(tmp_path / "s").encode(TEXTS)
    model = sentence_transformer(tmp_path / "s", trust_remote_code=True)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)


def test_static_students_need_the_flag_and_keep_their_senses(teacher: Path, tmp_path: Path) -> None:
    shipped(teacher, tmp_path / "s", "static", prompt="the river ")
    card = (tmp_path / "s" / "README.md").read_text()
    assert "because a static student is a convolution and an MLP over token embeddings" in " ".join(card.split())
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    model = sentence_transformer(tmp_path / "s", trust_remote_code=True)
    texts = [*TEXTS, LONG]
    expected = encoder.encode(texts)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(texts, prompt=""), encoder.encode(texts, prompt=""), atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS[0]), expected[0], atol=1e-5)
    assert (model.get_embedding_dimension(), model.max_seq_length) == (16, 24)
    model.save_pretrained(str(tmp_path / "again"))
    again = SenseEncoder.from_pretrained(tmp_path / "again")
    np.testing.assert_allclose(again.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(
        sentence_transformer(tmp_path / "again", trust_remote_code=True).encode(texts), expected, atol=1e-5
    )
    assert again.tokens(TEXTS[0]) == encoder.tokens(TEXTS[0])
    assert not list(tmp_path.rglob("*.py"))
    shutil.rmtree(tmp_path / "s" / "dictionary")
    model.save_pretrained(str(tmp_path / "again"))
    assert not (tmp_path / "again" / "dictionary").exists()  # never that of another student


def test_sentence_transformers_truncates_to_max_seq_length(teacher: Path, tmp_path: Path) -> None:
    shipped(teacher, tmp_path / "s", "static")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    model = sentence_transformer(tmp_path / "s", trust_remote_code=True)
    model.max_seq_length = 5
    short, long = "the river bank", "the river bank near money"
    np.testing.assert_allclose(model.encode([long, short]), encoder.encode([short, short]), atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    again = sentence_transformer(tmp_path / "again", trust_remote_code=True)
    assert again.max_seq_length == 5
    np.testing.assert_allclose(again.encode(long), encoder.encode(short), atol=1e-5)
    for wrong in (2, 25):
        with pytest.raises(InputError, match=f"invalid max_seq_length {wrong}: use 3 to 24"):
            model.max_seq_length = wrong


def test_sentence_transformers_uses_the_fast_path_of_static_students(teacher: Path, tmp_path: Path) -> None:
    shipped(teacher, tmp_path / "s", "static")
    model = sentence_transformer(tmp_path / "s", trust_remote_code=True)
    features = model.preprocess([*TEXTS, LONG])
    trained = model(features)  # with gradients: the module itself
    assert trained["sentence_embedding"].requires_grad
    model.eval()
    with torch.no_grad():
        fast = model(features)
        assert callable(fast.data["token_embeddings"])  # not computed yet
        model[0].student.body.means.add_(1.0)
        changed = model(features)["sentence_embedding"]
        model.train()
        slow = model(features)["sentence_embedding"]
    torch.testing.assert_close(fast["sentence_embedding"], trained["sentence_embedding"].detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(changed, slow, atol=1e-5, rtol=0)
    assert not torch.allclose(changed, fast["sentence_embedding"], atol=0.1)
    tokens = sentence_transformer(tmp_path / "s", trust_remote_code=True).encode(TEXTS, output_value="token_embeddings")
    for actual, expected in zip(tokens, trained["token_embeddings"], strict=False):
        torch.testing.assert_close(actual, expected[: len(actual)].detach())


@pytest.fixture(scope="module")
def portable(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable")
    for kind in ("layers:1", "table"):
        shipped(teacher, folder / kind[:5], kind, senses="none")
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, **changes: object) -> None:
    save_file(load_file(path) | changes, path)


HOSTILE: dict[str, tuple[str, Callable[[StudentFiles], object], str]] = {
    "body not JSON": ("layer", lambda f: f.body_config.write_text("{"), "config.json is not JSON"),
    "body a list": ("layer", lambda f: f.body_config.write_text("[1]"), "is not the config of a transformer"),
    "body nested": ("layer", lambda f: f.body_config.write_text("[" * 10**5), "config.json is not JSON"),
    "body missing": ("layer", lambda f: f.body_config.unlink(), "config.json is missing"),
    "body outside": ("layer", lambda f: outside(f.body_config), "outside the student"),
    "body unknown": ("layer", lambda f: edit(f.body_config, model_type="../evil"), "unknown model type '../evil'"),
    "many layers": ("layer", lambda f: edit(f.body_config, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "other layers": ("layer", lambda f: edit(f.body_config, num_hidden_layers=2), "does not match config.json"),
    "no sense head": ("layer", lambda f: f.head.unlink(), "head.safetensors is missing"),
    "sense head outside": (
        "layer",
        lambda f: (f.head.rename(f.folder.parent / "head"), f.head.symlink_to(f.folder.parent / "head")),
        "outside the student",
    ),
    "sense head": ("layer", lambda f: change_tensors(f.head, weight=torch.zeros(2)), r"weight has shape \(2,\)"),
    "NaN": (
        "layer",
        lambda f: change_tensors(f.head, bias=torch.full((16,), math.nan)),
        "bias has values that are NaN",
    ),
    "more": ("layer", lambda f: change_tensors(f.weights, more=torch.zeros(2)), r"more has shape .*expected None"),
    "pipe": ("layer", lambda f: (f.weights.unlink(), os.mkfifo(f.weights)), "model.safetensors"),
    "pickle": ("table", lambda f: f.weights.write_bytes(b"PK\x03\x04 a pickle"), "not a safetensors file"),
    "many rows": (
        "table",
        lambda f: change_tensors(f.weights, **{"embedding.weight": torch.zeros(99, 16)}),
        r"embedding.weight has shape \(99, 16\)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused(portable: Path, tmp_path: Path, case: str) -> None:
    kind, spoil, match = HOSTILE[case]
    shutil.copytree(portable / kind, tmp_path / "s")
    load_student(tmp_path / "s")
    spoil(StudentFiles(tmp_path / "s"))
    with pytest.raises(StudentError, match=match):
        load_student(tmp_path / "s")


def test_rows_of_tokens_that_no_text_has_are_not_stored(teacher: Path, tmp_path: Path) -> None:
    student, dictionary = shipped(teacher, tmp_path / "s", "table", senses="none")
    path = tmp_path / "s" / "model.safetensors"
    weight = load_file(path)["embedding.weight"]
    save_file({"embedding.weight": weight[:-2].clone()}, path)
    table = load_student(tmp_path / "s").body.means
    assert torch.equal(table[:-2], student.body.table()[:-2])
    assert not table[-2:].any()
    assert len(table) == dictionary.vocab_size
