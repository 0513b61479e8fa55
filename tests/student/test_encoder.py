"""SenseEncoder: the module's outputs in any order and batch, senses known by hand, invalid arguments."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from students import KINDS, LONG, TEXTS, ids_of, one, shipped

from msense import SenseEncoder
from msense.errors import InputError
from msense.student import encoder as encoder_module
from msense.student.tokenizer import pad_ids
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.pooling import POOLINGS, pool, pool_rows


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
    assert not np.allclose(expected[0], expected[3], atol=0.1)
    assert len(ids_of(folder, LONG)) == encoder.config.max_length == 24


def test_small_batches_change_nothing(
    shipped_student: tuple, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    encoder, *_ = shipped_student
    texts = [*TEXTS, LONG] * 9
    plain, replaced, tokens = encoder.encode(texts), encoder.encode(texts, replace="soft"), encoder.tokens(LONG)
    for name, value in {"_STATIC_TOKENS": 16, "_REPLACED": 16 * 30}.items():
        monkeypatch.setattr(encoder_module, name, value)
    monkeypatch.setattr("msense.student.tokenizer._TEXTS_AT_A_TIME", 4)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 20)
    np.testing.assert_allclose(encoder.encode(texts), plain, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts, replace="soft", batch_size=3), replaced, atol=1e-5)
    for a, b in zip(encoder.tokens(LONG), tokens, strict=True):
        assert (a.token_id, a.sense, a.exemplar) == (b.token_id, b.sense, b.exemplar)
        assert a.probability == pytest.approx(b.probability, rel=1e-4)
    assert capfd.readouterr().err == ""
    encoder.encode(texts, show_progress_bar=True)
    printed = capfd.readouterr()
    assert "encode" in printed.err
    assert printed.out == ""


def test_shapes_and_types_are_those_of_sentence_transformers(shipped_student: tuple) -> None:
    encoder, *_ = shipped_student
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 16)
    assert encoder.encode([]).shape == encoder.encode([], replace="hard").shape == (0, 16)
    assert encoder.encode([], convert_to_tensor=True).shape == (0, 16)
    for single in (encoder.encode(TEXTS[0]), encoder.encode(TEXTS[0], convert_to_numpy=False).numpy()):
        assert single.shape == (16,)
        np.testing.assert_allclose(single, vectors[0], atol=1e-5)
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    np.testing.assert_array_equal(tensor.numpy(), vectors)
    tensor.requires_grad_()  # not an inference tensor
    rows = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(rows, list)
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
    np.testing.assert_allclose(encoder.encode(TEXTS[2], replace=how, **given), expected[2], atol=1e-5)
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


@pytest.mark.parametrize("kind", KINDS)
def test_prompts(teacher: Path, tmp_path: Path, kind: str) -> None:
    shipped(teacher, tmp_path / "s", kind, prompt="the river ")
    encoder = SenseEncoder.from_pretrained(str(tmp_path / "s"))
    for prompt, given in (("the river ", {}), ("a cat ", {"prompt": "a cat "})):
        expected = encoder.encode([prompt + text for text in TEXTS], prompt="")
        np.testing.assert_allclose(encoder.encode(TEXTS, **given), expected, atol=1e-6)
    assert not np.allclose(encoder.encode(TEXTS, prompt=""), encoder.encode(TEXTS), atol=0.1)
    for given in ({}, {"prompt": ""}):
        tokens = encoder.tokens("bank money", **given)
        assert [(t.token, t.start, t.end) for t in tokens] == [("bank", 0, 4), ("money", 5, 10)]


@pytest.mark.parametrize("pooling", ["cls", "lasttoken"])
def test_other_poolings(make_teacher: Callable[..., Path], tmp_path: Path, pooling: str) -> None:
    teacher = make_teacher("llama", pooling=pooling + ("_token" if pooling == "cls" else ""))
    for kind in KINDS:
        student, _ = shipped(teacher, tmp_path / kind, kind)
        encoder = SenseEncoder.from_pretrained(tmp_path / kind)
        assert encoder.config.pooling == pooling
        expected = np.stack([one(student, ids_of(tmp_path / kind, text)) for text in TEXTS])
        np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)


def test_dtypes(shipped_student: tuple) -> None:
    encoder, _, _, folder = shipped_student
    exact = encoder.encode(TEXTS)
    if encoder.config.kind == "static" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        rounded = SenseEncoder.from_pretrained(folder, dtype="bfloat16")
        vectors = rounded.encode(TEXTS)
        assert vectors.dtype == np.float32
        assert 1e-5 < np.abs(vectors - exact).max() < 0.1 * np.abs(exact).max()
        replaced = rounded.encode(TEXTS, replace="soft")
        np.testing.assert_allclose(replaced, encoder.encode(TEXTS, replace="soft"), atol=0.3)
    else:
        with pytest.raises(InputError, match="does not support bfloat16: use dtype='float32'"):
            SenseEncoder.from_pretrained(folder, dtype="bfloat16")
    with pytest.raises(InputError, match=r"invalid dtype 'int4'"):
        SenseEncoder.from_pretrained(folder, dtype="int4")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"texts": [1]}, "text 0 has type int: give a str"),
        ({"texts": ["a", None]}, "text 1 has type NoneType"),
        ({"texts": ["\ud800"]}, "text 0 contains an unpaired surrogate: decode"),
        ({"prompt": 3}, "the prompt has type int"),
        ({"replace": "firm"}, "invalid replace 'firm'"),
        ({"batch_size": 0}, "invalid batch_size 0"),
        ({"replace": "soft", "temperature": 0}, "temperature"),
    ],
)
def test_invalid_arguments_are_refused(shipped_student: tuple, arguments: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        shipped_student[0].encode(**{"texts": ["a"], **arguments})


def test_imports_are_lazy_and_without_ray() -> None:
    code = (
        "import sys, msense; assert not {'torch', 'ray'} & {*sys.modules}; "
        "from msense import SenseEncoder; assert not {'ray', 'sentence_transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
