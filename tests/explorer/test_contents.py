"""What an explorer opens beside a dictionary: its teacher, its run, trainings and evaluations; and the index while it is made."""

from pathlib import Path
from threading import Event

import numpy as np
import pytest
from explored import SCRIPT, student_contents, write_evaluation, write_run
from starlette.testclient import TestClient
from students import dictionary_of
from tiny import make

from msense.dictionary import SenseDictionary
from msense.dictionary.format import write_tokenizer
from msense.errors import InputError
from msense.evaluation.models import TeacherModel
from msense.evaluation.spec import Spec
from msense.explorer.app import make_app
from msense.explorer.contents import Contents, open_contents
from msense.explorer.evaluation import speed_charts
from msense.explorer.origin import present_teacher, read_origin
from msense.explorer.render import apart
from msense.explorer.training import budget_chart
from msense.explorer.word import token_view
from msense.io import storage
from msense.run.folder import RunFolder
from msense.teacher.spec import TeacherOptions, load_teacher_info


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose dictionary is of a teacher on this machine."""
    folder = tmp_path_factory.mktemp("read") / "run"
    dictionary_of(teacher, temperature_unit=20.0, max_length=24).save(folder / "dictionary")
    write_tokenizer(folder / "dictionary", load_teacher_info(str(teacher), TeacherOptions())[1].to_str())
    RunFolder(str(folder)).remember_teacher(str(teacher))
    return folder


def test_the_teacher_reads_where_there_is_no_student(run: Path, teacher: Path) -> None:
    for source in (run, run / "dictionary"):
        contents = open_contents(str(source))
        tokens = contents.reader.tokens("the Bank, near")
        assert [token.token for token in tokens] == ["the", "bank", ",", "near"]
        assert [(token.start, token.end) for token in tokens] == [(0, 3), (4, 8), (8, 9), (10, 14)]
    read = TeacherModel(Spec("t", "teacher", teacher=str(teacher)), "cpu", 1, like=contents.dictionary).read(
        ["the Bank, near"]
    )
    expected = contents.dictionary.assign(read.ids, read.senses)[1:-1]
    assert [token.sense for token in tokens] == expected.tolist()
    page = TestClient(make_app(contents), base_url="http://localhost").get("/sentence?text=the+bank")
    assert page.status_code == 200
    assert 'class="sure-' in page.text
    with pytest.raises(InputError, match="unpaired surrogate"):
        contents.reader.tokens("\ud800")


def test_another_teacher_is_refused_and_a_missing_one_reads_nothing(run: Path, make_teacher: object) -> None:
    other = make_teacher("llama")
    with pytest.raises(InputError, match="is not the dictionary's, which has tokenizer"):
        open_contents(str(run), teacher=str(other)).reader.tokens("a")
    dictionary = SenseDictionary.load(run)
    assert present_teacher(str(run.parent), dictionary.config.teacher) is None
    assert open_contents(str(run / "dictionary"), teacher=str(other)).reader is not None


def test_the_page_of_a_dictionary_says_what_its_run_read(tmp_path: Path) -> None:
    make([2, 1]).save(tmp_path / "run" / "dictionary")
    assert read_origin(str(tmp_path / "run")) is None
    write_run(tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / "dictionary"):
        origin = read_origin(str(source))
        assert (origin.kind, origin.corpus, origin.files) == (
            "a dictionary",
            ("texts/*.txt",),
            (f"{SCRIPT}.txt", "b.txt"),
        )
        assert origin.stats == {"documents": 40, "passages": 50, "tokens": 6000}
    chart = budget_chart(origin)
    (line,) = chart.series
    assert (chart.x, line.points[0], line.points[-1]) == ("senses", (20, 9.0), (160, 9.0 / 8))
    page = TestClient(make_app(open_contents(str(tmp_path / "run"))), base_url="http://localhost").get("/").text
    assert "texts/*.txt" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.txt" in page
    assert "160 senses" in page
    summary = storage.read_json(str(tmp_path / "run" / "summary.json"))
    del summary["stages"]["senses"]
    storage.write_json(str(tmp_path / "run" / "summary.json"), summary)
    assert budget_chart(read_origin(str(tmp_path / "run"))) is None
    storage.write_json(str(tmp_path / "run" / "manifest.json"), {"another": "version"})
    assert read_origin(str(tmp_path / "run")) is None, "its dictionary is shown all the same"


def test_evaluations_are_drawn_with_their_intervals(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "e.json")
    drawn, whole = speed_charts(str(tmp_path / "e.json"))
    best = drawn.points[0]
    assert (best.name, best.speed, drawn.interval) == ("teacher", 200, "± standard deviation over draws")
    assert best.high - best.low == pytest.approx(2 * np.std([0.8, 0.82], ddof=1))
    assert [point.name for point in drawn.points] == ["teacher", "layers", "a <b>table</b>"]
    teacher, layers, table = whole.points
    assert teacher.low == teacher.high == teacher.score
    assert table.low < table.score < table.high < teacher.score
    assert layers.score == 35 / 40
    page = TestClient(
        make_app(Contents(make([1]), evaluations=(str(tmp_path / "e.json"),))), base_url="http://localhost"
    ).get("/training")
    assert page.status_code == 200
    assert "a &lt;b&gt;table&lt;/b&gt;" in page.text
    with pytest.raises(InputError, match="there is no "):
        speed_charts(str(tmp_path / "none.json"))
    make([1]).save(tmp_path / "d")
    with pytest.raises(InputError, match=r"none\.json: name the JSON file"):
        open_contents(str(tmp_path / "d"), evaluations=[str(tmp_path / "none.json")])
    assert open_contents(str(tmp_path / "d"), evaluations=[str(tmp_path / "e.json")]).evaluations


def test_a_page_waits_for_the_index_with_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = Event(), Event()

    def prepare(self: SenseDictionary, progress: object) -> None:
        progress(0.25)
        started.set()
        go.wait(60)

    monkeypatch.setattr(SenseDictionary, "prepare_neighbours", prepare)
    contents = Contents(make([2, 1]))
    client = TestClient(make_app(contents), base_url="http://localhost")
    assert contents.index(0) < 1
    assert started.wait(60)
    page = client.get("/neighbours/0/0")
    assert (page.status_code, 'value="25"' in page.text) == (202, True)
    assert 'http-equiv="refresh"' in page.text
    go.set()
    assert contents.index() == 1
    monkeypatch.undo()
    assert client.get("/neighbours/0/0").status_code == 200


def test_numbers_on_a_map_do_not_cover_each_other() -> None:
    senses = token_view(make([60], dim=2), 0).senses
    shown = [sense for sense in senses if sense.sense in apart(senses)]
    assert senses[0] in shown
    assert 1 < len(shown) < 60
    for i, a in enumerate(shown):
        assert all(abs(a.x - b.x) > 0.05 or abs(a.y - b.y) > 0.03 for b in shown[:i])


def test_a_run_of_a_student_shows_its_training_and_what_is_named(teacher: Path, tmp_path: Path) -> None:
    contents = student_contents(teacher, tmp_path)
    assert [training.name for training in contents.trainings] == [str(tmp_path / "run"), str(tmp_path / "second")]
    assert len(contents.speeds()) == 2
    assert contents.differences()
