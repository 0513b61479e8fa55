"""Faults of a distillation, by stage: labels without Ray, and a training on it whose disk is full."""

import os
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import Corpus, Outcome, StoppedError, full_disk, metrics, same_metrics

from msense import distill, distill_run, storage
from msense.distill_config import DistillConfig
from msense.distill_run import distill_student
from msense.errors import BadInput, MsenseError

PLACE = "labels/000001.safetensors"
INSIDE = {"labels": "msense.distill_run.make_labels", "training": "msense.distill_run.train"}
CAUSES = {"disk full": "File too large|No space left", "rights lost": "Permission denied"}
without_ray = pytest.mark.usefixtures("in_process")


@pytest.fixture(autouse=True)
def untrained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that does nothing, where there is no Ray."""
    if "in_process" in request.fixturenames and "ray" not in request.fixturenames:
        monkeypatch.setattr(distill_run, "train", lambda *_: {})


def run(made: Corpus, name: str = "run", **more: object) -> dict:
    given = {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), "output": str(made.folder / name)}
    return distill_student(DistillConfig(**{**given, **more}))


def labels(made: Corpus, name: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((made.folder / name / "labels").iterdir()) if p.suffix != ".done"}


def full(function: Callable) -> Callable:
    """Refuse more than some bytes a file, in the midst of a write."""

    def call(*arguments: object) -> object:
        if not str(arguments[0]).endswith(PLACE):
            return function(*arguments)
        with full_disk():
            return function(*arguments)

    return call


def forbidden(function: Callable) -> Callable:
    """Take the right to write a file away."""

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


@without_ray
@pytest.mark.parametrize(
    ("fault", "spoil", "told"),
    [
        ("disk full", full, r"no space left \(.*File too large.*\); free some"),
        ("rights lost", forbidden, r"no permission \(.*\); allow this user to write there"),
    ],
)
def test_labels_that_cannot_be_written_are_told_and_the_next_run_goes_on(
    made: Corpus, patch: pytest.MonkeyPatch, outcome: Outcome, fault: str, spoil: Callable, told: str
) -> None:
    made.build("dict", max_occurrences=60)
    run(made, "whole")
    patch.setattr(storage, "_rename_into", spoil(storage._rename_into))
    with pytest.raises(MsenseError, match=rf"cannot write .*{told}"):
        run(made)
    patch.undo()
    done = {path: path.stat().st_mtime_ns for path in (made.folder / "run" / "labels").glob("0*.done")}
    assert done
    run(made)
    assert labels(made, "run") == labels(made, "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list((made.folder / "run").rglob(".*.part"))
    outcome(fault, "labels", "told; next run goes on")


@without_ray
@pytest.mark.parametrize("stage", INSIDE)
def test_a_second_driver_and_changed_input_are_refused(
    made: Corpus, patch: pytest.MonkeyPatch, outcome: Outcome, stage: str
) -> None:
    made.build("dict", max_occurrences=60)
    function, refused = pkgutil.resolve_name(INSIDE[stage]), []

    def meanwhile(*arguments: object) -> object:
        with pytest.raises(
            BadInput, match=rf"another driver works on .*run \(process {os.getpid()} on host .*\): wait"
        ):
            run(made)
        refused.append(stage)
        return function(*arguments)

    def stop(*_: object) -> None:
        raise StoppedError

    patch.setattr(INSIDE[stage], meanwhile)
    run(made)
    assert refused == [stage]
    outcome("second driver", stage, "refused")
    patch.setattr(INSIDE[stage], stop)
    with pytest.raises(StoppedError):
        run(made, "stopped")
    with pytest.raises(BadInput, match=r"config\.soft_targets: 0 then, 2 now[\s\S]*another --output"):
        run(made, "stopped", soft_targets=2)
    made.build("dict2", max_occurrences=50)
    with pytest.raises(BadInput, match=r"dictionary.*: .* then, .* now[\s\S]*another --output"):
        run(made, "stopped", dictionary=str(made.folder / "dict2"))
    outcome("input changed", stage, "refused")


@pytest.mark.slow
@pytest.mark.parametrize("fault", CAUSES)
def test_a_training_that_cannot_write_is_told_and_the_next_run_goes_on(
    ray: None, made: Corpus, in_process: None, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome, fault: str,
) -> None:  # fmt: skip
    from test_training_kills import SETTINGS

    made.build("dict", senses=3)
    monkeypatch.undo()
    run(made, "whole", **SETTINGS)
    shutil.copytree(
        made.folder / "whole", made.folder / "run", ignore=shutil.ignore_patterns("training", "student", "metrics*")
    )
    training = made.folder / "run" / "training"

    def worker(given: dict) -> list:
        import resource

        from msense import train_loop, train_worker

        original = train_loop.Trainer._step

        def limited(self: train_loop.Trainer, *arguments: object) -> dict:
            at = self.state.epoch == 1 and self.state.step == 7
            if at and fault == "disk full":  # from now on the system refuses larger files
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            elif at:
                for folder in [training, *(path for path in training.rglob("*") if path.is_dir())]:
                    folder.chmod(0o555)
                os.seteuid(65534)  # root may write anywhere
            return original(self, *arguments)

        train_loop.Trainer._step = limited
        return train_worker.train_worker(given)

    patch.setattr(distill, "worker", worker)
    with pytest.raises(MsenseError, match=rf"training failed: .*({CAUSES[fault]})"):
        run(made, **SETTINGS)
    patch.undo()
    for folder in [training, *(path for path in training.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    assert not (made.folder / "run" / "student").exists()
    assert len(metrics(made.folder / "run")) == 1
    run(made, **SETTINGS)
    same_metrics(made.folder / "run", made.folder / "whole")
    outcome(fault, "training", "told; next run goes on")
