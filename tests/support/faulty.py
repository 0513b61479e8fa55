"""A small corpus and teacher, builds of them that can be stopped, and faults to inject."""

import itertools
import json
import pkgutil
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny import WORDS

from msense.config.build import BuildConfig
from msense.io import storage
from msense.pipelines.build import build_dictionary
from msense.run.folder import RunFolder
from msense.stages.embedding_store import record_type

MakeTeacher = Callable[..., Path]
Outcome = Callable[[str, str, str], None]
ALL = ("passages", "occurrences", "centroids")


class StoppedError(BaseException):
    """Simulates the end of the process."""


class Corpus:
    """A corpus and a teacher in a folder, and builds of them."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        (folder / "corpus").mkdir()
        chances = np.array([12, 6] + [1] * 13) / 31
        for name in "ab":
            lines = [" ".join(rng.choice(WORDS, 24, p=chances)) for _ in range(150)]
            (folder / "corpus" / f"{name}.txt").write_text("\n".join([*lines, *lines[:5], ""]) + "\n")
        self.teacher = shutil.copytree(teacher, folder / "teacher")
        self.settings = {"corpus": (str(folder / "corpus"),), "teacher": str(self.teacher), "dtype": "float32"}
        self.settings |= {"max_occurrences": 6000, "max_points_per_part": 1024, "dedup": True}

    def build(self, name: str = "run", **settings: object) -> dict:
        return build_dictionary(BuildConfig(**{**self.settings, "output": str(self.folder / name), **settings}))

    def stop_at(self, function: str, name: str = "run", calls: int = 1, **settings: object) -> None:
        """Build until the given call of a function, which raises StoppedError."""
        real, counted = pkgutil.resolve_name(function), itertools.count(1)

        def stop(*arguments: object, **named: object) -> object:
            if next(counted) == calls:
                raise StoppedError
            return real(*arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(function, stop)
            with pytest.raises(StoppedError):
                self.build(name, **settings)

    def files(self, name: str, below: str = "dictionary", markers: bool = True) -> dict[str, bytes]:
        folder = self.folder / name / below
        files = (p for p in sorted(folder.rglob("*")) if p.is_file() and (markers or p.suffix != ".done"))
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    def journal(self, name: str = "run") -> list[dict]:
        return storage.read_json(RunFolder(str(self.folder / name)).journal)["drivers"]


def records(made: Corpus, name: str) -> tuple[int, int]:
    """Return the numbers of stored and of distinct occurrences."""
    found = [
        np.fromfile(path, record_type(16))[["row", "position"]].tolist()
        for path in sorted((made.folder / name / "occurrences").glob("*.records"))
    ]
    places = [(unit, *place) for unit, rows in enumerate(found) for place in rows]
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


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def metrics(run: Path | str) -> list[dict[str, float]]:
    """Return the metrics of a run's epochs without times; the run may be a URI."""
    epochs = map(json.loads, storage.read_text(f"{run}/metrics.jsonl").splitlines())
    return [{k: v for k, v in epoch.items() if k != "tokens_per_s"} for epoch in epochs]


def same_metrics(run: Path | str, whole: Path | str) -> None:
    """Assert that two runs have the same metrics in all epochs."""
    wanted = metrics(whole)
    assert wanted
    for found, own in zip(metrics(run), wanted, strict=True):
        assert found == pytest.approx(own, rel=1e-3, abs=1e-3)
