"""Merged teachers: sums of weights, what surrounds a text, attention, and refusal of adapters that cannot be merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import write_family
from safetensors.torch import load_file, save_file
from teachers import write_teacher
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from msense.__main__ import main
from msense.config.build import BuildConfig
from msense.config.merge import MergeConfig
from msense.errors import InputError
from msense.pipelines.merge import merge_teacher
from msense.teacher.adapters import read_adapter
from msense.teacher.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from msense.teacher.model import Teacher
from msense.teacher.spec import load_teacher_info

LAYERS = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
SHAPES = {"q_proj": (16, 16), "down_proj": (16, 32)}


def write_adapter(
    folder: Path, base: Path, seed: int, prefix: str = "base_model.model.model.", **settings: Any
) -> Path:
    """Write a LoRA adapter of `LAYERS` as peft does, with random matrices of rank 4."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in LAYERS:
        rows, columns = SHAPES[layer.rpartition(".")[2]]
        for kind, shape in (("A", (4, columns)), ("B", (rows, 4))):
            tensors[f"{prefix}{layer}.lora_{kind}.weight"] = torch.randn(shape, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    own = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(own | settings))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A causal language model in two files, with its head."""
    folder = write_teacher(tmp_path / "base", "llama")
    body = AutoModel.from_pretrained(folder)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(body.config)
    model.model.load_state_dict(body.state_dict())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged(tmp_path: Path, *adapters: Path, **settings: Any) -> Path:
    given = {"adapter": tuple(map(str, adapters)), "output": str(tmp_path / "merged"), **settings}
    return Path(merge_teacher(MergeConfig(**given))["output"])


def embed(folder: Path, ids: list[list[int]]) -> torch.Tensor:
    teacher = Teacher(str(folder), revision=None, layer=-1, dtype="float32", device="cpu")
    array = torch.tensor(ids).numpy()
    return teacher.embed(array, array >= 0)


@pytest.mark.parametrize("rslora", [False, True])
def test_weights_are_the_base_plus_all_adapters(base: Path, tmp_path: Path, rslora: bool) -> None:
    first = write_adapter(tmp_path / "a", base, 1, use_rslora=rslora, alpha_pattern={"down_proj": 2})
    second = write_adapter(tmp_path / "b", base, 2, prefix="base_model.model.")
    folder = merged(tmp_path, first, second)
    before, after, a, b = (
        weights(base),
        weights(folder),
        load_file(first / ADAPTER_WEIGHTS),
        load_file(second / ADAPTER_WEIGHTS),
    )
    assert set(after) == {name for name in before if not name.startswith("lm_head")}
    divisor = 2 if rslora else 4  # square root of the rank
    for layer in LAYERS:
        alpha = 2 if layer.endswith("down_proj") else 8
        one = a[f"base_model.model.model.{layer}.lora_B.weight"] @ a[f"base_model.model.model.{layer}.lora_A.weight"]
        two = b[f"base_model.model.{layer}.lora_B.weight"] @ b[f"base_model.model.{layer}.lora_A.weight"]
        expected = before[f"model.{layer}.weight"] + alpha / divisor * one + 8 / 4 * two
        torch.testing.assert_close(after[f"model.{layer}.weight"], expected, atol=1e-5, rtol=0)
    same = [name for name in after if not name.endswith(tuple(f"{layer}.weight" for layer in LAYERS))]
    assert all(torch.equal(after[name], before[name]) for name in same)
    made = json.loads((folder / "merged.json").read_text())
    assert (made["layers"], [own["name"] for own in made["adapters"]]) == (2, ["a", "b"])
    assert load_teacher_info(str(folder), BuildConfig())[0].decoder


@pytest.mark.parametrize("attention", ["auto", "causal", "bidirectional"])
def test_attention_is_as_asked_for(base: Path, tmp_path: Path, attention: str) -> None:
    folder = merged(tmp_path, write_adapter(tmp_path / "a", base, 1), attention=attention)
    one, other = embed(folder, [[2, 5, 6, 7], [2, 5, 6, 9]])
    moved = (one[:3] - other[:3]).abs().max()
    assert (moved > 0.01) == (attention == "bidirectional")


def test_what_surrounds_a_text_is_in_the_tokenizer(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1)
    folder = merged(
        tmp_path, adapter, before="the cat", after=".", pooling="lasttoken", include_prompt=False, max_length=32
    )
    info, tokenizer = load_teacher_info(str(folder), BuildConfig())
    plain = load_teacher_info(str(base), BuildConfig())[1]
    around = [plain.encode(text, add_special_tokens=False).ids for text in ("the cat", "bank", ".")]
    assert tokenizer.encode("bank").ids == [*info.prefix, *around[1], *info.suffix]
    assert info.prefix == (plain.token_to_id("<s>"), *around[0])
    assert info.suffix == tuple(around[2])
    assert (info.pooling, info.include_prompt, info.max_length) == ("lasttoken", False, 32)


def test_llm2vecs_choices_may_be_changed_by_flags(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1)
    (adapter / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "eos_token", "max_length": 48}))
    info, _ = load_teacher_info(str(merged(tmp_path, adapter, llm2vec="mistral")), BuildConfig())
    assert (info.pooling, info.include_prompt, info.max_length) == ("lasttoken", False, 48)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["is_causal"] is False
    shutil.rmtree(tmp_path / "merged")
    folder = merged(tmp_path, adapter, llm2vec="mistral", before="", after="", attention="causal", pooling="mean")
    assert json.loads((folder / "config.json").read_text())["is_causal"] is True
    assert load_teacher_info(str(folder), BuildConfig())[0].pooling == "mean"
    (adapter / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "weighted_mean"}))
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="pooling_mode weighted_mean is not supported: give --pooling"):
        merged(tmp_path, adapter, llm2vec="mistral")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


Q = f"base_model.model.model.{LAYERS[0]}"


@pytest.mark.parametrize(
    ("settings", "change", "match"),
    [
        ({"use_dora": True}, None, "use_dora is True, which cannot be merged"),
        ({"bias": "all"}, None, "bias is all"),
        ({"modules_to_save": ["embed_tokens"]}, None, "modules_to_save is"),
        ({"peft_type": "IA3"}, None, "peft_type is IA3; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "peft changes the base model"),
        ({"init_lora_weights": "lora_ga"}, None, "peft changes the base model"),
        ({"r": 3}, None, r"matrices of shapes .*, but adapter_config.json rank 3"),
        ({"r": 10**9}, None, "rank 1000000000"),
        ({"rank_pattern": {"(a+)+$": 2}}, None, "only names of layers are supported"),
        ({"rank_pattern": [1]}, None, "rank_pattern is .*, not an object"),
        ({"lora_alpha": "many"}, None, "lora_alpha is many, but must be a number"),
        ({}, lambda t: t.pop(f"{Q}.lora_B.weight"), "matrices of shapes"),
        ({}, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(4, 4)}), "is of DoRA"),
        ({}, lambda t: t.update({"base_model.model.lm_head.bias": torch.zeros(4, 4)}), "not of a LoRA layer"),
        ({}, lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 16), torch.nan)}), "is no finite matrix"),
        ({}, lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 12)}), r"change of shape \(16, 12\) for weight"),
        (
            {},
            lambda t: t.update({f"{Q}9.lora_{k}.weight": torch.zeros(4, 4) for k in "AB"}),
            "changes 1 layers that .* does not have, first layers.0.self_attn.q_proj9",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(
    base: Path, tmp_path: Path, settings: dict, change: Callable | None, match: str
) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1, **settings)
    if change is not None:
        rewrite(adapter, change)
    with pytest.raises(InputError, match=match):
        merged(tmp_path, adapter)
    assert not (tmp_path / "merged" / "config.json").exists()


def test_files_that_are_missing_or_in_the_way_are_named(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1)
    assert main(["merge-teacher", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    with pytest.raises(InputError, match="has a model already: give another --output"):
        merged(tmp_path, adapter)
    with pytest.raises(InputError, match="is the folder of the base or an adapter"):
        merged(tmp_path, adapter, output=str(adapter))
    (adapter / ADAPTER_WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="the adapter must be in safetensors"):
        merged(tmp_path, adapter, output=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"give the base model with --teacher"):
        merged(tmp_path, write_adapter(tmp_path / "b", Path("/nowhere"), 1), output=str(tmp_path / "other"))


def test_a_pattern_with_a_start_is_that_of_whole_names(base: Path, tmp_path: Path) -> None:
    """As in peft, where `^` matches at the start of a name only."""
    given = {"^layers.0.self_attn.q_proj": 1, "^model.layers.1.mlp.down_proj$": 2}
    layers = read_adapter(write_adapter(tmp_path / "a", base, 1, alpha_pattern=given))
    assert [layers[name].scale for name in LAYERS] == [8 / 4, 2 / 4]


def write_gpt2(folder: Path) -> Path:
    """Write a model whose layers store [in, out]; its c_proj is square."""
    write_teacher(folder, "llama")  # for its tokenizer
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 64}
    AutoModel.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("said", [False, True])
def test_layers_are_transposed_as_the_model_is_whatever_the_adapter_says(tmp_path: Path, said: bool) -> None:
    """peft writes fan_in_fan_out as the last layer that it met needs it, and ignores it on loading."""
    for kind, layer in (("gpt2", "h.0.attn.c_proj"), ("llama", "layers.0.self_attn.q_proj")):
        own = tmp_path / kind
        base = write_gpt2(own / "base") if kind == "gpt2" else write_teacher(own / "base", kind)
        a, b = torch.randn(4, 16), torch.randn(16, 4)
        adapter = write_adapter(own / "a", base, 1, fan_in_fan_out=said)
        names = (f"base_model.model.transformer.{layer}.lora_{part}.weight" for part in "AB")
        save_file(dict(zip(names, (a, b), strict=True)), adapter / ADAPTER_WEIGHTS)
        change = weights(merged(own, adapter))[f"{layer}.weight"] - weights(base)[f"{layer}.weight"]
        expected = 2 * b @ a
        torch.testing.assert_close(change, expected.T if kind == "gpt2" else expected, atol=1e-5, rtol=1e-5)


def test_layers_of_heads_are_left_out(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1)
    head = {f"base_model.model.lm_head.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"}
    rewrite(adapter, lambda tensors: tensors.update(head))
    assert json.loads((merged(tmp_path, adapter) / "merged.json").read_text())["layers"] == 2
    save_file(head, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(InputError, match="changes nothing but the model's head"):
        merged(tmp_path, adapter, output=str(tmp_path / "other"))


def test_an_adapter_of_an_encoder_fits_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    base = write_teacher(tmp_path / "base")
    layer = "encoder.layer.0.attention.self.query"
    given = {f"bert.{name}": tensor for name, tensor in weights(base).items()}
    save_file(given, base / "model.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "a", base, 1)
    matrices = {"A": torch.ones(4, 16), "B": torch.ones(16, 4)}
    save_file({f"base_model.model.{layer}.lora_{k}.weight": m for k, m in matrices.items()}, adapter / ADAPTER_WEIGHTS)
    folder = merged(tmp_path, adapter)
    change = weights(folder)[f"bert.{layer}.weight"] - given[f"bert.{layer}.weight"]
    torch.testing.assert_close(change, torch.full((16, 16), 8.0))
    assert embed(folder, [[2, 5, 6, 3]]).isfinite().all()


def test_of_a_base_in_two_formats_the_one_that_transformers_loads_is_merged(base: Path, tmp_path: Path) -> None:
    """Mistral's repositories have the same weights in a second format, which has other names."""
    other = {"layers.0.attention.wq.weight": torch.zeros(16, 16), "norm.weight": torch.zeros(16)}
    save_file(other, base / "consolidated.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "a", base, 1)
    assert not set(other) & set(weights(merged(tmp_path, adapter)))


def test_one_file_of_another_name_has_an_index(base: Path, tmp_path: Path) -> None:
    """As what remains of a base whose last file holds nothing but its head."""
    given = weights(base)
    for file in base.glob("model*"):
        file.unlink()
    save_file({n: t for n, t in given.items() if n.startswith("model.")}, base / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": given["lm_head.weight"].clone()}, base / "model-00002-of-00002.safetensors")
    folder = merged(tmp_path, write_adapter(tmp_path / "a", base, 1))
    assert [file.name for file in folder.glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert embed(folder, [[2, 5, 6, 7]]).isfinite().all()


def test_an_interrupted_merge_leaves_nothing_for_the_next(base: Path, tmp_path: Path) -> None:
    """A whole file of weights would be loaded in place of the new ones."""
    folder, adapter = tmp_path / "merged", write_adapter(tmp_path / "a", base, 1)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="has other files, which could be read as the teacher's: give another"):
        merged(tmp_path, adapter)
    (folder / "merged.json").write_text("{}")
    assert set(weights(merged(tmp_path, adapter))) == {n for n in weights(base) if not n.startswith("lm_head")}


def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(
        InputError, match=r"tokenizer of .*a has token \d+, but the base model only \d+ embeddings: replace"
    ):
        merged(tmp_path, adapter)
    (adapter / "tokenizer.json").unlink()
    assert load_teacher_info(str(merged(tmp_path, adapter)), BuildConfig())


def test_attention_of_code_of_its_own_is_not_guessed(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoModel": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(tmp_path / "a", base, 1)
    with pytest.raises(InputError, match="give --attention causal"):
        merged(tmp_path, adapter)
    assert "auto_map" not in json.loads((merged(tmp_path, adapter, attention="causal") / "config.json").read_text())


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_text"])
def test_attention_of_models_with_a_setting_of_their_own(tmp_path: Path, kind: str) -> None:
    base = write_family(tmp_path / "base", kind)
    assert "use_bidirectional_attention" in json.loads((base / "config.json").read_text())
    adapter = write_adapter(tmp_path / "a", base, 1)
    q = {"A": (4, 32), "B": (32, 4)}
    matrices = {f"base_model.model.{LAYERS[0]}.lora_{kind}.weight": torch.zeros(shape) for kind, shape in q.items()}
    save_file(matrices, adapter / ADAPTER_WEIGHTS)
    folder = merged(tmp_path, adapter, attention="bidirectional")
    one, other = embed(folder, [[2, 5, 6, 7], [2, 5, 6, 9]])
    assert (one[:3] - other[:3]).abs().max() > 1e-4


def test_attention_of_a_text_model_within_another_is_set(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1)
    whole = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2}}
    (base / "config.json").write_text(json.dumps(whole | {"vision_config": {"num_hidden_layers": 1}}))
    made = json.loads((merged(tmp_path, adapter, attention="bidirectional") / "config.json").read_text())
    assert made["text_config"]["is_causal"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_adapters_of_fewer_bits_are_read(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = write_adapter(tmp_path / "a", base, 1)
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()}
    save_file(narrow, adapter / ADAPTER_WEIGHTS)
    layer = read_adapter(adapter)[LAYERS[0]]
    assert torch.equal(layer.a, narrow[f"{Q}.lora_A.weight"].float())


def test_settings_of_sentence_transformers_are_kept(base: Path, tmp_path: Path) -> None:
    """Those of the adapter come first, then those of the base; flags override both."""
    source = write_teacher(tmp_path / "source", "llama", pooling="lasttoken", prompt="the ")
    names = ("modules.json", "1_Pooling", "config_sentence_transformers.json")
    adapter = write_adapter(tmp_path / "a", base, 1)
    for name in names:
        (shutil.copytree if (source / name).is_dir() else shutil.copyfile)(source / name, base / name)
    modules = json.loads((base / "modules.json").read_text())
    (base / "2_Normalize").mkdir()
    normalize = {"name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
    (base / "modules.json").write_text(json.dumps([*modules, normalize]))
    (base / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40, "do_lower_case": True}))
    expected, _ = load_teacher_info(str(base), BuildConfig())
    assert (expected.pooling, expected.normalize, expected.prompt, expected.max_length) == (
        "lasttoken",
        True,
        "the ",
        40,
    )
    info, _ = load_teacher_info(str(merged(tmp_path, adapter)), BuildConfig())
    kept = ("pooling", "normalize", "prompt", "max_length", "include_prompt", "tokenizer_fingerprint")
    assert [getattr(info, name) for name in kept] == [getattr(expected, name) for name in kept]
    (adapter / "modules.json").write_text(json.dumps(modules))
    (adapter / "1_Pooling").mkdir()
    (adapter / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    for pooling, output in ((None, "cls"), ("mean", "mean")):
        folder = merged(tmp_path, adapter, pooling=pooling, output=str(tmp_path / output))
        info, _ = load_teacher_info(str(folder), BuildConfig())
        assert (info.pooling, info.normalize, info.prompt) == (output, False, "")
    (adapter / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="has the pooling max_tokens, which is not supported: give --pooling"):
        merged(tmp_path, adapter, output=str(tmp_path / "other"))
    (adapter / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": 8}))
    with pytest.raises(InputError, match="Dense modules or truncation, which are not kept"):
        merged(tmp_path, adapter, output=str(tmp_path / "other"))


def test_the_base_is_of_the_revision_that_the_adapter_names(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "a", Path("owner/base"), 1, revision="v2")
    asked: list[tuple[str, str | None]] = []

    def locate(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return base if name.startswith("owner/") else Path(name)

    monkeypatch.setattr("msense.pipelines.merge.locate", locate)
    for number, given in enumerate(({}, {"revision": "v3"}, {"teacher": "owner/other"})):
        merged(tmp_path, adapter, output=str(tmp_path / str(number)), **given)
    assert asked[1::2] == [("owner/base", "v2"), ("owner/base", "v3"), ("owner/other", None)]


def test_a_merge_records_repositories_and_commits(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--own--lora-of-mine" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder = merged(tmp_path, write_adapter(snapshot, base, 1))
    made = json.loads((folder / "merged.json").read_text())
    found = [{name: own.get(name) for name in ("name", "revision")} for own in (made["base"], *made["adapters"])]
    assert found == [{"name": "base", "revision": None}, {"name": "own/lora-of-mine", "revision": "0123abc"}]
