"""`ray job submit` to a head with token authentication: refused, stopped, resumed and failing jobs."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty import write_corpus
from nodes import BIN, ROOT, Nodes, free_ports, in_small_partitions
from s3_server import files

from msense.errors import InputError
from msense.io import storage
from msense.run.folder import SUBMITTED, RunFolder, resolve_output


class Head:
    """A head node and its `ray job` command."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        port, dashboard, *others = map(str, free_ports(5))
        names = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        options = [word for name, other in zip(names, others, strict=True) for word in (f"--{name}", other)]
        options += ["--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard, "--num-cpus", "2"]
        nodes.start("--head", "--port", port, "--temp-dir", str(nodes.folder / "ray"), *options)
        self.address = ("--address", f"http://127.0.0.1:{dashboard}")
        nodes.wait_for([str(BIN / "ray"), "job", "list", *self.address], 0)

    def job(self, *words: str, token: bool = True) -> subprocess.CompletedProcess:
        """Run `ray job`; its output includes its errors."""
        environment = {k: v for k, v in self.nodes.environment.items() if token or not k.startswith("RAY_AUTH")}
        command = [str(BIN / "ray"), "job", words[0], *self.address, *words[1:]]
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    def submit(self, folder: Path, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        """Submit a command with a working directory."""
        return self.job("submit", "--working-dir", str(folder), *options, "--", *command)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    nodes = Nodes()
    try:
        yield Head(nodes)
    finally:
        nodes.end()


def test_no_token_no_job_and_a_relative_output_is_refused(head: Head) -> None:
    refused = head.job("list", token=False)
    assert refused.returncode == 1
    assert "Unauthorized: Missing authentication token" in refused.stdout
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


def wait_until(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not ready() and time.monotonic() < until:
        time.sleep(0.05)
    assert ready()


@pytest.mark.slow
def test_a_job_that_is_stopped_and_submitted_again_gives_the_same_bytes(
    head: Head, tmp_path: Path, teacher: Path
) -> None:
    """The submitted copy of the code waits at its sixth partition while a file exists."""
    hold, stopped = tmp_path / "hold", tmp_path / "stopped"
    hold.touch()
    wait = f"""
    while item["number"] >= 5 and Path({str(hold)!r}).exists():
        time.sleep(0.05)
"""
    code = in_small_partitions(tmp_path / "code", wait)
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
