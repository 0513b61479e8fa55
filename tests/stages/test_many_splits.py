"""Builds of many blocks, partitions and shards in this process: the same bytes for any split, and after any interruption."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import WORDS

from msense import SenseDictionary
from msense.config.build import BuildConfig
from msense.corpus import cut_splits
from msense.errors import InputError
from msense.io import filesystems, storage
from msense.pipelines.build import build_dictionary

pytestmark = pytest.mark.usefixtures("in_process")
MakeTeacher = Callable[..., Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("files") / "corpus"
    folder.mkdir()
    chances = np.array([12, 6] + [1] * 13) / 31
    for name in "ab":
        lines = [" ".join(rng.choice(WORDS, 24, p=chances)) for _ in range(150)]
        (folder / f"{name}.txt").write_text("\n".join([*lines, *lines[:5], ""]) + "\n")
    return folder


def build(output: Path, **settings: object) -> dict:
    return build_dictionary(BuildConfig(output=str(output), dtype="float32", senses=4, **settings))


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def artefact(output: Path) -> dict[str, bytes]:
    folder = output / "dictionary"
    return {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.fixture
def inputs(corpus: Path, make_teacher: MakeTeacher) -> dict:
    return {"corpus": (str(corpus),), "teacher": str(make_teacher("bert"))}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_occurrences": 6000},
        {"max_occurrences": 1500, "metric": "cosine", "coverage": 0.6},
        {"max_occurrences": 0, "stride": 3, "max_length": 16},
        {"max_occurrences": 1500, "metric": "dot", "store_dtype": "bfloat16", "dedup": True},
    ],
    ids=["l2", "cosine-coverage", "all-stride", "dot-bf16-dedup"],
)
def test_chunks_give_the_same_bytes_and_true_contexts(
    tmp_path: Path, corpus: Path, inputs: dict, settings: dict
) -> None:
    given = {**inputs, "keep": ("occurrences", "centroids"), **settings}
    build(tmp_path / "whole", **given)
    build(tmp_path / "parts", max_points_per_part=1024, workers=3, **given)
    assert len(list((tmp_path / "whole" / "occurrences").glob("*.records"))) > 2
    assert len(list((tmp_path / "whole" / "centroids").glob("0*.safetensors"))) > 2
    assert not list((tmp_path / "whole" / "centroids").glob("token-*.safetensors"))
    assert list((tmp_path / "parts" / "centroids").glob("token-*.safetensors"))
    assert artefact(tmp_path / "whole") == artefact(tmp_path / "parts")
    dictionary = SenseDictionary.load(tmp_path / "whole")
    names = {token.token_id: word for word in WORDS for token in dictionary.lookup(word).tokens}
    for row in pq.read_table(tmp_path / "whole" / "dictionary" / "exemplars.parquet").to_pylist():
        name, line = row["document_id"].split(":")
        text = (corpus / name).read_text().splitlines()[int(line)]
        context = (row["left"] + row["word"] + row["right"]).replace("[CLS]", "").replace("[SEP]", "").strip()
        assert context in text
        if row["token"] in names:
            assert row["word"].strip() == names[row["token"]]


def test_counts_are_those_of_the_corpus(tmp_path: Path, corpus: Path, make_teacher: MakeTeacher) -> None:
    build(tmp_path / "run", corpus=(str(corpus),), teacher=str(make_teacher("llama")), layer=0, max_occurrences=0)
    dictionary = SenseDictionary.load(tmp_path / "run")
    words = " ".join(p.read_text() for p in corpus.iterdir()).split()
    for word in WORDS:
        token = dictionary.lookup(word).tokens[0].token_id
        assert dictionary.token_counts[token] == words.count(word)
        assert dictionary.senses(token).counts.tolist() == [words.count(word)]  # one embedding, so one sense


class StoppedError(BaseException):
    """Simulates the end of the process."""


@pytest.mark.slow
def test_the_same_command_resumes_after_a_stop_at_any_write(
    tmp_path: Path, inputs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = inputs | {"max_occurrences": 6000, "max_points_per_part": 1024, "dedup": True}
    settings |= {"keep": ("passages", "occurrences", "centroids")}
    step = {"now": 0, "stop": -1}

    def counted(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            step["now"] += "journal.json" not in str(arguments[0])
            if step["now"] == step["stop"]:
                raise StoppedError
            return function(*arguments)

        return call

    monkeypatch.setattr(storage, "_place", counted(storage._place))
    monkeypatch.setattr(storage, "remove", counted(storage.remove))
    build(tmp_path / "whole", **settings)
    files = names(tmp_path / "whole")
    steps = step["now"]
    assert steps > 60
    for stop in range(1, steps + 1):
        step.update(now=0, stop=stop)
        with pytest.raises(StoppedError):
            build(tmp_path / "cut", **settings)
        step.update(stop=-1)
        build(tmp_path / "cut", **settings)
        assert artefact(tmp_path / "cut") == artefact(tmp_path / "whole"), stop
        assert names(tmp_path / "cut") == files, stop
        shutil.rmtree(tmp_path / "cut")


def test_input_splits_of_large_text_files_do_not_matter(
    tmp_path: Path, inputs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole", **inputs)
    monkeypatch.setattr("msense.stages.passages.cut_splits", lambda files: cut_splits(files, piece_bytes=2000))
    summary = build(tmp_path / "cut", **inputs)
    assert len(list((tmp_path / "cut" / "passages").glob("*.parquet"))) > 5
    assert summary["stages"]["passages"]["documents"] == 310
    columns = ["document_id", "index", "key", "input_ids"]
    whole, cut = (
        [row for file in sorted((tmp_path / name / "passages").glob("*.parquet")) for row in rows_of(file, columns)]
        for name in ("whole", "cut")
    )
    assert whole == cut


def rows_of(file: Path, columns: list[str]) -> list[dict]:
    return pq.read_table(file, columns=columns).to_pylist()


def test_a_deleted_dictionary_is_regenerated(tmp_path: Path, inputs: dict) -> None:
    build(tmp_path / "run", keep=("passages", "occurrences"), **inputs)
    before = artefact(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "dictionary")
    build(tmp_path / "run", keep=("passages",), **inputs)
    assert artefact(tmp_path / "run") == before
    assert not (tmp_path / "run" / "occurrences").exists()


@pytest.mark.parametrize("senses", ["auto", "mcl"])
def test_a_run_folder_on_an_object_store_gives_the_same_bytes_and_resumes(
    tmp_path: Path, inputs: dict, senses: str
) -> None:
    """On fsspec's in-memory store, which has neither renames nor usable locks."""
    given = inputs | {"dtype": "float32", "senses": senses}
    given |= {"max_occurrences": 1500, "max_points_per_part": 1024, "keep": ("passages", "occurrences", "centroids")}
    build_dictionary(BuildConfig(output=str(tmp_path / "here"), **given))
    root = f"memory://{tmp_path.name}/there"
    fs, path = filesystems.filesystem(root)

    def there() -> dict[str, bytes]:
        folder = f"{path}/dictionary/"
        return {str(name).removeprefix(folder): fs.cat_file(name) for name in fs.find(folder)}

    build_dictionary(BuildConfig(output=root, **given))
    assert there() == artefact(tmp_path / "here")
    assert fs.glob(f"{path}/centroids/token-*.safetensors")
    assert not fs.glob(f"{path}/centroids/*-round*")
    fs.pipe_file(f"{path}/finished.json", b"{")
    fs.pipe_file(f"{path}/senses/senses.safetensors", b"cut short")
    fs.rm(f"{path}/dictionary/config.json")
    build_dictionary(BuildConfig(output=root, **given))
    assert there() == artefact(tmp_path / "here")
    stages = storage.read_json(f"{root}/journal.json")["drivers"][-1]["stages"]
    assert (stages["senses"]["damaged"], stages["senses"]["made"], stages["occurrences"]["made"]) == (1, 1, 0)
    fs.rm(path, recursive=True)


def test_bad_documents_stop_a_strict_run_also_when_listed_earlier(tmp_path: Path, inputs: dict) -> None:
    build(tmp_path / "run", dry_run=True, **inputs)
    listed = (tmp_path / "run" / "bad_documents.jsonl").read_text().splitlines()
    assert len(listed) == 2
    assert '"a.txt:155"' in listed[0]
    with pytest.raises(InputError, match=r"bad documents \(2 empty\)"):
        build(tmp_path / "run", on_bad_document="fail", **inputs)
    with pytest.raises(InputError, match=r"bad document a\.txt:155: empty"):
        build(tmp_path / "strict", on_bad_document="fail", **inputs)


def test_a_corpus_of_excluded_tokens_only_is_refused(tmp_path: Path, make_teacher: MakeTeacher) -> None:
    (tmp_path / "x.txt").write_text("[PAD]\n")
    teacher = str(make_teacher("bert", pooling="cls_token"))
    with pytest.raises(InputError, match="no token of this corpus may have senses"):
        build(tmp_path / "run", corpus=(str(tmp_path / "x.txt"),), teacher=teacher)
