"""Progress of a job: rate and time left, slow tasks, and gauges of Ray."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from work import Adder, add

from msense.runtime import progress, ray_executor


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
        ([4.0] * 5, ["stage: 3 of 5, 15.0/min, 8 s left"]),
        ([0.01] * 999 + [1.0, 3.0], ["stage: 1000 of 1001, 91.0/s, 0 s left"]),
        ([1.0] * 3, []),
    ],
)
def test_progress_reports_rate_and_time_left(
    clock: list[float], caplog: pytest.LogCaptureFixture, seconds: list[float], messages: list[str]
) -> None:
    with caplog.at_level(logging.INFO, "msense.runtime.progress"):
        rows = list(progress.track("stage", after(clock, seconds), len(seconds)))
    assert rows == list(range(len(seconds)))
    assert caplog.messages == messages


def test_a_task_that_holds_up_a_stage_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    progress.warn_of_skew("even", [40.0] * 7 + [100.0])
    progress.warn_of_skew("short", [1.0] * 7 + [20.0])
    progress.warn_of_skew("few", [1.0] * 6 + [200.0])
    assert not caplog.messages
    progress.warn_of_skew("uneven", [10.0] * 7 + [90.0])
    assert caplog.messages[0].startswith("uneven: the slowest of 8 tasks took 90 s, 9.0 times the median: ")


def test_stages_on_ray_watch_for_slow_tasks_and_set_gauges(ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    seen: dict[str, list[float]] = {}
    values: list[tuple[str, float, str]] = []
    monkeypatch.setattr(ray_executor, "warn_of_skew", seen.__setitem__)

    def note(gauge: metrics.Gauge, value: float, tags: dict[str, str]) -> None:
        if gauge.info["name"].startswith("msense"):  # not one of Ray's own
            values.append((gauge.info["name"], value, tags["stage"]))

    monkeypatch.setattr(metrics.Gauge, "set", note)
    executor = ray_executor.RayExecutor.connect(workers=2)
    assert len(list(executor.map("tasks", add, [1, 2]))) == 2
    assert len(list(executor.map_actors("actors", Adder, {"offset": 0}, [1, 2]))) == 2
    assert {stage: len(seconds) for stage, seconds in seen.items()} == {"tasks": 2, "actors": 2}
    assert values == [
        (name, value, stage)
        for stage in seen
        for done in range(3)
        for name, value in (("msense_pieces", 2), ("msense_pieces_done", done))
    ]


def test_no_job_loads_ray_before_it_has_set_it_up() -> None:
    """Ray reads its settings from environment variables when it is imported."""
    jobs = Path(__file__).parents[2] / "jobs"
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('ray' in sys.modules)"
    names = sorted(path.stem for path in jobs.glob("*.py"))
    assert len(names) >= 5
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, cwd=jobs)
    assert done.stdout == "False\n"
