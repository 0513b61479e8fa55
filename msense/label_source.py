"""What labels are made of: the dictionary, its teacher, and the text, each checked against the others.

Comes in: a `DistillConfig`. Goes out: a `Source`. Reads manifests, the dictionary's small arrays and the teacher's
files but no text; Ray is not needed.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from msense import storage
from msense.config import BuildConfig
from msense.corpus import SourceFile, display_uri, list_files
from msense.dictionary import DictionaryConfig, SenseDictionary
from msense.distill_config import DistillConfig
from msense.errors import BadInput
from msense.flags import validate
from msense.pooling import check_pooling
from msense.run_folder import RunFolder
from msense.storage import join
from msense.teacher import TeacherInfo, describe

logger = logging.getLogger(__name__)

_OF_TEXT = (
    "text_column",
    "dedup",
    "stride",
    "seed",
    "sample",
    "max_occurrences",
    "coverage",
    "reference",
    "special_tokens",
)


@dataclass(frozen=True)
class Source:
    """Dictionary, teacher and text of a distillation."""

    dictionary: str  # its folder
    config: DictionaryConfig
    fingerprint: str
    teacher: str  # name or folder
    info: TeacherInfo
    tokenizer: Tokenizer
    build: BuildConfig  # how the text becomes passages and their plan
    inputs: dict[str, str]  # files of the text and their fingerprints
    corpus: tuple[str, ...]
    run: RunFolder | None  # the run that made the dictionary, if its text is to be labelled

    def of_text(self) -> dict[str, Any]:
        """Return the settings on which the passages and their plan depend."""
        return self.build.model_dump(mode="json", include=set(_OF_TEXT))


def find_source(config: DistillConfig) -> Source:
    """Find all that labels are made of.

    Args:
        config: all settings.

    Raises:
        BadInput: the dictionary, its teacher or a text is not there, or they do not belong together.
    """
    folder, run = _folders(storage.absolute(config.dictionary))
    dictionary = SenseDictionary.load(folder)
    of = dictionary.config
    manifest = run.read_manifest() if run else None
    if manifest is None or manifest.get("teacher", {}).get("fingerprint") != of.teacher.fingerprint:
        manifest, run = None, None  # no run, or that of another dictionary
    build = _build_config(config, of, manifest)
    name = config.teacher or of.teacher.name
    info, tokenizer = _teacher(name, build, of, config)
    if config.corpus:
        files, run = list_files(config.corpus), None
        inputs, corpus = fingerprints(files), tuple(display_uri(uri) for uri in config.corpus)
    elif manifest is not None:
        inputs, corpus = manifest["inputs"], tuple(manifest["corpus"])
    else:
        raise BadInput(
            f"no text: {config.dictionary!r} lies beside no run that tells what it was made of: give --corpus"
        )
    return Source(folder, of, dictionary.fingerprint, name, info, tokenizer, build, inputs, corpus, run)


def fingerprints(files: list[SourceFile]) -> dict[str, str]:
    """Return what a manifest says of the files of a text."""
    return {file.name: f"{file.size} {file.fingerprint}" for file in files}


def text_again(source: Source) -> list[SourceFile]:
    """List the text of a dictionary whose run does not keep its passages any more.

    Raises:
        BadInput: it is not where it was.
    """
    try:
        files = list_files(source.corpus)
    except BadInput as error:
        raise BadInput(
            f"the dictionary's run keeps no passages, and the text they were made of is not there any more ({error}): "
            "bring it back, or give --corpus"
        ) from error
    if fingerprints(files) != source.inputs:
        raise BadInput(
            f"the dictionary's run keeps no passages, and the text they were made of ({' '.join(source.corpus)}) has "
            "changed: bring the former back, or name it with --corpus to take it as it is"
        )
    return files


def _folders(given: str) -> tuple[str, RunFolder | None]:
    """Return the folder of a dictionary, and that of its run: the folder given is the one or the other."""
    inside = RunFolder(given).dictionary
    for folder, root in ((inside, given), (given, given.rpartition("/")[0])):
        if storage.exists(join(folder, "config.json")) and (folder == inside or storage.exists(folder)):
            run = RunFolder(root)
            return folder, run if root and run.dictionary == folder and storage.exists(run.finished) else None
    raise BadInput(
        f"there is no dictionary at {display_uri(given)}: give the folder of one, or of a finished run of build_dict.py"
    )


def _build_config(config: DistillConfig, of: DictionaryConfig, manifest: dict[str, Any] | None) -> BuildConfig:
    """Return the settings of the text's passages and plan: those of the dictionary's build, or of a corpus of its own."""
    values = {name: value for name, value in (manifest or {}).get("config", {}).items() if name in _OF_TEXT}
    if config.corpus or manifest is None:
        own = {"text_column": config.text_column, "dedup": config.dedup, "seed": config.seed}
        values = {**own, "max_occurrences": of.max_occurrences, "special_tokens": of.special_tokens}
    fixed = {"layer": of.layer, "max_length": of.max_length or None, "prompt": of.prompt, "metric": of.metric}
    where = {"corpus": config.corpus, "on_bad_document": config.on_bad_document, "revision": of.teacher.revision}
    return validate(BuildConfig, {**values, **fixed, **where})


def _teacher(
    name: str, build: BuildConfig, of: DictionaryConfig, config: DistillConfig
) -> tuple[TeacherInfo, Tokenizer]:
    """Describe the teacher, and hold it against the dictionary."""
    if config.pooled:
        check_pooling(of.pooling)
    try:
        info, tokenizer = describe(name, build)
    except BadInput as error:
        if config.teacher:
            raise
        raise BadInput(f"{error}\nThe dictionary names this teacher: say where it is with --teacher") from error
    wrong = [
        f"its {what} {_short(now)}, the dictionary's {_short(then)}"
        for what, then, now in (
            ("weights have the fingerprint", of.teacher.fingerprint, info.fingerprint),
            ("tokenizer has the fingerprint", of.tokenizer_fingerprint, info.tokenizer_fingerprint),
            ("width is", of.dim, info.dim),
            ("vocabulary is", of.vocab_size, info.vocab_size),
        )
        if then not in ("", now)
    ]
    if wrong:
        raise BadInput(
            f"teacher {name!r} is not the one that the dictionary was made with: {'; '.join(wrong)}. Give that one with "
            "--teacher"
        )
    return replace(info, name=of.teacher.name, excluded=of.excluded_token_ids), tokenizer


def _short(value: object) -> str:
    return str(value)[:12]
