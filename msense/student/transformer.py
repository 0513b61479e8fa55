"""Transformer bodies of students: a Hugging Face encoder, or some of the teacher's layers; never runs remote code."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from msense.errors import StudentError
from msense.teacher.body import is_encoder_decoder, needs_position_ids
from msense.teacher.files import loading

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
        config = build_body_config(settings)
        with loading("of the student"):
            self.model = _empty_model(config)
        self.width = int(self.model.config.get_text_config().hidden_size)
        self.pad = getattr(config, "pad_token_id", None) or 0
        self.takes_positions = needs_position_ids(self.model)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        table: nn.Module = self.model.get_input_embeddings()
        return table

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Replace the embedding table."""
        self.model.set_input_embeddings(table)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, L, width], undefined on padding, of token ids int64 [B, L] with a mask bool [B, L]."""
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self.takes_positions else {}
        ids = ids.masked_fill(~mask, self.pad)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), **places).last_hidden_state
        return hidden


def build_body_config(settings: dict[str, Any]) -> Any:
    """Return the transformers config of a student's `body` settings.

    Raises:
        InputError: the installed transformers does not know the model type or rejects the settings.
    """
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise StudentError(
            f"unknown model type {str(kind)[:80]!r} of the student's body: update transformers, or use another student"
        )
    with loading("of the student"):
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in settings.items() if k not in _NOT_SAVED})


def body_settings(model: Any) -> dict[str, Any]:
    """Return a model's config in the form stored in a student's config.json."""
    settings = json.loads(model.config.to_json_string(use_diff=False))
    return {k: v for k, v in settings.items() if k not in _NOT_SAVED}


def load_weights(body: TransformerBody, model: Any) -> None:
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


def _empty_model(config: Any) -> Any:
    from transformers import AutoModel

    config.use_cache = False
    model = AutoModel.from_config(config, trust_remote_code=False)
    if is_encoder_decoder(model):
        model = model.encoder
    return _drop_pooler(model).to(torch.float32)


def _drop_pooler(model: Any) -> Any:
    """Remove the pooler: data-parallel training fails on parameters without gradients."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
