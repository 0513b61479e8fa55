"""Costs of models: weights, disk, speed and memory, measured side by side in one run.

Speeds are medians over interleaved rounds with equal threads; peak memory is that of a separate process that loads the model
and encodes. Memory: all models at once, and one batch each.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msense.dictionary import SenseDictionary
from msense.errors import MsenseError
from msense.evaluation.models import open_model
from msense.evaluation.spec import Spec
from msense.runtime.executor import peak_memory
from msense.text import plain

ROUNDS, MAX_SECONDS = 5, 120.0  # rounds, and the time after which no further round starts
MAX_TEXTS = 2000


@dataclass(frozen=True)
class Cost:
    """Costs of a model; speeds are medians over rounds."""

    parameters: int  # without a dictionary's, as the next
    disk_bytes: int
    dictionary_bytes: int  # 0 without a dictionary
    senses: int
    compression: float | None  # bytes of the dictionary corpus' embeddings (2 per number) over the dictionary's
    texts_per_s: float
    tokens_per_s: float | None  # None if the model does not count tokens
    peak_memory: int  # bytes of a process that loads the model and encodes
    speedup: float  # relative to the first model


def measure(specs: Sequence[Spec], texts: Sequence[str], device: str, threads: int) -> dict[str, Cost]:
    """Return the cost of every model by name, measured on the first `MAX_TEXTS` texts (too few measure the start-up)."""
    texts = texts[:MAX_TEXTS]
    own = [spec for spec in specs if spec.kind != "model2vec"]  # runs in its own process, which reports its memory
    peaks = {spec.name: _peak(spec, texts, device, threads) for spec in own}
    with ExitStack() as stack:
        models = {spec.name: stack.enter_context(open_model(spec, device, threads)) for spec in specs}
        seconds = _time_interleaved(models, texts)
        costs = {}
        for name, model in models.items():
            median = float(np.median(seconds[name]))
            costs[name] = Cost(
                parameters=model.parameters(),
                disk_bytes=sum(path.stat().st_size for path in model.files()),
                texts_per_s=len(texts) / median,
                tokens_per_s=model.tokens(texts) / median if hasattr(model, "tokens") else None,
                peak_memory=peaks.get(name) or model.peak_memory,
                speedup=float(np.median(seconds[specs[0].name] / seconds[name])),
                **_of_dictionary(getattr(model, "dictionary", None)),
            )
    return costs


def compare_speed(specs: Sequence[Spec], texts: Sequence[str], device: str, threads: int) -> dict[str, float]:
    """Return the texts per second of every model by name, timed side by side; median over rounds."""
    with ExitStack() as stack:
        models = {spec.name: stack.enter_context(open_model(spec, device, threads)) for spec in specs}
        return {name: len(texts) / float(np.median(own)) for name, own in _time_interleaved(models, texts).items()}


def _time_interleaved(models: dict[str, Any], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the seconds of each model, float64 [rounds]; models alternate within a round."""
    for model in models.values():
        model.encode(texts[:64])  # warm-up: lazy loading and compilation do not count
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < ROUNDS and time.perf_counter() - began < MAX_SECONDS:
        rounds.append([])
        for model in models.values():
            gc.collect()
            start = time.perf_counter()
            model.encode(texts)
            own = time.perf_counter() - start
            rounds[-1].append(getattr(model, "seconds", own))
    return dict(zip(models, np.array(rounds).T, strict=True))


def _of_dictionary(dictionary: SenseDictionary | None) -> dict[str, Any]:
    if dictionary is None:
        return {"dictionary_bytes": 0, "senses": 0, "compression": None}
    scales = [] if dictionary.ragged.scales is None else [dictionary.ragged.scales]
    arrays = (dictionary.offsets, dictionary.counts, dictionary.rms_distance, dictionary.token_counts)
    size = sum(array.nbytes for array in (*dictionary.ragged.parts, *scales, *arrays))
    embeddings = int(dictionary.token_counts.sum()) * dictionary.dim * 2
    return {"dictionary_bytes": size, "senses": len(dictionary), "compression": embeddings / size if size else None}


def _peak(spec: Spec, texts: Sequence[str], device: str, threads: int) -> int:
    """Return the peak memory in bytes of a fresh process that loads a model and encodes."""
    request = {"spec": asdict(spec), "texts": list(texts), "device": device, "threads": threads}
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # of this msense
    process = subprocess.run(
        [sys.executable, "-m", "msense.evaluation.cost"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        check=False,
    )
    words = process.stdout.split()
    if process.returncode or not words:
        message = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise MsenseError(
            f"{spec.name}: the memory measurement exited with code {process.returncode} ({plain(message)}): fix the cause, "
            "or skip costs with --no-cost"
        )
    return int(words[-1])


if __name__ == "__main__":  # run a request of `_peak`
    request = json.load(sys.stdin)
    with open_model(Spec(**request["spec"]), request["device"], request["threads"]) as model:
        model.encode(request["texts"])
    sys.stdout.write(f"\n{peak_memory()}\n")
