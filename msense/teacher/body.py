"""The model of a teacher without its heads: loading, positions, and removal of layers."""

import copy
import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msense.errors import InputError, StudentError
from msense.teacher.files import loading
from msense.teacher.spec import POSITIONS_AFTER_PADDING


def truncate_layers(model: Any, kind: str) -> None:
    """Reduce a transformer in place to the layers named by `kind`: `layers:n` or `layers:0,2,5`.

    Raises:
        StudentError: `kind` is malformed or names a missing layer, or the model has no list of layers.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise StudentError(
            f"student {kind!r}: a {config.model_type} model has no list of its {count} layers (some models share one "
            "layer): give a smaller encoder by name, or static"
        )
    kept = _parse(kind, count)
    layers = model.get_submodule(lists[0])  # the outermost list
    model.set_submodule(lists[0], nn.ModuleList(layers[i] for i in kept))
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in kept]
    model.config = config


def _parse(kind: str, count: int) -> list[int]:
    """Return the layer indices named by `kind`, for a model with `count` layers."""
    if not re.fullmatch(r"layers:[0-9]{1,6}(,[0-9]{1,6})*", kind):
        raise StudentError(f"invalid student {kind!r}: write layers:2 for the first two layers, or layers:0,2,5")
    numbers = [int(number) for number in kind.removeprefix("layers:").split(",")]
    kept = list(range(numbers[0])) if len(numbers) == 1 and numbers[0] <= count else numbers
    if not kept or kept[-1] >= count or any(a >= b for a, b in pairwise(kept)):
        raise StudentError(
            f"student {kind!r}: the teacher has {count} layers, 0 to {count - 1}: write layers:n with n from 1 to "
            f"{count}, or layer indices in increasing order"
        )
    return kept


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the dtype that `auto` stands for: bfloat16 where the device supports it natively."""
    if dtype != "auto":
        return dtype
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def needs_position_ids(model: Any) -> bool:
    """Return whether a model needs explicit position ids for input that is padded on the left."""
    if any(kind in model.config.model_type for kind in POSITIONS_AFTER_PADDING):
        return False  # these derive positions from the padding token
    return "position_ids" in inspect.signature(model.forward).parameters


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model has both parts; only the encoder is used."""
    return hasattr(model, "encoder") and hasattr(model, "decoder")


def load_body(folder: Path, name: str, dtype: Any) -> Any:
    """Load a teacher's model; of an encoder-decoder model, the encoder.

    Raises:
        InputError: loading fails, or the checkpoint would leave parts of the model at random values.
    """
    from transformers import AutoModel

    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with loading(repr(name)):
        model, report = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
    mismatched = sorted(item for item in report["mismatched_keys"] if "pooler" not in item[0])
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if is_encoder_decoder(model):
        missing = [key for key in missing if not key.startswith("decoder.")]
        model = model.encoder
    if mismatched or missing:
        if mismatched:
            key, actual, expected = mismatched[0]
            problem = (
                f"{len(mismatched)} tensors differ in shape from config.json, first {key} ({list(actual)} instead "
            )
            problem += f"of {list(expected)})"
        else:
            problem = f"the weights lack {len(missing)} tensors of the model, first {missing[0]}"
        raise InputError(f"teacher {name!r}: {problem}: give a folder whose weights and config.json belong together")
    model.config.use_cache = False
    return model.eval()
