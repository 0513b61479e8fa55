"""What is told of a job at work: rate and time left, a piece of work that holds up a stage, and gauges of Ray."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from msense.runtime import progress, ray_executor
from msense.runtime.resources import Resources

RESOURCES = Resources(actors=2, tasks=2, device="cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lasting(clock: list[float], seconds: list[float]) -> Iterator[int]:
    for number, duration in enumerate(seconds):
        clock[0] += duration
        yield number


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ([4.0] * 5, ["stage: 3 of 5, 15.0/min, 8 s left"]),
        ([0.01] * 999 + [1.0, 3.0], ["stage: 1000 of 1001, 91.0/s, 0 s left"]),
        ([1.0] * 3, []),
    ],
)
def test_progress_tells_rate_and_time_left(
    clock: list[float], caplog: pytest.LogCaptureFixture, seconds: list[float], told: list[str]
) -> None:
    with caplog.at_level(logging.INFO, "msense.runtime.progress"):
        rows = list(progress.track("stage", lasting(clock, seconds), len(seconds)))
    assert rows == list(range(len(seconds)))
    assert caplog.messages == told


def test_a_piece_of_work_that_holds_up_a_stage_is_told(caplog: pytest.LogCaptureFixture) -> None:
    progress.warn_of_skew("even", [40.0] * 7 + [100.0])
    progress.warn_of_skew("short", [1.0] * 7 + [20.0])
    progress.warn_of_skew("few", [1.0] * 6 + [200.0])
    assert not caplog.messages
    progress.warn_of_skew("uneven", [10.0] * 7 + [90.0])
    assert caplog.messages[0].startswith("uneven: the slowest of 8 pieces of work took 90 s, 9.0 times the median: ")


@pytest.mark.usefixtures("ray")
def test_all_ways_to_map_work_look_for_skew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {}
    monkeypatch.setattr(ray_executor, "warn_of_skew", seen.__setitem__)

    def slow(item: int) -> dict:
        time.sleep(0.3 if item == 2 else 0)
        return {"item": item}

    class Slow:
        def __call__(self, item: int) -> dict:
            return slow(item)

    items = [0, 1, 2, 3]
    assert len(list(ray_executor.map_tasks("tasks", slow, items, RESOURCES))) == 4
    assert len(list(ray_executor.map_data("data", slow, items, RESOURCES))) == 4
    assert len(list(ray_executor.map_actors("actors", Slow, {}, items, RESOURCES))) == 4
    assert list(seen) == ["tasks", "data", "actors"]
    assert all(len(seconds) == 4 and max(seconds) >= 0.3 for seconds in seen.values())
    assert sorted(seen["actors"])[2] < 0.3


@pytest.mark.usefixtures("ray")
def test_gauges_tell_how_far_a_stage_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    told: list[tuple[str, float, str]] = []

    def note(gauge: metrics.Gauge, value: float, tags: dict[str, str]) -> None:
        told.append((gauge.info["name"], value, tags["stage"]))

    monkeypatch.setattr(metrics.Gauge, "set", note)
    assert list(progress.track("stage", iter("ab"), 2)) == ["a", "b"]
    assert told == [
        (name, value, "stage")
        for done in range(3)
        for name, value in (("msense_pieces", 2), ("msense_pieces_done", done))
    ]


def test_no_job_loads_ray_before_it_has_set_it_up() -> None:
    """A local Ray's token, and what Ray says, are set in variables that it reads when it is imported."""
    jobs = Path(__file__).parents[2] / "jobs"
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('ray' in sys.modules)"
    names = sorted(path.stem for path in jobs.glob("*.py"))
    assert len(names) >= 5
    told = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, cwd=jobs)
    assert told.stdout == "False\n"
