"""Transformer bodies of students: a Hugging Face encoder, or some of the teacher's layers; never runs remote code."""

import copy
import json
import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from msense.errors import StudentError
from msense.teacher import takes_positions
from msense.teacher_folder import loading

_NOT_SAVED = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


class TransformerBody(nn.Module):
    """A randomly initialized transformer.

    Example:
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> TransformerBody({"model_type": "bert", **sizes}).width
        8
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        config = body_config(settings)
        with loading("of the student"):
            self.model = _empty_model(config)
        self.width = int(self.model.config.get_text_config().hidden_size)
        self.pad = getattr(config, "pad_token_id", None) or 0
        self.takes_positions = takes_positions(self.model)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, L, width], undefined on padding, of token ids int64 [B, L] with a mask bool [B, L]."""
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self.takes_positions else {}
        ids = ids.masked_fill(~mask, self.pad)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), **places).last_hidden_state
        return hidden


def body_config(settings: dict[str, Any]) -> Any:  # noqa: ANN401 - a transformers config
    """Return the transformers config of a student's `body` settings.

    Raises:
        BadInput: the installed transformers does not know the model type or rejects the settings.
    """
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise StudentError(
            f"unknown model type {str(kind)[:80]!r} of the student's body: update transformers, or use another student"
        )
    with loading("of the student"):
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in settings.items() if k not in _NOT_SAVED})


def body_settings(model: Any) -> dict[str, Any]:  # noqa: ANN401 - a transformers model
    """Return a model's config in the form stored in a student's config.json."""
    settings = json.loads(model.config.to_json_string(use_diff=False))
    return {k: v for k, v in settings.items() if k not in _NOT_SAVED}


def load_weights(body: TransformerBody, model: Any) -> None:  # noqa: ANN401 - a transformers model
    """Copy a model's weights into a body created from its config.

    Raises:
        StudentError: names or shapes differ.
    """
    _drop_pooler(model)
    try:
        body.model.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise StudentError(
            "the selected layers do not form a model of the teacher's type: use the first layers (layers:n), or "
            "include layer 0"
        ) from error


def keep_layers(model: Any, kind: str) -> None:  # noqa: ANN401 - a transformers model
    """Reduce a transformer in place to the layers named by `kind`: `layers:n` or `layers:0,2,5`.

    Raises:
        StudentError: `kind` is malformed or names a missing layer, or the model has no list of layers.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise StudentError(
            f"student {kind!r}: a {config.model_type} model has no list of its {count} layers (some models share one "
            "layer): give a smaller encoder by name, or static"
        )
    kept = _parse(kind, count)
    name, layers = lists[0]  # the outermost
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.ModuleList(layers[i] for i in kept))
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


def _empty_model(config: Any) -> Any:  # noqa: ANN401 - a transformers config, a model
    from transformers import AutoModel

    config.use_cache = False
    model = AutoModel.from_config(config, trust_remote_code=False)
    if hasattr(model, "encoder") and hasattr(model, "decoder"):  # like teachers, encoder-decoders lose their decoder
        model = model.encoder
    return _drop_pooler(model).to(torch.float32)


def _drop_pooler(model: Any) -> Any:  # noqa: ANN401 - a transformers model
    """Remove the pooler: data-parallel training fails on parameters without gradients."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
