"""The benchmarks: their command line, shared scaffolding, and the other libraries' loops."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import make

from msense.errors import InputError
from msense.evaluation.models import TokenEmbeddings

JOBS = Path(__file__).parents[2] / "jobs"
sys.path.append(str(JOBS))

import benchmark  # noqa: E402
from benchmarks import artifacts, embedding, libraries, nodes, plan, senses, timing, training  # noqa: E402
from benchmarks.shared import Bench  # noqa: E402


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--help"])
    shown = capsys.readouterr().out
    for name, (module, _) in benchmark.BENCHMARKS.items():
        assert f"  {name} " in shown
        assert f"\ndef {name}(bench: Bench) -> Figures:" in (JOBS / "benchmarks" / f"{module}.py").read_text()


def test_last_line_is_one_flat_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "VOCABULARY", 500)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "plan", "--output", str(tmp_path)])
    benchmark.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"plan.read_fraction", "plan.coverage_fraction", "plan.tokens_per_s_core"}
    assert 0 < figures["plan.coverage_fraction"] < figures["plan.read_fraction"] <= 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--senses", "0", "--workers", "0"], "senses"),
        (["senses"], "give --data"),
        (["senses", "--data", "."], r"a folder that contains banking77/"),
    ],
)
def test_invalid_settings_and_missing_data_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bench(benchmark.parse(words)).data("banking77")


def test_a_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda _: None)
    with caplog.at_level("INFO", logger="msense.benchmark"):
        assert not libraries.available("faiss")
    assert "pip install msense[bench]" in caplog.text


def test_foreign_folder_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"is not a run folder, and gather would delete it: give another --output"):
        embedding.gather(Bench(benchmark.parse(["gather", "--output", str(tmp_path)])))
    assert (tmp_path / "mine").read_text() == "mine"


def test_loops_recover_planted_clusters() -> None:
    from msense.clustering.kmeans import KMeansConfig, cluster_tokens

    rng = np.random.default_rng(0)
    points = [
        (10 * rng.normal(size=(4, 16))[np.arange(60) % 4] + rng.normal(size=(60, 16))).astype("f2").astype("f4")
        for _ in range(5)
    ]
    sizes = np.array([len(p) for p in points])
    clusters = cluster_tokens(np.concatenate(points), sizes, np.arange(5), KMeansConfig(k=4))
    ours = libraries.inertias(points, np.split(clusters.assignment, np.cumsum(sizes)[:-1]))
    np.testing.assert_allclose(ours, clusters.inertia, rtol=1e-4)
    loops: list[Callable] = [libraries.sklearn_loop]
    if libraries.available("faiss"):
        here = SimpleNamespace(run=lambda work: work(points))
        settings = libraries.faiss_settings(points, 4, 1.01 * float(ours.sum()), here)
        loops.append(partial(libraries.faiss_loop, **settings))
    for loop in loops:
        np.testing.assert_allclose(libraries.inertias(points, loop(points, 4, threads=1)), ours, rtol=1e-3)
    if libraries.available("superkmeans"):  # seeded with random points: may miss a cluster
        assert [len(labels) for labels in libraries.superkmeans_loop(points, 4, 1)] == sizes.tolist()


def test_processes_keep_order_and_raise() -> None:
    with timing.Processes(2) as processes:
        processes.give([3, 1, 2])
        assert processes.run(sorted) == [2, 1, 3]  # round-robin: [3, 2] and [1]
        with pytest.raises(TypeError):
            processes.run(partial(sorted, nonsense=1))


def test_ratios_are_medians_over_turns() -> None:
    seconds = {"a": [2.0, 30.0, 9.0], "b.x": [1.0, 10.0, 1.0], "b.y": [2.0, 2.0, 0.5]}
    turns = timing.Turns({name: np.array(values) for name, values in seconds.items()}, {})
    assert turns.ratio("a", "b.x") == 3.0
    assert turns.best("b") == "b.x"
    timed = timing.in_turn({"one": lambda: 1, "two": lambda: 2}, 3, budget=0)
    assert timed.results == {"one": 1, "two": 2}
    assert all(len(own) == 1 for own in timed.seconds.values())


def test_rates_exclude_start_up_but_no_work() -> None:
    def partition(actor: str, began: float, ended: float) -> dict:
        return {"actor": actor, "began": began, "ended": ended, "tokens": 100 * (ended - began)}

    one = [partition("a", 5, 9), partition("a", 9, 25)]
    assert nodes.rate(one) == pytest.approx(100)
    both = [*one, partition("b", 15, 20), partition("b", 20, 25)]  # b loads its teacher for 10 s
    assert nodes.rate(both) == pytest.approx(200)
    assert nodes.rate([*both, partition("a", 25, 45)]) == pytest.approx(100 * (2 * 10 + 20) / 30)  # b waits for a


@pytest.mark.slow
@pytest.mark.parametrize("names", [["nodes", "--turns", "1"], ["gather", "kmeans", "replace"]], ids=" ".join)
def test_benchmarks_end_to_end(names: list[str], tmp_path: Path) -> None:
    lines = (f"the bank {'of the river ' * (n % 7)} is deep and money {n % 50} is in the bank\n" for n in range(3000))
    (tmp_path / "text.txt").write_text("".join(lines))
    command = [sys.executable, str(JOBS / "bench.py"), *names, "--senses", "2", "--workers", "2"]
    command += ["--corpus", str(tmp_path / "text.txt"), "--output", str(tmp_path / "run")]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    keys = ("nodes.of_ceiling",) if names[0] == "nodes" else ("gather.ratio", "kmeans.over_limit", "replace.ratio")
    assert all(figures[key] > 0 for key in keys)


def test_senses_are_compared_at_equal_size() -> None:
    rng = np.random.default_rng(0)
    labels = {part: np.resize(["a", "b"], 100) for part in ("train", "test")}

    def read() -> TokenEmbeddings:  # texts of 8 tokens; frequent tokens have many senses
        ids = np.minimum(rng.geometric(0.5, 800), 6)
        points = rng.normal(size=(800, 16)) * ids[:, None] ** -0.5 + np.repeat(np.arange(100) % 2, 8)[:, None]
        return TokenEmbeddings(ids, np.arange(101) * 8, np.zeros((800, 2)), points.astype("f4"), points.astype("f4"))

    measured = senses.banking({part: read() for part in labels}, labels, 10)
    figures = {key.removeprefix("senses."): value for key, value in measured.items()}
    assert figures["size_auto"] == figures["size_k20"]
    assert 0 < figures["in_sample_distortion_auto"] <= 1.05 * figures["in_sample_distortion_k20"]
    assert figures["distortion_ratio"] < 1.05
    assert figures["distortion_k20"] == pytest.approx(figures["in_sample_distortion_k20"], rel=0.1)
    assert figures["banking77_gain_low"] <= figures["banking77_gain"] <= figures["banking77_gain_high"]
    assert figures["banking77_teacher"] > 0.9


def test_the_reference_loss_is_cross_entropy_over_dot_products() -> None:
    import torch

    from msense.training.sense_losses import SenseLabels, SenseScorer, sense_losses

    dictionary = make([3, 2, 4], dim=4)
    rng = np.random.default_rng(0)
    ids = torch.tensor([0, 2, 1, 2])
    hidden, wanted = (torch.from_numpy(rng.normal(size=(4, 4))).float() for _ in range(2))
    picked = training.reference_senses(dictionary, ids, wanted)
    assert picked == dictionary.assign(ids, wanted, metric="dot").tolist()
    labels = SenseLabels(np.array(picked, np.uint16))
    loss, _ = sense_losses(hidden, ids.numpy(), labels, SenseScorer(dictionary.ragged, "dot", 1.0), replaced=False)
    own = training.reference_loss(dictionary, ids, hidden, picked)
    assert own.item() == pytest.approx(loss.total.item(), rel=1e-5)


def test_a_student_made_otherwise_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msense.config.distill import DistillConfig
    from msense.run.folder import RunFolder

    made = []

    def distill(config: DistillConfig) -> None:
        made.append(config.epochs)
        run = RunFolder(config.output)
        Path(run.student).mkdir(parents=True)
        Path(run.metrics).write_text('{"loss": 1.5}\n')

    monkeypatch.setattr(artifacts, "distill_student", distill)
    for name, seed in (("d", 0), ("e", 1)):
        make([3, 2], seed=seed).save(tmp_path / name)
    cache = artifacts.ArtifactCache(tmp_path, ["text"], 1)
    for _ in range(2):
        assert cache.student(tmp_path / "d", "static", student="static", epochs=3).metrics == {"loss": 1.5}
    assert made == [3]
    for dictionary, settings in (("d", {}), ("e", {"epochs": 3})):
        with pytest.raises(InputError, match="made from another dictionary or other settings: remove it"):
            cache.student(tmp_path / dictionary, "static", student="static", **settings)
