"""The teacher: settings of its folder, special-token rules, batches, and hidden states that padding never touches."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msense.config import DEMO_TEACHER, BuildConfig
from msense.errors import BadInput
from msense.teacher import Teacher, describe, pad_batch, resolve_dtype, token_batches
from msense.teacher_folder import locate

MakeTeacher = Callable[..., Path]


def load(folder: Path | str, layer: int = -1) -> Teacher:
    return Teacher(str(folder), revision=None, layer=layer, dtype="float32", device="cpu")


def test_demo_teacher_brings_its_own_settings() -> None:
    info, tokenizer = describe(DEMO_TEACHER, BuildConfig())
    assert (info.dim, info.vocab_size, info.max_length, info.pooling, info.normalize) == (384, 30522, 256, "mean", True)
    assert (info.prefix, info.suffix, info.excluded) == ((101,), (102,), (0,))
    assert len(tokenizer.encode("word " * 600).ids) == 602  # the truncation of tokenizer.json is switched off


def test_special_tokens_of_a_mean_pooled_a_cls_pooled_and_a_bos_model(make_teacher: MakeTeacher) -> None:
    mean, cls, bos = make_teacher("bert"), make_teacher("bert", pooling="cls_token"), make_teacher("llama")

    def excluded(folder: Path, rule: str) -> tuple[int, ...]:
        return describe(str(folder), BuildConfig(special_tokens=rule))[0].excluded

    assert [excluded(f, "auto") for f in (mean, cls, bos)] == [(0,), (0, 2, 3), (0, 2)]
    assert [excluded(f, "include") for f in (mean, cls, bos)] == [(0,), (0,), (0,)]
    assert [excluded(f, "exclude") for f in (mean, cls, bos)] == [(0, 2, 3), (0, 2, 3), (0, 2)]
    assert [describe(str(f), BuildConfig())[0].pooling for f in (mean, cls, bos)] == ["mean", "cls", "mean"]


def test_prompt_comes_from_the_teacher_or_the_config(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert", pooling="mean_tokens", prompt="the bank")
    info, tokenizer = describe(str(folder), BuildConfig())
    assert tokenizer.decode(list(info.prompt_ids)) == "the bank"
    assert describe(str(folder), BuildConfig(prompt=""))[0].prompt_ids == ()


def test_settings_that_do_not_fit_are_refused(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    folder = str(make_teacher("bert"))
    with pytest.raises(BadInput, match=r"layer 3 is not there.*0 \(embeddings\) to 2"):
        describe(folder, BuildConfig(layer=3))
    with pytest.raises(BadInput, match="max_length 65 is more than the 64 tokens"):
        describe(folder, BuildConfig(max_length=65))
    with pytest.raises(BadInput, match=r"no-such/teacher.*check the name or give a folder"):
        describe("no-such/teacher", BuildConfig())
    with pytest.raises(BadInput, match="has no safetensors weights"):
        describe(str(tmp_path), BuildConfig())
    config = json.loads((Path(folder) / "config.json").read_text())
    config["vocab_size"] = 10
    (Path(folder) / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"has 25 tokens, its model only 10 embeddings"):
        describe(folder, BuildConfig())


def test_folders_and_weights_nobody_vouches_for_are_refused(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    folder = make_teacher("bert", pooling="mean_tokens")
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": "../../etc"}]))
    with pytest.raises(BadInput, match="leaves the folder"):
        describe(str(folder), BuildConfig())
    cut = make_teacher("bert")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"does not load.*safetensors"):
        load(cut)
    foreign, other = make_teacher("bert"), make_teacher("llama")
    (foreign / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match="they are not this model's"):
        load(foreign)


def test_fingerprint_follows_the_weights(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert")
    before = describe(str(folder), BuildConfig())[0].fingerprint
    assert describe(str(folder), BuildConfig(layer=1))[0].fingerprint == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert describe(str(folder), BuildConfig())[0].fingerprint != before


def test_layers_are_those_of_the_model(make_teacher: MakeTeacher) -> None:
    import torch
    from transformers import AutoModel

    folder = make_teacher("llama")
    ids, mask = pad_batch([np.array([2, 5, 6, 7])])
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder)(
            input_ids=torch.from_numpy(ids).long(), output_hidden_states=True
        ).hidden_states
    for layer in (0, 1, 2, -1, -2):
        np.testing.assert_allclose(load(folder, layer).embed(ids, mask).numpy(), states[layer].numpy(), atol=1e-6)
    table = AutoModel.from_pretrained(folder).get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(load(folder, 0).embed(ids, mask).numpy()[0], table[ids[0]])


@pytest.mark.parametrize("kind", ["bert", "llama", "roberta", "t5"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_counts(make_teacher: MakeTeacher, kind: str, side: str) -> None:
    """A passage alone and beside a longer one has the same embeddings, whatever side is padded."""
    teacher = load(make_teacher(kind))
    short, long = np.array([2, 5, 6]), np.array([2, 8, 9, 10, 11, 12, 5])
    ids, mask = pad_batch([short, long], side=side)
    assert mask.sum(1).tolist() == [3, 7]
    assert mask[0].tolist() == ([True] * 3 + [False] * 4 if side == "right" else [False] * 4 + [True] * 3)
    together = teacher.embed(ids, mask)[0].numpy()[mask[0]]
    alone = teacher.embed(*pad_batch([short]))[0].numpy()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(alone[1] - alone[2]).max() > 1e-3
    if kind != "roberta":  # which tells padding by its token
        junk, _ = pad_batch([short, long], pad=7, side=side)
        np.testing.assert_allclose(teacher.embed(junk, mask)[0].numpy()[mask[0]], alone, atol=1e-5)


def test_positions_after_the_padding_token_are_not_offered(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("roberta")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("model_max_length")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    info, _ = describe(str(folder), BuildConfig())
    assert info.max_length == 63  # 64 positions, the first after padding token 0
    ids, mask = pad_batch([np.full(63, 5)])
    assert np.isfinite(load(folder).embed(ids, mask).numpy()).all()


def test_an_encoder_only_t5_checkpoint_is_a_teacher(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    import shutil

    from transformers import T5EncoderModel

    whole = make_teacher("t5")
    shutil.copytree(whole, tmp_path / "encoder")
    T5EncoderModel.from_pretrained(whole).save_pretrained(tmp_path / "encoder")
    ids, mask = pad_batch([np.array([4, 5, 6])])
    np.testing.assert_allclose(load(tmp_path / "encoder").embed(ids, mask), load(whole).embed(ids, mask), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_token_batches_cover_every_passage_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(token_batches(np.array(lengths), budget))
    assert sorted(i for b in batches for i in b.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    assert [lengths[i] for b in batches for i in b] == sorted(lengths)


def test_dtype_auto_is_what_the_device_computes_in() -> None:
    import torch

    expected = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    assert resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("float16", "cpu") == "float16"


def test_locate_takes_folders_as_they_are(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


def test_a_tokenizer_whose_library_panics_is_refused(make_teacher: Callable[..., Path]) -> None:
    folder = make_teacher("bert")
    definition = json.loads((folder / "tokenizer.json").read_text())
    del definition["post_processor"]["special_tokens"]["[CLS]"]  # which its template names
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(BadInput, match="its tokenizer does not load: no entry found for key"):
        describe(str(folder), BuildConfig())
