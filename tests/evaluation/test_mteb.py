"""Text classification, by msense and by mteb, on models with known vectors, without network."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from task_data import Encoder, write_task

from msense.corpus.labelled import Columns
from msense.errors import InputError
from msense.evaluation.result import Result
from msense.evaluation.spec import PAPER_TASKS
from msense.evaluation.tasks import classification, mteb
from msense.evaluation.tasks.classification import Protocol
from msense.evaluation.tasks.mteb import MtebEncoder, measure
from msense.metrics import METRICS

CLASSES, TRAIN, TEST = 4, 20, 30
Way = Callable[..., Result]
WAYS = [partial(measure, name="own", columns=Columns()), partial(classification.measure, columns=Columns())]


def by_class(text: str) -> np.ndarray:
    return 9 * np.eye(CLASSES)[int(text.split()[0])]


def noise(text: str) -> np.ndarray:
    return np.random.default_rng(list(text.encode())).normal(size=8)


def write(folder: Path, labels: Sequence[str]) -> str:
    """Write texts of their class, split and number."""
    sizes = {"train": TRAIN, "test": TEST}
    rows = {p: [(f"{c} {p} {i}", own) for i in range(n) for c, own in enumerate(labels)] for p, n in sizes.items()}
    return write_task(folder, rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data"), ["a", "b", "c", "d"])


@pytest.mark.parametrize("way", WAYS)
def test_every_draw_has_its_shots_per_class(way: Way, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, fit = [], LogisticRegression.fit

    def spy(self: LogisticRegression, vectors: np.ndarray, labels: Sequence[object], *more: object) -> object:
        drawn.append((np.unique(labels, return_counts=True)[1].tolist(), vectors.tobytes()))
        return fit(self, vectors, labels, *more)

    monkeypatch.setattr(LogisticRegression, "fit", spy)
    for shots in (3, TRAIN + 1):
        way(Encoder(noise), source=data, protocol=Protocol(shots, 4, 0))
    assert [counts for counts, _ in drawn] == [[3] * CLASSES] * 4 + [[TRAIN] * CLASSES] * 4
    assert len({vectors for _, vectors in drawn}) == 8


@pytest.mark.parametrize("way", WAYS)
def test_classes_are_learnt_and_more_shots_help(way: Way, data: str) -> None:
    model = Encoder(by_class)
    result = way(model, source=data, protocol=Protocol(3, 4, 0))
    assert (result.metric, result.over, result.values) == ("accuracy", "draws", [1.0] * 4)
    assert result.more == {"macro F1": 1.0}
    assert len(model.encoded[1]) == len(set(model.encoded[1])) == CLASSES * TEST
    noisy = Encoder(lambda text: by_class(text) / 6 + noise(text)[:CLASSES])
    scores = [way(noisy, source=data, protocol=Protocol(shots)).score for shots in (1, 8, 0)]
    assert scores[0] < scores[1] < scores[2] < 0.9


@pytest.mark.parametrize("way", WAYS)
def test_noise_is_near_chance_and_repeats_with_its_seed(way: Way, data: str) -> None:
    results = [way(Encoder(noise), source=data, protocol=Protocol(8, 6, seed)) for seed in (0, 0, 1)]
    assert len(results[0].values) == 6
    assert results[0].score == pytest.approx(1 / CLASSES, abs=0.08)
    assert results[0] == results[1]
    assert results[0].values != results[2].values
    if way is WAYS[1]:  # draw i of seed s is draw 0 of seed s + i
        assert results[0].values[1:] == results[2].values[:-1]


def test_all_texts_are_one_experiment_with_predictions(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("../own", "x" * 300, "own: a|b"):
        assert measure(Encoder(by_class), name, data, Columns(), Protocol(0, 1, 0)).score == 1.0
    assert list(tmp_path.iterdir()) == []  # predictions are removed with their folder
    model = Encoder(noise)
    result = measure(model, "own", data, Columns(), Protocol(0, 6, 0))
    assert (result.over, result.values) == ("texts", [])
    assert sorted(map(len, model.encoded)) == [CLASSES * TRAIN, CLASSES * TEST]
    assert result.gold == [c for _ in range(TEST) for c in range(CLASSES)]
    assert 0.1 < result.score < 0.4
    f1 = METRICS["macro F1"](np.array(result.gold), np.array(result.found))
    assert result.more["macro F1"] == pytest.approx(f1)


def test_missing_test_classes_and_other_columns(tmp_path: Path) -> None:
    source = write(tmp_path, ["no", "perhaps", "yes"])
    for path in tmp_path.iterdir():
        rows = path.read_text().replace("text,label", "line,tag").splitlines(True)
        path.write_text("".join(row for row in rows if "perhaps" not in row or "train" in row))
    assert measure(Encoder(by_class), "own", source, Columns(("line",), "tag"), Protocol(3, 2, 0)).values == [1.0, 1.0]


@pytest.mark.parametrize("way", WAYS)
def test_unusable_data_are_refused(way: Way, tmp_path: Path) -> None:
    sources = [write(tmp_path / name, labels) for name, labels in (("one", ["a"]), ("none", ["a", "b"]))]
    (tmp_path / "none" / "test.csv").write_text("text,label\n0 x,c\n")
    for source, message in zip(sources, (r"has 1 class\(es\).*--label-column", "share no label"), strict=True):
        with pytest.raises(InputError, match=message):
            way(Encoder(noise), source=source, protocol=Protocol(3, 2, 0))


def test_the_encoder_follows_the_protocol_of_mteb() -> None:
    from mteb.models import CrossEncoderProtocol, EncoderProtocol, SearchProtocol

    encoder, vectors = MtebEncoder(Encoder(by_class)), np.eye(3, dtype=np.float32)
    assert isinstance(encoder, EncoderProtocol)
    assert not isinstance(encoder, CrossEncoderProtocol | SearchProtocol)
    assert encoder.similarity(5 * vectors, vectors[:2]).tolist() == [[1, 0], [0, 1], [0, 0]]
    assert encoder.similarity_pairwise(vectors[:2], 5 * vectors[[0, 2]]).tolist() == [1, 0]


def test_the_tasks_of_the_paper_exist_in_mteb() -> None:
    assert len(set(PAPER_TASKS)) == 16
    tasks = [mteb.task_class(name).metadata for name in PAPER_TASKS]
    assert [task.name for task in tasks] == list(PAPER_TASKS)
    assert {task.main_score for task in tasks} == {"accuracy"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("banking77", r"no task 'banking77'; similar names: Banking77Classification, .*mteb:NAME=DIR"),
        ("?", r"similar names: ArxivClassification"),
        (
            "AskUbuntuDupQuestions",
            r"is Reranking on text, or several tasks: use one of type Classification, Retrieval, STS, Pair",
        ),
        ("CQADupstackRetrieval", r"is Retrieval on text, or several tasks"),
    ],
)
def test_unknown_and_other_tasks_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(Encoder(noise), name, "", Columns(), Protocol(3, 2, 0))


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_an_unreachable_hub_names_the_download(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no route to the hub\nat all")

    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", fail)
    message = (
        r"mteb task Banking77Classification from the Hub \(no route to the hub\).* `hf download --repo-type dataset "
        r"mteb/banking77 --revision \w+ --local-dir DIR`; .*train\.csv.* --task mteb:Banking77Classification=DIR$"
    )
    with pytest.raises(InputError, match=message):
        measure(Encoder(noise), "Banking77Classification", "", Columns(), Protocol(3, 2, 0))


def test_a_task_of_mteb_is_scored_on_its_test_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    def load(**settings: object) -> DatasetDict:
        assert settings["path"] == "mteb/PoemSentimentClassification"
        labels = {"train": [0, 1, 2] * 9, "validation": [1, 2, 0] * 9, "test": [0, 1, 2] * 9}
        texts = {part: [f"{c} {part} {i}" for i in range(9) for c in range(3)] for part in labels}
        return DatasetDict({k: Dataset.from_dict({"text": texts[k], "label": own}) for k, own in labels.items()})

    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", load)
    task = mteb.task_class("PoemSentimentClassification")
    monkeypatch.setattr(task, "dataset_transform", lambda *_, **__: None)
    model = Encoder(by_class)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*superseded")  # as all tasks of the paper are
        result = measure(model, "PoemSentimentClassification", "", Columns(), Protocol(2, 3, 7))
    assert result.values == [1.0] * 3  # the labels of the validation split are all wrong
    assert not [text for texts in model.encoded for text in texts if "validation" in text]
    full = measure(model, "PoemSentimentClassification", "", Columns(), Protocol(0, 3, 7))
    assert (full.over, full.score, full.gold) == ("texts", 1.0, [0, 1, 2] * 9)


@pytest.mark.slow
def test_nothing_is_written_to_the_home_folder(data: str, tmp_path: Path) -> None:
    code = f"""
import os, sys
import numpy as np
from msense.corpus.labelled import Columns
from msense.evaluation.tasks.mteb import Protocol, measure
assert not {{"mteb", "datasets"}} & set(sys.modules)

class Model:
    def encode(self, texts):
        return np.eye({CLASSES}, dtype=np.float32)[[int(text[0]) for text in texts]]

assert measure(Model(), "own", {data!r}, Columns(), Protocol(3, 2, 0)).values == [1.0, 1.0]
assert "MTEB_CACHE" not in os.environ
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MTEB", "HF_", "XDG"))}
    env = {**kept, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*")) == []
