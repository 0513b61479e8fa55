"""How a training is told: files that a driver reads, lines of epochs that are never doubled, TensorBoard where it is."""

import json
import logging
import sys
import types
from pathlib import Path

import pytest

from msense.cli.status import show_status
from msense.io.storage import write_json
from msense.run import progress as progress_module
from msense.run.folder import RunFolder
from msense.run.progress import Progress, display_progress, format_progress

SPEED = {"tokens_per_s": 1234.5, "seconds_left": 65.4}


class Board:
    """Stands for TensorBoard's writer."""

    made: "list[Board]" = []  # noqa: RUF012 - of this test alone

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.scalars, self.is_closed = folder, purge_step, [], False
        Board.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Board.made.clear()


def test_epochs_are_lines_and_those_of_an_earlier_driver_are_not_doubled(tmp_path: Path, board: None) -> None:
    first, second = {"epoch": 1, "step": 10, "train_sense": 2.0}, {"epoch": 2, "step": 20, "train_sense": 1.0}
    with Progress(str(tmp_path), []) as progress:
        progress.epoch([first])
    with Progress(str(tmp_path), [first]) as progress:  # after a crash
        progress.epoch([first, second])
    assert [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [first, second]
    assert [made.purge_step for made in Board.made] == [1, 11]
    assert Board.made[1].scalars == [(f"epoch/{name}", value, 20) for name, value in second.items()]
    assert all(made.is_closed for made in Board.made)


def test_without_tensorboard_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Progress(str(tmp_path), []) as progress:
        progress.tell(1, 2, 1, {"sense": 1.0}, SPEED)
    assert not (tmp_path / "training" / "tensorboard").exists()
    assert json.loads((tmp_path / "training" / "progress.json").read_text())["steps"] == 2


def test_who_waits_is_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress_module, "LOOK_SECONDS", 0.01)
    run = RunFolder(str(tmp_path))
    told = {"step": 30, "steps": 1200, "epoch": 1, "found": {"sense": 2.5, "accuracy": 0.5}, **SPEED}
    wanted = "30 of 1,200 steps, epoch 1, sense 2.5000, accuracy 0.5000, 1,234 tokens/s, 65 s left"
    assert format_progress(told) == wanted
    with caplog.at_level(logging.INFO, "msense"), display_progress(run):
        write_json(run.progress, told)
        for _ in range(500):
            if caplog.records:
                break
            progress_module.time.sleep(0.01)
    assert [record.getMessage() for record in caplog.records] == [f"training: {wanted}"]
    write_json(
        run.manifest,
        {"teacher": {"name": "t", "dim": 4}, "pins": {"dtype": "f"}, "corpus": [], "dictionary": "d"}
        | {"config": {}, "inputs": {}},
    )
    show_status(str(tmp_path))
    assert "30 of 1,200 steps" in capsys.readouterr().out
