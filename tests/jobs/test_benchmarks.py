"""The benchmarks: their command line, shared scaffolding, and the other libraries' loops."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from msense.errors import InputError

JOBS = Path(__file__).parents[2] / "jobs"
pytestmark = pytest.mark.usefixtures("jobs")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the modules of `jobs/` importable, as in a job."""
    monkeypatch.syspath_prepend(str(JOBS))
    yield
    for name in [name for name in sys.modules if name == "bench" or name.partition(".")[0] == "benches"]:
        del sys.modules[name]


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    import bench

    with pytest.raises(SystemExit):
        bench.parse(["--help"])
    shown = capsys.readouterr().out
    for name, (module, _) in bench.BENCHES.items():
        assert f"  {name} " in shown
        assert f"\ndef {name}(bench: Bench) -> Figures:" in (JOBS / "benches" / f"{module}.py").read_text()


def test_last_line_is_one_flat_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench
    from benchmarks import plan

    monkeypatch.setattr(plan, "VOCABULARY", 500)
    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", "--output", str(tmp_path)])
    bench.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"plan.read_fraction", "plan.coverage_fraction", "plan.tokens_per_s_core"}
    assert 0 < figures["plan.coverage_fraction"] < figures["plan.read_fraction"] <= 0.5


def test_invalid_settings_exit_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench

    from msense.cli.console import run_job

    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", "--senses", "0", "--workers", "0"])
    assert run_job(bench.main) == 2


def test_missing_library_or_data_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import bench
    from benchmarks import peers
    from benchmarks.shared import Bench

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    with caplog.at_level("INFO", logger="msense.bench"):
        assert not peers.available("faiss")
    assert "pip install msense[bench]" in caplog.text
    with pytest.raises(InputError, match="give --data"):
        Bench(bench.parse(["senses"])).data("banking77")
    with pytest.raises(InputError, match="a folder that contains banking77/"):
        Bench(bench.parse(["senses", "--data", str(tmp_path)])).data("banking77")


def test_foreign_folder_is_not_deleted(tmp_path: Path) -> None:
    import bench
    from benchmarks.occurrences import gather
    from benchmarks.shared import Bench

    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"is not a run folder, and gather would delete it: give another --output"):
        gather(Bench(bench.parse(["gather", "--output", str(tmp_path)])))
    assert (tmp_path / "mine").read_text() == "mine"


def test_loops_recover_planted_clusters() -> None:
    from benchmarks import peers

    from msense.clustering.kmeans import KMeansConfig, cluster_tokens

    rng = np.random.default_rng(0)
    points = [
        (10 * rng.normal(size=(4, 16))[np.arange(60) % 4] + rng.normal(size=(60, 16))).astype("f2").astype("f4")
        for _ in range(5)
    ]
    sizes = np.array([len(p) for p in points])
    clusters = cluster_tokens(np.concatenate(points), sizes, np.arange(5), KMeansConfig(k=4))
    ours = peers.inertias(points, np.split(clusters.assignment, np.cumsum(sizes)[:-1]))
    np.testing.assert_allclose(ours, clusters.inertia, rtol=1e-4)
    loops: list[Callable] = [peers.sklearn_loop]
    if peers.available("faiss"):
        settings = peers.faiss_settings(points, 4, 1.01 * float(ours.sum()), None)
        loops.append(partial(peers.faiss_loop, **settings))
    for loop in loops:
        np.testing.assert_allclose(peers.inertias(points, loop(points, 4, threads=1)), ours, rtol=1e-3)
    if peers.available("superkmeans"):  # seeded with random points: may miss a cluster
        assert [len(labels) for labels in peers.superkmeans_loop(points, 4, 1)] == sizes.tolist()


def test_processes_keep_order_and_raise() -> None:
    from benchmarks.turns import Processes

    with Processes(2) as processes:
        processes.give([3, 1, 2])
        assert processes.run(sorted) == [2, 1, 3]  # round-robin: [3, 2] and [1]
        with pytest.raises(TypeError):
            processes.run(partial(sorted, nonsense=1))
        processes.give([])
        assert processes.run(sorted) == []


def test_ratios_are_medians_over_turns() -> None:
    from benchmarks.turns import Turns, in_turn

    turns = Turns(
        {"a": np.array([2.0, 30.0, 9.0]), "b.x": np.array([1.0, 10.0, 1.0]), "b.y": np.array([2.0, 2.0, 0.5])}, {}
    )
    assert turns.ratio("a", "b.x") == 3.0
    assert turns.best("b") == "b.x"
    assert turns.best("c") is None
    timed = in_turn({"one": lambda: 1, "two": lambda: 2}, 3, budget=0)
    assert timed.results == {"one": 1, "two": 2}
    assert all(len(seconds) == 1 for seconds in timed.seconds.values())


def test_rates_exclude_start_up_but_no_work() -> None:
    from benchmarks.nodes import rate

    def unit(actor: str, began: float, ended: float) -> dict:
        return {"actor": actor, "began": began, "ended": ended, "tokens": 100 * (ended - began)}

    assert rate([unit("a", 5, 9), unit("a", 9, 25)]) == pytest.approx(100)
    both = [unit("a", 5, 9), unit("a", 9, 25), unit("b", 15, 20), unit("b", 20, 25)]  # b loads its teacher for 10 s
    assert rate(both) == pytest.approx(200)
    assert rate([*both, unit("a", 25, 45)]) == pytest.approx(100 * (2 * 10 + 20) / 30)  # b waits for a


@pytest.mark.slow
def test_nodes_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the bank of the river is deep and money is in the bank\n" * 3000)
    command = [sys.executable, str(JOBS / "bench.py"), "nodes", "--turns", "1", "--senses", "2"]
    command += ["--corpus", str(tmp_path / "text.txt"), "--output", str(tmp_path / "run")]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(figures[f"nodes.{name}"] > 0 for name in ("speedup", "ceiling", "of_ceiling", "over_bare", "two_s"))


def test_senses_are_compared_at_equal_size() -> None:
    from benchmarks import senses

    rng = np.random.default_rng(0)
    labels = {part: np.resize(["a", "b"], 100) for part in ("train", "test")}

    def read() -> senses.Read:  # texts of 8 tokens; frequent tokens have many senses
        ids = np.minimum(rng.geometric(0.5, 800), 6)
        points = rng.normal(size=(800, 16)) * ids[:, None] ** -0.5 + np.repeat(np.arange(100) % 2, 8)[:, None]
        return senses.Read(ids, np.arange(101) * 8, points.astype(np.float16))

    measured = senses._banking({part: read() for part in labels}, labels, 10)
    figures = {key.removeprefix("senses."): value for key, value in measured.items()}
    assert figures["size_auto"] == figures["size_k20"]
    assert 0 < figures["in_sample_distortion_auto"] <= 1.05 * figures["in_sample_distortion_k20"]
    assert figures["distortion_ratio"] < 1.05
    assert figures["distortion_k20"] == pytest.approx(figures["in_sample_distortion_k20"], rel=0.1)
    assert figures["banking77_gain_low"] <= figures["banking77_gain"] <= figures["banking77_gain_high"]
    assert figures["banking77_teacher"] > 0.9


def test_the_reference_loop_computes_the_same_loss() -> None:
    """Both are cross-entropy over bare dot products."""
    import torch
    from benchmarks.training import _loop, _picked
    from tiny import make

    from msense.training.sense_losses import SenseLabels, SenseScorer, sense_losses

    dictionary = make([3, 2, 4], dim=4)
    rng = np.random.default_rng(0)
    ids = torch.tensor([0, 2, 1, 2])
    hidden, wanted = (torch.from_numpy(rng.normal(size=(4, 4))).float() for _ in range(2))
    trainer = SimpleNamespace(dictionary=dictionary)
    picked = _picked(trainer, ids, wanted)
    assert picked == dictionary.assign(ids, wanted, metric="dot").tolist()
    labels = SenseLabels(np.array(picked, np.uint16))
    loss, _ = sense_losses(hidden, ids.numpy(), labels, SenseScorer(dictionary.ragged, "dot", 1.0), replaced=False)
    assert _loop(trainer, ids, hidden, picked).item() == pytest.approx(loss.total.item(), rel=1e-5)


def test_a_student_made_otherwise_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import workshop

    from msense.config.distill import DistillConfig
    from msense.dictionary import SenseDictionary
    from msense.run.folder import RunFolder

    made = []

    def distill(config: DistillConfig) -> None:
        made.append(config.epochs)
        run = RunFolder(config.output)
        Path(run.student).mkdir(parents=True)
        Path(run.metrics).write_text('{"loss": 1.5}\n')

    monkeypatch.setattr(workshop, "distill_student", distill)
    monkeypatch.setattr(SenseDictionary, "load", lambda folder: SimpleNamespace(fingerprint=str(folder)))
    shop = workshop.ArtifactCache(tmp_path, ["text"], 1)
    for _ in range(2):
        assert shop.student(tmp_path / "d", "static", student="static", epochs=3).metrics == {"loss": 1.5}
    assert made == [3]
    for dictionary, settings in (("d", {}), ("e", {"epochs": 3})):
        with pytest.raises(InputError, match="made from another dictionary or other settings: remove it"):
            shop.student(tmp_path / dictionary, "static", student="static", **settings)
