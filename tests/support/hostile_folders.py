"""Corrupted dictionary folders (config, arrays, index, sizes) and the error message expected for each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file
from tiny import make

from msense.dictionary import DictionaryFiles
from msense.dictionary import format as dictionary_format
from msense.dictionary.layout import file_layout

CONFIG, DATA = "config.json", "dictionary.safetensors"
INDEX, SECOND = "dictionary.safetensors.index.json", "dictionary-00002-of-00002.safetensors"
BIG = 1 << 61
MANY = 1 << 22
NAN, INF = float("nan"), float("inf")
Corrupt = Callable[[Path], object]


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_arrays(folder: Path, change: Callable[[dict], object]) -> None:
    arrays = load_file(folder / DATA)
    change(arrays)
    save_file(arrays, folder / DATA)


def edit_array(folder: Path, name: str, values: list) -> None:
    edit_arrays(folder, lambda arrays: arrays[name].reshape(-1).put(range(len(values)), values))


def move_out(folder: Path, name: str) -> None:
    """Move a file out of the folder and leave a link to it."""
    outside = folder.parent / f"outside {Path(name).name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def edit_config(**values: object) -> Corrupt:
    return lambda folder: edit_json(folder / CONFIG, lambda config: config.update(values))


def replaced(name: str, create: Callable[[Path], object]) -> Corrupt:
    """Remove a file and create something else at its path."""

    def corrupt(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        create(folder / name)

    return corrupt


def written(name: str, change: Callable[[bytes], bytes]) -> Corrupt:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(tensor: str, **entry: object) -> Corrupt:
    return lambda folder: edit_header(folder / DATA, lambda h: h[tensor].update(entry))


def renamed(new: str) -> Corrupt:
    return lambda folder: edit_arrays(folder, lambda arrays: arrays.update({new: arrays.pop("spread")}))


def array(name: str, *values: float) -> Corrupt:
    return lambda folder: edit_array(folder, name, list(values))


def without_tensor(name: str) -> Corrupt:
    return lambda folder: edit_arrays(folder, lambda arrays: arrays.pop(name))


def holes(vocabulary: int, senses: int, dim: int = 3, **numbers: dict[int, int]) -> Corrupt:
    """Write a sparse file of these sizes with zeros except for the given int64 numbers by index."""

    def corrupt(folder: Path) -> None:
        edit_config(vocab_size=vocabulary, dim=dim)(folder)
        config = make([1], dim=dim).config.model_copy(update={"vocab_size": vocabulary})
        ((path, tensors),) = file_layout(DictionaryFiles(folder), config, [0, senses])
        head = dictionary_format._header(tensors)
        start = {name: entry["data_offsets"] for name, entry in json.loads(head[8:]).items()}
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + start["centroids"][1])
            for name, values in numbers.items():
                for place, value in values.items():
                    file.seek(len(head) + start[name][0] + 8 * place)
                    file.write(value.to_bytes(8, "little"))

    return corrupt


UNALIGNED = "invalid dtype or data offsets"
HOSTILE: dict[str, tuple[Corrupt, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no config.json"),
    "config is a pipe": (replaced(CONFIG, os.mkfifo), "no config.json"),
    "config is truncated": (written(CONFIG, lambda _: b"{"), "is not JSON"),
    "config is deeply nested": (written(CONFIG, lambda _: b"[" * 200_000), "is not JSON"),
    "config is a list": (written(CONFIG, lambda _: b"[1]"), "has no format_version"),
    "sparse config": (lambda f: os.truncate(f / CONFIG, 1 << 40), "1099511627776 bytes, more than"),
    "number too long": (written(CONFIG, lambda _: b'{"format_version": ' + b"1" * 9999 + b"}"), "is not JSON"),
    "duplicate key": (written(CONFIG, lambda raw: b'{"dim": 4,' + raw[1:]), "duplicate key .dim."),
    "surrogate": (written(CONFIG, lambda raw: raw.replace(b'"tiny"', b'"\\ud800"')), "config.json is invalid"),
    "future version": (edit_config(format_version=2), "format version 2"),
    "version is 1.0": (edit_config(format_version=1.0), "format version 1.0"),
    "version is long": (edit_config(format_version="9" * 9999), r"format version '9{199}\.\.\., this"),
    "unknown key": (edit_config(surprise=1), "surprise"),
    "long key": (edit_config(**{"\x1b[31m" + "k" * 9999: 1}), r"invalid: \?\[31mk{195}\.\.\.: Extra"),
    "true as a number": (edit_config(layer=True), "layer: Input should be a valid integer"),
    "infinite unit": (written(CONFIG, lambda raw: raw.replace(b"0.5", b"1e999")), "temperature_unit: "),
    "excluded token outside": (edit_config(excluded_token_ids=[3]), "excluded_token_ids holds 3"),
    "excluded token has senses": (edit_config(excluded_token_ids=[1, 2]), "token 2 has 4 senses, but config.json excl"),
    "other width": (edit_config(dim=4), r"centroids is .*should be"),
    "other dtype": (edit_config(dtype="bfloat16"), r"centroids is .*should be"),
    "link out: config": (lambda f: move_out(f, CONFIG), "outside the dictionary"),
    "link out: data": (lambda f: move_out(f, DATA), "outside the dictionary"),
    "no data": (lambda f: (f / DATA).unlink(), r"dictionary.safetensors is missing"),
    "data is a pipe": (replaced(DATA, os.mkfifo), "is not a regular file"),
    "empty data": (written(DATA, lambda _: b""), "truncated"),
    "truncated": (written(DATA, lambda raw: raw[:-1]), "truncated"),
    "metadata": (lambda f: edit_header(f / DATA, lambda h: h.update(__metadata__={"a": "b"})), "invalid header"),
    "vast shape": (header("centroids", shape=[BIG, BIG]), UNALIGNED),
    "overlapping": (header("token_counts", data_offsets=[0, 32]), UNALIGNED),
    "object dtype": (header("counts", dtype="O"), UNALIGNED),
    "escapes in a dtype": (header("spread", dtype="\x1b]0;x\x07"), r"spread \(\?\]0;x\? "),
    "missing tensor": (without_tensor("spread"), "spread is None, but should be"),
    "renamed tensor": (renamed("x"), "spread is None"),
    "escapes in a name": (renamed("\x1b[2J" + "x" * 5000), r": \?\[2Jx{196}\.\.\. is .* should be None"),
    "offsets from 1": (array("offsets", 1, 2, 2, 6), "offsets must increase"),
    "offsets decrease": (array("offsets", 0, 4, 2, 6), "offsets must increase"),
    "offsets overflow": (array("offsets", 0, 2**63 - 1, -(2**63), 6), "offsets must increase"),
    "negative counts": (array("counts", -1), "counts holds the value -1"),
    "counts that overflow": (array("counts", *[2**62] * 6), "counts holds values up to 4611"),
    "token counts that overflow": (array("token_counts", *[2**63 - 1] * 3), "token_counts holds values up to"),
    "NaN distance": (array("spread", NAN), "spread holds"),
    "negative distance": (array("spread", -1.0), "spread holds"),
}

WIDE = holes(1, 1 << 13, 1 << 16, offsets={1: 1 << 13}, counts=dict.fromkeys(range(1 << 13), 1))
SIZES: dict[str, tuple[Corrupt, str]] = {
    "vast vocabulary": (holes(1 << 36, 0), "vocab_size: Input should be less than or equal to 4194304"),
    "vast width": (edit_config(dim=1 << 40), "dim: Input should be less than or equal to 65536"),
    "more senses than possible": (holes(3, 1 << 40, dim=1), "declares 1099511627776 senses, but 3 tokens"),
    "sparse counts": (holes(1 << 14, 1 << 28, offsets={1 << 14: 1 << 28}), "counts holds the value 0|cannot map"),
    "all sparse": (holes(MANY, 1 << 36), "counts holds the value 0|cannot map"),
    "many tokens, offsets decrease": (
        holes(MANY, 2, counts={0: 1, 1: 1}, offsets={1: 2, MANY: 2}),
        "offsets must increase",
    ),
    "many tokens, negative token count": (
        holes(MANY, 1, counts={0: 1}, offsets={MANY: 1}, token_counts={5: 1 << 63}),
        "token_counts holds the value -",
    ),
    "wide senses": (WIDE, "token 0 has 8192 senses of width 65536, but the maximum is 4096"),
}


def in_index(**values: object) -> Corrupt:
    return lambda folder: edit_json(folder / INDEX, lambda index: index.update(values))


def second(**values: object) -> Corrupt:
    """Change the entry of the second file in the maps of the index."""
    return lambda folder: edit_json(
        folder / INDEX, lambda i: [i[key].update({"centroids.00002": value}) for key, value in values.items()]
    )


HOSTILE_INDEX: dict[str, tuple[Corrupt, str]] = {
    "path up": (second(weight_map="../outside.safetensors"), "does not list"),
    "another number": (second(weight_map="dictionary-00003-of-00002.safetensors"), "does not list"),
    "gap": (second(row_ranges=[5, 6]), "does not list"),
    "negative": (second(row_ranges=[3, -6]), "invalid"),
    "too many rows": (second(row_ranges=[3, 7]), "should be"),
    "text as a number": (second(row_ranges=["3", "6"]), "valid integer"),
    "not JSON": (written(INDEX, lambda _: b"x"), "is invalid"),
    "large index": (lambda f: os.truncate(f / INDEX, 1 << 40), "more than the limit of"),
    "no index": (lambda f: (f / INDEX).unlink(), r"dictionary.safetensors is missing"),
    "link out": (lambda f: move_out(f, SECOND), "outside the dictionary"),
}

SCALES = "scales holds values that are NaN, infinite or below 1e-45"
HOSTILE_INT8: dict[str, tuple[Corrupt, str]] = {
    "NaN scale": (array("scales", NAN), SCALES),
    "no scales": (without_tensor("scales"), "scales is None, but should be"),
    "fewer scales": (header("scales", shape=[5]), UNALIGNED),
    "declared as float16": (edit_config(dtype="float16"), "should be"),
    "declared as int4": (edit_config(dtype="int4"), "dtype: Input should be"),
    "truncated": (written(DATA, lambda raw: raw[:-1]), "truncated"),
}
