"""Students: padding never matters, layers are the teacher's, a static one starts at token means, folders are checked."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from students import dictionary_of, learnt
from tiny import make

from msense.config import BuildConfig
from msense.errors import BadInput, StudentError
from msense.pooling import pool
from msense.student import (
    StaticEncoder,
    Student,
    StudentConfig,
    StudentSettings,
    load_student,
    make_student,
    save_student,
)
from msense.student.config import StaticSizes, StudentFiles
from msense.student.static import confidence, token_means
from msense.teacher import Teacher, describe, pad_batch

MakeTeacher = Callable[..., Path]
TINY = {"units": 6, "window": 3}


def static(pooling: str = "mean", heads: str = "two", seed: int = 0, **config: object) -> Student:
    sizes = StaticSizes(units=6, window=5)
    told = {"kind": "static", "teacher": {"name": "t"}, "tokenizer_fingerprint": "", "dim": 4, "vocab_size": 9}
    student = learnt(Student(StudentConfig(**told, pooling=pooling, heads=heads, static=sizes, **config)), seed)
    generator = torch.Generator().manual_seed(seed)
    student.body.means.copy_(torch.randn(9, 4, generator=generator))
    student.body.confidence.copy_(torch.rand(9, generator=generator))
    return student


def padded(
    rows: list[list[int]], side: str = "right", pad: int = 0, more: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = pad_batch([np.array(row) for row in [*rows, [0] * (max(map(len, rows)) + more)]], pad, side)
    return torch.from_numpy(ids[:-1]).long(), torch.from_numpy(mask[:-1])


def run(student: Student, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        hidden, senses = student(ids, mask)
        return student.sentence(hidden, mask), hidden[mask], senses[mask]


texts = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=12), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=texts, pooling=st.sampled_from(["mean", "cls", "lasttoken"]), more=st.integers(0, 3), pad=st.integers(0, 8))
def test_padding_and_company_never_matter_to_a_static_student(
    rows: list[list[int]], pooling: str, more: int, pad: int
) -> None:
    student = static(pooling, normalize=True)
    want = [run(student, *padded([row])) for row in rows]
    for side in ("right", "left"):
        found = run(student, *padded(rows, side, pad, more))
        for a, b in zip(found, zip(*want, strict=True), strict=True):
            torch.testing.assert_close(a, torch.cat(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_padding_and_company_never_matter_to_layers_of_the_teacher(make_teacher: MakeTeacher, kind: str) -> None:
    folder = make_teacher(kind)
    student = make_student(StudentSettings(kind="layers:1"), dictionary_of(folder), str(folder)).eval()
    rows = [[2, 7, 5, 3], [2, 9, 3], [2, 6, 8, 10, 11, 3]]
    want = [run(student, *padded([row])) for row in rows]
    for side in ("right", "left"):
        for pad in (0, 9) if kind != "roberta" else (0,):
            found = run(student, *padded(rows, side, pad, more=2))
            for a, b in zip(found, zip(*want, strict=True), strict=True):
                torch.testing.assert_close(a, torch.cat(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "llama"])
def test_layers_are_the_teachers_own(make_teacher: MakeTeacher, kind: str) -> None:
    folder = make_teacher(kind)
    d = dictionary_of(folder)
    ids, mask = padded([[2, 7, 5, 3], [2, 9, 3]])
    teacher = Teacher(str(folder), revision=None, layer=-1, dtype="float32", device="cpu")
    want = teacher.embed(ids.numpy(), mask.numpy()).clone()
    every = make_student(StudentSettings(kind="layers:2"), d, str(folder)).eval()
    with torch.no_grad():
        hidden, senses = every(ids, mask)
    torch.testing.assert_close(hidden[mask], want[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(senses, hidden)  # the head begins as identity
    one = make_student(StudentSettings(kind="layers:1", heads="one"), d, str(folder)).eval()
    second = make_student(StudentSettings(kind="layers:0,1"), d, str(folder))
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in second.parameters())
    assert one.head is None
    if kind in ("bert", "roberta"):
        shallow = Teacher(str(folder), revision=None, layer=1, dtype="float32", device="cpu")
        with torch.no_grad():
            found = one(ids, mask).hidden[mask]
        torch.testing.assert_close(found, shallow.embed(ids.numpy(), mask.numpy())[mask], rtol=1e-4, atol=1e-5)
    every(ids, mask).senses[mask].square().sum().backward()
    assert all(p.grad is not None for p in every.parameters())  # data-parallel training asks for it


def test_layers_that_are_not_there_are_refused(make_teacher: MakeTeacher) -> None:
    from transformers import AlbertConfig, AlbertModel

    from msense.student.transformer import keep_layers

    folder = make_teacher("bert")
    d = dictionary_of(folder)
    for kind in ("layers:0", "layers:3", "layers:0,2", "layers:1,0", "layers:1,1"):
        with pytest.raises(StudentError, match="the teacher has 2 layers, 0 to 1: write layers:n with n from 1 to 2"):
            make_student(StudentSettings(kind=kind), d, str(folder))
    for kind in ("layers:", "layers:two", "layers:-1", "layers:1.5"):
        with pytest.raises(StudentError, match="cannot be read: write layers:2"):
            make_student(StudentSettings(kind=kind), d, str(folder))
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "vocab_size": 9,
    }
    with pytest.raises(StudentError, match="albert model has no list of its 3 layers"):
        keep_layers(AlbertModel(AlbertConfig(**sizes)), "layers:2")


def test_another_encoder_has_the_same_tokenizer_and_an_adaptor(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder, other, foreign = make_teacher("bert"), make_teacher("bert"), make_teacher("llama")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vocab = describe(str(folder), BuildConfig())[0].vocab_size
    small = BertModel(BertConfig(vocab_size=vocab, max_position_embeddings=64, **sizes))
    small.save_pretrained(other)
    d = dictionary_of(folder)
    student = make_student(StudentSettings(kind=str(other)), d, str(folder))
    ids, mask = padded([[2, 7, 5, 3], [2, 9, 3]])
    assert student(ids, mask).senses.shape == (2, 4, d.dim)
    assert (student.body.width, student.adaptor.out_features) == (8, 16)
    save_student(tmp_path, student)
    torch.testing.assert_close(run(load_student(tmp_path), ids, mask), run(student.eval(), ids, mask))
    with pytest.raises(StudentError, match=r"another tokenizer than teacher.*give an encoder of the same tokenizer"):
        make_student(StudentSettings(kind=str(foreign)), d, str(folder))
    with pytest.raises(StudentError, match=r"student 'no-such/model' cannot be had"):
        make_student(StudentSettings(kind="no-such/model"), d, str(folder))


def test_a_teacher_that_is_not_the_dictionarys_is_refused(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert")
    for wrong, name in (
        ({"tokenizer_fingerprint": "abc"}, "tokenizer"),
        ({"teacher": {"name": "t", "fingerprint": "abc"}}, "weights"),
    ):
        with pytest.raises(StudentError, match=f"not the dictionary's: its {name} is .*, not abc"):
            make_student(StudentSettings(kind="static"), dictionary_of(folder, **wrong), str(folder))
    for small, name in ((make([1] * 25, dim=3), "width"), (make([1, 2], dim=16), "vocabulary size")):
        object.__setattr__(small.config, "tokenizer_fingerprint", "")
        object.__setattr__(small.config.teacher, "fingerprint", "")
        with pytest.raises(StudentError, match=f"its {name} is"):
            make_student(StudentSettings(kind="static"), small, str(folder))
    maximum = make_teacher("bert", pooling="max_tokens")
    with pytest.raises(StudentError, match="pools by 'max_tokens', which no student does yet"):
        make_student(StudentSettings(kind="static"), dictionary_of(maximum), str(maximum))


def test_pooling_known_by_hand() -> None:
    hidden = torch.tensor([[[9.0, 9], [3, 0], [1, 4]], [[3, 0], [1, 4], [5, 5]]])
    mask = torch.tensor([[False, True, True], [True, True, False]])
    hidden[~mask] = torch.nan
    assert pool(hidden, mask, "mean", normalize=False).tolist() == [[2, 2], [2, 2]]
    assert pool(hidden, mask, "cls", normalize=False).tolist() == [[3, 0], [3, 0]]
    assert pool(hidden, mask, "lasttoken", normalize=False).tolist() == [[1, 4], [1, 4]]
    assert pool(hidden, mask, "cls", normalize=True).tolist() == [[1, 0], [1, 0]]


def test_token_means_known_by_hand() -> None:
    d = make([2, 0, 1, 0, 1], dim=2, dtype="float32")
    d.counts[:] = [1, 3, 5, 1000]
    d.centroids[:] = torch.tensor([[0.0, 4], [4, 0], [1, 1], [5, 1]])
    inputs = torch.tensor([[3.0], [2], [1], [2], [5]])  # the means are about (the input, 1)
    means = token_means(d, inputs)
    assert means[[0, 2, 4]].tolist() == [[3, 1], [1, 1], [5, 1]]
    assert means[1].tolist() == means[3].tolist()  # of the same input
    assert means[1].tolist() == pytest.approx([2, 1], abs=0.4)  # the mean of all is about (3.3, 1)
    alone = token_means(make([0, 0], dim=2), torch.zeros(2, 1))
    assert alone.tolist() == [[0, 0], [0, 0]]


def test_a_static_student_starts_at_the_token_means_and_unseen_tokens_stay(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert")
    d = dictionary_of(folder, excluded_token_ids=())
    seen = np.arange(d.vocab_size) % 3  # tokens 0, 3, 6, ... never
    student = make_student(StudentSettings(kind="static", **TINY), d, str(folder), seen=seen)
    ids, mask = padded([[3, 7, 5, 3], [6, 9, 4]])
    means = student.body.means.clone()
    hidden, senses = student(ids, mask)
    assert torch.equal(hidden[mask], means[ids[mask]])
    assert torch.equal(senses[mask], means[ids[mask]])
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    hidden[mask].square().sum().backward()
    optimizer.step()
    after = run(student, ids, mask)[1]
    stayed = (after == means[ids[mask]]).all(1)
    assert stayed.tolist() == (ids[mask] % 3 == 0).tolist()
    assert confidence(d, np.array([0, 5, 15]), 5.0).tolist() == [0, 0.5, 0.75]
    assert confidence(make([0, 1, 1], excluded_token_ids=(0,)), np.array([0, 5, 0]), 0.0).tolist() == [1, 1, 0]
    first, again = (make_student(StudentSettings(kind="static", **TINY), d, str(folder), seen=seen) for _ in range(2))
    assert torch.equal(first.body.taps, again.body.taps)  # random, but by seed


def test_settings_out_of_range_are_refused() -> None:
    for wrong, match in (
        ({"window": 4}, "512 units and a window of 4 tokens cannot be: .*an odd window"),
        ({"units": 0}, "0 units"),
        ({"stay": -1.0}, "stay is -1.0, but must be 0 or more"),
        ({"stay": float("nan")}, "stay is nan"),
        ({"heads": "three"}, "heads is 'three'"),
    ):
        with pytest.raises(StudentError, match=match):
            StudentSettings(**wrong)


rows_of = st.lists(st.lists(st.integers(0, 8), max_size=12), max_size=6)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows_of,
    pooling=st.sampled_from(["mean", "cls", "lasttoken"]),
    normalize=st.booleans(),
    heads=st.sampled_from(["two", "one"]),
    tokens=st.sampled_from([1, 7, 4096]),
    seed=st.integers(0, 3),
)
def test_fast_inference_is_the_module(
    rows: list[list[int]], pooling: str, normalize: bool, heads: str, tokens: int, seed: int
) -> None:
    student = static(pooling, heads, seed, normalize=normalize)
    encoder = StaticEncoder(student)
    ids, mask = padded([*rows, [1]])  # the last one for a batch without passages
    sentences, hidden, senses = (found.numpy() for found in run(student, ids, mask))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msense.student.static_inference.CHUNK_TOKENS", tokens)
        arrays = [np.array(row, np.int32) for row in rows]
        kept = [i for i, row in enumerate(rows) if row or pooling == "mean"]  # an empty one has no first token
        np.testing.assert_allclose(encoder.sentences(arrays)[kept], sentences[:-1][kept], atol=1e-5)
        found = encoder.tokens(arrays)
    np.testing.assert_allclose(found[0], hidden[:-1], atol=1e-5)
    np.testing.assert_allclose(found[1], senses[:-1], atol=1e-5)


def test_smaller_tables_are_near(make_teacher: MakeTeacher) -> None:
    student = static()
    rows = [np.array([1, 2, 3, 4]), np.array([8, 0, 5])]
    want = StaticEncoder(student).sentences(rows)
    for dtype, slack in (("bfloat16", 2e-2), ("int8", 5e-2)):
        found = StaticEncoder(student, dtype).sentences(rows)
        np.testing.assert_allclose(found, want, atol=slack)
        assert not np.array_equal(found, want)
    with pytest.raises(BadInput, match="token ids go from 1 to 9, but this student has the tokens 0 to 8"):
        StaticEncoder(student).sentences([np.array([1, 9])])
    folder = make_teacher("bert")
    layers = make_student(StudentSettings(kind="layers:1"), dictionary_of(folder), str(folder))
    with pytest.raises(StudentError, match="'layers:1' is a transformer: only a static one"):
        StaticEncoder(layers)


@pytest.mark.parametrize("kind", ["static", "bert", "roberta", "t5", "llama"])
def test_a_saved_student_is_the_same(make_teacher: MakeTeacher, kind: str, tmp_path: Path) -> None:
    folder = make_teacher("bert" if kind == "static" else kind)
    setting = StudentSettings(kind="static" if kind == "static" else "layers:1", **TINY)
    student = learnt(make_student(setting, dictionary_of(folder), str(folder)))
    save_student(tmp_path / "s", student)
    save_student(tmp_path / "s", student)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]
    again = load_student(tmp_path / "s")
    assert again.config == student.config
    ids, mask = padded([[2, 7, 5, 3], [2, 9, 3]], "left")
    for a, b in zip(run(again, ids, mask), run(student, ids, mask), strict=True):
        assert torch.equal(a, b)


def change(path: Path, **settings: object) -> None:
    config = json.loads(path.read_text())
    config.update(settings)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


@pytest.fixture
def saved(make_teacher: MakeTeacher, tmp_path: Path) -> StudentFiles:
    folder = make_teacher("bert")
    save_student(tmp_path / "s", make_student(StudentSettings(kind="layers:1"), dictionary_of(folder), str(folder)))
    return StudentFiles(tmp_path / "s")


STATIC = {"static": {"units": 4, "window": 3}}


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"format_version": "gone"}, "states no format_version"),
        ({"format_version": 2}, "format version 2, this msense reads 1"),
        ({"format_version": True}, "format version True"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"dim": 0}, "dim: Input should be greater than 0"),
        ({"dim": 1 << 40}, "dim: Input should be less than"),
        ({"dim": 17}, "does not fit config.json"),
        ({"pooling": "max"}, "pooling: Input should be"),
        ({"heads": "one"}, "head.bias is .* there, but should be nothing"),
        ({"body": None}, "either body or static"),
        (STATIC, "either body or static"),
        ({"static": {"units": 4, "window": 2}, "body": None}, "must be odd"),
        ({**STATIC, "body": None, "vocab_size": 1 << 21}, "does not fit config.json"),
        ({"body": {}}, "type 'None', which the installed transformers does not know"),
        ({"body": {"model_type": "../evil", "auto_map": {"AutoModel": "evil.Evil"}}}, "type '../evil', which"),
        ({"body.num_hidden_layers": 2}, "does not fit config.json"),
        ({"body.num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but its weights have"),
        ({"body.hidden_size": 1 << 15, "body.intermediate_size": 1 << 20}, "does not fit config.json"),
        ({"body.hidden_size": -4}, "does not make a student"),
        ({"body.hidden_size": "wide"}, "does not make a student"),
        ({"body.num_attention_heads": 7}, "does not make a student"),
    ],
)
def test_configs_nobody_vouches_for_are_refused(saved: StudentFiles, told: dict, match: str) -> None:
    config = json.loads(saved.config.read_text())
    for name, value in told.items():
        inside, _, key = name.rpartition(".")
        (config[inside] if inside else config)[key] = value
    saved.config.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))
    with pytest.raises(StudentError, match=match):
        load_student(saved.folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[]", "is not the config of a student"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"{" + b" " * (5 << 20) + b"}", "no student has such a file"),
    ],
    ids=["list", "cut", "deep", "bytes", "long"],
)
def test_configs_that_are_none_are_refused(saved: StudentFiles, content: bytes, match: str) -> None:
    saved.config.write_bytes(content)
    with pytest.raises(StudentError, match=match):
        load_student(saved.folder)


def test_weights_nobody_vouches_for_are_refused(saved: StudentFiles, tmp_path: Path) -> None:
    tensors = load_file(saved.weights)
    whole = saved.weights.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(StudentError, match=match):
            load_student(saved.folder)
        saved.weights.unlink(missing_ok=True)
        saved.weights.write_bytes(whole)

    saved.weights.unlink()
    refused("model.safetensors is missing")
    saved.weights.write_bytes(whole[:-9])
    refused("cut off or no safetensors file")
    saved.weights.write_bytes(b"PK\x03\x04 a pickle")
    refused("cut off or no safetensors file")
    saved.weights.unlink()
    os.mkfifo(saved.weights)
    refused("is no plain file")
    saved.weights.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    saved.weights.symlink_to(tmp_path / "elsewhere")
    refused("outside the student")
    for name, tensor, match in (
        ("head.weight", tensors["head.weight"].to(torch.int32), "holds numbers of type I32"),
        ("head.weight", tensors["head.weight"] / 0, "head.weight holds NaN or infinite numbers"),
        ("more", torch.zeros(2), "more is .* there, but should be nothing"),
    ):
        save_file({**tensors, name: tensor}, saved.weights)
        refused(match)
    load_student(saved.folder)
    saved.config.unlink()
    refused("config.json is missing")


def test_nothing_here_imports_ray() -> None:
    import subprocess
    import sys

    code = "import sys, msense; assert 'torch' not in sys.modules; import msense.losses, msense.student; "
    subprocess.run([sys.executable, "-c", code + "assert 'ray' not in sys.modules"], check=True)
