"""A lease on a run folder on S3: an object that the driver at work renews, so that a second driver is kept out.

It is written on a condition (If-None-Match, If-Match), of which the store lets one writer win; the store's own clock
tells its age. A dead driver's lease ends `LEASE_SECONDS` after its last word. A driver that finds another's in place of
its own, or cannot renew its own before it ends, stops.
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
from msense.io.filesystems import display_uri, error_message, filesystem, storage_error_types
from msense.io.storage import write_errors

logger = logging.getLogger(__name__)
LEASE_SECONDS = 90.0
RENEW_SECONDS = 10.0  # also that one request may take
POLL_SECONDS = 1.0


class Word(NamedTuple):
    """The last word of who holds a lease."""

    etag: str
    age: float  # seconds
    driver: str
    told: str  # for people: process and host


class Lease:
    """The lease of this driver; `etag` is that of its last word."""

    def __init__(self, uri: str) -> None:
        """Name it; nothing is taken yet."""
        self.fs, self.path = filesystem(uri)
        self.driver, self.etag = uuid.uuid4().hex, ""

    def look(self) -> Word | None:
        """Return the last word that is there, if any is."""
        bucket, key, _ = self.fs.split_path(self.path)
        try:
            found = self.fs.call_s3("head_object", Bucket=bucket, Key=key, timeout=RENEW_SECONDS)
        except FileNotFoundError:
            return None
        now, said = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"]), found["Metadata"]
        age = (now - found["LastModified"]).total_seconds()
        return Word(found["ETag"], age, said.get("driver", ""), said.get("told", "not known which"))

    def write(self, **condition: str) -> bool:
        """Write a word on a condition; tell whether the lease is ours now, whatever became of the store's answers."""
        said = {"driver": self.driver, "told": ascii(f"process {os.getpid()} on host {socket.gethostname()}")[1:-1]}
        word = uuid.uuid4().bytes  # no two have the same ETag
        try:
            put = self.fs.pipe_file(self.path, word, Metadata=said, timeout=RENEW_SECONDS, **condition)
            self.etag = put["ETag"]
        except storage_error_types():
            found = self.look()
            if found is None or found.etag == self.etag:  # nothing was written: no such bucket, no permission, ...
                raise
            if found.driver != self.driver:
                return False
            self.etag = found.etag
        return True

    def take(self) -> bool:
        """Take it if nobody has it, or who has it does not renew it: that is waited for."""
        first = found = self.look()
        if first is not None:
            logger.info("the last driver has not ended (%s): waiting %g s for a sign of it", first.told, LEASE_SECONDS)
        while first is not None and found is not None:
            if found.etag != first.etag:
                return False
            if found.age > LEASE_SECONDS:
                return self.write(IfMatch=found.etag)
            time.sleep(POLL_SECONDS)
            found = self.look()
        return self.write(IfNoneMatch="*")

    def renew_until(self, ended: threading.Event, lost: list[str]) -> None:
        """Renew it; when it is lost, say why and interrupt the driver, whatever it waits for.

        Not by SIGINT: that of a command in the background is ignored, and Ray Train has its own handler.
        """
        renewed = time.monotonic()
        while not ended.wait(RENEW_SECONDS) and not lost:
            began = time.monotonic()
            try:
                if self.write(IfMatch=self.etag):
                    renewed = began
                else:
                    lost.append("another driver has taken it over")
            except storage_error_types() as error:
                if time.monotonic() - renewed > LEASE_SECONDS - 3 * RENEW_SECONDS:  # the next try may come too late
                    lost.append(f"its lease could not be renewed: {error_message(error)}")
        if lost and signal.getsignal(signal.SIGUSR1) is signal.default_int_handler:
            os.kill(os.getpid(), signal.SIGUSR1)


@contextmanager
def leased(uri: str) -> Iterator[None]:
    """Hold a lease; interrupts the main thread if it is lost (by SIGUSR1), of which another thread is told at its end.

    Raises:
        InputError: another driver holds it.
        MsenseError: the store refused it, or it was lost.
    """
    lease, root = Lease(uri), display_uri(uri.rpartition("/")[0])
    with write_errors(uri):
        try:
            taken = lease.take()
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            logger.warning("%s: this store has no conditional writes, so a second driver is not kept out", root)
            taken = True
    if not taken:
        who = found.told if (found := lease.look()) else "it has just ended"
        raise InputError(f"another driver works on {root} ({who}): wait for it, or give another --output")
    if not lease.etag:
        yield
        return
    ended, lost = threading.Event(), list[str]()
    renewer = threading.Thread(target=lease.renew_until, args=(ended, lost), daemon=True)
    listens = threading.current_thread() is threading.main_thread()  # others are told at their end only
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler) if listens else signal.SIG_IGN
    renewer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost:
            raise
    finally:
        ended.set()
        renewer.join()
        with suppress(*storage_error_types()):  # else it ends by itself
            if (found := lease.look()) and found.driver == lease.driver:
                lease.fs.rm_file(lease.path)
        if listens:
            signal.signal(signal.SIGUSR1, before)
    if lost:
        raise MsenseError(f"this driver has left {root}: {lost[0]}")
