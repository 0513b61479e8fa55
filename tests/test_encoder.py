"""Shipped students as encoders: the module's own numbers in any order and company, senses by hand, folders checked."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from students import KINDS, LONG, TEXTS, ids_of, one, shipped

from msense import SenseEncoder
from msense import encoder as encoder_module
from msense.errors import BadInput
from msense.pooling import POOLINGS, pool, pool_rows
from msense.student import Student
from msense.student.tokenizer import padded


def test_encode_is_the_module_in_any_order_and_company(shipped_student: tuple) -> None:
    encoder, student, _, folder = shipped_student
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
    shipped_student: tuple, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    encoder, *_ = shipped_student
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


def test_shapes_and_types_are_those_of_sentence_transformers(shipped_student: tuple) -> None:
    encoder, *_ = shipped_student
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
def test_replaced_vectors_are_those_of_the_dictionary(
    shipped_student: tuple, how: str, temperature: float | None
) -> None:
    encoder, student, dictionary, folder = shipped_student
    want = np.stack([one(student, ids_of(folder, text), dictionary, temperature) for text in TEXTS])
    told = {} if temperature in (None, 1 / 3) else {"temperature": temperature}
    np.testing.assert_allclose(encoder.encode(TEXTS, replace=how, **told), want, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[2], replace=how, **told), want[2], atol=1e-5)
    assert not np.allclose(want, encoder.encode(TEXTS), atol=0.1)
    assert encoder.encode([], replace=how).shape == (0, 16)


def test_batches_replaced_together_or_one_by_one_are_the_same(
    shipped_student: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, *_ = shipped_student
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


def test_tokens_known_by_hand(shipped_student: tuple) -> None:
    encoder, student, dictionary, folder = shipped_student
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


def test_tokens_of_many_senses_are_weighed_in_pieces(shipped_student: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, *_ = shipped_student
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


def test_dtypes(shipped_student: tuple) -> None:
    encoder, _, _, folder = shipped_student
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


def test_wrong_arguments_are_refused(shipped_student: tuple) -> None:
    encoder, *_ = shipped_student
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


def test_it_is_imported_when_asked_for_and_without_ray() -> None:
    code = (
        "import sys, msense; assert 'torch' not in sys.modules and 'ray' not in sys.modules; "
        "from msense import SenseEncoder; assert 'ray' not in sys.modules; assert 'sentence_transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
