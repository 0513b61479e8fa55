"""Retrieval: data in the layout of BEIR, and metrics by msense and by mteb on models with known vectors."""

import gzip
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from task_data import Encoder

from msense.errors import InputError
from msense.evaluation.models import SentenceModel, encode_as
from msense.evaluation.result import Result
from msense.evaluation.search import Bm25
from msense.evaluation.spec import Spec, TaskSpec
from msense.evaluation.tasks import mteb, mteb_vectors, retrieval
from msense.evaluation.tasks.beir import read_retrieval

Judged = Sequence[tuple[object, object, object]]
ANGLES = {"zero": 0.0, "one": 0.1, "two": 0.2, "three": 0.3, "half": 1.5}
DOCUMENTS = [
    {"_id": "d0", "title": "", "text": "zero"},
    {"_id": "d1", "text": "one", "metadata": {"url": "x"}},
    {"_id": 2, "title": "two", "text": ""},
    {"_id": "d3", "title": None, "text": "three"},
]
QUERIES = [{"_id": 7, "text": "zero"}, {"_id": "q2", "text": "half"}, {"_id": "unjudged", "text": "one"}]
JUDGED = [(7, "d1", 2), (7, "d3", 1), (7, 2, 0), ("q2", "d3", 1)]


def by_angle(text: str) -> list[float]:
    """Return a vector whose cosine with others falls with the difference of their angles."""
    angle = ANGLES.get(text, 3.0)
    return [math.cos(angle), math.sin(angle)]


def lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tsv(judged: Judged) -> str:
    rows = [("query-id", "corpus-id", "score"), *judged]
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def write(folder: Path, **texts: str) -> str:
    """Write the three files of a small set, or others in their place; return the folder."""
    files = {"corpus.jsonl": lines(DOCUMENTS), "queries.jsonl": lines(QUERIES), "qrels.tsv": tsv(JUDGED)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        files | {f"{name}.{'tsv' if name == 'qrels' else 'jsonl'}": own for name, own in texts.items()}
    ).items():
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def by_mteb(model: Encoder, source: str) -> Result:
    return mteb_vectors.measure(model, TaskSpec("own: a|b", "mteb", source, of="retrieval"), None)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "data")


def test_titles_ids_and_judgements_are_read(data: str) -> None:
    own = read_retrieval(data)
    assert dict(zip(own.document_ids, own.documents, strict=True)) == {
        "d0": "zero",
        "d1": "one",
        "2": "two",
        "d3": "three",
    }
    assert dict(zip(own.query_ids, own.queries, strict=True)) == {"7": "zero", "q2": "half"}
    assert own.judgements == {"7": {"d1": 2, "d3": 1, "2": 0}, "q2": {"d3": 1}}


def test_graded_judgements_are_scored_per_query(data: str) -> None:
    model = Encoder(by_angle)
    dense, fused = retrieval.measure(model, data, "test", Bm25())
    # query 7 finds d0, d1 (2), 2 (0), d3 (1); q2 finds d3 (1) first
    ndcg = (2 / math.log2(3) + 1 / math.log2(5)) / (2 + 1 / math.log2(3))
    assert (dense.metric, dense.over, dense.names) == ("nDCG@10", "queries", ["7", "q2"])
    assert dense.values == [pytest.approx(ndcg), 1.0]
    assert dense.more == {"recall@100": 1.0, "MRR@10": 0.75}
    assert (fused.names, fused.metric) == (dense.names, dense.metric)
    (lexical,) = retrieval.measure(Bm25(), data, "test", Bm25())
    assert lexical.values == [0.0, 0.0]  # "zero" is in d0 alone, "half" in none


def test_fusion_combines_what_either_finds(tmp_path: Path) -> None:
    texts = {"9": "no words", "1": "the key", "2": "drei"}
    corpus, queries = (
        lines([{"_id": i, "text": text} for i, text in texts.items()]),
        lines([{"_id": "q", "text": "key three"}]),
    )
    source = write(tmp_path, corpus=corpus, queries=queries, qrels=tsv([("q", 1, 1), ("q", 2, 1)]))
    model = Encoder(lambda text: [1.0, "drei" in text or "three" in text])
    dense, fused = retrieval.measure(model, source, "test", Bm25())
    (lexical,) = retrieval.measure(Bm25(), source, "test", Bm25())
    best = 1 + 1 / math.log2(3)
    assert (dense.score, lexical.score) == (pytest.approx(1.5 / best), pytest.approx(1 / best))
    assert fused.score == pytest.approx(1.0)


def test_mteb_has_the_same_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [f"text {i // 2}" for i in range(150)]  # pairs of equal documents, so that scores are equal
    documents = [{"_id": f"d{i}", "title": "a" if i % 3 else "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": i, "text": f"query {i}"} for i in range(30)]
    judged = [(i, f"d{d}", int(rng.integers(0, 4))) for i in range(25) for d in rng.permutation(150)[:12]]
    judged += [(25, "d0", 0), (26, "gone", 1), ("gone", "d0", 1)]  # 25 has no relevant document; 27 to 29 no judgement
    source = write(tmp_path, corpus=lines(documents), queries=lines(queries), qrels=tsv(judged))

    def noise(text: str) -> np.ndarray:
        return np.random.default_rng(list(text.encode())).normal(size=4)

    ours = retrieval.measure(Encoder(noise), source, "test", Bm25())[0]
    theirs = by_mteb(Encoder(noise), source)
    assert 0.02 < ours.score < 0.5
    assert len(ours.values) == 26
    assert ours.names is not None
    assert theirs.names is not None
    by_name = dict(zip([name.rpartition("/")[2] for name in theirs.names], theirs.values, strict=True))
    assert by_name == pytest.approx(dict(zip(ours.names, ours.values, strict=True)))
    assert by_name["25"] == 0.0
    assert theirs.more == pytest.approx(ours.more, abs=1e-4)
    assert (theirs.metric, theirs.over) == (ours.metric, ours.over)


def test_queries_and_documents_have_their_own_prompts(data: str) -> None:
    class Asymmetric(Encoder):
        def encode_query(self, texts: Sequence[str]) -> np.ndarray:
            return self.encode([f"query: {text}" for text in texts])

        def encode_document(self, texts: Sequence[str]) -> np.ndarray:
            return self.encode([f"document: {text}" for text in texts])

    for measure in (by_mteb, lambda model, source: retrieval.measure(model, source, "test", Bm25())):
        model = Asymmetric(lambda text: by_angle(text.rpartition(" ")[2]))
        measure(model, data)
        assert sorted(text for texts in model.encoded for text in texts) == [
            *(f"document: {text}" for text in ("one", "three", "two", "zero")),
            "query: half",
            "query: zero",
        ]


def test_sentence_transformers_add_their_prompts(make_teacher: Callable[..., Path]) -> None:
    folder = make_teacher("bert", pooling="mean_tokens", prompt="the cat ")  # for queries, and the default
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "word_embedding_dimension": 16}))
    model = SentenceModel(Spec("e", "encoder", str(folder)), "cpu")
    query, document = (encode_as(model, role, ["sat"]) for role in ("query", "document"))
    np.testing.assert_allclose(query, model.model.encode(["the cat sat"], prompt=""), atol=1e-6)
    np.testing.assert_allclose(document, model.model.encode(["sat"], prompt=""), atol=1e-6)
    assert not np.allclose(query, document)


@pytest.mark.parametrize("layout", ["compressed", "split", "tables", "no header", "other order", "quotes", "TREC"])
def test_files_may_be_compressed_split_or_tables(layout: str, data: str, tmp_path: Path) -> None:
    wanted, folder = read_retrieval(data), Path(data)
    split = "dev" if layout == "split" else "test"
    match layout:
        case "compressed":
            for path in list(folder.iterdir()):
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
        case "split":
            (folder / "qrels").mkdir()
            (folder / "qrels.tsv").rename(folder / "qrels" / "dev.tsv")
            (folder / "qrels" / "test.tsv").write_text(tsv([(7, "d0", 1)]))
            assert read_retrieval(data).judgements == {"7": {"d0": 1}}
        case "tables":
            for name in ("corpus", "queries"):
                table = pd.read_json(folder / f"{name}.jsonl", lines=True, dtype={"_id": str})
                table.drop(columns="metadata", errors="ignore").to_parquet(folder / f"{name}.parquet")
                (folder / f"{name}.jsonl").unlink()
        case "no header":
            (folder / "qrels.tsv").write_text("\n" + tsv(JUDGED).partition("\n")[2].replace("\n", "\r\n"))
        case "other order":
            rows = "".join(f"{document}\t{score}\t{query}\n" for query, document, score in JUDGED)
            (folder / "qrels.tsv").write_text(f"\n\ufeffcorpus-id\tscore\tquery-id\n{rows}")
        case "quotes":
            rows = "".join(f'"{query}"\t"{document}"\t{score}\n' for query, document, score in JUDGED)
            (folder / "qrels.tsv").write_text(f'"Query_ID"\t"Corpus_ID"\t"Score"\n{rows}')
        case "TREC":
            rows = [f"{query} 0 {document}  {score}\n" for query, document, score in JUDGED]
            (folder / "qrels.tsv").write_text("".join([rows[0].replace(" ", "\t").replace("\t\t", "\t"), *rows[1:]]))
    assert read_retrieval(data, split) == wanted


@pytest.mark.parametrize(
    ("prefix", "judged", "split"),
    [
        ("", "org/name/default", "test"),
        ("", "org/name/qrels", "dev"),
        ("", "org/name-qrels/default", "test"),
        ("de-", "org/name/de-qrels", "test"),
    ],
)
def test_datasets_of_the_hub_have_their_layouts(
    prefix: str, judged: str, split: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "msense.corpus.files.hub_filesystem", lambda: DirFileSystem(str(tmp_path / "hub"), LocalFileSystem())
    )

    def put(place: str, own: str, table: pd.DataFrame) -> None:
        dataset, _, config = place.rpartition("/")
        folder = tmp_path / "hub" / "datasets" / f"{dataset}@refs%2Fconvert%2Fparquet" / config / own
        folder.mkdir(parents=True)
        table.to_parquet(folder / "0000.parquet")

    own = read_retrieval(data)
    put(f"org/name/{prefix}corpus", "corpus", pd.DataFrame({"_id": own.document_ids, "text": own.documents}))
    put(f"org/name/{prefix}queries", split, pd.DataFrame({"id": own.query_ids, "text": own.queries}))
    rows = [(query, document, float(score)) for query, of in own.judgements.items() for document, score in of.items()]
    put(judged, split, pd.DataFrame(rows, columns=["query-id", "corpus-id", "score"]))
    assert read_retrieval(f"hf://org/name{':de' if prefix else ''}", split) == own
    with pytest.raises(
        InputError, match=r"no split 'other'.*\n.*judgements in the config default or qrels.*qrels\.tsv"
    ):
        read_retrieval(f"hf://org/name{':de' if prefix else ''}", "other")


def test_judgements_of_unknown_texts_are_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, qrels=tsv([*JUDGED, ("q2", "gone", 1), ("gone", "d0", 1)]))
    with caplog.at_level(logging.WARNING):
        assert read_retrieval(source).judgements["q2"] == {"d3": 1}
    assert "ignoring 2 of 6 judgements, of unknown queries or documents; 2 of 3 queries are left" in caplog.text


def test_numbers_as_texts_are_read_as_text(tmp_path: Path) -> None:
    documents = [{"_id": "a", "title": 1984, "text": "one"}, {"_id": "b", "title": math.nan, "text": 2.5}]
    source = write(tmp_path, corpus=lines(documents), qrels=tsv([(7, "a", 1)]))
    assert read_retrieval(source).documents == ["1984 one", "2.5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "corpus.jsonl").unlink(),
            r"has no corpus\.jsonl .*queries in queries\.jsonl, and judgements in qrels",
        ),
        (lambda f: (f / "queries.jsonl").unlink(), r"has no queries\.jsonl"),
        (lambda f: (f / "qrels.tsv").unlink(), r"has no qrels/test\.tsv or qrels\.tsv"),
        (lambda f: (f / "corpus.jsonl.gz").write_bytes(b""), r"corpus\.jsonl and corpus\.jsonl\.gz: keep one"),
        (
            lambda f: write(f, corpus=lines([*DOCUMENTS, {"_id": "2", "text": "x"}])),
            "line 5: an earlier row has .* id '2'",
        ),
        (lambda f: write(f, corpus=""), r"corpus\.jsonl is empty"),
        (lambda f: write(f, corpus=lines([{"_id": "a", "body": "x"}])), "has no text in a column `text`"),
        (lambda f: write(f, corpus=lines([{"text": "x"}])), "line 1: no id in `_id`"),
        (lambda f: write(f, corpus=lines([{"_id": 1.5, "text": "x"}])), "line 1: no id in `_id`"),
        (lambda f: write(f, corpus=lines([{"_id": "a", "text": ["x"]}])), r"line 1: .* is not UTF-8 text \(a list\)"),
        (lambda f: write(f, corpus='{"_id": "a", "text": "\\ud800"}\n'), "line 1: .* is not UTF-8 text"),
        (lambda f: write(f, queries="\n[]\n"), "line 2: bad JSON"),
        (lambda f: write(f, qrels=tsv([(7, "d1", 0.5)])), r"qrels\.tsv, line 2: not a judgement"),
        (lambda f: write(f, qrels=tsv([(7, "d1", 10**9)])), "line 2: not a judgement"),
        (lambda f: write(f, qrels="7\td1\tx\n7\td2\t1\n"), r"line 1: not a judgement.*a first line of names must be"),
        (lambda f: write(f, qrels="7 d1 1\n"), "line 1: not a judgement"),
        (
            lambda f: write(f, qrels=tsv([(7, "d1", 1), (7, "d1", 0)])),
            "line 3: query '7' and document 'd1' have another",
        ),
        (lambda f: write(f, qrels=tsv([(7, 5, "d1", 1)])), "line 2: not a judgement"),  # type: ignore[list-item]
        (lambda f: write(f, qrels=tsv([("x", "d1", 1), (7, "y", 1)])), "of 2 judgements, all are of other queries"),
        (lambda f: write(f, qrels=tsv([(7, "d1", 0)])), "of 1 judgements, none is above 0"),
    ],
)
def test_invalid_data_are_refused(change: Callable[[Path], object], message: str, data: str) -> None:
    change(Path(data))
    with pytest.raises(InputError, match=message):
        read_retrieval(data)


def test_a_task_of_mteb_is_scored_by_its_own_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    parts = {
        "corpus": Dataset.from_dict({"_id": ["d0", "d1"], "title": ["", ""], "text": ["zero", "three"]}),
        "queries": Dataset.from_dict({"_id": ["b", "a", "c"], "text": ["three", "one", "two"]}),
        "default": Dataset.from_dict({"query-id": ["a", "b"], "corpus-id": ["d1", "d1"], "score": [1, 2]}),
    }
    loaders = "mteb.abstasks.retrieval_dataset_loaders."
    monkeypatch.setattr(loaders + "get_dataset_config_names", lambda *_, **__: list(parts))
    monkeypatch.setattr(loaders + "get_dataset_split_names", lambda *_, **__: ["test"])
    monkeypatch.setattr(loaders + "load_dataset", lambda _, config, **__: parts[config])
    task = mteb.with_kind(TaskSpec("NFCorpus", "mteb", ""))
    assert task.of == "retrieval"
    result = mteb_vectors.measure(Encoder(by_angle), task, None)
    assert (result.metric, result.names) == ("nDCG@10", ["test/default/a", "test/default/b"])
    assert result.values == [pytest.approx(1 / math.log2(3), abs=1e-5), 1.0]
    assert result.more == {"recall@100": 1.0, "MRR@10": 0.75}
