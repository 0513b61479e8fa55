"""Texts per second of students, of their teacher in sentence-transformers, and of model2vec.

In: Banking77's test texts; the students that `distill` makes (made if they are not there). Out: ratios, each the median of
turns, with the same threads for all, 32 texts a batch (model2vec: its own default). Holds the models and all vectors.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benches.distilling import STUDENTS, bench_shop
from benches.few_shot import read_task
from benches.senses import MORE
from benches.shared import Bench, Figures, model2vec
from benches.turns import Turns, in_turn
from msense import SenseEncoder
from msense.config import DEMO_TEACHER
from msense.teacher_folder import body_folder

logger = logging.getLogger("msense.bench")

BATCH, TURNS, SECONDS = 32, 5, 150  # no turn begins later
REPLACING_TURNS = 15  # of those three alone: their times are near each other
PEER_ROUNDS, PEER_TURNS = 3, 5  # model2vec is a process of its own: a few turns of each side, again and again
RATIOS = {  # key: what is timed over what, by the names of `_ways`
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
    os.environ["RAYON_NUM_THREADS"] = str(bench.workers)  # tokenizers reads it once, at its first batch
    texts = read_task(bench.data("banking77")).texts["test"]
    shop = bench_shop(bench, "banking77", str(bench.data("banking77") / "train.csv"))
    dictionary = shop.dictionary(MORE)
    folders = {name: shop.student(dictionary, name, student=kind).folder for name, kind in STUDENTS.items()}
    with _threads(bench.workers):
        ways = _ways(folders, texts)
        for way in ways.values():
            way()
        turns = in_turn(ways, TURNS, SECONDS)
        near = in_turn({name: ways[name] for name in sum(REPLACING.values(), ())}, REPLACING_TURNS)
        figures = {f"encode.{key}": near.ratio(*names) for key, names in REPLACING.items()}
        return _figures(turns, len(texts)) | figures | _against_model2vec(bench, ways["static"], texts)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Have PyTorch compute with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ways(folders: dict[str, Path], texts: list[str]) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name: each returns the vectors of all texts."""
    from sentence_transformers import SentenceTransformer

    body = str(body_folder(DEMO_TEACHER, None))
    teacher: dict[str, Any] = {
        name: SentenceTransformer(body, device="cpu", trust_remote_code=False, model_kwargs={"dtype": dtype})
        for name, dtype in (("teacher", "float32"), ("teacher_bf16", "bfloat16"))
    }
    layers2 = SenseEncoder.from_pretrained(folders["layers2"], device="cpu", dtype="float32")
    layers2_bf16 = SenseEncoder.from_pretrained(folders["layers2"], device="cpu", dtype="bfloat16")
    static = SenseEncoder.from_pretrained(folders["static"], device="cpu")
    students: dict[str, Callable[..., Any]] = {
        "layers2": layers2.encode,
        "layers2_bf16": layers2_bf16.encode,
        "layers2_bf16_hard": partial(layers2_bf16.encode, replace="hard"),
        "layers2_bf16_soft": partial(layers2_bf16.encode, replace="soft"),
        "static": static.encode,
    }
    every: dict[str, Callable[..., Any]] = dict(students)
    for name, model in teacher.items():
        every[name] = partial(model.encode, show_progress_bar=False)
    return {name: partial(way, texts, batch_size=BATCH) for name, way in every.items()}


def _figures(turns: Turns, texts: int) -> Figures:
    """Return the ratios, and how many texts a second each way took."""
    figures = {f"encode.{key}": turns.ratio(*names) for key, names in RATIOS.items()}
    speeds = {f"encode.texts_per_s_{name}": texts / float(np.median(told)) for name, told in turns.seconds.items()}
    return figures | speeds


def _against_model2vec(bench: Bench, static: Callable[[], Any], texts: list[str]) -> Figures:
    """Time model2vec, and the static student before each time; nothing without a Python that has model2vec."""
    ratios, seconds = [], []
    with model2vec(bench, bench.workers) as peer:
        if peer is None:
            return {}
        for _ in range(PEER_ROUNDS):
            ours = in_turn({"static": static}, PEER_TURNS).seconds["static"]
            theirs = []
            for _ in range(PEER_TURNS):
                peer.encode(texts)
                theirs.append(peer.seconds)
            seconds.append(float(np.median(theirs)))
            ratios.append(seconds[-1] / float(np.median(ours)))
    logger.debug("static over model2vec: %s", " ".join(f"{ratio:.2f}" for ratio in ratios))
    return {
        "encode.vs_model2vec": float(np.median(ratios)),
        "encode.texts_per_s_model2vec": len(texts) / float(np.median(seconds)),
    }
