"""Corrupted dictionary folders (config, arrays, index, sizes) and the error message expected for each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
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


def edit_array(folder: Path, name: str, values: list) -> None:
    path = folder / DATA
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    data = np.array(values, {"I64": np.int64, "F32": np.float32, "F16": np.float16}[entry["dtype"]]).tobytes()
    raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][0] + len(data)] = data
    path.write_bytes(raw)


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
    return lambda folder: edit_header(folder / DATA, lambda h: h.update({new: h.pop("spread")}))


def array(name: str, *values: float) -> Corrupt:
    return lambda folder: edit_array(folder, name, list(values))


def without_tensor(name: str) -> Corrupt:
    from safetensors.numpy import load_file, save_file

    def corrupt(folder: Path) -> None:
        arrays = load_file(folder / DATA)
        del arrays[name]
        save_file(arrays, folder / DATA)

    return corrupt


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


def wide(folder: Path) -> None:
    """Claim a width of 65536 for 8192 senses of one token without writing the centroids."""
    size = 1 << 13
    numbers = {"offsets": {1: size}, "counts": dict.fromkeys(range(size), 1)}
    holes(1, size, 1 << 16, **numbers)(folder)


UNALIGNED = "invalid dtype or data offsets"
HOSTILE: dict[str, tuple[Corrupt, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no config.json"),
    "config is a folder": (replaced(CONFIG, Path.mkdir), "no config.json"),
    "config is a pipe": (replaced(CONFIG, os.mkfifo), "no config.json"),
    "config links to itself": (replaced(CONFIG, lambda p: p.symlink_to(p)), "no config.json"),
    "config is a device": (replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")), "no config.json"),
    "config is truncated": (written(CONFIG, lambda _: b"{"), "is not JSON"),
    "config is binary": (written(CONFIG, lambda _: b"\xff\xfe\x00"), "is not JSON"),
    "config is deeply nested": (written(CONFIG, lambda _: b"[" * 200_000), "is not JSON"),
    "config is a list": (written(CONFIG, lambda _: b"[1]"), "has no format_version"),
    "foreign config": (written(CONFIG, lambda _: b'{"model_type": "bert"}'), "has no format_version"),
    "sparse config": (lambda f: os.truncate(f / CONFIG, 1 << 40), "1099511627776 bytes, more than"),
    "large config": (written(CONFIG, lambda _: b" " * (5 << 20)), "5242880 bytes, more than"),
    "number too long": (written(CONFIG, lambda _: b'{"format_version": ' + b"1" * 9999 + b"}"), "is not JSON"),
    "duplicate key": (written(CONFIG, lambda raw: b'{"dim": 4,' + raw[1:]), "duplicate key .dim."),
    "surrogate": (written(CONFIG, lambda raw: raw.replace(b'"tiny"', b'"\\ud800"')), "config.json is invalid"),
    "future version": (edit_config(format_version=2), "format version 2"),
    "version is true": (edit_config(format_version=True), "format version True"),
    "version is 1.0": (edit_config(format_version=1.0), "format version 1.0"),
    "version is text": (edit_config(format_version="1"), "format version '1'"),
    "version is long": (edit_config(format_version="9" * 9999), r"format version '9{199}\.\.\., this"),
    "unknown key": (edit_config(surprise=1), "surprise"),
    "long key": (edit_config(**{"\x1b[31m" + "k" * 9999: 1}), r"invalid: \?\[31mk{195}\.\.\.: Extra"),
    "unknown metric": (edit_config(metric="l1"), "metric"),
    "negative dim": (edit_config(dim=-3), "dim"),
    "number as text": (edit_config(dim="3"), "dim: Input should be a valid integer"),
    "true as a number": (edit_config(layer=True), "layer: Input should be a valid integer"),
    "huge number": (edit_config(seed=10**4000), "seed: "),
    "long name": (edit_config(tokenizer_fingerprint="x" * 5000), "tokenizer_fingerprint: .* at most 4096"),
    "long prompt": (edit_config(prompt="x" * 70_000), "prompt: .* at most 65536"),
    "NaN unit": (edit_config(temperature_unit=NAN), "temperature_unit"),
    "infinite unit": (written(CONFIG, lambda raw: raw.replace(b"0.5", b"1e999")), "temperature_unit: "),
    "unit too large": (edit_config(temperature_unit=1e300), "temperature_unit: "),
    "too many figures": (edit_config(quality={str(i): 0.0 for i in range(101)}), "quality: .* at most 100"),
    "excluded token outside": (edit_config(excluded_token_ids=[3]), "excluded_token_ids holds 3"),
    "excluded token has senses": (edit_config(excluded_token_ids=[1, 2]), "token 2 has 4 senses, but config.json excl"),
    "too many excluded": (edit_config(excluded_token_ids=[1] * 70_000), "excluded_token_ids: .* at most 65536"),
    "other vocabulary": (edit_config(vocab_size=4), r"offsets is .*should be"),
    "other width": (edit_config(dim=4), r"centroids is .*should be"),
    "other dtype": (edit_config(dtype="bfloat16"), r"centroids is .*should be"),
    "link out: config": (lambda f: move_out(f, CONFIG), "outside the dictionary"),
    "link out: data": (lambda f: move_out(f, DATA), "outside the dictionary"),
    "no data": (lambda f: (f / DATA).unlink(), r"dictionary.safetensors is missing"),
    "other case": (lambda f: (f / DATA).rename(f / DATA.title()), "is missing"),
    "data is a pipe": (replaced(DATA, os.mkfifo), "is not a regular file"),
    "data is a folder": (replaced(DATA, Path.mkdir), "is not a regular file"),
    "data links to itself": (replaced(DATA, lambda p: p.symlink_to(p)), "is not a regular file"),
    "index is a pipe": (replaced(INDEX, os.mkfifo), "index.json is not a regular file"),
    "empty data": (written(DATA, lambda _: b""), "truncated"),
    "truncated": (written(DATA, lambda raw: raw[:-1]), "truncated"),
    "truncated header": (written(DATA, lambda raw: raw[:60]), "truncated"),
    "appended": (written(DATA, lambda raw: raw + b"x"), "truncated"),
    "vast header": (written(DATA, lambda _: b"\xff" * 99), "truncated"),
    "header is not JSON": (written(DATA, lambda _: b"\4" + bytes(7) + b"abcd"), "invalid header"),
    "metadata": (lambda f: edit_header(f / DATA, lambda h: h.update(__metadata__={"a": "b"})), "invalid header"),
    "negative shape": (header("counts", shape=[-6]), "invalid header"),
    "vast range": (header("centroids", shape=[BIG, 1], data_offsets=[0, BIG * 2]), "invalid header"),
    "vast shape": (header("centroids", shape=[BIG, BIG]), UNALIGNED),
    "overlapping": (header("token_counts", data_offsets=[0, 32]), UNALIGNED),
    "object dtype": (header("counts", dtype="O"), UNALIGNED),
    "larger dtype": (header("spread", dtype="I64"), UNALIGNED),
    "escapes in a dtype": (header("spread", dtype="\x1b]0;x\x07"), r"spread \(\?\]0;x\? "),
    "missing tensor": (without_tensor("spread"), "spread is None, but should be"),
    "renamed tensor": (renamed("x"), "spread is None"),
    "escapes in a name": (renamed("\x1b[2J" + "x" * 5000), r": \?\[2Jx{196}\.\.\. is .* should be None"),
    "reshaped": (header("centroids", shape=[3, 6]), r"centroids is .*should"),
    "offsets from 1": (array("offsets", 1, 2, 2, 6), "offsets must increase"),
    "offsets decrease": (array("offsets", 0, 4, 2, 6), "offsets must increase"),
    "offsets end early": (array("offsets", 0, 2, 2, 5), "offsets must increase"),
    "offsets overflow": (array("offsets", 0, 2**63 - 1, -(2**63), 6), "offsets must increase"),
    "negative counts": (array("counts", -1), "counts holds the value -1"),
    "empty sense": (array("counts", 1, 0), "counts holds the value 0"),
    "counts that overflow": (array("counts", *[2**62] * 6), "counts holds values up to 4611"),
    "negative token counts": (array("token_counts", -7), "token_counts holds the value -7"),
    "token counts that overflow": (array("token_counts", *[2**63 - 1] * 3), "token_counts holds values up to"),
    "NaN distance": (array("spread", NAN), "spread holds"),
    "infinite distance": (array("spread", INF), "spread holds"),
    "negative distance": (array("spread", -1.0), "spread holds"),
}

SIZES: dict[str, tuple[Corrupt, str]] = {
    "vast vocabulary": (holes(1 << 36, 0), "vocab_size: Input should be less than or equal to 4194304"),
    "vast width": (edit_config(dim=1 << 40), "dim: Input should be less than or equal to 65536"),
    "more senses than possible": (holes(3, 1 << 40, dim=1), "declares 1099511627776 senses, but 3 tokens"),
    "sparse counts": (holes(1 << 14, 1 << 28, offsets={1 << 14: 1 << 28}), "counts holds the value 0|cannot map"),
    "all sparse": (holes(MANY, 1 << 36), "counts holds the value 0|cannot map"),
    "many tokens, offsets end wrong": (holes(MANY, 1, counts={0: 1}), "offsets must increase"),
    "many tokens, offsets begin wrong": (holes(MANY, 1, counts={0: 1}, offsets={0: 1, MANY: 1}), "offsets must inc"),
    "many tokens, offsets decrease": (
        holes(MANY, 2, counts={0: 1, 1: 1}, offsets={1: 2, MANY: 2}),
        "offsets must increase",
    ),
    "many tokens, negative token count": (
        holes(MANY, 1, counts={0: 1}, offsets={MANY: 1}, token_counts={5: 1 << 63}),
        "token_counts holds the value -",
    ),
    "wide senses": (wide, "token 0 has 8192 senses of width 65536, more than 1 GiB"),
}


def in_index(**values: object) -> Corrupt:
    return lambda folder: edit_json(folder / INDEX, lambda index: index.update(values))


def second(**values: object) -> Corrupt:
    """Change the entry of the second file in the maps of the index."""
    return lambda folder: edit_json(
        folder / INDEX, lambda i: [i[key].update({"centroids.00002": value}) for key, value in values.items()]
    )


HOSTILE_INDEX: dict[str, tuple[Corrupt, str]] = {
    "path up": (second(weight_map="../outside.safetensors"), "only dictionary-"),
    "absolute path": (second(weight_map="/etc/passwd"), "only dictionary-"),
    "path in a name": (second(weight_map=f"{SECOND}/../../x"), "only dictionary-"),
    "another number": (second(weight_map="dictionary-00003-of-00002.safetensors"), "does not list contiguous"),
    "gap": (second(row_ranges=[5, 6]), "does not list"),
    "negative": (second(row_ranges=[3, -6]), "invalid"),
    "decreasing": (second(row_ranges=[3, 1]), "does not list"),
    "too many rows": (second(row_ranges=[3, 7]), "should be"),
    "text as a number": (second(row_ranges=["3", "6"]), "valid integer"),
    "vast range": (second(row_ranges=[3, 1 << 61]), "declares 2305843009213693952 senses"),
    "one range": (in_index(row_ranges={"centroids.00001": [0, 3]}), "does not list"),
    "no ranges": (in_index(row_ranges={}), "does not list"),
    "not JSON": (written(INDEX, lambda _: b"x"), "is invalid"),
    "large index": (lambda f: os.truncate(f / INDEX, 1 << 40), "more than the limit of"),
    "no index": (lambda f: (f / INDEX).unlink(), r"dictionary.safetensors is missing"),
    "no shard": (lambda f: (f / SECOND).unlink(), "is missing"),
    "shard is a pipe": (replaced(SECOND, os.mkfifo), "is not a regular file"),
    "truncated shard": (written(SECOND, lambda raw: raw[:-2]), "truncated"),
    "link out": (lambda f: move_out(f, SECOND), "outside the dictionary"),
}

SCALES = "scales holds values that are not finite and above 0"
HOSTILE_INT8: dict[str, tuple[Corrupt, str]] = {
    "zero scale": (array("scales", 1.0, 0.0), SCALES),
    "negative scale": (array("scales", -1.0), SCALES),
    "NaN scale": (array("scales", NAN), SCALES),
    "infinite scale": (array("scales", INF), SCALES),
    "no scales": (without_tensor("scales"), "scales is None, but should be"),
    "fewer scales": (header("scales", shape=[5]), UNALIGNED),
    "integer scales": (header("scales", dtype="I64", shape=[3]), r"scales is .*should be"),
    "declared as float16": (edit_config(dtype="float16"), "should be"),
    "declared as int4": (edit_config(dtype="int4"), "dtype: Input should be"),
    "truncated": (written(DATA, lambda raw: raw[:-1]), "truncated"),
}
