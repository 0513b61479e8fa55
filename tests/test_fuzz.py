"""Damaged files of every kind, in processes of their own: nothing but documented errors and right results comes out."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from faulty import Corpus
from students import shipped
from test_dictionary_hostile import full

from msense import distill_run
from msense.classifier import Classifier, ClassifierConfig, save_classifier
from msense.distill_config import DistillConfig
from msense.distill_run import distill_student
from msense.evaluation.report import Evaluation, TaskReport, write_report
from msense.evaluation.result import Result

TESTS = Path(__file__).parent
INPUTS = 10_000
SECONDS_AN_INPUT = 2.0  # far more than one takes: a hang is ended


@pytest.fixture
def artefacts(made: Corpus, in_process: None, patch: pytest.MonkeyPatch, teacher: Path, tmp_path: Path) -> Path:
    """A folder with a whole artefact for each reader of `fuzz.py`."""
    folder = tmp_path / "fuzz"
    folder.mkdir()
    shipped(teacher, folder / "student", "layers:1")
    full(folder / "dictionary")
    made.build("status", senses=3, max_occurrences=40)
    patch.setattr(distill_run, "train", lambda *_: {})
    given = {"dictionary": str(made.folder / "status"), "teacher": str(made.teacher), "soft_targets": 2}
    distill_student(DistillConfig(**given, dtype="float32", train_tokens=400, output=str(made.folder / "labels")))
    shutil.copytree(made.folder / "labels" / "labels", folder / "labels" / "labels")
    shutil.copytree(made.folder / "status", folder / "status", ignore=shutil.ignore_patterns("passages"))
    shutil.copytree(made.teacher, folder / "teacher")
    sizes = ClassifierConfig(task="sst2", dim=16, labels=("0", "1"), pooling="mean")
    save_classifier(folder / "classifier", Classifier(sizes))
    _corpora(folder / "corpus")
    (folder / "config").mkdir()
    text = "corpus: [a.txt, b.txt]\nteacher: x\nsenses: 5\nmcl: {}\ndedup: true\nseed: 3\ncoverage: 0.5\n"
    (folder / "config" / "run.yaml").write_text(text)
    _evaluation(folder)
    return folder


def _corpora(folder: Path) -> None:
    folder.mkdir()
    lines = [f"the bank of the river {number} is deep" for number in range(30)]
    records = "".join(json.dumps({"text": line, "id": f"r{n}"}) + "\n" for n, line in enumerate(lines))
    (folder / "a.txt").write_text("\n".join(lines))
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "c.jsonl").write_text(records)
    import pyarrow as pa

    with pa.output_stream(str(folder / "d.jsonl.zst"), compression="zstd") as out:
        out.write(records.replace('"r', '"z').encode())
    table = pd.DataFrame({"text": lines, "id": [f"p{n}" for n in range(30)]})
    table.to_parquet(folder / "e.parquet", row_group_size=10)
    table.assign(id=[f"c{n}" for n in range(30)]).to_csv(folder / "f.csv", index=False)


def _evaluation(folder: Path) -> None:
    (folder / "labelled").mkdir()
    rows = pd.DataFrame({"text": ["a b", "c d", "e f"], "label": [0, 1, 0]})
    for part in ("train", "test"):
        rows.to_csv(folder / "labelled" / f"{part}.csv", index=False)
    (folder / "wordsim").mkdir()
    (folder / "wordsim" / "a.txt").write_text("cat dog 7.5\nbank river 3\n")
    word = folder / "coarsewsd" / "bank"
    word.mkdir(parents=True)
    for part in ("train", "test"):
        (word / f"{part}.data.txt").write_text("3\tmoney in the bank\n0\tbank of a river\n")
        (word / f"{part}.gold.txt").write_text("0\n1\n")
    (folder / "report").mkdir()
    task = TaskReport("t", "classify", "what", {"m": Result("accuracy", "draws", [0.5, 0.6], [1.0, 1.0], ["0", "1"])})
    write_report(Evaluation(["m"], [task], {}, {"seed": 0}), str(folder / "report" / "report.json"), plots=False)


def fuzz(folder: Path, examples: int, *readers: str) -> dict[str, dict[str, int]]:
    """Run `fuzz.py`; a crash, a hang and an error nobody documented fail with the input that brought them about."""
    command = [sys.executable, "fuzz.py", str(folder), str(examples), *readers]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    limit = 120 + SECONDS_AN_INPUT * examples * len(readers)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=TESTS, env=environment, timeout=limit
    )
    last = (folder / "last.txt").read_text() if (folder / "last.txt").exists() else "nothing read"
    assert done.returncode == 0, f"{last}\n{done.stderr[-3000:]}"
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def names() -> list[str]:
    from fuzz import READERS

    return list(READERS)


def test_damaged_files_are_refused_or_read_right(artefacts: Path) -> None:
    found = fuzz(artefacts, 25, *names())
    assert sorted(found) == sorted(names())
    assert all(sum(counts.values()) >= 20 and counts.get("refused") for counts in found.values()), found


@pytest.mark.slow
def test_ten_thousand_damaged_files(artefacts: Path, tell: Callable[[str], None]) -> None:
    total = {"refused": 0, "read": 0}
    for name in names():
        counts = fuzz(artefacts, INPUTS // len(names()) + 1, name)[name]
        tell(f"{name}: {counts}")
        for outcome, count in counts.items():
            total[outcome] += count
    assert sum(total.values()) >= INPUTS
    tell(f"{sum(total.values()):,} damaged files: {total['refused']:,} refused, {total['read']:,} read right")
