"""Builds of many blocks, partitions and shards: the same bytes for any split, and after any interruption."""

import shutil
from collections.abc import Callable
from functools import partial

import pyarrow.parquet as pq
import pytest
from executors import StoppedError
from faulty import ALL, Corpus, MakeTeacher
from tiny import WORDS

from msense import SenseDictionary
from msense.corpus import cut_splits
from msense.errors import InputError
from msense.io import filesystems, storage
from msense.stages import passages

pytestmark = pytest.mark.usefixtures("in_process")


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
def test_chunks_give_the_same_bytes_and_true_contexts(made: Corpus, settings: dict) -> None:
    made.settings |= {"dedup": False, "senses": 4, "keep": ("occurrences", "centroids")} | settings
    folder = made.folder
    made.build("whole", max_points_per_part=1 << 17)
    made.build("chunks")
    assert len(list((folder / "whole" / "occurrences").glob("*.records"))) > 2
    assert len(list((folder / "whole" / "centroids").glob("0*.safetensors"))) > 2
    assert not list((folder / "whole" / "centroids").glob("token-*.safetensors"))
    assert list((folder / "chunks" / "centroids").glob("token-*.safetensors"))
    assert made.files("whole") == made.files("chunks")
    dictionary = SenseDictionary.load(folder / "whole")
    names = {token.token_id: word for word in WORDS for token in dictionary.lookup(word).tokens}
    for row in pq.read_table(folder / "whole" / "dictionary" / "exemplars.parquet").to_pylist():
        name, line = row["document_id"].split(":")
        text = (folder / "corpus" / name).read_text().splitlines()[int(line)]
        context = (row["left"] + row["word"] + row["right"]).replace("[CLS]", "").replace("[SEP]", "")
        assert context in text
        if row["token"] in names:
            assert row["word"] == names[row["token"]]


@pytest.mark.slow
def test_the_same_command_resumes_after_a_stop_at_any_write(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
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
    made.build("whole", keep=ALL)
    names, steps = made.files("whole", "").keys(), step["now"]
    assert steps > 60
    for stop in range(1, steps + 1):
        step.update(now=0, stop=stop)
        with pytest.raises(StoppedError):
            made.build("cut", keep=ALL)
        step.update(stop=-1)
        made.build("cut", keep=ALL)
        assert made.files("cut") == made.files("whole"), stop
        assert made.files("cut", "").keys() == names, stop
        shutil.rmtree(made.folder / "cut")


def test_input_splits_of_large_text_files_do_not_matter(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    made.build("whole")
    monkeypatch.setattr(passages, "cut_splits", partial(cut_splits, split_bytes=2000))
    summary = made.build("cut")
    assert summary["stages"]["passages"]["documents"] == 310
    rows = {
        name: [
            row
            for file in sorted((made.folder / name / "passages").glob("*.parquet"))
            for row in pq.read_table(file, columns=["document_id", "index", "key", "input_ids"]).to_pylist()
        ]
        for name in ("whole", "cut")
    }
    assert len(list((made.folder / "cut" / "passages").glob("*.parquet"))) > 5
    assert rows["whole"] == rows["cut"]


@pytest.mark.parametrize("senses", ["auto", "mcl"])
def test_a_run_folder_on_an_object_store_gives_the_same_bytes_and_resumes(made: Corpus, senses: str) -> None:
    """On fsspec's in-memory store, which has neither renames nor usable locks."""
    made.settings |= {"senses": senses, "max_occurrences": 1500, "keep": ALL}
    made.build("here")
    root = f"memory://{made.folder.name}/there"
    fs, path = filesystems.filesystem(root)

    def there() -> dict[str, bytes]:
        folder = f"{path}/dictionary/"
        return {str(name).removeprefix(folder): fs.cat_file(name) for name in fs.find(folder)}

    made.build(output=root)
    assert there() == made.files("here")
    assert fs.glob(f"{path}/centroids/token-*.safetensors")
    assert not fs.glob(f"{path}/centroids/*-round*")
    fs.pipe_file(f"{path}/finished.json", b"{")
    fs.pipe_file(f"{path}/senses/senses.safetensors", b"cut short")
    fs.rm(f"{path}/dictionary/config.json")
    made.build(output=root)
    assert there() == made.files("here")
    stages = storage.read_json(f"{root}/journal.json")["drivers"][-1]["stages"]
    assert (stages["senses"]["damaged"], stages["senses"]["made"], stages["embed"]["made"]) == (1, 1, 0)
    fs.rm(path, recursive=True)


def test_bad_documents_stop_a_strict_run_also_when_listed_earlier(made: Corpus) -> None:
    made.build(dry_run=True)
    listed = (made.folder / "run" / "bad_documents.jsonl").read_text().splitlines()
    assert len(listed) == 2
    assert '"a.txt:155"' in listed[0]
    with pytest.raises(InputError, match=r"bad documents \(2 empty\)"):
        made.build(on_bad_document="fail")
    with pytest.raises(InputError, match=r"bad document a\.txt:155: empty"):
        made.build("strict", on_bad_document="fail")
    made.build("finished")
    with pytest.raises(InputError, match=r"bad documents \(2 empty\)"):
        made.build("finished", on_bad_document="fail")


def test_a_corpus_of_excluded_tokens_only_is_refused(made: Corpus, make_teacher: MakeTeacher) -> None:
    (made.folder / "x.txt").write_text("[PAD]\n")
    with pytest.raises(InputError, match="no token of this corpus may have senses"):
        made.build(corpus=(str(made.folder / "x.txt"),), teacher=str(make_teacher("bert", pooling="cls_token")))
