"""A loaded teacher in inference mode, on DeepSpeed's inference engine.

Memory: the weights, and the activations of one batch.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from msense.teacher.batching import Batch, iter_batches
from msense.teacher.body import load_body, needs_position_ids, truncate_layers
from msense.teacher.files import body_folder


class Teacher:
    """A loaded teacher; `embed` returns the hidden states of a padded batch.

    Example:
        >>> teacher = Teacher("all-MiniLM-L6-v2", revision=None, layer=-1, dtype="float32", device="cpu")
        >>> ids, mask = pad_batch([np.array([101, 2924, 102])])
        >>> teacher.embed(ids, mask).shape
        torch.Size([1, 3, 384])
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        layer: int,
        dtype: str,
        device: str,
        threads: int = 1,
        keep: str | None = None,
    ) -> None:
        """Load a teacher; `keep` truncates it, for example `layers:2` to its first two layers."""
        os.environ.setdefault("DS_ACCELERATOR", device)  # read when DeepSpeed is first imported
        import deepspeed
        from transformers.utils import logging as transformers_logging

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        transformers_logging.disable_progress_bar()
        model = load_body(body_folder(name, revision), name, getattr(torch, dtype)).to(device)
        if keep is not None:
            truncate_layers(model, keep)
        self.layer, self.device = layer, device
        self.takes_positions = needs_position_ids(model)
        self.engine = deepspeed.init_inference(model, dtype=getattr(torch, dtype), replace_with_kernel_inject=False)

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        """Compute the hidden states of one batch.

        Args:
            ids: int [B, L], token ids; arbitrary where the mask is 0.
            mask: bool [B, L], padding on either side.

        Returns:
            [B, L, D] in the teacher's dtype, on its device; rows of padding are meaningless.
        """
        last = self.layer in (-1, int(self.engine.module.config.get_text_config().num_hidden_layers))
        optional = {}
        if not mask[:, 0].all() and self.takes_positions:  # left padding must not shift the positions
            optional["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0)).to(self.device)
        with torch.inference_mode():
            output = self.engine(
                input_ids=torch.from_numpy(ids.astype(np.int64)).to(self.device),
                attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self.device),
                output_hidden_states=not last,
                **optional,
            )
        hidden: Tensor = output.last_hidden_state if last else output.hidden_states[self.layer]
        return hidden


def embed_tokens(teacher: Teacher, rows: Sequence[np.ndarray], budget: int) -> Iterator[tuple[Batch, Tensor]]:
    """Run rows of token ids through a teacher in batches of at most `budget` tokens.

    Yields:
        Each batch, and its hidden states [B, L, D].
    """
    for batch in iter_batches(rows, budget):
        yield batch, teacher.embed(batch.ids, batch.mask)
