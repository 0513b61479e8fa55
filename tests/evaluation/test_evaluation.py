"""Parsing of models and tasks, labelled data, and every task on models with known answers."""

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from re import finditer

import numpy as np
import pandas as pd
import pytest
import torch
from students import dictionary_of
from task_data import Encoder, write_contexts, write_task
from tiny import make, with_tokenizer, word_piece

from msense import SenseDictionary
from msense.corpus.labelled import read_labelled
from msense.dictionary import write_dictionary
from msense.dictionary.format import write_tokenizer
from msense.errors import InputError, MsenseError
from msense.evaluation.cache_keys import model_key
from msense.evaluation.models import Model, TokenEmbeddings, make_model, open_model
from msense.evaluation.spec import Spec, TaskSpec, check_names, parse_model, parse_task
from msense.evaluation.tasks import coarsewsd, tokens, wordsim
from msense.teacher.pooling import pool_rows
from msense.teacher.spec import TeacherOptions, load_teacher_info

PLAIN = Spec("reader", "replaced", replace=None)
TEXTS = ["the river bank", "a cat sat on the mat", "money money", "is near"]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("model2vec", Spec("model2vec", "model2vec")),
        ("truncated:2", Spec("truncated:2", "truncated", layers=2)),
        ("replaced:/a/b/c", Spec("replaced:b/c", "replaced", "/a/b/c", replace="soft")),
        ("replaced:/d,hard,dot", Spec("replaced:/d,hard,dot", "replaced", "/d", replace="hard", metric="dot")),
        (
            "soft, K 50=replaced:/d,temperature=0.5",
            Spec("soft, K 50", "replaced", "/d", replace="soft", temperature=0.5),
        ),
        ("student:owner/model", Spec("student:owner/model", "student", "owner/model")),
        ("student:/s,hard", Spec("student:/s,hard", "student", "/s", replace="hard")),
        ("bm25", Spec("bm25", "bm25")),
        ("words=bm25,german", Spec("words", "bm25", stemmer="german")),
        ("owner/model", Spec("owner/model", "encoder", "owner/model")),
        ("banking77=/d/b", TaskSpec("banking77", "classification", "/d/b")),
        ("classifier:sst2", TaskSpec("sst2", "classifier", "")),
        ("mteb:Banking77", TaskSpec("Banking77", "mteb", "")),
        ("retrieval:x=/d", TaskSpec("x", "retrieval", "/d")),
        ("similarity:x=/d,split=dev", TaskSpec("x", "similarity", "/d", "dev")),
        ("mteb:x=/d", TaskSpec("x", "mteb", "/d")),
        ("mteb:pairs:x=hf://a/b", TaskSpec("x", "mteb", "hf://a/b", of="pairs")),
        ("x=hf://mteb/banking77", TaskSpec("x", "classification", "hf://mteb/banking77")),
    ],
)
def test_models_and_tasks_are_parsed(word: str, wanted: Spec | TaskSpec) -> None:
    assert (parse_model if isinstance(wanted, Spec) else parse_task)(word) == wanted


@pytest.mark.parametrize(
    ("parse", "word", "message"),
    [
        (parse_model, "truncated:0", "truncated:2"),
        (parse_model, "replaced:", "the folder is missing"),
        (parse_model, "a:b=owner/model", "cannot parse"),
        (parse_model, "", "cannot parse"),
        (parse_model, "replaced:/d,sotf", "unknown option 'sotf'"),
        (parse_model, "student:/s,temperature=0", "temperature=F"),
        (parse_task, "banking77", "NAME=DATA"),
        (parse_task, "glu:x=/d", "unknown kind 'glu'"),
        (parse_task, "mteb:glu:x=/d", "mteb:KIND:NAME=DATA, KIND one of retrieval, similarity, pairs"),
        (parse_task, "mteb:retrieval:NFCorpus", "mteb:KIND:NAME=DATA"),
        (parse_task, "retrieval:x=/d,split=../a", "'../a' is not the name of a split"),
        (lambda word: check_names(["student:/a/s", word], ["s", "s"], "--model"), "student:/b/s", "the same name 's'"),
    ],
)
def test_invalid_models_and_tasks_are_refused(parse: Callable[[str], object], word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(word)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_labelled_texts_are_read_verbatim(form: str, tmp_path: Path) -> None:
    rows = [('a "b",\nc', "1"), ("NA", "null"), ("ü", "x y")]
    data = read_labelled(write_task(tmp_path / "d", {"train": rows}, form), "train")
    assert list(zip(data.first, data.labels.tolist(), strict=True)) == rows
    pd.DataFrame({"text": ["a", "b"], "label": [3, 1]}).to_parquet(tmp_path / "test-0001.parquet")
    assert read_labelled(str(tmp_path), "test").labels.tolist() == ["3", "1"]  # numbers become text


def test_whole_numbers_are_the_same_label_in_any_form(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text('{"text": "a", "label": 1}\n{"text": 2.0, "label": 0}\n')
    (tmp_path / "train-1.jsonl").write_text('{"text": "b", "label": 1.0}\n{"text": "c", "label": 0.5}\n')
    data = read_labelled(str(tmp_path), "train")
    assert data.labels.tolist() == ["1", "0", "1", "0.5"]
    assert data.first == ["a", "2.0", "b", "c"]


def test_labelled_texts_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b"text,label\na,x\n"))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b", "label": "y"}\n'))
    assert [read_labelled(str(tmp_path), part).first for part in ("train", "test")] == [["a"], ["b"]]


LABELLED_FAULTS = [
    (lambda f: None, r"has no train\.csv, .*; it has other\.txt"),
    (lambda f: (f / "train.csv").write_text("text,tag\na,b\n"), "no column 'label'.*'text', 'tag'"),
    (lambda f: (f / "train.csv").write_text("text,label\n"), "is empty"),
    (lambda f: (f / "train.csv").write_text('text,label\n"a'), "cannot be read as csv"),
    (lambda f: (f / "train.csv").write_text("text,label\na,b,\n"), "row 0 .*fields"),
    (lambda f: (f / "train.csv").write_text("text,label\na,\n"), "row 0 .*text or label"),
    (lambda f: (f / "training_notes.csv").write_text("text,label\na,b\n"), r"no train\.csv, .*training_notes\.csv"),
    (lambda f: (f / "train.csv").write_text("text;label\na, b;c\n"), "cells are separated by ';', not by commas"),
    (lambda f: (f / "train.csv").write_text("text\tlabel\na\tc\n"), r"cells are separated by '\\t'"),
    (lambda f: [write_task(f / n, {"train": [("a", "b")]}) for n in ("x", "y")], "several formats or folders"),
    (lambda f: (f / "train.parquet").write_text("no"), "cannot be read as parquet"),
    (lambda f: (f / "train.jsonl").write_text('{"text": "a"}\n{"text": null, "label": 1}\n'), "row 0 .*text or label"),
]


@pytest.mark.parametrize(("prepare", "message"), LABELLED_FAULTS)
def test_invalid_labelled_texts_are_refused(prepare: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x")
    prepare(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        read_labelled(str(tmp_path), "train")


def test_unreachable_hub_names_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def ls(self, *_: object, **__: object) -> list:
            raise OSError("no network")

    monkeypatch.setattr("msense.corpus.files.hub_filesystem", Gone)
    with pytest.raises(InputError, match=r"hf download --repo-type dataset mteb/banking77 --local-dir DIR"):
        read_labelled("hf://mteb/banking77", "train")


@dataclass
class Reader:
    """Reads one token per word between [CLS] and [SEP]; a word's last character decides the side of its embedding."""

    dictionary: SenseDictionary | None
    spec: Spec = PLAIN
    most: int = 99

    def read(self, texts: list[str]) -> TokenEmbeddings:
        rows: list[tuple[int, int, int, float]] = []  # id, span, side
        offsets = [0]
        for text in texts:
            words = [
                (word.start(), word.end(), 10.0 if word[0].endswith("1") else -10.0) for word in finditer(r"\S+", text)
            ]
            rows += [(1, 0, 0, 0.0), *((2, *word) for word in words[: self.most]), (3, 0, 0, 0.0)]
            offsets.append(len(rows))
        ids, starts, ends, sides = map(np.array, zip(*rows, strict=True))
        embeddings = np.stack([sides, 0 * sides, 0 * sides], axis=1).astype(np.float32)
        return TokenEmbeddings(ids, np.array(offsets), np.stack([starts, ends], axis=1), embeddings, embeddings)


@pytest.fixture(scope="module")
def two_senses() -> SenseDictionary:
    """Token 2 has a sense on each side, and one that is near to nothing."""
    rng = np.random.default_rng(0)
    sides = np.repeat([[10.0, 0, 0], [-10.0, 0, 0]], 50, axis=0)
    points = np.concatenate([sides, np.full((20, 3), 90.0)]) + rng.normal(0, 0.01, (120, 3))
    return SenseDictionary.from_embeddings(np.full(120, 2), points.astype(np.float32), k=3, vocab_size=4)


def test_senses_take_the_majority_label_of_training_contexts(two_senses: SenseDictionary, tmp_path: Path) -> None:
    train = [("w1", "a")] * 3 + [("w1", "b")] + [("w2", "b")] * 5
    write_contexts(tmp_path / "a", "word", train, [("w1", "a"), ("w1", "b"), ("w2", "b"), ("w2", "b")])
    result = coarsewsd.measure(Reader(two_senses), str(tmp_path / "a"))
    assert (result.metric, result.names, result.values) == ("accuracy", ["word"], [0.75])
    assert result.more["most frequent"] == result.more["gold centroids"] == 0.75
    assert 0 < result.more["V-measure"] < 1
    assert result.more["left out"] == 0
    write_contexts(tmp_path / "b", "word", [("w1", "a")] * 3, [("w2", "a"), ("w2", "b")])
    assert coarsewsd.measure(Reader(two_senses), str(tmp_path / "b")).score == 0.5  # w2 takes the most frequent label
    rows = [("w1", "a"), ("w2", "b")] * 4  # senses equal gold senses
    write_contexts(tmp_path / "c", "word", rows, rows)
    result = coarsewsd.measure(Reader(two_senses), str(tmp_path / "c"))
    assert result.score == result.more["ARI"] == result.more["V-measure"] == result.more["gold centroids"] == 1.0
    assert result.more["most frequent"] == 0.5
    write_contexts(tmp_path / "d", "word", [("w1", "a")] * 3 + [("w1", "b")], [("w1", "b")] * 3 + [("w1", "a")])
    assert (
        coarsewsd.measure(Reader(two_senses), str(tmp_path / "d")).more["most frequent"] == 0.25
    )  # of the training set
    baselines = coarsewsd.measure(Reader(None), str(tmp_path / "c"))  # without a dictionary
    assert baselines.metric == "gold centroids"
    assert "accuracy" not in baselines.more


def test_contexts_truncated_before_the_word_are_left_out(two_senses: SenseDictionary, tmp_path: Path) -> None:
    write_contexts(tmp_path, "word", [("w1", "a"), ("w2", "b")], [("w1", "a")])
    for name, line in (("train.data.txt", "5\t0 1 2 3 4 w1\n"), ("train.gold.txt", "b\n")):
        with (tmp_path / "word" / name).open("a") as file:
            file.write(line)
    result = coarsewsd.measure(Reader(two_senses, most=4), str(tmp_path))
    assert (result.more["left out"], result.score) == (1, 1.0)


@pytest.fixture
def worded(tmp_path: Path) -> SenseDictionary:
    """A dictionary of `bank` (along x, and along y), `river` (along y), `un` and `##ban` (z, x)."""
    folder = tmp_path / "worded"
    built = with_tokenizer(word_piece(), folder, [0, 0, 2, 1, 0, 1, 1, 0])
    senses = torch.tensor([[9.0, 0, 0], [0, 2.0, 0], [0, 5.0, 0], [0, 0, 4.0], [6.0, 0, 0]])
    counts = np.array([3, 1, 1, 1, 1])
    config = built.config.model_copy(update={"dtype": "float32"})
    write_dictionary(folder, config, built.offsets, counts, built.rms_distance, built.token_counts, [senses])
    return SenseDictionary.load(folder)


def test_words_are_looked_up_with_all_their_senses(worded: SenseDictionary) -> None:
    look_up = wordsim._lookup_of(worded)
    bank, river, several = look_up("bank"), look_up("river"), look_up("unban")
    assert (bank.senses @ river.senses.T).max() == 1.0
    assert (bank.senses @ river.senses.T).mean() == 0.5
    mean = np.array([27.0, 2.0, 0])  # of its four occurrences
    np.testing.assert_allclose(bank.mean, mean / np.linalg.norm(mean), rtol=1e-6)
    np.testing.assert_allclose(several.senses, [[0.6 / np.hypot(0.6, 0.4), 0, 0.4 / np.hypot(0.6, 0.4)]], rtol=1e-6)
    assert [look_up(word) for word in ("bankriver", "rivers", "zebra")] == [None] * 3  # ##s has no senses


def test_missing_words_are_counted_and_sets_weighted(worded: SenseDictionary, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "one.txt").write_text("bank river 9\nbank unban 8\nriver unban 1\nbank zzz 5\n")
    (folder / "two.txt").write_text("river unban\t7\nbank river\t3\n")
    result = wordsim.measure(Encoder(lambda text: [len(text), 1], worded), str(folder))
    assert (result.names, result.weights) == (["one", "two"], [3.0, 2.0])
    assert (result.more["pairs"], result.more["missing"]) == (6, 1)
    assert result.values == [pytest.approx(1.0), pytest.approx(-1.0)]
    assert result.score == pytest.approx(0.2)
    as_texts = wordsim.measure(Encoder(lambda text: [len(text), 1]), str(folder))
    assert (as_texts.metric, as_texts.more["missing"]) == ("Spearman, as texts", 0)


def read_word(source: str) -> object:
    return coarsewsd.read_contexts(source, "word", "train")


@pytest.mark.parametrize(
    ("read", "texts", "message"),
    [
        *((read_word, (line, "a"), "position") for line in ("x\ta b", "2\ta b", "0 a b")),
        (read_word, ("0\ta", "a\nb"), "2 gold"),
        (coarsewsd.words, (), "CoarseWSD"),
        *((wordsim.read_sets, (line,), "line 1") for line in ("bank river", "a b c\n", "a b nan\n")),
        (wordsim.read_sets, (), r"contains no \*\.txt"),
    ],
)
def test_invalid_contexts_and_word_pairs_are_refused(
    read: Callable[[str], object], texts: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("x")
    (tmp_path / "word").mkdir()
    for name, text in zip(("word/train.data.txt", "word/train.gold.txt"), texts, strict=False):
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read(str(tmp_path))


@pytest.fixture(scope="module")
def built(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dictionary of the small teacher."""
    folder = tmp_path_factory.mktemp("built") / "dictionary"
    dictionary_of(teacher, temperature_unit=20.0, max_length=24).save(folder)
    write_tokenizer(folder, load_teacher_info(str(teacher), TeacherOptions())[1].to_str())
    return folder


def load(teacher: Path, kind: str, **settings: object) -> Model:
    return make_model(Spec(kind, kind, teacher=str(teacher), dtype="float32", **settings), "cpu", 1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(teacher: Path) -> Model:
    return load(teacher, "teacher")


@pytest.fixture(scope="module")
def hard(teacher: Path, built: Path) -> Model:
    return load(teacher, "replaced", source=str(built), replace="hard")


def test_a_replaced_teacher_pools_senses(teacher: Path, built: Path, plain: Model, hard: Model) -> None:
    soft = load(teacher, "replaced", source=str(built), replace="soft", temperature=0.5)
    read, dictionary = plain.read(TEXTS), SenseDictionary.load(built)
    for model, temperature in ((hard, None), (soft, 0.5)):
        senses = torch.from_numpy(dictionary.replace(read.ids, read.hidden, temperature))
        wanted = pool_rows(senses, torch.from_numpy(np.diff(read.offsets)), "mean", normalize=False)
        np.testing.assert_allclose(model.encode(TEXTS), wanted.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(model.read(TEXTS).senses, read.hidden)
    assert not np.allclose(hard.encode(TEXTS), plain.encode(TEXTS))
    assert hard.tokens(TEXTS) == len(read.ids)
    assert hard.parameters() == plain.parameters() > 0
    first = read.spans[read.offsets[0] : read.offsets[1]].tolist()
    assert [TEXTS[0][a:b] for a, b in first] == ["", "the", "river", "bank", ""]


def test_truncated_and_unfitting_teachers(teacher: Path, built: Path, plain: Model, make_teacher: Callable) -> None:
    one = load(teacher, "truncated", layers=1)
    assert one.parameters() < plain.parameters()
    assert not np.allclose(one.encode(TEXTS), plain.encode(TEXTS))
    with pytest.raises(InputError, match="2 layers"):
        load(teacher, "truncated", layers=3)
    with pytest.raises(InputError, match="is not the dictionary's, which has teacher"):
        load(make_teacher("roberta"), "replaced", source=str(built), replace="hard")


def test_a_student_reads_as_its_encoder_does(shipped_student: tuple, teacher: Path) -> None:
    encoder, student, dictionary, folder = shipped_student
    model = load(teacher, "student", source=str(folder))
    np.testing.assert_allclose(model.encode(TEXTS), encoder.encode(TEXTS), rtol=1e-5, atol=1e-5)
    read = model.read(TEXTS)
    senses = [token.sense for token in encoder.tokens(TEXTS[1])]
    own = slice(read.offsets[1] + 1, read.offsets[2] - 1)
    assert model.dictionary is not None
    assert model.dictionary.assign(read.ids[own], read.senses[own]).tolist() == senses
    replaced = load(teacher, "student", source=str(folder), replace="hard")
    np.testing.assert_array_equal(replaced.read(TEXTS).hidden, dictionary.replace(read.ids, read.senses))
    assert model.parameters() == sum(p.numel() for p in student.parameters())


def test_tokens_are_compared_with_the_teacher(built: Path, plain: Model, hard: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    assert tokens.measure(plain, plain, str(tmp_path)).score == pytest.approx(1.0)
    result = tokens.measure(hard, plain, str(tmp_path))
    assert result.more[tokens.SENSES] == 1.0
    assert result.more[tokens.FREQUENT] < 1.0
    read = plain.read(TEXTS)
    replaced = SenseDictionary.load(built).replace(read.ids, read.hidden)
    cosines = (replaced * read.hidden).sum(1) / np.linalg.norm(replaced, axis=1) / np.linalg.norm(read.hidden, axis=1)
    assert result.score == pytest.approx(cosines.mean(), rel=1e-5)
    assert result.score < 0.99
    with pytest.raises(InputError, match="different tokens"):
        tokens.measure(Reader(make([0, 1, 2, 3])), plain, str(tmp_path))


def test_a_sentence_transformers_model_is_loaded(make_teacher: object) -> None:
    folder = make_teacher("bert", pooling="mean_tokens")  # type: ignore[operator]
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "word_embedding_dimension": 16}))
    ours, theirs = load(folder, "teacher"), load(folder, "encoder", source=str(folder))
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), rtol=1e-4, atol=1e-5)
    assert {path.name for path in theirs.files()} >= {"model.safetensors", "config.json"}
    with pytest.raises(InputError, match="no/such"):
        load(folder, "encoder", source="./no/such")


PEER = """
import sys, pathlib, numpy as np

class StaticModel:
    embedding = np.zeros((5, 2))
    def save_pretrained(self, folder):
        pathlib.Path(folder).mkdir(); pathlib.Path(folder, "model.safetensors").write_text("x" * 7)
    def from_pretrained(folder):
        return StaticModel()
    def encode(self, texts):
        print("output of a library")
        if "die" in texts:
            sys.exit(3)
        return np.array([[len(text), 1] for text in texts])

sys.modules["model2vec.distill"] = sys.modules["model2vec"]
distill = lambda model_name: StaticModel()
"""


def _python_with_model2vec(folder: Path) -> str:
    (folder / "model2vec.py").write_text(PEER)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_model2vec_runs_in_a_separate_python(teacher: Path, tmp_path: Path) -> None:
    spec = Spec("m", "model2vec", teacher=str(teacher), python=_python_with_model2vec(tmp_path))
    with open_model(spec, "cpu", 1) as model:
        assert model.encode(["ab", "ü"]).tolist() == [[2.0, 1.0], [1.0, 1.0]]
        assert model.parameters() == 10
        assert sum(path.stat().st_size for path in model.files()) == 7
        assert 0 < model.seconds < 5
        assert model.peak_memory > 1e6
        process = model._process
        with pytest.raises(MsenseError, match="exited with code 3"):
            model.encode(["die"])
    assert process.poll() is not None


def test_a_python_without_model2vec_is_refused(teacher: Path) -> None:
    with pytest.raises(InputError, match="cannot run"):
        load(teacher, "model2vec", python="/no/such/python")
    with pytest.raises(MsenseError, match=r"exited with code 1 .*No module named.*--model2vec-python"):
        load(teacher, "model2vec")


def test_what_is_clearly_no_model_of_sentence_transformers_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"type": "msense.sentence_module.SenseModule"}]')
    (tmp_path / "results.json").write_text("{}")
    for source, match in (
        (str(tmp_path / "none"), "no such folder; give a folder or a hub name"),
        (str(tmp_path / "results.json"), "no such folder"),
        (str(tmp_path), "is a student of msense: use student:"),
    ):
        with pytest.raises(InputError, match=match):
            model_key(parse_model(source))
