"""The teacher: settings of its folder, special-token rules, batching, and hidden states unaffected by padding."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import sweep, write_family
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from msense.config.build import BuildConfig
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.io.untrusted import check_model_settings
from msense.teacher import body, fingerprint
from msense.teacher.batching import pad_batch, token_batches
from msense.teacher.body import resolve_dtype
from msense.teacher.model import Teacher
from msense.teacher.spec import TeacherInfo, load_teacher_info

MakeTeacher = Callable[..., Path]


def load(folder: Path, layer: int = -1) -> Teacher:
    return Teacher(str(folder), revision=None, layer=layer, dtype="float32", device="cpu")


def info_of(folder: Path, **config: object) -> TeacherInfo:
    return load_teacher_info(str(folder), BuildConfig(**config))[0]


def test_demo_teacher_has_its_own_settings() -> None:
    info, tokenizer = load_teacher_info(DEMO_TEACHER, BuildConfig())
    assert (info.dim, info.vocab_size, info.max_length, info.pooling, info.normalize) == (384, 30522, 256, "mean", True)
    assert (info.prefix, info.suffix, info.excluded) == ((101,), (102,), (0,))
    assert len(tokenizer.encode("word " * 600).ids) == 602  # the truncation in tokenizer.json is disabled


def test_special_tokens_by_rule_and_teacher(make_teacher: MakeTeacher) -> None:
    teachers = make_teacher("bert"), make_teacher("bert", pooling="cls_token"), make_teacher("llama")
    assert [info_of(f).pooling for f in teachers] == ["mean", "cls", "mean"]
    for rule, excluded in (
        ("auto", [(0,), (0, 2, 3), (0, 2)]),
        ("include", [(0,), (0,), (0,)]),
        ("exclude", [(0, 2, 3), (0, 2, 3), (0, 2)]),
    ):
        assert [info_of(folder, special_tokens=rule).excluded for folder in teachers] == excluded


def test_prompt_comes_from_the_teacher_or_the_config(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert", pooling="mean_tokens", prompt="the bank")
    info, tokenizer = load_teacher_info(str(folder), BuildConfig())
    assert tokenizer.decode(list(info.prompt_ids)) == "the bank"
    assert info_of(folder, prompt="").prompt_ids == ()


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_invalid_settings_and_folders_are_refused(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    folder = make_teacher("bert", pooling="mean_tokens")
    for place, config, match in (
        (folder, {"layer": 3}, r"layer 3 does not exist: give --layer 0 \(embeddings\) to 2"),
        (folder, {"max_length": 65}, "max_length 65 exceeds the 64 tokens"),
        (Path("no-such/teacher"), {}, r"cannot load teacher 'no-such/teacher'.*check the name"),
        (tmp_path, {}, "has no safetensors weights"),
    ):
        with pytest.raises(InputError, match=match):
            info_of(place, **config)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Transformer", "path": "../../etc"}])
    )
    with pytest.raises(InputError, match="outside the teacher"):
        info_of(folder)
    (folder / "modules.json").unlink()
    change_json(folder / "config.json", vocab_size=10)
    with pytest.raises(InputError, match=r"has token 24 .*, but the model only 10 embeddings"):
        info_of(folder)


def test_corrupted_or_foreign_weights_and_tokenizers_are_refused(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"cannot load teacher .*safetensors"):
        load(folder)
    shutil.copy(make_teacher("llama") / "model.safetensors", weights)
    with pytest.raises(InputError, match=r"lack \d+ tensors of the model"):
        load(folder)
    weights.write_bytes(whole)
    definition = json.loads((folder / "tokenizer.json").read_text())
    del definition["post_processor"]["special_tokens"]["[CLS]"]  # its template refers to it: the Rust library panics
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=r"\(tokenizer\): no entry found for key"):
        info_of(folder)


def test_fingerprint_depends_on_the_weights_only(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert")
    before = info_of(folder).fingerprint
    assert info_of(folder, layer=1).fingerprint == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert info_of(folder).fingerprint != before


def test_large_weights_are_hashed_once_until_they_change(
    make_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_teacher("bert")
    expected = fingerprint.weights_fingerprint(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "HASHED_ALWAYS", 0)
    hashed = []
    real = fingerprint._hash
    monkeypatch.setattr(fingerprint, "_hash", lambda paths: hashed.append(1) or real(paths))
    assert [fingerprint.weights_fingerprint(folder) for _ in range(2)] == [expected] * 2
    assert len(hashed) == 2  # files of this second may change again within a tick of the clock
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    assert [fingerprint.weights_fingerprint(folder) for _ in range(3)] == [expected] * 3
    assert len(hashed) == 3
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, (1e9, 1e9))  # same size and time
    assert fingerprint.weights_fingerprint(folder) != expected
    for kept in (tmp_path / "cache" / "msense" / "fingerprints").glob("*[!k]"):
        kept.write_text("0" * 63 + "g")  # damaged
    shutil.copyfile(make_teacher("bert") / "model.safetensors", weights)
    assert fingerprint.weights_fingerprint(folder) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # not a folder
    assert fingerprint.weights_fingerprint(folder) == expected


def test_layers_are_those_of_transformers(make_teacher: MakeTeacher) -> None:

    folder = make_teacher("llama")
    ids, mask = pad_batch([np.array([2, 5, 6, 7])])
    model = AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        states = model(input_ids=torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states
    for layer in (0, 1, 2, -1, -2):
        np.testing.assert_allclose(load(folder, layer).embed(ids, mask).numpy(), states[layer].numpy(), atol=1e-6)
    table = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(load(folder, 0).embed(ids, mask).numpy()[0], table[ids[0]])


def test_positions_are_as_exact_as_in_transformers(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama")
    teacher = Teacher(str(folder), revision=None, layer=-1, dtype="bfloat16", device="cpu")
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    buffers = dict(teacher.engine.module.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], own) for name, own in model.named_buffers())
    assert {p.dtype for p in teacher.engine.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["bert", "llama", "roberta", "t5"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_embedding(make_teacher: MakeTeacher, kind: str, side: str) -> None:
    teacher = load(make_teacher(kind))
    short, long = np.array([2, 5, 6]), np.array([2, 8, 9, 10, 11, 12, 5])
    ids, mask = pad_batch([short, long], side=side)
    assert mask.sum(1).tolist() == [3, 7]
    assert mask[0].tolist() == ([True] * 3 + [False] * 4 if side == "right" else [False] * 4 + [True] * 3)
    alone = teacher.embed(*pad_batch([short]))[0].numpy()
    np.testing.assert_allclose(teacher.embed(ids, mask)[0].numpy()[mask[0]], alone, atol=1e-5)
    assert np.abs(alone[1] - alone[2]).max() > 1e-3
    junk, _ = pad_batch([short, long], pad=7, side=side)
    np.testing.assert_allclose(teacher.embed(junk, mask)[0].numpy()[mask[0]], alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "lilt", "convbert", "qwen3", "apertus", "fsmt", "git"])
def test_a_family_is_read_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    """Of the slow test of all families, those that differ most in positions, padding, settings and shapes of weights."""
    outcome = sweep(kind, tmp_path)
    assert (outcome.teacher, outcome.student) == ("right", "right"), outcome
    assert outcome.opened.partition(":")[0] == ("flag" if kind in ("convbert", "fsmt", "git") else "right"), outcome
    assert outcome.batch == ("by length" if kind == "convbert" else "right"), outcome


def test_an_unknown_model_that_reads_padding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_family(tmp_path, "convbert")
    monkeypatch.setattr(body, "NEEDS_EQUAL_LENGTHS", frozenset())
    with pytest.raises(InputError, match="vectors of a text change with the other texts of its batch"):
        load(folder)


def test_a_model_that_reads_more_than_text_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "bros")
    with pytest.raises(InputError, match="is a bros model, which needs the place of every token on a page"):
        info_of(folder)
    with pytest.raises(InputError, match=r"cannot read text alone .*bbox"):
        load(folder)


@pytest.mark.parametrize("layer", [1, -1])
def test_texts_of_one_length_are_run_without_padding(tmp_path: Path, layer: int) -> None:
    teacher = load(write_family(tmp_path, "convbert"), layer)
    rows = [np.arange(4, 4 + n) for n in (5, 3, 5, 1, 0)]
    for side in ("right", "left"):
        ids, mask = pad_batch(rows, side=side)
        hidden = teacher.embed(ids, mask)
        for row, own, real in zip(rows[:-1], hidden, mask, strict=False):
            torch.testing.assert_close(own[torch.from_numpy(real)], teacher.embed(*pad_batch([row]))[0])


def test_only_numbers_of_modules_are_held_against_the_weights() -> None:
    for given_settings in (
        {"max_window_layers": 28},
        {"block_multiple_of": 256},
        {"num_experts": 128},
        {"layer_norm_eps": 99},
    ):
        assert check_model_settings(given_settings, tensors=20) is None
    for name in ("num_hidden_layers", "n_layer", "encoder_layers", "num_experts"):
        problem = check_model_settings({"text_config": {name: 10**9}}, tensors=20)
        assert problem == f"{name} is 1000000000, but its weights have 20 tensors"


def test_positions_up_to_the_padding_token_are_unavailable(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("roberta")
    change_json(folder / "tokenizer_config.json", model_max_length=None)
    assert info_of(folder).max_length == 63  # 64 positions, the first after padding token 0
    ids, mask = pad_batch([np.full(63, 5)])
    assert np.isfinite(load(folder).embed(ids, mask).numpy()).all()


def test_encoder_only_t5_checkpoint_is_a_teacher(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    whole = make_teacher("t5")
    shutil.copytree(whole, tmp_path / "encoder")
    T5EncoderModel.from_pretrained(whole).save_pretrained(tmp_path / "encoder")
    ids, mask = pad_batch([np.array([4, 5, 6])])
    np.testing.assert_allclose(load(tmp_path / "encoder").embed(ids, mask), load(whole).embed(ids, mask), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_token_batches_hold_every_passage_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(token_batches(np.array(lengths), budget))
    assert sorted(i for b in batches for i in b.tolist()) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= budget for b in batches)
    assert [lengths[i] for b in batches for i in b] == sorted(lengths)


@pytest.mark.parametrize(("supported", "amx"), [(True, True), (True, False), (False, False)])
def test_auto_dtype_is_bfloat16_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, supported: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for intel in (True, False):
        monkeypatch.setattr(body, "_is_intel", lambda intel=intel: intel)
        assert resolve_dtype("auto", "cpu") == ("bfloat16" if supported and (amx or not intel) else "float32")
    assert resolve_dtype("float16", "cpu") == "float16"
