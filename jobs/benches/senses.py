"""How many senses: a shared budget against the same number for all, at equal size; Markov clustering against its package."""

import csv
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benches import peers
from benches.shared import Bench, Figures, in_turn, timed
from msense import SenseDictionary
from msense.config import DEFAULT_BUDGET, DEMO_TEACHER, SenseBudget, sense_bytes
from msense.errors import BadInput
from msense.mcl import MclConfig, markov_clusters
from msense.teacher import token_batches
from msense.teacher_folder import locate

logger = logging.getLogger("msense.bench")
CAP, SHOTS, DRAWS = 1000, 8, 10


@dataclass
class Read:
    """Texts as the teacher sees them."""

    ids: np.ndarray  # int32 [N]
    embeddings: np.ndarray  # float16 [N, D]
    offsets: np.ndarray  # int64 [texts + 1]
    targets: np.ndarray  # int64 [texts], row of the word asked for; -1 if there is none

    def pooled(self, embeddings: np.ndarray) -> np.ndarray:
        """Mean of each text's embeddings, scaled to length 1: [texts, D]."""
        sums = np.add.reduceat(embeddings.astype(np.float32), self.offsets[:-1])
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)


class Reader:
    """The demo teacher in bfloat16."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = locate(DEMO_TEACHER)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def read(self, texts: Sequence[Sequence[str]], targets: Sequence[int] | None = None) -> Read:
        """Read texts given as words; `targets` are numbers of words."""
        encoded = self.tokenizer(list(map(list, texts)), is_split_into_words=True, truncation=True, max_length=256)
        ids = encoded["input_ids"]
        lengths = np.array([len(x) for x in ids])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        embeddings = np.empty((offsets[-1], self.model.config.hidden_size), np.float16)
        for batch in token_batches(lengths, 4096):
            padded, mask = torch.zeros(2, len(batch), lengths[batch].max(), dtype=torch.int64)
            for row, text in enumerate(batch):
                padded[row, : lengths[text]] = torch.tensor(ids[text])
                mask[row, : lengths[text]] = 1
            with torch.inference_mode():
                hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state.float().numpy()
            for row, text in enumerate(batch):
                embeddings[offsets[text] : offsets[text + 1]] = hidden[row, : lengths[text]]
        places = np.full(len(texts), -1)
        for text, word in enumerate(targets or ()):
            words = encoded.word_ids(text)
            places[text] = offsets[text] + words.index(word) if word in words else -1
        return Read(np.concatenate([np.array(x, np.int32) for x in ids]), embeddings, offsets, places)


def senses(bench: Bench) -> Figures:
    """Auto against K = 20 at equal size, on banking77/ and coarsewsd/ of --data: distortion and two tasks."""
    if bench.data is None or not bench.data.is_dir():
        raise BadInput("senses needs --data DIR with banking77/{train,test}.csv and coarsewsd/WORD/*.{data,gold}.txt")
    reader = Reader()
    return _banking(bench.data / "banking77", reader) | _coarsewsd(bench.data / "coarsewsd", reader)


def _fitted(train: Read) -> dict[str, SenseDictionary]:
    """Dictionaries of the training texts: K 20 and 50, auto of the very size of K 20, and auto as it comes."""

    def fit(k: int | SenseBudget) -> SenseDictionary:
        return SenseDictionary.fit(train.ids, train.embeddings, k=k, max_occurrences=CAP)

    made = {"k20": fit(20), "k50": fit(50)}
    size = len(made["k20"]) * sense_bytes(train.embeddings.shape[1])
    return {**made, "auto": fit(SenseBudget(size=size)), "auto_default": fit(DEFAULT_BUDGET)}


def _distortions(name: str, made: dict[str, SenseDictionary], texts: dict[str, Read]) -> Figures:
    """Sizes, and mean squared distances of all embeddings to their senses; of tokens unknown to a dictionary none."""
    figures: Figures = {f"senses.{name}_size_{key}": float(len(d)) for key, d in made.items()}
    for part, text in texts.items():
        given = text.embeddings.astype(np.float32)
        for key, dictionary in made.items():
            known = np.diff(dictionary.offsets)[np.minimum(text.ids, dictionary.vocab_size - 1)] > 0
            known &= text.ids < dictionary.vocab_size
            away = ((dictionary.replace(text.ids, given) - given) ** 2).sum(1)
            figures[f"senses.{name}_{part}_distortion_{key}"] = float(away[known].mean())
        ratio = figures[f"senses.{name}_{part}_distortion_auto"] / figures[f"senses.{name}_{part}_distortion_k20"]
        figures[f"senses.{name}_{part}_distortion_ratio"] = ratio
    return figures


def _banking(folder: Path, reader: Reader) -> Figures:
    """Accuracy of the replaced teacher: 8 shots a class, logistic regression, ten draws, paired."""
    from scipy import stats

    texts, labels = {}, {}
    for part in ("train", "test"):
        with (folder / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        texts[part] = reader.read([row["text"].split() for row in rows])
        labels[part] = np.array([row["label"] for row in rows])
    made = _fitted(texts["train"])
    figures = _distortions("banking77", made, texts)
    accuracy = {"teacher": _shots({part: x.pooled(x.embeddings) for part, x in texts.items()}, labels)}
    for key, d in made.items():
        vectors = {part: x.pooled(d.replace(x.ids, x.embeddings.astype(np.float32))) for part, x in texts.items()}
        accuracy[key] = _shots(vectors, labels)
    gain = accuracy["auto"] - accuracy["k20"]
    low, high = stats.t.interval(0.95, len(gain) - 1, gain.mean(), stats.sem(gain))
    figures |= {f"senses.banking77_{key}": float(found.mean()) for key, found in accuracy.items()}
    told = {"gain": gain.mean(), "gain_low": low, "gain_high": high}
    return figures | {f"senses.banking77_{key}": float(value) for key, value in told.items()}


def _shots(vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray:
    """Test accuracies of ten draws [DRAWS]."""
    from sklearn.linear_model import LogisticRegression

    found = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        each = [rng.permutation(np.flatnonzero(labels["train"] == c))[:SHOTS] for c in np.unique(labels["train"])]
        rows = np.concatenate(each)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a hundred rounds, as MTEB has it, end before convergence
            model = LogisticRegression(max_iter=100, random_state=seed)
            model.fit(vectors["train"][rows], labels["train"][rows])
        found.append((model.predict(vectors["test"]) == labels["test"]).mean())
    return np.array(found)


def _coarsewsd(folder: Path, reader: Reader) -> Figures:
    """Accuracy over words: senses of a target word are named by the majority of its training occurrences."""
    texts, words, golds = {}, {}, {}
    for part in ("train", "test"):
        lines, places, word_of, gold = [], [], [], []
        for word in sorted(path.name for path in folder.iterdir()):
            for line in (folder / word / f"{part}.data.txt").read_text(encoding="utf-8").splitlines():
                place, text = line.split("\t", 1)
                lines.append(text.split(" "))
                places.append(int(place))
                word_of.append(word)
            gold += (folder / word / f"{part}.gold.txt").read_text(encoding="utf-8").split()
        texts[part] = reader.read(lines, places)
        words[part], golds[part] = np.array(word_of), np.array(gold)
    made = _fitted(texts["train"])
    figures = _distortions("coarsewsd", made, texts)
    for key, d in made.items():
        found = [
            _named(d, texts, {p: (words[p] == w) & (texts[p].targets >= 0) for p in texts}, golds)
            for w in set(words["train"])
        ]
        figures[f"senses.coarsewsd_{key}"] = float(np.mean(found))
    return figures


def _named(
    dictionary: SenseDictionary, texts: dict[str, Read], chosen: dict[str, np.ndarray], golds: dict[str, np.ndarray]
) -> float:
    """Accuracy of one word: each of its senses says the label that most of its training occurrences have."""
    import pandas as pd

    tables = {}
    for part, text in texts.items():
        rows = text.targets[chosen[part]]
        sense = dictionary.assign(text.ids[rows], text.embeddings[rows].astype(np.float32))
        tables[part] = pd.DataFrame({"token": text.ids[rows], "sense": sense, "gold": golds[part][chosen[part]]})
    names = tables["train"].groupby(["token", "sense"])["gold"].agg(lambda gold: gold.mode()[0])
    told = tables["test"].join(names.rename("told"), on=["token", "sense"])["told"]
    return float((told.fillna(tables["train"]["gold"].mode()[0]) == tables["test"]["gold"]).mean())


def mcl(bench: Bench) -> Figures:
    """Markov clustering of 200 tokens of 500 points against the package markov-clustering, dense and sparse."""
    if not peers.installed("markov_clustering", "markov-clustering"):
        return {}
    bench.build()
    weights = [_similarity(points) for points in _subsets(bench, 200, 500)]
    config, cores = MclConfig(), os.cpu_count() or 1
    ours = markov_clusters(weights, config, threads=cores)
    theirs: dict[str, list[list[tuple[int, ...]]]] = {}

    def package(kind: str, some: list[np.ndarray]) -> float:
        import markov_clustering
        from scipy.sparse import csc_matrix

        given = [csc_matrix(w) if kind == "sparse" else w for w in some]

        def work() -> None:
            theirs[kind] = [
                markov_clustering.get_clusters(markov_clustering.run_mcl(w, inflation=1.65, expansion=2)) for w in given
            ]

        return timed(work)

    few = weights[:10]  # of the slower kind, which is the sparse one, ten tokens tell enough
    sparse, dense_few = in_turn([lambda: package("sparse", few), lambda: package("dense", few)], 1)
    own, dense = in_turn(
        [lambda: timed(lambda: markov_clusters(weights, config, threads=cores)), lambda: package("dense", weights)], 3
    )
    agreement = [_agreement(a, b, len(w)) for a, b, w in zip(ours, theirs["dense"], weights, strict=True)]
    return {
        "mcl.speedup": dense * min(1.0, sparse / dense_few) / own,
        "mcl.speedup_sparse": dense * (sparse / dense_few) / own,
        "mcl.agreement": float(np.mean(agreement)),
        "mcl.agreement_least": float(np.min(agreement)),
        "mcl.equal_clusters": float(np.mean([a == b for a, b in zip(ours, theirs["dense"], strict=True)])),
        "mcl.ms_a_token": own / len(weights) * 1000,
    }


def _subsets(bench: Bench, count: int, size: int) -> list[np.ndarray]:
    """Points [size, D] of so many tokens: the first of each token that has enough, then others of the largest ones."""
    tokens, points = bench.points()
    _, start, number = np.unique(tokens, return_index=True, return_counts=True)
    found = [points[a : a + size] for a, n in zip(start, number, strict=True) if n >= size]
    rng = np.random.default_rng(0)
    large = [(a, n) for a, n in zip(start, number, strict=True) if n >= 3 * size // 2]
    for at in range(count - len(found)):
        a, n = large[at % len(large)]
        found.append(points[a + np.sort(rng.permutation(n)[:size])])
    return found[:count]


def _similarity(points: np.ndarray) -> np.ndarray:
    """1 / (0.01 + Euclidean distance): float64 [n, n]."""
    from scipy.spatial.distance import cdist

    return 1 / (0.01 + cdist(points.astype(np.float64), points.astype(np.float64)))


def _agreement(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]], nodes: int) -> float:
    """Adjusted Rand index; a node in several clusters counts with the first."""
    from sklearn.metrics import adjusted_rand_score

    labels = np.full((2, nodes), -1)
    for row, clusters in enumerate((ours, theirs)):
        for number, cluster in reversed(list(enumerate(clusters))):
            labels[row, list(cluster)] = number
    return float(adjusted_rand_score(labels[0], labels[1]))
