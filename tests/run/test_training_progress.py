"""Progress of a training: the files of the first worker, and what the driver and `status` display."""

import json
import logging
import time
from pathlib import Path

import pytest

from msense.cli.status import show_status
from msense.run import progress as progress_module
from msense.run.folder import RunFolder
from msense.run.progress import Progress, display_progress


def test_epochs_are_lines_without_duplicates_after_a_resume(tmp_path: Path) -> None:
    first, second = {"epoch": 1, "step": 10, "train_sense": 2.0}, {"epoch": 2, "step": 20, "train_sense": 1.0}
    Progress(str(tmp_path)).write_epochs([first])
    Progress(str(tmp_path)).write_epochs([first, second])  # after a crash
    assert [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [first, second]


def test_progress_is_logged_and_shown_by_status(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.01)
    run = RunFolder(str(tmp_path))
    with caplog.at_level(logging.INFO, "msense"), display_progress(run):
        speed = {"tokens_per_s": 1234.5, "seconds_left": 65.4}
        Progress(run.root).write_step(30, 1200, 1, {"sense": 2.5, "accuracy": 0.5}, speed)
        for _ in range(500):
            if caplog.records:
                break
            time.sleep(0.01)
    expected = "30 of 1,200 steps, epoch 1, sense 2.5000, accuracy 0.5000, 1,234 tokens/s, 65 s left"
    assert [record.getMessage() for record in caplog.records] == [f"training: {expected}"]
    manifest = {
        "teacher": {"name": "t", "dim": 4},
        "pins": {"dtype": "f"},
        "corpus": [],
        "dictionary": "d",
        "training": {},
    }
    progress_module.storage.write_json(run.manifest, {**manifest, "config": {}, "inputs": {}})
    show_status(run.root)
    assert "30 of 1,200 steps" in capsys.readouterr().out
