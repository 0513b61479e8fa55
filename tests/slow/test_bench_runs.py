"""Benchmarks and the comparison with other libraries from the command line, on small data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from task_data import write_task

JOBS = Path(__file__).parents[2] / "jobs"
LINES = [f"the bank {'of the river ' * (n % 7)} is deep. Money {n % 50} is in the bank." for n in range(300)]
pytestmark = pytest.mark.slow


def run(job: str, *words: str) -> tuple[dict[str, float], str]:
    """Run a job; return its figures and its log."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(JOBS / job), *words, "--workers", "2"]
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def write_data(data: Path) -> None:
    texts = [(line, f"label {n % 2}") for n, line in enumerate(LINES)]
    write_task(data / "banking77", {"train": texts, "test": texts[:50]})
    folder = data / "retrieval" / "small"
    folder.mkdir(parents=True)
    documents = [{"_id": str(n), "title": f"money {n}", "text": line} for n, line in enumerate(LINES[:40])]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    queries = [{"_id": f"q{n}", "text": f"money {n} in a bank"} for n in range(5)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels.tsv").write_text("".join(f"q{n}\t{n}\t1\n" for n in range(5)))


def test_speed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(LINES * 10))
    write_data(tmp_path)
    given = ["--corpus", str(tmp_path / "text.txt"), "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    figures, _ = run("bench.py", "gather", "kmeans", "step", "encode", "--senses", "2", *given)
    keys = ("gather.ratio", "kmeans.over_limit", "distill.step_ratio", "encode.speedup_static")
    assert all(figures[key] > 0 for key in keys)


def test_once_and_tasks(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    write_data(tmp_path)
    given = ["--corpus", str(tmp_path / "text.txt"), "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    given += ["--epochs", "1", "--sets", "small", "banking77"]
    figures, _ = run("benchmark.py", "once", "tasks", *given)
    assert 0.9 <= figures["once.reads"] <= 1.1
    assert 0.9 <= figures["once.reads_spans"] <= 1.1
    assert figures["once.seconds_spans"] > 0
    assert figures["retrieval.static"] == figures["retrieval.small.static"] > 0
    assert figures["distill.banking77.table"] > 0.5
    again, log = run("benchmark.py", "once", "tasks", *given)
    assert again == figures
    assert "reusing 0 of" not in log


def test_rivals(tmp_path: Path) -> None:
    write_data(tmp_path)
    given = ["small", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--epochs", "1"]
    given += ["--without", "layers2"]
    figures, log = run("rivals.py", *given)
    assert figures["rivals.small.same_tokens"] > 0.99
    names = ("teacher", "table", "static", "st-table", "st-minilm-2", "bm25", "static + bm25")
    assert all(figures[f"rivals.small.{name}"] > 0 for name in names)
    assert "tokenlearn is left out" in log
    training = json.loads((tmp_path / "out" / "small" / "st-table-0.2" / "training.json").read_text())
    assert (training["num_train_epochs"], training["threads"]) == (1, 2)
    again, log = run("rivals.py", *given)
    assert again == figures
    assert "made in a process" not in log
