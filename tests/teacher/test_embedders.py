"""Decoders of sentence-transformers are read by their own rules: each as its publisher lays it out, with random weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from students import dictionary_of
from tokenizer_families import BOTH, FAMILIES, sentence_piece_bpe, texts
from tokenizers import Tokenizer, normalizers
from transformers import (
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModel

from msense.config.build import BuildConfig
from msense.corpus import WHOLE, InputSplit
from msense.corpus.chunking import write_passages
from msense.evaluation.models import TeacherModel
from msense.evaluation.spec import Spec
from msense.stages.passages import passage_spec
from msense.teacher.batching import pad_batch
from msense.teacher.model import Teacher
from msense.teacher.pooling import load_head
from msense.teacher.spec import load_teacher_info

sentence_transformers = pytest.importorskip("sentence_transformers")

LONGEST = 96  # tokens
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 512}
SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
SHORT = ["The river bank is near.", "money", "deep in the bank of the river, the cat sat near a tree", *texts(5)]
TEXTS = [*SHORT, "", " ".join(texts(40))]  # the last is cut


@dataclass(frozen=True)
class Embedder:
    """What a publisher's folder has."""

    config: Callable[..., PreTrainedConfig]
    tokens: Callable[[], Tokenizer]
    tokenizer: dict[str, Any]  # settings in tokenizer_config.json
    pooling: str
    prompts: dict[str, str]
    sizes: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)  # added to the settings of the Transformer module
    own: dict[str, Any] = field(default_factory=dict)  # added to config.json
    dense: tuple[int, ...] = ()  # widths of Dense modules after pooling


QWEN = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>", "eos_token": "<sep>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<cls>", "eos_token": "<sep>", "pad_token": "<sep>"}
LLAMA |= {"unk_token": "<unk>"}
CODE = {"AutoModel": "modeling_qwen.Qwen2Model", "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}
EMBEDDERS = {
    "Qwen3-Embedding": Embedder(
        Qwen3Config,
        FAMILIES["Qwen with an end token"],
        QWEN | {"padding_side": "left"},
        "lasttoken",
        {"query": SEARCH, "document": ""},
        {"head_dim": 8, "tie_word_embeddings": True},
    ),
    "e5-mistral": Embedder(
        lambda **sizes: MistralConfig(sliding_window=16, **sizes),
        FAMILIES["Llama 2"],
        LLAMA,
        "lasttoken",
        {"web_search_query": SEARCH + " ", "sts_query": "Instruct: Retrieve semantically similar text.\nQuery: "},
        body={"tokenizer_args": {"add_bos_token": True, "add_eos_token": True}},
    ),
    "SFR-Embedding-Mistral": Embedder(
        lambda **sizes: MistralConfig(sliding_window=None, **sizes),
        lambda: sentence_piece_bpe(BOTH, normalizers.Prepend("▁")),
        LLAMA | {"padding_side": "left", "add_bos_token": True, "add_eos_token": True},
        "lasttoken",
        {"web_search_query": SEARCH + " "},
    ),
    "gte-Qwen2": Embedder(
        Qwen2Config,
        FAMILIES["Qwen with an end token"],
        QWEN | {"auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", None]}, "add_eos_token": True},
        "lasttoken",
        {"query": SEARCH + " "},
        own={"auto_map": CODE, "is_causal": False},
    ),
    # transformers drops add_eos_token beside a tokenizer.json without an end, so that an empty text has no token
    "an end in code only": Embedder(
        Qwen2Config,
        FAMILIES["Qwen"],
        QWEN | {"padding_side": "left", "add_eos_token": True},
        "lasttoken",
        {"query": SEARCH + " "},
        own={"auto_map": CODE, "is_causal": False},
    ),
    "EmbeddingGemma": Embedder(
        lambda **sizes: Gemma3TextConfig(use_bidirectional_attention=True, sliding_window=16, **sizes),
        FAMILIES["Gemma"],
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<cls>", "eos_token": "<sep>", "pad_token": "<pad>"},
        "mean_tokens",
        {"query": "task: search result | query: ", "document": "title: none | text: "},
        {"head_dim": 8, "query_pre_attn_scalar": 8},
        dense=(24, 12),
    ),
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def changed(path: Path, **settings: Any) -> None:
    write(path, json.loads(path.read_text()) | settings)


def save(folder: Path, embedder: Embedder) -> Path:
    """Write a folder in the layout of sentence-transformers."""
    names = {name: value for name, value in embedder.tokenizer.items() if name.endswith("_token")}
    names = {name: value for name, value in names.items() if isinstance(value, str)}
    fast = PreTrainedTokenizerFast(tokenizer_object=embedder.tokens(), model_max_length=512, **names)
    fast.save_pretrained(folder)
    changed(folder / "tokenizer_config.json", **embedder.tokenizer)
    torch.manual_seed(0)
    config = embedder.config(vocab_size=len(fast) + 3, **SIZES | embedder.sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    changed(folder / "config.json", **embedder.own)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    widths = (SIZES["hidden_size"], *embedder.dense)
    for number, (width, next_width) in enumerate(pairwise(widths), 2):
        activation = torch.nn.Identity()
        dense = sentence_transformers.models.Dense(width, next_width, bias=False, activation_function=activation)
        kinds.append(("Dense", f"{number}_Dense"))
        (folder / kinds[-1][1]).mkdir()
        dense.save(str(folder / kinds[-1][1]))
    kinds.append(("Normalize", f"{len(kinds)}_Normalize"))
    (folder / kinds[-1][1]).mkdir()
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(kinds)
    ]
    pooling = {f"pooling_mode_{mode}": mode == embedder.pooling for mode in ("cls_token", "mean_tokens", "lasttoken")}
    pooling |= {"word_embedding_dimension": SIZES["hidden_size"], "include_prompt": True}
    write(folder / "modules.json", modules)
    write(folder / "1_Pooling" / "config.json", pooling)
    write(folder / "sentence_bert_config.json", {"max_seq_length": LONGEST, "do_lower_case": False} | embedder.body)
    settings = {"prompts": embedder.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write(folder / "config_sentence_transformers.json", settings)
    return folder


class Saved(NamedTuple):
    """An embedder, and the vectors that sentence-transformers gives `TEXTS` with each prompt."""

    name: str
    folder: Path
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=EMBEDDERS)
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    own = EMBEDDERS[request.param]
    folder = save(tmp_path_factory.mktemp("embedder"), own)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    if "padding_side" in own.tokenizer:
        assert model.tokenizer.padding_side == own.tokenizer["padding_side"]
    prompts = ("", *own.prompts.values())
    expected = {prompt: np.asarray(model.encode(TEXTS, prompt=prompt, batch_size=len(TEXTS))) for prompt in prompts}
    return Saved(request.param, folder, expected)


def passages(folder: Path, prompt: str) -> tuple[list[np.ndarray], list[int]]:
    """Return the token ids of the first passage of each text, and the number of its text; an empty text has none."""
    config = BuildConfig(prompt=prompt)
    info, tokenizer = load_teacher_info(str(folder), config)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    split = InputSplit(str(folder / "texts.jsonl"), "t", "jsonl", 0, WHOLE, 0)
    write_passages(split, passage_spec(info, config), tokenizer, folder / "p.parquet")
    first: dict[int, np.ndarray] = {}
    for row in pq.read_table(folder / "p.parquet").to_pylist():
        first.setdefault(int(row["document_id"].rpartition(":")[2]), np.array(row["input_ids"]))
    return list(first.values()), list(first)


def test_evaluated_teachers_give_the_vectors_of_sentence_transformers(embedder: Saved) -> None:
    spec = Spec("teacher", "teacher", teacher=str(embedder.folder), dtype="float32")
    for prompt, expected in embedder.expected.items():
        like = dictionary_of(embedder.folder, prompt=prompt, max_length=LONGEST)
        teacher = TeacherModel(spec, "cpu", threads=1, like=like)
        assert len(teacher._encodings(TEXTS)[-1].ids) == LONGEST
        np.testing.assert_allclose(teacher.encode(TEXTS), expected, atol=1e-5, rtol=0)
        assert np.linalg.norm(expected[0] - expected[1]) > 0.01


def test_passages_have_the_vectors_of_sentence_transformers_under_any_padding(embedder: Saved) -> None:
    folder = str(embedder.folder)
    teacher = Teacher(folder, revision=None, layer=-1, dtype="float32", device="cpu")
    for prompt, expected in embedder.expected.items():
        head = load_head(folder, load_teacher_info(folder, BuildConfig(prompt=prompt))[0])
        rows, numbers = passages(embedder.folder, prompt)
        assert numbers == [number for number, text in enumerate(TEXTS) if text]
        for side in ("left", "right"):
            ids, mask = pad_batch(rows, side=side)
            pooled = head(teacher.embed(ids, mask), torch.from_numpy(mask)).detach().numpy()
            np.testing.assert_allclose(pooled, expected[numbers], atol=1e-5, rtol=0)


def test_each_is_read_by_its_own_rules(embedder: Saved) -> None:
    own, folder = EMBEDDERS[embedder.name], str(embedder.folder)
    info, _ = load_teacher_info(folder, BuildConfig())
    assert (info.decoder, info.prompt, info.max_length, info.normalize) == (True, "", LONGEST, True)
    assert info.suffix == (() if own is EMBEDDERS["an end in code only"] else (3,))
    assert (info.pooling, len(info.projections)) == (own.pooling.removesuffix("_tokens"), len(own.dense))
    teacher = Teacher(folder, revision=None, layer=-1, dtype="float32", device="cpu")
    ids = np.array([[5, 6, 7, 8], [5, 6, 7, 9]])
    first, second = teacher.embed(ids, ids >= 0)
    moved = float((first[0] - second[0]).abs().max())
    assert (moved > 0.01) == ("is_causal" in own.own or embedder.name == "EmbeddingGemma")
