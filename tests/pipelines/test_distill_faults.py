"""Faults of a distillation: full disks, lost permissions, interruptions, second drivers and changed inputs."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from executors import INSIDE, DisturbedTraining, StoppedError, before, disturbed, killed, small_partitions, stopped
from faulty import Corpus, MakeTeacher, Outcome, full_disk, metrics, read_only, same_metrics, unprivileged

from msense.errors import InputError, MsenseError

pytestmark = pytest.mark.usefixtures("in_process")
TRAINING = {"student": "static", "epochs": 2, "batch_tokens": 256, "lr": 5e-3, "held_out": 0.2, "checkpoint_steps": 3}
CAUSES = {"disk full": "no space left .*File too large", "permission lost": "no permission .*Permission denied"}


@pytest.fixture(scope="module")
def corpus(make_teacher: MakeTeacher) -> Iterator[Corpus]:
    """Two dictionaries, and the run "whole" with labels and a student."""
    corpus = Corpus(Path(tempfile.mkdtemp()), make_teacher("bert"))
    with small_partitions():
        corpus.build("dict", max_occurrences=60)
        corpus.build("other", max_occurrences=50)
        corpus.distill("whole", **TRAINING)
    yield corpus
    shutil.rmtree(corpus.folder)


def copy_labels(corpus: Corpus, name: str) -> Path:
    """Return a new run that has the labels of "whole" and nothing else."""
    ignored = shutil.ignore_patterns("training", "student", "metrics*", ".*")
    return Path(shutil.copytree(corpus.folder / "whole", corpus.folder / name, ignore=ignored))


@pytest.mark.parametrize("fault", CAUSES)
def test_labels_that_cannot_be_written_are_reported_and_the_next_run_resumes(
    corpus: Corpus, outcome: Outcome, fault: str
) -> None:
    with unprivileged(corpus.folder):
        folder = corpus.folder / fault

        def context() -> AbstractContextManager[None]:
            return full_disk() if fault == "disk full" else read_only(corpus.labels(fault) / "labels")

        with pytest.raises(MsenseError, match=rf"cannot write .*labels/.*{CAUSES[fault]}"):
            corpus.distill(fault, disturbed(*INSIDE["labels"][:1], context, INSIDE["labels"][1]), **TRAINING)
        finished = {path: path.stat().st_mtime_ns for path in (corpus.labels(fault) / "labels").glob("0*.done")}
        assert finished
        corpus.label(fault, **TRAINING)
    made, whole = (corpus.labels(name) for name in (fault, "whole"))
    assert corpus.files(made, "labels", markers=False) == corpus.files(whole, "labels", markers=False)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(folder.rglob(".*.part"))
    outcome(fault, "labels", "reported; next run resumes")


def test_labels_of_a_dictionary_that_is_read_only(corpus: Corpus) -> None:
    first = corpus.distill("writer", labels=None, **TRAINING)
    with unprivileged(corpus.folder):
        second = corpus.distill("reader", labels=None, **TRAINING, seed=1)
        with pytest.raises(MsenseError, match=r"no permission .*\n.*dict/labels/.*: give another folder with --labels"):
            corpus.distill("other reader", labels=None, **{**TRAINING, "held_out": 0.3})
    assert second["labels"] == first["labels"]
    assert second["stages"]["labels"]["forwarded"] == 0


@pytest.mark.parametrize("fault", CAUSES)
def test_a_training_that_cannot_write_is_reported_and_the_next_run_resumes(
    corpus: Corpus, outcome: Outcome, fault: str
) -> None:
    run = copy_labels(corpus, f"{fault}-training")
    run.chmod(0o777)
    for path in run.rglob("*"):
        path.chmod(path.stat().st_mode | 0o022)
    with unprivileged(corpus.folder):
        executor = DisturbedTraining(lambda: full_disk() if fault == "disk full" else read_only(checkpoints(run)), 3)
        with pytest.raises(MsenseError, match=rf"training failed: .*{CAUSES[fault].split(' .*')[1]}"):
            corpus.distill(run.name, executor, **TRAINING)
        assert not (run / "student").exists()
        corpus.distill(run.name, **TRAINING)
    same_metrics(run, corpus.folder / "whole")
    outcome(fault, "training", "reported; next run resumes")


def checkpoints(run: Path) -> Path:
    """Return the folder with the checkpoints of the only training of a run."""
    (folder,) = (path for path in (run / "training").iterdir() if (path / "latest.json").exists())
    return folder


def test_an_interrupted_local_training_resumes_from_its_last_checkpoint(corpus: Corpus) -> None:
    run = copy_labels(corpus, "interrupted")
    first, second = DisturbedTraining(stopped, 4), DisturbedTraining()
    with pytest.raises(StoppedError):
        corpus.distill(run.name, first, **TRAINING)
    corpus.distill(run.name, second, **TRAINING)
    assert second.reports[0] == first.reports[-1]  # the report that was interrupted
    assert len(set(first.reports + second.reports)) == len(first.reports + second.reports) - 1
    assert metrics(run) == metrics(corpus.folder / "whole")
    student = corpus.files(run.name, "student")
    assert student.pop("training.json")
    assert student == {k: v for k, v in corpus.files("whole", "student").items() if k != "training.json"}


def test_two_local_workers_train_and_resume_after_one_is_killed(corpus: Corpus) -> None:
    run = copy_labels(corpus, "two")
    with pytest.raises(MsenseError, match=r"training failed: .*terminated abruptly"):
        corpus.distill(run.name, DisturbedTraining(killed, 4, trainers=2), **TRAINING)
    assert len(list(checkpoints(run).glob("epoch_*"))) >= 2
    corpus.distill(run.name, DisturbedTraining(trainers=2), **TRAINING)
    for two, one in zip(metrics(run), metrics(corpus.folder / "whole"), strict=True):
        assert two["step"] == one["step"]
        assert two["held_out_sense"] == pytest.approx(one["held_out_sense"], rel=0.05)  # other order of summation


@pytest.mark.parametrize("stage", ["labels", "training"])
def test_a_second_driver_and_changed_input_are_refused(corpus: Corpus, outcome: Outcome, stage: str) -> None:
    name, refused = f"second-{stage}", []

    def meanwhile() -> None:
        with pytest.raises(InputError, match=rf"another driver .*{name} \(process {os.getpid()} on host "):
            corpus.distill(name, **TRAINING)
        refused.append(stage)
        raise StoppedError

    with pytest.raises(StoppedError):
        corpus.distill(name, before(INSIDE[stage][0], meanwhile), **TRAINING)
    assert refused == [stage]
    outcome("second driver", stage, "refused")
    given = {"soft_targets": 2, "epochs": 1} if stage == "labels" else {"dictionary": str(corpus.folder / "other")}
    summary = corpus.distill(name, **{**TRAINING, **given})
    assert summary["labels"] != str(corpus.labels("whole"))  # a folder of their own, as for any other inputs
    outcome("input changed", stage, "afresh")
    with pytest.raises(InputError, match=r"config\.held_out: 0\.2 .*0\.3 [\s\S]*another --output"):
        corpus.distill(name, **{**TRAINING, **given, "held_out": 0.3})
