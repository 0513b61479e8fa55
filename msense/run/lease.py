"""A lease on a run folder on S3: an object that the driver at work renews, so that a second driver is kept out.

It is written conditionally (If-None-Match, If-Match), so that one of several writers wins; its age is measured by the
clock of the store. The lease of a driver that died expires after `LEASE_SECONDS`. A driver that loses its lease, or
cannot renew it in time, stops.
"""

import errno
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from msense.errors import InputError, MsenseError
from msense.io.filesystems import display_uri, error_message, filesystem, storage_error_types, storage_errors

logger = logging.getLogger(__name__)
LEASE_SECONDS = 90.0
RENEW_SECONDS = 10.0  # also the timeout of a request
POLL_SECONDS = 1.0


class LeaseState(NamedTuple):
    """The stored object of a lease: its etag, age in seconds, and the id and name of its driver."""

    etag: str
    age: float
    driver: str
    name: str


def driver_name() -> str:
    """Return the process and host of this driver, for messages."""
    return f"process {os.getpid()} on host {socket.gethostname()}"


class Lease:
    """The lease of this driver; `etag` is that of its last write."""

    def __init__(self, uri: str) -> None:
        self.fs, self.path = filesystem(uri)
        self.driver, self.etag = uuid.uuid4().hex, ""

    def read(self) -> LeaseState | None:
        """Return the stored lease, if any."""
        bucket, key, _ = self.fs.split_path(self.path)
        try:
            head = self.fs.call_s3("head_object", Bucket=bucket, Key=key, timeout=RENEW_SECONDS)
        except FileNotFoundError:
            return None
        now, metadata = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"]), head["Metadata"]
        age = (now - head["LastModified"]).total_seconds()
        return LeaseState(head["ETag"], age, metadata.get("driver", ""), metadata.get("name", "unknown process"))

    def write(self, **condition: str) -> bool:
        """Write the lease on a condition; return whether this driver holds it now, even if a response was lost."""
        metadata = {"driver": self.driver, "name": ascii(driver_name())[1:-1]}
        content = uuid.uuid4().bytes  # so that each write has another ETag
        try:
            result = self.fs.pipe_file(self.path, content, Metadata=metadata, timeout=RENEW_SECONDS, **condition)
            self.etag = result["ETag"]
        except storage_error_types():
            state = self.read()
            if state is None or state.etag == self.etag:  # nothing was written: no such bucket, no permission, ...
                raise
            if state.driver != self.driver:
                return False
            self.etag = state.etag
        return True

    def acquire(self) -> bool:
        """Take the lease if it is free, or wait until it expires; return False if its driver renews it."""
        first = state = self.read()
        if first is not None:
            logger.info("the last driver (%s) may be running: waiting %g s for its lease", first.name, LEASE_SECONDS)
        while first is not None and state is not None:
            if state.etag != first.etag:
                return False
            if state.age > LEASE_SECONDS:
                return self.write(IfMatch=state.etag)
            time.sleep(POLL_SECONDS)
            state = self.read()
        return self.write(IfNoneMatch="*")

    def renew_until(self, ended: threading.Event, lost: list[str]) -> None:
        """Renew the lease; if it is lost, append the reason to `lost` and interrupt the main thread.

        SIGUSR1 is used because SIGINT is ignored in background processes and handled by Ray Train.
        """
        renewed = time.monotonic()
        while not ended.wait(RENEW_SECONDS) and not lost:
            began = time.monotonic()
            try:
                if self.write(IfMatch=self.etag):
                    renewed = began
                else:
                    lost.append("another driver has taken over")
            except storage_error_types() as error:
                if time.monotonic() - renewed > LEASE_SECONDS - 3 * RENEW_SECONDS:  # the next attempt may be too late
                    lost.append(f"its lease could not be renewed: {error_message(error)}")
        if lost and signal.getsignal(signal.SIGUSR1) is signal.default_int_handler:
            os.kill(os.getpid(), signal.SIGUSR1)


@contextmanager
def leased(uri: str, flag: str = "--output") -> Iterator[None]:
    """Hold a lease on the folder that a flag sets.

    If it is lost, the main thread is interrupted, and another thread gets an error on exit only.

    Raises:
        InputError: another driver holds the lease.
        MsenseError: the store failed, or the lease was lost.
    """
    lease, root = Lease(uri), display_uri(uri.rpartition("/")[0])
    with storage_errors(uri, "write"):
        try:
            acquired = lease.acquire()
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            logger.warning("%s: this store has no conditional writes, so a second driver is not kept out", root)
            acquired = True
    if not acquired:
        driver = state.name if (state := lease.read()) else "it has just ended"
        raise InputError(f"another driver works on {root} ({driver}): wait for it, or give another {flag}")
    if not lease.etag:
        yield
        return
    ended, lost = threading.Event(), list[str]()
    renewer = threading.Thread(target=lease.renew_until, args=(ended, lost), daemon=True)
    in_main = threading.current_thread() is threading.main_thread()  # only it may set signal handlers
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler) if in_main else signal.SIG_IGN
    renewer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost:
            raise
    finally:
        ended.set()
        renewer.join()
        with suppress(*storage_error_types()):  # else it expires
            if (state := lease.read()) and state.driver == lease.driver:
                lease.fs.rm_file(lease.path)
        if in_main:
            signal.signal(signal.SIGUSR1, before)
    if lost:
        raise MsenseError(f"this driver has stopped working on {root}: {lost[0]}")
