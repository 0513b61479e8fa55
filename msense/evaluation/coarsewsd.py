"""Word senses of people: how well a model's senses of a word tell them apart.

The format of CoarseWSD-20 (Loureiro et al. 2021): `WORD/{train,test}.data.txt`, a context a line, `position<TAB>words`, and
`.gold.txt`, a sense a line. Comes in: a model that reads tokens. Goes out: each of its senses is named by the majority of the
training contexts in it, and the names are held against the test contexts; beside that agreement without names (adjusted Rand
index, V-measure) and two baselines. Holds the embeddings of the target words.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from sklearn import metrics

from msense import storage, stores
from msense.corpus.files import display_uri, reading
from msense.errors import BadInput
from msense.evaluation.models import TokenModel, slabs
from msense.evaluation.result import Result

PARTS = ("train", "test")
_LARGEST = 64 << 20  # bytes of a file of contexts


@dataclass(frozen=True)
class Contexts:
    """Contexts of one word: M of them.

    Attributes:
        texts: words with a space between.
        starts: int64 [M], first character of the target word.
        gold: str [M].
    """

    texts: list[str]
    starts: np.ndarray
    gold: np.ndarray


@dataclass(frozen=True)
class Seen:
    """What a model sees of the contexts that it reads as far as the target word: m of M.

    Attributes:
        senses: str [m], token and sense; empty without a dictionary.
        embeddings: float32 [m, D], of the word's first token.
        gold: str [m].
        left_out: contexts that it does not read so far.
    """

    senses: np.ndarray
    embeddings: np.ndarray
    gold: np.ndarray
    left_out: int


def measure(model: TokenModel, source: str) -> Result:
    """Name senses, test them, and compare.

    The score is the mean accuracy over words. A word of several tokens is known by its first; senses that no training
    context of the word is in get its most frequent name.

    Args:
        model: with a dictionary for senses; without one there are only the baselines, the centroids the score.
        source: folder of words.

    Raises:
        BadInput: the folder has no words, or a file does not fit.
    """
    names = words(source)
    told: dict[str, list[float]] = {}
    left_out = 0
    for word in names:
        train, test = (see(model, read_contexts(source, word, part)) for part in PARTS)
        left_out += train.left_out + test.left_out
        if not len(train.gold) or not len(test.gold):
            raise BadInput(
                f"{display_uri(source)}: no context of {word!r} is short enough for this model to reach the word"
            )
        frequent = Counter(train.gold.tolist()).most_common(1)[0][0]
        own = {
            "gold centroids": float((_by_centroid(train, test) == test.gold).mean()),
            "most frequent": float((test.gold == frequent).mean()),
        }
        if model.dictionary is not None:
            own["accuracy"] = float((_named(train, test.senses, frequent) == test.gold).mean())
            own["ARI"] = float(metrics.adjusted_rand_score(test.gold, test.senses))
            own["V-measure"] = float(metrics.v_measure_score(test.gold, test.senses))
        for name, value in own.items():
            told.setdefault(name, []).append(value)
    main = "accuracy" if "accuracy" in told else "gold centroids"
    more = {name: float(np.mean(values)) for name, values in told.items() if name != main}
    return Result(main, "words", told[main], names=names, more={**more, "left out": left_out})


def words(source: str) -> list[str]:
    """Return the words of a folder.

    Raises:
        BadInput: it has none.
    """
    with reading(source, "a folder of words"):
        filesystem, path = stores.filesystem(source)
        listed = filesystem.ls(path, detail=True)
    there = [info["name"].rstrip("/").rpartition("/")[2] for info in listed if info["type"] == "directory"]
    found = sorted(word for word in there if storage.exists(_file(source, word, "train", "data")))
    if not found:
        raise BadInput(
            f"{display_uri(source)} holds no WORD/train.data.txt: put the words of CoarseWSD-20 there, a folder each, with "
            "train and test .data.txt and .gold.txt (https://github.com/danlou/bert-disambiguation)"
        )
    return found


def read_contexts(source: str, word: str, part: str) -> Contexts:
    """Read the contexts of a word.

    Raises:
        BadInput: a file is missing or too large, a line has no position, or data and gold differ in number.
    """
    lines, gold = (_lines(_file(source, word, part, kind)) for kind in ("data", "gold"))
    if len(lines) != len(gold):
        raise BadInput(
            f"{display_uri(source)}: {word}/{part} has {len(lines)} contexts, but {len(gold)} gold senses: restore both"
        )
    texts, starts = [], []
    for number, line in enumerate(lines, 1):
        place, _, text = line.partition("\t")
        before = text.split(" ")[: int(place)] if place.isascii() and place.isdecimal() and len(place) < 10 else None
        if before is None or len(before) == len(text.split(" ")):
            raise BadInput(
                f"{display_uri(source)}: {word}/{part}.data.txt, line {number}: {line[:60]!r} is not `position<TAB>words` "
                "with a word at that position"
            )
        texts.append(text)
        starts.append(sum(map(len, before)) + len(before))
    return Contexts(texts, np.array(starts, np.int64), np.array([name.strip() for name in gold]))


def see(model: TokenModel, contexts: Contexts) -> Seen:
    """Look at the target words of contexts."""
    senses, embeddings, kept, start = [], [], [], 0
    for slab in slabs(contexts.texts):
        read = model.read(slab)
        text = np.repeat(np.arange(len(slab)), np.diff(read.offsets))
        at = contexts.starts[start : start + len(slab)][text]
        holds = np.flatnonzero((read.spans[:, 0] <= at) & (at < read.spans[:, 1]))
        rows = holds[np.unique(text[holds], return_index=True)[1]]
        kept.append(start + text[rows])
        embeddings.append(read.senses[rows])
        if model.dictionary is not None:
            found = model.dictionary.assign(read.ids[rows], read.senses[rows])
            senses.append(np.array([f"{i} {s}" for i, s in zip(read.ids[rows], found, strict=True)], dtype=str))
        start += len(slab)
    places = np.concatenate(kept)
    named = np.concatenate(senses) if senses else np.empty(0, str)
    return Seen(named, np.concatenate(embeddings), contexts.gold[places], len(contexts.texts) - len(places))


def _named(train: Seen, asked: np.ndarray, frequent: str) -> np.ndarray:
    """Return the name of each sense that is asked for: the majority of the training contexts in it."""
    names = {
        sense: Counter(train.gold[train.senses == sense].tolist()).most_common(1)[0][0]
        for sense in np.unique(train.senses).tolist()
    }
    return np.array([names.get(sense, frequent) for sense in asked.tolist()])


def _by_centroid(train: Seen, test: Seen) -> np.ndarray:
    """Return the gold sense whose mean training embedding is nearest, of each test context."""
    known = np.unique(train.gold)
    means = np.stack([train.embeddings[train.gold == name].mean(0) for name in known])
    return np.asarray(known[(np.square(means).sum(1) - 2 * test.embeddings @ means.T).argmin(1)])


def _file(source: str, word: str, part: str, kind: str) -> str:
    return storage.join(source, word, f"{part}.{kind}.txt")


def _lines(uri: str) -> list[str]:
    with reading(uri, "text"):
        text = storage.read_bytes(uri, _LARGEST).decode("utf-8", "replace")
    return text.removesuffix("\n").split("\n")
