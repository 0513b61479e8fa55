"""`ray job submit` to a head with token authentication: refused, stopped, resumed and failing jobs."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from faulty import wait_until, write_corpus
from s3_server import files

from msense.errors import InputError
from msense.io import storage
from msense.run.folder import SUBMITTED, RunFolder, resolve_output

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Head:
    """A head node with token authentication, in a temporary home folder, and its `ray job` command."""

    def __init__(self, folder: Path) -> None:
        token = secrets.token_hex(32)
        (folder / "token").write_text(token)
        (folder / "token").chmod(0o600)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
        self.environment |= {"HOME": str(folder), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
        port, dashboard, *others = map(str, free_ports(5))
        names = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        options = [word for name, other in zip(names, others, strict=True) for word in (f"--{name}", other)]
        options += ["--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard, "--num-cpus", "2", "--port", port]
        options += ["--object-store-memory", str(200 << 20), "--temp-dir", str(folder / "ray")]
        with (folder / "head.log").open("wb") as log:
            command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--head", *options]
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{dashboard}"
        wait_until(lambda: self.status(token) == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, (folder / "head.log").read_text(errors="replace")

    def end(self) -> None:
        """Stop all processes of the node."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):  # none of the group is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def status(self, token: str = "") -> int:
        """Return the HTTP status of a request for the list of jobs; 0 if the head does not answer yet."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urlopen(Request(f"{self.url}/api/jobs/", headers=headers)) as answer:
                return answer.status
        except HTTPError as error:
            return error.code
        except URLError:
            return 0

    def job(self, *words: str) -> subprocess.CompletedProcess:
        """Run `ray job`; its output includes its errors."""
        command = [str(BIN / "ray"), "job", words[0], "--address", self.url, *words[1:]]
        return subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    def submit(self, folder: Path, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        """Submit a command with a working directory."""
        return self.job("submit", "--working-dir", str(folder), *options, "--", *command)


def free_ports(count: int) -> list[int]:
    """Return unused ports."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(
        dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # Ray's sockets need short paths
        node = Head(Path(folder))
        try:
            yield node
        finally:
            node.end()


def test_no_token_no_job_and_a_relative_output_is_refused(head: Head) -> None:
    assert (head.status(), head.status("0" * 64)) == (401, 403)
    bad = head.submit(ROOT, "python", "jobs/build_dict.py", "--corpus", "README.md", "--output", "runs/mine")
    assert bad.returncode == 1  # Ray's own
    assert "exit code 2" in bad.stdout
    assert "error: --output runs/mine is relative, and a submitted job runs in a copy" in bad.stdout


def test_only_lasting_outputs_are_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_output("runs/x") == str(tmp_path / "runs/x")
    monkeypatch.setenv(SUBMITTED, "{}")
    for output in ("runs/x", "file://runs/x"):
        with pytest.raises(InputError, match="give an absolute path or a URI that every node can reach"):
            resolve_output(output)
    assert resolve_output("/runs/x") == resolve_output("file:///runs/x") == "/runs/x"
    assert resolve_output("s3://bucket/x") == "s3://bucket/x"


WAITS = """
_call = EmbedActor.__call__


def _waits(self, item):
    while item["number"] >= 5 and Path(HOLD).exists():
        time.sleep(0.05)
    return _call(self, item)


EmbedActor.__call__ = _waits
"""


@pytest.mark.slow
def test_a_job_that_is_stopped_and_submitted_again_gives_the_same_bytes(
    head: Head, tmp_path: Path, teacher: Path
) -> None:
    """The submitted copy of the code has small partitions; it waits at its sixth one while a file exists."""
    hold, stopped, code = tmp_path / "hold", tmp_path / "stopped", tmp_path / "code"
    hold.touch()
    for name in ("jobs", "msense"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (code / "msense" / "stages" / "embedding_store.py").open("a") as file:
        file.write("PARTITION_BYTES = (60_000, 60_000)\n")
    with (code / "msense" / "stages" / "embed.py").open("a") as file:
        file.write(WAITS.replace("HOLD", repr(str(hold))))
    write_corpus(tmp_path / "corpus", "abcdefghijklmnop", lines=60, repeated=0)  # at least one partition per file

    def command(output: Path) -> list[str]:
        given = ["--corpus", str(tmp_path / "corpus"), "--teacher", str(teacher), "--dtype", "float32"]
        given += ["--max-occurrences", "0", "--senses", "3", "--keep", "occurrences", "--output", str(output)]
        return ["python", "jobs/build_dict.py", *given]

    assert head.submit(code, *command(stopped), options=("--submission-id", "first", "--no-wait")).returncode == 0
    wait_until(lambda: len(list(stopped.glob("occurrences/*.records.done"))) >= 2)
    assert head.job("stop", "first").returncode == 0
    assert "was stopped" in head.job("status", "first").stdout
    assert not (stopped / "finished.json").exists()
    assert head.submit(code, *command(stopped), options=("--submission-id", "second", "--no-wait")).returncode == 0
    journal = RunFolder(str(stopped)).journal
    wait_until(lambda: len(storage.read_json(journal)["drivers"]) == 2)
    hold.unlink()  # no worker of the first job is left to continue it
    done = head.job("logs", "second", "--follow")
    assert "succeeded" in head.job("status", "second").stdout, done.stdout
    assert str(stopped / "dictionary") in done.stdout.replace("\n", "")
    first, last = storage.read_json(journal)["drivers"]
    assert first["outcome"] in ("", "failed: SystemExit: 15")  # Ray's drivers raise that on SIGTERM, given time
    assert last["outcome"] == "finished"
    counts = last["stages"]["embed"]
    assert min(counts["kept"], counts["made"]) >= 2
    assert counts["kept"] + counts["made"] >= 10  # small partitions: driver and workers ran the uploaded copy
    whole = head.submit(code, *command(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stdout
    assert files(str(stopped / "dictionary")) == files(str(tmp_path / "whole" / "dictionary")) != {}


@pytest.mark.slow
def test_a_failing_job_reports_the_cause(head: Head, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the bank of the river\n")
    given = ["--corpus", str(tmp_path / "text.txt"), "--teacher", str(teacher)]
    failed = head.submit(ROOT, "python", "jobs/build_dict.py", *given, "--output", "/proc/nothing")
    assert failed.returncode == 1
    assert "failed with exit code 1" in failed.stdout
    assert "failed: cannot write" in failed.stdout
