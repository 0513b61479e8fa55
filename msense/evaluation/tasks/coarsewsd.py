"""Word sense disambiguation on CoarseWSD-20 (Loureiro et al. 2021): do a model's senses match human sense labels?

Each of the model's senses takes the majority label of the training contexts assigned to it; test contexts are then scored.
Also reports label-free agreement (adjusted Rand index, V-measure) and two baselines: the nearest centroid of a human sense
and the most frequent sense. Files are `WORD/{train,test}.data.txt` (`position<TAB>words` per line) and `.gold.txt` (one sense
per line). Memory: the embeddings of a word's contexts and of one slab of texts.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from sklearn import metrics

from msense.corpus.files import read_errors
from msense.errors import InputError
from msense.evaluation.models import TokenModel, iter_slabs
from msense.evaluation.result import Result
from msense.io import filesystems, storage
from msense.io.filesystems import display_uri

PARTS = ("train", "test")
_MAX_BYTES = 64 << 20  # of a file of contexts


@dataclass(frozen=True)
class Contexts:
    """The M contexts of one word.

    Attributes:
        texts: words separated by a space.
        starts: int64 [M], character offset of the target word.
        gold: str [M].
    """

    texts: list[str]
    starts: np.ndarray
    gold: np.ndarray


@dataclass(frozen=True)
class TargetWords:
    """A model's view of the m contexts (of M) in which the target word survives truncation.

    Attributes:
        senses: str [m], token and sense; empty without a dictionary.
        embeddings: float32 [m, D], of the target word's first token.
        gold: str [m].
        left_out: number of contexts truncated before the target word.
    """

    senses: np.ndarray
    embeddings: np.ndarray
    gold: np.ndarray
    left_out: int


def measure(model: TokenModel, source: str) -> Result:
    """Score a model's senses; the score is the mean accuracy over words.

    A word of several tokens is represented by its first token. Senses without a training context take the word's most
    frequent label.

    Args:
        model: with a dictionary; without one only the baselines are computed, and the centroids are the score.
        source: folder of words.

    Raises:
        InputError: the folder has no words, or a file is invalid.
    """
    names = words(source)
    scores: dict[str, list[float]] = {}
    left_out = 0
    for word in names:
        train, test = (embed_targets(model, read_contexts(source, word, part)) for part in PARTS)
        left_out += train.left_out + test.left_out
        if not len(train.gold) or not len(test.gold):
            raise InputError(
                f"{display_uri(source)}: every context of {word!r} is truncated before the word by this model"
            )
        frequent = Counter(train.gold.tolist()).most_common(1)[0][0]
        own = {
            "gold centroids": float((_by_centroid(train, test) == test.gold).mean()),
            "most frequent": float((test.gold == frequent).mean()),
        }
        if model.dictionary is not None:
            own["accuracy"] = float((_labelled(train, test.senses, frequent) == test.gold).mean())
            own["ARI"] = float(metrics.adjusted_rand_score(test.gold, test.senses))
            own["V-measure"] = float(metrics.v_measure_score(test.gold, test.senses))
        for name, value in own.items():
            scores.setdefault(name, []).append(value)
    main = "accuracy" if "accuracy" in scores else "gold centroids"
    more = {name: float(np.mean(values)) for name, values in scores.items() if name != main}
    return Result(main, "words", scores[main], names=names, more={**more, "left out": left_out})


def words(source: str) -> list[str]:
    """Return the words of a folder, sorted; InputError if it has none."""
    with read_errors(source, "a folder of words"):
        filesystem, path = filesystems.filesystem(source)
        listed = filesystem.ls(path, detail=True)
    folders = [info["name"].rstrip("/").rpartition("/")[2] for info in listed if info["type"] == "directory"]
    names = sorted(word for word in folders if storage.exists(_file(source, word, "train", "data")))
    if not names:
        raise InputError(
            f"{display_uri(source)} contains no WORD/train.data.txt: download CoarseWSD-20 "
            "(https://github.com/danlou/bert-disambiguation) and put its words there, one folder each"
        )
    return names


def read_contexts(source: str, word: str, part: str) -> Contexts:
    """Read the contexts of a word; InputError if a file is missing, too large or invalid, or their lengths differ."""
    lines, gold = (_lines(_file(source, word, part, kind)) for kind in ("data", "gold"))
    if len(lines) != len(gold):
        raise InputError(
            f"{display_uri(source)}: {word}/{part} has {len(lines)} contexts but {len(gold)} gold senses: restore both files"
        )
    texts, starts = [], []
    for number, line in enumerate(lines, 1):
        place, _, text = line.partition("\t")
        before = text.split(" ")[: int(place)] if place.isascii() and place.isdecimal() and len(place) < 10 else None
        if before is None or len(before) == len(text.split(" ")):
            raise InputError(
                f"{display_uri(source)}: {word}/{part}.data.txt, line {number}: {line[:60]!r} is not `position<TAB>words` "
                "with a word at that position"
            )
        texts.append(text)
        starts.append(sum(map(len, before)) + len(before))
    return Contexts(texts, np.array(starts, np.int64), np.array([name.strip() for name in gold]))


def embed_targets(model: TokenModel, contexts: Contexts) -> TargetWords:
    """Embed the target words of contexts and assign their senses."""
    senses, embeddings, kept, start = [np.empty(0, str)], [], [], 0
    for slab in iter_slabs(contexts.texts):
        read = model.read(slab)
        text = np.repeat(np.arange(len(slab)), np.diff(read.offsets))
        at = contexts.starts[start : start + len(slab)][text]
        holds = np.flatnonzero((read.spans[:, 0] <= at) & (at < read.spans[:, 1]))
        rows = holds[np.unique(text[holds], return_index=True)[1]]
        kept.append(start + text[rows])
        embeddings.append(read.senses[rows])
        if model.dictionary is not None:
            assigned = model.dictionary.assign(read.ids[rows], read.senses[rows])
            senses.append(np.array([f"{i} {s}" for i, s in zip(read.ids[rows], assigned, strict=True)], dtype=str))
        start += len(slab)
    places = np.concatenate(kept)
    return TargetWords(
        np.concatenate(senses), np.concatenate(embeddings), contexts.gold[places], len(contexts.texts) - len(places)
    )


def _labelled(train: TargetWords, senses: np.ndarray, frequent: str) -> np.ndarray:
    """Return the majority training label of each sense."""
    labels = {
        sense: Counter(train.gold[train.senses == sense].tolist()).most_common(1)[0][0]
        for sense in np.unique(train.senses).tolist()
    }
    return np.array([labels.get(sense, frequent) for sense in senses.tolist()])


def _by_centroid(train: TargetWords, test: TargetWords) -> np.ndarray:
    """Return the gold sense with the nearest mean training embedding, for each test context."""
    known = np.unique(train.gold)
    means = np.stack([train.embeddings[train.gold == name].mean(0) for name in known])
    return np.asarray(known[(np.square(means).sum(1) - 2 * test.embeddings @ means.T).argmin(1)])


def _file(source: str, word: str, part: str, kind: str) -> str:
    return storage.join(source, word, f"{part}.{kind}.txt")


def _lines(uri: str) -> list[str]:
    with read_errors(uri, "text"):
        text = storage.read_bytes(uri, _MAX_BYTES).decode("utf-8", "replace")
    return text.removesuffix("\n").split("\n")
