"""Nodes of a Ray cluster as processes of `ray start --block`, each ended by its own process group."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
READY_SECONDS = 90.0


def free_ports(count: int) -> list[int]:
    """Return ports that nobody uses, outside Ray's range for workers (10002 to 19999)."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def in_small_units(folder: Path, wait: str) -> Path:
    """Copy the code, with units so small that a small corpus has many; an actor runs the lines of `wait` before each.

    Who has many units runs the copy.
    """
    for name in ("jobs", "msense"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "msense" / "occurrences.py"
    text, replaced = re.subn(r"^UNIT_BYTES = .*", "UNIT_BYTES = (60_000, 60_000)", file.read_text(), flags=re.MULTILINE)
    assert replaced == 1
    waits = f"""


_call = OccurrenceActor.__call__


def _waits(self, item):
{wait}
    return _call(self, item)


OccurrenceActor.__call__ = _waits
"""
    file.write_text(text + waits)
    return folder


class Nodes:
    """A cluster that asks for a token, in a home and a temporary folder of its own; all of it goes at the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short: Ray's sockets lie in it
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        outside = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
        self.environment = {
            **outside,
            "HOME": str(self.folder),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
        }
        self._started: list[subprocess.Popen] = []

    def start(self, *options: str, within: Sequence[str] = ()) -> subprocess.Popen:
        """Start a node: `ray start --block` with these options, called by `within`."""
        command = [*within, str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *options]
        command += ["--object-store-memory", str(200 << 20)]
        with (self.folder / f"node-{len(self._started)}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._started.append(process)
        return process

    def log(self, number: int) -> str:
        """Return what a node has told."""
        return (self.folder / f"node-{number}.log").read_text(errors="replace")

    def wait_for(self, command: Sequence[str], number: int) -> str:
        """Return what a command prints once it succeeds, while a node starts."""
        until = time.monotonic() + READY_SECONDS
        while True:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout
            assert self._started[number].poll() is None, self.log(number)
            assert time.monotonic() < until, done.stderr + self.log(number)
            time.sleep(0.5)

    def end(self) -> None:
        """End all nodes, the last first, and forget their files."""
        for process in reversed(self._started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if _is_group(process.pid):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_group(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Namespaces:
    """Network namespaces on a bridge, each with an address of its own; `end` removes them."""

    def __init__(self, count: int) -> None:
        """Make them.

        Raises:
            OSError, CalledProcessError: this user may not, or `ip` is not there.
        """
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else nobody would call `end`
        tag = f"ms{os.getpid() % 100_000}"
        self.bridge, self.names = f"{tag}b", [f"{tag}n{number}" for number in range(count)]
        self.addresses = [f"10.77.0.{number}" for number in range(1, count + 1)]
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("link", "set", self.bridge, "up")
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("netns", "add", name)
                _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("link", "set", f"{name}v", "master", self.bridge, "up")
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
                _ip("-n", name, "route", "add", "default", "dev", "eth0")  # Ray asks for the way to the world
        except BaseException:
            self.end()
            raise

    def within(self, number: int) -> list[str]:
        """Return the words that run a command in one of them, on a host of its name."""
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', self.names[number]]
        return ["ip", "netns", "exec", self.names[number], "unshare", "--uts", *named]

    def end(self) -> None:
        """Remove all that is there."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True, check=False)
        signal.signal(signal.SIGTERM, self._before)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=True)
