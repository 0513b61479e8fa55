"""The comparison with other libraries: the texts they get, how their models are made, and the tables and keys of the result."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import word_piece

from msense.errors import InputError, MsenseError
from msense.evaluation.report import Evaluation, TaskReport
from msense.evaluation.result import Result
from msense.training.label_dataset import LabelBatch

sys.path.append(str(Path(__file__).parents[2] / "jobs"))

import rivals
from benchmarks import rival_models, sets
from benchmarks.artifacts import made_once
from benchmarks.rival_models import RivalModels
from benchmarks.texts import export_texts

ROWS = [[2], [3, 4], [0, 2], [2, 3], [5, 6]]  # bank; rivers; an unknown word and bank; bank river; unban


class Labels:
    """Labels of five rows, of which the fourth is held out; a row's vector is its number."""

    lengths = np.array([len(row) for row in ROWS], np.int32)

    def held_out(self) -> np.ndarray:
        return np.array([3])

    def read(self, rows: np.ndarray) -> LabelBatch:
        ids, mask = torch.zeros(len(rows), 2, dtype=torch.int64), torch.zeros(len(rows), 2, dtype=torch.bool)
        for place, row in enumerate(rows):
            ids[place, : len(ROWS[row])], mask[place, : len(ROWS[row])] = torch.tensor(ROWS[row]), True
        return LabelBatch(ids, mask, ids, torch.tensor(rows).float()[:, None], None, None)


def test_texts_are_those_of_the_training_rows_with_their_vectors(tmp_path: Path) -> None:
    tokenizer = word_piece()
    from tokenizers import decoders

    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]"])
    share = export_texts(Labels(), tokenizer, tmp_path)  # type: ignore[arg-type]
    texts, vectors = json.loads((tmp_path / "texts.json").read_text()), np.load(tmp_path / "texts.npy")
    found = {int(vector[0]): text for text, vector in zip(texts, vectors, strict=True)}
    assert found == {0: "bank", 1: "rivers", 2: "bank", 4: "unban"}
    assert share == 0.75  # an unknown word has no text
    assert vectors.dtype == np.float32


@pytest.fixture
def make(tmp_path: Path) -> RivalModels:
    texts = made_once(tmp_path / "texts", {"labels": "a"}, lambda new: (new / "texts.json").write_text('["bank"]'))
    np.save(texts / "texts.npy", np.full((4, 2), 0.1, np.float32))
    places = {"folder": tmp_path / "own", "shared": tmp_path / "shared", "texts": texts, "teacher": tmp_path}
    return RivalModels(**places, tokenizer=tmp_path / "tokenizer.json", epochs=3, threads=2, tokenlearn_python="other")


def test_training_is_in_another_process_with_stated_threads_epochs_and_rate(
    make: RivalModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str | None, dict, int]] = []

    def call(python: str | None, words: Sequence[str], threads: int) -> SimpleNamespace:
        calls.append((python, json.loads(Path(words[2]).read_text()), threads))
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(rival_models, "call_python", call)
    first = make.trained("st-table", 0.2)
    assert make.trained("st-table", 0.2) == first
    assert make.trained("st-minilm-2", 1e-4) != first
    assert len(calls) == 2, "the first is reused"
    (python, given, threads), (_, other, _) = calls
    assert (python, threads, given["texts"]) == (sys.executable, 2, str(make.texts))
    assert given["start"] == {"tokenizer": str(make.tokenizer)}
    assert other["start"] == {"layers": str(make.teacher)}
    wanted = {"num_train_epochs": 3, "learning_rate": 0.2, "per_device_train_batch_size": 64, "seed": 0, "threads": 2}
    assert given["training"] == wanted
    (make.texts / "made_of.json").write_text('{"labels": "b"}')
    with pytest.raises(InputError, match=r"st-table-0\.2 was made from other inputs or with other settings: remove it"):
        make.trained("st-table", 0.2)


def test_tokenlearn_gets_scaled_vectors_and_its_failure_is_named(
    make: RivalModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(python: str | None, words: Sequence[str], threads: int) -> SimpleNamespace:
        given = dict(zip(words[2::2], words[3::2], strict=True))
        np.testing.assert_allclose(np.load(Path(given["--data-path"], "texts.npy")), 1.0)
        assert json.loads(Path(given["--data-path"], "texts.json").read_text()) == ["bank"]
        assert (python, words[:2], given["--pca-dims"]) == ("other", ["-m", "tokenlearn.train"], "2")
        return SimpleNamespace(returncode=1, stdout="a\nNo module named 'tokenlearn'\n")

    monkeypatch.setattr(rival_models, "call_python", call)
    with pytest.raises(
        MsenseError, match=r"failed with code 1 in other \(No module named 'tokenlearn'\).*--without tok"
    ):
        make.tokenlearn()
    assert not (make.folder / "tokenlearn").exists()


def test_rivals_without_their_packages_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rival_models, "_has", lambda python, package: package == "accelerate")
    run = rivals.parse(["--data", ".", "--without", "wordllama"])
    with caplog.at_level("WARNING"):
        assert run.rivals == ["st-table", "st-minilm-2"]
    assert [r.getMessage().split(" is")[0] for r in caplog.records] == ["st-table-warm", "model2vec", "tokenlearn"]
    assert '`pip install "model2vec[distill,quantization]"`' in caplog.text


def test_a_foreign_python_is_asked_without_this_ones_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", "here")
    question = ["-c", "import os; print(os.getenv('PYTHONPATH'), os.environ['OMP_NUM_THREADS'])"]
    assert rival_models.call_python(str(python), question, 3).stdout == "None 3\n"
    assert rival_models.call_python(None, question, 3).stdout == "here 3\n"
    with pytest.raises(InputError, match="cannot run /none"):
        rival_models.call_python("/none", question, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--without", "x"], "--without x: no such model; use table, static"),
        (["--without", *sets.STUDENTS], "keep one of the students"),
        (["--lr", "static=1"], "--lr static=1: use MODEL=LR"),
        (["--lr", "st-table=-1"], "--lr st-table=-1: use MODEL=LR"),
        (["--sts", "stsb"], "--sts: similarity sets have no text to distill from; give texts as --general"),
    ],
)
def test_invalid_flags_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rivals.parse(["--data", ".", *words])


def evaluation(*scores: tuple[str, list[float]]) -> Evaluation:
    rows: dict[str, Result | str] = {name: Result("nDCG@10", "queries", values) for name, values in scores}
    rows["static + bm25"] = Result("nDCG@10", "queries", [0.9, 0.9])
    return Evaluation([name for name, _ in scores], [TaskReport("cranfield (retrieval)", "retrieval", "x", rows)])


def test_scores_have_keys_and_students_intervals_over_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[Sequence[str], Sequence[str]]] = []

    def evaluate(models: Sequence[str], tasks: Sequence[str], output: Path, **more: object) -> Evaluation:
        measured.append((models, tasks))
        return evaluation(
            ("teacher", [0.8, 0.6]), ("static", [0.7, 0.5]), ("st-table", [0.5, 0.3]), ("bm25", [0.5, 0.5])
        )

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(rivals, "evaluate_models", evaluate)
    monkeypatch.setattr(rivals.Comparison, "models", lambda self, name, corpus: ([f"static=student:/{name}"], 1.0))
    source = write_set(tmp_path / "data", "cranfield")
    words = ["cranfield", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    argv = ["rivals.py", *words, "--without", "table", "layers2"]
    monkeypatch.setattr(sys, "argv", argv)
    rivals.main()
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "rivals.cranfield.same_tokens": 1.0,
        "rivals.cranfield.teacher": 0.7,
        "rivals.cranfield.static": 0.6,
        "rivals.cranfield.st-table": 0.4,
        "rivals.cranfield.bm25": 0.5,
        "rivals.cranfield.static + bm25": 0.9,
    }
    assert measured[0] == (["teacher", "static=student:/cranfield", "bm25"], [f"retrieval:cranfield={source}"])
    lines = {line.split()[0]: line.split()[1:] for line in table if line.strip()}
    assert lines["st-table"] == ["0.400", "+20.0", "[+20.0,", "+20.0]"]
    assert lines["teacher"] == ["0.700", "-10.0", "[-10.0,", "-10.0]"]
    assert lines["static"] == ["0.600", "–"]

    monkeypatch.setattr(sys, "argv", [*argv, "--general", "text.txt"])
    rivals.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "rivals.general.same_tokens": 1.0,
        "rivals.general.cranfield.teacher": 0.7,
        "rivals.general.cranfield.static": 0.6,
        "rivals.general.cranfield.st-table": 0.4,
        "rivals.general.cranfield.bm25": 0.5,
        "rivals.general.cranfield.static + bm25": 0.9,
    }
    assert measured[1][0] == ["teacher", "static=student:/general", "bm25"]
    assert len(measured) == 2, "instead of the set's own text"


def test_similarity_sets_have_a_task_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "sts" / "pairs").mkdir(parents=True)
    own = sets.open_similarity(tmp_path, "pairs,split=dev")
    assert own == ("pairs", "", f"similarity:pairs={tmp_path / 'sts' / 'pairs'},split=dev")
    with pytest.raises(InputError, match="sts/none/ does not exist"):
        sets.open_similarity(tmp_path, "none")


def write_set(data: Path, name: str) -> Path:
    """Write a small retrieval set; return its folder."""
    folder = data / "retrieval" / name
    folder.mkdir(parents=True)
    rows = [{"_id": "1", "title": "Wings", "text": "A wing."}, {"_id": 2, "text": "A keel."}, {"_id": "3", "text": ""}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "wing"}\n')
    (folder / "qrels.tsv").write_text("q\t1\t1\n")
    return folder


def test_a_retrieval_set_is_its_documents_with_titles(tmp_path: Path) -> None:
    source = write_set(tmp_path, "wings")
    (tmp_path / "topics").mkdir()
    own = sets.open_set(tmp_path, "wings", tmp_path / "out")
    assert own.is_retrieval
    assert own.task == f"retrieval:wings={source}"
    texts = [json.loads(line) for line in Path(own.corpus).read_text().splitlines()]
    assert texts == [{"id": "1", "text": "Wings\nA wing."}, {"id": "2", "text": "A keel."}]
    before = Path(own.corpus).stat().st_mtime_ns
    assert sets.open_set(tmp_path, "wings", tmp_path / "out") == own
    assert Path(own.corpus).stat().st_mtime_ns == before, "which would make everything afresh"
    assert sets.open_set(tmp_path, "topics", tmp_path / "out").task == f"topics={tmp_path / 'topics'}"
    with pytest.raises(InputError, match="none/ does not exist: give as --data the folder that contains none/"):
        sets.open_set(tmp_path, "none", tmp_path / "out")
