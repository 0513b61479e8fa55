"""Reports: tables on the terminal, JSON, Markdown and plots."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from msense.cli.reports import show_evaluation
from msense.errors import InputError
from msense.evaluation import cost as costs
from msense.evaluation.cost import Cost
from msense.evaluation.report import (
    Evaluation,
    TaskReport,
    difference_to_baseline,
    load_report,
    markdown,
    tables,
    to_json,
    write_report,
)
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec
from msense.io import storage


def draws(*values: float, **more: object) -> Result:
    return Result("accuracy", "draws", list(values), **more)  # type: ignore[arg-type]


def cost(speed: float = 100.0, senses: int = 0) -> Cost:
    return Cost(22_700_000, 90_000_000, senses * 768, senses, 3.5 if senses else None, speed, None, 10**9, speed / 100)


@pytest.fixture
def evaluation() -> Evaluation:
    rows: dict[str, Result | str] = {
        "teacher": draws(0.80, 0.78, more={"macro F1": 0.79}),
        "replaced:x|y": draws(0.77, 0.76, more={"macro F1": 0.75}),
        "replaced:z": draws(0.75, 0.73, more={"macro F1": 0.70}),
        "bad\x1b[31mname": "no token embeddings",
    }
    costs = {"teacher": cost(), "replaced:x|y": cost(90, 5000), "replaced:z": cost(95, 1000)}
    task = TaskReport("banking77, 8 shots", "classification", "logistic regression", rows)
    made = {"settings": {"seed": 3, "threads": 2}, "keys": {"a | b": "c"}}
    return Evaluation(list(rows), [task], costs, made)


def test_incomparable_results_have_no_difference(evaluation: Evaluation) -> None:
    single = TaskReport("t", "wordsim", "x", {"teacher": draws(0.5), "replaced:z": draws(0.6)})
    assert difference_to_baseline(evaluation, single, "replaced:z") is None
    words = (("teacher", ["a", "b"]), ("replaced:z", ["a", "c"]))
    rows: dict[str, Result | str] = {name: Result("s", "words", [0.5, 0.7], names=own) for name, own in words}
    task = TaskReport("t", "coarsewsd", "x", rows)
    assert difference_to_baseline(evaluation, task, "replaced:z") is None
    assert tables(Evaluation(list(rows), [task]))[0].head == ["model", "s"]


def test_tables_on_the_terminal(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, costs = tables(evaluation)
    assert table.head == ["model", "accuracy", "over teacher [95 %]", "macro F1"]
    assert table.rows[0] == ["teacher", "0.790 ± 0.014", "–", "0.790"]
    assert table.rows[1][1:3] == ["0.765 ± 0.007", "-0.025 [-0.030, -0.020]"]
    assert table.rows[3][1] == "no token embeddings"
    assert costs.rows[1][1:6] == ["22.7 M", "90.0 MB", "5,000", "3.8 MB", "3.5x"]
    evaluation.models.append(long := "replaced:runs/banking77/dictionary-auto,hard")
    evaluation.costs[long] = cost(29_500, 30_430)
    for width in (60, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        show_evaluation(evaluation)
        lines = capsys.readouterr().out.split("\n")
        assert max(map(len, lines)) <= width
        assert "\x1b[31m" not in "".join(lines)
    row = next(line for line in lines if line.startswith("replaced:runs") and "MB" in line)  # no number is broken
    assert " ".join(row.split()[1:]) == "22.7 M 90.0 MB 30,430 23.4 MB 3.5x 29,500 – 295.0x 1.0 GB"
    show_evaluation(Evaluation(["[en]"], [TaskReport("a[/b]", "wordsim", "[c]", {"[en]": draws(0.5)})]))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a[/b]", "[en]"))  # markup is shown literally


def test_markdown_escapes_cells(evaluation: Evaluation) -> None:
    lines = markdown(evaluation).split("\n")
    assert "### banking77, 8 shots" in lines
    row = next(line for line in lines if line.startswith("| replaced:x"))
    assert "replaced:x\\|y" in row
    assert row.replace("\\|", "").count("|") == 5
    assert "\x1b" not in "".join(lines)


def test_json_round_trip(evaluation: Evaluation, tmp_path: Path) -> None:
    output = str(tmp_path / "new" / "e.json")
    rows = {
        "teacher": Result("accuracy", "texts", gold=["a", "b"], found=["a", "a"], more={"macro F1": 1 / 3, "pairs": 3}),
        "replaced:z": Result("Pearson", "texts", gold=[1.5, 2.0], found=[1.0, 3.0]),
        "replaced:x|y": Result("s", "sets", [0.5, 1.0], [3.0, 0.0], ["a", "b"]),
    }
    evaluation.tasks.append(TaskReport("all kinds of results", "wordsim", "x", dict(rows)))
    write_report(evaluation, output, plots=False)
    assert (tmp_path / "new" / "e.md").read_text() == markdown(evaluation)
    loaded = load_report(output)
    assert loaded == evaluation
    assert repr(loaded.tasks) == repr(evaluation.tasks)  # 3 is not 3.0
    report = json.loads(Path(output).read_text())
    assert report["tasks"][0]["differences"]["replaced:z"]["gain"] == pytest.approx(-0.05)
    assert report.pop(storage.CHECKSUM) == storage.checksum(report)
    assert report == to_json(evaluation)
    assert load_report(str(tmp_path / "none.json")) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", *(f'{{"format_version": {end}' for end in ("2}", "1}", '1, "tasks": [3]}')), "[" * 9999]
)
def test_foreign_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(InputError, match=r"e\.json exists but is not a valid evaluation"):
        load_report(str(tmp_path / "e.json"))


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["tasks"][0]["rows"]["teacher"].update(values="abc"),
        lambda report: report["costs"]["teacher"].update(speedup="fast"),
        lambda report: report["made"].update(settings="none"),
    ],
)
def test_modified_json_is_refused(
    change: Callable[[dict], None], sealed: bool, evaluation: Evaluation, tmp_path: Path
) -> None:
    output = tmp_path / "e.json"
    write_report(evaluation, str(output), plots=False)
    report = json.loads(output.read_text())
    if not sealed:  # without a checksum, the content itself is checked
        del report[storage.CHECKSUM]
    change(report)
    output.write_text(json.dumps(report))
    with pytest.raises(InputError, match=r"e\.json exists but is not a valid evaluation"):
        load_report(str(output))


def test_plots_show_every_model_within_the_picture(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[list[str]] = []
    save = Figure.savefig

    def spy(figure: Figure, file: Path, **options: object) -> None:
        save(figure, file, **options)
        (plot,) = figure.axes
        labels.append(plot.get_legend_handles_labels()[1])
        title, names = (box.get_window_extent() for box in (plot._left_title, plot.get_legend()))
        assert title.y0 >= names.y1  # the legend starts below the title, and both end within the picture
        assert figure.bbox.x1 >= max(title.x1, names.x1)

    monkeypatch.setattr(Figure, "savefig", spy)
    for number in range(10):
        name = f"replaced:runs/banking77/dictionary-{number},hard"
        evaluation.models.append(name)
        evaluation.costs[name] = cost(80, 100 + number)
        evaluation.tasks[0].rows[name] = draws(0.5, 0.5)
    evaluation.tasks[0].name = "mteb:ToxicConversationsClassification, all of its training texts as they are"
    write_report(evaluation, str(tmp_path / "e.json"), plots=True)
    stem = "e-mteb-ToxicConversationsClassification--all-of-its-training-texts-as-they-are"
    pictures = sorted(tmp_path.glob("*.png"), key=lambda path: path.name, reverse=True)
    assert [path.name for path in pictures] == [f"{stem}-speed.png", f"{stem}-size.png"]
    assert labels[0][:3] == ["teacher  0.790", "replaced:x|y  0.765", "replaced:z  0.740"]
    assert len(labels[0]) == 13
    assert set(labels[1]) == set(labels[0])  # the teacher is a line


def test_speed_is_relative_to_the_first_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(parameters=lambda: 1, files=list)
    monkeypatch.setattr(costs, "_peak", lambda *_: 1)
    monkeypatch.setattr(costs, "open_model", lambda *_: nullcontext(model))
    monkeypatch.setattr(costs, "_time_interleaved", lambda *_: {"slow": np.array([4.0]), "fast": np.array([1.0])})
    own = costs.measure([Spec("slow", "teacher"), Spec("fast", "teacher")], ["a", "b"], "cpu", 1)
    assert {name: cost.speedup for name, cost in own.items()} == {"slow": 1.0, "fast": 4.0}
    assert own["fast"].texts_per_s == 2.0
