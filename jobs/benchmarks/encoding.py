"""Texts per second of students, of their teacher in sentence-transformers, and of model2vec.

All use the same threads and 32 texts per batch (model2vec: its own default) on Banking77's test texts; the students are
those of `distill`, trained first where missing.
"""

import logging
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.distilling import STUDENTS, banking_cache, student
from benchmarks.senses import MORE, load_task
from benchmarks.shared import Bench, Figures
from benchmarks.timing import in_turn
from msense import SenseEncoder
from msense.constants import DEMO_TEACHER
from msense.evaluation.model2vec import Model2Vec
from msense.teacher.files import body_folder

logger = logging.getLogger("msense.benchmark")
BATCH, TURNS, SECONDS = 32, 5, 150  # no turn starts later
REPLACING_TURNS = 15  # more, as these times are close to each other
PEER_ROUNDS, PEER_TURNS = 3, 5  # model2vec runs in its own process: a few turns of each side, repeated
RATIOS = {  # figure: way over way, by the names of `_ways`
    "speedup_layers2": ("teacher", "layers2_bf16"),
    "speedup_layers2_same_dtype": ("teacher", "layers2"),
    "speedup_layers2_bf16": ("teacher_bf16", "layers2_bf16"),
    "speedup_static": ("teacher", "static"),
}
REPLACING = {
    "replace_cost": ("layers2_bf16_hard", "layers2_bf16"),
    "replace_cost_soft": ("layers2_bf16_soft", "layers2_bf16"),
}


def encode(bench: Bench) -> Figures:
    """Encode the same texts with every model, in turn."""
    os.environ["RAYON_NUM_THREADS"] = str(bench.workers)  # tokenizers reads it at its first batch
    texts = load_task(bench.data("banking77")).texts["test"]
    cache = banking_cache(bench)
    dictionary = cache.dictionary(MORE)
    folders = {name: student(cache, dictionary, name).folder for name in STUDENTS}
    before = torch.get_num_threads()
    torch.set_num_threads(bench.workers)
    ways = _ways(folders, texts)
    for way in ways.values():
        way()
    turns = in_turn(ways, TURNS, SECONDS)
    figures = {f"encode.{key}": turns.ratio(*names) for key, names in RATIOS.items()}
    figures |= {f"encode.texts_per_s_{name}": len(texts) / turns.median(name) for name in turns.seconds}
    turns = in_turn({name: ways[name] for name in sum(REPLACING.values(), ())}, REPLACING_TURNS)
    figures |= {f"encode.{key}": turns.ratio(*names) for key, names in REPLACING.items()}
    figures |= _against_model2vec(bench, ways["static"], texts)
    torch.set_num_threads(before)
    return figures


def _ways(folders: dict[str, Path], texts: list[str]) -> dict[str, Callable[[], Any]]:
    """Return calls that encode all texts, by name."""
    from sentence_transformers import SentenceTransformer

    body = str(body_folder(DEMO_TEACHER, None))
    every: dict[str, Callable[..., Any]] = {}
    for name, dtype in (("teacher", "float32"), ("teacher_bf16", "bfloat16")):
        model = SentenceTransformer(body, device="cpu", trust_remote_code=False, model_kwargs={"dtype": dtype})
        every[name] = partial(model.encode, show_progress_bar=False)
    layers2 = folders["layers2"]
    every["layers2"] = SenseEncoder.from_pretrained(layers2, device="cpu", dtype="float32").encode
    every["layers2_bf16"] = SenseEncoder.from_pretrained(layers2, device="cpu", dtype="bfloat16").encode
    for replace in ("hard", "soft"):
        every[f"layers2_bf16_{replace}"] = partial(every["layers2_bf16"], replace=replace)
    every["static"] = SenseEncoder.from_pretrained(folders["static"], device="cpu").encode
    return {name: partial(way, texts, batch_size=BATCH) for name, way in every.items()}


def _against_model2vec(bench: Bench, static: Callable[[], Any], texts: list[str]) -> Figures:
    """Time model2vec against the static student; return nothing without `--peer-python`."""
    if bench.peer_python is None:
        logger.info("no --peer-python: the figures against model2vec are omitted")
        return {}
    ratios, medians = [], []
    with closing(Model2Vec(bench.peer_python, body_folder(DEMO_TEACHER, None), bench.workers)) as peer:
        for _ in range(PEER_ROUNDS):
            ours, theirs = in_turn({"static": static}, PEER_TURNS).median("static"), []
            for _ in range(PEER_TURNS):
                peer.encode(texts)
                theirs.append(peer.seconds)
            medians.append(float(np.median(theirs)))
            ratios.append(medians[-1] / ours)
    return {
        "encode.vs_model2vec": float(np.median(ratios)),
        "encode.texts_per_s_model2vec": len(texts) / float(np.median(medians)),
    }
