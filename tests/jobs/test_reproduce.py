"""The job that reproduces the README's results: the models it compares, and figures against their targets."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_evaluation import write_contexts

from msense.errors import InputError
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.report import Evaluation, TaskReport
from msense.evaluation.result import Result

JOBS = Path(__file__).parents[2] / "jobs"
SCORES = {"teacher": 0.9, "replaced": 0.895, "replaced K 50": 0.88, "layers2": 0.86, "static": 0.89}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    """The job with known scores in place of builds and evaluations."""
    monkeypatch.syspath_prepend(str(JOBS))
    import results
    from benchmarks import workshop

    def evaluate(config: EvaluateConfig) -> Evaluation:
        specs = config.specs("t")
        tables = []
        for task in config.tasks():
            shots = ", 8 shots" if task.kind in ("classification", "mteb") else ""
            more = {"gold centroids": 0.85, "one embedding": 0.9}
            rows = {s.name: Result("accuracy", "words", [SCORES.get(s.name, 0.5)] * 3, more=more) for s in specs}
            tables.append(TaskReport(task.title + shots, task.kind, "x", dict(rows)))
        return Evaluation([spec.name for spec in specs], tables)

    monkeypatch.setattr(results, "evaluate", evaluate)
    monkeypatch.setattr(results, "finetune", lambda config: {"teacher": "/t", "corpus": "/c"})
    monkeypatch.setattr(workshop.ArtifactCache, "dictionary", lambda self, senses: self.folder / f"dictionary-{senses}")
    monkeypatch.setattr(
        workshop.ArtifactCache, "student", lambda self, d, name, **s: workshop.Made(self.folder / name, {"x": 1.0})
    )
    for name in ("banking77", "tweet_emotion", "sst2", "wordsim", "wikitext2"):
        (tmp_path / name).mkdir()
    write_contexts(tmp_path / "coarsewsd", "bank", [("bank", "a")], [("bank", "a")])
    yield results
    for name in [n for n in sys.modules if n == "results" or n.partition(".")[0] == "benches"]:
        del sys.modules[name]


def run(results: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["results.py", *words])
        results.main()  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    return json.loads(printed.strip().splitlines()[-1]), printed


def test_all_results_end_in_one_json_object(
    results: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    figures, printed = run(results, ["--data", str(tmp_path), "--output", str(tmp_path / "out")], capsys)
    assert figures["CoarseWSD, layers2 below the teacher, points"] == pytest.approx(4.0)
    assert figures["CoarseWSD, teacher's senses over a centroid per gold sense, points"] == pytest.approx(5.0)
    assert figures["sst2 (classifier): replaced below the teacher, points [0.5, 0.5]"] == pytest.approx(0.5)
    table = " ".join(printed.split())
    assert "CoarseWSD, layers2 below the teacher, points 4 at most 3 missed" in table
    assert "emotion, 8 shots: layers2 below the teacher, points [4.0, 4.0] 4 at most 3 missed" in table
    assert "emotion, 8 shots: static below the teacher, points [1.0, 1.0] 1 at most 3 met" in table
    assert "best pair over one embedding per word -0.005 above 0 missed" in table
    assert (tmp_path / "out" / "coarsewsd.txt").read_text() == "the bank is\n"


def test_only_requested_results_are_reproduced(
    results: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, _ = run(results, ["banking77", "--data", str(tmp_path), "--output", str(tmp_path / "out")], capsys)
    assert [name.split(":")[0] for name in figures] == ["banking77, 8 shots"] * 3


@pytest.mark.parametrize(
    ("words", "message"), [(["nothing"], "unknown result 'nothing'"), (["sst2"], r"sst2 does not exist")]
)
def test_unknown_names_and_missing_data_are_refused(
    results: object, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message):
        run(results, [*words, "--data", str(tmp_path / "none")], capsys)
