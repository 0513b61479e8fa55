"""The lease on a run folder on S3: one driver at a time, takeover after a crash, and a driver that loses it stops."""

import os
import signal
import time
from collections.abc import Callable

import pytest
from faulty import wait_until
from s3_server import BUCKET, Server, answers, throttled, unheard

from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.run import lease
from msense.run.folder import RunFolder, locked
from msense.run.lease import Lease, leased

RUN = RunFolder(f"{BUCKET}/run")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes; the store's clock has whole seconds."""
    for name, value in {"LEASE_SECONDS": 6.0, "RENEW_SECONDS": 1.0, "POLL_SECONDS": 0.1}.items():
        monkeypatch.setattr(lease, name, value)


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
        wait_until(lambda: False)


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


def test_ctrl_c_stays_ctrl_c(s3: Server) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes and Ray Train have others
    with pytest.raises(KeyboardInterrupt):
        at_work(lambda: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, before)
    assert not storage.exists(RUN.lock)


def test_a_lost_answer_is_not_a_lost_lease(s3: Server) -> None:
    s3.spoil("^PUT bucket/run/.lock", unheard, 2)
    with locked(RUN):
        first = Lease(RUN.lock).read()
        s3.spoil("^PUT bucket/run/.lock", unheard, 2)
        wait_until(lambda: Lease(RUN.lock).read().etag != first.etag)
    assert not storage.exists(RUN.lock)


def test_a_store_without_conditional_writes_is_used_without_a_lease(
    s3: Server, caplog: pytest.LogCaptureFixture
) -> None:
    s3.spoil("^PUT bucket/run/.lock", answers("501 Not Implemented", "NotImplemented"), 10**6)
    with locked(RUN):
        pass
    assert "a second driver is not kept out" in caplog.text
