"""model2vec distilled from a teacher in a separate Python, because its dependencies conflict with msense's.

This file is also the program that runs there, so only the parent process imports msense.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

if __name__ != "__main__":
    from msense.errors import InputError, MsenseError
    from msense.text import plain


class Model2Vec:
    """A process that distills model2vec and encodes texts.

    After `encode`, `seconds` is its duration by the process's own clock, without transfers, and `peak_memory` the peak memory
    of the process in bytes, distillation excluded.

    Example:
        >>> model = Model2Vec("m2v/bin/python", body_folder("all-MiniLM-L6-v2", None), threads=1)  # doctest: +SKIP
        >>> model.encode(["a text"]).shape  # doctest: +SKIP
        (1, 256)
    """

    def __init__(self, python: str | None, teacher: Path, threads: int) -> None:
        """Distill the teacher; InputError if the Python is missing, MsenseError if it has no model2vec or distillation failed."""
        self._folder = tempfile.TemporaryDirectory(prefix="msense-")
        self._log = Path(self._folder.name, "log.txt")  # stderr of the last process
        self._python, self._threads = python or sys.executable, threads
        self._process = self._start(str(teacher))  # distills and ends
        self._process.communicate()
        if self._process.returncode:
            self._fail()
        self._process = self._start()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]; MsenseError if the process exited."""
        folder = Path(self._folder.name)
        (folder / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
        with suppress(OSError):  # without a process, there is no answer
            self._process.stdin.write("encode\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            self._fail()
        self._answer: dict[str, Any] = json.loads(line)
        self.seconds, self.peak_memory = float(self._answer["seconds"]), int(self._answer["peak_memory"])
        return np.asarray(np.load(folder / "vectors.npy", allow_pickle=False), np.float32)

    def parameters(self) -> int:
        """Return the number of weights; after `encode`."""
        return int(self._answer["parameters"])

    def files(self) -> list[Path]:
        """Return the files of the model; after `encode`."""
        return [Path(name) for name in self._answer["files"]]

    def close(self) -> None:
        """End the process and remove its files."""
        self._process.communicate()
        self._folder.cleanup()

    def _start(self, *teacher: str) -> Any:
        names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS")
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            with self._log.open("wb") as log:
                return subprocess.Popen(
                    [self._python, __file__, self._folder.name, *teacher],
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

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        message = (self._log.read_text("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        raise MsenseError(
            f"model2vec exited with code {code} in {self._python} ({plain(message)}): check that this Python can load the "
            "teacher and has model2vec, whose dependencies conflict with msense's (python -m venv m2v; m2v/bin/pip install "
            '"model2vec[distill,quantization]"; pass --model2vec-python m2v/bin/python)'
        )


def _serve(folder: Path) -> None:
    """Encode on request; runs in the other Python."""
    from model2vec import StaticModel

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    model = StaticModel.from_pretrained(str(folder / "model"))
    files = [str(path) for path in (folder / "model").rglob("*") if path.is_file()]
    facts = {"parameters": int(np.prod(model.embedding.shape)), "files": files}
    for _ in sys.stdin:
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        began = time.perf_counter()
        vectors = model.encode(texts)
        seconds = time.perf_counter() - began
        np.save(folder / "vectors.npy", np.asarray(vectors, np.float32))
        print(json.dumps({**facts, "seconds": seconds, "peak_memory": _peak()}), file=answers, flush=True)


def _peak() -> int:
    """Return the peak memory of this process in bytes; `getrusage` would include the parent's before the fork."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]  # this file would shadow the package
    if len(sys.argv) == 2:
        _serve(Path(sys.argv[1]))
    else:
        from model2vec.distill import distill

        distill(model_name=sys.argv[2]).save_pretrained(f"{sys.argv[1]}/model")
