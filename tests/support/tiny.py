"""Small dictionaries, tokenizers and exemplars with known content."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from msense.dictionary import Arrays, DictionaryConfig, DictionaryFiles, SenseDictionary, TeacherName, write_dictionary
from msense.dictionary.contexts import exemplar_schema
from msense.dictionary.layout import DTYPES
from msense.tokenizer import fingerprint

WORDS = ["the", "bank", "river", "money", "of", "is", "near", "deep", "full", "a", "cat", "dog", "sat", "on", "mat"]
ARRAYS = ("offsets", "counts", "rms_distance", "token_counts")


def make(sizes: list[int], dim: int = 3, dtype: str = "float16", seed: int = 0, **config: object) -> SenseDictionary:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    counts, rms_distance = rng.integers(1, 9, offsets[-1]), rng.random(offsets[-1]).astype(np.float32)
    arrays = Arrays(offsets, counts, rms_distance, rng.integers(0, 99, len(sizes)))
    teacher = TeacherName(name="tiny", revision="main", fingerprint="f")
    given = {"teacher": teacher, "tokenizer_fingerprint": "t", "layer": -1, "dim": dim, "vocab_size": len(sizes)}
    given |= {"senses": 20, "dtype": dtype, "temperature_unit": 0.5, "max_length": 16, "max_occurrences": 100}
    centroids = torch.from_numpy(rng.normal(size=(offsets[-1], dim))).to(DTYPES[dtype])
    return SenseDictionary(DictionaryConfig(**given | config), arrays, (centroids,))


def assert_same(a: SenseDictionary, b: SenseDictionary) -> None:
    assert a.config == b.config
    for name in ARRAYS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert a.centroids.dtype == b.centroids.dtype
    assert torch.equal(a.centroids, b.centroids)


def word_piece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "bank", "river", "##s", "un", "##ban", "Bank"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def with_tokenizer(tokenizer: Tokenizer, folder: Path, sizes: list[int]) -> SenseDictionary:
    files = DictionaryFiles(folder)
    files.tokenizer.parent.mkdir(parents=True)
    files.tokenizer.write_text(tokenizer.to_str())
    d = make(sizes, tokenizer_fingerprint=fingerprint(tokenizer))
    write_dictionary(folder, d.config, d.offsets, d.counts, d.rms_distance, d.token_counts, [d.centroids])
    return SenseDictionary.load(folder)


def exemplars(rows: list[tuple[int, int, int]]) -> pa.Table:
    values = [(t, s, r, r / 2, "a river ", "bank", f" of {t}.{s}.{r}", "doc 1") for t, s, r in rows]
    names = exemplar_schema().names
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in values], exemplar_schema())
