"""The benchmarks: what the command line tells, one from end to end, and their loops of other libraries."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faulty import Corpus

from msense.errors import BadInput

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the jobs as Python has it when one of them is started."""
    monkeypatch.syspath_prepend(str(JOBS))
    yield
    for name in [name for name in sys.modules if name == "bench" or name.partition(".")[0] == "benches"]:
        del sys.modules[name]


@pytest.fixture
def peers(jobs: None) -> ModuleType:
    from benches import peers

    return peers


def planted(tokens: int, n: int = 60, k: int = 4, dim: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        (10 * rng.normal(size=(k, dim))[np.arange(n) % k] + rng.normal(size=(n, dim))).astype(np.float16).astype("f4")
        for _ in range(tokens)
    ]


def test_help_names_every_benchmark(jobs: None, capsys: pytest.CaptureFixture[str]) -> None:
    import bench

    with pytest.raises(SystemExit) as ended:
        bench.parse(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--data" in told
    for name, subject in bench.BENCHES.items():
        assert f"  {name} " in told
        assert (JOBS / "benches" / f"{subject.module}.py").exists()


def test_last_line_is_one_flat_json_object(
    jobs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench
    from benches import plan

    monkeypatch.setattr(plan, "VOCABULARY", 500)
    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", "--output", str(tmp_path)])
    bench.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"plan.read_fraction", "plan.coverage_fraction", "plan.tokens_per_s_core"}
    assert all(value > 0 for value in figures.values())


def test_missing_library_is_named_once_and_left_out(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from benches import markov

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    with caplog.at_level("INFO", logger="msense.bench"):
        assert markov.mcl(None) == {}
    (line,) = caplog.messages
    assert "pip install msense[bench]" in line


def test_loops_find_what_was_planted(peers: ModuleType) -> None:
    from msense.kmeans import KMeansConfig, cluster_tokens

    points = planted(5)
    sizes = np.array([len(p) for p in points])
    clusters = cluster_tokens(np.concatenate(points), sizes, np.arange(5), KMeansConfig(k=4))
    ours = peers.inertias(points, np.split(clusters.assignment, np.cumsum(sizes)[:-1]))
    np.testing.assert_allclose(ours, clusters.inertia, rtol=1e-4)
    loops = [peers.sklearn_loop]
    if peers.available("faiss"):
        settings = peers.faiss_settings(points, 4, 1.01 * float(ours.sum()), None)
        loops.append(partial(peers.faiss_loop, **settings))
    for loop in loops:
        np.testing.assert_allclose(peers.inertias(points, loop(points, 4, threads=1)), ours, rtol=1e-3)
    if peers.available("superkmeans"):  # from random points: it may miss some
        assert [len(found) for found in peers.superkmeans_loop(points, 4, 1)] == sizes.tolist()


def test_processes_keep_order_and_raise(jobs: None) -> None:
    from benches.turns import Processes

    with Processes(2) as processes:
        processes.give([3, 1, 2])
        assert processes.run(sorted) == [2, 1, 3]  # dealt out: 3 and 2, 1
        with pytest.raises(TypeError):
            processes.run(partial(sorted, nonsense=1))
        processes.give([])
        assert processes.run(sorted) == []


def test_ratios_are_medians_over_turns(jobs: None) -> None:
    from benches.turns import Turns, in_turn

    turns = Turns(
        {"a": np.array([2.0, 30.0, 9.0]), "b.x": np.array([1.0, 10.0, 1.0]), "b.y": np.array([2.0, 2.0, 0.5])}, {}
    )
    assert turns.ratio("a", "b.x") == 3.0
    assert turns.best("b") == "b.x"
    assert turns.best("c") is None
    found = in_turn({"one": lambda: 1, "two": lambda: 2}, 3, budget=0)
    assert found.results == {"one": 1, "two": 2}
    assert all(len(seconds) == 1 for seconds in found.seconds.values())


def test_rates_leave_start_up_out_but_no_work(jobs: None) -> None:
    from benches.nodes import rate

    def unit(actor: str, began: float, ended: float) -> dict[str, Any]:
        return {"actor": actor, "began": began, "ended": ended, "tokens": 100 * (ended - began)}

    assert rate([unit("a", 5, 9), unit("a", 9, 25)]) == pytest.approx(100)
    both = [unit("a", 5, 9), unit("a", 9, 25), unit("b", 15, 20), unit("b", 20, 25)]  # b loads its teacher for 10 s
    assert rate(both) == pytest.approx(200)
    assert rate([*both, unit("a", 25, 45)]) == pytest.approx(100 * (2 * 10 + 20) / 30)  # b waits for a


def test_constants_of_the_cost_model_are_found_also_where_a_term_is_always_0(jobs: None) -> None:
    from benches.parts import _least_squares

    terms = np.array([[1e9, 2e6, 0, 1], [4e9, 3e6, 0, 1], [5e9, 9e6, 0, 1], [2e9, 9e6, 0, 1]])
    constants = np.array([4e-11, 1e-9, 0, 6e-3])
    np.testing.assert_allclose(_least_squares(terms / (terms @ constants)[:, None]), constants, rtol=1e-6)


def test_gather_deletes_no_folder_of_somebody_else(jobs: None, tmp_path: Path) -> None:
    import bench
    from benches.occurrences import gather
    from benches.shared import Bench

    from msense.errors import BadInput

    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BadInput, match=r"is no run folder, and gather would delete all in it: give another --output"):
        gather(Bench(bench.parse(["gather", "--output", str(tmp_path)])))
    assert (tmp_path / "mine").read_text() == "mine"


def test_stages_without_ray_give_the_same_dictionary(jobs: None, made: Corpus, in_process: None) -> None:
    """And nothing of them stays replaced."""
    from benches.nodes import without_ray

    from msense import build, runtime

    made.build("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "map_actors", "run_task"):
            patch.setattr(build, name, getattr(runtime, name))
        with without_ray():
            assert build.map_actors is not runtime.map_actors
            made.build("bare")
        assert build.map_actors is runtime.map_actors
    assert made.files("bare") == made.files("whole") != {}


@pytest.mark.slow
def test_nodes_and_overhead_from_end_to_end(tmp_path: Path) -> None:
    """A quick turn of each, whose figures say nothing, in the form in which they are asked for."""
    (tmp_path / "text.txt").write_text("the bank of the river is deep and money is in the bank\n" * 3000)
    command = [sys.executable, str(JOBS / "bench.py"), "nodes", "overhead", "--turns", "1", "--senses", "2"]
    command += ["--corpus", str(tmp_path / "text.txt"), "--output", str(tmp_path / "run")]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"nodes.speedup", "nodes.ceiling", "nodes.of_ceiling", "overhead.ratio", "overhead.bare_s"} <= set(figures)
    assert all(figures[name] > 0 for name in ("nodes.of_ceiling", "nodes.two_s", "overhead.ratio"))


def test_wrong_settings_are_told_and_not_raised(jobs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench

    from msense.cli import run_job

    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", "--senses", "0", "--workers", "0"])
    assert run_job(bench.main) == 2


def test_labelled_data_must_be_named(jobs: None, tmp_path: Path) -> None:
    import bench
    from benches.shared import Bench

    from msense.errors import BadInput

    with pytest.raises(BadInput, match="say with --data"):
        Bench(bench.parse(["senses"])).data("banking77")
    with pytest.raises(BadInput, match="must name a folder that holds banking77/"):
        Bench(bench.parse(["senses", "--data", str(tmp_path)])).data("banking77")


def test_senses_are_compared_at_equal_size(jobs: None, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from benches import senses

    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        rows = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(100))
        (tmp_path / f"{part}.csv").write_text("text,label\n" + rows)

    def read(encodings: list[str]) -> object:  # passages of 8 tokens, of which some are frequent and of many senses
        ids = np.minimum(rng.geometric(0.5, 8 * len(encodings)), 6)
        label = np.repeat(np.arange(len(encodings)) % 2, 8)
        points = rng.normal(size=(len(ids), 16)) * ids[:, None] ** -0.5 + label[:, None]
        return senses.Read(ids, np.arange(len(encodings) + 1) * 8, points.astype(np.float16))

    tokenizer = SimpleNamespace(encode_batch=lambda texts: texts)
    figures = senses._banking(SimpleNamespace(tokenizer=tokenizer, read=read, vocab_size=10), tmp_path)
    assert figures["senses.size_auto"] == figures["senses.size_k20"]
    assert 0 < figures["senses.in_sample_distortion_auto"] <= 1.05 * figures["senses.in_sample_distortion_k20"]
    assert figures["senses.distortion_ratio"] < 1.05
    assert figures["senses.distortion_k20"] == pytest.approx(figures["senses.in_sample_distortion_k20"], rel=0.1)
    assert (
        figures["senses.banking77_gain_low"]
        <= figures["senses.banking77_gain"]
        <= figures["senses.banking77_gain_high"]
    )
    assert figures["senses.banking77_teacher"] > 0.9


def test_encoding_compares_what_is_timed(jobs: None, tmp_path: Path) -> None:
    import bench
    from benches import encoding
    from benches.shared import Bench
    from benches.turns import Turns

    names = {name for pair in encoding.RATIOS.values() for name in pair}
    figures = encoding._figures(Turns({name: np.array([2.0, 4.0, 1.0]) for name in sorted(names)}, {}), 10)
    assert {figures[f"encode.{key}"] for key in encoding.RATIOS} == {1.0}
    assert {figures[f"encode.texts_per_s_{name}"] for name in names} == {5.0}
    asked = Bench(bench.parse(["encode", "--output", str(tmp_path)]))
    assert encoding._against_model2vec(asked, lambda: None, ["a text"]) == {}


def test_few_shot_accuracy_by_draw(jobs: None) -> None:
    from benches.few_shot import few_shot

    rng = np.random.default_rng(0)
    labels = {part: np.repeat(["a", "b", "c"], count) for part, count in (("train", 20), ("test", 30))}
    known = {part: np.repeat(np.eye(3), len(of) // 3, axis=0) for part, of in labels.items()}
    noise = {part: rng.normal(size=(len(of), 3)) for part, of in labels.items()}
    good, chance = few_shot(known, labels), few_shot(noise, labels)
    assert good.values == [1.0] * 10
    assert 0.2 < chance.score < 0.5


def test_the_reference_loop_is_our_loss(jobs: None) -> None:
    """What a step is timed against computes what it should: cross-entropy over bare dot products."""
    from types import SimpleNamespace

    import torch
    from benches.training import _loop, _picked
    from tiny import make

    from msense.sense_losses import SenseLabels, SenseSpace, sense_losses

    dictionary = make([3, 2, 4], dim=4)
    rng = np.random.default_rng(0)
    ids = torch.tensor([0, 2, 1, 2])
    found, wanted = (torch.from_numpy(rng.normal(size=(4, 4))).float() for _ in range(2))
    trainer = SimpleNamespace(dictionary=dictionary)
    picked = _picked(trainer, ids, wanted)
    assert picked == dictionary.assign(ids, wanted, metric="dot").tolist()
    labels = SenseLabels(np.array(picked, np.uint16))
    loss, _ = sense_losses(found, ids.numpy(), labels, SenseSpace(dictionary.ragged, "dot", 1.0), replaced=False)
    assert _loop(trainer, ids, found, picked).item() == pytest.approx(loss.total.item(), rel=1e-5)


def test_a_student_that_was_made_otherwise_is_not_reused(
    jobs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benches import workshop

    from msense.distill_config import DistillConfig
    from msense.run_folder import RunFolder

    made = []

    def distill(config: DistillConfig) -> None:
        made.append(config.epochs)
        run = RunFolder(config.output)
        Path(run.student).mkdir(parents=True)
        Path(run.metrics).write_text('{"loss": 1.5}\n')

    monkeypatch.setattr(workshop, "distill_student", distill)
    monkeypatch.setattr(workshop.SenseDictionary, "load", lambda folder: SimpleNamespace(fingerprint=str(folder)))
    shop = workshop.Workshop(tmp_path, ["text"], 1)
    for _ in range(2):
        assert shop.student(tmp_path / "d", "static", student="static", epochs=3).metrics == {"loss": 1.5}
    assert made == [3]
    with pytest.raises(BadInput, match="with other settings: remove it"):
        shop.student(tmp_path / "d", "static", student="static")  # that is, with the default number of epochs
    with pytest.raises(BadInput, match="another dictionary"):
        shop.student(tmp_path / "e", "static", student="static", epochs=3)
