"""A loaded teacher in inference mode, on DeepSpeed's inference engine.

Memory: the weights, and the activations of one batch.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msense.errors import InputError, MsenseError
from msense.teacher.batching import pad_batch
from msense.teacher.body import PaddedInputs, configured_attention, load_body, probe_ids, truncate_layers
from msense.teacher.files import body_folder, stored_dtype
from msense.teacher.spec import Attention
from msense.text import first_line

# the largest mean difference, in parts of the vectors, that rounding in another batch explains
ROUNDING = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}
# the same within a batch of one shape, where only a mixture of experts rounds otherwise
_CAUSAL_ROUNDING = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.05}


class Teacher:
    """A loaded teacher; `embed` returns the hidden states of a padded batch.

    Example:
        >>> teacher = Teacher("all-MiniLM-L6-v2", revision=None, layer=-1, dtype="float32", device="cpu")
        >>> ids, mask = pad_batch([np.array([101, 2924, 102])])
        >>> teacher.embed(ids, mask).shape
        torch.Size([1, 3, 384])
    """

    loads_stored = False  # whether weights are loaded in the dtype of their file, until the engine has them

    def __init__(  # noqa: PLR0913 - all that loading a teacher depends on
        self,
        name: str,
        *,
        revision: str | None,
        layer: int,
        dtype: str,
        device: str,
        threads: int = 1,
        keep: str | None = None,
        attention: Attention = "auto",
    ) -> None:
        """Load a teacher; `keep` truncates it, for example `layers:2` to its first two layers.

        Raises:
            InputError: it cannot be loaded, cannot read text alone, or does not have the attention of its settings.
        """
        os.environ.setdefault("DS_ACCELERATOR", device)  # read when DeepSpeed is first imported
        from transformers.utils import logging as transformers_logging

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        transformers_logging.disable_progress_bar()
        folder = body_folder(name, revision)
        loaded = stored_dtype(folder) if self.loads_stored else dtype
        model = load_body(folder, name, getattr(torch, loaded), attention)
        if keep is not None:
            truncate_layers(model, keep)
        self.name, self.layer, self.device, self.dtype = name, layer, device, dtype
        self.inputs = PaddedInputs(model)
        exact = {name: own.clone() for name, own in model.named_buffers() if own.dtype == torch.float32}
        self.engine = self._start(model)
        _restore(self.engine.module, exact)
        self._check_neighbours(name)
        self._check_attention(name, configured_attention(model.config))

    def _start(self, model: Any) -> Any:
        """Return the engine that runs a loaded model, with the same `module`."""
        import deepspeed

        dtype = getattr(torch, self.dtype)
        return deepspeed.init_inference(model.to(self.device), dtype=dtype, replace_with_kernel_inject=False)

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        """Compute the hidden states of one batch.

        Args:
            ids: int [B, L], token ids; arbitrary where the mask is 0.
            mask: bool [B, L], padding on either side.

        Returns:
            [B, L, D] in the teacher's dtype, on its device; rows of padding are meaningless.
        """
        last = self.layer in (-1, int(self.engine.module.config.get_text_config().num_hidden_layers))
        given = torch.from_numpy(ids.astype(np.int64)).to(self.device), torch.from_numpy(mask).to(self.device)
        with torch.inference_mode():
            return self.inputs.hidden_states(self.engine, *given, None if last else self.layer)

    def _check_neighbours(self, name: str) -> None:
        """Raise InputError for a model that cannot read text alone, or whose vectors depend on the texts in a batch."""
        short, long, longer = (probe_ids(self.engine.module.config, length).numpy()[0] for length in (6, 12, 14))
        try:
            alone = self.embed(*pad_batch([short]))[0].float()
            beside = [self.embed(*pad_batch([short, other]))[0, : len(short)].float() for other in (long, longer)]
        except (MsenseError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"teacher {name!r} cannot read text alone ({first_line(error)}): give a text encoder or decoder"
            ) from error
        dim = int(self.engine.module.config.get_text_config().hidden_size)
        if alone.shape != (len(short), dim):
            raise InputError(
                f"teacher {name!r}: a text of {len(short)} tokens gives vectors of shape {tuple(alone.shape)}, not one of "
                f"hidden_size {dim} for each: give another teacher"
            )
        for vectors in beside if bool(alone.isfinite().all()) else ():  # those that read texts refuse the others
            change = float(((vectors - alone).norm(dim=1) / alone.norm(dim=1).clamp(min=1e-6)).mean())
            if not change <= ROUNDING[self.dtype]:  # also true for NaN
                raise InputError(
                    f"teacher {name!r}: the vectors of a text change with the other texts of its batch (by {change:.1%}), "
                    "so that they have no senses of their own: give another teacher"
                )

    def _check_attention(self, name: str, attention: Attention) -> None:
        """Raise InputError unless the last token of a text moves those before it, or does not, as its settings say."""
        text = probe_ids(self.engine.module.config, 8).numpy()[0]
        changed = np.r_[text[:-1], text[0]]
        if attention == "auto" or len(text) < 2:
            return
        first, other = (self.embed(*pad_batch([ids]))[0, :-1].float() for ids in (text, changed))
        change = float(((first - other).norm(dim=1) / first.norm(dim=1).clamp(min=1e-6)).mean())
        if (change > _CAUSAL_ROUNDING[self.dtype]) != (attention == "bidirectional"):
            does = "ignore" if attention == "bidirectional" else "see"
            raise InputError(
                f"teacher {name!r}: its attention should be {attention}, but its tokens {does} those after them: correct "
                "is_causal in config.json or --attention, or give another teacher"
            )


def _restore(model: Any, buffers: Mapping[str, Tensor]) -> None:
    """Give a model's buffers the values that DeepSpeed rounded to the dtype of the weights.

    Such as the frequencies of rotary positions, whose rounding errors grow with the position; transformers keeps them.
    """
    for name, value in buffers.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[own] = value.to(module._buffers[own].device)
