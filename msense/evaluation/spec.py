"""Parsing of `--model` and `--task` into plain values that are sent to workers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from msense.constants import DEFAULT_TEMPERATURE, Metric, Replace
from msense.corpus.glue import GLUE
from msense.errors import InputError
from msense.io import storage
from msense.teacher.spec import Attention
from msense.text import redact

ModelKind = Literal["teacher", "replaced", "student", "truncated", "model2vec", "bm25", "encoder"]
TaskKind = Literal[
    "classification", "retrieval", "similarity", "pairs", "classifier", "mteb", "wordsim", "coarsewsd", "tokens"
]
OfVectors = Literal["retrieval", "similarity", "pairs"]  # kinds of tasks that mteb measures too, besides classification
MODELS = {  # syntax: meaning
    "teacher": "the plain teacher",
    "replaced:DIR": "the teacher with every embedding replaced by senses of the dictionary DIR; options: replaced:DIR,soft "
    "(default) or ,hard; ,l2 ,dot or ,cosine (default: the dictionary's); ,temperature=F",
    "student:DIR": "a student's sentence vectors; student:DIR,soft or ,hard: with its tokens replaced by senses",
    "truncated:N": "the teacher's first N layers, untrained",
    "model2vec": "model2vec, distilled on the fly from the teacher in --model2vec-python",
    "bm25": "BM25, for retrieval only; bm25,LANGUAGE stems the words, such as bm25,english",
    "NAME": "any sentence-transformers model, by folder or Hub name",
}
TASKS = {
    "NAME=DATA": "text classification by logistic regression on sentence vectors (--shots); DATA is a folder with train and "
    "test as csv, jsonl or parquet, or hf://dataset[:config]",
    "retrieval:NAME=DATA": "retrieval; DATA is a folder with corpus.jsonl, queries.jsonl and qrels.tsv or qrels/SPLIT.tsv, or "
    "hf://dataset; retrieval:NAME=DATA,split=SPLIT (default: test)",
    "similarity:NAME=DATA": "semantic similarity; DATA has pairs of texts with scores in test (or ,split=SPLIT) as csv, jsonl or "
    "parquet",
    "pairs:NAME=DATA": "pair classification; the same with labels 0 and 1",
    "classifier:NAME=DATA": "text classification by the teacher's own classifier, trained with `msense finetune`; a GLUE task "
    "as NAME sets columns and metrics and needs no =DATA",
    "mteb:NAME=DATA": "text classification by the mteb package; mteb:retrieval:NAME=DATA, mteb:similarity:NAME=DATA and "
    "mteb:pairs:NAME=DATA for the other kinds; without =DATA one of its own tasks, from the Hub",
    "wordsim=DIR": "word similarity: *.txt with lines of word, word, score",
    "coarsewsd=DIR": "word sense disambiguation: DIR/WORD/{train,test}.{data,gold}.txt",
    "tokens:NAME=CORPUS": "token embeddings and senses against the teacher's, on any text that `msense build` reads",
}
_OF_PAPER = (  # of Wang et al. (2025), by the names in their code; mteb now has a `.v2` of most
    "Arxiv Banking77 DBpedia Emotion FinancialPhrasebank FrenkEn Imdb CanadaTaxCourtOutcomesLegalBench News Patent "
    "PoemSentiment ToxicChat ToxicConversations TweetSentimentExtraction TweetTopicSingle YelpReviewFull"
)
PAPER_TASKS = tuple(f"{name}Classification" for name in _OF_PAPER.split())
_LABEL = re.compile(r"([A-Za-z0-9][\w ,.+-]{0,60})=(.+)", re.DOTALL)  # no colon or slash, which models contain


@dataclass(frozen=True)
class Spec:
    """A model to evaluate.

    Example:
        >>> parse_model("soft=replaced:runs/senses,temperature=0.5").replace
        'soft'
    """

    name: str  # in tables
    kind: ModelKind
    source: str = ""  # folder, URI or Hub name; empty for models derived from the teacher alone
    teacher: str = ""  # name or folder
    revision: str | None = None  # of the teacher, or of an encoder on the Hub
    attention: Attention = "auto"  # of the teacher
    dtype: str = "auto"  # of the teacher
    replace: Replace | None = None  # replacement by senses
    metric: Metric | None = None  # of the replacement; None: the dictionary's
    temperature: float = DEFAULT_TEMPERATURE  # of soft replacement, in units of the mean squared RMS distance
    layers: int = 0  # of a truncated teacher
    stemmer: str | None = None  # language of BM25's, if any
    python: str | None = None  # executable with model2vec; None: the current one


@dataclass(frozen=True)
class TaskSpec:
    """A task.

    Example:
        >>> parse_task("mteb:Banking77Classification").title
        'Banking77Classification (mteb)'
    """

    name: str
    kind: TaskKind
    source: str  # folder, URI or Hub dataset; empty for a task with its own data
    split: str = "test"  # of retrieval, similarity and pairs
    of: OfVectors | Literal[""] = ""  # what mteb measures; empty for classification

    @property
    def title(self) -> str:
        """Title of its table."""
        kind = f"mteb {self.of}" if self.of and self.source else self.kind
        return self.name if self.kind in ("classification", self.name) else f"{self.name} ({kind})"


def parse_model(word: str) -> Spec:
    """Parse a `--model`, or raise InputError; `LABEL=MODEL` sets its name."""
    labelled = _LABEL.fullmatch(word)
    name, text = labelled.groups() if labelled and not Path(word).exists() else ("", word)
    if bm25 := re.fullmatch("bm25(?:,([a-z]+))?", text):
        return Spec(name or text, "bm25", stemmer=bm25[1])
    match text.partition(":"):
        case (("teacher" | "model2vec") as kind, "", _):
            return Spec(name or text, kind)
        case ("truncated", _, layers):
            if not re.fullmatch("[1-9][0-9]{0,3}", layers):
                raise InputError(f"--model {redact(word)}: invalid number of layers, use e.g. truncated:2")
            return Spec(name or text, "truncated", layers=int(layers))
        case (("replaced" | "student") as kind, ":", rest):
            return _with_options(word, name, kind, rest)
    if "=" in text or text.strip() != text or not text:
        raise InputError(f"--model {redact(word)}: cannot parse this, use one of {', '.join(MODELS)}, or LABEL=MODEL")
    local = "://" not in text and Path(text).is_dir()
    return Spec(name or _short(text), "encoder", storage.absolute(text) if local else text)


def _with_options(word: str, name: str, kind: ModelKind, rest: str) -> Spec:
    """Parse `DIR,soft,l2,temperature=F`."""
    source, *options = rest.split(",")
    if not source:
        raise InputError(f"--model {redact(word)}: the folder is missing, use {kind}:DIR")
    settings: dict[str, Any] = {"replace": "soft"} if kind == "replaced" else {}
    for option in options:
        key, _, value = option.partition("=")
        if option in get_args(Replace):
            settings["replace"] = option
        elif option in get_args(Metric):
            settings["metric"] = option
        elif key == "temperature" and re.fullmatch(r"[0-9]*\.?[0-9]+", value) and float(value) > 0:
            settings["temperature"] = float(value)
        else:
            known = ", ".join([*get_args(Replace), *get_args(Metric), "temperature=F"])
            raise InputError(f"--model {redact(word)}: unknown option {redact(option)!r}, use {known}")
    shown = ",".join([f"{kind}:{_short(source)}", *options])
    on_hub = kind == "student" and not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    source = source if on_hub else storage.absolute(source)
    return Spec(name or shown, kind, source, **settings)


def parse_task(word: str) -> TaskSpec:
    """Parse a `--task`, or raise InputError."""
    left, _, source = word.partition("=")
    given, colon, name = left.partition(":")
    kind = next((known for known in get_args(TaskKind) if known == given), None)
    of: OfVectors | Literal[""] = ""
    if kind == "mteb" and ":" in name:
        wanted, _, name = name.partition(":")
        of = next((known for known in get_args(OfVectors) if known == wanted), "")
        if not of or not name or not source:
            raise InputError(
                f"--task {redact(word)}: use mteb:NAME, mteb:NAME=DATA or mteb:KIND:NAME=DATA, KIND one of "
                f"{', '.join(get_args(OfVectors))}"
            )
    split = "test"
    if of or kind in get_args(OfVectors):
        source, _, chosen = source.partition(",split=")
        split = chosen or split
        if not re.fullmatch(r"\w[\w.-]*", split):
            raise InputError(
                f"--task {redact(word)}: {redact(split)!r} is not the name of a split: use e.g. ,split=dev"
            )
    if source and not source.startswith(("hf://", "pydocs")):
        source = storage.absolute(source)
    has_data = name and (kind == "mteb" or (kind == "classifier" and name in GLUE))
    if not left or not (source or has_data):
        raise InputError(f"--task {redact(word)}: name or data are missing, use NAME=DATA (--help lists all kinds)")
    if colon and kind is None:
        raise InputError(f"--task {redact(word)}: unknown kind {redact(given)!r}, use {', '.join(get_args(TaskKind))}")
    return TaskSpec(name or given, kind or "classification", source, split, of)


def check_names(words: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raise InputError if two words of the flag `what` have the same parsed name."""
    seen: dict[str, str] = {}
    for word, name in zip(words, names, strict=True):
        if name in seen:
            raise InputError(
                f"{what} {redact(seen[name])} and {redact(word)} have the same name {redact(name)!r}: set another with "
                "LABEL=... (models) or KIND:NAME=... (tasks)"
            )
        seen[name] = word


def _short(source: str) -> str:
    """Return the last two components of a path."""
    return "/".join(redact(source).rstrip("/").split("/")[-2:])
