"""Folders of sentence-transformers: teachers and students give its vectors, or are refused by the name of what differs."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from students import dictionary_of
from tokenizer_families import FAMILIES, texts
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from msense import SenseDictionary, SenseEncoder
from msense.config.build import BuildConfig
from msense.dictionary.format import write_tokenizer
from msense.errors import InputError
from msense.evaluation.models import TeacherModel
from msense.evaluation.spec import Spec
from msense.student import StudentSettings, init_student, save_pretrained
from msense.teacher.body import load_body
from msense.teacher.classifier import Classifier, ClassifierConfig
from msense.teacher.files import read_settings
from msense.teacher.finetuned import save_teacher
from msense.teacher.spec import load_teacher_info

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.base.modules import Dense, Normalize, Transformer  # noqa: E402 - optional
from sentence_transformers.sentence_transformer.modules import CNN, LayerNorm, Pooling  # noqa: E402

TEXTS = ["The river bank is near.", "A CAT sat", "memory\nof the bank it's", "Lowercase CAFÉ " * 9, *texts(4)]
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
BODY = "sentence_bert_config.json"


def body(folder: Path, family: str = "BERT cased", **tokenizer: Any) -> Path:
    """Write a folder of a tokenizer and a small model, a decoder for the tokenizer of one."""
    decoder = family.startswith("Llama")
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<cls>"} if decoder else NAMES
    own = FAMILIES[family]()
    own.add_tokens(["Lowercase"])
    fast = PreTrainedTokenizerFast(tokenizer_object=own, **{"model_max_length": 64, **names, **tokenizer})
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = (LlamaConfig if decoder else BertConfig)(vocab_size=len(fast) + 3, initializer_range=0.3, **SIZES)
    (LlamaModel if decoder else BertModel)(config).save_pretrained(folder)
    return folder


def saved(folder: Path, *after: Any, pooling: str = "mean", include: bool = True, prompt: str = "", **own: Any) -> Path:
    """Save a model of sentence-transformers with a given body in `folder`; `after` follows the pooling."""
    prompts = {"prompts": {"own": prompt}, "default_prompt_name": "own"} if prompt else {}
    truncate_dim = own.pop("truncate_dim", None)
    plain = body(folder / "plain", **own)
    modules = [Transformer(str(plain)), Pooling(16, pooling, include_prompt=include), *after]
    options = {"device": "cpu", "truncate_dim": truncate_dim, **prompts}
    sentence_transformers.SentenceTransformer(modules=modules, **options).save(str(folder / "model"))
    return folder / "model"


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


def changed(folder: Path, name: str = BODY, **settings: Any) -> Path:
    """Save a model and change one of its files."""
    model = saved(folder)
    change(model / name, **settings)
    return model


def lower_cased(folder: Path, family: str, **settings: Any) -> Path:
    model = saved(folder, family=family)
    change(model / BODY, do_lower_case=True, **settings)
    return model


def renamed(folder: Path, kind: str) -> Path:
    """Save a model whose settings file is named after another model, as older versions did."""
    model = saved(folder)
    (model / BODY).unlink()
    change(model / f"sentence_{kind}_config.json", max_seq_length=7)
    return model


def vectors(model: Path) -> np.ndarray:
    """Return the vectors of sentence-transformers, without padding."""
    loaded = sentence_transformers.SentenceTransformer(str(model), device="cpu", trust_remote_code=True)
    return np.asarray(loaded.encode(TEXTS, batch_size=1))


def whole_student(model: Path, folder: Path) -> Path:
    """Save an untrained student of all layers."""
    info, tokenizer = load_teacher_info(str(model), BuildConfig())
    built = dictionary_of(model, prompt=info.prompt, max_length=info.max_length)
    built.save(folder / "dictionary")
    write_tokenizer(folder / "dictionary", tokenizer.to_str())
    dictionary = SenseDictionary.load(folder / "dictionary")
    student = init_student(StudentSettings(kind="layers:2"), dictionary, str(model))
    save_pretrained(folder / "student", student, dictionary, senses="float32")
    return folder / "student"


RIGHT: dict[str, Callable[[Path], Path]] = {
    "two Dense, normalized": lambda f: saved(f, Dense(16, 24), Dense(24, 8, activation_function=None), Normalize()),
    "residual, LeakyReLU": lambda f: saved(
        f, Dense(16, 24, use_residual=True, bias=False, activation_function=torch.nn.LeakyReLU())
    ),
    "truncated": lambda f: saved(f, Normalize(), Normalize(), truncate_dim=5),
    "truncated beyond its size": lambda f: saved(f, truncate_dim=500),
    "prompt not pooled": lambda f: saved(f, include=False, prompt="Find:\n"),
    "prompt not pooled, first token": lambda f: saved(f, pooling="cls", include=False, prompt="query: "),
    "decoder, left sides": lambda f: saved(
        f, pooling="lasttoken", include=False, prompt="a\nQuery: ", family="Llama 3", padding_side="left"
    ),
    "truncated on the left": lambda f: saved(f, prompt="query: ", truncation_side="left", model_max_length=12),
    "prompt beyond the longest text": lambda f: saved(f, include=False, prompt="the bank " * 9, model_max_length=10),
    "lower case, BPE": lambda f: lower_cased(f, "RoBERTa"),
    "lower case, Unigram": lambda f: lower_cased(f, "XLM-R"),
    "longer than the tokenizer's own length": lambda f: lower_cased(
        f, "BERT cased", tokenizer_args={"model_max_length": 9}, max_seq_length=5
    ),
    "empty prompt": lambda f: changed(
        f, "config_sentence_transformers.json", prompts={"q": None}, default_prompt_name="q"
    ),
    "other settings": lambda f: changed(f, model_args={"torch_dtype": "float32"}, tokenizer_args={"revision": "main"}),
    "XLNet's settings file": lambda f: renamed(f, "xlnet"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, case: str) -> None:
    model = RIGHT[case](tmp_path)
    expected = vectors(model)
    teacher = TeacherModel(Spec("teacher", "teacher", teacher=str(model), dtype="float32"), "cpu", threads=1)
    np.testing.assert_allclose(teacher.encode(TEXTS), expected, atol=1e-5)
    student = whole_student(model, tmp_path / "made")
    np.testing.assert_allclose(SenseEncoder.from_pretrained(student).encode(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(vectors(student), expected, atol=1e-5)


def router(folder: Path) -> Path:
    model = changed(folder, "router_config.json", types={"document_0_Transformer": "x.Transformer"})
    return of_type("sentence_transformers.base.modules.router.Router", model)


def of_type(name: str, model: Path) -> Path:
    """Give the pooling another class."""
    modules = json.loads((model / "modules.json").read_text())
    modules[1]["type"] = name
    (model / "modules.json").write_text(json.dumps(modules))
    return model


def chat(folder: Path) -> Path:
    template = "{% for m in messages %}<cls>{{ m['content'] }}{% endfor %}"
    return saved(folder, chat_template=template)


def without(folder: Path, name: str) -> Path:
    model = saved(folder, Dense(16, 8))
    (model / name).unlink()
    return model


def adapter(folder: Path, name: str) -> Path:
    model = saved(folder)
    (model / name).write_text(json.dumps({"base_model_name_or_path": "own/base"}))
    return model


def decoder_with_code(folder: Path, **settings: Any) -> Path:
    model = body(folder, "Llama 3")
    change(model / "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"}, **settings)
    return model


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "Router": (router, r"Router, which is not supported: give one of .*document_0_Transformer"),
    "CNN": (lambda f: saved(f, CNN(16, 8)), "has the module .*CNN, which is not supported"),
    "LayerNorm": (lambda f: saved(f, LayerNorm(16)), "has the module .*LayerNorm, which is not supported"),
    "own class": (lambda f: of_type("own.Pooling", saved(f)), "module own.Pooling, .* its code is never run"),
    "other order": (lambda f: saved(f, Normalize(), Dense(16, 8)), "lists the modules Transformer, Pooling, Normalize"),
    "chat template": (chat, "writes every text into the chat template"),
    "another output": (
        lambda f: changed(f, modality_config={"text": {"method": "encode", "method_output_name": None}}),
        "reads texts by .*encode.* but msense by",
    ),
    "a prompt of no name": (
        lambda f: changed(f, "config_sentence_transformers.json", default_prompt_name=["a"]),
        "has no prompt .*correct the name",
    ),
    "processing": (lambda f: changed(f, processing_kwargs={"text": {"max_length": 6}}), "with the option 'max_length'"),
    "model settings": (lambda f: changed(f, config_args={"num_hidden_layers": 1}), "loads its config with the option"),
    "tokenizer settings": (
        lambda f: changed(f, tokenizer_args={"cls_token": "x"}),
        "loads its tokenizer with .*cls_tok",
    ),
    "other prompt": (
        lambda f: changed(f, "config_sentence_transformers.json", default_prompt_name="z"),
        "has no prompt 'z', its default_prompt_name",
    ),
    "no pooling config": (lambda f: without(f, "1_Pooling/config.json"), r"1_Pooling/config.json is missing"),
    "no Dense config": (lambda f: without(f, "2_Dense/config.json"), r"2_Dense/config.json is missing"),
    "adapter": (
        lambda f: adapter(f, "adapter_config.json"),
        "is an adapter .* of own/base, .* merge both into a new folder first, with msense merge-teacher --adapter",
    ),
    "adapter's weights": (
        lambda f: adapter(f, "adapter_model.safetensors"),
        "is an adapter .adapter_model.safetensors",
    ),
    "code in a decoder": (decoder_with_code, "may change the attention of this decoder: give --attention causal"),
    "undecided code": (lambda f: decoder_with_code(f, is_causal=None), "may change the attention of this decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, case: str) -> None:
    make, match = REFUSED[case]
    model = str(make(tmp_path))
    with pytest.raises(InputError, match=match):
        load_teacher_info(model, BuildConfig())


def test_any_list_of_poolings_is_read(tmp_path: Path) -> None:
    model = changed(tmp_path, "1_Pooling/config.json", pooling_mode=[1, "mean"])
    assert load_teacher_info(str(model), BuildConfig())[0].pooling == "1+mean"


def test_code_in_a_decoder_that_states_its_attention_is_read_without_it(tmp_path: Path) -> None:
    for causal in (True, False):
        folder = decoder_with_code(tmp_path / str(causal), is_causal=causal)
        assert load_teacher_info(str(folder), BuildConfig())[0].decoder


def test_dense_modules_are_checked(tmp_path: Path) -> None:
    for number, (settings, match) in enumerate(
        (
            ({"activation_function": "transformers.activations.GELUActivation"}, "has the activation transformers"),
            ({"module_input_name": "token_embeddings"}, "projects other values than sentence vectors"),
            ({"out_features": 9}, "does not match its config.json"),
        )
    ):
        model = saved(tmp_path / str(number), Dense(16, 8))
        change(model / "2_Dense" / "config.json", **settings)
        with pytest.raises(InputError, match=match):
            TeacherModel(Spec("teacher", "teacher", teacher=str(model)), "cpu", threads=1)


def test_a_fine_tuned_teacher_reads_texts_as_before_and_its_files_follow_the_umask(tmp_path: Path) -> None:
    model = lower_cased(tmp_path, "RoBERTa", tokenizer_args={"truncation_side": "left", "model_max_length": 40})
    config = ClassifierConfig(task="t", dim=16, pooling="mean", labels=("no", "yes"))
    source = load_body(read_settings(model).body, "t", torch.float32)
    save_teacher(tmp_path / "new", source, Classifier(config), model, 9, {})
    before, after = (load_teacher_info(str(folder), BuildConfig())[0] for folder in (model, tmp_path / "new"))
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint
    assert after.truncation_side == before.truncation_side == "left"
    assert (before.max_length, after.max_length) == (40, 9)
    (tmp_path / "empty").touch()
    mode = stat.S_IMODE((tmp_path / "empty").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").rglob("*") if p.is_file()} == {mode}
