"""Merge LoRA adapters into a base model: one plain teacher folder, which everything else reads like any other.

How the teacher reads a text is written into the folder: attention in config.json, what surrounds a text in the tokenizer's
template, pooling in sentence-transformers' files. Memory: one file of weights, the adapters, and one layer in float32.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from msense.errors import InputError
from msense.io.scratch import atomic_path
from msense.io.untrusted import printable
from msense.teacher.adapters import LoraLayer, bare_name, read_adapter
from msense.teacher.files import (
    ADAPTER_CONFIG,
    INCLUDE_FRAME,
    POOLING_KEYS,
    check_files,
    loading,
    read_object,
    weights_fingerprint,
)
from msense.tokenizer import special_tokens_around

logger = logging.getLogger(__name__)
HEADS = ("lm_head.", "score.", "classifier.")  # tensors that no hidden state depends on
MERGED = "merged.json"  # what a folder was made of
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXTS = ("Which is it, 7?", "a", "the end of the second one.")  # to see what tokens surround any text
_CODE = ("auto_map", "_name_or_path", "custom_pipelines")


@dataclass(frozen=True)
class Reading:
    """How the merged teacher reads a text."""

    bidirectional: bool | None = None  # None: as the base's config says
    before: str = ""  # what the tokenizer puts around every text, after its own special tokens
    after: str = ""
    pooling: str = "mean"
    include_prompt: bool = True
    include_frame: bool = True  # whether `before` is pooled, and what the tokenizer itself puts there
    max_length: int | None = None


def merge_folders(base: Path, adapters: Sequence[Path], output: Path, reading: Reading) -> dict[str, Any]:
    """Write a base model with adapters, added in this order, into a new folder; its config.json last.

    Each merged weight is the sum in float32 of the base's and all adapters' parts, rounded once to the base's dtype.

    Returns what is written to merged.json: `base` and `adapters` with fingerprints, `layers` changed, and the reading.

    Raises:
        InputError: an adapter cannot be merged or does not fit, or the base is damaged, quantised, or not in safetensors.
    """
    check_files(str(base), base)
    settings = read_object(base / "config.json")
    if settings.get("quantization_config"):
        raise InputError(f"{base} is quantised: give the base model in float32, bfloat16 or float16")
    added = [read_adapter(folder) for folder in adapters]
    output.mkdir(parents=True, exist_ok=True)
    changed = _write_weights(base, added, output)
    for folder, layers in zip(adapters, added, strict=True):
        if lost := sorted(layers.keys() - changed):
            raise InputError(
                f"adapter {folder} changes {len(lost)} layers that {base} does not have, first {printable(lost[0])}: give the "
                "base model that it was trained for"
            )
    _write_tokenizer([*reversed(adapters), base], output, reading)
    _write_pooling(output, settings, reading)
    made = {
        "base": {"name": base.name, "fingerprint": weights_fingerprint(base)},
        "adapters": [{"name": own.name, "fingerprint": weights_fingerprint(own, ADAPTER_CONFIG)} for own in adapters],
        "layers": len(changed),
        "reading": vars(reading),
    }
    _write_json(output / MERGED, made)
    _write_json(output / "config.json", _config(settings, reading.bidirectional))
    return made


def _write_weights(base: Path, adapters: Sequence[Mapping[str, LoraLayer]], output: Path) -> set[str]:
    """Write the base's files one by one with the adapters added; return the bare names of the changed layers."""
    places: dict[str, str] = {}
    changed: set[str] = set()
    for number, file in enumerate(files := sorted(base.glob("*.safetensors")), 1):
        logger.info("merging file %d of %d", number, len(files))
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(HEADS)}
        for name, tensor in tensors.items():
            layer = bare_name(name.removesuffix(".weight"))
            own = [adapter[layer] for adapter in adapters if name.endswith(".weight") and layer in adapter]
            if own:
                tensors[name] = _sum(name, tensor, own)
                if layer in changed:
                    raise InputError(f"{base} has two weights of layer {printable(layer)}: give another base model")
                changed.add(layer)
        if tensors:
            with atomic_path(output / file.name) as scratch:
                save_file(tensors, scratch, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file.name)
    if len(set(places.values())) > 1:
        _write_json(output / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return changed


def _sum(name: str, weight: torch.Tensor, layers: Sequence[LoraLayer]) -> torch.Tensor:
    """Return a weight with what adapters add, in its dtype."""
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise InputError(f"weight {printable(name)} is {weight.dtype}: give the base model without quantisation")
    total = weight.float()
    for layer in layers:
        delta = layer.delta()
        if delta.shape != weight.shape:
            raise InputError(
                f"an adapter has a change of shape {tuple(delta.shape)} for weight {printable(name)} of shape "
                f"{tuple(weight.shape)}: give the base model that it was trained for"
            )
        total = total + delta
    return total.to(weight.dtype)


def _config(settings: Mapping[str, Any], bidirectional: bool | None) -> dict[str, Any]:
    """Return the config of the merged model: without code of its own, and with the attention that is asked for."""
    config = {name: value for name, value in settings.items() if name not in _CODE}
    if bidirectional is not None:
        config["is_causal"] = not bidirectional
        if "use_bidirectional_attention" in config:
            config["use_bidirectional_attention"] = bidirectional
    return config


def _write_tokenizer(folders: Sequence[Path], output: Path, reading: Reading) -> None:
    """Write the tokenizer of the first folder that has one, with the text around every text in its template."""
    source = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    if source is None:
        raise InputError("neither the base nor an adapter has a tokenizer.json: put one into the base's folder")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if not reading.before and not reading.after:
        return
    with loading(f"{source.name!r} (tokenizer)"):
        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
        first, last = special_tokens_around(tokenizer)
    before, after = _tokens_around(tokenizer, reading.before, reading.after)
    around = {"before": [*first, *before], "after": [*after, *last]}
    parts = {f"<{kind}>": ids for kind, ids in around.items() if ids}
    template = " ".join([*(p for p in parts if p == "<before>"), "$A", *(p for p in parts if p == "<after>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[
            {"id": part, "ids": ids, "tokens": [tokenizer.id_to_token(number) for number in ids]}
            for part, ids in parts.items()
        ],
    )
    with atomic_path(output / "tokenizer.json") as scratch:
        scratch.write_text(tokenizer.to_str(), encoding="utf-8")


def _tokens_around(tokenizer: Tokenizer, before: str, after: str) -> tuple[list[int], list[int]]:
    """Return the tokens of what surrounds texts: as beside a text, if any text has the same beside it, else as alone.

    SentencePiece's tokenizers put a space before any text, of which those alone would have one too many.
    """
    found = [_beside(tokenizer, before, text, after) for text in _TEXTS]
    if found[0] is not None and all(tokens == found[0] for tokens in found):
        return found[0]
    alone = [tokenizer.encode(text, add_special_tokens=False).ids if text else [] for text in (before, after)]
    return alone[0], alone[1]


def _beside(tokenizer: Tokenizer, before: str, text: str, after: str) -> tuple[list[int], list[int]] | None:
    """Return the tokens before and after a text; None if the text has other tokens between them than alone."""
    own = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(before + text + after, add_special_tokens=False)
    begin, end = len(before.rstrip()), len(before + text)
    for first in range(len(whole.ids) - len(own) + 1):
        last = first + len(own)
        within = whole.offsets[first][0] >= begin and whole.offsets[last - 1][1] <= end
        if within and whole.ids[first:last] == own:
            return whole.ids[:first], whole.ids[last:]
    return None


def _write_pooling(output: Path, settings: Mapping[str, Any], reading: Reading) -> None:
    """Write the files of sentence-transformers."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (output / "1_Pooling").mkdir(exist_ok=True)
    pooling: dict[str, Any] = {key: mode == reading.pooling for mode, key in POOLING_KEYS.items()}
    pooling |= {"word_embedding_dimension": settings.get("hidden_size"), "include_prompt": reading.include_prompt}
    _write_json(output / "1_Pooling" / "config.json", pooling)
    _write_json(output / "sentence_bert_config.json", {"max_seq_length": reading.max_length, "do_lower_case": False})
    if not reading.include_frame:
        _write_json(output / "config_sentence_transformers.json", {"prompts": {}, INCLUDE_FRAME: False})
    _write_json(output / "modules.json", modules)


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
