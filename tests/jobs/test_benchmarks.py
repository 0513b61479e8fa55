"""The benchmarks: their command line, shared scaffolding, and the other libraries' loops."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import make

from msense.config.distill import DistillConfig
from msense.errors import InputError
from msense.evaluation.report import Evaluation, TaskReport
from msense.evaluation.result import Result
from msense.io import storage

JOBS = Path(__file__).parents[2] / "jobs"
sys.path.append(str(JOBS))

import benchmark  # noqa: E402
from benchmarks import artifacts, gather, kmeans, once, sets, step, tasks, timing  # noqa: E402


def test_last_line_is_one_flat_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gather, "gather", lambda bench: {"ratio": bench.senses / 3})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gather", "--senses", "2"])
    benchmark.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"ratio": 0.6667}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kmeans", "--senses", "0", "--workers", "0"], "senses"),
        (["tasks"], "give as --data the folder that contains cranfield/"),
        (["step"], "give as --data the folder that contains banking77/"),
        (["encode", "--data", "."], "give as --data the folder that contains banking77/"),
        (["gather", "--output", str(JOBS)], "is not a run folder, and gather would delete it: give another --output"),
    ],
)
def test_invalid_settings_missing_data_and_foreign_folders_are_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(InputError, match=message):
        benchmark.main()
    assert (JOBS / "benchmark.py").exists()


def test_loops_recover_planted_clusters() -> None:
    rng = np.random.default_rng(0)
    points = [
        (10 * rng.normal(size=(4, 16))[np.arange(60) % 4] + rng.normal(size=(60, 16))).astype("f2").astype("f4")
        for _ in range(5)
    ]
    clusters = kmeans.kernel(dict(enumerate(points)), 4, 1)()
    ours = kmeans.inertias(points, np.split(clusters.assignment, 5))
    np.testing.assert_allclose(ours, clusters.inertia, rtol=1e-4)
    for loop in (kmeans.sklearn_loop, kmeans.faiss_loop):
        if loop is kmeans.faiss_loop:
            pytest.importorskip("faiss")
        np.testing.assert_allclose(kmeans.inertias(points, loop(points, 4, threads=1)), ours, rtol=1e-3)


def test_processes_keep_order_and_raise() -> None:
    with timing.processes([3, 1, 2], 2) as run:
        assert run(sorted) == [2, 1, 3]  # round-robin: [3, 2] and [1]
        with pytest.raises(TypeError):
            run(partial(sorted, nonsense=1))


def test_ratios_are_medians_over_turns() -> None:
    seconds = {"a": [2.0, 30.0, 9.0], "b.x": [1.0, 10.0, 1.0], "b.y": [2.0, 2.0, 0.5]}
    turns = timing.Turns({name: np.array(values) for name, values in seconds.items()})
    assert turns.ratio("a", "b.x") == 3.0
    assert turns.best("b") == "b.x"
    order: list[str] = []
    timed = timing.in_turn({name: partial(order.append, name) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"]
    assert all(len(own) == 2 for own in timed.values())


def test_the_reference_loss_is_cross_entropy_over_dot_products() -> None:
    import torch

    from msense.training.sense_losses import SenseLabels, SenseScorer, sense_losses

    dictionary = make([3, 2, 4], dim=4)
    rng = np.random.default_rng(0)
    ids = torch.tensor([0, 2, 1, 2])
    hidden, wanted = (torch.from_numpy(rng.normal(size=(4, 4))).float() for _ in range(2))
    picked = step.reference_senses(dictionary, ids, wanted)
    assert picked == dictionary.assign(ids, wanted, metric="dot").tolist()
    labels = SenseLabels(np.array(picked, np.uint16))
    loss, _ = sense_losses(hidden, ids.numpy(), labels, SenseScorer(dictionary.ragged, "dot", 1.0), replaced=False)
    own = step.reference_loss(dictionary, ids, hidden, picked)
    assert own.item() == pytest.approx(loss.total.item(), rel=1e-5)


def test_a_folder_made_otherwise_is_not_reused(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(new: Path) -> None:
        made.append(new)
        if len(made) == 1:
            raise RuntimeError("killed")
        (new / "model").write_text("x")

    with pytest.raises(RuntimeError):
        artifacts.made_once(tmp_path / "m", {"lr": 1}, make)
    for _ in range(2):
        assert (artifacts.made_once(tmp_path / "m", {"lr": 1}, make) / "model").exists()
    assert len(made) == 2
    with pytest.raises(InputError, match="made from other inputs or with other settings: remove it"):
        artifacts.made_once(tmp_path / "m", {"lr": 2}, make)


def test_students_of_a_cache_are_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[DistillConfig] = []
    monkeypatch.setattr(artifacts, "distill_student", configs.append)
    monkeypatch.setattr(artifacts.ArtifactCache, "dictionary", lambda self, senses: tmp_path / f"dictionary-{senses}")
    cache = artifacts.ArtifactCache(tmp_path, ["text"], 1)
    runs = sets.distill_all(cache, ["table", "layers2"], epochs=None)
    assert runs == {name: tmp_path / name for name in ("table", "layers2")}
    assert [(c.student, c.output, c.dictionary) for c in configs] == [
        (kind, str(tmp_path / name), str(tmp_path / "dictionary-auto"))
        for name, kind in (("table", "table"), ("layers2", "layers:2"))
    ]
    assert [c.epochs for c in configs] == [DistillConfig.model_fields["epochs"].default] * 2


def test_reads_are_counted_in_the_runs_that_read(tmp_path: Path) -> None:
    built = {"stages": {"passages": {"tokens": 100}, "embed": {"forwarded": 90}}}
    storage.write_json(str(tmp_path / "dictionary" / "finished.json"), built)
    for end, forwarded, tokens in (("", 10, 100), ("_spans", 55, 150)):
        labels = tmp_path / "dictionary" / "labels" / f"x{end}"
        stats = {"labels": {"forwarded": forwarded, "tokens": tokens}}
        storage.write_json(str(labels / "summary.json"), {"stages": stats})
        for name in ("static", "layers2"):  # the second finds the labels of the first
            storage.write_json(str(tmp_path / f"{name}{end}" / "labels.json"), {"folder": str(labels)})
    assert once.reads(tmp_path) == {
        "once.tokens": 100,
        "once.reads": 1.0,
        "once.reads_spans": pytest.approx(145 / 150),
    }
    (tmp_path / "static" / "labels.json").unlink()
    with pytest.raises(InputError, match=r"labels\.json is missing or corrupted: remove"):
        once.reads(tmp_path)


def test_a_job_is_timed_once(tmp_path: Path) -> None:
    given: list[dict] = []
    first = once.timed(tmp_path / "static", {"epochs": 1}, given.append)
    assert once.timed(tmp_path / "static", {"epochs": 1}, given.append) == first > 0
    once.timed(tmp_path / "static", {"epochs": 2}, given.append)  # the job refuses what it cannot do
    output = str(tmp_path / "static")
    assert given == [{"epochs": 1, "output": output}, {"epochs": 2, "output": output}]


def test_figures_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"teacher": 0.8, "table": 0.6, "static": 0.72, "layers2": 0.4, "general": 0.7, "bm25": 0.5}

    def evaluate(models: list[str], words: list[str], output: Path, workers: int) -> Evaluation:
        names = [word.partition("=")[0] for word in models]
        own = {name: scores[name] / (2 if "b" in output.stem else 1) for name in names}
        own |= {f"{name} + bm25": score + 0.1 for name, score in own.items() if "bm25" in own}
        rows: dict[str, Result | str] = {name: Result("x", "queries", [score] * 2) for name, score in own.items()}
        return Evaluation(names, [TaskReport(word, "x", "x", rows) for word in words])

    for name in ("retrieval/a", "retrieval/b", "topics", "sts/pairs"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(tasks, "open_set", open_without_documents)
    monkeypatch.setattr(
        tasks, "distill_all", lambda cache, names, epochs: {name: cache.folder / name for name in names}
    )
    monkeypatch.setattr(tasks, "evaluate_models", evaluate)
    words = ["tasks", "--data", str(tmp_path), "--output", str(tmp_path / "run"), "--general", str(tmp_path)]
    bench = benchmark.parse([*words, "--sets", "a", "b", "topics", "--sts", "pairs,split=dev"])
    figures = tasks.tasks(bench)
    assert figures["retrieval.a.ndcg.bm25"] == 0.5
    assert figures["retrieval.a.static"] == figures["retrieval.static"] == pytest.approx(0.9)
    assert figures["retrieval.b.over_bm25.static"] == pytest.approx(100 * (0.36 + 0.1 - 0.25))
    assert figures["retrieval.over_bm25"] == pytest.approx((32 + 21) / 2)
    assert figures["retrieval.over_bm25.table"] == pytest.approx((20 + 15) / 2)
    assert figures["distill.topics.layers2"] == 0.4
    assert figures["distill.topics.gap.layers2"] == pytest.approx(40)
    assert figures["general.topics"] == figures["sts.pairs"] == 0.7
    assert figures["sts.pairs.gap"] == pytest.approx(10)


def open_without_documents(data: str, name: str, folder: Path) -> sets.TextSet:
    kind = "retrieval:" if Path(data, "retrieval", name).exists() else ""
    return sets.TextSet(name, "text", f"{kind}{name}=source")
