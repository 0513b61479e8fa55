"""One Ray for the session, and teachers whose answers are known by hand."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["the", "bank", "river", "money", "of", "is", "near", "deep", "full", "a", "cat", "dog", "sat", "on", "mat"]
WORDS += ["run", "##ning", "##s"]


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """The Ray that all tests share."""
    from msense.runtime import connect

    connect(workers=2)
    import ray as ray_module

    yield
    ray_module.shutdown()


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a small random teacher into a folder.

    kind "bert" has [CLS] and [SEP]; kind "llama" a BOS and nothing else, and its layer 0 is its embedding table, so
    that every occurrence of a token has the same, known embedding. `pooling` writes sentence-transformers settings.
    """

    def make(
        kind: str = "bert", pooling: str | None = None, prompt: str | None = None, padding_side: str = "right"
    ) -> Path:
        import torch
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp(f"{kind}-teacher")
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if kind == "bert" else ["<pad>", "<unk>", "<s>"]
        vocabulary = {word: number for number, word in enumerate([*special, *WORDS, *".,!"])}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special[1]))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        names = {"pad_token": special[0], "unk_token": special[1]}
        sizes = {
            "vocab_size": len(vocabulary),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        torch.manual_seed(0)
        if kind == "bert":
            backend.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
            )
            names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
            model = BertModel(BertConfig(**sizes, max_position_embeddings=64, initializer_range=0.5))
        else:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
            names |= {"bos_token": "<s>"}
            model = LlamaModel(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.5))
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=backend, model_max_length=64, padding_side=padding_side, **names
        ).save_pretrained(folder)
        if pooling:
            modules = [{"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
            modules.append({"name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
            (folder / "1_Pooling").mkdir()
            (folder / "modules.json").write_text(json.dumps(modules))
            (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        if prompt:
            settings = {"prompts": {"query": prompt}, "default_prompt_name": "query"}
            (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        return folder

    return make
