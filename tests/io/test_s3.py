"""Runs on an S3 API: the bytes of a local run despite faults of the store, and no credentials in any output."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import s3fs
from executors import StoppedError, stopping
from faulty import ALL, PLACES, Corpus, Outcome, metrics, same_metrics
from s3_server import BUCKET, KEY, SECRET, Fault, Server, answers, cut, dropped, files, throttled

from msense import SenseDictionary, SenseEncoder
from msense.cli.console import run_job
from msense.cli.status import show_status
from msense.errors import InputError, MsenseError
from msense.io import filesystems, storage
from msense.io.arrays import load_arrays, save_arrays
from msense.training.label_dataset import LabelSet

IN_PROCESS = pytest.mark.usefixtures("in_process")


@pytest.fixture
def reported() -> Iterator[list[str]]:
    """The messages that msense logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("msense").addHandler(handler)
    yield messages
    logging.getLogger("msense").removeHandler(handler)


def same_dictionary(built: Corpus, uri: str) -> None:
    for below in ("dictionary", *ALL):
        assert files(f"{uri}/{below}") == files(str(built.folder / "whole" / below)), below


def no_credentials(output: str, *uris: str) -> None:
    written = output + "".join(str(data) for uri in uris for data in files(uri).values())
    assert KEY not in written
    assert SECRET not in written


@IN_PROCESS
def test_a_run_on_s3_gives_the_bytes_of_a_local_one(
    built: Corpus, s3: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = filesystems.filesystem(BUCKET)[0]
    for file in sorted((built.folder / "corpus").iterdir()):
        fs.put_file(str(file), f"bucket/corpus/{file.name}")
    summary = built.build(keep=ALL, output=f"{BUCKET}/run", corpus=(f"{BUCKET}/corpus",))
    assert summary["dictionary"] == f"{BUCKET}/run/dictionary"
    assert files(f"{BUCKET}/run/passages") == files(str(built.folder / "whole" / "passages"))
    local, remote = files(str(built.folder / "whole" / "dictionary")), files(f"{BUCKET}/run/dictionary")
    assert {name for name in local if local[name] != remote[name]} <= {"README.md"}  # names the corpus
    there = SenseDictionary.load(f"{BUCKET}/run")
    assert there.fingerprint == SenseDictionary.load(built.folder / "whole").fingerprint
    show_status(f"{BUCKET}/run")
    assert "finished" in capsys.readouterr().out
    no_credentials("", f"{BUCKET}/run")


STOPS = ("passages", "write", "embed", "write index", "clustering", "assemble")  # places


@IN_PROCESS
def test_a_run_on_s3_resumes_after_a_stop_in_each_stage(built: Corpus, s3: Server) -> None:
    output = f"{BUCKET}/run"
    for place in STOPS:
        built.stop_at(place, output=output, keep=ALL)
    built.build(output=output, keep=ALL)
    same_dictionary(built, output)
    drivers = storage.read_json(f"{output}/journal.json")["drivers"]
    assert len(drivers) == len(STOPS) + 1
    assert drivers[-1]["stages"]["dictionary"]["made"] == 1
    assert all(drivers[-1]["stages"][stage]["made"] == 0 for stage in ("passages", "embed", "clustering"))


FAULTS = pytest.mark.parametrize("fault", [throttled, dropped], ids=["throttled", "dropped"])
LABELS = "labels/[0-9a-f]{16}/labels/000000.safetensors"


def label(built: Corpus, output: str, error: type[BaseException] = StoppedError, message: str = "") -> None:
    """Label the text of the undisturbed run into a folder, without training."""
    with pytest.raises(error, match=message):
        built.distill(
            "", stopping("training"), dictionary=str(built.folder / "whole"), output=output, labels=f"{output}/labels"
        )


def same_labels(built: Corpus, uri: str, folder: Path) -> None:
    label(built, str(folder))
    own, other = (LabelSet.open(place) for place in (uri, str(folder)))
    assert own.manifest == other.manifest  # with the checksums of all files


@pytest.mark.slow
@IN_PROCESS
@FAULTS
def test_temporary_faults_of_the_store_are_retried(
    built: Corpus, s3: Server, fault: Fault, outcome: Outcome, tmp_path: Path
) -> None:
    """In every stage the first upload, the first download of a marker and the first listing fail twice."""
    for place in PLACES.values():
        s3.spoil(f"^PUT bucket/run/{place}$", fault, 2)
        s3.spoil(f"^(GET|HEAD) bucket/run/{place}", fault, 2)
    s3.spoil("^GET bucket/?$", fault, 2)
    built.build(output=f"{BUCKET}/run", keep=ALL)
    same_dictionary(built, f"{BUCKET}/run")
    s3.spoil(f"^(PUT|GET|HEAD) bucket/run2/{LABELS}", fault, 2)
    label(built, f"{BUCKET}/run2")
    same_labels(built, f"{BUCKET}/run2", tmp_path)
    puts = {stage: f"PUT bucket/run/{place}" for stage, place in PLACES.items()}
    for stage, put in (puts | {"labels": f"PUT bucket/run2/{LABELS}"}).items():
        assert sum(re.fullmatch(put, seen) is not None for seen in s3.seen) >= 3, stage
        outcome("S3 throttled or disconnected", stage, "run continues")


@IN_PROCESS
@pytest.mark.slow
@FAULTS
def test_lasting_faults_of_the_store_are_reported_and_the_run_resumes(
    built: Corpus, s3: Server, fault: Fault, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for number, (stage, place) in enumerate(PLACES.items()):
        s3.spoil(f"^PUT bucket/run/{place}$", fault, 10**6)
        where = "dictionary" if stage == "dictionary" else place
        cause = "the store is busy" if fault is throttled else "the store is unavailable"
        with pytest.raises(MsenseError, match=rf"cannot write s3://bucket/run/{where}.*: {cause}") as caught:
            built.build(output=f"{BUCKET}/run", keep=ALL)
        assert SECRET not in str(caught.value)
        assert not storage.exists(f"{BUCKET}/run/{place}.done")
        assert len(storage.read_json(f"{BUCKET}/run/journal.json")["drivers"]) == number + 1
        s3.heal()
    built.build(output=f"{BUCKET}/run", keep=ALL)
    same_dictionary(built, f"{BUCKET}/run")
    s3.spoil(f"^PUT bucket/run2/{LABELS}", fault, 10**6)
    label(built, f"{BUCKET}/run2", MsenseError, f"cannot write s3://bucket/run2/{LABELS}")
    s3.heal()
    label(built, f"{BUCKET}/run2")
    same_labels(built, f"{BUCKET}/run2", tmp_path)
    for stage in (*PLACES, "labels"):
        outcome("S3 unavailable", stage, "reported; next run resumes")


def test_interrupted_reads_are_retried(s3: Server, reported: list[str]) -> None:
    data = os.urandom(300_000)
    storage.publish(f"{BUCKET}/x", lambda path: path.write_bytes(data) and None)
    assert storage.read_range(f"{BUCKET}/x", 4, 0) == b""
    for read in (
        lambda: storage.read_range(f"{BUCKET}/x", 0, len(data)) == data,
        lambda: storage.stats_of(f"{BUCKET}/x", verify=True) == {},
    ):
        s3.spoil("^GET bucket/x$", cut, 2)
        assert read()
    s3.spoil("^GET bucket/x$", cut, 10**6)
    assert run_job(lambda: storage.read_range(f"{BUCKET}/x", 0, len(data)) and None) == 1
    assert "cannot read s3://bucket/x: the store is unavailable after all retries" in reported[0]


def test_interrupted_downloads_of_large_files_continue(s3: Server, tmp_path: Path) -> None:
    """Files larger than the client's block of 50 MB."""
    numbers = np.arange(13 << 20, dtype=np.int32)
    storage.publish(f"{BUCKET}/x", lambda path: save_arrays(path, {"a": numbers}))
    s3.spoil("^GET bucket/x$", cut, 2)
    np.testing.assert_array_equal(load_arrays(f"{BUCKET}/x")["a"], numbers)
    assert s3.seen.count("GET bucket/x") == 3


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Slow Down", "403 Forbidden"])
def test_a_failing_store_does_not_mean_a_damaged_file(s3: Server, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    storage.publish(f"{BUCKET}/x", lambda path: path.write_bytes(b"x") and None)
    for request in ("^HEAD bucket/x$", "^GET bucket/x$", "^GET bucket/x.done$"):
        s3.spoil(request, answers(status, "Trouble"), 10**6)
        with pytest.raises(MsenseError, match=r"cannot read s3://bucket/x(\.done)?: (the store|S3|no permission)"):
            storage.stats_of(f"{BUCKET}/x", verify=True)
        s3.heal()
    assert storage.stats_of(f"{BUCKET}/x", verify=True) == {}


def test_incomplete_uploads_do_not_count(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a multipart upload that lacks a part, nor a file without its done marker."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(101 << 20)  # more than two parts

    s3.spoil("^PUT bucket/large$", dropped, 10**6)
    with pytest.raises(MsenseError, match="cannot write s3://bucket/large"):
        storage.publish(f"{BUCKET}/large", write)
    assert s3.seen.count("POST bucket/large") >= 1  # a multipart upload
    assert not storage.exists(f"{BUCKET}/large")
    s3.heal()
    s3.spoil("^PUT bucket/small.done$", dropped, 10**6)
    with pytest.raises(MsenseError, match=r"cannot write s3://bucket/small\.done"):
        storage.publish(f"{BUCKET}/small", lambda path: path.write_bytes(b"x") and None)
    assert storage.stats_of(f"{BUCKET}/small") is None
    s3.heal()
    storage.publish(f"{BUCKET}/small", lambda path: path.write_bytes(b"xy") and None)
    filesystems.filesystem(BUCKET)[0].pipe_file("bucket/small", b"x")  # as left by a store without atomic uploads
    assert storage.stats_of(f"{BUCKET}/small") is None


@IN_PROCESS
@pytest.mark.parametrize("missing", ["credentials", "bucket"])
def test_missing_credentials_and_buckets_are_reported(
    built: Corpus, s3: Server, monkeypatch: pytest.MonkeyPatch, reported: list[str], missing: str
) -> None:
    bucket, message = (
        "other",
        "cannot write s3://other/run/.lock: The specified bucket does not exist; check the bucket",
    )
    if missing == "credentials":
        bucket, message = "bucket", "credentials"
        monkeypatch.setenv("HOME", str(built.folder))  # holds none
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()  # clients keep their credentials
    assert run_job(lambda: built.build(output=f"s3://{bucket}/run") and None) in (1, 2)
    assert message in reported[-1]
    assert SECRET not in "".join(reported)


@pytest.fixture
def command(s3: Server, tmp_path: Path) -> Callable[..., str]:
    """Run a job on S3 with its own Ray; return its output and errors."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words: str, fails: bool = False, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=False, env={**environment, **more}
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_build_distill_and_encode_on_s3(
    made: Corpus, command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = filesystems.filesystem(BUCKET)[0]
    fs.put(str(made.folder / "corpus"), "bucket/corpus", recursive=True)
    given = ["--corpus", f"{BUCKET}/corpus", "--teacher", str(made.teacher), "--senses", "3", "--workers", "2"]
    output = command("jobs/build_dict.py", *given, "--dtype", "float32", "--dedup", "--output", f"{BUCKET}/run")
    given = f"--student static --epochs 2 --workers 2 --dtype float32 --teacher {made.teacher}".split()
    distill = ["jobs/distill.py", "--dictionary", f"{BUCKET}/run", *given, "--output", f"{BUCKET}/student"]
    output += command(*distill)
    assert "the student in s3://bucket/student/student is finished" in command(*distill)
    encoder = SenseEncoder.from_pretrained(f"{BUCKET}/student/student")
    fs.get("bucket/student/student", str(tmp_path / "student"), recursive=True)
    texts = ["the bank of the river", "money is in the bank"]
    assert (encoder.encode(texts) == SenseEncoder.from_pretrained(tmp_path / "student").encode(texts)).all()
    assert len(metrics(f"{BUCKET}/student")) == 2
    with pytest.raises(InputError, match="nothing at s3://bucket/none"):
        SenseEncoder.from_pretrained(f"{BUCKET}/none")
    no_credentials(output, f"{BUCKET}/run", f"{BUCKET}/student")


@IN_PROCESS
@pytest.mark.slow
def test_faults_of_the_store_while_training(
    made: Corpus, s3: Server, command: Callable[..., str], outcome: Outcome
) -> None:
    """Uploads of checkpoints are retried; a lasting fault is reported, and the next run resumes."""
    words = ["jobs/distill.py", "--dictionary", str(made.folder / "dict"), "--teacher", str(made.teacher)]
    words += ["--student", "static", "--epochs", "2", "--dtype", "float32", "--output"]
    made.build("dict")
    command(*words, str(made.folder / "local"))
    checkpoints = "^PUT bucket/[a-z]+/training/.*checkpoint"
    s3.spoil(checkpoints, throttled, 2)
    command(*words, f"{BUCKET}/busy")
    assert sum(re.match(checkpoints, name) is not None for name in s3.seen) > 2
    s3.spoil(checkpoints, throttled, 10**6)
    output = command(*words, f"{BUCKET}/long", fails=True, AWS_MAX_ATTEMPTS="1")
    assert "training failed" in output
    assert not storage.exists(f"{BUCKET}/long/student")
    s3.heal()
    command(*words, f"{BUCKET}/long")
    assert len(metrics(made.folder / "local")) == 2
    for name in ("busy", "long"):
        same_metrics(f"{BUCKET}/{name}", made.folder / "local")
    outcome("S3 throttled or disconnected", "training", "run continues")
    outcome("S3 unavailable", "training", "reported; next run resumes")
