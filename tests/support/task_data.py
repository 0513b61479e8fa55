"""Small data sets of evaluation tasks, and a model with known vectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from msense import SenseDictionary


def write_task(folder: Path, rows: dict[str, list[tuple[str, str]]], form: str = "csv") -> str:
    """Write texts and labels by split; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, own in rows.items():
        table, path = pd.DataFrame(own, columns=["text", "label"]), folder / f"{part}.{form}"
        if form == "csv":
            table.to_csv(path, index=False)
        elif form == "jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            table.to_parquet(path)
    return str(folder)


def write_contexts(folder: Path, word: str, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    """Write contexts of a word for CoarseWSD: pairs of the word as written, and its gold sense."""
    (folder / word).mkdir(parents=True)
    for part, rows in (("train", train), ("test", test)):
        (folder / word / f"{part}.data.txt").write_text("".join(f"1\tthe {w} is\n" for w, _ in rows))
        (folder / word / f"{part}.gold.txt").write_text("".join(f"{g}\n" for _, g in rows))


@dataclass
class Encoder:
    """A model that applies a function to each text and records the texts; with a dictionary, if given."""

    vector: Callable[[str], object]
    dictionary: SenseDictionary | None = None
    encoded: list[list[str]] = field(default_factory=list)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded.append(list(texts))
        return np.array([self.vector(text) for text in texts], np.float32)
