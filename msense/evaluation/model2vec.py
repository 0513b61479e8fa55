"""model2vec distilled from a teacher in a separate Python, because its dependencies conflict with msense's.

This file is also the program that runs there, so it imports msense only inside functions of the parent process.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


class Model2Vec:
    """A process that distils model2vec and encodes texts.

    Attributes:
        seconds: duration of the last encoding by the process's own clock, without transfers.
        peak_memory: peak memory of the process while encoding, in bytes, distillation excluded.

    Example:
        >>> model = Model2Vec("m2v/bin/python", body_folder("all-MiniLM-L6-v2", None), threads=1)  # doctest: +SKIP
        >>> model.encode(["a text"]).shape  # doctest: +SKIP
        (1, 256)
    """

    def __init__(self, python: str | None, teacher: Path, threads: int) -> None:
        """Distil the teacher.

        Raises:
            InputError: the Python is missing or has no model2vec.
            MsenseError: distillation failed.
        """
        from msense.errors import InputError

        if python is None and importlib.util.find_spec("model2vec") is None:
            raise InputError(
                "model2vec is not installed, and its dependencies conflict with msense's: create an environment for it "
                '(python -m venv m2v; m2v/bin/pip install "model2vec[distill]") and pass --model2vec-python m2v/bin/python'
            )
        self._folder = tempfile.TemporaryDirectory(prefix="msense-")
        self._log = Path(self._folder.name, "log.txt")  # stderr of the last process
        self._python, self._threads = python or sys.executable, threads
        self._process = self._start("distil", str(teacher))
        self._process.communicate()
        if self._process.returncode:
            self._fail()
        self._process = self._start("serve")
        self._info = self._answer()
        self.seconds, self.peak_memory = 0.0, 0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]; MsenseError if the process exited."""
        folder = Path(self._folder.name)
        (folder / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("encode\n")
            self._process.stdin.flush()
        except OSError:
            self._fail()
        answer = self._answer()
        self.seconds, self.peak_memory = float(answer["seconds"]), int(answer["peak_memory"])
        return np.asarray(np.load(folder / "vectors.npy", allow_pickle=False), np.float32)

    def parameters(self) -> int:
        """Return the number of weights."""
        return int(self._info["parameters"])

    def files(self) -> list[Path]:
        """Return the files of the model."""
        return [Path(name) for name in self._info["files"]]

    def close(self) -> None:
        """End the process and remove its files."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def _start(self, *words: str) -> "subprocess.Popen[str]":
        from msense.errors import InputError

        names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS")
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            with self._log.open("wb") as log:
                return subprocess.Popen(
                    [self._python, __file__, self._folder.name, *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**kept, **dict.fromkeys(names, str(self._threads))},
                    encoding="utf-8",
                )
        except OSError as error:
            raise InputError(
                f"cannot run --model2vec-python {self._python} ({error}): give the path of a Python executable"
            ) from error

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self) -> NoReturn:
        from msense.errors import MsenseError
        from msense.text import plain

        code = self._process.wait()
        message = (self._log.read_text("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        raise MsenseError(
            f"model2vec exited with code {code} in {self._python} ({plain(message)}): check that this Python has "
            'pip install "model2vec[distill]" and can load the teacher'
        )


def _serve(folder: Path) -> None:
    """Encode on request; runs in the other Python."""
    from model2vec import StaticModel

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    model = StaticModel.from_pretrained(str(folder / "model"))
    files = [str(path) for path in (folder / "model").rglob("*") if path.is_file()]
    print(json.dumps({"parameters": int(np.prod(model.embedding.shape)), "files": files}), file=answers, flush=True)
    for _ in sys.stdin:
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        began = time.perf_counter()
        vectors = model.encode(texts)
        seconds = time.perf_counter() - began
        np.save(folder / "vectors.npy", np.asarray(vectors, np.float32))
        print(json.dumps({"seconds": seconds, "peak_memory": _peak()}), file=answers, flush=True)


def _peak() -> int:
    """Return the peak memory of this process in bytes; `getrusage` would include the parent's before the fork."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _distil(folder: Path, teacher: str) -> None:
    """Distil and save; runs in the other Python."""
    from model2vec.distill import distill

    distill(model_name=teacher).save_pretrained(str(folder / "model"))


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]  # this file would shadow the package
    if sys.argv[2] == "serve":
        _serve(Path(sys.argv[1]))
    else:
        _distil(Path(sys.argv[1]), sys.argv[3])
