"""model2vec, distilled from a teacher in a Python of its own: its packages do not go together with ours.

Comes in: a Python with `pip install "model2vec[distill]"`, a teacher's folder, then texts. Goes out: vectors, and what that
process says of itself. This file is also what runs there, and imports nothing of msense then. Holds the vectors.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


class Peer:
    """A process that has distilled model2vec and encodes what it is given.

    Attributes:
        parameters: weights of the model.
        files: of the model.
        seconds: that its last encoding took, by its own clock; nothing else is counted.
        peak_memory: the most bytes that the process held while it encoded, the distilling left out.
    """

    def __init__(self, python: str | None, teacher: Path, threads: int) -> None:
        """Distil.

        Raises:
            BadInput: there is no such Python, or it has no model2vec.
            MsenseError: the distilling failed.
        """
        from msense.errors import BadInput

        if python is None and importlib.util.find_spec("model2vec") is None:
            raise BadInput(
                "model2vec is not installed, and its packages do not go together with these: make an environment for it "
                '(python -m venv m2v; m2v/bin/pip install "model2vec[distill]") and give --model2vec-python m2v/bin/python'
            )
        self._folder = tempfile.TemporaryDirectory(prefix="msense-")
        self._python, self._threads = python or sys.executable, threads
        self._distil(teacher)
        self._process = self._start("serve")
        told = self._answer()
        self.parameters = int(told["parameters"])
        self.files = [Path(name) for name in told["files"]]
        self.seconds, self.peak_memory = 0.0, 0

    @property
    def _log(self) -> Path:
        """What its process says, of the one that was started last."""
        return Path(self._folder.name, "log.txt")

    def _distil(self, teacher: Path) -> None:
        process = self._start("distil", str(teacher))
        process.communicate()
        if process.returncode:
            self._failed(process)

    def _start(self, *words: str) -> "subprocess.Popen[str]":
        from msense.errors import BadInput

        names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS")
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        env = {**kept, **dict.fromkeys(names, str(self._threads))}
        command = [self._python, __file__, self._folder.name, *words]
        try:
            with self._log.open("wb") as said:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    env=env,
                    encoding="utf-8",
                )
        except OSError as error:
            raise BadInput(
                f"--model2vec-python {self._python} cannot be run ({error}): give the file of a Python"
            ) from error

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D].

        Raises:
            MsenseError: the process ended.
        """
        folder = Path(self._folder.name)
        (folder / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("encode\n")
            self._process.stdin.flush()
        except OSError:
            self._failed(self._process)
        told = self._answer()
        self.seconds, self.peak_memory = float(told["seconds"]), int(told["peak_memory"])
        return np.asarray(np.load(folder / "vectors.npy", allow_pickle=False), np.float32)

    def close(self) -> None:
        """End the process and remove its files."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._failed(self._process)
        told: dict[str, Any] = json.loads(line)
        return told

    def _failed(self, process: "subprocess.Popen[str]") -> NoReturn:
        from msense.errors import MsenseError
        from msense.text import plain

        code = process.wait()
        said = (self._log.read_text("utf-8", "replace").strip().splitlines() or ["nothing"])[-1]
        raise MsenseError(
            f"model2vec ended with code {code} in {self._python} and said {plain(said)!r}: see that this Python has "
            'pip install "model2vec[distill]" and that it loads the teacher'
        )


def _serve(folder: Path) -> None:
    """Encode whatever is asked for; in the other Python."""
    from model2vec import StaticModel

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    model = StaticModel.from_pretrained(str(folder / "model"))
    files = [str(path) for path in (folder / "model").rglob("*") if path.is_file()]
    answers.write(json.dumps({"parameters": int(np.prod(model.embedding.shape)), "files": files}) + "\n")
    answers.flush()
    for _ in sys.stdin:
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        began = time.perf_counter()
        vectors = model.encode(texts)
        seconds = time.perf_counter() - began
        np.save(folder / "vectors.npy", np.asarray(vectors, np.float32))
        peak = _peak()
        answers.write(json.dumps({"seconds": seconds, "peak_memory": peak}) + "\n")
        answers.flush()


def _peak() -> int:
    """Return the most bytes that this process has held; `getrusage` would also count what its parent held before."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _distil(folder: Path, teacher: str) -> None:
    """Distil and save; in the other Python."""
    from model2vec.distill import distill

    distill(model_name=teacher).save_pretrained(str(folder / "model"))


if __name__ == "__main__":
    if sys.argv[2] == "serve":
        _serve(Path(sys.argv[1]))
    else:
        _distil(Path(sys.argv[1]), sys.argv[3])
