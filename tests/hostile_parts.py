"""Ways to spoil the exemplars and the tokenizer of a dictionary; and the words that each is refused in."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hostile_folders import edit_config, edit_json, move_out, replaced

from msense.dictionary.contexts import exemplar_schema


def rows_of(rows: int = 4, token: int = 2, sense: int = 0, text: str = "x", distance: float = 0.0) -> pa.Table:
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
    parquet(rows_of(), compression="none")(folder)
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
    rows = rows_of(1)
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
    rows = rows_of()
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
    "other types": (
        parquet(rows_of().cast(pa.schema([(n, pa.string()) for n in rows_of().column_names]))),
        "the columns",
    ),
    "foreign sense": (parquet(rows_of(sense=3)), "sense 3 and rank 0 of token 2: there is none"),
    "negative sense": (parquet(rows_of(sense=-1)), "sense -1 and rank 0 of token 2"),
    "foreign token": (parquet(rows_of(token=99)), "the tokens 99 to 99"),
    "negative token": (parquet(rows_of(token=-5)), "the tokens -5 to -5"),
    "tokens fall": (
        parquet(pa.concat_tables([rows_of(token=5), rows_of(token=2)]), row_group_size=4),
        "the tokens 2 to 2, which are not in order",
    ),
    "missing values": (missing_values, "word has rows without a value"),
    "NaN distance": (parquet(rows_of(distance=float("nan"))), "a distance is NaN"),
    "not UTF-8": (not_text, "Invalid UTF8"),
    "no statistics": (parquet(rows_of(), write_statistics=False), "or no statistics"),
    "too many rows a group": (parquet(rows_of(70_000), row_group_size=1 << 20), "has 70000 rows, not 1 to 65536"),
    "too many rows a sense": (parquet(rows_of(70_000)), "holds over 3072 exemplars"),
    "unpacks to 68 MB": (long_text, "a column has 1 pages of 681574.. bytes"),
    "a footer that lies": (lying_footer, "a column has 1 pages of 681574.. bytes"),
    "repeats a text": (
        lambda f: parquet(rows_of(2000, text="b" * 60_000), write_statistics=["token"])(f),
        "unpack to 2000 rows with 480000000 bytes",
    ),
    "a long text": (
        lambda f: parquet(rows_of(1, text="b" * 70_000), write_statistics=["token"])(f),
        "a text of 70000 bytes",
    ),
    "repeats beginnings": (
        parquet(rows_of(), use_dictionary=False, column_encoding={"left": "DELTA_BYTE_ARRAY"}),
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
