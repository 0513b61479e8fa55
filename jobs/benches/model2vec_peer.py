"""model2vec, distilled from the demo teacher in a Python of its own: its packages do not go together with ours.

In: texts, and `--peer-python`, a Python with `pip install "model2vec[distill]"`. Out: vectors, and texts per second of its
own `encode`. This file is also what runs there; it imports nothing of msense then.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

logger = logging.getLogger("msense.bench")


def encode(python: str | None, texts: dict[str, list[str]], threads: int = 1) -> dict[str, np.ndarray] | None:
    """Return vectors [P, D] of texts by part; None without such a Python."""
    found = run(python, texts, threads, turns=0)
    return None if found is None else found[0]


def run(
    python: str | None, texts: dict[str, list[str]], threads: int, turns: int
) -> tuple[dict[str, np.ndarray], list[float]] | None:
    """Return vectors by part, and the seconds of so many encodings of all texts with so many threads."""
    from msense.config import DEMO_TEACHER
    from msense.teacher_folder import body_folder

    if python is None:
        logger.info("no --peer-python, a Python with model2vec: its figures are left out")
        return None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        given = [folder, str(body_folder(DEMO_TEACHER, None)), str(turns)]
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS")}
        subprocess.run([python, __file__, *given], check=True, env={**os.environ, **limits})
        with np.load(Path(folder, "vectors.npz")) as arrays:
            vectors = {name: arrays[name] for name in texts}
        seconds = json.loads(Path(folder, "seconds.json").read_text())
    return vectors, seconds


def _peer(folder: str, teacher: str, turns: str) -> None:
    """Distill and encode; in the other Python."""
    from model2vec.distill import distill

    texts = json.loads(Path(folder, "texts.json").read_text(encoding="utf-8"))
    model = distill(model_name=teacher)
    vectors = {part: np.asarray(model.encode(rows), np.float32) for part, rows in texts.items()}
    np.savez(str(Path(folder, "vectors.npz")), **vectors)  # type: ignore[arg-type]
    every, seconds = [text for rows in texts.values() for text in rows], []
    for _ in range(int(turns)):
        began = time.perf_counter()
        model.encode(every)
        seconds.append(time.perf_counter() - began)
    Path(folder, "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    _peer(*sys.argv[1:])
