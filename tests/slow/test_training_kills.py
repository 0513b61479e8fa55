"""Trainings whose workers or driver are killed within an epoch end with the numbers of an undisturbed one."""

import os
import shutil
import signal
import time
from pathlib import Path

import driver
import pytest
from faulty import Corpus, Outcome, metrics, same_metrics

from msense.config.distill import DistillConfig
from msense.pipelines.distill import distill_student
from msense.stages import train
from msense.student import load_student

pytestmark = pytest.mark.slow
KILLED_AT = 40  # step; an epoch has 28
SETTINGS = {
    "student": "static", "epochs": 3, "batch_tokens": 256, "lr": 5e-3, "held_out": 0.2, "dtype": "float32",
    "checkpoint_steps": 10, "workers": 2,
}  # fmt: skip


def copy_labels(made: Corpus, name: str) -> Path:
    """Return a new run that has the labels of the run "whole" and nothing else."""
    ignored = shutil.ignore_patterns("training", "student", "metrics*")
    return Path(shutil.copytree(made.folder / "whole", made.folder / name, ignore=ignored))


@pytest.fixture
def whole(
    ray: None, made: Corpus, in_process: None, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Corpus, dict]:
    """An undisturbed training by two workers, and its settings."""
    made.build("dict", senses=3)
    monkeypatch.undo()
    given = {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), **SETTINGS}
    distill_student(DistillConfig(**given, output=str(made.folder / "whole")))
    assert len(metrics(made.folder / "whole")) == 3
    return made, given


def kill_a_worker(whole: tuple[Corpus, dict], patch: pytest.MonkeyPatch, name: str, **more: object) -> Path:
    """Train again and kill a worker in the second epoch; return the run."""
    made, given = whole
    run, flag = copy_labels(made, name), made.folder / f"{name}.flag"
    with patch.context() as patched:
        patched.setattr(train, "worker", driver.disturbed(KILLED_AT, flag, kill=True))
        summary = distill_student(DistillConfig(**given, **more, output=str(run)))
    assert flag.exists()
    assert summary["stages"]["training"]["epochs"] == 3
    return run


def test_a_worker_and_a_driver_killed_within_an_epoch(
    whole: tuple[Corpus, dict], patch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    made, given = whole
    same_metrics(kill_a_worker(whole, patch, "worker"), made.folder / "whole")
    run, flag = copy_labels(made, "driver"), made.folder / "driver.flag"
    process = driver.start_process(driver.drive_training, {**given, "output": str(run)}, KILLED_AT, str(flag))
    until = time.monotonic() + 600
    while not flag.exists() and time.monotonic() < until and process.is_alive():
        time.sleep(0.1)
    assert flag.exists()
    assert len(metrics(run)) == 1  # it is in the second epoch
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (run / "student").exists()
    distill_student(DistillConfig(**given, output=str(run)))
    same_metrics(run, made.folder / "whole")
    outcome("worker killed", "training", "same run goes on")
    outcome("driver killed", "training", "next run goes on")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_with_two_workers_and_one_killed(
    whole: tuple[Corpus, dict], patch: pytest.MonkeyPatch, stage: int
) -> None:
    undisturbed = copy_labels(whole[0], "undisturbed")
    distill_student(DistillConfig(**whole[1], deepspeed_stage=stage, output=str(undisturbed)))
    run = kill_a_worker(whole, patch, f"zero{stage}", deepspeed_stage=stage)
    same_metrics(run, undisturbed)
    for found, plain in zip(metrics(run), metrics(whole[0].folder / "whole"), strict=True):
        for name in ("train_sense", "train_pooled", "held_out_sense"):
            assert found[name] == pytest.approx(plain[name], rel=0.02)  # the order of summation differs
    assert load_student(run / "student").config.kind == "static"
