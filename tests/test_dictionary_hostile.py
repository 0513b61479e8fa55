"""Dictionary folders that nobody should trust: each fault is refused in its own words, at once, and with little memory."""

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import exemplars, make, with_tokenizer, word_piece

from msense import storage
from msense.__main__ import main
from msense.dictionary import DictionaryFiles, SenseDictionary
from msense.dictionary import format as dictionary_format
from msense.dictionary.contexts import exemplar_schema
from msense.dictionary.pages import check_pages
from msense.errors import BadInput, DictionaryError


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


def table(rows: int = 4, token: int = 2, sense: int = 0, text: str = "x", distance: float = 0.0) -> pa.Table:
    columns: list[list[Any]] = [[token] * rows, [sense] * rows, list(range(rows)), [distance] * rows]
    columns += [[text] * rows for _ in range(4)]
    schema = exemplar_schema()
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def parquet(rows: pa.Table, **how: Any) -> Callable[[Path], None]:  # noqa: ANN401 - what pyarrow takes
    return lambda folder: pq.write_table(rows, folder / EXEMPLARS, **{"row_group_size": 1 << 16, **how})


def footer(length: int, size: int) -> Callable[[Path], None]:
    """Write a file of holes that ends like a parquet file with a footer of so many bytes."""

    def spoil(folder: Path) -> None:
        with (folder / EXEMPLARS).open("wb") as file:
            file.seek(size - 8)
            file.write(length.to_bytes(4, "little") + b"PAR1")

    return spoil


def cut(folder: Path) -> None:
    (folder / EXEMPLARS).write_bytes((folder / EXEMPLARS).read_bytes()[:-100])


def middle_lost(folder: Path) -> None:
    raw = (folder / EXEMPLARS).read_bytes()
    (folder / EXEMPLARS).write_bytes(raw[:40] + raw[140:])


def not_text(folder: Path) -> None:
    parquet(table(), compression="none")(folder)
    raw = (folder / EXEMPLARS).read_bytes()
    assert b"\x01\x00\x00\x00x" in raw
    (folder / EXEMPLARS).write_bytes(raw.replace(b"\x01\x00\x00\x00x", b"\x01\x00\x00\x00\xff"))


def wrong_type(folder: Path) -> None:
    """Give a column in the footer another type than in the schema; arrow's metadata objects end the process at it."""
    raw = (folder / EXEMPLARS).read_bytes()
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    changed = raw[start:].replace(b"\x15\x02\x19", b"\x15\x7e\x19")
    assert changed != raw[start:]
    (folder / EXEMPLARS).write_bytes(raw[:start] + changed)


def long_text(folder: Path) -> None:
    rows = table(1)
    long = pa.array(["a" * (65 << 20)])
    parquet(
        rows.set_column(7, rows.schema.field(7), long),
        compression="zstd",
        write_statistics=["token"],
        use_dictionary=False,
    )(folder)


def lying_footer(folder: Path) -> None:
    """Say in the footer that the last column is small; its page says otherwise, and is right."""
    long_text(folder)
    raw = bytearray((folder / EXEMPLARS).read_bytes())
    size = pq.read_metadata(folder / EXEMPLARS).row_group(0).column(7).total_uncompressed_size
    wanted, other = thrift_number(size), thrift_number(1 << 20)
    place = raw.rindex(wanted)
    assert len(wanted) == len(other) == 4
    raw[place : place + 4] = other
    (folder / EXEMPLARS).write_bytes(raw)
    assert pq.read_metadata(folder / EXEMPLARS).row_group(0).column(7).total_uncompressed_size == 1 << 20


def thrift_number(value: int) -> bytes:
    value, out = value << 1, b""
    while value >= 128:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def missing_values(folder: Path) -> None:
    rows = table()
    parquet(rows.set_column(5, rows.schema.field(5), pa.array(["x", None, "x", "x"], pa.string())))(folder)


EXEMPLARS = "exemplars.parquet"
HOSTILE_EXEMPLARS = {
    "cut": (cut, "cut off or no parquet"),
    "empty": (lambda f: (f / EXEMPLARS).write_bytes(b""), "cut off or no parquet"),
    "not parquet": (lambda f: (f / EXEMPLARS).write_bytes(b"PAR1 not really PAR1"), "cannot be read"),
    "footer is zeros": (footer(60_000, 1 << 20), "cannot be read"),
    "footer without end": (footer((1 << 32) - 1, 1 << 40), "footer has 4294967295 bytes, at most"),
    "a hole": (lambda f: os.truncate(f / EXEMPLARS, 1 << 40), "cut off or no parquet"),
    "wrong type in the footer": (wrong_type, "does not have the columns"),
    "middle lost": (middle_lost, "cannot be read"),
    "other columns": (lambda f: pq.write_table(pa.table({"token": [0]}), f / EXEMPLARS), "does not have the columns"),
    "other types": (parquet(table().cast(pa.schema([(n, pa.string()) for n in table().column_names]))), "the columns"),
    "foreign sense": (parquet(table(sense=3)), "sense 3 and rank 0 of token 2: there is none"),
    "negative sense": (parquet(table(sense=-1)), "sense -1 and rank 0 of token 2"),
    "foreign token": (parquet(table(token=99)), "the tokens 99 to 99"),
    "negative token": (parquet(table(token=-5)), "the tokens -5 to -5"),
    "tokens fall": (
        parquet(pa.concat_tables([table(token=5), table(token=2)]), row_group_size=4),
        "the tokens 2 to 2, which are not in order",
    ),
    "missing values": (missing_values, "word has rows without a value"),
    "NaN distance": (parquet(table(distance=float("nan"))), "a distance is NaN"),
    "not UTF-8": (not_text, "Invalid UTF8"),
    "no statistics": (parquet(table(), write_statistics=False), "or no statistics"),
    "too many rows a group": (parquet(table(70_000), row_group_size=1 << 20), "has 70000 rows, not 1 to 65536"),
    "too many rows a sense": (parquet(table(70_000)), "holds over 3072 exemplars"),
    "unpacks to 68 MB": (long_text, "a column has 1 pages of 681574.. bytes"),
    "a footer that lies": (lying_footer, "a column has 1 pages of 681574.. bytes"),
    "repeats a text": (
        lambda f: parquet(table(2000, text="b" * 60_000), write_statistics=["token"])(f),
        "unpack to 2000 rows with 480000000 bytes",
    ),
    "a long text": (
        lambda f: parquet(table(1, text="b" * 70_000), write_statistics=["token"])(f),
        "a text of 70000 bytes",
    ),
    "repeats beginnings": (
        parquet(table(), use_dictionary=False, column_encoding={"left": "DELTA_BYTE_ARRAY"}),
        "the foreign encoding 7",
    ),
    "a pipe": (replaced(EXEMPLARS, os.mkfifo), "is no plain file"),
    "a folder": (replaced(EXEMPLARS, Path.mkdir), "is no plain file"),
    "links to itself": (replaced(EXEMPLARS, lambda p: p.symlink_to(p)), "is no plain file"),
    "links to nothing": (replaced(EXEMPLARS, lambda p: p.symlink_to("nowhere")), "is no plain file"),
    "link out": (lambda f: move_out(f, EXEMPLARS), "outside the dictionary"),
}


def tokenizer(**parts: object) -> Callable[[Path], None]:
    """Change parts of the tokenizer, and state no fingerprint or, as a liar can, the right one."""

    def spoil(folder: Path) -> None:
        edit_config(tokenizer_fingerprint="")(folder)
        edit_json(folder / TOKENIZER, lambda definition: definition.update(parts))

    return spoil


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def steps(step: dict[str, object], number: int) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": [step] * number}


def deep(folder: Path) -> None:
    (folder / TOKENIZER).write_text('{"model": ' + "[" * 200_000)


def swap_two_tokens(folder: Path) -> None:
    text = (folder / TOKENIZER).read_text()
    (folder / TOKENIZER).write_text(text.replace('"bank":2', '"bank":3').replace('"river":3', '"river":2'))


TOKENIZER = "tokenizer/tokenizer.json"
TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
HOSTILE_TOKENIZERS = {
    **{
        f"tokenizer is {text.encode(errors='surrogateescape')!r}": (
            replaced(TOKENIZER, lambda p, text=text: p.write_bytes(text.encode(errors="surrogateescape"))),
            "is not a tokenizer",
        )
        for text in ("", "{", "[]", '{"model": 3}', '{"vocab": {}}', "\udcff")
    },
    "deep": (deep, "is not a tokenizer"),
    "a model without its unknown token": (tokenizer(model={"type": "WordPiece", "vocab": {"x": 0}}), "is not a tokeni"),
    "unknown type": (tokenizer(pre_tokenizer={"type": "Pickle"}), "is not a tokenizer"),
    "unknown id outside": (
        tokenizer(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]], "byte_fallback": False}),
        "is not a tokenizer",
    ),
    "id above 2^32": (
        tokenizer(model={"type": "WordLevel", "unk_token": "a", "vocab": {"a": 1 << 32}}),
        "not a tokeni",
    ),
    "large": (lambda f: os.truncate(f / TOKENIZER, 1 << 40), "for 8 tokens at most"),
    "another tokenizer": (swap_two_tokens, "not the dictionary's tokenizer: its fingerprint is"),
    "panics": (tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}), "fails at 'bank' .*Panic"),
    "searches without end": (
        tokenizer(
            normalizer={"type": "Replace", "pattern": {"String": "b"}, "content": "x" * 40},
            pre_tokenizer=split("(x+x+)+y"),
        ),
        "fails at 'bank' .*retry-limit",
    ),
    "many searches": (
        tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [split("a")] * 17}),
        "searches them by 17 patterns",
    ),
    "a bad pattern": (tokenizer(pre_tokenizer=split("(")), "is not a tokenizer"),
    "grows without end": (tokenizer(normalizer=steps(TENFOLD, 12)), "times longer"),
    "doubles without end": (tokenizer(normalizer=steps({"type": "ByteLevel"}, 40)), "times longer"),
    "prepends without end": (tokenizer(normalizer=steps({"type": "Prepend", "prepend": "aa"}, 40)), "times longer"),
    "a vast map": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "A" * (1 << 20) + "A"}),
        "for 8 tokens at most|inf times longer",
    ),
    "a damaged map": (tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "not a tokeni"),
    "a pipe": (replaced(TOKENIZER, os.mkfifo), "is no plain file"),
    "a folder": (replaced(TOKENIZER, Path.mkdir), "is no plain file"),
    "link out": (lambda f: move_out(f, TOKENIZER), "outside the dictionary"),
    "folder links out": (lambda f: move_out(f, "tokenizer"), "outside the dictionary"),
}


def small(folder: Path) -> None:
    make([2, 0, 4]).save(folder)


def in_two_files(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionary_format, "SHARD_BYTES", 3 * 3 * 2)
        small(folder)


def full(folder: Path) -> None:
    """Write a dictionary with tokenizer and exemplars; token 2 is `bank`."""
    with_tokenizer(word_piece(), folder, [2, 0, 3, 0, 1, 1, 1, 4])
    pq.write_table(exemplars([(0, 0, 0), (2, 1, 0), (2, 1, 1), (7, 3, 0)]), folder / EXEMPLARS)


TABLES: dict[str, tuple[Callable[[Path], None], dict, Callable[[SenseDictionary], object]]] = {
    "folder": (small, HOSTILE, len),
    "sizes": (small, SIZES, len),
    "index": (in_two_files, HOSTILE_INDEX, len),
    "exemplars": (full, HOSTILE_EXEMPLARS, lambda d: d.exemplars(2)),
    "tokenizer": (full, HOSTILE_TOKENIZERS, lambda d: d.find("bank")),
}
ALL = [(table, case) for table, (_, cases, _) in TABLES.items() for case in cases]


def spoilt(folder: Path, table: str, case: str) -> tuple[Path, str, Callable[[Path], object]]:
    """Make a folder, spoil it, and return it with the refusal's words and what brings it about."""
    write, cases, use = TABLES[table]
    spoil, message = cases[case]
    write(folder)
    use(SenseDictionary.load(folder))  # it works before
    spoil(folder)
    return folder, message, lambda f: use(SenseDictionary.load(f))


@pytest.mark.parametrize(("table", "case"), ALL)
def test_hostile_folders_are_refused(tmp_path: Path, table: str, case: str) -> None:
    folder, message, use = spoilt(tmp_path / "dictionary", table, case)
    with pytest.raises(DictionaryError, match=message) as refusal:
        use(folder)
    said = str(refusal.value)
    assert len(said) < 1500
    assert "\x1b" not in said


def test_refusals_take_little_memory(tmp_path: Path, tell: Callable[[str], None]) -> None:
    slowest, largest = (0.0, ""), (0, "")
    for number, (table, case) in enumerate(ALL):
        folder, _, use = spoilt(tmp_path / f"{number}" / "dictionary", table, case)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = memory("VmRSS")
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(DictionaryError):
            use(folder)
        slowest = max(slowest, (1000 * (time.perf_counter() - start), f"{table}: {case}"))
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        largest = max(largest, (max(traced, memory("VmHWM") - before), f"{table}: {case}"))
    tell(f"{len(ALL)} hostile dictionary folders: all refused, the slowest in {slowest[0]:.0f} ms ({slowest[1]})")
    assert largest[0] < 96 << 20, largest[1]


def memory(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def test_show_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for table, case in (("folder", "escapes in a dtype"), ("exemplars", "link out"), ("tokenizer", "panics")):
        folder, _, _ = spoilt(tmp_path / table / "dictionary", table, case)
        assert main(["show", str(folder), "bank"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "\x1b" not in error
        assert "Traceback" not in error


def test_files_of_other_kinds_are_never_opened(tmp_path: Path) -> None:
    full(tmp_path)
    for name in ("pytorch_model.bin", "modeling.py", "tokenizer/tokenizer_config.json", "README.md"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)  # who opened one would wait for ever
    d = SenseDictionary.load(tmp_path)
    assert d.find("bank").found
    assert len(d.exemplars(2)) == 2
    d.save(tmp_path.parent / "copy")
    assert sorted(p.name for p in (tmp_path.parent / "copy").iterdir()) == [
        "README.md",
        CONFIG,
        DATA,
        EXEMPLARS,
        "tokenizer",
    ]


def test_merge_and_save_refuse_what_the_files_hide(tmp_path: Path) -> None:
    full(tmp_path / "a")
    d = SenseDictionary.load(tmp_path / "a")
    parquet(table(1, token=2, sense=9))(tmp_path / "a")
    with pytest.raises(DictionaryError, match="sense 9 and rank 0 of token 2"):
        d.merge(d)
    move_out(tmp_path / "a", EXEMPLARS)
    with pytest.raises(DictionaryError, match="outside the dictionary"):
        d.save(tmp_path / "b")


def test_save_follows_no_link_out_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_unique", lambda: "0123abcd")  # a temporary name that somebody foresaw
    full(tmp_path / "a")
    d = SenseDictionary.load(tmp_path / "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "b").mkdir()
    for name in (CONFIG, DATA, EXEMPLARS, f".{DATA}.0123abcd.part"):
        (tmp_path / "b" / name).symlink_to(outside / name)
    d.save(tmp_path / "b")
    assert list(outside.iterdir()) == []
    assert SenseDictionary.load(tmp_path / "b").exemplars(2) == d.exemplars(2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "tokenizer").symlink_to(outside)
    with pytest.raises(DictionaryError, match="outside the folder: take that link away"):
        d.save(tmp_path / "c")
    assert list(outside.iterdir()) == []


def test_a_key_of_the_config_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    make([1], quality={"a |\n# evil": 1.0}).save(tmp_path)
    assert "| a / # evil | 1 |" in (tmp_path / "README.md").read_text().replace("  ", " ")


@pytest.mark.parametrize("unit", [5e-324, 1e-44, 1e77])
def test_a_unit_beyond_float32_gives_numbers(unit: float) -> None:
    d = make([4, 2], temperature_unit=unit)
    ids, x = np.array([0, 1]), np.ones((2, 3), np.float32)
    replaced = d.replace(ids, x, 1.0)
    wanted = d.replace(ids, x) if unit < 1 else np.stack([d.senses(t).centroids.numpy().mean(0) for t in (0, 1)])
    np.testing.assert_allclose(replaced, wanted, rtol=1e-5)


@pytest.mark.parametrize("ids", [[1 << 40], [MANY]])
def test_fit_refuses_token_ids_without_end(ids: list[int]) -> None:
    with pytest.raises(BadInput, match="at most 4194304 tokens"):
        SenseDictionary.fit(np.array(ids), np.ones((1, 2), np.float32))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"\x15", "damaged"),
        (b"\x00", "damaged"),
        (b"\x18\x01x\x15\x00\x15\x00\x00", "damaged"),  # text for a number
        (b"\x19\xf5" + b"\xff" * 4 + b"\x0f", "damaged"),  # a list without end
        (b"\x15\x00\x15\x00\x00", "damaged"),
        (b"\x15" + b"\xff" * 20, "damaged"),
        (b"\x05\x02\x00\x15\x00\x00", "foreign header"),  # a field by its number: it could come twice
        (b"\x17" + bytes(9), "foreign header"),  # a fraction
        (b"\x1c" * 60, "damaged"),
        (b"\x15\x00\x15\x10\x15\x10\x2c\x15\x02\x15\x00\x00\x00", "cut off"),  # eight bytes that do not come
        (b"\x15\x00\x15\x01\x15\x00\x2c\x15\x02\x15\x00\x00\x00", "cut off"),  # a size of -1
        (b"\x15\x02\x15\x00\x15\x00\x00", "damaged"),  # an index page
    ],
)
def test_damaged_page_headers_are_refused(page: bytes, message: str) -> None:
    check_pages(memoryview(b"\x15\x00\x15\x00\x15\x00\x2c\x15\x02\x15\x00\x00\x00" * 3))
    with pytest.raises(ValueError, match=message):
        check_pages(memoryview(page))


FILES = (CONFIG, DATA, EXEMPLARS, TOKENIZER)
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "cut", "insert"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=4,
)


def damage(raw: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, data in changes:
        place = int(where * len(raw))
        if kind == "flip":
            raw = raw[:place] + bytes(b ^ (1 << data[0] % 8) for b in raw[place : place + 1]) + raw[place + 1 :]
        elif kind == "overwrite":
            raw = raw[:place] + data + raw[place + len(data) :]
        elif kind == "cut":
            raw = raw[:place]
        else:
            raw = raw[:place] + data + raw[place:]
    return raw


def use_all(folder: Path) -> int:
    """Use all that a dictionary can do, and return how many of its parts worked; each gives what it should or refuses."""
    try:
        d = SenseDictionary.load(folder)
    except DictionaryError:
        return 0
    worked = 1
    ids = np.arange(-1, d.vocab_size + 1)
    x = np.ones((len(ids), d.dim), np.float32)
    for use in (
        lambda: d.find("bank").explain(),
        lambda: [d.senses(t).centroids.shape[1] == d.dim or pytest.fail("width") for t in range(d.vocab_size)],
        lambda: all(len(e) == 7 for t in range(d.vocab_size) for e in d.exemplars(t)) or pytest.fail("exemplar"),
        lambda: d.assign(ids, x).shape == ids.shape or pytest.fail("assign"),
        lambda: d.replace(ids, x, 0.5).shape == x.shape or pytest.fail("replace"),
        lambda: len(d.merge(d)) == 2 * len(d) or pytest.fail("merge"),
    ):
        try:
            assert use()
        except DictionaryError:
            continue
        except BadInput as error:
            if "overflow float32" not in str(error):  # centroids may be as large as their dtype allows
                raise
        worked += 1
    return worked


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dictionary with all its parts, in which everything works."""
    folder = tmp_path_factory.mktemp("whole") / "dictionary"
    full(folder)
    assert use_all(folder) == 7
    return folder


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(FILES), changes=edits)
def test_random_damage_is_refused_or_harmless(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[str, float, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "dictionary"
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(damage((folder / name).read_bytes(), changes))
    assert use_all(folder) <= 7


def test_a_token_of_too_many_senses_is_refused(tmp_path: Path) -> None:
    make([65_534], dim=1).save(tmp_path)
    with pytest.raises(DictionaryError, match="token 1 has 65535 senses; at most 65534"):
        make([1, 65_535], dim=1).save(tmp_path)


def test_centroids_that_are_not_finite_are_refused_when_used(tmp_path: Path) -> None:
    make([2, 0, 4]).save(tmp_path)
    edit_array(tmp_path, "centroids", [1.0, float("nan")])
    d = SenseDictionary.load(tmp_path)
    with pytest.raises(DictionaryError, match="token 0 is NaN"):
        d.senses(0)
    with pytest.raises(DictionaryError, match="sense row 0"):
        d.assign(np.array([2, 0]), np.ones((2, 3), np.float32))
    assert len(d.senses(2).centroids) == 4


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=r"there is no folder .*nowhere"):
        SenseDictionary.load(tmp_path / "nowhere")
