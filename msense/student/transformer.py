"""Transformer bodies of students: a Hugging Face encoder, or some of the teacher's layers; never runs remote code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from msense.errors import StudentError
from msense.teacher.body import PaddedInputs, body_of, probe_ids
from msense.teacher.files import loading
from msense.teacher.spec import max_positions
from msense.text import first_line

_DIFFERENCE = 0.02  # in parts of the vectors; some models round constants to the dtype of their file
_NOT_SAVED = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


class TransformerBody(nn.Module):
    """A randomly initialized transformer.

    Example:
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> TransformerBody({"model_type": "bert", **sizes}).width
        8
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import AutoModel

        super().__init__()
        config = build_body_config(settings)
        config.use_cache = False
        with loading("of the student"):
            model = AutoModel.from_config(config, trust_remote_code=False)
            self.model = _drop_pooler(body_of(model)).to(torch.float32)
        self.width = int(self.model.config.get_text_config().hidden_size)
        self.inputs = PaddedInputs(self.model)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        if not hasattr(self.model, "get_input_embeddings"):  # an encoder that is no model of its own, as FSMT's
            return self.model.embed_tokens
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Replace the embedding table."""
        if hasattr(self.model, "set_input_embeddings"):
            self.model.set_input_embeddings(table)
        else:
            self.model.embed_tokens = table

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, L, width], undefined on padding, of token ids int64 [B, L] with a mask bool [B, L]."""
        return self.inputs.hidden_states(self.model, ids, mask)


def build_body_config(settings: dict[str, Any]) -> Any:
    """Return the transformers config of a student's `body` settings; raise InputError if transformers rejects them."""
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise StudentError(
            f"unknown model type {str(kind)[:80]!r} of the student's body: update transformers, or use another student"
        )
    with loading("of the student"):
        return CONFIG_MAPPING[kind].from_dict({k: _decoded(v) for k, v in without_identity(settings).items()})


def _decoded(value: Any) -> Any:
    """Return a setting with its infinite numbers, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        number = value.get("__float__")
        if len(value) == 1 and number in ("Infinity", "-Infinity", "NaN"):
            return float(number)
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


def body_settings(model: Any) -> dict[str, Any]:
    """Return a model's config in the form stored in a student's config.json."""
    return without_identity(json.loads(model.config.to_json_string(use_diff=False)))


def without_identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a model's settings without those that do not change what it computes."""
    return {k: v for k, v in settings.items() if k not in _NOT_SAVED}


@dataclass(frozen=True)
class BodySource:
    """What a body is initialized from."""

    settings: dict[str, Any]  # see `body_settings`
    max_positions: int | None
    tensors: dict[str, Tensor]  # in the dtype of their file, which may be mapped
    ids: Tensor  # int64 [1, L], a short text
    hidden: Tensor  # float32 [1, L, width] of that text


def read_source(model: Any) -> BodySource:
    """Return what a body needs of a model, which is converted to float32 and should be let go.

    The tensors stay as they are stored, so that the float32 weights of model and body are not in memory together.

    Raises:
        StudentError: the model cannot compute the vectors of a text.
    """
    tensors = dict(_drop_pooler(model).state_dict())
    ids, config = probe_ids(model.config, 24), model.config.get_text_config()
    settings = body_settings(model)
    try:
        with torch.no_grad():
            own = model.float().eval()
            hidden = PaddedInputs(own).hidden_states(own, ids, torch.ones_like(ids, dtype=torch.bool))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise StudentError(
            f"a {config.model_type} model cannot be trained ({first_line(error)}): give another encoder by name, or static"
        ) from error
    return BodySource(settings, max_positions(config), tensors, ids, hidden)


def load_weights(body: TransformerBody, source: BodySource) -> None:
    """Copy a model's weights into a body created from its config, and freeze those without influence.

    Raises:
        StudentError: names or shapes differ, or the body computes something else or has no gradients.
    """
    try:
        body.model.load_state_dict(source.tensors)
    except RuntimeError as error:
        raise StudentError(
            "the selected layers do not form a model of the teacher's type: use the first layers (layers:n), or "
            "include layer 0"
        ) from error
    _check_body(body, source)


def _check_body(body: TransformerBody, source: BodySource) -> None:
    """Compare a body with the model it was initialized from on a short text, and freeze weights without gradients.

    Data-parallel training fails on parameters without gradients, unless they are frozen.
    """
    kind = source.settings["model_type"]
    training, table = body.training, body.get_input_embeddings()
    body.eval()
    table.requires_grad_(False)  # the largest gradient, and every text has it
    named = {name: p for name, p in body.named_parameters() if p.requires_grad}
    try:
        hidden = body(source.ids, torch.ones_like(source.ids, dtype=torch.bool))
        useful = _useful((hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum(), named)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise StudentError(
            f"a {kind} model cannot be trained ({first_line(error)}): give another encoder by name, or static"
        ) from error
    finally:
        body.train(training)
        table.requires_grad_(True)
    change = (hidden.detach() - source.hidden).norm(dim=-1) / source.hidden.norm(dim=-1).clamp(min=1e-6)
    if not float(change.mean()) <= _DIFFERENCE:  # also true for NaN
        raise StudentError(
            f"a {kind} model with the selected layers computes other vectors than the teacher's layers: use the first "
            "layers (layers:n), give another encoder by name, or static"
        )
    if not any(useful.values()):
        raise StudentError(f"a {kind} model has no gradients to train with: give another encoder by name, or static")
    for name, parameter in named.items():
        if name not in useful and "expert" not in name:  # an expert may be chosen by other texts
            parameter.requires_grad_(False)


def _useful(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, bool]:
    """Return which parameters have a gradient, and whether it is finite and not zero; one gradient in memory at a time."""
    useful: dict[str, bool] = {}

    def note(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        useful[name] = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(note, name)) for name, p in parameters.items()]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return useful


class _NoPooler(nn.Module):
    """In place of a pooler, for models that always call theirs."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def _drop_pooler(model: Any) -> Any:
    """Remove the pooler: data-parallel training fails on parameters without gradients."""
    for name in ("pooler", "contact_head"):  # ESM's, whose size depends on the number of layers
        if getattr(model, name, None) is not None:
            setattr(model, name, _NoPooler())
    return model
