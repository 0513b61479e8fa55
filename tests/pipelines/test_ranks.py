"""Builds and labels by a teacher of two ranks, or with its weights in host memory; and ranks that are killed."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import driver
import numpy as np
import pytest
import torch
from driver import Options
from faulty import Corpus, Outcome, wait_until, write_corpus
from ranks import write_body
from teachers import write_teacher

from msense.dictionary import SenseDictionary
from msense.errors import InputError
from msense.io import storage
from msense.pipelines import dry_run
from msense.pipelines.dry_run import estimate_teacher
from msense.runtime import LocalExecutor
from msense.runtime.executor import Row
from msense.teacher.spec import TeacherInfo, TeacherOptions, load_teacher_info


def write_split_teacher(folder: Path) -> Path:
    """Write a BERT that can be split, with a tokenizer."""
    write_teacher(folder, "bert")
    write_body(folder, "bert", hidden_size=64)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus with its dictionary "plain"."""
    folder = tmp_path_factory.mktemp("ranks")
    made = Corpus(folder, write_split_teacher(folder / "written"))
    made.settings |= {"max_points_per_part": 131072, "keep": ("passages", "embeddings", "occurrences")}
    made.build("plain")
    return made


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ranks_below(temporary: Path) -> list[str]:
    """Return the command lines of the ranks that meet in a temporary folder, which their actor made."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(file.read_text().replace("\0", " "))
    return [line for line in lines if "msense.teacher.parallel" in line and str(temporary) in line]


def test_two_ranks_find_the_senses_of_one(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    seen: list[int] = []
    executor = LocalExecutor(device="cpu", ranks=2)
    rows = executor.map_actors

    def counted(*given: Any) -> Iterator[Row]:
        for row in rows(*given):
            seen.append(len(ranks_below(tmp_path)))
            yield row

    monkeypatch.setattr(executor, "map_actors", counted)
    corpus.build("two", executor, ranks=2)
    assert set(seen) == {1}  # rank 0 is in the process of the actor
    assert not ranks_below(tmp_path)
    assert not torch.distributed.is_initialized()
    plain, two = (SenseDictionary.load(corpus.folder / name / "dictionary") for name in ("plain", "two"))
    np.testing.assert_array_equal(plain.offsets, two.offsets)
    np.testing.assert_array_equal(plain.counts, two.counts)
    assert torch.allclose(plain.centroids.float(), two.centroids.float(), atol=2e-3)
    pins = [storage.read_json(str(corpus.folder / name / "manifest.json"))["pins"] for name in ("plain", "two")]
    assert [pin.get("ranks") for pin in pins] == [None, 2]
    (corpus.folder / "two" / "finished.json").unlink()
    with pytest.raises(InputError, match=r"pins\.ranks: 2 before, None now"):
        corpus.build("two")


def test_weights_in_host_memory_give_the_same_bytes(corpus: Corpus) -> None:
    corpus.build("offloaded", offload=True)
    for below in ("dictionary", "occurrences"):
        assert corpus.files("offloaded", below, markers=False) == corpus.files("plain", below, markers=False)
    assert corpus.build("plain", offload=True)["dictionary"]  # is no other run


def test_an_executor_of_other_ranks_is_refused(corpus: Corpus) -> None:
    with pytest.raises(InputError, match=r"\(ranks, offload\) = \(1, False\), but the settings have \(2, False\)"):
        corpus.build("other", LocalExecutor(device="cpu"), ranks=2)
    with pytest.raises(InputError, match="over 3 ranks: its heads"):
        corpus.build("other", ranks=3)


def test_a_dry_run_refuses_what_no_gpu_can_hold(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 1 MB is simulated: what runs on it is the estimate alone."""
    executor = LocalExecutor(device="cuda")
    monkeypatch.setattr(dry_run, "_gpu_memory", lambda: 10**6)
    info, _ = load_teacher_info(str(corpus.teacher), TeacherOptions())
    settings = Reading(teacher=str(corpus.teacher), info=info, dtype="float32", device="cuda", token_budget=64)
    estimate = estimate_teacher(executor, settings)
    assert (estimate["gpu_memory"], estimate["weights_bytes"]) == (10**6, 4 * estimate["parameters"])
    assert estimate["weights_bytes"] < estimate["rank_bytes"] < 10**6
    many = replace(settings, token_budget=16384)
    message = (
        r"needs about .* MB per rank in float32 .*, but each has a GPU of 1\.0 MB: give --gpus-per-actor 2 .*--offload"
    )
    with pytest.raises(InputError, match=message):
        estimate_teacher(executor, many)
    executor.resources = replace(executor.resources, gpus_per_actor=0.5)
    with pytest.raises(InputError, match=r"each has 0\.5 of a GPU of 1\.0 MB: give --gpus-per-actor 1$"):
        estimate_teacher(executor, many)
    on_cpu = estimate_teacher(LocalExecutor(device="cpu"), replace(many, device="cpu"))
    assert on_cpu["gpu_memory"] is None


@dataclass(frozen=True)
class Reading:
    """The settings of a teacher that an estimate needs."""

    teacher: str
    info: TeacherInfo
    dtype: str
    device: str
    token_budget: int
    ranks: int = 1
    offload: bool = False


def test_killed_ranks_change_nothing(ray: None, tmp_path: Path, outcome: Outcome) -> None:
    """The second rank of the teacher is killed in the embed stage, then the actor; no process is left of any of the three."""
    write_corpus(tmp_path / "corpus", lines=60)
    given = {"corpus": (str(tmp_path / "corpus"),), "teacher": str(write_split_teacher(tmp_path / "teacher"))}
    given |= {"dtype": "float32", "max_occurrences": 4000, "workers": 1, "ranks": 2}
    made = Corpus.__new__(Corpus)
    made.folder = tmp_path
    driver.run({**given, "output": str(tmp_path / "whole")}, Options(tmp_path / "log", ranks=2))
    faults = {"embed": {"flag": tmp_path / "killed", "at": "ranks"}}
    options = Options(tmp_path / "log", faults, ranks=2, processes=tmp_path / "processes")
    driver.run({**given, "output": str(tmp_path / "run")}, options)
    assert sorted(path.name for path in tmp_path.glob("killed*")) == ["killed 0", "killed 1"]
    replicas = [line.split() for line in (tmp_path / "processes").read_text().splitlines()]
    pids = [int(pid) for replica in replicas for pid in replica]
    assert len(replicas) == 3
    assert len(set(pids)) == 6
    assert made.files("run", markers=False) == made.files("whole", markers=False)
    assert len(made.journal("run")) == 1
    wait_until(lambda: not any(map(is_running, pids)))
    outcome("rank killed", "embed", "run continues")
