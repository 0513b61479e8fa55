"""A small corpus and teacher, builds of them that can be stopped or disturbed, and faults to inject."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from executors import StoppedError, stopping
from tiny import WORDS

from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.io import storage
from msense.pipelines.build import build_dictionary
from msense.pipelines.distill import distill_student
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.stages.embedding_store import record_type

MakeTeacher = Callable[..., Path]
Outcome = Callable[[str, str, str], None]
ALL = ("passages", "embeddings", "occurrences", "centroids")
PLACES = {  # a file of each stage
    "passages": "passages/000001.parquet",
    "plan": "plan/blocks.parquet",
    "embed": "occurrences/000002.records",
    "senses": "senses/senses.safetensors",
    "clustering": "centroids/000001.safetensors",
    "large tokens": "centroids/token-00000004-round.safetensors",
    "exemplars": "contexts/000001.parquet",
    "dictionary": "dictionary/dictionary.safetensors",
}


def write_corpus(folder: Path, files: str = "ab", lines: int = 150, repeated: int = 5) -> None:
    """Write text files of random words, each with some lines repeated and a blank line at the end."""
    rng, chances = np.random.default_rng(0), np.array([12, 6] + [1] * 13) / 31
    folder.mkdir()
    for name in files:
        own = [" ".join(rng.choice(WORDS, 24, p=chances)) for _ in range(lines)]
        (folder / f"{name}.txt").write_text("\n".join([*own, *own[:repeated], ""]) + "\n")


class Corpus:
    """A corpus and a teacher in a folder, and builds of them without Ray."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder = folder
        write_corpus(folder / "corpus")
        self.teacher = shutil.copytree(teacher, folder / "teacher")
        self.settings = {"corpus": (str(folder / "corpus"),), "teacher": str(self.teacher), "dtype": "float32"}
        self.settings |= {"max_occurrences": 6000, "max_points_per_part": 1024, "dedup": True, "local": True}

    def build(self, name: str = "run", executor: Executor | None = None, **settings: object) -> dict:
        """Build into the folder `name`."""
        config = BuildConfig(**{**self.settings, "output": str(self.folder / name), **settings})
        return build_dictionary(config, executor)

    def stop_at(self, place: str, name: str = "run", calls: int = 1, **settings: object) -> None:
        """Build until the given call of a place."""
        with pytest.raises(StoppedError):
            self.build(name, stopping(place, calls), **settings)

    def distill(self, name: str, executor: Executor | None = None, **settings: object) -> dict:
        """Distill the dictionary "dict" into the folder `name`, with labels of its own unless they are given."""
        given = {"dictionary": str(self.folder / "dict"), "teacher": str(self.teacher), "dtype": "float32"}
        given |= {"output": str(self.folder / name), "labels": str(self.folder / name / "labels"), "local": True}
        return distill_student(DistillConfig(**{**given, **settings}), executor)

    def label(self, name: str, executor: Executor | None = None, **settings: object) -> None:
        """Distill until the training begins."""
        with pytest.raises(StoppedError):
            self.distill(name, executor or stopping("training"), **settings)

    def labels(self, name: str | Path) -> Path:
        """Return the run folder of the labels of a student."""
        return Path(storage.read_json(RunFolder(str(self.folder / name)).labels_place)["folder"])

    def files(self, name: str | Path, below: str = "dictionary", markers: bool = True) -> dict[str, bytes]:
        """Return the contents of all files of a run's folder."""
        folder = self.folder / name / below
        files = (p for p in sorted(folder.rglob("*")) if p.is_file() and (markers or p.suffix != ".done"))
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    def journal(self, name: str | Path = "run") -> list[dict]:
        """Return the records of a run's drivers."""
        return storage.read_json(RunFolder(str(self.folder / name)).journal)["drivers"]


def wait_until(ready: Callable[[], object], seconds: float = 120) -> None:
    """Wait in an interruptible way, like the main thread of a driver."""
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)
    assert ready()


def records(made: Corpus, name: str | Path) -> tuple[int, int]:
    """Return the numbers of stored and of distinct occurrences."""
    partitions = [
        np.fromfile(path, record_type(16))[["row", "position"]].tolist()
        for path in sorted((made.folder / name / "occurrences").glob("*.records"))
    ]
    places = [(number, *place) for number, rows in enumerate(partitions) for place in rows]
    return len(places), len(set(places))


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit the size of every file that this process writes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Run as a user who may write nothing but new files in a folder, as root may write anywhere."""
    if (user := os.geteuid()) == 0:
        folder.chmod(0o777)
        for path in folder.rglob("*"):
            path.chmod(path.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Revoke the permission to write into a folder."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "file truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "file deleted": Path.unlink,
    "byte flipped": flip_a_byte,
}


def metrics(run: Path | str) -> list[dict[str, float]]:
    """Return the metrics of a run's epochs without times; the run may be a URI."""
    epochs = map(json.loads, storage.read_text(f"{run}/metrics.jsonl").splitlines())
    return [{k: v for k, v in epoch.items() if k != "tokens_per_s"} for epoch in epochs]


def same_metrics(run: Path | str, whole: Path | str) -> None:
    """Assert that two runs have the same metrics in all epochs."""
    wanted = metrics(whole)
    assert wanted
    for epoch, own in zip(metrics(run), wanted, strict=True):
        assert epoch == pytest.approx(own, rel=1e-3, abs=1e-3)
