"""Corrupted dictionary folders and the error message expected for each."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file
from tiny import make

from msense.dictionary import DictionaryFiles
from msense.dictionary import format as dictionary_format
from msense.dictionary.contexts import exemplar_schema
from msense.dictionary.layout import file_layout

CONFIG, DATA = "config.json", "dictionary.safetensors"
EXEMPLARS, TOKENIZER = "exemplars.parquet", "tokenizer/tokenizer.json"
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
    "negative counts": (array("counts", -1), "counts holds values from -1"),
    "counts that overflow": (array("counts", *[2**62] * 6), "counts holds values from 4611"),
    "token counts that overflow": (array("token_counts", *[2**63 - 1] * 3), "token_counts holds values from 9223"),
    "NaN distance": (array("spread", NAN), "spread holds values from nan"),
    "negative distance": (array("spread", -1.0), "spread holds values from -1.0"),
}

WIDE = holes(1, 1 << 13, 1 << 16, offsets={1: 1 << 13}, counts=dict.fromkeys(range(1 << 13), 1))
SIZES: dict[str, tuple[Corrupt, str]] = {
    "vast vocabulary": (holes(1 << 36, 0), "vocab_size: Input should be less than or equal to 4194304"),
    "vast width": (edit_config(dim=1 << 40), "dim: Input should be less than or equal to 65536"),
    "more senses than possible": (holes(3, 1 << 40, dim=1), "declares 1099511627776 senses, but 3 tokens"),
    "sparse counts": (holes(1 << 14, 1 << 28, offsets={1 << 14: 1 << 28}), "counts holds values from 0|cannot map"),
    "all sparse": (holes(MANY, 1 << 36), "counts holds values from 0|cannot map"),
    "many tokens, offsets decrease": (
        holes(MANY, 2, counts={0: 1, 1: 1}, offsets={1: 2, MANY: 2}),
        "offsets must increase",
    ),
    "many tokens, negative token count": (
        holes(MANY, 1, counts={0: 1}, offsets={MANY: 1}, token_counts={5: 1 << 63}),
        "token_counts holds values from -",
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

SCALES = "scales holds values from nan"
HOSTILE_INT8: dict[str, tuple[Corrupt, str]] = {
    "NaN scale": (array("scales", NAN), SCALES),
    "no scales": (without_tensor("scales"), "scales is None, but should be"),
    "fewer scales": (header("scales", shape=[5]), UNALIGNED),
    "declared as int4": (edit_config(dtype="int4"), "dtype: Input should be"),
}


# --- exemplars and tokenizers


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
    "not Parquet": (written(EXEMPLARS, lambda _: b"PAR1 not really PAR1"), "cannot read"),
    "vast footer": (footer((1 << 32) - 1, 1 << 40), "footer has 4294967295 bytes, but the limit is"),
    "wrong type in the footer": (wrong_type, "do not have the columns"),
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
    "understated size": (small_footer_size, "decompress to more than 681574.. bytes"),
    "repeated text": (
        parquet(rows_of(2000, text="b" * 60_000), write_statistics=["token"]),
        "decompress to more than 245760000 bytes",
    ),
    "delta encoding": (
        parquet(rows_of(), use_dictionary=False, column_encoding={"left": "DELTA_BYTE_ARRAY"}),
        "the unsupported encoding DELTA_BYTE_ARRAY",
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
