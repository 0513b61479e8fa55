"""The job that reproduces the README's results: the models it compares, and figures against their targets."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from task_data import write_contexts

from msense.errors import InputError
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.report import Evaluation, TaskReport
from msense.evaluation.result import Result

sys.path.append(str(Path(__file__).parents[2] / "jobs"))

import reproduce
from benchmarks import sets
from benchmarks.artifacts import ArtifactCache

SCORES = {"teacher": 0.9, "replaced": 0.895, "replaced K 50": 0.88, "layers2": 0.86, "static": 0.89}
Run = Callable[..., tuple[dict[str, float], str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the job with known scores in place of builds and evaluations; return its figures and its output."""

    def evaluate(config: EvaluateConfig) -> Evaluation:
        specs = config.specs("t")
        tables = []
        for task in config.tasks():
            shots = ", 8 shots" if task.kind in ("classification", "mteb") else ""
            more = {"gold centroids": 0.85, "one embedding": 0.9}
            rows = {s.name: Result("accuracy", "words", [SCORES.get(s.name, 0.5)] * 3, more=more) for s in specs}
            tables.append(TaskReport(task.title + shots, task.kind, "x", dict(rows)))
        return Evaluation([spec.name for spec in specs], tables)

    monkeypatch.setattr(sets, "evaluate", evaluate)
    monkeypatch.setattr(reproduce, "finetune", lambda config: {"teacher": "/t", "corpus": "/c"})
    monkeypatch.setattr(ArtifactCache, "dictionary", lambda self, senses: self.folder / f"dictionary-{senses}")
    monkeypatch.setattr(ArtifactCache, "student", lambda self, d, name, **s: self.folder / name)
    for name in ("banking77", "tweet_emotion", "sst2", "wordsim", "wikitext2"):
        (tmp_path / name).mkdir()
    write_contexts(tmp_path / "coarsewsd", "bank", [("bank", "a")], [("bank", "a")])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str, data: Path = tmp_path) -> tuple[dict[str, float], str]:
        given = ["reproduce.py", *words, "--data", str(data), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", given)
        reproduce.main()
        printed = capsys.readouterr().out
        return json.loads(printed.strip().splitlines()[-1]), " ".join(printed.split())

    return call


def test_all_results_end_in_one_json_object(run: Run, tmp_path: Path) -> None:
    figures, table = run()
    assert figures["CoarseWSD, layers2 below the teacher, points"] == pytest.approx(4.0)
    assert figures["CoarseWSD, teacher's senses over a centroid per gold sense, points"] == pytest.approx(5.0)
    assert figures["sst2 (classifier): replaced below the teacher, points [0.5, 0.5]"] == pytest.approx(0.5)
    assert "CoarseWSD, layers2 below the teacher, points 4 at most 3 missed" in table
    assert "emotion, 8 shots: layers2 below the teacher, points [4.0, 4.0] 4 at most 3 missed" in table
    assert "emotion, 8 shots: static below the teacher, points [1.0, 1.0] 1 at most 3 met" in table
    assert "best pair over one embedding per word -0.005 above 0 missed" in table
    assert (tmp_path / "out" / "coarsewsd.txt").read_text() == "the bank is\n"


def test_only_requested_results_are_reproduced(run: Run) -> None:
    figures, _ = run("banking77")
    assert [name.split(":")[0] for name in figures] == ["banking77, 8 shots"] * 3


def test_unknown_names_and_missing_data_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown result 'nothing'"):
        run("nothing")
    with pytest.raises(InputError, match="sst2/ does not exist"):
        run("sst2", data=tmp_path / "none")
