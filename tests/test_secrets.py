"""Credentials in URIs, in the environment and in library errors: no job logs or writes them."""

import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import ALL, Corpus
from fsspec.implementations.local import LocalFileSystem
from task_data import write_task

from msense.__main__ import main
from msense.text import first_line, plain, redact

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA1111AAAA2222BBBB",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLE",
    "AWS_SESSION_TOKEN": "session-token-of-nobody",
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsTuVwX",
    "RAY_AUTH_TOKEN": "ray-token-of-nobody",
}
IN_URI = "pass-of-nobody"
QUOTED = f"403 for https://me:{IN_URI}@store/x?X-Amz-Signature={IN_URI} key {SECRETS['AWS_SECRET_ACCESS_KEY']} Authorization: "
QUOTED += f"Bearer {SECRETS['HF_TOKEN']} " + " ".join(SECRETS.values())
Run = Callable[..., int]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def run(secrets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command as from the command line and check that no output or file contains a secret."""

    def call(command: str, *flags: object) -> int:
        monkeypatch.setattr(logging.root, "handlers", [])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        capfd.readouterr()
        try:
            code = main([command, *map(str, flags)])
        except (RuntimeError, ValueError, LookupError, TypeError):  # as the interpreter does with uncaught exceptions
            sys.excepthook(*sys.exc_info())
            code = 1
        output = "".join(capfd.readouterr())
        assert output
        written = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for secret in (*SECRETS.values(), IN_URI):
            assert secret not in output, output
            assert [name for name, data in written.items() if secret.encode() in data or secret in name] == []
        return code

    return call


@pytest.fixture
def broken_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the file system fail on a file with an error that quotes all secrets."""

    def breaks(name: str, error: type[Exception] = OSError) -> None:
        whole = LocalFileSystem._open

        def fail(self: LocalFileSystem, path: str, *rest: object, **options: object) -> object:
            if name in path:
                raise error(QUOTED)
            return whole(self, path, *rest, **options)

        monkeypatch.setattr(LocalFileSystem, "_open", fail)

    return breaks


@pytest.mark.usefixtures("in_process")
def test_no_job_reveals_secrets(made: Corpus, run: Run, broken_store: Callable[..., None]) -> None:
    root, teacher = made.folder, ("--teacher", made.teacher)
    small = (*teacher, "--dtype", "float32", "--local")
    corpus = root / "corpus"
    task = write_task(root / "task", {part: [("the river", "a"), ("the bank", "b")] * 4 for part in ("train", "test")})
    remote = f"s3://me:{IN_URI}@bucket/x?token={IN_URI}"
    build = ("--corpus", corpus, *small, "--max-occurrences", 40, "--keep", *ALL)
    assert run("build", *build, "--output", root / "dict") == 0
    student = ("--student", "static", "--epochs", 1)
    assert run("distill", "--dictionary", root / "dict", *small, *student, "--output", root / "student") == 0
    models = ("teacher", f"s=student:{root / 'student'}")
    evaluated = ("--task", f"t={task}", "--shots", 2, "--draws", 2, "--no-cost", "--output", root / "e.json")
    assert run("evaluate", "--model", *models, *small, *evaluated) == 0
    assert run("build", "--corpus", remote, *small, "--output", root / "b2") == 2
    assert run("build", "--corpus", corpus, "--teacher", remote, "--local", "--output", root / "b3") == 2
    assert run("distill", "--dictionary", remote, "--output", root / "d2") != 0
    assert run("evaluate", "--model", f"student:{remote}", "--task", f"t={remote}", "--output", root / "e2.json") != 0
    tuned = (*teacher, "--local", "--output", root / "f")
    assert run("finetune", "--task", f"sst2={remote}", *tuned) == 2
    broken_store("train.csv")
    assert run("finetune", "--task", f"sst2={task}", *tuned) == 2
    broken_store("a.txt")
    assert run("build", "--corpus", corpus, *small, "--output", root / "b4") != 0
    shutil.rmtree(root / "b4", ignore_errors=True)
    broken_store("b.txt", RuntimeError)  # an unexpected exception
    (corpus / "a.txt").unlink()
    assert run("build", "--corpus", corpus, *small, "--output", root / "b5") != 0


def test_known_secrets_are_blanked(secrets: None) -> None:
    for show in (redact, plain, lambda text: first_line(OSError(text))):
        assert not [secret for secret in (*SECRETS.values(), IN_URI) if secret in show(QUOTED)]
    assert redact("token hf_zZyYxXwWvVuUtTsSrRqQ, AKIAIOSFODNN7EXAMPLE") == "token ***, ***"
    plainly = "3 tokens of the river bank; hf_hub is a name, Bearer of news"
    assert redact(plainly) == plainly
    assert re.fullmatch(r"[^\n]*", first_line(OSError("a\nb")))
    assert len(first_line(OSError("1, " * 10_000))) < 1100
