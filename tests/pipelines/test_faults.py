"""Damaged files, full disks and lost permissions in every stage of a build, and the next run's recovery."""

import os
import pkgutil
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from faulty import ALL, Corpus, MakeTeacher, Outcome, flip_a_byte, full_disk, records

from msense.errors import InputError, MsenseError
from msense.io import storage

pytestmark = pytest.mark.usefixtures("in_process")

# one file of each kind per stage, as left by a driver stopped at the very end
FILES = {
    "passages": ("passages/000000.parquet", "passages/000001.parquet.done", "passages/000000.bad.json"),
    "plan": ("plan/plan.safetensors", "plan/blocks.parquet", "plan/duplicates.safetensors", "plan/plan.safetensors.done"),
    "occurrences": ("occurrences/000001.records", "occurrences/000002.records.done", "occurrences/index.safetensors"),
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


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"file cut short": cut_short, "file gone": Path.unlink, "byte flipped": flip_a_byte}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_regenerated(whole: Corpus, damage: str, outcome: Outcome) -> None:
    for stage, names in FILES.items():
        for name in names:
            shutil.rmtree(whole.folder / "run", ignore_errors=True)
            shutil.copytree(whole.folder / "stopped", whole.folder / "run")
            if stage != "dictionary":  # a finished run checks its dictionary only
                (whole.folder / "run" / "finished.json").unlink()
            DAMAGES[damage](whole.folder / "run" / name)
            whole.build("run", keep=ALL)
            for below in ("dictionary", "occurrences", "centroids", "passages", "plan"):
                assert whole.files("run", below, markers=False) == whole.files("whole", below, markers=False), name
            assert records(whole, "run") == records(whole, "whole")
            stages = whole.journal()[-1]["stages"]
            own = "clustering" if stage == "large tokens" else stage
            assert name == "occurrences/index.safetensors" or stages[own].get("made"), (name, stages)
            assert sum(counts.get("made", 0) for counts in stages.values()) <= 5, (name, stages)
        outcome(damage, stage, "made again")


def test_a_damaged_or_missing_manifest_is_refused(whole: Corpus) -> None:
    manifest = whole.folder / "stopped" / "manifest.json"
    flip_a_byte(manifest)
    with pytest.raises(InputError, match=r"manifest\.json is damaged: .*start afresh, give another --output or delete"):
        whole.build("stopped")
    manifest.unlink()
    with pytest.raises(
        InputError, match=r"passages is there, but no manifest\.json .* give another --output or delete"
    ):
        whole.build("stopped")
    assert (whole.folder / "stopped" / "dictionary" / "config.json").exists()


PLACES = {
    "passages": "passages/000001.parquet",
    "plan": "plan/blocks.parquet",
    "occurrences": "occurrences/000002.records",
    "senses": "senses/senses.safetensors",
    "clustering": "centroids/000001.safetensors",
    "large tokens": "centroids/token-00000004-round.safetensors",
    "exemplars": "contexts/000001.parquet",
    "dictionary": "dictionary/dictionary.safetensors",
}


def fails_then_resumes(made: Corpus, message: str, mend: Callable[[], None]) -> None:
    """Check that a build fails with a clear error, keeps what is finished, and that the next run gives the same bytes."""
    with pytest.raises(MsenseError, match=message):
        made.build("run", keep=ALL)
    mend()
    assert made.journal()[-1]["outcome"].startswith("failed: cannot write")
    assert not list((made.folder / "run").rglob(".*.part"))
    units = {path: path.stat().st_mtime_ns for path in (made.folder / "run").rglob("*.records.done")}
    made.build("run", keep=ALL)
    assert made.files("run") == made.files("whole")
    assert records(made, "run") == records(made, "whole")
    assert {path: path.stat().st_mtime_ns for path in units} == units


def at_write(stage: str, patch: pytest.MonkeyPatch, fault: Callable[[], AbstractContextManager], last: str) -> None:
    """Apply a fault while the file of a stage is written; for the dictionary, while the function `last` runs."""

    def faulty(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            if function is rename_into and not str(arguments[0]).endswith(PLACES[stage]):
                return function(*arguments)
            with fault():
                return function(*arguments)

        return call

    rename_into = storage._rename_into
    patch.setattr(storage, "_rename_into", faulty(rename_into))
    if stage == "dictionary":
        patch.setattr(last, faulty(pkgutil.resolve_name(last)))


@pytest.mark.parametrize("stage", PLACES)
def test_a_full_disk_is_reported_and_the_run_resumes(
    made: Corpus, stage: str, patch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    made.build("whole", keep=ALL)
    at_write(stage, patch, full_disk, "msense.stages.assemble.write_dictionary")
    where = re.escape(PLACES[stage]) if stage != "dictionary" else "dictionary"
    fails_then_resumes(made, rf"cannot write .*{where}: no space left \(.*File too large.*\); free some", patch.undo)
    outcome("disk full", stage, "told; next run goes on")


@pytest.fixture
def as_nobody(make_teacher: MakeTeacher) -> Iterator[Corpus]:
    """A corpus whose builds run as an unprivileged user, as root may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    made = Corpus(folder, make_teacher("bert"))
    made.build("whole", keep=ALL)  # imports all modules while it may
    if (user := os.geteuid()) == 0:
        folder.chmod(0o777)
        for path in folder.rglob("*"):
            path.chmod(path.stat().st_mode | 0o055)
        os.seteuid(65534)
    yield made
    os.seteuid(user)
    shutil.rmtree(folder)


@pytest.mark.parametrize("stage", PLACES)
def test_lost_permissions_are_reported_and_the_run_resumes(
    as_nobody: Corpus, stage: str, patch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    folder = (as_nobody.folder / "run" / PLACES[stage]).parent

    @contextmanager
    def lost() -> Iterator[None]:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o555)
        yield

    def mend() -> None:
        patch.undo()
        folder.chmod(0o755)

    at_write(stage, patch, lost, "msense.pipelines.build.assemble")
    fails_then_resumes(as_nobody, r"cannot write .*: no permission \(.*\); allow this user to write there", mend)
    outcome("rights lost", stage, "told; next run goes on")
