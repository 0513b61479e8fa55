"""A student as an ONNX model, from token ids to sentence vectors, for onnxruntime and transformers.js."""

from pathlib import Path

import torch
from torch import Tensor, nn

from msense.errors import InputError, StudentError
from msense.io.extras import require
from msense.io.scratch import atomic_path
from msense.student.student import Student
from msense.student.transformer import TransformerBody
from msense.text import first_line

OPSET = 17  # of onnxruntime since 1.12 and of transformers.js
_INPUTS, _OUTPUTS = ["input_ids", "attention_mask"], ["token_embeddings", "sentence_embedding"]


class _Export(nn.Module):
    """A student without what depends on the values of its inputs, padded on the right."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        student, mask = self.student, attention_mask.bool()
        if isinstance(student.body, TransformerBody):
            given = {"attention_mask": attention_mask} if student.body.inputs.takes_mask else {}
            hidden = student.body.model(input_ids=input_ids, **given).last_hidden_state
        else:
            hidden = student.body(input_ids, mask)
        hidden = hidden if student.adaptor is None else student.adaptor(hidden)
        return hidden, student.sentence(hidden, mask)


def save_onnx(student: Student, path: Path) -> None:
    """Write a student as ONNX: inputs int64 [B, L] padded on the right, token embeddings [B, L, D] and vectors [B, D'].

    A prompt belongs to the texts: add `config.prompt` before they are tokenized.

    Raises:
        StudentError: the student reads padding, or torch cannot export it.
        InputError: the package onnx is missing, or the path is a folder or cannot be written.
    """
    require("onnx", "torch.onnx.export")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file, such as {path / 'model.onnx'}")
    body = student.body
    if isinstance(body, TransformerBody):
        if body.inputs.equal_lengths:
            raise StudentError(
                f"a {body.model.config.model_type} model reads padding, which an ONNX model of several texts cannot leave "
                "out: export a student of another family, or a static one"
            )
        body.model.set_attn_implementation("eager")
    ids = torch.ones(2, 7, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    axes = {name: {0: "batch", 1: "length"} for name in (*_INPUTS, _OUTPUTS[0])} | {_OUTPUTS[1]: {0: "batch"}}
    names = {"input_names": _INPUTS, "output_names": _OUTPUTS, "dynamic_axes": axes}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with torch.no_grad(), atomic_path(path) as scratch:
            torch.onnx.export(
                _Export(student).eval(), (ids, mask), str(scratch), opset_version=OPSET, dynamo=False, **names
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise StudentError(f"torch cannot export student {student.config.kind!r} ({first_line(error)})") from error
