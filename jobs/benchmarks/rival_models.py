"""Models of other libraries, distilled from the same teacher's vectors of the same texts as msense's students.

Each is made in a process of its own, with a stated number of threads, and only once.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import train_rival
from benchmarks.artifacts import INPUTS, made_once
from benchmarks.texts import TEXTS, VECTORS
from msense.errors import InputError, MsenseError
from msense.text import plain

logger = logging.getLogger("msense.rivals")
BATCH = 64  # texts per step, as in sentence-transformers' examples of distillation
LEARNING_RATES = {  # peak, from sentence-transformers' published examples of static models and of distillation
    "st-table": 0.2,
    "st-table-warm": 0.05,
    "st-minilm-2": 1e-4,
}
PCA_DIMS = 256  # tokenlearn's default


@dataclass(frozen=True)
class RivalModels:
    """Makes models in a folder, from texts and vectors as `export_texts` writes them."""

    folder: Path
    shared: Path  # for models that depend on no texts
    texts: Path
    teacher: Path
    tokenizer: Path  # the teacher's tokenizer.json
    epochs: int
    threads: int
    model2vec_python: str | None = None
    tokenlearn_python: str | None = None

    def trained(self, name: str, rate: float) -> Path:
        """Return a model that sentence-transformers trained: one of `LEARNING_RATES`."""
        training: dict[str, Any] = {
            "num_train_epochs": self.epochs,
            "learning_rate": rate,
            "per_device_train_batch_size": BATCH,
        }
        training |= {"seed": 0, "threads": self.threads}

        def make(new: Path) -> None:
            with tempfile.TemporaryDirectory(prefix="msense-") as scratch:
                settings: dict[str, Any] = {"texts": str(self.texts), "output": str(new), "scratch": scratch}
                settings |= {"start": self._start(name), "training": training}
                self._run(sys.executable, name, "sentence_transformers", settings)

        given = {**self._inputs(), **training, "sentence-transformers": version("sentence-transformers")}
        given.pop("threads")
        return made_once(self.folder / f"{name}-{rate:g}", given, make)

    def _start(self, name: str) -> dict[str, str]:
        """Return where a model's weights are from; see `train_rival.train_sentence_transformer`."""
        if name == "st-minilm-2":
            return {"layers": str(self.teacher)}
        return (
            {"table": str(self._whole_model2vec())} if name == "st-table-warm" else {"tokenizer": str(self.tokenizer)}
        )

    def _whole_model2vec(self) -> Path:
        """Return model2vec with the teacher's width."""
        assert self.model2vec_python is not None

        def make(new: Path) -> None:
            settings = {"teacher": str(self.teacher), "output": str(new)}
            self._run(self.model2vec_python, "model2vec", "model2vec", settings)

        return made_once(self.shared / "model2vec", {}, make)

    def tokenlearn(self) -> Path:
        """Return a model that tokenlearn's own command trained until its validation loss no longer improved."""

        def make(new: Path) -> None:
            with tempfile.TemporaryDirectory(prefix="msense-") as scratch:
                vectors = np.load(self.texts / VECTORS, allow_pickle=False)
                # its training ends once a step gains less than 1e-4: scaled to a mean square of 1, which no cosine notices
                np.save(Path(scratch, VECTORS), vectors / np.sqrt(np.square(vectors).mean()))
                Path(scratch, TEXTS).symlink_to(self.texts / TEXTS)
                flags: dict[str, Any] = {"model-name": self.teacher, "data-path": scratch, "save-path": new}
                flags |= {"pca-dims": min(PCA_DIMS, *vectors.shape)}
                words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
                self._call(self.tokenlearn_python, "tokenlearn", ["-m", "tokenlearn.train", *words])

        return made_once(self.folder / "tokenlearn", self._inputs(), make)

    def wordllama(self) -> Path:
        """Return the model in the package wordllama, which has another teacher and other texts."""

        def make(new: Path) -> None:
            self._run(self.tokenlearn_python, "wordllama", "wordllama", {"output": str(new)})

        return made_once(self.shared / "wordllama", {}, make)

    def _inputs(self) -> dict[str, Any]:
        """Return what a model depends on, besides its own settings."""
        own: dict[str, Any] = json.loads((self.texts / INPUTS).read_text(encoding="utf-8"))
        return own

    def _run(self, python: str | None, name: str, kind: str, settings: dict[str, Any]) -> None:
        """Run `train_rival` in a Python."""
        with tempfile.TemporaryDirectory(prefix="msense-") as scratch:
            path = Path(scratch, "settings.json")
            path.write_text(json.dumps(settings), encoding="utf-8")
            self._call(python, name, [train_rival.__file__, kind, str(path)])

    def _call(self, python: str | None, name: str, words: Sequence[str]) -> None:
        """Run a Python on words; MsenseError with the end of its output if it fails."""
        logger.info("%s: made in a process of its own with %d threads", name, self.threads)
        done = call_python(python, words, self.threads)
        if done.returncode:
            message = (done.stdout.strip().splitlines() or ["no message"])[-1]
            raise MsenseError(
                f"{name} failed with code {done.returncode} in {python} ({plain(message)}): fix the cause, or leave it out with "
                f"--without {name}"
            )


def call_python(python: str | None, words: Sequence[str], threads: int) -> "subprocess.CompletedProcess[str]":
    """Run a Python, by default this one, on words without network; its output is in `stdout`."""
    foreign = python not in (None, sys.executable)
    kept = {key: value for key, value in os.environ.items() if not (foreign and key in ("PYTHONPATH", "PYTHONHOME"))}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    try:
        return subprocess.run(
            [python or sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**kept, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"},
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise InputError(f"cannot run {python} ({error}): give the path of a Python executable") from error


def obstacles(model2vec_python: str | None, tokenlearn_python: str | None) -> dict[str, str]:
    """Return why models cannot be made here, by name; empty texts for those that can."""
    own = ("accelerate", sys.executable, "msense[bench]")
    model2vec = ("model2vec", model2vec_python, '"model2vec[distill,quantization]"')
    needs: dict[str, list[tuple[str, str | None, str]]] = {
        "st-table": [own],
        "st-table-warm": [own, model2vec],
        "st-minilm-2": [own],
        "model2vec": [model2vec],
        "tokenlearn": [("tokenlearn", tokenlearn_python, "tokenlearn")],
        "wordllama": [("wordllama", tokenlearn_python, "wordllama")],
    }
    missing = {
        name: [install for package, python, install in packages if not _has(python, package)]
        for name, packages in needs.items()
    }
    return {
        name: f"it needs a Python with `pip install {' '.join(packages)}` (--help names the flag)" if packages else ""
        for name, packages in missing.items()
    }


def _has(python: str | None, package: str) -> bool:
    """Return whether a Python is given and has a package."""
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return python is not None and call_python(python, ["-c", question], 1).returncode == 0
