"""Word sense disambiguation on CoarseWSD-20 (Loureiro et al. 2021): do a model's senses match human sense labels?

Each of the model's senses takes the majority label of the training contexts assigned to it; test contexts are then scored.
Also reports label-free agreement (adjusted Rand index, V-measure) and two baselines: the nearest centroid of a human sense
and the most frequent sense. Files are `WORD/{train,test}.data.txt` (`position<TAB>words` per line) and `.gold.txt` (one sense
per line). Memory: the embeddings of a word's contexts and of one slab of texts.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from sklearn import metrics

from msense.corpus.files import read_errors
from msense.errors import InputError
from msense.evaluation.models import TokenModel, iter_slabs
from msense.evaluation.result import Result
from msense.evaluation.tasks import read_lines
from msense.evaluation.tasks.classification import PARTS
from msense.io import storage
from msense.io.filesystems import display_uri


class Contexts(NamedTuple):
    """The M contexts of one word."""

    texts: list[str]  # words separated by a space
    starts: np.ndarray  # int64 [M], character offset of the target word
    gold: np.ndarray  # str [M]


class Targets(NamedTuple):
    """A model's view of the m contexts (of M) in which the target word survives truncation."""

    senses: np.ndarray  # int64 [m, 2], token and sense; empty without a dictionary
    embeddings: np.ndarray  # float32 [m, D], of the target word's first token
    gold: np.ndarray  # str [m]


def measure(model: TokenModel, source: str) -> Result:
    """Score a model's senses; the score is the mean accuracy over words.

    A word of several tokens is represented by its first token. Senses without a training context take the word's most
    frequent label. Without a dictionary only the baselines are computed, and the centroids are the score.

    Raises:
        InputError: the folder has no words, or a file is invalid.
    """
    names = words(source)
    scores: defaultdict[str, list[float]] = defaultdict(list)
    left_out = 0
    for word in names:
        contexts = [read_contexts(source, word, part) for part in PARTS]
        train, test = (embed_targets(model, part) for part in contexts)
        left_out += sum(len(part.gold) for part in contexts) - len(train.gold) - len(test.gold)
        if not len(train.gold) or not len(test.gold):
            raise InputError(
                f"{display_uri(source)}: every context of {word!r} is truncated before the word by this model"
            )
        for name, value in _scores(train, test).items():
            scores[name].append(value)
    main = "accuracy" if "accuracy" in scores else "gold centroids"
    more = {name: float(np.mean(values)) for name, values in scores.items() if name != main}
    return Result(main, "words", scores[main], names=names, more={**more, "left out": left_out})


def _scores(train: Targets, test: Targets) -> dict[str, float]:
    frequent = Counter(train.gold.tolist()).most_common(1)[0][0]
    known = np.unique(train.gold)
    means = np.stack([train.embeddings[train.gold == name].mean(0) for name in known])
    nearest = known[(np.square(means).sum(1) - 2 * test.embeddings @ means.T).argmin(1)]
    scores = {
        "gold centroids": float((nearest == test.gold).mean()),
        "most frequent": float((test.gold == frequent).mean()),
    }
    if len(train.senses):
        votes: defaultdict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
        for sense, label in zip(train.senses.tolist(), train.gold.tolist(), strict=True):
            votes[tuple(sense)][label] += 1
        labels = (votes[tuple(sense)].most_common(1) for sense in test.senses.tolist())
        predicted = [label[0][0] if label else frequent for label in labels]
        senses = np.unique(test.senses, axis=0, return_inverse=True)[1].reshape(-1)
        scores["accuracy"] = float((np.array(predicted) == test.gold).mean())
        scores["ARI"] = float(metrics.adjusted_rand_score(test.gold, senses))
        scores["V-measure"] = float(metrics.v_measure_score(test.gold, senses))
    return scores


def words(source: str) -> list[str]:
    """Return the words of a folder, sorted; InputError if it has none."""
    with read_errors(source, "a folder of words"):
        listed = storage.names(source)
        names = sorted(word for word in listed if storage.exists(storage.join(source, word, "train.data.txt")))
    if not names:
        raise InputError(
            f"{display_uri(source)} contains no WORD/train.data.txt: download CoarseWSD-20 "
            "(https://github.com/danlou/bert-disambiguation) and put its words there, one folder each"
        )
    return names


def read_texts(source: str, part: str) -> list[str]:
    """Return the contexts of all words."""
    return [text for word in words(source) for text in read_contexts(source, word, part).texts]


def read_contexts(source: str, word: str, part: str) -> Contexts:
    """Read the contexts of a word; InputError if a file is missing, too large or invalid, or their lengths differ."""
    lines, gold = (read_lines(storage.join(source, word, f"{part}.{kind}.txt")) for kind in ("data", "gold"))
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


def embed_targets(model: TokenModel, contexts: Contexts) -> Targets:
    """Embed the target words of contexts and assign their senses."""
    senses, embeddings, kept, start = [np.empty((0, 2), np.int64)], [], [], 0
    for slab in iter_slabs(contexts.texts):
        read = model.read(slab)
        at = contexts.starts[start : start + len(slab)][read.texts]
        covering = np.flatnonzero((read.spans[:, 0] <= at) & (at < read.spans[:, 1]))
        rows = covering[np.unique(read.texts[covering], return_index=True)[1]]
        kept.append(start + read.texts[rows])
        embeddings.append(read.senses[rows])
        if model.dictionary is not None:
            assigned = model.dictionary.assign(read.ids[rows], read.senses[rows])
            senses.append(np.stack([read.ids[rows], assigned], axis=1))
        start += len(slab)
    return Targets(np.concatenate(senses), np.concatenate(embeddings), contexts.gold[np.concatenate(kept)])
