"""Damaged files, full disks and lost permissions in every stage of a build, and the next run's recovery."""

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from executors import INSIDE, Fault, disturbed
from faulty import (
    ALL,
    DAMAGES,
    PLACES,
    Corpus,
    MakeTeacher,
    Outcome,
    flip_a_byte,
    full_disk,
    read_only,
    records,
    unprivileged,
)

from msense.errors import InputError, MsenseError

pytestmark = pytest.mark.usefixtures("in_process")

# files of every kind per stage, as left by a driver stopped at the very end; each damage hits one, a flipped byte all
FILES = {
    "passages": ("passages/000000.parquet", "passages/000001.parquet.done", "passages/000000.bad.json"),
    "plan": ("plan/plan.safetensors", "plan/blocks.parquet", "plan/duplicates.safetensors", "plan/plan.safetensors.done"),
    "embed": (
        "occurrences/000001.records",
        "occurrences/000002.records.done",
        "occurrences/index.safetensors",
        "embeddings/000001.embeddings",
        "embeddings/000002.embeddings.done",
    ),
    "senses": ("senses/000001.safetensors", "senses/000002.safetensors.done", "senses/senses.safetensors"),
    "clustering": ("centroids/000001.safetensors", "centroids/000002.safetensors.done"),
    "large tokens": ("centroids/token-00000004.safetensors", "centroids/token-00000004.safetensors.done"),
    "exemplars": ("contexts/index.parquet", "contexts/000001.parquet", "contexts/000002.parquet.done"),
    "dictionary": (
        "dictionary/dictionary.safetensors",
        "dictionary/config.json",
        "dictionary/exemplars.parquet",
        "dictionary/tokenizer/tokenizer.json",
        "dictionary/README.md",
        "finished.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_regenerated(built: Corpus, tmp_path: Path, damage: str, outcome: Outcome) -> None:
    run = tmp_path / "run"
    for stage, names in FILES.items():
        for name in names if damage == "byte flipped" else names[:1]:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(built.folder / "stopped", run)
            if stage != "dictionary":  # a finished run checks its dictionary only
                (run / "finished.json").unlink()
            DAMAGES[damage](run / name)
            built.build(str(run), keep=ALL)
            for below in ("dictionary", "occurrences", "embeddings", "centroids", "passages", "plan"):
                assert built.files(run, below, markers=False) == built.files("whole", below, markers=False), name
            assert records(built, run) == records(built, "whole")
            stages = built.journal(run)[-1]["stages"]
            assert name == "occurrences/index.safetensors" or stages[stage].get("made"), (name, stages)
            assert sum(counts.get("made", 0) for counts in stages.values()) <= 5, (name, stages)
        outcome(damage, stage, "regenerated")


def test_a_damaged_or_missing_manifest_is_refused(built: Corpus, tmp_path: Path) -> None:
    run = Path(shutil.copytree(built.folder / "stopped", tmp_path / "run"))
    flip_a_byte(run / "manifest.json")
    with pytest.raises(InputError, match=r"manifest\.json is .*: .*another --output"):
        built.build(str(run))
    (run / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"passages .*manifest\.json.* another --output"):
        built.build(str(run))
    assert (run / "dictionary" / "config.json").exists()


def fails_then_resumes(made: Corpus, stage: str, fault: Fault, message: str) -> None:
    """Check that a build fails with a clear error, keeps what is finished, and that the next run gives the same bytes."""
    with pytest.raises(MsenseError, match=message):
        made.build("run", disturbed(INSIDE[stage][0], fault, INSIDE[stage][1]), keep=ALL)
    assert made.journal()[-1]["outcome"].startswith("failed: cannot write")
    assert not list((made.folder / "run").rglob(".*.part"))
    finished = {path: path.stat().st_mtime_ns for path in (made.folder / "run").rglob("*.records.done")}
    assert finished or stage in ("passages", "plan")
    made.build("run", keep=ALL)
    assert made.files("run") == made.files("whole")
    assert records(made, "run") == records(made, "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    shutil.rmtree(made.folder / "run")


def test_a_full_disk_is_reported_and_the_run_resumes(made: Corpus, outcome: Outcome) -> None:
    made.build("whole", keep=ALL)
    for stage, file in PLACES.items():
        where = "embeddings" if stage == "embed" else "dictionary" if stage == "dictionary" else Path(file).parent.name
        message = rf"cannot write .*{where}.*: no space left \(.*File too large.*\); free some"
        fails_then_resumes(made, stage, full_disk, message)
        outcome("disk full", stage, "reported; next run resumes")


@pytest.fixture
def as_nobody(make_teacher: MakeTeacher) -> Iterator[Corpus]:
    made = Corpus(Path(tempfile.mkdtemp()), make_teacher("bert"))
    made.build("whole", keep=ALL)  # imports all modules while it may
    with unprivileged(made.folder):
        yield made
    shutil.rmtree(made.folder)


def test_lost_permissions_are_reported_and_the_run_resumes(as_nobody: Corpus, outcome: Outcome) -> None:
    for stage, file in PLACES.items():
        fault = partial(read_only, (as_nobody.folder / "run" / file).parent)
        message = r"cannot write .*: no permission \(.*\); allow this user to write there"
        fails_then_resumes(as_nobody, stage, fault, message)
        outcome("permission lost", stage, "reported; next run resumes")
