"""LoRA adapters as peft saves them: read, checked, and added to weights. An adapter is untrusted; nothing in it is run.

Source of the rule: LoRA (Hu et al. 2021), W + scale · B · A, with scale = alpha / r, or alpha / sqrt(r) (rsLoRA).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msense.errors import InputError
from msense.io.untrusted import printable
from msense.teacher.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_object
from msense.text import first_line

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_BODY = re.compile(  # what comes before the names of a model's body
    r"^(?:(?:base_model|model|transformer|gpt_neox|bert|roberta|distilbert|deberta|electra|albert|mpnet)\.)+"
)
# settings of peft that change more than the weights of layers, with the values that change nothing
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that leave another base model behind
_NAME = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter adds to a layer: scale · b @ a."""

    a: Tensor  # float32 [r, in]
    b: Tensor  # float32 [out, r]
    scale: float

    def delta(self) -> Tensor:
        """Return what is added to the layer's weight, float32 [out, in]."""
        return (self.b @ self.a) * self.scale


def bare_name(name: str) -> str:
    """Return the name of a layer in a model's body, without what a head or an adapter puts before it.

    Example:
        >>> bare_name("base_model.model.model.layers.0.self_attn.q_proj")
        'layers.0.self_attn.q_proj'
    """
    return _BODY.sub("", name)


def read_adapter(folder: Path) -> dict[str, LoraLayer]:
    """Return the layers of a LoRA adapter by bare name.

    Raises:
        InputError: the adapter is no LoRA adapter of safetensors, is damaged, contradicts itself, or changes more than
            weights that can be added to.
    """
    settings = read_object(folder / ADAPTER_CONFIG)
    _check_settings(folder, settings)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot read {folder / ADAPTER_WEIGHTS} ({first_line(error)}): the adapter must be in safetensors; download it "
            "again, or save it with a current peft"
        ) from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _TENSOR.fullmatch(name)) is None:
            kind = "of DoRA" if "magnitude" in name else "not of a LoRA layer"
            raise InputError(
                f"adapter {folder}: tensor {printable(name)} is {kind}, and cannot be merged: merge it with peft's "
                "merge_and_unload, or use another adapter"
            )
        if not (tensor.is_floating_point() and tensor.ndim == 2 and bool(tensor.float().isfinite().all())):
            raise InputError(
                f"adapter {folder}: tensor {printable(name)} is no finite matrix: download the adapter again"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    if not pairs:
        raise InputError(f"adapter {folder} has no layers: use another adapter")
    layers = {name: _layer(folder, settings, name, pair) for name, pair in sorted(pairs.items())}
    bare = {bare_name(name): layer for name, layer in layers.items()}
    if len(bare) < len(layers):
        raise InputError(
            f"adapter {folder} names a layer twice, with and without its model's prefix: use another adapter"
        )
    return bare


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError for an adapter whose effect is more than a sum of weights."""
    if settings.get("peft_type") != "LORA":
        kind = printable(settings.get("peft_type"))
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {kind}; only LORA adapters can be merged: use another"
        )
    for name, plain in _PLAIN.items():
        if settings.get(name) not in plain:
            raise InputError(
                f"adapter {folder}: {name} is {printable(settings[name])}, which cannot be merged into weights: merge it with "
                "peft's merge_and_unload, or use another adapter"
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"adapter {folder}: init_lora_weights is {printable(start)}, for which peft changes the base model: save it with "
            "path_initial_model_for_weight_conversion, or use another adapter"
        )


def _layer(folder: Path, settings: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> LoraLayer:
    rank = _of_layer(folder, settings, "rank_pattern", name, settings.get("r"))
    alpha = _of_layer(folder, settings, "alpha_pattern", name, settings.get("lora_alpha"))
    shapes = {kind: tuple(tensor.shape) for kind, tensor in pair.items()}
    fits = len(pair) == 2 and shapes["A"][0] == rank and shapes["B"][1] == rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or not fits:
        raise InputError(
            f"adapter {folder}: layer {printable(name)} has matrices of shapes {shapes}, but {ADAPTER_CONFIG} rank "
            f"{printable(rank)}: download the adapter again"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"adapter {folder}: lora_alpha is {printable(alpha)}, but must be a number: download it again")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") is True else rank)
    return LoraLayer(pair["A"], pair["B"], scale)


def _of_layer(folder: Path, settings: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """Return the setting of a layer: that of a pattern which ends its name, or the default."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"adapter {folder}: {key} is {printable(patterns)}, not an object: download the adapter again")
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _NAME.fullmatch(plain):  # peft takes any regular expression; an untrusted one may take forever
            raise InputError(
                f"adapter {folder}: {key} has the pattern {printable(pattern)}, but only names of layers are supported: merge "
                "it with peft's merge_and_unload"
            )
        if name == plain or (name.endswith(f".{plain}") and not pattern.startswith("^")):
            return value
    return default
