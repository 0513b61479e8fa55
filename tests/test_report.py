"""Results: their mean, deviation and paired differences; and how they are told as tables, JSON, Markdown and plots."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msense import storage
from msense.errors import BadInput
from msense.evaluation import plots
from msense.evaluation.report import (
    Cost,
    Evaluation,
    TaskReport,
    gain,
    load_report,
    markdown,
    sheets,
    show,
    to_json,
    write_report,
)
from msense.evaluation.result import METRICS, Result, difference


def draws(*values: float, **told: object) -> Result:
    return Result("accuracy", "draws", list(values), **told)  # type: ignore[arg-type]


def test_a_score_is_the_mean_and_its_deviation_that_of_draws() -> None:
    found = draws(0.5, 0.7, 0.9)
    assert found.score == pytest.approx(0.7)
    assert found.deviation == pytest.approx(0.2)
    weighted = Result("Spearman", "sets", [0.2, 0.8], [3.0, 1.0])
    assert weighted.score == pytest.approx(0.35)
    assert weighted.deviation is None


@pytest.mark.parametrize(
    ("metric", "gold", "found", "wanted"),
    [
        ("accuracy", ["a", "b", "b", "a"], ["a", "b", "a", "a"], 0.75),
        ("F1", ["0", "1", "1", "0"], ["1", "1", "0", "0"], 0.5),
        ("F1", ["0", "0"], ["0", "0"], 0.0),
        ("macro F1", ["a", "a", "b", "b"], ["a", "a", "b", "a"], (0.8 + 2 / 3) / 2),
        ("Matthews", ["0", "1", "1", "0"], ["0", "1", "1", "0"], 1.0),
        ("Matthews", ["0", "1", "1", "0"], ["1", "0", "0", "1"], -1.0),
        ("Pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ("Spearman", [1.0, 2.0, 3.0], [9.0, 4.0, 1.0], -1.0),
        ("Pearson", [1.0, 2.0], [3.0, 3.0], 0.0),
    ],
)
def test_metrics_are_those_of_the_field(metric: str, gold: list, found: list, wanted: float) -> None:
    assert METRICS[metric](np.array(gold), np.array(found)) == pytest.approx(wanted)
    assert Result(metric, "texts", gold=gold, found=found).score == pytest.approx(wanted)


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 10)  # common to both: it must not widen the interval
    ours, theirs = draws(*(0.7 + noise + rng.normal(0, 0.002, 10))), draws(*(0.65 + noise))
    gain, low, high = difference(ours, theirs)
    assert gain == pytest.approx(ours.score - theirs.score)
    assert low <= gain <= high
    assert 0.045 < low < high < 0.055
    back = difference(theirs, ours)
    assert back == pytest.approx((-gain, -high, -low), abs=1e-3)


def test_an_interval_of_equals_is_nothing_and_one_of_noise_holds_nothing() -> None:
    same = draws(0.5, 0.6, 0.7)
    assert difference(same, same) == (0.0, 0.0, 0.0)
    rng = np.random.default_rng(1)
    found = [difference(draws(*rng.normal(0.5, 0.1, 30)), draws(*rng.normal(0.5, 0.1, 30)), seed) for seed in range(60)]
    assert np.mean([low <= 0 <= high for _, low, high in found]) > 0.85


def test_weights_count_in_the_bootstrap() -> None:
    ours, theirs = (Result("s", "sets", [v, 0.5], [1000.0, 1.0]) for v in (0.9, 0.1))
    gain, _, high = difference(ours, theirs)
    assert gain == pytest.approx(0.8 * 1000 / 1001)
    assert high == pytest.approx(0.8)


def test_predictions_are_resampled_in_pairs() -> None:
    gold = ["a", "b"] * 100
    right = [*gold[:180], *(["c"] * 20)]
    worse = [*gold[:160], *(["c"] * 40)]
    ours, theirs = (Result("accuracy", "texts", gold=gold, found=found) for found in (right, worse))
    gain, low, high = difference(ours, theirs)
    assert gain == pytest.approx(0.1)
    assert 0.05 < low < 0.1 < high < 0.15


@pytest.mark.parametrize(
    "other", [draws(0.5), Result("F1", "draws", [0.5, 0.5]), Result("accuracy", "words", [0.5, 0.5])]
)
def test_results_of_other_tasks_are_not_compared(other: Result) -> None:
    with pytest.raises(ValueError, match="not of the same task"):
        difference(draws(0.5, 0.6), other)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
    st.dictionaries(st.text(max_size=5), st.floats(-1e6, 1e6), max_size=3),
)
def test_a_result_travels_as_json(values: list[float], more: dict[str, float]) -> None:
    found = draws(*values, more=more)
    assert Result.from_json(json.loads(json.dumps(found.to_json()))) == found


def cost(speed: float = 100.0, senses: int = 0) -> Cost:
    return Cost(22_700_000, 90_000_000, senses * 768, senses, 3.5 if senses else None, speed, None, 10**9, speed / 100)


@pytest.fixture
def found() -> Evaluation:
    rows: dict[str, Result | str] = {
        "teacher": draws(0.80, 0.78, more={"macro F1": 0.79}),
        "replaced:x|y": draws(0.77, 0.76, more={"macro F1": 0.75}),
        "replaced:z": draws(0.75, 0.73, more={"macro F1": 0.70}),
        "bad\x1b[31mname": "gives no token embeddings",
    }
    costs = {"teacher": cost(), "replaced:x|y": cost(90, 5000), "replaced:z": cost(95, 1000)}
    task = TaskReport("banking77, 8 shots", "classification", "logistic regression", rows)
    return Evaluation(
        list(rows),
        [task],
        costs,
        {"settings": {"seed": 3, "threads": 2}, "sizes": ["replaced:x|y", "replaced:z"], "keys": {"a | b": "c"}},
    )


def test_one_value_has_no_interval(found: Evaluation) -> None:
    task = TaskReport("t", "wordsim", "x", {"teacher": draws(0.5), "replaced:z": draws(0.6)})
    assert gain(found, task, "replaced:z") is None


def test_names_that_look_like_markup_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show(Evaluation(["[en]"], [TaskReport("a[/b]", "wordsim", "[c]", {"[en]": draws(0.5)})]))
    told = capsys.readouterr().out
    assert "a[/b]" in told
    assert "[en]" in told


def test_tables_tell_what_was_measured(found: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    table, costs = sheets(found)
    assert table.head == ["model", "accuracy", "over teacher [95 %]", "macro F1"]
    assert table.rows[0] == ["teacher", "0.790 ± 0.014", "–", "0.790"]
    assert table.rows[1][1:3] == ["0.765 ± 0.007", "-0.025 [-0.030, -0.020]"]
    assert table.rows[3][1] == "gives no token embeddings"
    assert costs.rows[1][1:6] == ["22.7 M", "90.0 MB", "5,000", "3.8 MB", "3.5x"]
    show(found)
    told = capsys.readouterr().out
    assert "0.765 ± 0.007" in told
    assert "\x1b[31m" not in told


def test_tables_are_not_folded_where_there_is_no_terminal(
    found: Evaluation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show(found)
    words = ("dictionary", "compression", "speed-up", "memory")
    assert any(all(word in line for word in words) for line in capsys.readouterr().out.splitlines())
    monkeypatch.setenv("COLUMNS", "60")  # is heard
    show(found)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_markdown_holds_its_columns(found: Evaluation) -> None:
    lines = markdown(found).split("\n")
    assert "### banking77, 8 shots" in lines
    row = next(line for line in lines if line.startswith("| replaced:x"))
    assert "replaced:x\\|y" in row
    assert row.replace("\\|", "").count("|") == 5
    assert "\x1b" not in "".join(lines)


def test_json_comes_back(found: Evaluation, tmp_path: Path) -> None:
    output = str(tmp_path / "new" / "e.json")
    written = write_report(found, output, plots=False)
    assert load_report(output) == found
    assert written == [output, str(tmp_path / "new" / "e.md")]
    told = json.loads(Path(output).read_text())
    assert told["tasks"][0]["differences"]["replaced:z"]["gain"] == pytest.approx(-0.05)
    assert told.pop(storage.SEAL) == storage.seal(told)
    assert told == to_json(found)
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
def test_json_of_others_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(BadInput, match=r"e\.json"):
        load_report(str(tmp_path / "e.json"))


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["tasks"][0]["rows"]["teacher"].update(values="abc"),
        lambda told: told["tasks"][0].update(name=3),
        lambda told: told.update(models=[1]),
        lambda told: told["costs"]["teacher"].update(speedup="fast"),
        lambda told: told["made"].update(settings="none"),
    ],
)
def test_json_that_was_changed_is_refused(change: Callable[[dict], None], found: Evaluation, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    write_report(found, str(output), plots=False)
    told = json.loads(output.read_text())
    change(told)
    output.write_text(json.dumps(told))
    with pytest.raises(BadInput, match=r"e\.json is there, but holds no evaluation"):
        load_report(str(output))


def test_results_on_other_words_have_no_difference(found: Evaluation) -> None:
    rows: dict[str, Result | str] = {
        name: Result("s", "words", [0.5, 0.7], names=own)
        for name, own in (("teacher", ["a", "b"]), ("replaced:z", ["a", "c"]))
    }
    task = TaskReport("t", "coarsewsd", "x", rows)
    assert gain(found, task, "replaced:z") is None
    assert sheets(Evaluation(list(rows), [task]))[0].head == ["model", "s"]


def test_numbers_stay_whole_in_a_hundred_columns(
    found: Evaluation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
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


def test_a_title_and_the_names_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[tuple[float, float, float]] = []
    usual = plots._finish

    def look(figure: object, plot: object, file: Path, *, spread: bool) -> None:
        usual(figure, plot, file, spread=spread)
        title = plot._left_title.get_window_extent()  # type: ignore[attr-defined]
        names = plot.get_legend().get_window_extent()  # type: ignore[attr-defined]
        boxes.append((title.y0 - names.y1, figure.bbox.x1 - title.x1, figure.bbox.x1 - names.x1))  # type: ignore[attr-defined]

    monkeypatch.setattr(plots, "_finish", look)
    points = [plots.Point(f"replaced:runs/banking77/dictionary-{n},hard", 10.0 * n, 0.8, 0.01) for n in range(1, 11)]
    title = "mteb:ToxicConversationsClassification, all training texts: accuracy against the dictionary's size"
    plots.draw_lines(tmp_path / "a.png", title, ("dictionary in MB", "accuracy"), points, plots.Line("teacher", 0.81))
    assert min(boxes[0]) >= 0  # names begin below the title; both end within the picture


def test_plots_show_every_model(found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    usual = plots._finish

    def look(figure: object, plot: object, file: Path, *, spread: bool) -> None:
        seen.append((file.name, plot.get_legend_handles_labels()[1]))  # type: ignore[attr-defined]
        usual(figure, plot, file, spread=spread)

    monkeypatch.setattr(plots, "_finish", look)
    written = write_report(found, str(tmp_path / "e.json"), plots=True)
    assert [Path(name).name for name in written[2:]] == [
        "e-banking77--8-shots-speed.png",
        "e-banking77--8-shots-size.png",
    ]
    for name in written[2:]:
        data = Path(name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    assert seen[0][1] == ["teacher  0.790", "replaced:x|y  0.765", "replaced:z  0.740"]
    assert set(seen[1][1]) == {"teacher  0.790", "replaced:x|y  0.765", "replaced:z  0.740"}


def test_plots_without_matplotlib_say_what_to_install(
    found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install msense\[evaluation\]"):
        write_report(found, str(tmp_path / "e.json"), plots=True)
