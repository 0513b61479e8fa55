"""All readers of untrusted files for `fuzzing`, and the undamaged folders that they read."""

import dataclasses
import gzip
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzzing import Reader

from msense import SenseDictionary, SenseEncoder
from msense.cli.flags import parse_flags
from msense.cli.status import show_status
from msense.config.build import BuildConfig
from msense.corpus import cut_splits, list_files
from msense.corpus.labelled import read_labelled
from msense.corpus.readers import MAX_DOCUMENT_BYTES, Document, read_documents
from msense.errors import InputError
from msense.evaluation.cost import Cost
from msense.evaluation.report import Evaluation, TaskReport, load_report, to_json, write_report
from msense.evaluation.result import Result
from msense.evaluation.tasks import coarsewsd, wordsim
from msense.io import storage
from msense.io.arrays import save_arrays
from msense.run.folder import RunFolder
from msense.run.journal import Journal
from msense.run.manifest import check_manifest
from msense.student import load_student
from msense.teacher.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from msense.teacher.model import Teacher
from msense.teacher.spec import load_teacher_info
from msense.training.label_dataset import LabelManifest, LabelPartition, LabelSet

TEXTS = ["the river bank", "", "a cat sat on the mat , running", "is near " * 9]
PARQUET = {"text": [f"a text of {n % 7} words" for n in range(90)], "id": [f"d{n}" for n in range(90)]}


def digest(*arrays: Any) -> list[object]:
    """Return the shape, dtype and hash of arrays."""
    values = [np.ascontiguousarray(a.detach().float().numpy() if isinstance(a, torch.Tensor) else a) for a in arrays]
    return [(a.shape, str(a.dtype), hashlib.sha256(a.tobytes()).hexdigest()) for a in values]


# --- readers: return the meaning of a folder


def dictionary(folder: Path) -> object:
    d = SenseDictionary.load(folder)
    senses = [d.senses(token) for token in range(d.vocab_size)]
    assert all(np.isfinite(np.asarray(s.centroids, np.float32)).all() for s in senses)
    assert all((s.counts > 0).all() for s in senses)
    examples = [d.exemplars(token) for token in range(d.vocab_size)]
    assert all(0 <= e.sense < len(s.counts) for es, s in zip(examples, senses, strict=True) for e in es)
    return (
        d.config.model_dump(),
        d.lookup("bank").explain(),
        examples,
        digest(d.offsets, d.counts, d.rms_distance, d.token_counts, d.centroids),
    )


def student(folder: Path) -> object:
    encoder = SenseEncoder.from_pretrained(folder, device="cpu", dtype="float32")
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.config.dim)
    assert np.isfinite(vectors).all()
    tokens = encoder.tokens(TEXTS[2])
    assert all(0 <= t.start <= t.end <= len(TEXTS[2]) and 0 <= t.probability <= 1.0001 for t in tokens)
    return encoder.config.model_dump(), digest(vectors), tokens, digest(*load_student(folder).state_dict().values())


def classifier(folder: Path) -> object:
    model = load_classifier(folder)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    return model.config.model_dump(), digest(*model.state_dict().values())


def teacher(folder: Path) -> object:
    info, tokenizer = load_teacher_info(str(folder), BuildConfig())
    own = Teacher(str(folder), revision=None, layer=-1, dtype="float32", device="cpu")
    ids = np.array([tokenizer.encode("the river bank").ids], np.int32)
    assert 0 <= ids.min() <= ids.max() < info.vocab_size
    assert own.embed(ids, np.ones(ids.shape, bool)).shape == (*ids.shape, info.dim)
    return dataclasses.replace(info, name=""), digest(*own.engine.module.state_dict().values())


def labels(folder: Path, verify: bool = False) -> object:
    own = LabelSet.open(str(folder), verify=verify)
    batch = own.read(np.arange(len(own.lengths)))
    known = batch.ids[batch.mask]
    assert 0 <= known.min() <= known.max() < own.manifest.vocab_size
    assert batch.senses.max() < 65535
    assert torch.isfinite(batch.pooled).all()
    assert int(own.token_counts()[0].sum() + own.token_counts()[1].sum()) == own.lengths.sum() == len(known)
    steps = [b.tolist() for b in own.batches(0, 0, 64)]
    assert sorted(n for b in steps for n in b) + own.held_out().tolist() != []
    return own.manifest.model_dump(), steps, digest(*(part for part in batch if part is not None))


def run_folder(folder: Path) -> object:
    run = RunFolder(str(folder))
    files = [storage.read_json(uri) for uri in (run.manifest, run.journal)]
    stats = storage.stats_of(run.blocks, verify=True)
    if None in (*files, stats):
        raise InputError("a damaged file is regenerated")
    show_status(str(folder))
    Journal.begin(run, 1)
    check_manifest(run, MANIFEST)
    return files, stats


def settings(folder: Path) -> object:
    return parse_flags(BuildConfig, "", ["--config", str(folder / "run.yaml")]).model_dump()


def corpus(folder: Path) -> object:
    files = list_files((str(folder),))
    if files[0].size > 1 << 36:
        raise InputError("a sparse file of 1 TB is a valid, but very slow corpus")
    meaning = []
    for piece in cut_splits(files):
        for item in read_documents(piece):
            if isinstance(item, Document):
                assert item.text.strip()
                assert len(item.text.encode()) <= MAX_DOCUMENT_BYTES
            elif item.reason == "empty":
                continue  # a bomb of line breaks would fill the list
            assert isinstance(item.id, str)
            meaning.append(item)
    return meaning


def labelled(folder: Path) -> object:
    examples = read_labelled(str(folder), "train")
    assert len(examples.texts) == len(examples.labels) > 0
    assert all(isinstance(text, str) for row in examples.texts for text in row)
    return examples.texts, examples.labels.tolist()


def contexts(folder: Path) -> object:
    words = coarsewsd.words(str(folder))
    sets = [coarsewsd.read_contexts(str(folder), word, part) for word in words for part in coarsewsd.PARTS]
    for own in sets:
        assert len(own.texts) == len(own.starts) == len(own.gold)
        assert all(0 <= start <= len(text) for start, text in zip(own.starts, own.texts, strict=True))
    return [(own.texts, own.starts.tolist(), own.gold.tolist()) for own in sets]


def word_pairs(folder: Path) -> object:
    sets = wordsim.read_sets(str(folder))
    assert all(math.isfinite(pair.score) for pairs in sets.values() for pair in pairs)
    return sets


def results(folder: Path) -> object:
    report = load_report(str(folder / "e.json"))
    if report is None:
        raise InputError("no report")
    return to_json(report)


# --- undamaged folders


MANIFEST: dict[str, Any] = {
    "format": 1,
    "config": {"senses": 20, "layer": -1},
    "corpus": ["a"],
    "inputs": {"a.txt": "3 x"},
    "teacher": {"name": "t", "dim": 16, "fingerprint": "f"},
    "pins": {"dtype": "float32", "device": "cpu"},
}


def write_run(folder: Path) -> None:
    run = RunFolder(str(folder))
    storage.write_json(run.manifest, MANIFEST)
    Journal.begin(run, 2).end("done")

    run.publish(run.blocks, lambda path: pq.write_table(pa.table({"piece": [1, 2]}), path), {"stored": 3})


def write_labels(folder: Path) -> None:
    rng = np.random.default_rng(0)
    run = RunFolder(str(folder), "m")
    sizes = rng.integers(1, 4, 25).astype(np.int32)
    run.publish(run.label_senses, lambda path: save_arrays(path, {"senses": sizes}))
    units = []
    for number in range(2):
        lengths = rng.integers(2, 9, 6)
        ids = rng.integers(0, 25, lengths.sum()).astype(np.int32)
        soft = np.stack([np.zeros(len(ids)), np.where(sizes[ids] > 1, 1, 65535)], 1).astype(np.uint16)
        weights = np.where(soft == [[0, 1]], [[0.75, 0.25]], [[1.0, 0.0]]).astype(np.float16)
        weights[sizes[ids] == 1] = [1, 0]
        arrays = {
            "offsets": np.cumsum([0, *lengths]).astype(np.int64), "ids": ids, "senses": soft[:, 0].copy(),
            "held_out": np.array([0, 0, 1, 0, 0, 1], np.uint8), "soft_senses": soft, "soft_weights": weights,
            "pooled": rng.normal(size=(6, 4)).astype(np.float16),
        }  # fmt: skip

        run.publish(run.label_file(number), partial(_save, arrays))
        file = Path(run.label_file(number))
        counts = {"passages": 6, "tokens": len(ids), "labelled": len(ids), "held_out_passages": 2}
        units.append(LabelPartition(**counts, size=file.stat().st_size, sha256=storage.sha256_of(file)))
    manifest = LabelManifest(
        inputs_hash="m", dictionary="d", teacher={"name": "t"}, tokenizer_fingerprint="t", vocab_size=25, dim=4, metric="l2",
        temperature_unit=1.0, temperature=0.5, train_tokens=None, held_out=0.3, held_out_salt=1, soft_targets=2,
        pooled=True, pooling="mean", normalize=False, units=tuple(units),
    )  # fmt: skip
    storage.write_json(run.label_manifest, manifest.model_dump(mode="json"))


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    save_arrays(path, arrays)


def write_classifier(folder: Path) -> None:
    save_classifier(folder, Classifier(ClassifierConfig(task="sst2", dim=16, pooling="mean", labels=("a", "b"))))


def write_results(folder: Path) -> None:
    rows: dict[str, Result | str] = {
        "a": Result("accuracy", "draws", [0.5, 0.6], more={"macro F1": 0.4}),
        "b": Result("accuracy", "texts", gold=["x", "y"], found=["x", "x"]),
        "c": "has none",
    }
    cost = Cost(**{field.name: 1 for field in dataclasses.fields(Cost)})
    report = Evaluation(list(rows), [TaskReport("t", "k", "w", rows)], {"a": cost}, {"settings": {"seed": 1}})
    write_report(report, str(folder / "e.json"), plots=False)


def _text(name: str, content: str | bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def _parquet(name: str, table: dict[str, list], **options: object) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.table(table), folder / name, row_group_size=40, **options)


LINES = "\n".join(PARQUET["text"])
JSONL = "".join(
    f'{{"id": "d{n}", "text": "a text, {n}", "label": "l{n % 3}", "more": {{"a": [1, 2]}}}}\n' for n in range(30)
)
CSV = "id,text,label\n" + "".join(f'd{n},"a text, ""{n}""\nof two lines",l{n % 3}\n' for n in range(30))
YAML = (
    "corpus: [a.txt, 'b/*.txt']\nteacher: org/name\nlayer: -2\nsenses: 30\nkeep: [passages]\ncoverage: 0.9\nseed: 7\n"
)
WHOLE: dict[str, Callable[[Path], object]] = {
    "run folder": write_run,
    "labels": write_labels,
    "labels, verified": write_labels,
    "classifier": write_classifier,
    "results": write_results,
    "config": _text("run.yaml", YAML + "output: runs/x\n"),
    "corpus txt": _text("a.txt", LINES),
    "corpus jsonl": _text("a.jsonl", JSONL),
    "corpus csv": _text("a.csv", CSV),
    "corpus gz": _text("a.jsonl.gz", gzip.compress(JSONL.encode())),
    "corpus zst": _text("a.txt.zst", pa.Codec("zstd").compress(LINES.encode(), asbytes=True)),
    "corpus parquet": _parquet("a.parquet", PARQUET, compression="zstd"),
    "corpus parquet, plain": _parquet("a.parquet", PARQUET, compression="none", data_page_version="2.0"),
    "labelled csv": _text("train.csv", CSV),
    "labelled jsonl": _text("train.jsonl", JSONL),
    "labelled parquet": _parquet("train.parquet", {"text": PARQUET["text"], "label": [n % 3 for n in range(90)]}),
    "word contexts": lambda f: [
        _text(f"bank/{part}.{kind}.txt", text * 5)(f)
        for part in ("train", "test")
        for kind, text in (("data", "1\tthe bank is\n0\tbank of a river\n"), ("gold", "a\nb\n"))
    ],
    "word pairs": _text("set.txt", "bank river 3\nbank money 2.5\ncat dog 9\n" * 5),
}  # dictionary, students and teacher come from fixtures
_STUDENT = (
    *("config.json", "model.safetensors", "tokenizer.json"),
    *("dictionary/config.json", "dictionary/dictionary.safetensors"),
)
_LABELS = ("labels/labels.json", "labels/000000.safetensors", "labels/000001.safetensors")
READERS: dict[str, Reader] = {
    "dictionary": Reader(
        dictionary, ("config.json", "dictionary.safetensors", "exemplars.parquet", "tokenizer/tokenizer.json")
    ),
    "student static": Reader(student, _STUDENT),
    "student layers:1": Reader(student, _STUDENT),
    "classifier": Reader(classifier, ("classifier/config.json", "classifier/classifier.safetensors")),
    "teacher": Reader(
        teacher,
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"),
    ),
    "labels": Reader(labels, _LABELS),
    "labels, verified": Reader(partial(labels, verify=True), _LABELS, exact=True),
    "run folder": Reader(
        run_folder, ("manifest.json", "journal.json", "plan/blocks.parquet", "plan/blocks.parquet.done"), exact=True
    ),
    "config": Reader(settings, ("run.yaml",)),
    "results": Reader(results, ("e.json",)),
    "word contexts": Reader(contexts, ("bank/train.data.txt", "bank/test.gold.txt")),
    "word pairs": Reader(word_pairs, ("set.txt",)),
    **{name: Reader(corpus, (f"a.{form}",)) for name, form in (
        ("corpus txt", "txt"), ("corpus jsonl", "jsonl"), ("corpus csv", "csv"), ("corpus gz", "jsonl.gz"),
        ("corpus zst", "txt.zst"), ("corpus parquet", "parquet"), ("corpus parquet, plain", "parquet"),
    )},
    **{f"labelled {form}": Reader(labelled, (f"train.{form}",)) for form in ("csv", "jsonl", "parquet")},
}  # fmt: skip
