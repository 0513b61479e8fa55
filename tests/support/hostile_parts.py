"""Corrupted exemplars and tokenizers of a dictionary, and the error message expected for each."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hostile_folders import Corrupt, edit_config, edit_json, move_out, written

from msense.dictionary.contexts import exemplar_schema

EXEMPLARS = "exemplars.parquet"
TOKENIZER = "tokenizer/tokenizer.json"


def rows_of(rows: int = 4, token: int = 2, sense: int = 0, text: str = "x", distance: float = 0.0) -> pa.Table:
    columns: list[list[Any]] = [[token] * rows, [sense] * rows, list(range(rows)), [distance] * rows]
    columns += [[text] * rows for _ in range(4)]
    schema = exemplar_schema()
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def parquet(rows: pa.Table, **options: Any) -> Corrupt:
    return lambda folder: pq.write_table(rows, folder / EXEMPLARS, **{"row_group_size": 1 << 16, **options})


def footer(length: int, size: int) -> Corrupt:
    """Write a sparse file that ends like a Parquet file with a footer of a given length."""

    def corrupt(folder: Path) -> None:
        with (folder / EXEMPLARS).open("wb") as file:
            file.seek(size - 8)
            file.write(length.to_bytes(4, "little") + b"PAR1")

    return corrupt


def not_utf8(folder: Path) -> None:
    parquet(rows_of(), compression="none")(folder)
    raw = (folder / EXEMPLARS).read_bytes()
    assert b"\x01\x00\x00\x00x" in raw
    (folder / EXEMPLARS).write_bytes(raw.replace(b"\x01\x00\x00\x00x", b"\x01\x00\x00\x00\xff"))


def wrong_type(folder: Path) -> None:
    """Give a column another type in the footer than in the schema; Arrow's metadata objects abort at it."""
    raw = (folder / EXEMPLARS).read_bytes()
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    changed = raw[start:].replace(b"\x15\x02\x19", b"\x15\x7e\x19")
    assert changed != raw[start:]
    (folder / EXEMPLARS).write_bytes(raw[:start] + changed)


def long_text(folder: Path) -> None:
    rows = rows_of(1)
    long = rows.set_column(7, rows.schema.field(7), pa.array(["a" * (65 << 20)]))
    parquet(long, compression="zstd", write_statistics=["token"], use_dictionary=False)(folder)


def small_footer_size(folder: Path) -> None:
    """Understate the size of the last column in the footer; its page header states the real size."""
    long_text(folder)
    raw = bytearray((folder / EXEMPLARS).read_bytes())
    size = pq.read_metadata(folder / EXEMPLARS).row_group(0).column(7).total_uncompressed_size
    place = raw.rindex(thrift_number(size))
    raw[place : place + 4] = thrift_number(1 << 20)
    (folder / EXEMPLARS).write_bytes(raw)
    assert pq.read_metadata(folder / EXEMPLARS).row_group(0).column(7).total_uncompressed_size == 1 << 20


def thrift_number(value: int) -> bytes:
    value, out = value << 1, b""
    while value >= 128:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


MISSING = rows_of().set_column(5, exemplar_schema().field(5), pa.array(["x", None, "x", "x"], pa.string()))
HOSTILE_EXEMPLARS: dict[str, tuple[Corrupt, str]] = {
    "truncated": (written(EXEMPLARS, lambda raw: raw[:-100]), "truncated or not a Parquet file"),
    "empty": (written(EXEMPLARS, lambda _: b""), "truncated or not a Parquet file"),
    "not Parquet": (written(EXEMPLARS, lambda _: b"PAR1 not really PAR1"), "cannot read"),
    "vast footer": (footer((1 << 32) - 1, 1 << 40), "footer has 4294967295 bytes, but the limit is"),
    "wrong type in the footer": (wrong_type, "does not have the columns"),
    "middle missing": (written(EXEMPLARS, lambda raw: raw[:40] + raw[140:]), "cannot read"),
    "foreign sense": (parquet(rows_of(sense=3)), "sense 3, rank 0 of token 2 does not exist"),
    "foreign token": (parquet(rows_of(token=99)), "tokens 99 to 99, which are out of order or vocabulary"),
    "tokens decrease": (
        parquet(pa.concat_tables([rows_of(token=5), rows_of(token=2)]), row_group_size=4),
        "tokens 2 to 2, which are out of order",
    ),
    "missing values": (parquet(MISSING), "word has missing values"),
    "not UTF-8": (not_utf8, "Invalid UTF8"),
    "no statistics": (parquet(rows_of(), write_statistics=False), "or no statistics"),
    "large row group": (parquet(rows_of(70_000), row_group_size=1 << 20), "has 70000 rows, not 1 to 65536"),
    "too many exemplars": (parquet(rows_of(70_000)), "holds more than 3072 exemplars"),
    "understated size": (small_footer_size, "a column has 1 pages of 681574.. bytes"),
    "repeated text": (
        parquet(rows_of(2000, text="b" * 60_000), write_statistics=["token"]),
        "decompress to 2000 rows with 480000000 bytes",
    ),
    "delta encoding": (
        parquet(rows_of(), use_dictionary=False, column_encoding={"left": "DELTA_BYTE_ARRAY"}),
        "the unsupported encoding 7",
    ),
    "link out": (lambda f: move_out(f, EXEMPLARS), "outside the dictionary"),
}


def tokenizer(**parts: object) -> Corrupt:
    """Change the tokenizer; the config has no fingerprint, which stands for a forged one."""

    def corrupt(folder: Path) -> None:
        edit_config(tokenizer_fingerprint="")(folder)
        edit_json(folder / TOKENIZER, lambda definition: definition.update(parts))

    return corrupt


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def repeated(times: int, **step: object) -> Corrupt:
    return tokenizer(normalizer={"type": "Sequence", "normalizers": [step] * times})


def swap(raw: bytes) -> bytes:
    return raw.replace(b'"bank":2', b'"bank":3').replace(b'"river":3', b'"river":2')


def charsmap(text: str) -> Corrupt:
    return tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": text})


def replacing(letter: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": letter}, "content": content}


INVALID = "is not a tokenizer"
BACKTRACKING = tokenizer(normalizer=replacing("b", "x" * 40), pre_tokenizer=split("(x+x+)+y"))
SEVENTEEN = tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [split("a")] * 17})
OUTSIDE = {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]], "byte_fallback": False}
HOSTILE_TOKENIZERS: dict[str, tuple[Corrupt, str]] = {
    **{
        f"tokenizer is {text!r}": (written(TOKENIZER, lambda _, text=text: text), INVALID)
        for text in (b"", b"{", b"[]", b'{"model": 3}', b'{"vocab": {}}', b"\xff")
    },
    "deeply nested": (written(TOKENIZER, lambda _: b'{"model": ' + b"[" * 200_000), INVALID),
    "unknown id outside": (tokenizer(model=OUTSIDE), INVALID),
    "invalid pattern": (tokenizer(pre_tokenizer=split("(")), INVALID),
    "large": (lambda f: os.truncate(f / TOKENIZER, 1 << 40), "the limit for 8 tokens"),
    "large charsmap": (charsmap("A" * (1 << 20) + "A"), "the limit for 8 tokens|inf times longer"),
    "another tokenizer": (written(TOKENIZER, swap), "not the dictionary's tokenizer: its fingerprint is"),
    "panics": (tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}), "fails on 'bank' .*Panic"),
    "backtracking": (BACKTRACKING, "fails on 'bank' .*retry-limit"),
    "many patterns": (SEVENTEEN, "matches 17 patterns"),
    "tenfold growth": (repeated(12, **replacing("a", "a" * 10)), "times longer"),
    "link out": (lambda f: move_out(f, TOKENIZER), "outside the dictionary"),
}
