"""The model of a teacher without its heads: loading, padded batches, and removal of layers."""

import copy
import inspect
import platform
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msense.errors import InputError, StudentError
from msense.teacher.files import bidirectional_setting, body_folder, loading, stored_dtype
from msense.teacher.spec import Attention, max_positions
from msense.text import first_line

# model types that read padding: convolutions, Fourier transforms or pooling over neighbouring tokens
NEEDS_EQUAL_LENGTHS = frozenset({"convbert", "cpmant", "fnet", "funnel", "mobilebert", "nystromformer", "yoso"})


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
    parent_name = lists[0].rpartition(".")[0]  # of the outermost list
    parent = model.get_submodule(parent_name)
    for name, layers in list(parent.named_children()):  # some models have a list for each part of a layer
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            setattr(parent, name, nn.ModuleList(layers[i] for i in kept))
    for name, value in list(vars(parent).items()):
        if type(value) is int and value == count and "layer" in name:
            setattr(parent, name, len(kept))
    try:
        _truncate_config(text, kept)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise StudentError(
            f"student {kind!r}: the config of a {config.model_type} model cannot be reduced to these layers "
            f"({first_line(error)}): give an encoder by name, or static"
        ) from error
    model.config = config


def _truncate_config(config: Any, kept: list[int]) -> None:
    """Reduce the settings of each layer, and the number of layers, to the kept ones."""
    count = config.num_hidden_layers
    single = {str(key): value for key, value in (config.to_dict().get("per_layer_config") or {}).items()}
    if single:
        config.per_layer_config = None
    for name, values in list(vars(config).items()):
        if isinstance(values, list | tuple) and len(values) == count:
            setattr(config, name, [values[i] for i in kept])
    if getattr(config, "attention_types", None):  # GPT Neo's, from which its attention_layers are derived
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    fixed = isinstance(getattr(type(config), "num_hidden_layers", None), property)  # of what this setting counts
    setattr(
        config,
        "num_encoder_layers" if fixed and hasattr(config, "num_encoder_layers") else "num_hidden_layers",
        len(kept),
    )
    if single:
        config.per_layer_config = {new: single[str(old)] for new, old in enumerate(kept) if str(old) in single}
    if getattr(config, "num_blocks", None) == count:  # xLSTM's second name
        config.num_blocks = len(kept)
    for name in ("decoder_layers", "num_decoder_layers"):  # of a decoder that is built, but not used
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, min(value, len(kept)))


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
    """Return the dtype that `auto` stands for: bfloat16 where the device multiplies matrices of it faster than float32.

    Intel's CPUs do with AMX only: with AVX-512 BF16 alone they take 1.5 times as long as in float32 (MiniLM, one thread, a
    Xeon), while AMD's are 2.4 times as fast (an EPYC).
    """
    if dtype != "auto":
        return dtype
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    slow = _is_intel() and not torch.cpu._is_amx_tile_supported()
    return "bfloat16" if supported and not slow else "float32"


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


class PaddedInputs:
    """How a model reads a padded batch, so that the vectors of a text do not depend on its neighbours.

    Texts are moved to the left and padded with the model's own padding token, so that position ids are the model's own
    business. A model of `NEEDS_EQUAL_LENGTHS` reads texts of one length at a time, without padding.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> ids = torch.tensor([[0, 5], [5, 6]])
        >>> PaddedInputs(model).hidden_states(model, ids, ids > 0).shape
        torch.Size([2, 2, 8])
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and 0 <= pad < int(config.vocab_size) else 0
        parameters = inspect.signature(model.forward).parameters
        self.takes_mask = "attention_mask" in parameters
        self.equal_lengths = config.model_type in NEEDS_EQUAL_LENGTHS

    def hidden_states(self, model: Any, ids: Tensor, mask: Tensor, layer: int | None = None) -> Tensor:
        """Run a model (or what wraps it) on token ids int64 [B, L] with a mask bool [B, L], padded on either side.

        Returns:
            The states [B, L, D] of a hidden layer, by default the last one, undefined on padding.
        """
        if self.equal_lengths and not mask.all():
            return self._by_length(model, ids, mask, layer)
        if mask[:, 0].all():
            return self._run(model, ids, mask, layer)
        order = (~mask).long().argsort(dim=1, stable=True)  # moves padding to the right
        hidden = self._run(model, ids.gather(1, order), mask.gather(1, order), layer)
        back = order.argsort(dim=1)
        return hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[-1]))

    def _by_length(self, model: Any, ids: Tensor, mask: Tensor, layer: int | None) -> Tensor:
        """Run the texts of each length together, without padding."""
        lengths = mask.sum(1)
        parts, rows = [], []
        for length in lengths.unique().tolist():
            some = (lengths == length).nonzero()[:, 0]
            real = mask[some] if length else mask[some].logical_not()  # a text without tokens is read as padding
            texts = ids[some].masked_fill(~mask[some], self.pad)[real].view(len(some), -1)
            hidden = self._run(model, texts, torch.ones_like(texts, dtype=torch.bool), layer)
            padded = hidden.new_zeros(*real.shape, hidden.shape[-1])
            padded[real] = hidden.flatten(0, 1)
            parts.append(padded)
            rows.append(some)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _run(self, model: Any, ids: Tensor, mask: Tensor, layer: int | None) -> Tensor:
        given = {"attention_mask": mask.long()} if self.takes_mask else {}
        if layer is not None:
            given["output_hidden_states"] = True
        output = model(input_ids=ids.masked_fill(~mask, self.pad), **given)
        hidden: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return hidden


def probe_ids(config: Any, length: int) -> Tensor:
    """Return a text for checks of a model, int64 [1, N]: at most `length` ordinary tokens."""
    text = config.get_text_config()
    count = int(text.vocab_size)
    length = min(length, max_positions(text) or length)
    return (count // 2 + torch.arange(length) * 7 % max(1, count // 4))[None]  # special tokens are first or last


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model has both parts; only the encoder is used."""
    if not (hasattr(model, "encoder") and hasattr(model, "decoder")):
        return False
    return "input_ids" in inspect.signature(model.encoder.forward).parameters  # Funnel's decoder ends its one encoder


def body_of(model: Any) -> Any:
    """Return what embeds a text: the model, or the encoder of an encoder-decoder model."""
    if not is_encoder_decoder(model):
        return model
    if not hasattr(model.encoder, "config"):
        model.encoder.config = model.config
    return model.encoder


def set_attention(config: Any, attention: Attention) -> None:
    """Change a model's config so that the model has this attention; "auto" leaves it as it is."""
    text = config.get_text_config()
    if attention != "auto" and attention != configured_attention(config):
        text.is_causal = attention == "causal"
        if hasattr(text, "use_bidirectional_attention"):
            text.use_bidirectional_attention = bidirectional_setting(text.model_type, attention == "bidirectional")


def configured_attention(config: Any) -> Attention:
    """Return the attention that a model's config names; "auto" if it names none."""
    text = config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "is_causal", None) is False:
        return "bidirectional"
    return "causal" if getattr(text, "is_causal", None) is True else "auto"


def load_body(folder: Path, name: str, dtype: Any, attention: Attention = "auto") -> Any:
    """Load a teacher's model; of an encoder-decoder model, the encoder. See `TeacherOptions` for its attention.

    Raises:
        InputError: loading fails, or the checkpoint would leave parts of the model at random values.
    """
    from transformers import AutoConfig, AutoModel

    options: dict[str, Any] = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with loading(repr(name)):
        options["config"] = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        set_attention(options["config"], attention)
        model, report = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
    mismatched = sorted(item for item in report["mismatched_keys"] if "pooler" not in item[0])
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if is_encoder_decoder(model):
        missing = [key for key in missing if not key.startswith("decoder.")]
        model = body_of(model)
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


def load_stored(name: str, revision: str | None, attention: Attention = "auto") -> Any:
    """Load a teacher's model in the dtype of its file, from which only the weights that are used are then read."""
    folder = body_folder(name, revision)
    return load_body(folder, name, getattr(torch, stored_dtype(folder)), attention)
