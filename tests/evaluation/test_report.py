"""Reports: tables on the terminal, JSON, Markdown and plots."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from msense.cli.reports import show
from msense.errors import InputError
from msense.evaluation import plots
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
from msense.io import storage


def draws(*values: float, **more: object) -> Result:
    return Result("accuracy", "draws", list(values), **more)  # type: ignore[arg-type]


def cost(speed: float = 100.0, senses: int = 0) -> Cost:
    return Cost(22_700_000, 90_000_000, senses * 768, senses, 3.5 if senses else None, speed, None, 10**9, speed / 100)


@pytest.fixture
def found() -> Evaluation:
    rows: dict[str, Result | str] = {
        "teacher": draws(0.80, 0.78, more={"macro F1": 0.79}),
        "replaced:x|y": draws(0.77, 0.76, more={"macro F1": 0.75}),
        "replaced:z": draws(0.75, 0.73, more={"macro F1": 0.70}),
        "bad\x1b[31mname": "no token embeddings",
    }
    costs = {"teacher": cost(), "replaced:x|y": cost(90, 5000), "replaced:z": cost(95, 1000)}
    task = TaskReport("banking77, 8 shots", "classification", "logistic regression", rows)
    made = {"settings": {"seed": 3, "threads": 2}, "sizes": ["replaced:x|y", "replaced:z"], "keys": {"a | b": "c"}}
    return Evaluation(list(rows), [task], costs, made)


def test_incomparable_results_have_no_difference(found: Evaluation) -> None:
    single = TaskReport("t", "wordsim", "x", {"teacher": draws(0.5), "replaced:z": draws(0.6)})
    assert difference_to_baseline(found, single, "replaced:z") is None
    words = (("teacher", ["a", "b"]), ("replaced:z", ["a", "c"]))
    rows: dict[str, Result | str] = {name: Result("s", "words", [0.5, 0.7], names=own) for name, own in words}
    task = TaskReport("t", "coarsewsd", "x", rows)
    assert difference_to_baseline(found, task, "replaced:z") is None
    assert tables(Evaluation(list(rows), [task]))[0].head == ["model", "s"]


def test_tables_on_the_terminal(found: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    table, costs = tables(found)
    assert table.head == ["model", "accuracy", "over teacher [95 %]", "macro F1"]
    assert table.rows[0] == ["teacher", "0.790 ± 0.014", "–", "0.790"]
    assert table.rows[1][1:3] == ["0.765 ± 0.007", "-0.025 [-0.030, -0.020]"]
    assert table.rows[3][1] == "no token embeddings"
    assert costs.rows[1][1:6] == ["22.7 M", "90.0 MB", "5,000", "3.8 MB", "3.5x"]
    show(found)
    show(Evaluation(["[en]"], [TaskReport("a[/b]", "wordsim", "[c]", {"[en]": draws(0.5)})]))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("0.765 ± 0.007", "a[/b]", "[en]"))  # markup is shown literally
    assert "\x1b[31m" not in printed


def test_table_width_follows_the_terminal(
    found: Evaluation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show(found)
    words = ("dictionary", "compression", "speed-up", "memory")
    assert any(all(word in line for word in words) for line in capsys.readouterr().out.splitlines())
    monkeypatch.setenv("COLUMNS", "60")
    show(found)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60
    monkeypatch.setenv("COLUMNS", "100")  # enough for every number in one piece
    long = "replaced:runs/banking77/dictionary-auto,hard"
    found.models.append(long)
    found.costs[long] = cost(29_500, 30_430)
    show(found)
    lines = capsys.readouterr().out.split("\n")
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if "compression" in line)
    assert head.split()[-4:] == ["texts/s", "tokens/s", "speed-up", "memory"]
    row = next(line for line in lines if line.startswith("replaced:runs") and "MB" in line)
    assert row.rstrip().endswith("22.7 M 90.0 MB 30,430    23.4 MB        3.5x  29,500        –   295.0x 1.0 GB")


def test_markdown_escapes_cells(found: Evaluation) -> None:
    lines = markdown(found).split("\n")
    assert "### banking77, 8 shots" in lines
    row = next(line for line in lines if line.startswith("| replaced:x"))
    assert "replaced:x\\|y" in row
    assert row.replace("\\|", "").count("|") == 5
    assert "\x1b" not in "".join(lines)


def test_json_round_trip(found: Evaluation, tmp_path: Path) -> None:
    output = str(tmp_path / "new" / "e.json")
    assert write_report(found, output, plots=False) == [output, str(tmp_path / "new" / "e.md")]
    assert load_report(output) == found
    report = json.loads(Path(output).read_text())
    assert report["tasks"][0]["differences"]["replaced:z"]["gain"] == pytest.approx(-0.05)
    assert report.pop(storage.CHECKSUM) == storage.checksum(report)
    assert report == to_json(found)
    assert load_report(str(tmp_path / "none.json")) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format_version": 2}',
        '{"format_version": 1}',
        '{"format_version": 1, "tasks": [3]}',
        "[" * 9999,
    ],
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
        lambda report: report["tasks"][0].update(name=3),
        lambda report: report.update(models=[1]),
        lambda report: report["costs"]["teacher"].update(speedup="fast"),
        lambda report: report["made"].update(settings="none"),
    ],
)
def test_modified_json_is_refused(
    change: Callable[[dict], None], sealed: bool, found: Evaluation, tmp_path: Path
) -> None:
    output = tmp_path / "e.json"
    write_report(found, str(output), plots=False)
    report = json.loads(output.read_text())
    if not sealed:  # without a checksum, the content itself is checked
        del report[storage.CHECKSUM]
    change(report)
    output.write_text(json.dumps(report))
    with pytest.raises(InputError, match=r"e\.json exists but is not a valid evaluation"):
        load_report(str(output))


def test_plots_show_every_model_within_the_picture(
    found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[str]]] = []
    boxes: list[tuple[float, float, float]] = []
    finish = plots._finish

    def spy(figure: object, plot: object, file: Path, *, rms_distance: bool) -> None:
        finish(figure, plot, file, rms_distance=rms_distance)
        seen.append((file.name, plot.get_legend_handles_labels()[1]))  # type: ignore[attr-defined]
        title = plot._left_title.get_window_extent()  # type: ignore[attr-defined]
        names = plot.get_legend().get_window_extent()  # type: ignore[attr-defined]
        boxes.append((title.y0 - names.y1, figure.bbox.x1 - title.x1, figure.bbox.x1 - names.x1))  # type: ignore[attr-defined]

    monkeypatch.setattr(plots, "_finish", spy)
    written = write_report(found, str(tmp_path / "e.json"), plots=True)[2:]
    names = ["e-banking77--8-shots-speed.png", "e-banking77--8-shots-size.png"]
    assert [Path(file).name for file in written] == names
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in written)
    assert seen[0][1] == ["teacher  0.790", "replaced:x|y  0.765", "replaced:z  0.740"]
    assert set(seen[1][1]) == set(seen[0][1])
    points = [plots.Point(f"replaced:runs/banking77/dictionary-{n},hard", 10.0 * n, 0.8, 0.01) for n in range(1, 11)]
    title = "mteb:ToxicConversationsClassification, all training texts: accuracy against dictionary size"
    plots.draw_lines(tmp_path / "a.png", title, ("dictionary in MB", "accuracy"), points, plots.Line("teacher", 0.81))
    assert min(boxes[-1]) >= 0  # the legend starts below the title, and both end within the picture


def test_missing_matplotlib_names_the_extra(found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install msense\[evaluation\]"):
        write_report(found, str(tmp_path / "e.json"), plots=True)
