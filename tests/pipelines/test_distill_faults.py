"""Faults of a distillation, by stage: labels without Ray, and a Ray training whose disk is full."""

import os
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import Corpus, MakeTeacher, Outcome, StoppedError, full_disk, metrics, same_metrics

from msense.config.distill import DistillConfig
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.pipelines import distill as distill_module
from msense.pipelines.distill import distill_student
from msense.stages import train

PLACE = "labels/000001.safetensors"
INSIDE = {"labels": "msense.pipelines.distill.make_labels", "training": "msense.pipelines.distill.train"}
CAUSES = {"disk full": "File too large|No space left", "rights lost": "Permission denied"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_teacher: MakeTeacher) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("faults"), make_teacher("bert"))


@pytest.fixture
def prepared(corpus: Corpus, in_process: None, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Two dictionaries and the labels "whole", which the first test builds for all; no student is trained."""
    monkeypatch.setattr(distill_module, "train", lambda *_: {})
    if not (corpus.folder / "whole").exists():
        corpus.build("dict", max_occurrences=60)
        corpus.build("other", max_occurrences=50)
        run(corpus, "whole")
    return corpus


def run(made: Corpus, name: str, **more: object) -> dict:
    given = {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), "output": str(made.folder / name)}
    return distill_student(DistillConfig(**{**given, **more}))


def labels(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "labels").iterdir()) if p.suffix != ".done"}


def full(function: Callable) -> Callable:
    """Limit the size of a file while it is written."""

    def call(*arguments: object) -> object:
        if not str(arguments[0]).endswith(PLACE):
            return function(*arguments)
        with full_disk():
            return function(*arguments)

    return call


def forbidden(function: Callable) -> Callable:
    """Revoke the permission to write a file."""

    def call(*arguments: object) -> object:
        if not str(arguments[0]).endswith(PLACE):
            return function(*arguments)
        folder, user = Path(str(arguments[0])).parent, os.geteuid()
        folder.chmod(0o555)
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        try:
            return function(*arguments)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)

    return call


@pytest.mark.parametrize(
    ("fault", "spoil", "cause"),
    [
        ("disk full", full, r"no space left \(.*File too large.*\)"),
        ("rights lost", forbidden, r"no permission \(.*\)"),
    ],
)
def test_labels_that_cannot_be_written_are_reported_and_the_next_run_resumes(
    prepared: Corpus, patch: pytest.MonkeyPatch, outcome: Outcome, fault: str, spoil: Callable, cause: str
) -> None:
    folder = prepared.folder / fault
    patch.setattr(storage, "_rename_into", spoil(storage._rename_into))
    with pytest.raises(MsenseError, match=rf"cannot write .*{cause}"):
        run(prepared, fault)
    patch.undo()
    done = {path: path.stat().st_mtime_ns for path in (folder / "labels").glob("0*.done")}
    assert done
    run(prepared, fault)
    assert labels(folder) == labels(prepared.folder / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(folder.rglob(".*.part"))
    outcome(fault, "labels", "told; next run goes on")


@pytest.mark.parametrize("stage", INSIDE)
def test_a_second_driver_and_changed_input_are_refused(
    prepared: Corpus, patch: pytest.MonkeyPatch, outcome: Outcome, stage: str
) -> None:
    name, stopped = f"second-{stage}", f"stopped-{stage}"
    function, refused = pkgutil.resolve_name(INSIDE[stage]), []

    def meanwhile(*arguments: object) -> object:
        with pytest.raises(InputError, match=rf"another driver .*{name} \(process {os.getpid()} on host "):
            run(prepared, name)
        refused.append(stage)
        return function(*arguments)

    def stop(*_: object) -> None:
        raise StoppedError

    patch.setattr(INSIDE[stage], meanwhile)
    run(prepared, name)
    assert refused == [stage]
    outcome("second driver", stage, "refused")
    patch.setattr(INSIDE[stage], stop)
    with pytest.raises(StoppedError):
        run(prepared, stopped)
    with pytest.raises(InputError, match=r"config\.soft_targets: 0 .*2 [\s\S]*another --output"):
        run(prepared, stopped, soft_targets=2)
    with pytest.raises(InputError, match=r"dictionary.*: [\s\S]*another --output"):
        run(prepared, stopped, dictionary=str(prepared.folder / "other"))
    outcome("input changed", stage, "refused")


@pytest.mark.slow
@pytest.mark.parametrize("fault", CAUSES)
def test_a_training_that_cannot_write_is_reported_and_the_next_run_resumes(
    ray: None, made: Corpus, in_process: None, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome, fault: str,
) -> None:  # fmt: skip
    from test_training_kills import SETTINGS, copy_labels

    made.build("dict", senses=3)
    monkeypatch.undo()
    run(made, "whole", **SETTINGS)
    folder = copy_labels(made, "run")
    training = folder / "training"

    def worker(given: dict) -> list:
        import resource

        from msense.stages import train_worker
        from msense.training import distiller

        original = distiller.Trainer._step

        def limited(self: distiller.Trainer, *arguments: object) -> dict:
            at = self.state.epoch == 1 and self.state.step == 7
            if at and fault == "disk full":  # from now on the system refuses larger files
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            elif at:
                for path in [training, *(path for path in training.rglob("*") if path.is_dir())]:
                    path.chmod(0o555)
                os.seteuid(65534)  # root may write anywhere
            return original(self, *arguments)

        distiller.Trainer._step = limited
        return train_worker.train_worker(given)

    patch.setattr(train, "worker", worker)
    with pytest.raises(MsenseError, match=rf"training failed: .*({CAUSES[fault]})"):
        run(made, "run", **SETTINGS)
    patch.undo()
    for path in [training, *(path for path in training.rglob("*") if path.is_dir())]:
        path.chmod(0o755)
    assert not (folder / "student").exists()
    assert len(metrics(folder)) == 1
    run(made, "run", **SETTINGS)
    same_metrics(folder, made.folder / "whole")
    outcome(fault, "training", "told; next run goes on")
