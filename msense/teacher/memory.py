"""How much memory a teacher takes, from its config alone: its parameters are counted on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from msense.teacher.body import body_of
from msense.teacher.files import body_folder, loading

_LIVE_PARAMETERS = 10**9  # that ZeRO keeps on the device at most, with offloaded weights (stage3_max_live_parameters)
_HIDDEN_COPIES, _INNER_COPIES = 6, 3  # of a layer's states [tokens, D] and [tokens, inner] at one time
_INNER_SIZES = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True)
class TeacherSize:
    """Sizes of a teacher's model, in numbers."""

    parameters: int
    embeddings: int  # parameters of embedding tables, of which every rank has all
    largest: int  # numbers of the largest parameter
    dim: int
    inner: int  # size of the states within a layer
    layers: int

    def rank_bytes(
        self, dtype: str, tokens: int, *, ranks: int = 1, offload: bool = False, keeps_layers: bool = False
    ) -> int:
        """Return about how many bytes each rank takes on its device.

        Args:
            dtype: of weights and activations.
            tokens: of a batch.
            ranks: over which the layers are split.
            offload: whether the weights stay in host memory.
            keeps_layers: whether the states of all layers are kept, to read one before the last.
        """
        weights = (self.parameters - self.embeddings) // ranks + self.embeddings
        if offload:
            weights = min(self.parameters, _LIVE_PARAMETERS + self.largest)
        per_token = _HIDDEN_COPIES * self.dim + _INNER_COPIES * self.inner // ranks
        per_token += self.layers * self.dim if keeps_layers else 0
        return (weights + tokens * per_token) * item_size(dtype)


def item_size(dtype: str) -> int:
    """Return the bytes of a number."""
    size: int = getattr(torch, dtype).itemsize
    return size


def teacher_size(name: str, revision: str | None) -> TeacherSize:
    """Return the sizes of a teacher, whose weights are not read.

    Raises:
        InputError: no model can be made of its config.
    """
    from transformers import AutoConfig, AutoModel

    with loading(repr(name)):
        config = AutoConfig.from_pretrained(body_folder(name, revision), trust_remote_code=False)
        with torch.device("meta"):
            model = body_of(AutoModel.from_config(config, trust_remote_code=False))
    text: Any = model.config.get_text_config()
    dim = int(text.hidden_size)
    inner = next((int(size) for key in _INNER_SIZES if isinstance(size := getattr(text, key, None), int)), 4 * dim)
    tables = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    counts = [parameter.numel() for parameter in model.parameters()]
    return TeacherSize(
        parameters=sum(counts),
        embeddings=sum(table.numel() for table in tables),
        largest=max(counts, default=0),
        dim=dim,
        inner=inner,
        layers=int(text.num_hidden_layers),
    )
