"""Reads damaged files until all examples are used up: `python fuzz.py FOLDER EXAMPLES READER ...`.

FOLDER holds a whole artefact for each reader; a copy is damaged and read. What comes out must be an error that the reader
documents, or a value; of artefacts that carry hashes the value it should be. The last line says how often each was seen. A
crash or a hang ends this process, and FOLDER/last.txt tells by what.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from msense.config import BuildConfig, parse_flags
from msense.errors import BadInput, MsenseError

TEXTS = ["the river bank is near", "money", ""]


def student(folder: Path) -> object:
    from msense import SenseEncoder

    encoder = SenseEncoder.from_pretrained(folder, device="cpu")
    vectors = encoder.encode(TEXTS)
    assert vectors.shape[0] == len(TEXTS)
    assert vectors.dtype == np.float32
    assert all(0 <= token.probability <= 1 for token in encoder.tokens(TEXTS[0]))
    return None


def labels(folder: Path) -> object:
    from msense.label_set import LabelSet

    found = LabelSet.open(str(folder), verify=True)
    batch = found.read(np.arange(len(found.lengths)))
    return [part.tolist() for part in batch if part is not None], found.manifest.model_dump_json()


def status(folder: Path) -> object:
    from msense.status import show_status

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        show_status(str(folder))
    return None


def teacher(folder: Path) -> object:
    import torch

    from msense.teacher import Teacher, describe

    info, tokenizer = describe(str(folder), BuildConfig())
    loaded = Teacher(str(folder), revision=None, layer=-1, dtype="float32", device="cpu")
    ids = np.array([tokenizer.encode(TEXTS[0]).ids])
    embedded = loaded.embed(ids, np.ones(ids.shape, bool))
    assert isinstance(embedded, torch.Tensor)
    assert embedded.shape == (*ids.shape, info.dim)
    return None


def classifier(folder: Path) -> object:
    from msense.classifier import load_classifier

    load_classifier(folder)
    return None


def corpus(folder: Path) -> object:
    from msense.corpus import cut_pieces, list_files, read_documents
    from msense.corpus.pieces import count_rows, number_pieces

    pieces = cut_pieces(list_files((str(folder),)), piece_bytes=200)
    for piece in number_pieces(pieces, [count_rows(piece) for piece in pieces]):
        assert all(document.id for document in read_documents(piece))
    return None


def config(folder: Path) -> object:
    parse_flags(BuildConfig, "", ["--config", str(folder / "run.yaml")])
    return None


def labelled(folder: Path) -> object:
    from msense.labelled import read_labelled

    for part in ("train", "test"):
        read_labelled(str(folder), part)
    return None


def wordsim(folder: Path) -> object:
    from msense.evaluation.wordsim import read_sets

    read_sets(str(folder))
    return None


def coarsewsd(folder: Path) -> object:
    from msense.evaluation.coarsewsd import read_contexts, words

    for word in words(str(folder)):
        for part in ("train", "test"):
            read_contexts(str(folder), word, part)
    return None


def report(folder: Path) -> object:
    from msense.evaluation.report import load_report

    load_report(str(folder / "report.json"))
    return None


def dictionary(folder: Path) -> object:
    from test_dictionary_hostile import use_all

    worked = use_all(folder)
    assert worked <= 7
    if not worked:
        raise BadInput("the dictionary does not load")
    return None


READERS: dict[str, Callable[[Path], object]] = {
    own.__name__: own
    for own in (
        student, labels, status, teacher, classifier, corpus, config, labelled, wordsim, coarsewsd, report, dictionary,
    )
}  # fmt: skip

HOSTILE_VALUES: list[Any] = [
    None, True, -1, 0, 1 << 31, 1 << 62, -(1 << 63), 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 5000,
    "../../etc/passwd", "/etc/passwd", "\x1b[31m", "\ud800", "__main__.X", [], {}, [[[]]], [0] * 3000, {"a": {"b": None}},
]  # fmt: skip
EDITS = st.tuples(
    st.sampled_from(["flip", "overwrite", "cut", "insert", "double"]),
    st.floats(0, 1),
    st.binary(min_size=1, max_size=9),
)
JSON_EDIT = st.tuples(
    st.just("value"), st.floats(0, 1), st.sampled_from(range(len(HOSTILE_VALUES))) | st.just("gone") | st.just("more")
)
WHOLE = st.tuples(
    st.sampled_from(["gone", "empty", "folder", "link out", "link loop", "other file", "deep"]),
    st.floats(0, 1),
    st.none(),
)
DAMAGE = st.tuples(
    st.floats(0, 1, exclude_max=True), st.lists(EDITS | JSON_EDIT | JSON_EDIT | EDITS | WHOLE, min_size=1, max_size=3)
)


def damage(file: Path, kind: str, where: float, data: Any) -> None:  # noqa: ANN401 - bytes, or a value's number
    raw = file.read_bytes() if file.is_file() else b""
    place = int(where * len(raw))
    if kind == "value":
        file.write_bytes(edited(raw, where, data))
    elif kind == "flip":
        file.write_bytes(raw[:place] + bytes(b ^ (1 << data[0] % 8) for b in raw[place : place + 1]) + raw[place + 1 :])
    elif kind in ("overwrite", "insert"):
        file.write_bytes(raw[:place] + data + raw[place + (len(data) if kind == "overwrite" else 0) :])
    elif kind in ("cut", "double", "empty", "deep"):
        deep = b"[" * 100_000 if where < 0.5 else b'{"a":' * 100_000
        file.write_bytes({"cut": raw[:place], "double": raw + raw[place:], "empty": b"", "deep": deep}[kind])
    else:
        _replace(file, kind)


def _replace(file: Path, kind: str) -> None:
    """Put something else in a file's place."""
    others = [path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file]
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "link out":
        file.symlink_to("/etc/hostname")
    elif kind == "link loop":
        file.symlink_to(file)
    elif kind == "other file" and others:
        shutil.copyfile(others[0], file)


def edited(raw: bytes, where: float, number: Any) -> bytes:  # noqa: ANN401 - of a value, or a word
    """Change one value of a JSON file, or of the JSON header of a safetensors file; other files stay."""
    start = 8 + int.from_bytes(raw[:8], "little") if raw[8:9] == b"{" else 0
    try:
        value = json.loads(raw[8:start] if start else raw)
    except (ValueError, RecursionError):
        return raw
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        inner = left.pop()
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        places += [(inner, key) for key in keys]
        left += [inner[key] for key in keys]
    if not places:
        return raw
    inner, key = places[int(where * (len(places) - 1))]
    if number == "gone":
        del inner[key]
    elif number == "more" and isinstance(inner, dict):
        inner["no such key"] = inner[key]
    else:
        inner[key] = HOSTILE_VALUES[number if isinstance(number, int) else 0]
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + raw[start:] if start else text


def fuzz(name: str, whole: Path, examples: int) -> Counter:
    """Read damaged copies of an artefact."""
    seen: Counter = Counter()
    right = READERS[name](whole)
    copy = whole.parent / f"{name}-{os.getpid()}"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(DAMAGE)
    def one(what: tuple[float, list[tuple[str, float, Any]]]) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        file = copy / files[int(what[0] * len(files))]
        (whole.parent / "last.txt").write_text(f"{name} {file} {what!r}")
        for edit in what[1]:
            if not file.is_dir() and not file.is_symlink():
                damage(file, *edit)
        try:
            found = READERS[name](copy)
        except (BadInput, MsenseError) as error:
            told = str(error)
        else:
            assert found == right, "taken for what it is not"
            told = ""
        assert "\x1b" not in told
        seen["refused" if told else "read"] += 1

    one()
    shutil.rmtree(copy, ignore_errors=True)
    return seen


if __name__ == "__main__":
    found = {name: dict(fuzz(name, Path(sys.argv[1]) / name, int(sys.argv[2]))) for name in sys.argv[3:]}
    sys.stdout.write(json.dumps(found) + "\n")
