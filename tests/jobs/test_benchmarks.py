"""The benchmarks: their command line, shared scaffolding, and the other libraries' loops."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from task_data import write_task
from tiny import make

from msense.errors import InputError

JOBS = Path(__file__).parents[2] / "jobs"
sys.path.append(str(JOBS))

import benchmark  # noqa: E402
from benchmarks import artifacts, gather, kmeans, step, timing  # noqa: E402


def test_last_line_is_one_flat_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gather, "gather", lambda bench: {"ratio": bench.senses / 3})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gather", "--senses", "2"])
    benchmark.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"ratio": 0.6667}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kmeans", "--senses", "0", "--workers", "0"], "senses"),
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


@pytest.mark.slow
def test_benchmarks_end_to_end(tmp_path: Path) -> None:
    lines = [f"the bank {'of the river ' * (n % 7)} is deep and money {n % 50} is in the bank" for n in range(3000)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    texts = [(line, f"label {n % 2}") for n, line in enumerate(lines[:300])]
    write_task(tmp_path / "banking77", {"train": texts, "test": texts[:50]})
    command = [sys.executable, str(JOBS / "bench.py"), *benchmark.BENCHMARKS, "--senses", "2", "--workers", "2"]
    command += ["--corpus", str(tmp_path / "text.txt"), "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    keys = ("gather.ratio", "kmeans.over_limit", "distill.step_ratio", "encode.speedup_static")
    assert all(figures[key] > 0 for key in keys)


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


def test_a_student_made_otherwise_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msense.config.distill import DistillConfig
    from msense.run.folder import RunFolder

    made = []

    def distill(config: DistillConfig) -> None:
        made.append(config.epochs)
        run = RunFolder(config.output)
        Path(run.student).mkdir(parents=True)
        Path(run.metrics).write_text("{}\n")

    monkeypatch.setattr(artifacts, "distill_student", distill)
    for name, seed in (("d", 0), ("e", 1)):
        make([3, 2], seed=seed).save(tmp_path / name)
    cache = artifacts.ArtifactCache(tmp_path, ["text"], 1)
    for _ in range(2):
        assert (cache.student(tmp_path / "d", "static", student="static", epochs=3) / "metrics.jsonl").exists()
    assert made == [3]
    for dictionary, settings in (("d", {}), ("e", {"epochs": 3})):
        with pytest.raises(InputError, match="made from another dictionary or other settings: remove it"):
            cache.student(tmp_path / dictionary, "static", student="static", **settings)
