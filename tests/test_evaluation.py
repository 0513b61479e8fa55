"""Specs, labelled data and each task, on models whose answers are known."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from students import dictionary_of
from tiny import make, with_tokenizer, word_piece

from msense import SenseDictionary
from msense.config import BuildConfig
from msense.dictionary.format import write_tokenizer
from msense.errors import BadInput, MsenseError
from msense.evaluation import classification, coarsewsd, tokens, wordsim
from msense.evaluation.classification import Protocol
from msense.evaluation.models import Read, make_model, opened
from msense.evaluation.spec import Spec, TaskSpec, check_names, parse_model, parse_task
from msense.labelled import Columns, read_labelled
from msense.pooling import pool_rows
from msense.teacher import describe

PLAIN = Spec("reader", "replaced", replace=None)
TEXTS = ["the river bank", "a cat sat on the mat", "money money", "is near"]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("teacher", Spec("teacher", "teacher")),
        ("model2vec", Spec("model2vec", "model2vec")),
        ("truncated:2", Spec("truncated:2", "truncated", layers=2)),
        ("old=truncated:2", Spec("old", "truncated", layers=2)),
        ("replaced:/a/b/c", Spec("replaced:b/c", "replaced", "/a/b/c", replace="soft")),
        ("replaced:/d,hard,dot", Spec("replaced:/d,hard,dot", "replaced", "/d", replace="hard", metric="dot")),
        ("x=replaced:/d,temperature=0.5", Spec("x", "replaced", "/d", replace="soft", temperature=0.5)),
        ("soft, K 50=replaced:/d,hard", Spec("soft, K 50", "replaced", "/d", replace="hard")),
        ("student:/s", Spec("student:/s", "student", "/s")),
        ("student:owner/model", Spec("student:owner/model", "student", "owner/model")),
        ("student:/s,hard", Spec("student:/s,hard", "student", "/s", replace="hard")),
        ("owner/model", Spec("owner/model", "encoder", "owner/model")),
    ],
)
def test_a_model_is_read(word: str, wanted: Spec) -> None:
    assert parse_model(word) == wanted


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("truncated:0", "truncated:2"),
        ("truncated:two", "truncated:2"),
        ("replaced:", "names no folder"),
        ("a:b=owner/model", "cannot be read"),
        ("", "cannot be read"),
        ("replaced:/d,sotf", "'sotf' is no option"),
        ("student:/s,temperature=0", "temperature=F"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(word: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        parse_model(word)


@pytest.mark.parametrize(
    ("word", "wanted", "title"),
    [
        ("banking77=/d/b", TaskSpec("banking77", "classification", "/d/b"), "banking77"),
        ("coarsewsd=/d/c", TaskSpec("coarsewsd", "coarsewsd", "/d/c"), "coarsewsd"),
        ("classifier:sst2=/d", TaskSpec("sst2", "classifier", "/d"), "sst2 (classifier)"),
        (
            "mteb:Banking77Classification",
            TaskSpec("Banking77Classification", "mteb", ""),
            "Banking77Classification (mteb)",
        ),
        ("x=hf://mteb/banking77", TaskSpec("x", "classification", "hf://mteb/banking77"), "x"),
    ],
)
def test_a_task_is_read(word: str, wanted: TaskSpec, title: str) -> None:
    found = parse_task(word)
    assert found == wanted
    assert found.title == title


@pytest.mark.parametrize(
    ("word", "told"), [("banking77", "NAME=DATA"), ("=x", "NAME=DATA"), ("glu:x=/d", "no kind of task")]
)
def test_a_task_that_cannot_be_read_is_refused(word: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        parse_task(word)


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(BadInput, match=r"student:/a/s and student:/b/s are both called 's'"):
        check_names(["student:/a/s", "student:/b/s"], ["s", "s"], "--model")


def write_task(folder: Path, rows: dict[str, list[tuple[str, str]]], form: str = "csv") -> str:
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    for part, own in rows.items():
        table = pd.DataFrame(own, columns=["text", "label"])
        path = folder / f"{part}.{form}"
        if form == "csv":
            table.to_csv(path, index=False)
        elif form == "jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            table.to_parquet(path)
    return str(folder)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_labelled_texts_are_read_as_they_are(form: str, tmp_path: Path) -> None:
    rows = [('a "b",\nc', "1"), ("NA", "null"), ("ü", "x y")]
    found = read_labelled(write_task(tmp_path / "d", {"train": rows}, form), "train")
    assert found.first == [text for text, _ in rows]
    assert found.labels.tolist() == [label for _, label in rows]


def test_labels_that_are_numbers_are_text(tmp_path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"text": ["a", "b"], "label": [3, 1]}).to_parquet(tmp_path / "test-0001.parquet")
    assert read_labelled(str(tmp_path), "test").labels.tolist() == ["3", "1"]


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda f: None, r"holds no train\*.csv"),
        (lambda f: (f / "train.csv").write_text("text,tag\na,b\n"), "no column 'label'; it has 'text', 'tag'"),
        (lambda f: (f / "train.csv").write_text("text,label\n"), "is empty"),
        (lambda f: (f / "train.csv").write_text('text,label\n"a'), "is no csv"),
        (lambda f: (f / "train.csv").write_text("text,label\na,b,\n"), "row 0 has not as many fields"),
        (lambda f: (f / "train.csv").write_text("text,label\na\n"), "row 0 has not as many fields"),
        (lambda f: (f / "train.csv").write_text("text,label\na,\n"), "row 0 .* lacks"),
        (lambda f: (f / "training_notes.csv").write_text("text,label\na,b\n"), r"holds no train\*.csv"),
        (lambda f: [write_task(f / n, {"train": [("a", "b")]}) for n in ("x", "y")], "several formats or folders"),
        (lambda f: (f / "train.parquet").write_text("no"), "cannot be read as parquet"),
        (lambda f: (f / "train.jsonl").write_text('{"text": "a"}\n{"text": null, "label": 1}\n'), "row 0 .* lacks"),
        (lambda f: [(f / n).write_text("text,label\na,b\n") for n in ("train.csv", "train.jsonl")], "several formats"),
    ],
)
def test_labelled_texts_that_cannot_be_read_are_refused(prepare: object, told: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x")
    prepare(tmp_path)  # type: ignore[operator]
    with pytest.raises(BadInput, match=told):
        read_labelled(str(tmp_path), "train")


def test_data_of_the_hub_that_cannot_be_reached_say_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def ls(self, *_: object, **__: object) -> list:
            raise OSError("no network")

    monkeypatch.setattr("msense.corpus.files.hub_filesystem", Gone)
    with pytest.raises(BadInput, match=r"hf download --repo-type dataset mteb/banking77 --local-dir DIR.*train\*\.csv"):
        read_labelled("hf://mteb/banking77", "train")


class Points:
    """Encodes a text "label number" as the label's corner, moved by the number."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def encode(self, texts: list[str]) -> np.ndarray:
        corners = np.eye(4, dtype=np.float32)
        moved = [np.random.default_rng(int(t.split()[1])).normal(0, self.noise, 4) for t in texts]
        return np.stack([corners[int(t.split()[0])] for t in texts]) + np.array(moved, np.float32)


@pytest.fixture
def corners(tmp_path: Path) -> str:
    def rows(start: int, n: int) -> list[tuple[str, str]]:
        return [(f"{i % 4} {i}", f"class {i % 4}") for i in range(start, start + n)]

    return write_task(tmp_path / "corners", {"train": rows(0, 400), "test": rows(400, 200)})


def test_classes_apart_are_told_apart_and_noise_is_not(corners: str) -> None:
    clear, noisy = (classification.measure(Points(n), corners, Columns(), Protocol()) for n in (0.05, 50.0))
    assert clear.values == [1.0] * 10
    assert clear.more["macro F1"] == 1.0
    assert noisy.score == pytest.approx(0.25, abs=0.08)
    assert len(set(noisy.values)) > 1


def test_more_shots_help_and_all_texts_help_most(corners: str) -> None:
    found = [classification.measure(Points(0.5), corners, Columns(), Protocol(shots=s)).score for s in (1, 8, 0)]
    assert found[0] < found[1] < found[2]


def test_draws_follow_from_the_seed(corners: str) -> None:
    def of(seed: int) -> list[float]:
        return classification.measure(Points(0.6), corners, Columns(), Protocol(draws=3, seed=seed)).values

    assert of(1) == of(1) != of(7)
    assert of(1)[1:] == of(2)[:2]  # draw i of seed s is draw 0 of seed s + i


def test_shots_are_of_each_class_and_no_more_than_there_are() -> None:
    seen = []

    class Spy(classification.LogisticRegression):
        def fit(self, points: np.ndarray, labels: np.ndarray) -> "Spy":
            seen.append(labels.tolist())
            return super().fit(points, labels)

    labels = np.array(["a"] * 20 + ["b"] * 3)
    vectors = np.random.default_rng(0).normal(size=(23, 2)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "LogisticRegression", Spy)
        classification.classify(
            {"train": vectors, "test": vectors}, {"train": labels, "test": labels}, Protocol(draws=2)
        )
    assert [(own.count("a"), own.count("b")) for own in seen] == [(8, 3), (8, 3)]


@pytest.mark.parametrize(
    ("test", "train", "told"), [("c", ["a", "a"], "1 class"), ("c", ["a", "b"], "no label of the test")]
)
def test_data_that_nothing_can_be_learnt_of_are_refused(test: str, train: list[str], told: str) -> None:
    vectors = {"train": np.eye(2, dtype=np.float32), "test": np.eye(2, dtype=np.float32)[:1]}
    with pytest.raises(BadInput, match=told):
        classification.classify(vectors, {"train": np.array(train), "test": np.array([test])})


@dataclass
class Reader:
    """Reads words, a token each between a [CLS] and a [SEP]; a word's embedding says which sense it is in."""

    dictionary: SenseDictionary | None
    spec: Spec = PLAIN
    most: int = 99

    def read(self, texts: list[str]) -> Read:
        ids, spans, embeddings, lengths = [], [], [], []
        for text in texts:
            at, own = 0, [(1, (0, 0), [0.0, 0.0, 0.0])]
            for word in text.split(" ")[: self.most]:
                side = 10.0 if word.endswith("1") else -10.0
                own.append((2, (at, at + len(word)), [side, 0.0, 0.0]))
                at += len(word) + 1
            own.append((3, (0, 0), [0.0, 0.0, 0.0]))
            ids += [row[0] for row in own]
            spans += [row[1] for row in own]
            embeddings += [row[2] for row in own]
            lengths.append(len(own))
        points = np.array(embeddings, np.float32)
        return Read(np.array(ids), np.concatenate([[0], np.cumsum(lengths)]), np.array(spans), points, points)


def two_senses() -> SenseDictionary:
    """Token 2 has a sense at each side, and one that nothing is near to."""
    rng = np.random.default_rng(0)
    sides = np.repeat([[10.0, 0, 0], [-10.0, 0, 0]], 50, axis=0)
    points = np.concatenate([sides, np.full((20, 3), 90.0)]) + rng.normal(0, 0.01, (120, 3))
    return SenseDictionary.fit(np.full(120, 2), points.astype(np.float32), k=3, vocab_size=4)


def write_contexts(folder: Path, word: str, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    (folder / word).mkdir(parents=True)
    for part, rows in (("train", train), ("test", test)):
        (folder / word / f"{part}.data.txt").write_text("".join(f"1\tthe {w} is\n" for w, _ in rows))
        (folder / word / f"{part}.gold.txt").write_text("".join(f"{g}\n" for _, g in rows))


def test_senses_are_named_by_the_majority_of_training_contexts(tmp_path: Path) -> None:
    train = [("w1", "a")] * 3 + [("w1", "b")] + [("w2", "b")] * 5
    write_contexts(tmp_path, "word", train, [("w1", "a"), ("w1", "b"), ("w2", "b"), ("w2", "b")])
    found = coarsewsd.measure(Reader(two_senses()), str(tmp_path))
    assert (found.metric, found.names, found.values) == ("accuracy", ["word"], [0.75])
    assert found.more["most frequent"] == 0.75
    assert found.more["gold centroids"] == 0.75
    assert 0 < found.more["V-measure"] < 1
    assert found.more["left out"] == 0


def test_agreement_is_whole_when_senses_are_those_of_people(tmp_path: Path) -> None:
    rows = [("w1", "a"), ("w2", "b")] * 4
    write_contexts(tmp_path, "word", rows, rows)
    found = coarsewsd.measure(Reader(two_senses()), str(tmp_path))
    assert found.score == found.more["ARI"] == found.more["V-measure"] == found.more["gold centroids"] == 1.0
    assert found.more["most frequent"] == 0.5


def test_senses_that_training_never_met_get_the_most_frequent_name(tmp_path: Path) -> None:
    write_contexts(tmp_path, "word", [("w1", "a")] * 3, [("w2", "a"), ("w2", "b")])
    assert coarsewsd.measure(Reader(two_senses()), str(tmp_path)).score == 0.5


def test_contexts_cut_off_before_the_word_are_counted_and_left_out(tmp_path: Path) -> None:
    write_contexts(tmp_path, "word", [("w1", "a"), ("w2", "b")], [("w1", "a")])
    file = tmp_path / "word" / "train.data.txt"
    file.write_text(file.read_text() + "5\t0 1 2 3 4 w1\n")
    gold = tmp_path / "word" / "train.gold.txt"
    gold.write_text(gold.read_text() + "b\n")
    found = coarsewsd.measure(Reader(two_senses(), most=4), str(tmp_path))
    assert found.more["left out"] == 1
    assert found.score == 1.0


def test_without_a_dictionary_there_are_only_baselines(tmp_path: Path) -> None:
    rows = [("w1", "a"), ("w2", "b")]
    write_contexts(tmp_path, "word", rows, rows)
    found = coarsewsd.measure(Reader(None), str(tmp_path))
    assert found.metric == "gold centroids"
    assert "accuracy" not in found.more


@pytest.mark.parametrize(
    ("line", "gold", "told"),
    [("x\ta b", "a", "position"), ("2\ta b", "a", "position"), ("0 a b", "a", "position"), ("0\ta", "a\nb", "2 gold")],
)
def test_contexts_that_do_not_fit_are_refused(line: str, gold: str, told: str, tmp_path: Path) -> None:
    write_contexts(tmp_path, "word", [], [])
    (tmp_path / "word" / "train.data.txt").write_text(line + "\n")
    (tmp_path / "word" / "train.gold.txt").write_text(gold + "\n")
    with pytest.raises(BadInput, match=told):
        coarsewsd.measure(Reader(two_senses()), str(tmp_path))


def test_a_folder_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="CoarseWSD"):
        coarsewsd.words(str(tmp_path))


@pytest.fixture
def worded(tmp_path: Path) -> SenseDictionary:
    """A dictionary of `bank` (along x, and along y), `river` (along y), `un` and `##ban` (z, x)."""
    folder = tmp_path / "worded"
    built = with_tokenizer(word_piece(), folder, [0, 0, 2, 1, 0, 1, 1, 0])
    import torch

    from msense.dictionary import write_dictionary

    senses = torch.tensor([[9.0, 0, 0], [0, 2.0, 0], [0, 5.0, 0], [0, 0, 4.0], [6.0, 0, 0]])
    counts = np.array([3, 1, 1, 1, 1])
    config = built.config.model_copy(update={"dtype": "float32"})
    write_dictionary(folder, config, built.offsets, counts, built.spread, built.token_counts, [senses])
    return SenseDictionary.load(folder)


@dataclass
class Worded:
    dictionary: SenseDictionary | None

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(t), 1.0] for t in texts], np.float32)


def test_words_are_as_like_as_their_best_senses(worded: SenseDictionary) -> None:
    words = wordsim._Words(worded)
    bank, river, several = words("bank"), words("river"), words("unban")
    assert bank is not None
    assert river is not None
    assert several is not None
    assert (bank.senses @ river.senses.T).max() == 1.0
    assert (bank.senses @ river.senses.T).mean() == 0.5
    mean = np.array([27.0, 2.0, 0])  # of its four points
    np.testing.assert_allclose(bank.mean, mean / np.linalg.norm(mean), rtol=1e-6)
    np.testing.assert_allclose(several.senses, [[0.6 / np.hypot(0.6, 0.4), 0, 0.4 / np.hypot(0.6, 0.4)]], rtol=1e-6)
    assert words("bankriver") is None
    assert words("rivers") is None  # ##s has no senses
    assert words("zebra") is None  # unknown


def test_missing_words_are_counted_and_sets_weighted(worded: SenseDictionary, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "one.txt").write_text("bank river 9\nbank unban 8\nriver unban 1\nbank zzz 5\n")
    (folder / "two.txt").write_text("river unban\t7\nbank river\t3\n")
    found = wordsim.measure(Worded(worded), str(folder))
    assert found.names == ["one", "two"]
    assert found.weights == [3.0, 2.0]
    assert (found.more["pairs"], found.more["missing"]) == (6, 1)
    assert found.values == [pytest.approx(1.0), pytest.approx(-1.0)]
    assert found.score == pytest.approx(0.2)
    alone = wordsim.measure(Worded(None), str(folder))
    assert alone.metric == "Spearman, as texts"
    assert alone.more["missing"] == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [("bank river", "line 1"), ("a b c\n", "line 1"), ("a b nan\n", "line 1"), (None, r"holds no \*\.txt")],
)
def test_sets_that_cannot_be_read_are_refused(text: str | None, told: str, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("x")
    if text is not None:
        (tmp_path / "set.txt").write_text(text)
    with pytest.raises(BadInput, match=told):
        wordsim.read_sets(str(tmp_path))


@pytest.fixture(scope="module")
def built(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary of the small teacher, in a folder."""
    folder = tmp_path_factory.mktemp("built") / "dictionary"
    dictionary_of(teacher, temperature_unit=20.0, max_length=24).save(folder)
    write_tokenizer(folder, describe(str(teacher), BuildConfig())[1].to_str())
    return folder


def spec(teacher: Path, kind: str, **told: object) -> Spec:
    return Spec(kind, kind, teacher=str(teacher), dtype="float32", **told)  # type: ignore[arg-type]


def test_a_replaced_teacher_is_pooled_of_senses(teacher: Path, built: Path) -> None:
    plain = make_model(spec(teacher, "teacher"), "cpu", 1)
    hard = make_model(spec(teacher, "replaced", source=str(built), replace="hard"), "cpu", 1)
    soft = make_model(spec(teacher, "replaced", source=str(built), replace="soft", temperature=0.5), "cpu", 1)
    read, dictionary = plain.read(TEXTS), SenseDictionary.load(built)
    for model, temperature in ((hard, None), (soft, 0.5)):
        senses = dictionary.replace(read.ids, read.hidden, temperature)
        import torch

        wanted = pool_rows(torch.from_numpy(senses), torch.from_numpy(np.diff(read.offsets)), "mean", normalize=False)
        np.testing.assert_allclose(model.encode(TEXTS), wanted.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(model.read(TEXTS).senses, read.hidden)
    assert not np.allclose(hard.encode(TEXTS), plain.encode(TEXTS))
    assert hard.tokens(TEXTS) == len(read.ids)
    assert hard.parameters() == plain.parameters() > 0


def test_a_truncated_teacher_has_fewer_layers(teacher: Path) -> None:
    whole, one = (make_model(spec(teacher, kind, layers=n), "cpu", 1) for kind, n in (("teacher", 0), ("truncated", 1)))
    assert one.parameters() < whole.parameters()
    assert not np.allclose(one.encode(TEXTS), whole.encode(TEXTS))
    with pytest.raises(BadInput, match="2 layers"):
        make_model(spec(teacher, "truncated", layers=3), "cpu", 1)


def test_tokens_know_their_place_in_the_text(teacher: Path) -> None:
    read = make_model(spec(teacher, "teacher"), "cpu", 1).read(TEXTS)
    spans = read.spans[read.offsets[0] : read.offsets[1]].tolist()
    assert [TEXTS[0][a:b] for a, b in spans] == ["", "the", "river", "bank", ""]


def test_a_dictionary_of_another_teacher_is_refused(built: Path, make_teacher: object) -> None:
    other = make_teacher("roberta")  # type: ignore[operator]
    with pytest.raises(BadInput, match="is not the dictionary's"):
        make_model(spec(other, "replaced", source=str(built), replace="hard"), "cpu", 1)


def test_a_student_reads_as_its_encoder_does(shipped_student: tuple, teacher: Path) -> None:
    encoder, student, dictionary, folder = shipped_student
    model = make_model(spec(teacher, "student", source=str(folder)), "cpu", 1)
    np.testing.assert_allclose(model.encode(TEXTS), encoder.encode(TEXTS), rtol=1e-5, atol=1e-5)
    read = model.read(TEXTS)
    told = [token.sense for token in encoder.tokens(TEXTS[1])]
    own = slice(read.offsets[1] + 1, read.offsets[2] - 1)
    assert model.dictionary is not None
    assert model.dictionary.assign(read.ids[own], read.senses[own]).tolist() == told
    hard = make_model(spec(teacher, "student", source=str(folder), replace="hard"), "cpu", 1)
    np.testing.assert_array_equal(hard.read(TEXTS).hidden, dictionary.replace(read.ids, read.senses))
    assert model.parameters() == sum(p.numel() for p in student.parameters())


def test_a_teacher_is_its_own_equal_token_by_token(teacher: Path, built: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    plain = make_model(spec(teacher, "teacher"), "cpu", 1)
    assert tokens.measure(plain, plain, str(tmp_path)).score == pytest.approx(1.0)
    hard = make_model(spec(teacher, "replaced", source=str(built), replace="hard"), "cpu", 1)
    found = tokens.measure(hard, plain, str(tmp_path))
    assert found.score < 0.99
    assert found.more[tokens.SENSES] == 1.0
    assert found.more[tokens.FREQUENT] < 1.0
    read = plain.read(TEXTS)
    replaced = SenseDictionary.load(built).replace(read.ids, read.hidden)
    cosines = (replaced * read.hidden).sum(1) / np.linalg.norm(replaced, axis=1) / np.linalg.norm(read.hidden, axis=1)
    assert found.score == pytest.approx(cosines.mean(), rel=1e-5)


def test_models_that_cut_texts_differently_are_not_compared(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the bank")
    plain = make_model(spec(teacher, "teacher"), "cpu", 1)
    with pytest.raises(BadInput, match="same tokens"):
        tokens.measure(Reader(make([0, 1, 2, 3])), plain, str(tmp_path))


def test_an_encoder_of_sentence_transformers_is_one_model_more(make_teacher: object) -> None:
    folder = make_teacher("bert", pooling="mean_tokens")  # type: ignore[operator]
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "word_embedding_dimension": 16}))
    ours = make_model(spec(folder, "teacher"), "cpu", 1)
    theirs = make_model(spec(folder, "encoder", source=str(folder)), "cpu", 1)
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), rtol=1e-4, atol=1e-5)
    assert theirs.parameters() > 0
    assert {path.name for path in theirs.files()} >= {"model.safetensors", "config.json"}
    with pytest.raises(BadInput, match="no/such"):
        make_model(spec(folder, "encoder", source="./no/such"), "cpu", 1)


PEER = """
import sys, types, pathlib, numpy as np

class StaticModel:
    embedding = np.zeros((5, 2))
    def save_pretrained(self, folder):
        pathlib.Path(folder).mkdir(); pathlib.Path(folder, "model.safetensors").write_text("x" * 7)
    @classmethod
    def from_pretrained(cls, folder):
        return cls()
    def encode(self, texts):
        print("a library's own words")
        if "die" in texts:
            sys.exit(3)
        return np.array([[len(text), 1] for text in texts])
"""


def _python_with_model2vec(folder: Path) -> str:
    package = folder / "model2vec"
    package.mkdir()
    (package / "__init__.py").write_text(PEER)
    (package / "distill.py").write_text(
        "from model2vec import StaticModel\ndef distill(model_name): return StaticModel()\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_model2vec_works_in_a_python_of_its_own(teacher: Path, tmp_path: Path) -> None:
    python = _python_with_model2vec(tmp_path)
    with opened(spec(teacher, "model2vec", python=python), "cpu", 1) as model:
        assert model.encode(["ab", "ü"]).tolist() == [[2.0, 1.0], [1.0, 1.0]]
        assert model.encode(["abc"]).dtype == np.float32
        assert model.parameters() == 10
        assert sum(path.stat().st_size for path in model.files()) == 7
        assert 0 < model.seconds < 5
        assert model.peak_memory > 1e6
        process = model._peer._process
        with pytest.raises(MsenseError, match="ended with code 3"):
            model.encode(["die"])
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("python", "told", "kind"),
    [
        (None, "not installed.*--model2vec-python", BadInput),
        ("/no/such/python", "cannot be run", BadInput),
        (sys.executable, "ended with code 1 .* said .*No module named", MsenseError),
    ],
)
def test_a_python_without_model2vec_is_told(python: str | None, told: str, kind: type, teacher: Path) -> None:
    with pytest.raises(kind, match=told):
        make_model(spec(teacher, "model2vec", python=python), "cpu", 1)


def test_specs_travel_with_their_settings() -> None:
    assert replace(parse_model("replaced:/d"), teacher="t").teacher == "t"
