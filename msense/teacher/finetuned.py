"""Write the folder of a fine-tuned teacher, which is read like any other teacher. Memory: a copy of the weights."""

import json
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from msense.io.untrusted import links_outside
from msense.teacher.body import is_encoder_decoder
from msense.teacher.classifier import Classifier, save_classifier
from msense.teacher.files import POOLING_KEYS, TeacherFolder, read_settings
from msense.text import one_line, redact

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "*.model"),
)
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def save_teacher(
    folder: Path, body: Any, classifier: Classifier, source: Path, max_length: int, figures: Mapping[str, float]
) -> None:
    """Write a fine-tuned teacher into a new folder.

    Args:
        folder: created here.
        body: float32, without a pooler.
        classifier: on the body's embeddings; its pooling becomes the teacher's own.
        source: folder of the original teacher, for its tokenizer, prompt and name.
        max_length: longest text in tokens.
        figures: metrics for the model card.
    """
    folder.mkdir(parents=True)
    original = read_settings(source)
    prompt = original.prompt
    _save_body(folder, body)
    for pattern in _TOKENIZER:
        for path in original.body.glob(pattern):
            if not links_outside(path, source):  # a link could disclose any file of this machine
                shutil.copyfile(path, folder / path.name)
    config = classifier.config
    pooling = {POOLING_KEYS[mode]: mode == config.pooling for mode in ("mean", "cls", "lasttoken")}
    settings: dict[str, Any] = {
        "modules.json": _MODULES,
        "1_Pooling/config.json": {"word_embedding_dimension": config.dim, **pooling},
        "sentence_bert_config.json": {"max_seq_length": max_length, **tokenizer_settings(original)},
    }
    if prompt:
        settings["config_sentence_transformers.json"] = {"prompts": {"own": prompt}, "default_prompt_name": "own"}
    for name, content in settings.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    card = folder / "README.md"
    card.write_text(_card(classifier, source, max_length, prompt, figures), encoding="utf-8")
    for weights in folder.glob("*.safetensors"):  # written readable by their owner only
        weights.chmod(stat.S_IMODE(card.stat().st_mode))
    save_classifier(folder, classifier)


def tokenizer_settings(original: TeacherFolder) -> dict[str, Any]:
    """Return how texts are tokenized, as far as it is not in the tokenizer's own files."""
    settings: dict[str, Any] = {"do_lower_case": True} if original.lower_case else {}
    options = {name: value for name, value in original.tokenizer_options.items() if name != "model_max_length"}
    return settings | ({"tokenizer_args": options} if options else {})


def _save_body(folder: Path, body: Any) -> None:
    """Write config and weights; an encoder of an encoder-decoder model keeps its parameter names in that model."""
    from transformers import AutoModel

    with torch.device("meta"):
        whole = AutoModel.from_config(body.config, trust_remote_code=False)
    if not is_encoder_decoder(whole):
        body.save_pretrained(folder)
        return
    weights = {f"encoder.{name}": tensor for name, tensor in body.state_dict().items()}
    if "shared.weight" in whole.state_dict():  # the token embeddings, shared by encoder and decoder
        weights["shared.weight"] = body.get_input_embeddings().weight
    body.config.save_pretrained(folder)
    copies = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def _card(classifier: Classifier, source: Path, max_length: int, prompt: str, figures: Mapping[str, float]) -> str:
    """Return the model card."""
    config = classifier.config
    teacher = source.name if source.parent.name != "snapshots" else source.parents[1].name.removeprefix("models--")
    stats: dict[str, Any] = {
        "fine-tuned from": redact(teacher.replace("--", "/")),
        "task": redact(config.task),
        "predicts": "a number" if config.labels is None else f"one of {len(config.labels)} labels",
        "texts of a pair": f"joined by {config.joiner!r}" if config.joiner else "none",
        "pooling": config.pooling,
        "longest text": f"{max_length} tokens",
        "prompt": repr(prompt) if prompt else "none",
    }
    stats |= {name.replace("_", " "): f"{value:.6g}" for name, value in figures.items()}
    rows = "\n".join(f"| {one_line(name)} | {one_line(value)} |" for name, value in stats.items())
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, msense, feature-extraction, text-classification]
---

# A fine-tuned teacher with its classifier

| | |
|---|---|
{rows}

The body and its tokenizer load like those of any encoder; `classifier/` computes scores from its token embeddings. Senses of
this teacher, and students trained on them, are evaluated with that classifier:

```
msense build --teacher THIS_FOLDER --corpus corpus.jsonl --output runs/senses
msense evaluate --teacher THIS_FOLDER --model teacher --model replaced:runs/senses --task classifier:NAME=DATA
```

## Licence

The weights are derived from those of {one_line(stats["fine-tuned from"])} and are subject to its licence, and to that of the
texts used for fine-tuning; read both before sharing this folder.
"""
