"""Transformer bodies of students: any Hugging Face encoder, or some layers of the teacher.

Comes in: a model, or its config. Goes out: a body that embeds padded token ids [B, L] as [B, L, width]. Code that a model
brings along is never run.
"""

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
    """A transformer from its config, with random weights."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        config = body_config(settings)
        with loading("of the student"):
            self.model = _empty(config)
        self.width = int(self.model.config.get_text_config().hidden_size)
        self.pad = getattr(config, "pad_token_id", None) or 0
        self.takes_positions = takes_positions(self.model)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed passages.

        Args:
            ids: int64 [B, L], anything where the mask is false.
            mask: bool [B, L], padding on either side.

        Returns:
            [B, L, width]; rows of padding are meaningless.
        """
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self.takes_positions else {}
        ids = ids.masked_fill(~mask, self.pad)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), **places).last_hidden_state
        return hidden


def body_config(settings: dict[str, Any]) -> Any:  # noqa: ANN401 - a transformers config
    """Make a transformer's config of what a student's config.json says.

    Raises:
        BadInput: the installed transformers does not know it, or does not take it.
    """
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise StudentError(
            f"the student's body is of type {str(kind)[:80]!r}, which the installed transformers does not know: update it, "
            "or give another student"
        )
    with loading("of the student"):
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in settings.items() if k not in _NOT_SAVED})


def body_settings(model: Any) -> dict[str, Any]:  # noqa: ANN401 - a transformers model
    """Return a model's config as a student's config.json keeps it."""
    settings = json.loads(model.config.to_json_string(use_diff=False))
    return {k: v for k, v in settings.items() if k not in _NOT_SAVED}


def load_weights(body: TransformerBody, model: Any) -> None:  # noqa: ANN401 - a transformers model
    """Copy a model's weights into a body that was made of its config.

    Raises:
        StudentError: they do not fit.
    """
    _without_pooler(model)
    try:
        body.model.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise StudentError(
            "these layers do not make a model of their kind again: keep the first ones (layers:n), or at least layer 0"
        ) from error


def keep_layers(model: Any, kind: str) -> None:  # noqa: ANN401 - a transformers model
    """Leave of a model, in place, only the layers that a setting names.

    Args:
        model: a transformer whose layers are an `nn.ModuleList`.
        kind: `layers:n` or `layers:0,2,5`.

    Raises:
        StudentError: the setting cannot be read, names a layer that is not there, or no list of layers is found.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise StudentError(
            f"student {kind!r}: a {config.model_type} model has no list of its {count} layers (some share one): give a "
            "smaller encoder by name, or static"
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
    """Return the numbers of the layers that a setting names, of a model with so many."""
    if not re.fullmatch(r"layers:[0-9]{1,6}(,[0-9]{1,6})*", kind):
        raise StudentError(f"student {kind!r} cannot be read: write layers:2 for the first two, or layers:0,2,5")
    found = [int(number) for number in kind.removeprefix("layers:").split(",")]
    kept = list(range(found[0])) if len(found) == 1 and found[0] <= count else found
    if not kept or kept[-1] >= count or any(a >= b for a, b in pairwise(kept)):
        raise StudentError(
            f"student {kind!r}: the teacher has {count} layers, 0 to {count - 1}: write layers:n with n from 1 to {count}, "
            "or their numbers in rising order"
        )
    return kept


def _empty(config: Any) -> Any:  # noqa: ANN401 - a transformers config, a model
    from transformers import AutoModel

    config.use_cache = False
    model = AutoModel.from_config(config, trust_remote_code=False)
    if hasattr(model, "encoder") and hasattr(model, "decoder"):  # as of a teacher, only the encoder
        model = model.encoder
    return _without_pooler(model).to(torch.float32)


def _without_pooler(model: Any) -> Any:  # noqa: ANN401 - a transformers model
    """Take a head away that nobody asks: data-parallel training fails on parameters without gradients."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
