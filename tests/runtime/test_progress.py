"""Progress of a job: time left, and gauges of Ray."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from msense.runtime import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def after(clock: list[float], seconds: list[float]) -> Iterator[int]:
    for number, duration in enumerate(seconds):
        clock[0] += duration
        yield number


@pytest.mark.parametrize(
    ("seconds", "messages"),
    [
        ([4.0] * 5, ["stage: 3 of 5, 8 s left"]),
        ([0.01] * 999 + [1.0, 3.0], ["stage: 1000 of 1001, 0 s left"]),
        ([1.0] * 3, []),
    ],
)
def test_progress_reports_time_left(
    clock: list[float], caplog: pytest.LogCaptureFixture, seconds: list[float], messages: list[str]
) -> None:
    with caplog.at_level(logging.INFO, "msense.runtime.progress"):
        rows = list(progress.track("stage", after(clock, seconds), len(seconds)))
    assert rows == list(range(len(seconds)))
    assert caplog.messages == messages


def test_stages_set_gauges_of_ray(ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    values: list[tuple[str, float, str]] = []

    def note(gauge: metrics.Gauge, value: float, tags: dict[str, str]) -> None:
        values.append((gauge.info["name"], value, tags["stage"]))

    monkeypatch.setattr(metrics.Gauge, "set", note)
    assert list(progress.track("some", iter("ab"), 2)) == ["a", "b"]
    steps = [(name, done) for done in range(3) for name in ("msense_pieces", "msense_pieces_done")]
    assert values == [(name, done if name.endswith("done") else 2, "some") for name, done in steps]


def test_no_job_loads_ray_before_it_has_set_it_up() -> None:
    """Ray reads its settings from environment variables when it is imported."""
    jobs = Path(__file__).parents[2] / "jobs"
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('ray' in sys.modules)"
    names = sorted(path.stem for path in jobs.glob("*.py"))
    names += [f"msense.cli.{name}" for name in ("build", "distill", "evaluate", "finetune", "make")]
    names += ["msense.pipelines.make", "msense.pipelines.finetune", "msense.evaluation.run"]
    assert len(names) >= 13
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, cwd=jobs)
    assert done.stdout == "False\n"
