"""Trainings whose workers or driver are killed within an epoch end with the numbers of an undisturbed one."""

import shutil
from pathlib import Path

import driver
import pytest
from driver import Options
from faulty import Corpus, Outcome, metrics, same_metrics, wait_until

from msense.student import load_student

pytestmark = pytest.mark.slow
KILLED_AT = 40  # step; an epoch has 28
SETTINGS = {
    "student": "static", "epochs": 3, "batch_tokens": 256, "lr": 5e-3, "held_out": 0.2, "dtype": "float32",
    "checkpoint_steps": 10, "workers": 2,
}  # fmt: skip


class Trainings:
    """Trainings by two workers on Ray, compared with an undisturbed one in the folder "whole"."""

    def __init__(self, made: Corpus) -> None:
        made.build("dict", senses=3)
        self.folder = made.folder
        self.given = {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), **SETTINGS}
        self.train("whole")
        assert len(metrics(self.folder / "whole")) == 3

    def train(self, name: str, options: Options | None = None, **more: object) -> dict:
        options = options or Options(self.folder / "log")
        return driver.run({**self.given, **more, "output": str(self.folder / name)}, options)

    def copy_labels(self, name: str) -> Path:
        """Return a new run, which shares the labels of the run "whole"."""
        ignored = shutil.ignore_patterns("training", "student", "metrics*")
        return Path(shutil.copytree(self.folder / "whole", self.folder / name, ignore=ignored))

    def faulty(self, hold: bool = False) -> Options:
        """Return options by which a worker dies, or waits, in the second epoch, and then writes the file "flag"."""
        (self.folder / "flag").unlink(missing_ok=True)
        return Options(self.folder / "log", {"training": {"flag": self.folder / "flag", "hold": hold}}, step=KILLED_AT)

    def kill_a_worker(self, name: str, **more: object) -> Path:
        """Train again and kill a worker; return the run."""
        run = self.copy_labels(name)
        assert self.train(name, self.faulty(), **more)["stages"]["training"]["epochs"] == 3
        assert (self.folder / "flag").exists()
        return run


@pytest.fixture
def trainings(ray: None, made: Corpus, in_process: None) -> Trainings:
    return Trainings(made)


def test_a_worker_and_a_driver_killed_within_an_epoch(trainings: Trainings, outcome: Outcome) -> None:
    whole = trainings.folder / "whole"
    same_metrics(trainings.kill_a_worker("worker"), whole)
    run = trainings.copy_labels("driver")
    process = driver.start({**trainings.given, "output": str(run)}, trainings.faulty(hold=True))
    wait_until((trainings.folder / "flag").exists, seconds=600)
    assert len(metrics(run)) == 1  # it is in the second epoch
    process.kill()
    process.join()
    assert not (run / "student").exists()
    trainings.train("driver")
    same_metrics(run, whole)
    outcome("worker killed", "training", "run continues")
    outcome("driver killed", "training", "next run resumes")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_with_two_workers_and_one_killed(trainings: Trainings, stage: int) -> None:
    undisturbed = trainings.copy_labels("undisturbed")
    trainings.train("undisturbed", deepspeed_stage=stage)
    run = trainings.kill_a_worker(f"zero{stage}", deepspeed_stage=stage)
    same_metrics(run, undisturbed)
    for own, plain in zip(metrics(run), metrics(trainings.folder / "whole"), strict=True):
        for name in ("train_sense", "train_pooled", "held_out_sense"):
            assert own[name] == pytest.approx(plain[name], rel=0.02)  # the order of summation differs
    assert load_student(run / "student").config.kind == "static"
