"""What models cost: weights, bytes on disk, speed and memory, measured side by side in one run.

Comes in: specs and texts. Goes out: a `Cost` a model. Speeds are medians over turns, all models in turn with the same threads;
memory is that of a process of its own that loads the model and encodes. Holds all models at once, and one batch each.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from msense.dictionary import SenseDictionary
from msense.errors import MsenseError
from msense.evaluation.models import Model, opened
from msense.evaluation.report import Cost
from msense.evaluation.spec import Spec
from msense.runtime import peak_memory
from msense.text import plain

TURNS, SECONDS = 5, 120.0  # no turn begins later
MOST_TEXTS = 2000


def measure(specs: Sequence[Spec], texts: Sequence[str], device: str, threads: int) -> dict[str, Cost]:
    """Measure all models on the same texts.

    Args:
        specs: of the models; speeds are also told over the first.
        texts: some hundreds at least, or starting dominates; the first `MOST_TEXTS` count.
        device: cuda or cpu.
        threads: of every model.

    Returns:
        A cost by the name of each model.
    """
    texts = texts[:MOST_TEXTS]
    own = [spec for spec in specs if spec.kind != "model2vec"]  # that is a process of its own, and tells its memory
    peaks = {spec.name: _peak(spec, texts, device, threads) for spec in own}
    with ExitStack() as held:
        models = {spec.name: held.enter_context(opened(spec, device, threads)) for spec in specs}
        return _told(models, peaks, texts)


def _told(models: dict[str, Model], peaks: dict[str, int], texts: Sequence[str]) -> dict[str, Cost]:
    """Time loaded models, and tell all that they cost."""
    seconds = _in_turn(models, texts)
    first = seconds[next(iter(models))]
    return {
        name: Cost(
            parameters=model.parameters(),
            disk_bytes=sum(path.stat().st_size for path in model.files()),
            texts_per_s=len(texts) / float(np.median(seconds[name])),
            tokens_per_s=_tokens(model, texts, float(np.median(seconds[name]))),
            peak_memory=peaks[name] if name in peaks else int(getattr(model, "peak_memory", 0)),
            speedup=float(np.median(first / seconds[name])),
            **_of_dictionary(getattr(model, "dictionary", None)),
        )
        for name, model in models.items()
    }


def _in_turn(models: dict[str, Model], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Time every model, one after the other, again and again: float64 [turns] each."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.encode(texts[:64])  # what is loaded or compiled at first use is not counted
    began = time.perf_counter()
    for _ in range(TURNS):
        for name, model in models.items():
            gc.collect()
            start = time.perf_counter()
            model.encode(texts)
            own = time.perf_counter() - start
            seconds[name].append(getattr(model, "seconds", None) or own)
        if time.perf_counter() - began > SECONDS:
            break
    return {name: np.array(told) for name, told in seconds.items()}


def _tokens(model: Model, texts: Sequence[str], seconds: float) -> float | None:
    """Return tokens a second, where the model says how many there are."""
    count = getattr(model, "tokens", None)
    return None if count is None else count(texts) / seconds


def _of_dictionary(dictionary: SenseDictionary | None) -> dict[str, Any]:
    """Return a dictionary's size, and how many times larger the embeddings are that it stands for, at 2 bytes a number."""
    if dictionary is None:
        return {"dictionary_bytes": 0, "senses": 0, "compression": None}
    parts = [*dictionary.ragged.parts, *([] if dictionary.ragged.scales is None else [dictionary.ragged.scales])]
    arrays = (dictionary.offsets, dictionary.counts, dictionary.spread, dictionary.token_counts)
    size = sum(part.nbytes for part in parts) + sum(array.nbytes for array in arrays)
    stands_for = int(dictionary.token_counts.sum()) * dictionary.dim * 2
    return {"dictionary_bytes": size, "senses": len(dictionary), "compression": stands_for / size if size else None}


def _peak(spec: Spec, texts: Sequence[str], device: str, threads: int) -> int:
    """Return the peak memory of a fresh process that loads a model and encodes."""
    told = {"spec": asdict(spec), "texts": list(texts), "device": device, "threads": threads}
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # where this msense is
    process = subprocess.run(
        [sys.executable, "-m", "msense.evaluation.cost"],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        check=False,
    )
    words = process.stdout.split()
    if process.returncode or not words:
        said = (process.stderr.strip().splitlines() or ["nothing"])[-1]
        raise MsenseError(
            f"{spec.name}: the process that was to measure its memory ended with code {process.returncode} and said "
            f"{plain(said)!r}: mend that, or leave costs out with --no-cost"
        )
    return int(words[-1])


def _load_and_encode() -> None:
    """Do what standard input says, and write this process's peak memory to standard output."""
    told = json.load(sys.stdin)
    with opened(Spec(**told["spec"]), told["device"], told["threads"]) as model:
        model.encode(told["texts"])
    sys.stdout.write(f"\n{peak_memory()}\n")


if __name__ == "__main__":
    _load_and_encode()
