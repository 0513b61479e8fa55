"""Ways to spoil a dictionary folder: config, arrays, index and sizes; and the words that each is refused in."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tiny import make

from msense.dictionary import DictionaryFiles
from msense.dictionary import format as dictionary_format


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
    path = folder / "dictionary.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    data = np.array(values, {"I64": np.int64, "F32": np.float32, "F16": np.float16}[entry["dtype"]]).tobytes()
    raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][0] + len(data)] = data
    path.write_bytes(raw)


def one_tensor_missing(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "dictionary.safetensors")
    del arrays["spread"]
    save_file(arrays, folder / "dictionary.safetensors")


def move_out(folder: Path, name: str) -> None:
    outside = folder.parent / f"outside {Path(name).name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def edit_config(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG, lambda config: config.update(values))


def replaced(name: str, make_it: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make_it(folder / name)

    return spoil


def holes(vocabulary: int, senses: int, dim: int = 3, **numbers: dict[int, int]) -> Callable[[Path], None]:
    """Write a file of these sizes that takes a few pages on disk; the numbers are at their places, all others 0."""

    def spoil(folder: Path) -> None:
        edit_config(vocab_size=vocabulary, dim=dim)(folder)
        config = make([1], dim=dim).config.model_copy(update={"vocab_size": vocabulary})
        ((path, tensors),) = dictionary_format.file_layout(DictionaryFiles(folder), config, [0, senses])
        header = dictionary_format._header(tensors)
        start = {name: entry["data_offsets"] for name, entry in json.loads(header[8:]).items()}
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + start["centroids"][1])
            for name, values in numbers.items():
                for place, value in values.items():
                    file.seek(len(header) + start[name][0] + 8 * place)
                    file.write(value.to_bytes(8, "little"))

    return spoil


def escapes(folder: Path) -> None:
    edit_header(folder / DATA, lambda h: h.update({"\x1b[2J" + "x" * 5000: h.pop("spread")}))


CONFIG, DATA = "config.json", "dictionary.safetensors"
BIG = 1 << 61
MANY = 1 << 22
HOSTILE = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no config.json"),
    "config is a folder": (lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()), "no config.json"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "config is binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "config is deep": (lambda f: (f / CONFIG).write_text("[" * 200_000), "is not JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[1]"), "states no format_version"),
    "foreign config": (lambda f: (f / CONFIG).write_text('{"model_type": "bert"}'), "states no format_version"),
    "future version": (lambda f: edit_json(f / CONFIG, lambda c: c.update(format_version=2)), "format version 2"),
    "extra field": (lambda f: edit_json(f / CONFIG, lambda c: c.update(surprise=1)), "surprise"),
    "unknown metric": (lambda f: edit_json(f / CONFIG, lambda c: c.update(metric="l1")), "metric"),
    "negative dim": (lambda f: edit_json(f / CONFIG, lambda c: c.update(dim=-3)), "dim"),
    "NaN unit": (
        lambda f: edit_json(f / CONFIG, lambda c: c.update(temperature_unit=float("nan"))),
        "temperature_unit",
    ),
    "other vocabulary": (lambda f: edit_json(f / CONFIG, lambda c: c.update(vocab_size=4)), r"offsets is .*should be"),
    "other width": (lambda f: edit_json(f / CONFIG, lambda c: c.update(dim=4)), r"centroids is .*should be"),
    "other dtype": (lambda f: edit_json(f / CONFIG, lambda c: c.update(dtype="bfloat16")), r"centroids is .*should be"),
    "no data": (lambda f: (f / DATA).unlink(), r"dictionary.safetensors is missing"),
    "empty data": (lambda f: (f / DATA).write_bytes(b""), "cut off"),
    "truncated": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:-1]), "cut off"),
    "truncated header": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:60]), "cut off"),
    "appended": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes() + b"x"), "cut off"),
    "vast header": (lambda f: (f / DATA).write_bytes(b"\xff" * 99), "cut off"),
    "header is no JSON": (lambda f: (f / DATA).write_bytes((4).to_bytes(8, "little") + b"abcd"), "foreign header"),
    "metadata": (lambda f: edit_header(f / DATA, lambda h: h.update(__metadata__={"a": "b"})), "foreign header"),
    "vast shape": (
        lambda f: edit_header(f / DATA, lambda h: h["centroids"].update(shape=[BIG, BIG])),
        "not where they should be",
    ),
    "negative shape": (lambda f: edit_header(f / DATA, lambda h: h["counts"].update(shape=[-6])), "foreign header"),
    "vast range": (
        lambda f: edit_header(f / DATA, lambda h: h["centroids"].update(shape=[BIG, 1], data_offsets=[0, BIG * 2])),
        "foreign header",
    ),
    "overlapping": (
        lambda f: edit_header(f / DATA, lambda h: h["token_counts"].update(data_offsets=h["offsets"]["data_offsets"])),
        "not where they should be",
    ),
    "object dtype": (lambda f: edit_header(f / DATA, lambda h: h["counts"].update(dtype="O")), "not where they should"),
    "float counts": (
        lambda f: edit_header(f / DATA, lambda h: h["spread"].update(dtype="I64")),
        "not where they should",
    ),
    "missing tensor": (one_tensor_missing, "holds the tensors"),
    "renamed tensor": (lambda f: edit_header(f / DATA, lambda h: h.update(x=h.pop("spread"))), "holds the tensors"),
    "reshaped": (
        lambda f: edit_header(f / DATA, lambda h: h["centroids"].update(shape=[3, 6])),
        r"centroids is .*should",
    ),
    "offsets from 1": (lambda f: edit_array(f, "offsets", [1, 2, 2, 6]), "offsets must rise"),
    "offsets fall": (lambda f: edit_array(f, "offsets", [0, 4, 2, 6]), "offsets must rise"),
    "offsets end early": (lambda f: edit_array(f, "offsets", [0, 2, 2, 5]), "offsets must rise"),
    "offsets wrap around": (lambda f: edit_array(f, "offsets", [0, 2**63 - 1, -(2**63), 6]), "offsets must rise"),
    "negative counts": (lambda f: edit_array(f, "counts", [-1]), "counts holds the negative number -1"),
    "negative token counts": (
        lambda f: edit_array(f, "token_counts", [-7]),
        "token_counts holds the negative number -7",
    ),
    "NaN spread": (lambda f: edit_array(f, "spread", [float("nan")]), "spread holds"),
    "infinite spread": (lambda f: edit_array(f, "spread", [float("inf")]), "spread holds"),
    "spread below zero": (lambda f: edit_array(f, "spread", [-1.0]), "spread holds"),
    "a sense of no points": (lambda f: edit_array(f, "counts", [1, 0]), "counts holds 0"),
    "counts that overflow": (lambda f: edit_array(f, "counts", [2**62] * 6), "counts holds numbers up to 4611"),
    "token counts that overflow": (
        lambda f: edit_array(f, "token_counts", [2**63 - 1] * 3),
        "token_counts holds numbers",
    ),
    "version is true": (edit_config(format_version=True), "format version True"),
    "version is 1.0": (edit_config(format_version=1.0), "format version 1.0"),
    "version is text": (edit_config(format_version="1"), "format version '1'"),
    "version is long": (edit_config(format_version="9" * 9999), r"format version '9{199}\.\.\., this"),
    "a number as text": (edit_config(dim="3"), "dim: Input should be a valid integer"),
    "true as a number": (edit_config(layer=True), "layer: Input should be a valid integer"),
    "a huge number": (edit_config(seed=10**4000), "seed: "),
    "a number too long to read": (
        lambda f: (f / CONFIG).write_text('{"format_version": ' + "1" * 9999 + "}"),
        "is not JSON",
    ),
    "a key twice": (
        lambda f: (f / CONFIG).write_text('{"dim": 4,' + (f / CONFIG).read_text()[1:]),
        "the key 'dim' comes twice",
    ),
    "half a surrogate": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"tiny"', '"\\ud800"')),
        "config.json is wrong",
    ),
    "a long name": (edit_config(tokenizer_fingerprint="x" * 5000), "tokenizer_fingerprint: .* at most 4096"),
    "a long prompt": (edit_config(prompt="x" * 70_000), "prompt: .* at most 65536"),
    "a long key": (edit_config(**{"\x1b[31m" + "k" * 9999: 1}), r"wrong: \?\[31mk{195}\.\.\.: Extra"),
    "unit too large": (edit_config(temperature_unit=1e300), "temperature_unit: "),
    "infinite unit": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace("0.5", "1e999")),
        "temperature_unit: ",
    ),
    "too many figures": (edit_config(quality={str(i): 0.0 for i in range(101)}), "quality: .* at most 100"),
    "excluded token outside": (edit_config(excluded_token_ids=[3]), "excluded_token_ids holds 3"),
    "excluded token has senses": (edit_config(excluded_token_ids=[1, 2]), "token 2 has 4 senses, but config.json excl"),
    "too many excluded": (edit_config(excluded_token_ids=[1] * 70_000), "excluded_token_ids: .* at most 65536"),
    "unending config": (lambda f: os.truncate(f / CONFIG, 1 << 40), "1099511627776 bytes; no dictionary"),
    "large config": (lambda f: (f / CONFIG).write_text(" " * (5 << 20)), "5242880 bytes; no dictionary"),
    "config is a pipe": (replaced(CONFIG, os.mkfifo), "no config.json"),
    "config links to itself": (replaced(CONFIG, lambda p: p.symlink_to(p)), "no config.json"),
    "config is a device": (replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")), "no config.json"),
    "data is a pipe": (replaced(DATA, os.mkfifo), "is no plain file"),
    "data is a folder": (replaced(DATA, Path.mkdir), "is no plain file"),
    "data links to itself": (replaced(DATA, lambda p: p.symlink_to(p)), "is no plain file"),
    "index is a pipe": (replaced("dictionary.safetensors.index.json", os.mkfifo), "index.json is no plain file"),
    "escapes in a name": (escapes, r"holds the tensors .{200}\.\.\., not"),
    "escapes in a dtype": (
        lambda f: edit_header(f / DATA, lambda h: h["spread"].update(dtype="\x1b]0;x\x07")),
        r"spread \(\?\]0;x\? ",
    ),
    "other case": (lambda f: (f / DATA).rename(f / DATA.title()), "is missing"),
    "link out: config": (lambda f: move_out(f, CONFIG), "outside the dictionary"),
    "link out: data": (lambda f: move_out(f, DATA), "outside the dictionary"),
}


SIZES = {
    "vocabulary without end": (holes(1 << 36, 0), "vocab_size: Input should be less than or equal to 4194304"),
    "width without end": (edit_config(dim=1 << 40), "dim: Input should be less than or equal to 65536"),
    "more senses than possible": (holes(3, 1 << 40, dim=1), "speaks of 1099511627776 senses, but 3 tokens"),
    "counts are a hole": (holes(1 << 14, 1 << 28, offsets={1 << 14: 1 << 28}), "counts holds 0|cannot be mapped"),
    "all is a hole": (holes(MANY, 1 << 36), "counts holds 0|cannot be mapped"),
    "many tokens, offsets end wrong": (holes(MANY, 1, counts={0: 1}), "offsets must rise"),
    "many tokens, offsets begin wrong": (
        holes(MANY, 1, counts={0: 1}, offsets={0: 1, MANY: 1}),
        "offsets must rise",
    ),
    "many tokens, offsets fall": (
        holes(MANY, 2, counts={0: 1, 1: 1}, offsets={1: 2, MANY: 2}),
        "offsets must rise",
    ),
    "many tokens, negative token count": (
        holes(MANY, 1, counts={0: 1}, offsets={MANY: 1}, token_counts={5: 1 << 63}),
        "token_counts holds the negative number",
    ),
    "wide senses": (
        lambda f: (make([1 << 13], dim=1).save(f), holes_of_width(f, 1 << 16)),
        "token 0 has 8192 senses of width 65536, over 1 GiB",
    ),
}


def holes_of_width(folder: Path, dim: int) -> None:
    """Widen the centroids of a dictionary without writing any."""
    edit_config(dim=dim)(folder)
    header = json.loads((folder / DATA).read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    entry = header["centroids"]
    entry["data_offsets"][1] += entry["shape"][0] * (dim - entry["shape"][1]) * 2
    edit_header(folder / DATA, lambda h: h["centroids"].update(shape=[entry["shape"][0], dim], **{}))
    edit_header(folder / DATA, lambda h: h["centroids"].update(data_offsets=entry["data_offsets"]))
    length = int.from_bytes((folder / DATA).read_bytes()[:8], "little")
    os.truncate(folder / DATA, 8 + length + entry["data_offsets"][1])


INDEX = "dictionary.safetensors.index.json"
SECOND = "dictionary-00002-of-00002.safetensors"


def rename_in_index(folder: Path, name: str) -> None:
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({"centroids.00002": name}))


HOSTILE_INDEX = {
    "path up": (lambda f: rename_in_index(f, "../outside.safetensors"), "only dictionary-"),
    "absolute path": (lambda f: rename_in_index(f, "/etc/passwd"), "only dictionary-"),
    "hidden in a name": (lambda f: rename_in_index(f, f"{SECOND}/../../x"), "only dictionary-"),
    "another number": (lambda f: rename_in_index(f, "dictionary-00003-of-00002.safetensors"), "does not list slices"),
    "gap": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [5, 6]})),
        "does not list",
    ),
    "negative": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [3, -6]})),
        "wrong",
    ),
    "falling": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [3, 1]})),
        "does not",
    ),
    "too many rows": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [3, 7]})),
        "should be",
    ),
    "one range": (lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].pop("centroids.00002")), "does not list"),
    "no ranges": (lambda f: edit_json(f / INDEX, lambda i: i.update(row_ranges={})), "does not list"),
    "no JSON": (lambda f: (f / INDEX).write_text("x"), "is wrong"),
    "text as a number": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": ["3", "6"]})),
        "valid integer",
    ),
    "vast range": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [3, 1 << 61]})),
        "speaks of 2305843009213693952 senses",
    ),
    "shard is a pipe": (replaced("dictionary-00002-of-00002.safetensors", os.mkfifo), "is no plain file"),
    "large index": (lambda f: os.truncate(f / INDEX, 1 << 40), "no dictionary has such a file"),
    "no shard": (lambda f: (f / SECOND).unlink(), "is missing"),
    "truncated shard": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-2]), "cut off"),
    "no index": (lambda f: (f / INDEX).unlink(), r"dictionary.safetensors is missing"),
    "link out": (lambda f: move_out(f, SECOND), "outside the dictionary"),
}


def no_scales(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / DATA)
    del arrays["scales"]
    save_file(arrays, folder / DATA)


HOSTILE_INT8 = {
    "a scale of zero": (lambda f: edit_array(f, "scales", [1.0, 0.0]), "scales holds numbers that are not above 0"),
    "a negative scale": (lambda f: edit_array(f, "scales", [-1.0]), "scales holds numbers that are not above 0"),
    "a scale is NaN": (lambda f: edit_array(f, "scales", [float("nan")]), "scales holds numbers that are not above 0"),
    "an infinite scale": (lambda f: edit_array(f, "scales", [float("inf")]), "scales holds numbers that are not above"),
    "no scales": (no_scales, "holds the tensors"),
    "fewer scales": (lambda f: edit_header(f / DATA, lambda h: h["scales"].update(shape=[5])), "not where they should"),
    "scales as numbers": (
        lambda f: edit_header(f / DATA, lambda h: h["scales"].update(dtype="I64", shape=[3])),
        r"scales is .*should be",
    ),
    "said to be float16": (edit_config(dtype="float16"), "holds the tensors"),
    "said to be int4": (edit_config(dtype="int4"), "dtype: Input should be"),
    "cut off": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:-1]), "cut off"),
}
