"""The inputs of labelling: the dictionary, its teacher and the text, each checked against the others."""

from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from msense.config.base import validate_config
from msense.config.build import PlanOptions
from msense.config.distill import DistillConfig
from msense.corpus import SourceFile, display_uri, list_files
from msense.corpus.passages import PassageSpec
from msense.dictionary import DictionaryConfig, SenseDictionary
from msense.errors import InputError
from msense.io import storage
from msense.pipelines.job import fingerprints
from msense.run.folder import RunFolder
from msense.stages.passages import passage_spec
from msense.stages.reading import vector_dim
from msense.student.config import dictionary_mismatch
from msense.teacher.pooling import check_pooling
from msense.teacher.spec import TeacherInfo, TeacherOptions, load_teacher_info
from msense.teacher.splitting import check_split


@dataclass(frozen=True)
class DistillInputs:
    """Dictionary, teacher and text of a distillation."""

    dictionary: str  # its folder
    config: DictionaryConfig
    fingerprint: str
    teacher: str  # name or folder
    info: TeacherInfo
    tokenizer: Tokenizer
    spec: PassageSpec
    text: PlanOptions  # settings of the passages and their plan
    text_settings: dict[str, Any]  # the same with the rule for special tokens, as the manifest records them
    inputs: dict[str, str]  # fingerprints of the text's files
    queries: list[SourceFile]
    corpus: tuple[str, ...]
    run: RunFolder | None  # the run that made the dictionary, if its text is labelled
    pins: dict[str, Any]  # of that run
    quantized: bool  # whether the embeddings that it kept are int8
    home: RunFolder | None  # the run that made the dictionary, whatever text is labelled
    vector_dim: int  # size of the teacher's sentence vectors; 0: none


def load_inputs(config: DistillConfig) -> DistillInputs:
    """Resolve all inputs of labelling; raise InputError if one is missing, or they do not belong together."""
    folder, run = _folders(storage.absolute(config.dictionary))
    dictionary = SenseDictionary.load(folder)
    of = dictionary.config
    manifest = run.read_manifest() if run else None
    if manifest is None or manifest.get("teacher", {}).get("fingerprint") != of.teacher.fingerprint:
        manifest, run = None, None  # no run, or another dictionary's
    if manifest is None and not config.corpus:
        raise InputError(
            f"no text: {config.dictionary!r} is not in a run folder that records its corpus: give --corpus"
        )
    text, options = _options(config, of, manifest)
    teacher = config.teacher or (run.teacher_folder() if run else None) or of.teacher.name
    info, tokenizer = _teacher(teacher, options, of, config)
    home, pins, quantized = run, {}, False
    if config.corpus or manifest is None:
        inputs, corpus, run = fingerprints(list_files(config.corpus)), tuple(map(display_uri, config.corpus)), None
    else:
        inputs, corpus, pins = manifest["inputs"], tuple(manifest["corpus"]), manifest["pins"]
        quantized = manifest.get("config", {}).get("embeddings_dtype") == "int8"
    return DistillInputs(
        dictionary=folder,
        config=of,
        fingerprint=dictionary.fingerprint,
        teacher=teacher,
        info=info,
        tokenizer=tokenizer,
        spec=passage_spec(info, text),
        text=text,
        text_settings=text.model_dump(mode="json") | {"special_tokens": options.special_tokens},
        inputs=inputs,
        queries=list_files(config.queries) if config.queries else [],
        corpus=corpus,
        run=run,
        pins=pins,
        quantized=quantized,
        home=home,
        vector_dim=vector_dim(teacher, info),
    )


def list_original_text(source: DistillInputs) -> list[SourceFile]:
    """Return the text of a dictionary whose run lost its passages; raise InputError if it is missing or has changed."""
    gone = "the dictionary's run has no passages, and the text they were made from"
    try:
        files = list_files(source.corpus)
    except InputError as error:
        raise InputError(f"{gone} no longer exists ({error}): restore it, or give --corpus") from error
    if fingerprints(files) != source.inputs:
        raise InputError(
            f"{gone} ({' '.join(source.corpus)}) has changed: restore the original, or give --corpus to use it as it is"
        )
    return files


def _folders(given: str) -> tuple[str, RunFolder | None]:
    """Return a dictionary's folder and its run's, if any, from the path of either."""
    inside = RunFolder(given).dictionary
    for folder, root in ((inside, given), (given, given.rpartition("/")[0])):
        if storage.exists(storage.join(folder, "config.json")):
            run = RunFolder(root)
            return folder, run if root and run.dictionary == folder and storage.exists(run.finished) else None
    raise InputError(
        f"there is no dictionary at {display_uri(given)}: give a dictionary folder, or a finished run of `msense build`"
    )


def _options(
    config: DistillConfig, of: DictionaryConfig, manifest: dict[str, Any] | None
) -> tuple[PlanOptions, TeacherOptions]:
    """Return the settings of the passages and their plan: those of the dictionary's build, or of another corpus."""
    if config.corpus or manifest is None:
        values = config.model_dump(include={"text_column", "id_column", "prompt_column", "dedup", "seed"})
        values |= {"max_occurrences": of.max_occurrences, "special_tokens": of.special_tokens}
    else:
        values = manifest.get("config", {})
    text = {name: value for name, value in values.items() if name in PlanOptions.model_fields}
    teacher: dict[str, Any] = {"layer": of.layer, "max_length": of.max_length or None, "prompt": of.prompt}
    teacher |= {"revision": of.teacher.revision, "attention": of.attention}
    teacher |= {"special_tokens": values["special_tokens"]} if "special_tokens" in values else {}
    return validate_config(PlanOptions, text), validate_config(TeacherOptions, teacher)


def _teacher(
    name: str, options: TeacherOptions, of: DictionaryConfig, config: DistillConfig
) -> tuple[TeacherInfo, Tokenizer]:
    """Load the teacher's metadata and check it against the dictionary."""
    if config.pooled:
        check_pooling(of.pooling)
    check_split(name, options.revision, config.teacher_ranks)
    try:
        info, tokenizer = load_teacher_info(name, options)
    except InputError as error:
        if config.teacher:
            raise
        raise InputError(f"{error}\nThe dictionary names this teacher: give its location with --teacher") from error
    if mismatch := dictionary_mismatch(of, info.tokenizer_fingerprint, info.fingerprint, info.dim, info.vocab_size):
        raise InputError(
            f"teacher {name!r} is not the one that the dictionary was built with: the dictionary has {mismatch}; give the "
            "original with --teacher"
        )
    return replace(info, name=of.teacher.name, excluded=of.excluded_token_ids), tokenizer
