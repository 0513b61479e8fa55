"""Nodes of a Ray cluster, started by `ray start --block` in their own process groups."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
READY_SECONDS = 90.0


def free_ports(count: int) -> list[int]:
    """Return unused ports."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def in_small_partitions(folder: Path, wait: str) -> Path:
    """Copy the code with partitions so small that a small corpus has many; actors run the lines of `wait` before each.

    Many partitions in a result thus prove that the copy ran.
    """
    for name in ("jobs", "msense"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    appended = {"embedding_store": "PARTITION_BYTES = (60_000, 60_000)\n"}
    appended["embed"] = f"""
_call = EmbedActor.__call__


def _waits(self, item):
{wait}
    return _call(self, item)


EmbedActor.__call__ = _waits
"""
    for name, code in appended.items():
        with (folder / "msense" / "stages" / f"{name}.py").open("a") as file:
            file.write(code)
    return folder


class Nodes:
    """A cluster with token authentication in a temporary home folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets need short paths
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
        """Start a node with `ray start --block`, prefixed by the command `within`."""
        command = [*within, str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *options]
        command += ["--object-store-memory", str(200 << 20)]
        with (self.folder / f"node-{len(self._started)}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._started.append(process)
        return process

    def log(self, number: int) -> str:
        """Return a node's log."""
        return (self.folder / f"node-{number}.log").read_text(errors="replace")

    def wait_for(self, command: Sequence[str], number: int) -> str:
        """Repeat a command until it succeeds, while a node starts; return its output."""
        until = time.monotonic() + READY_SECONDS
        while True:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout
            assert self._started[number].poll() is None, self.log(number)
            assert time.monotonic() < until, done.stderr + self.log(number)
            time.sleep(0.5)

    def end(self) -> None:
        """Stop all nodes, the last first, and delete their files."""
        for process in reversed(self._started):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):  # none of the group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Namespaces:
    """Network namespaces on a bridge, each with its own address."""

    def __init__(self, count: int) -> None:
        """Create the namespaces.

        Raises:
            OSError, CalledProcessError: no permission, or no `ip` command.
        """
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `end` is called
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
                _ip("-n", name, "route", "add", "default", "dev", "eth0")  # Ray looks it up
        except BaseException:
            self.end()
            raise

    def within(self, number: int) -> list[str]:
        """Return a command prefix that runs a command in a namespace, with its name as the host's."""
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', self.names[number]]
        return ["ip", "netns", "exec", self.names[number], "unshare", "--uts", *named]

    def end(self) -> None:
        """Delete the namespaces and the bridge."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True, check=False)
        signal.signal(signal.SIGTERM, self._before)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=True)
