"""Teachers that can be split, and what their ranks compute, importable by every process."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from msense.errors import InputError
from msense.runtime.local_training import SpawnedPool
from msense.teacher.batching import pad_batch
from msense.teacher.parallel import SplitTeacher

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES |= {"intermediate_size": 256, "max_position_embeddings": 64}  # DeepSpeed cuts inner states in pieces of 64
BATCH = pad_batch([np.arange(5, 17), np.arange(20, 27), np.arange(30, 31)])
TEACHER = {"revision": None, "layer": -1, "dtype": "float32", "device": "cpu"}


def write_body(folder: Path, kind: str, **settings: object) -> str:
    """Write a random model without a tokenizer; its weights are large enough that a wrong cut shows."""
    from transformers import CONFIG_MAPPING, AutoModel

    names = CONFIG_MAPPING[kind]().to_dict().keys()
    config = CONFIG_MAPPING[kind](**{name: value for name, value in SIZES.items() if name in names} | settings)
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return str(folder)


def split_vectors(teachers: list[dict[str, Any]], store: str) -> list[list[np.ndarray | str]]:
    """Return what each of two ranks computes of `BATCH`, for each teacher twice; or the error in place of the second."""
    with SpawnedPool(2) as pool:
        ranks = [pool.submit(_rank_vectors, rank, teachers, store) for rank in range(2)]
        return [rank.result() for rank in ranks]


def _rank_vectors(rank: int, teachers: list[dict[str, Any]], store: str) -> list[np.ndarray | str]:
    rows: list[np.ndarray | str] = []
    for given in teachers:
        try:
            teacher = SplitTeacher(rank=rank, ranks=2, store=store, **{**TEACHER, **given})
            rows += [teacher.embed(*BATCH).float().numpy() for _ in range(2)]
        except InputError as error:
            rows += ["", str(error)]
    return rows
