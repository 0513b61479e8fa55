"""Merged teachers: sums of weights, what surrounds a text, attention, and refusal of adapters that cannot be merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import write_teacher
from transformers import AutoModel, AutoModelForCausalLM

from msense.__main__ import main
from msense.config.build import BuildConfig
from msense.config.merge import MergeConfig
from msense.errors import InputError
from msense.pipelines.merge import merge_teacher
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
