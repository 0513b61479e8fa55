"""The evaluation job from the command line to its files, with small models on small data."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from students import dictionary_of, shipped
from task_data import write_contexts, write_task

from msense.config.base import validate_config
from msense.dictionary.format import write_tokenizer
from msense.errors import InputError, MsenseError
from msense.evaluation import cost, dispatch, run
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.report import to_json, write_report
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec
from msense.runtime.resources import Resources
from msense.teacher.spec import TeacherOptions, load_teacher_info


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a static student with its dictionary."""
    folder = tmp_path_factory.mktemp("own") / "student"
    shipped(teacher, folder, "static")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two similar classes, contexts of a word, and word pairs."""
    texts = [f"the {'river' if i % 2 else 'money'} bank is {'deep' if i % 3 else 'near'}" for i in range(24)]
    rows = [(text, f"c{i % 2}") for i, text in enumerate(texts)]
    write_task(tmp_path / "data" / "task", {"train": rows, "test": rows[:12]})
    contexts = [("bank", "a" if i % 2 else "b") for i in range(8)]
    write_contexts(tmp_path / "data" / "coarse", "bank", contexts, contexts[:4])
    (tmp_path / "data" / "sim").mkdir()
    (tmp_path / "data" / "sim" / "set.txt").write_text("bank river 3\nbank money 2\ncat dog 9\nmat sat 1\n")
    return tmp_path / "data"


@pytest.fixture
def evaluate(teacher: Path, student: Path, tmp_path: Path) -> Callable[..., dict]:
    """Evaluate teacher and student in this process; return the content of the JSON file."""

    def call(*tasks: str, **more: object) -> dict:
        config = {"model": ("teacher", f"s=student:{student}"), "task": tasks, "teacher": str(teacher), "cost": False}
        config |= {"dtype": "float32", "shots": ["2"], "draws": 3, "local": True}
        config |= {"output": str(tmp_path / "out" / "e.json"), **more}
        run.evaluate(validate_config(EvaluateConfig, config))
        return json.loads(Path(str(config["output"])).read_text())

    return call


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The results that are computed rather than reused; they have known scores."""
    keys: list[str] = []

    def fake(number: int, jobs: list[dispatch.EvaluationJob]) -> dict:
        keys.append(jobs[number].keys[0])
        result = Result("accuracy", "draws", [0.5, 0.6])
        return {"title": jobs[number].title, "rows": dict.fromkeys(jobs[number].rows, result.to_json())}

    monkeypatch.setattr(run, "measure", fake)
    return keys


def test_command_line_fills_a_table_of_every_model_for_every_task(
    teacher: Path, student: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, output = str(Path(__file__).parents[2] / "jobs" / "evaluate.py"), data.parent / "e.json"
    words = f"""--model teacher d=replaced:{student}/dictionary s=student:{student} truncated:1
        --task task={data}/task coarsewsd={data}/coarse wordsim={data}/sim tokens:t={data}/task/test.csv
        --teacher {teacher} --dtype float32 --shots 2 full --draws 3 --local --no-cost --output {output}"""
    monkeypatch.setattr(sys, "argv", [job, *words.split()])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(job, run_name="__main__")
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert {path.name for path in data.parent.glob("e*")} == {"e.json", "e.md"}
    assert report["models"] == ["teacher", "d", "s", "truncated:1"]
    tables = {task["name"]: task for task in report["tasks"]}
    assert list(tables) == ["task, 2 shots", "task, full", "coarsewsd", "wordsim", "t (tokens)"]
    for name, table in tables.items():
        assert name in printed
        assert set(table["rows"]) == set(report["models"])
        assert all(isinstance(row, dict) for row in table["rows"].values())
    assert len(tables["task, 2 shots"]["rows"]["s"]["values"]) == 3
    assert tables["coarsewsd"]["rows"]["d"]["metric"] == "accuracy"
    assert tables["coarsewsd"]["rows"]["teacher"]["metric"] == "gold centroids"
    assert tables["t (tokens)"]["rows"]["teacher"]["score"] == pytest.approx(1.0)
    assert tables["t (tokens)"]["rows"]["truncated:1"]["score"] < 0.999  # compared with the whole teacher
    assert tables["t (tokens)"]["rows"]["s"]["more"]["sense accuracy"] < 1.0
    assert set(tables["task, 2 shots"]["differences"]) == {"d", "s", "truncated:1"}
    assert report["made"]["settings"].items() >= {"seed": 0, "draws": 3}.items()
    assert report["made"]["versions"]["torch"]


def test_only_missing_and_changed_results_are_computed(
    evaluate: Callable[..., dict], data: Path, measured: list[str]
) -> None:
    task = f"task={data}/task"
    first = evaluate(task)
    assert measured == ["task, 2 shots | teacher", "task, 2 shots | s"]
    assert evaluate(task) == first
    assert len(measured) == 2
    evaluate(task, f"wordsim={data}/sim")
    assert measured[2:] == ["wordsim | teacher", "wordsim | s"]
    evaluate(task, shots=["3"])
    assert measured[4:] == ["task, 3 shots | teacher", "task, 3 shots | s"]
    (data / "task" / "test.csv").write_text((data / "task" / "test.csv").read_text() + "a cat,c0\n")
    evaluate(task, shots=["3"])
    assert measured[6:] == measured[4:6]
    report = evaluate(f"coarsewsd={data}/coarse", model=("teacher", "owner/model"))
    assert report["tasks"][0]["rows"]["owner/model"] == "no token embeddings"
    assert measured[8:] == ["coarsewsd | teacher"]


def test_models_are_fused_with_bm25_and_compared_with_it(
    evaluate: Callable[..., dict], student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the river bank", "a cat sat on the mat", "money money", "is near", "the dog"]
    rows = [{"_id": number, "text": text} for number, text in enumerate(texts)]
    folder = data / "search"
    folder.mkdir()
    for name in ("corpus", "queries"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{n}\t{n}\t1\n" for n in range(5)))
    monkeypatch.setattr(cost, "_peak", lambda *_: 10**8)
    models, tasks = ("teacher", "bm25", f"s=student:{student}"), (f"retrieval:x={folder}", f"task={data}/task")
    report = evaluate(*tasks, model=models, cost=True)
    own, other = report["tasks"]
    assert list(own["rows"]) == ["teacher", "teacher + bm25", "bm25", "s", "s + bm25"]
    assert {row["score"] for row in own["rows"].values()} == {1.0}
    assert own["rows"]["s + bm25"]["names"] == ["0", "1", "2", "3", "4"]
    assert list(own["differences_to_bm25"]) == ["teacher", "teacher + bm25", "s", "s + bm25"]
    assert (other["rows"]["bm25"], list(other["differences"])) == ("for retrieval:NAME=DATA only", ["s"])
    assert set(report["costs"]) == {"teacher", "s"}
    assert len(list((data.parent / "out").glob("e-x*speed.png"))) == 1
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("a result is computed again"))
    assert evaluate(*tasks, model=models, cost=True) == report
    english = ("teacher", "bm25,english", f"s=student:{student}")
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        evaluate(*tasks, model=english)
    with pytest.raises(InputError, match=r"two rows have the name 'x \(retrieval\) \| teacher \+ bm25'"):
        evaluate(*tasks, model=("teacher", f"teacher + bm25=student:{student}"))
    with pytest.raises(InputError, match="bm25,klingon: no such stemmer"):
        evaluate(*tasks, model=("bm25,klingon",))


def test_an_interrupted_run_resumes_with_the_missing_results(
    evaluate: Callable[..., dict], data: Path, measured: list[str], patch: pytest.MonkeyPatch
) -> None:
    def interrupted(*report: object, **options: bool) -> None:
        write_report(*report, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    patch.setattr(run, "write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(f"task={data}/task")
    patch.undo()
    report = evaluate(f"task={data}/task")
    assert measured == ["task, 2 shots | teacher", "task, 2 shots | s"]
    assert all(isinstance(row, dict) for row in report["tasks"][0]["rows"].values())


def test_keys_follow_student_and_teacher(
    evaluate: Callable[..., dict],
    data: Path,
    student: Path,
    tmp_path: Path,
    make_teacher: Callable,
    measured: list[str],
) -> None:
    folder = tmp_path / "own" / "student"
    shutil.copytree(student, folder)
    tasks, models = (f"task={data}/task", f"tokens:t={data}/task/test.csv"), ("teacher", f"s=student:{tmp_path}/own")
    before = evaluate(*tasks, model=models)["made"]["keys"]  # the run folder names the student
    other = evaluate(*tasks, model=models, teacher=str(make_teacher("bert", pooling="cls_token")))["made"]["keys"]
    changed = {key for key in before if before[key] != other[key]}
    assert changed == {"task, 2 shots | teacher", "t (tokens) | teacher", "t (tokens) | s"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_length": 5}))
    after = evaluate(*tasks, model=models)["made"]["keys"]
    assert {key for key in before if before[key] != after[key]} == {"task, 2 shots | s", "t (tokens) | s"}


def test_tokens_are_compared_at_the_layer_of_the_dictionary(
    evaluate: Callable[..., dict], data: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "layer1"
    dictionary_of(teacher, temperature_unit=20.0, max_length=24, layer=1).save(folder)
    write_tokenizer(folder, load_teacher_info(str(teacher), TeacherOptions())[1].to_str())
    report = evaluate(f"tokens:t={data}/task/test.csv", model=("teacher", f"d=replaced:{folder},hard"))
    assert report["tasks"][0]["rows"]["d"]["more"]["sense accuracy"] == 1.0


def test_costs_are_measured_once_for_the_same_models(
    evaluate: Callable[..., dict], data: Path, student: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_peak", lambda *_: 10**8)  # a process of its own, in the next test
    task, out = f"task={data}/task", data.parent / "out"
    costs = evaluate(task, cost=True)["costs"]
    assert set(costs) == {"teacher", "s"}
    assert costs["teacher"]["speedup"] == pytest.approx(1.0)
    assert (costs["teacher"]["senses"], costs["teacher"]["peak_memory"]) == (0, 10**8)
    assert min(costs["s"]["senses"], costs["s"]["compression"]) > 0
    assert 0 < costs["s"]["parameters"] < costs["teacher"]["parameters"]
    assert {path.name for path in out.iterdir()} == {"e.json", "e.md", "e-task--2-shots-speed.png"}
    requested: list[list[str]] = []
    monkeypatch.setattr(run.cost, "measure", lambda specs, *_: requested.append([s.name for s in specs]) or {})
    assert evaluate(task, cost=True)["costs"] == costs
    assert requested == []
    assert evaluate(task, cost=False, output=str(out / "none.json"))["costs"] == {}
    shutil.copy(out / "e.json", out / "renamed.json")
    renamed = ("teacher", f"renamed=student:{student}")
    evaluate(task, cost=True, model=renamed, output=str(out / "renamed.json"))
    assert requested == [["teacher", "renamed"]]


def test_peak_memory_is_that_of_a_fresh_process(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec("s", "student", str(student))
    assert cost._peak(spec, ["a text"], "cpu", 1) > 50e6
    failed = subprocess.CompletedProcess([], 1, "", "Traceback:\nStudentError: no such folder")
    monkeypatch.setattr(cost.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MsenseError, match=r"s: the memory .* exited with code 1 \(StudentError: no such folder\)"):
        cost._peak(spec, ["a text"], "cpu", 1)


def test_invalid_settings_are_refused() -> None:
    config = {"model": ("teacher",), "task": ("x=/d",), "shots": ("0",), "output": "e.txt"}
    with pytest.raises(InputError, match=r"shots.0: .*full(.*\n)*.*output: must be a file name ending in \.json"):
        validate_config(EvaluateConfig, config)
    config = {"model": ("teacher",), "task": ("x=/d",), "pair_columns": ("a", "b")}
    with pytest.raises(InputError, match=r"pair_columns: .*three different columns"):
        validate_config(EvaluateConfig, config)


def test_missing_data_and_packages_are_reported_before_anything_is_loaded(
    evaluate: Callable[..., dict], tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="nowhere"):
        evaluate(f"task={tmp_path}/nowhere")
    for package in run.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError,
        match=r"matplotlib, sentence_transformers, mteb, bm25s, Stemmer, pytrec_eval.*msense\[evaluation\]",
    ):
        evaluate("mteb:x", "retrieval:x=/d", model=("owner/model", "bm25,english"))
    assert measured == []


def test_credentials_are_not_written() -> None:
    words = ("teacher", "s=student:s3://key:secret@bucket/s?token=x")
    config = validate_config(EvaluateConfig, {"model": words, "task": ("x=s3://key:secret@bucket/d",)})
    resources = Resources(actors=1, tasks=1, device="cpu")
    jobs = dispatch.make_jobs(config, config.specs("t"), config.tasks(), resources)
    report = json.dumps(to_json(run._empty_report(config, config.specs("t"), jobs, "cpu", {})))
    assert not re.search("secret|token", report)
    assert "student:s3://bucket/s" in report


def test_default_teacher_is_that_of_the_first_dictionary(student: Path) -> None:
    for models, teacher in ((("teacher", f"replaced:{student}/dictionary"), "t"), (("teacher",), "all-MiniLM-L6-v2")):
        assert run._teacher_of(validate_config(EvaluateConfig, {"model": models, "task": ("x=/d",)})) == teacher
