"""Texts per second of students, of their teacher in sentence-transformers, and of model2vec.

All use the same threads and 32 texts per batch (model2vec: its own default) on Banking77's test texts; the students are
trained first where missing.
"""

import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.artifacts import data_folder
from benchmarks.shared import STUDENTS, Bench, Figures
from benchmarks.timing import in_turn
from msense import SenseEncoder
from msense.constants import DEMO_TEACHER
from msense.corpus.labelled import read_labelled
from msense.evaluation.model2vec import Model2Vec
from msense.teacher.files import body_folder

BATCH, TURNS = 32, 5
RATIOS = {  # figure: way over way, by the names of `_ways`
    "speedup_layers2": ("teacher", "layers2_bf16"),
    "speedup_layers2_same_dtype": ("teacher", "layers2"),
    "speedup_layers2_bf16": ("teacher_bf16", "layers2_bf16"),
    "speedup_static": ("teacher", "static"),
    "replace_cost": ("layers2_bf16_hard", "layers2_bf16"),
    "replace_cost_soft": ("layers2_bf16_soft", "layers2_bf16"),
}


def encode(bench: Bench) -> Figures:
    """Encode the same texts with every model, in turn."""
    os.environ["RAYON_NUM_THREADS"] = str(bench.workers)  # tokenizers reads it at its first batch
    texts = read_labelled(str(data_folder(bench.data, "banking77")), "test").first
    ways = _ways(bench, texts)
    torch.set_num_threads(bench.workers)
    for way in ways.values():
        way()
    turns = in_turn(ways, TURNS)
    figures = {f"encode.{key}": turns.ratio(*names) for key, names in RATIOS.items()}
    figures |= {f"encode.texts_per_s_{name}": len(texts) / turns.median(name) for name in ways}
    return figures | _against_model2vec(bench, ways["static"], texts)


def _ways(bench: Bench, texts: list[str]) -> dict[str, Callable[[], Any]]:
    """Return calls that encode all texts, by name."""
    from sentence_transformers import SentenceTransformer

    layers2, static = (bench.student(name) for name in STUDENTS)
    body = str(body_folder(DEMO_TEACHER, None))
    every: dict[str, Callable[..., Any]] = {}
    for name, dtype in (("teacher", "float32"), ("teacher_bf16", "bfloat16")):
        model = SentenceTransformer(body, device="cpu", trust_remote_code=False, model_kwargs={"dtype": dtype})
        every[name] = partial(model.encode, show_progress_bar=False)
    every["layers2"] = SenseEncoder.from_pretrained(layers2, device="cpu", dtype="float32").encode
    every["layers2_bf16"] = SenseEncoder.from_pretrained(layers2, device="cpu", dtype="bfloat16").encode
    for replace in ("hard", "soft"):
        every[f"layers2_bf16_{replace}"] = partial(every["layers2_bf16"], replace=replace)
    every["static"] = SenseEncoder.from_pretrained(static, device="cpu").encode
    return {name: partial(way, texts, batch_size=BATCH) for name, way in every.items()}


def _against_model2vec(bench: Bench, static: Callable[[], Any], texts: list[str]) -> Figures:
    """Time model2vec against the static student; return nothing without `--peer-python`."""
    if bench.peer_python is None:
        return {}
    ours, theirs = [], []
    with closing(Model2Vec(bench.peer_python, body_folder(DEMO_TEACHER, None), bench.workers)) as peer:
        for _ in range(TURNS):
            ours.append(in_turn({"static": static}, 1).median("static"))
            peer.encode(texts)
            theirs.append(peer.seconds)
    return {
        "encode.vs_model2vec": float(np.median(np.array(theirs) / ours)),
        "encode.texts_per_s_model2vec": len(texts) / float(np.median(theirs)),
    }
