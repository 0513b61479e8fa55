"""What `--model` and `--task` say.

Comes in: words of the command line. Goes out: `Spec`s and `TaskSpec`s, plain values that travel to workers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from msense import storage
from msense.config import Metric
from msense.encoder import DEFAULT_TEMPERATURE, Replace
from msense.errors import BadInput
from msense.glue import GLUE
from msense.text import redact

ModelKind = Literal["teacher", "replaced", "student", "truncated", "model2vec", "encoder"]
TaskKind = Literal["classification", "classifier", "mteb", "wordsim", "coarsewsd", "tokens"]
MODELS = {  # how it is written: what it is
    "teacher": "the teacher as it is",
    "replaced:DIR": "the teacher, every embedding replaced by a sense of the dictionary DIR: replaced:DIR,soft (the default) "
    "or ,hard, then ,l2 ,dot or ,cosine (default: the dictionary's), ,temperature=F",
    "student:DIR": "a student's sentence vectors; student:DIR,soft or ,hard: its tokens replaced by senses",
    "truncated:N": "the teacher's first N layers, untrained",
    "model2vec": "model2vec, distilled on the spot from the teacher, in --model2vec-python",
    "NAME": "any sentence-transformers model, by folder or hub name",
}
TASKS = {
    "NAME=DATA": "text classification: logistic regression on sentence vectors (--shots); DATA is a folder with train and "
    "test as csv, jsonl or parquet, or hf://dataset[:config]",
    "classifier:NAME=DATA": "the same texts under the teacher's own classifier, as jobs/finetune.py trained it; NAME may be "
    "one of GLUE's, for its columns and metrics, and without =DATA from the hub",
    "mteb:NAME=DATA": "the same by the package mteb; without =DATA one of its own tasks, by name, from the hub",
    "wordsim=DIR": "word similarity: *.txt of word, word, score",
    "coarsewsd=DIR": "word senses of people: DIR/WORD/{train,test}.{data,gold}.txt",
    "tokens:NAME=CORPUS": "token embeddings and senses beside the teacher's, on any text that build_dict.py reads",
}
_LABEL = re.compile(r"([A-Za-z0-9][\w ,.+-]{0,60})=(.+)", re.DOTALL)  # no colon and no slash: a model has one


@dataclass(frozen=True)
class Spec:
    """A model to compare.

    Attributes:
        name: in tables.
        kind: which of `MODELS`.
        source: folder, URI or hub name; empty for what is made of the teacher alone.
        teacher: name or folder of the teacher.
        revision: of it, or of an encoder of the hub.
        dtype: in which the teacher computes.
        replace: soft or hard; None: embeddings as they are.
        metric: of replacement; None: the dictionary's.
        temperature: of soft replacement, in units of the dictionary's mean squared spread.
        layers: of a truncated teacher, else 0.
        python: that has model2vec; None: this one.
    """

    name: str
    kind: ModelKind
    source: str = ""
    teacher: str = ""
    revision: str | None = None
    dtype: str = "auto"
    replace: Replace | None = None
    metric: Metric | None = None
    temperature: float = DEFAULT_TEMPERATURE
    layers: int = 0
    python: str | None = None


@dataclass(frozen=True)
class TaskSpec:
    """A task.

    Attributes:
        name: in tables.
        kind: which of `TASKS`.
        source: folder, URI or dataset of the hub; empty for a task that mteb brings along.
    """

    name: str
    kind: TaskKind
    source: str

    @property
    def title(self) -> str:
        """What its table is called."""
        return self.name if self.kind in ("classification", self.name) else f"{self.name} ({self.kind})"


def parse_model(word: str) -> Spec:
    """Read what one `--model` says; `LABEL=MODEL` gives it a name of its own.

    Raises:
        BadInput: it cannot be read.
    """
    labelled = _LABEL.fullmatch(word)
    name, text = labelled.groups() if labelled and not Path(word).exists() else ("", word)
    kind, mark, rest = text.partition(":")
    if text in ("teacher", "model2vec"):
        return Spec(name or text, "teacher" if text == "teacher" else "model2vec")
    if kind == "truncated":
        if not re.fullmatch("[1-9][0-9]{0,3}", rest):
            raise BadInput(f"--model {redact(word)}: write truncated:N with a number of layers, such as truncated:2")
        return Spec(name or text, "truncated", layers=int(rest))
    if kind in ("replaced", "student") and mark:
        return _with_options(word, name, "replaced" if kind == "replaced" else "student", rest)
    if "=" in text or text.strip() != text or not text:
        raise BadInput(f"--model {redact(word)} cannot be read: write one of {', '.join(MODELS)}, or LABEL=MODEL")
    return Spec(name or _short(text), "encoder", text if "://" in text or not Path(text).is_dir() else _absolute(text))


def _with_options(word: str, name: str, kind: Literal["replaced", "student"], rest: str) -> Spec:
    """Read `DIR,soft,l2,temperature=F`."""
    source, *options = rest.split(",")
    if not source:
        raise BadInput(f"--model {redact(word)} names no folder: write {kind}:DIR")
    replace: Replace | None = "soft" if kind == "replaced" else None
    metric: Metric | None = None
    temperature = DEFAULT_TEMPERATURE
    for option in options:
        key, _, value = option.partition("=")
        if option in get_args(Replace):
            replace = "soft" if option == "soft" else "hard"
        elif option in get_args(Metric):
            metric = next(m for m in get_args(Metric) if m == option)
        elif key == "temperature" and re.fullmatch(r"[0-9]*\.?[0-9]+", value) and float(value) > 0:
            temperature = float(value)
        else:
            known = ", ".join([*get_args(Replace), *get_args(Metric), "temperature=F"])
            raise BadInput(f"--model {redact(word)}: {redact(option)!r} is no option of it; these are: {known}")
    shown = ",".join([f"{kind}:{_short(source)}", *options])
    of_hub = kind == "student" and not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    return Spec(
        name or shown,
        kind,
        source if of_hub else _absolute(source),
        replace=replace,
        metric=metric,
        temperature=temperature,
    )


def parse_task(word: str) -> TaskSpec:
    """Read what one `--task` says.

    Raises:
        BadInput: it cannot be read.
    """
    left, mark, source = word.partition("=")
    kind, colon, name = left.partition(":")
    known = get_args(TaskKind)
    if name and (kind == "mteb" or (kind == "classifier" and name in GLUE)):
        return TaskSpec(name, "mteb" if kind == "mteb" else "classifier", _data(source))
    if not mark or not source or not left:
        raise BadInput(
            f"--task {redact(word)}: write NAME=DATA, such as banking77=data/banking77; --help tells all kinds"
        )
    if kind in known:
        return TaskSpec(name or kind, next(k for k in known if k == kind), _data(source))
    if colon:
        raise BadInput(f"--task {redact(word)}: {redact(kind)!r} is no kind of task; these are: {', '.join(known)}")
    return TaskSpec(left, "classification", _data(source))


def check_names(words: Sequence[str], names: Sequence[str], what: str) -> None:
    """Refuse two of one name.

    Raises:
        BadInput: naming both.
    """
    for number, name in enumerate(names):
        if name in names[:number]:
            first = words[names.index(name)]
            raise BadInput(
                f"{what} {redact(first)} and {redact(words[number])} are both called {redact(name)!r}: give one another "
                "name, as LABEL=... (models) or KIND:NAME=... (tasks)"
            )


def _data(source: str) -> str:
    return source if not source or source.startswith(("hf://", "pydocs")) else storage.absolute(source)


def _absolute(source: str) -> str:
    return storage.absolute(source)


def _short(source: str) -> str:
    """Return the last two parts of a path: enough to know it by."""
    return "/".join(redact(source).rstrip("/").split("/")[-2:])
