"""Senses shared out by budget against the same number for every token, at equal size.

In: Banking77 (`banking77/{train,test}.csv`, columns text and label) and CoarseWSD (`coarsewsd/WORD/{train,test}.data.txt`,
lines `position<TAB>words`, and `.gold.txt`), read by the demo teacher. Out: distortion, few-shot accuracy of the replaced
teacher, and how well senses tell those of people apart. Holds the embeddings of one of the two as float16, and the
replaced ones as float32.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benches.few_shot import few_shot, read_task
from benches.shared import Bench, Figures
from benches.workshop import CAP
from msense import SenseDictionary
from msense.config import DEFAULT_BUDGET, DEMO_TEACHER, SenseBudget, sense_bytes
from msense.dictionary.format import Arrays, corpus_distortion
from msense.evaluation.result import Result, difference
from msense.teacher import TOKEN_BUDGET, Teacher, describe, pad_batch, resolve_dtype, token_batches

logger = logging.getLogger("msense.bench")

FIXED, MORE = 20, 50
TRIES = 5  # to make both dictionaries of one size
Dictionaries = dict[str, SenseDictionary]


@dataclass(frozen=True)
class Read:
    """Passages as the teacher read them: P of them, N tokens."""

    ids: np.ndarray  # int64 [N]
    offsets: np.ndarray  # int64 [P + 1]
    embeddings: np.ndarray  # float16 [N, D]


@dataclass(frozen=True)
class Places:
    """Words of the CoarseWSD set in their contexts: M occurrences."""

    word: np.ndarray  # str [M]
    row: np.ndarray  # int64 [M], of the word's first token
    gold: np.ndarray  # str [M]


class Reader:
    """The demo teacher and its tokenizer."""

    def __init__(self, bench: Bench) -> None:
        info, self.tokenizer = describe(DEMO_TEACHER, bench.config)
        self.tokenizer.enable_truncation(info.max_length)
        self.vocab_size = info.vocab_size
        dtype = resolve_dtype("auto", "cpu")
        self.teacher = Teacher(DEMO_TEACHER, revision=None, layer=-1, dtype=dtype, device="cpu", threads=bench.workers)

    def read(self, encodings: list[Any]) -> Read:
        """Run the teacher over what the tokenizer made."""
        rows = [np.array(encoding.ids) for encoding in encodings]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        found: np.ndarray | None = None
        for batch in token_batches(np.diff(offsets), TOKEN_BUDGET["cpu"]):
            ids, mask = pad_batch([rows[i] for i in batch])
            hidden = self.teacher.embed(ids, mask).float().numpy()
            if found is None:
                found = np.empty((offsets[-1], hidden.shape[2]), np.float16)
            for number, i in enumerate(batch):
                found[offsets[i] : offsets[i + 1]] = hidden[number, : len(rows[i])]
        return Read(np.concatenate(rows).astype(np.int64), offsets, found if found is not None else np.empty((0, 0)))


def senses(bench: Bench) -> Figures:
    """Banking77, then CoarseWSD."""
    banking, coarse = bench.data("banking77"), bench.data("coarsewsd")
    reader = Reader(bench)
    return _banking(reader, banking) | _coarse(reader, coarse)


def dictionaries(read: Read, vocab_size: int) -> Dictionaries:
    """Make those that are compared: `auto` has exactly as many senses as `k20`, or as near as it can come to it."""

    def fit(k: int | SenseBudget) -> SenseDictionary:
        return SenseDictionary.fit(read.ids, read.embeddings, k=k, vocab_size=vocab_size, max_occurrences=CAP)

    fixed = fit(FIXED)
    wanted = len(fixed)
    auto = fit(SenseBudget(size=wanted * sense_bytes(fixed.dim)))
    budget = wanted
    for _ in range(TRIES):  # a token of few distinct points may have fewer senses than it was given
        if len(auto) == wanted:
            break
        budget += wanted - len(auto)
        auto = fit(SenseBudget(size=budget * sense_bytes(fixed.dim)))
    return {"k20": fixed, "auto": auto, "k50": fit(MORE), "default": fit(DEFAULT_BUDGET)}


def distortion(dictionary: SenseDictionary, read: Read, replaced: np.ndarray) -> float:
    """Mean squared distance of embeddings to what they were replaced by, over tokens that have senses."""
    known = np.diff(dictionary.offsets)[read.ids] > 0
    difference = read.embeddings[known] - replaced[known]
    return float(np.square(difference).sum(1).mean(dtype=np.float64))


def _banking(reader: Reader, folder: Path) -> Figures:
    """Distortion and few-shot accuracy."""
    task = read_task(folder)
    parts = {part: reader.read(reader.tokenizer.encode_batch(texts)) for part, texts in task.texts.items()}
    plain = {part: read.embeddings.astype(np.float32) for part, read in parts.items()}

    def accuracy_of(values: dict[str, np.ndarray]) -> Result:
        return few_shot({part: pooled(values[part], read.offsets) for part, read in parts.items()}, task.labels)

    accuracy = {"teacher": accuracy_of(plain)}
    figures: Figures = {}
    for name, dictionary in dictionaries(parts["train"], reader.vocab_size).items():
        replaced = {part: dictionary.replace(read.ids, plain[part]) for part, read in parts.items()}
        figures[f"senses.size_{name}"] = float(len(dictionary))
        figures[f"senses.distortion_{name}"] = distortion(dictionary, parts["train"], replaced["train"])
        figures[f"senses.test_distortion_{name}"] = distortion(dictionary, parts["test"], replaced["test"])
        figures[f"senses.in_sample_distortion_{name}"] = corpus_distortion(
            Arrays(dictionary.offsets, dictionary.counts, dictionary.spread, dictionary.token_counts)
        )
        accuracy[name] = accuracy_of(replaced)
        logger.info("banking77 %s: %d senses, accuracy %.4f", name, len(dictionary), accuracy[name].score)
    for kind in ("distortion", "test_distortion", "in_sample_distortion"):
        figures[f"senses.{kind}_ratio"] = figures[f"senses.{kind}_auto"] / figures[f"senses.{kind}_k20"]
    figures |= {f"senses.banking77_{name}": found.score for name, found in accuracy.items()}
    gain, low, high = difference(accuracy["auto"], accuracy["k20"])
    figures |= {"senses.banking77_gain": gain}
    return figures | {"senses.banking77_gain_low": low, "senses.banking77_gain_high": high}


def pooled(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Mean of each passage's embeddings, at length 1: float32 [P, D]."""
    mean = np.add.reduceat(values, offsets[:-1], axis=0) / np.diff(offsets).astype(np.float32)[:, None]
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


def _coarse(reader: Reader, folder: Path) -> Figures:
    """Word senses: each of ours is named by the majority of the training occurrences that fall into it."""
    train, known = _contexts(reader, folder, "train")
    test, asked = _contexts(reader, folder, "test")
    figures: Figures = {}
    words = np.unique(asked.word)
    figures["senses.coarsewsd_words"] = float(len(words))
    for name, dictionary in dictionaries(train, reader.vocab_size).items():
        keys = [read.ids << 20 | dictionary.assign(read.ids, read.embeddings) & 0xFFFFF for read in (train, test)]
        accuracy = []
        for word in words:
            own = [
                (k[p.row[p.word == word]], p.gold[p.word == word]) for k, p in zip(keys, (known, asked), strict=True)
            ]
            accuracy.append(_accuracy(own[0], own[1]))
        figures[f"senses.coarsewsd_{name}"] = float(np.mean(accuracy))
        figures[f"senses.coarsewsd_size_{name}"] = float(len(dictionary))
        logger.info("coarsewsd %s: %d senses, accuracy %.4f", name, len(dictionary), np.mean(accuracy))
    return figures | {"senses.coarsewsd_gain": figures["senses.coarsewsd_auto"] - figures["senses.coarsewsd_k20"]}


def _contexts(reader: Reader, folder: Path, part: str) -> tuple[Read, Places]:
    words, texts, places, gold = [], [], [], []
    for word in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        lines = (folder / word / f"{part}.data.txt").read_text(encoding="utf-8").splitlines()
        gold += (folder / word / f"{part}.gold.txt").read_text(encoding="utf-8").split()
        words += [word] * len(lines)
        texts += [line.partition("\t")[2].split(" ") for line in lines]
        places += [int(line.partition("\t")[0]) for line in lines]
    encodings = reader.tokenizer.encode_batch(texts, is_pretokenized=True)
    read = reader.read(encodings)
    first = [e.word_ids.index(p) if p in e.word_ids else -1 for e, p in zip(encodings, places, strict=True)]
    there = np.array(first) >= 0  # else the passage is longer than the teacher reads
    logger.info("coarsewsd %s: %d tokens, %d contexts, %d cut off", part, len(read.ids), len(there), (~there).sum())
    return read, Places(np.array(words)[there], (read.offsets[:-1] + first)[there], np.array(gold)[there])


def _accuracy(known: tuple[np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray]) -> float:
    """Name senses by the majority of what is known, (keys [M], gold [M]), and hold the names against what is asked."""
    keys, gold = known
    frequent = Counter(gold.tolist()).most_common(1)[0][0]  # for senses that no training occurrence of the word is in
    names = {key: Counter(gold[keys == key].tolist()).most_common(1)[0][0] for key in np.unique(keys).tolist()}
    return float(np.mean([names.get(key, frequent) == g for key, g in zip(*asked, strict=True)]))
