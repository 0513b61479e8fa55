"""The lease on a run folder on S3: one driver at a time, takeover after a crash, and a driver that loses it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty import ALL, Corpus
from s3_server import BUCKET, Server, answers, files, throttled, unheard

from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.run import lease
from msense.run.folder import RunFolder, locked
from msense.run.lease import Lease, leased

RUN = RunFolder(f"{BUCKET}/run")


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Python's own handler: Ray Train installs another, and background processes have none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes; the store's clock has whole seconds."""
    for name, value in {"LEASE_SECONDS": 6.0, "RENEW_SECONDS": 1.0, "POLL_SECONDS": 0.1}.items():
        monkeypatch.setattr(lease, name, value)


def until(ready: Callable[[], object], seconds: float = 60) -> None:
    """Wait in an interruptible way, like the main thread of a driver."""
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)
    assert ready()


def test_a_second_driver_is_refused_while_the_first_is_at_work(s3: Server) -> None:
    with locked(RUN):
        assert storage.exists(RUN.lock)
        with pytest.raises(
            InputError,
            match=rf"another driver works on s3://bucket/run \(process {os.getpid()} on host .*another --output",
        ):
            locked(RUN).__enter__()
    assert not storage.exists(RUN.lock)  # so that the next driver need not wait
    with locked(RUN):
        pass


def test_one_of_two_simultaneous_drivers_wins(s3: Server) -> None:
    one, two = Lease(RUN.lock), Lease(RUN.lock)
    assert one.write(IfNoneMatch="*")
    assert not two.write(IfNoneMatch="*")
    before = one.etag
    assert two.write(IfMatch=before)  # both saw the lease of a dead driver
    assert not one.write(IfMatch=before)


@pytest.mark.slow
def test_a_dead_drivers_lease_is_taken_over(s3: Server) -> None:
    assert Lease(RUN.lock).write(IfNoneMatch="*")  # and never renewed
    began = time.monotonic()
    with locked(RUN):
        assert time.monotonic() - began > 1
    storage.write_text(RUN.lock, "not a lease")
    with locked(RUN):
        pass


def at_work(disturb: Callable[[], object]) -> None:
    """Hold the lease until an exception interrupts."""
    with leased(RUN.lock):
        disturb()
        until(lambda: False)


def test_a_driver_that_lost_its_lease_stops(s3: Server) -> None:
    other = Lease(RUN.lock)
    with pytest.raises(
        MsenseError, match="this driver has stopped working on s3://bucket/run: another driver has taken over"
    ):
        at_work(other.write)
    assert other.read().driver == other.driver


@pytest.mark.parametrize("requests", ["bucket/run/.lock", "^PUT bucket/run/.lock"])
def test_a_driver_that_cannot_renew_its_lease_stops_before_it_expires(s3: Server, requests: str) -> None:
    with pytest.raises(
        MsenseError, match="stopped working on s3://bucket/run: its lease could not be renewed: the store"
    ):
        at_work(lambda: s3.spoil(requests, throttled, 10**6))
    s3.heal()


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_stays_ctrl_c(s3: Server) -> None:
    with pytest.raises(KeyboardInterrupt):
        at_work(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert not storage.exists(RUN.lock)


def test_a_lost_answer_is_not_a_lost_lease(s3: Server) -> None:
    s3.spoil("^PUT bucket/run/.lock", unheard, 2)
    with locked(RUN):
        first = Lease(RUN.lock).read()
        s3.spoil("^PUT bucket/run/.lock", unheard, 2)
        until(lambda: Lease(RUN.lock).read().etag != first.etag)
    assert not storage.exists(RUN.lock)


def test_a_store_without_conditional_writes_is_used_without_a_lease(
    s3: Server, caplog: pytest.LogCaptureFixture
) -> None:
    s3.spoil("^PUT bucket/run/.lock", answers("501 Not Implemented", "NotImplemented"), 10**6)
    with locked(RUN):
        pass
    assert "a second driver is not kept out" in caplog.text


@pytest.mark.slow
def test_a_job_killed_on_s3_resumes(made: Corpus, s3: Server, tmp_path: Path) -> None:
    """The rerun waits for the dead driver's lease, keeps finished work, and gives the bytes of a local run."""
    given = f"--corpus {made.folder / 'corpus'} --teacher {made.teacher} --senses 3 --workers 2 --dtype float32 --dedup"
    command = [sys.executable, "jobs/build_dict.py", *given.split(), "--keep", *ALL, "--output"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen([*command, RUN.root], env=environment, stderr=log, stdout=log)
        try:
            centroids = "PUT bucket/run/centroids/"
            until(lambda: first.poll() is not None or any(name.startswith(centroids) for name in s3.seen), 300)
        finally:
            first.kill()
            first.wait()
    assert first.returncode == -signal.SIGKILL
    assert not storage.exists(RUN.finished)
    second = subprocess.run([*command, RUN.root], env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "waiting 90 s for its lease" in second.stderr
    subprocess.run([*command, str(made.folder / "whole")], env=environment, capture_output=True, check=True)
    for below in ("dictionary", *ALL):
        assert files(f"{RUN.root}/{below}") == files(str(made.folder / "whole" / below)), below
    drivers = storage.read_json(RUN.journal)["drivers"]
    assert [driver["outcome"] for driver in drivers] == ["", "finished"]
    assert drivers[1]["stages"]["embed"]["made"] == 0
    assert json.dumps(drivers).count('"damaged": 0')
