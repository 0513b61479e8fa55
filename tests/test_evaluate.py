"""The job from the command line to its files: models of a small teacher on small data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from students import dictionary_of
from test_evaluation import write_contexts, write_task

from msense.config import BuildConfig
from msense.dictionary.format import write_tokenizer
from msense.errors import BadInput, MsenseError
from msense.evaluation import cost, measuring, run
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.report import load_report, to_json
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec
from msense.flags import parse_flags, validate
from msense.runtime import Resources
from msense.teacher import describe


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes that hardly differ, contexts of a word, and word pairs."""
    rows = [
        (f"the {'river' if i % 2 else 'money'} bank is {'deep' if i % 3 else 'near'}", f"c{i % 2}") for i in range(60)
    ]
    write_task(tmp_path / "data" / "task", {"train": rows, "test": rows[:20]})
    contexts = [("bank", "a" if i % 2 else "b") for i in range(12)]
    write_contexts(tmp_path / "data" / "coarse", "bank", contexts, contexts[:4])
    (tmp_path / "data" / "sim").mkdir()
    (tmp_path / "data" / "sim" / "set.txt").write_text("bank river 3\nbank money 2\ncat dog 9\nmat sat 1\n")
    return tmp_path / "data"


@pytest.fixture
def evaluate(
    in_process: None, teacher: Path, shipped_student: tuple, data: Path, tmp_path: Path
) -> Callable[..., dict]:
    """Evaluate teacher, dictionary and student; return what the JSON file holds."""

    def call(*tasks: str, **more: object) -> dict:
        folder = shipped_student[3]
        models = ("teacher", f"d=replaced:{folder}/dictionary", f"s=student:{folder}", "truncated:1")
        given = {
            "model": models,
            "task": tasks,
            "teacher": str(teacher),
            "cost": False,
            "dtype": "float32",
            "shots": ["2"],
        }
        output = str(tmp_path / "out" / "e.json")
        config = validate(EvaluateConfig, {**given, "draws": 3, "output": output, **more})
        run.evaluate(config)
        return json.loads(Path(config.output).read_text())

    return call


def test_every_task_has_a_table_with_every_model(evaluate: Callable[..., dict], data: Path) -> None:
    found = evaluate(
        f"task={data}/task", f"coarsewsd={data}/coarse", f"wordsim={data}/sim", f"tokens:t={data}/task/test.csv"
    )
    assert found["models"] == ["teacher", "d", "s", "truncated:1"]
    tables = {task["name"]: task for task in found["tasks"]}
    assert list(tables) == ["task, 2 shots", "coarsewsd", "wordsim", "t (tokens)"]
    for table in tables.values():
        assert set(table["rows"]) == set(found["models"])
        assert all(isinstance(row, dict) for row in table["rows"].values())
    assert len(tables["task, 2 shots"]["rows"]["s"]["values"]) == 3
    assert tables["coarsewsd"]["rows"]["d"]["metric"] == "accuracy"
    assert tables["coarsewsd"]["rows"]["teacher"]["metric"] == "gold centroids"
    assert tables["t (tokens)"]["rows"]["teacher"]["score"] == pytest.approx(1.0)
    assert tables["t (tokens)"]["rows"]["s"]["more"]["sense accuracy"] < 1.0
    assert set(tables["task, 2 shots"]["differences"]) == {"d", "s", "truncated:1"}
    assert found["made"]["settings"]["seed"] == 0
    assert found["made"]["versions"]["torch"]


def test_what_is_finished_is_kept_and_what_changed_is_measured_again(
    evaluate: Callable[..., dict],
    data: Path,
    shipped_student: tuple,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []
    usual = measuring.measure

    def spy(number: int, works: list) -> dict:
        seen.append(works[number].place)
        return usual(number, works)

    monkeypatch.setattr(run, "measure", spy)
    task = f"task={data}/task"
    first = evaluate(task)
    assert len(seen) == 4
    assert evaluate(task) == first
    assert len(seen) == 4
    evaluate(task, f"wordsim={data}/sim")
    assert [place.split(" | ")[0] for place in seen[4:]] == ["wordsim"] * 4
    evaluate(task, shots=["3"])
    assert [place.split(" | ")[0] for place in seen[8:]] == ["task, 3 shots"] * 4
    (data / "task" / "test.csv").write_text((data / "task" / "test.csv").read_text() + "a cat,c0\n")
    evaluate(task, shots=["3"])
    assert len(seen) == 16


def test_a_run_that_fails_goes_on_with_what_is_missing(
    evaluate: Callable[..., dict], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = measuring.measure, []

    def fail(number: int, works: list) -> dict:
        calls.append(works[number].place)
        if len(calls) == 3:
            raise BadInput("the power is gone")
        return usual(number, works)

    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", fail)
        with pytest.raises(BadInput, match="the power is gone"):
            evaluate(f"task={data}/task")
    kept = load_report(str(tmp_path / "out" / "e.json"))
    assert kept is not None
    rows = kept.tasks[0].rows
    assert [isinstance(row, Result) for row in rows.values()] == [True, True, False, False]
    assert rows["s"] == run.PENDING
    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", lambda n, works: calls.append(works[n].place) or usual(n, works))
        evaluate(f"task={data}/task")
    assert calls[3:] == ["task, 2 shots | s", "task, 2 shots | truncated:1"]


def test_a_student_that_changed_is_measured_again(
    evaluate: Callable[..., dict], data: Path, shipped_student: tuple, tmp_path: Path, teacher: Path
) -> None:
    folder = tmp_path / "own" / "student"
    shutil.copytree(shipped_student[3], folder)
    models = ("teacher", f"s=student:{tmp_path}/own")  # the run folder is enough
    before = evaluate(f"task={data}/task", model=models)["made"]["keys"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_length": 5}))
    after = evaluate(f"task={data}/task", model=models)["made"]["keys"]
    assert before["task, 2 shots | teacher"] == after["task, 2 shots | teacher"]
    assert before["task, 2 shots | s"] != after["task, 2 shots | s"]


def test_tokens_are_held_against_the_layer_that_the_dictionary_is_of(
    evaluate: Callable[..., dict], data: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "layer1"
    dictionary_of(teacher, temperature_unit=20.0, max_length=24, layer=1).save(folder)
    write_tokenizer(folder, describe(str(teacher), BuildConfig())[1].to_str())
    found = evaluate(f"tokens:t={data}/task/test.csv", model=("teacher", f"d=replaced:{folder},hard"))
    assert found["tasks"][0]["rows"]["d"]["more"]["sense accuracy"] == 1.0


def test_another_teacher_makes_another_result_where_it_takes_part(
    evaluate: Callable[..., dict], data: Path, make_teacher: Callable[..., Path], shipped_student: tuple
) -> None:
    tasks, models = (f"tokens:t={data}/task/test.csv", f"task={data}/task"), (f"s=student:{shipped_student[3]}",)
    first, other = (
        evaluate(*tasks, model=models, teacher=str(make_teacher("bert", pooling=pooling)))["made"]["keys"]
        for pooling in ("mean_tokens", "cls_token")
    )
    assert first["t (tokens) | s"] != other["t (tokens) | s"]
    assert first["task, 2 shots | s"] == other["task, 2 shots | s"]


def test_models_without_tokens_are_left_out_of_tasks_on_tokens(
    evaluate: Callable[..., dict], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluate(f"coarsewsd={data}/coarse", model=("teacher", "owner/model"))
    assert found["tasks"][0]["rows"]["owner/model"] == run.UNFIT


@pytest.mark.parametrize("shipped_student", ["static"], indirect=True)
def test_costs_are_measured_side_by_side_once(
    evaluate: Callable[..., dict],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    shipped_student: tuple,
    tmp_path: Path,
) -> None:
    models = ("teacher", f"s=student:{shipped_student[3]}")
    found = evaluate(f"task={data}/task", cost=True, model=models)
    costs = found["costs"]
    assert set(costs) == {"teacher", "s"}
    assert costs["teacher"]["speedup"] == pytest.approx(1.0)
    assert costs["teacher"]["senses"] == 0
    assert costs["s"]["senses"] == len(shipped_student[2])
    assert 0 < costs["s"]["parameters"] < costs["teacher"]["parameters"]
    assert costs["teacher"]["peak_memory"] > 50e6
    assert costs["s"]["compression"] > 0
    measured = []
    monkeypatch.setattr(run.cost, "measure", lambda specs, *_: measured.append([s.name for s in specs]) or {})
    renamed = ("teacher", f"renamed=student:{shipped_student[3]}")
    evaluate(f"task={data}/task", cost=True, model=renamed, output=str(tmp_path / "renamed.json"))
    shutil.copy(tmp_path / "out" / "e.json", tmp_path / "again.json")
    evaluate(f"task={data}/task", cost=True, model=renamed, output=str(tmp_path / "again.json"))
    assert measured == [["teacher", "renamed"]] * 2
    monkeypatch.setattr(run.cost, "measure", lambda *_: pytest.fail("measured again"))
    assert evaluate(f"task={data}/task", cost=True, model=models)["costs"] == costs
    assert evaluate(f"task={data}/task", cost=False, model=models)["costs"] == {}


def test_a_model_that_cannot_be_loaded_again_is_told(tmp_path: Path) -> None:
    with pytest.raises(MsenseError, match=r"s: the process .* ended with code 1 and said .*nowhere"):
        cost.measure([Spec("s", "student", str(tmp_path / "nowhere"))], ["a text"], "cpu", 1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": (), "task": ("x=/d",)}, "at least one --model"),
        ({"model": ("teacher",), "task": ()}, "at least one --task"),
        ({"model": ("teacher",), "task": ("x=/d",), "shots": ("0",)}, "'0' is no number of texts"),
        (
            {"model": ("teacher",), "task": ("x=/d",), "output": "e.txt"},
            r"must be the name of a file that ends with \.json",
        ),
        ({"model": ("teacher",), "task": ("x=/d",), "draws": 1}, "greater than or equal to 2"),
        ({"task": ("x=/d",)}, "model: must be given"),
    ],
)
def test_settings_that_do_not_work_are_refused(given: dict, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        validate(EvaluateConfig, given)


def test_data_that_are_not_there_are_told_before_anything_is_loaded(
    evaluate: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(BadInput, match="nowhere"):
        evaluate(f"task={tmp_path}/nowhere")


def test_flags_of_several_values_may_be_repeated() -> None:
    words = [
        "--model",
        "teacher",
        "--model",
        "truncated:1",
        "truncated:2",
        "--task",
        "x=/d",
        "--shots",
        "8",
        "full",
    ]
    config = parse_flags(EvaluateConfig, "x", words)
    assert config.model == ("teacher", "truncated:1", "truncated:2")
    assert config.shots == ("8", "full")
    assert parse_flags(EvaluateConfig, "x", [*words, "--shots", "16"]).shots == ("8", "full", "16")


def test_no_credentials_are_written_down(shipped_student: tuple) -> None:
    words = ("teacher", "s=student:s3://key:secret@bucket/s?token=x")
    config = validate(EvaluateConfig, {"model": words, "task": ("x=s3://key:secret@bucket/d",)})
    works = measuring.works_of(config, config.specs("t"), config.tasks(), Resources(actors=1, tasks=1, device="cpu"))
    told = json.dumps(to_json(run._empty(config, config.specs("t"), works, Resources(1, 1, "cpu"), {})))
    assert "secret" not in told
    assert "token" not in told
    assert "student:s3://bucket/s" in told


def test_the_teacher_is_that_of_the_first_dictionary(shipped_student: tuple) -> None:
    config = validate(
        EvaluateConfig, {"model": ("teacher", f"replaced:{shipped_student[3]}/dictionary"), "task": ("x=/d",)}
    )
    assert run._teacher_of(config) == "t"
    alone = validate(EvaluateConfig, {"model": ("teacher",), "task": ("x=/d",)})
    assert run._teacher_of(alone) == "all-MiniLM-L6-v2"


@pytest.mark.parametrize("shipped_student", ["static"], indirect=True)
def test_on_a_real_ray_with_nothing_but_the_command_line(
    ray: None, teacher: Path, shipped_student: tuple, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy
    import sys

    job = str(Path(__file__).parents[1] / "jobs" / "evaluate.py")
    words = [
        "--model",
        "teacher",
        f"s=student:{shipped_student[3]}",
        "--task",
        f"small={data}/task",
        "--teacher",
        str(teacher),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", [job, *words, "--shots", "2", "full", "--draws", "2", "--output", str(tmp_path / "e.json")]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(job, run_name="__main__")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "small, 2 shots" in told
    assert "small, full" in told
    assert "costs" in told
    assert {path.name for path in tmp_path.glob("e*")} == {
        "e.json",
        "e.md",
        "e-small--2-shots-speed.png",
        "e-small--full-speed.png",
    }
