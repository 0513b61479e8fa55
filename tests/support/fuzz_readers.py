"""All readers of untrusted files for `fuzzing`, and the undamaged folders that they read."""

import dataclasses
import gzip
import hashlib
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from command_line import parse_flags
from fuzzing import Reader
from task_data import write_contexts as write_task_contexts
from tiny import exemplars, with_tokenizer, word_piece

from msense import SenseDictionary, SenseEncoder
from msense.cli.status import show_status
from msense.config.build import BuildConfig
from msense.corpus import cut_splits, list_files
from msense.corpus.labelled import read_labelled
from msense.corpus.readers import MAX_DOCUMENT_BYTES, Document, read_documents
from msense.errors import InputError
from msense.evaluation.tasks import coarsewsd, wordsim
from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.journal import Journal
from msense.run.manifest import check_manifest
from msense.student import load_student
from msense.teacher.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from msense.teacher.model import Teacher
from msense.teacher.spec import TeacherOptions, load_teacher_info
from msense.training.label_dataset import LabelSet

TEXTS = ["the river bank", "", "a cat sat on the mat , running", "is near " * 9]
PARQUET = {"text": [f"a text of {n % 7} words" for n in range(90)], "id": [f"d{n}" for n in range(90)]}


def digest(*arrays: Any) -> list[object]:
    """Return the shape, dtype and hash of arrays."""
    values = [np.ascontiguousarray(a.detach().float().numpy() if isinstance(a, torch.Tensor) else a) for a in arrays]
    return [(a.shape, str(a.dtype), hashlib.sha256(a.tobytes()).hexdigest()) for a in values]


# --- readers: return the meaning of a folder


def dictionary(folder: Path) -> object:
    d = SenseDictionary.load(folder)
    senses, examples = ([read(token) for token in range(d.vocab_size)] for read in (d.senses, d.exemplars))
    assert all(np.isfinite(np.asarray(s.centroids, np.float32)).all() and (s.counts > 0).all() for s in senses)
    assert all(0 <= e.sense < len(s.counts) for es, s in zip(examples, senses, strict=True) for e in es)
    arrays = digest(d.offsets, d.counts, d.rms_distance, d.token_counts, d.centroids)
    return d.config.model_dump(), d.lookup("bank").explain(), examples, arrays


def student(folder: Path) -> object:
    encoder = SenseEncoder.from_pretrained(folder, device="cpu", dtype="float32")
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.config.dim)
    assert np.isfinite(vectors).all()
    tokens = [] if encoder.config.is_table else encoder.tokens(TEXTS[2])
    assert all(0 <= t.start <= t.end <= len(TEXTS[2]) and 0 <= t.probability <= 1.0001 for t in tokens)
    return encoder.config.model_dump(), digest(vectors), tokens, digest(*load_student(folder).state_dict().values())


def classifier(folder: Path) -> object:
    model = load_classifier(folder)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    return model.config.model_dump(), digest(*model.state_dict().values())


def teacher(folder: Path) -> object:
    info, tokenizer = load_teacher_info(str(folder), TeacherOptions())
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
    return parse_flags(BuildConfig, ["--config", str(folder / "run.yaml")]).model_dump()


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


# --- undamaged folders


def write_dictionary(folder: Path) -> None:
    with_tokenizer(word_piece(), folder, [2, 0, 3, 0, 1, 1, 1, 4])
    pq.write_table(exemplars([(0, 0, 0), (2, 1, 0), (2, 1, 1), (7, 3, 0)]), folder / "exemplars.parquet")


MANIFEST: dict[str, Any] = {"format": 1, "config": {"senses": 20, "layer": -1}, "corpus": ["a"]}
MANIFEST |= {"inputs": {"a.txt": "3 x"}, "teacher": {"name": "t", "dim": 16, "fingerprint": "f"}}
MANIFEST |= {"pins": {"dtype": "float32", "device": "cpu"}}


def write_run(folder: Path) -> None:
    run = RunFolder(str(folder))
    storage.write_json(run.manifest, MANIFEST)
    Journal.begin(run, 2).end("done")
    run.publish(run.blocks, lambda path: pq.write_table(pa.table({"piece": [1, 2]}), path), {"stored": 3})


def write_classifier(folder: Path) -> None:
    save_classifier(folder, Classifier(ClassifierConfig(task="sst2", dim=16, pooling="mean", labels=("a", "b"))))


def write_contexts(folder: Path) -> None:
    rows = [("bank", "a"), ("bank", "b")] * 5
    write_task_contexts(folder, "bank", rows, rows)


def _parquet(table: dict[str, list], **options: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(table), file, row_group_size=40, **options)
    return file.getvalue()


LINES = "\n".join(PARQUET["text"])
JSONL = "".join(
    f'{{"id": "d{n}", "text": "a text, {n}", "label": "l{n % 3}", "more": {{"a": [1, 2]}}}}\n' for n in range(30)
)
CSV = "id,text,label\n" + "".join(f'd{n},"a text, ""{n}""\nof two lines",l{n % 3}\n' for n in range(30))
YAML = (
    "corpus: [a.txt, 'b/*.txt']\nteacher: org/name\nlayer: -2\nsenses: 30\nkeep: [passages]\ncoverage: 0.9\nseed: 7\n"
)
PAIRS = "bank river 3\nbank money 2.5\ncat dog 9\n" * 5
LABELLED = {"text": PARQUET["text"], "label": [n % 3 for n in range(90)]}


def single(read: Callable[[Path], object], name: str, content: bytes) -> Reader:
    """Return the reader of a folder with one file."""
    return Reader(read, (name,), write=lambda folder: (folder / name).write_bytes(content))


_MODEL = ("model.safetensors", "tokenizer.json", "modules.json", "config_sentence_transformers.json")
_STATIC = (*_MODEL, "config.json", "dictionary/config.json", "dictionary/dictionary.safetensors")
_TABLE = (*_MODEL, "senses/config.json")
_LAYERS = (*_TABLE, "config.json", "1_Pooling/config.json", "senses/head.safetensors")
_LAYERS += ("senses/dictionary/config.json", "senses/dictionary/dictionary.safetensors")
_TEACHER = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json")
_DICTIONARY = ("config.json", "dictionary.safetensors", "exemplars.parquet", "tokenizer/tokenizer.json")
_LABELS = ("labels/labels.json", "labels/000000.safetensors", "labels/000001.safetensors")
_RUN = ("manifest.json", "journal.json", "plan/blocks.parquet", "plan/blocks.parquet.done")
_CLASSIFIER = ("classifier/config.json", "classifier/classifier.safetensors")
READERS: dict[str, Reader] = {
    "dictionary": Reader(dictionary, _DICTIONARY, write=write_dictionary),
    "student static": Reader(student, _STATIC),
    "student layers:1": Reader(student, _LAYERS),
    "student table": Reader(student, _TABLE),
    "classifier": Reader(classifier, _CLASSIFIER, write=write_classifier),
    "teacher": Reader(teacher, (*_TEACHER, "1_Pooling/config.json")),
    "labels": Reader(labels, _LABELS),
    "labels, verified": Reader(partial(labels, verify=True), _LABELS, exact=True),
    "run folder": Reader(run_folder, _RUN, exact=True, write=write_run),
    "word contexts": Reader(contexts, ("bank/train.data.txt", "bank/test.gold.txt"), write=write_contexts),
    "config": single(settings, "run.yaml", YAML.encode() + b"output: runs/x\n"),
    "corpus txt": single(corpus, "a.txt", LINES.encode()),
    "corpus jsonl": single(corpus, "a.jsonl", JSONL.encode()),
    "corpus csv": single(corpus, "a.csv", CSV.encode()),
    "corpus gz": single(corpus, "a.jsonl.gz", gzip.compress(JSONL.encode())),
    "corpus zst": single(corpus, "a.txt.zst", pa.Codec("zstd").compress(LINES.encode(), asbytes=True)),
    "corpus parquet": single(corpus, "a.parquet", _parquet(PARQUET, compression="zstd")),
    "corpus parquet, plain": single(
        corpus, "a.parquet", _parquet(PARQUET, compression="none", data_page_version="2.0")
    ),
    "labelled csv": single(labelled, "train.csv", CSV.encode()),
    "labelled jsonl": single(labelled, "train.jsonl", JSONL.encode()),
    "labelled parquet": single(labelled, "train.parquet", _parquet(LABELLED)),
    "word pairs": single(word_pairs, "set.txt", PAIRS.encode()),
}
