"""Merge a base model and LoRA adapters into one teacher folder. Memory: see `msense.teacher.merging`."""

from pathlib import Path
from typing import Any, NamedTuple

from msense.config.merge import MergeConfig
from msense.errors import InputError
from msense.io.untrusted import printable
from msense.teacher.files import ADAPTER_CONFIG, POOLING_KEYS, TeacherFolder, locate, read_object, read_settings
from msense.teacher.finetuned import tokenizer_settings
from msense.teacher.merging import Reading, merge_folders
from msense.teacher.pooling import Pooling

_POOLING: dict[str, Pooling] = {  # by LLM2Vec's names
    "mean": "mean",
    "bos_token": "cls",
    "eos_token": "lasttoken",
    "last_token": "lasttoken",
}
_LLM2VEC = "llm2vec_config.json"


class Frame(NamedTuple):
    """What surrounds every text."""

    before: str = ""
    after: str = ""
    end: str = ""  # after all, if LLM2Vec pools an EOS token


FRAMES = {  # of the models that LLM2Vec was trained with
    "llama3": Frame("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral": Frame("[INST] ", " [/INST]", " </s>"),
}


def merge_teacher(config: MergeConfig) -> dict[str, Any]:
    """Merge a teacher; return what `merge_folders` does, and `output`.

    Raises:
        InputError: a folder is missing or cannot be merged, or the output exists.

    Example:
        >>> config = MergeConfig(adapter=("mntp", "supervised"), llm2vec="llama3", output="teachers/llm2vec")
        >>> merge_teacher(config)["output"]  # doctest: +SKIP
    """
    output = Path(config.output)
    if (output / "config.json").exists():
        raise InputError(f"{output} has a model already: give another --output, or delete it")
    adapters = [locate(name) for name in config.adapter]
    settings = read_object(adapters[0] / ADAPTER_CONFIG)
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")  # both of the base
    name = config.teacher or named
    if not isinstance(name, str) or not name:
        raise InputError(f"adapter {adapters[0]} names no base model: give it with --teacher")
    try:
        base = locate(name, config.revision or (str(revision) if revision and name == named else None))
    except InputError as error:
        raise InputError(f"{error}; give the base model with --teacher") from error
    if output.resolve() in {base.resolve(), *(folder.resolve() for folder in adapters)}:
        raise InputError(f"{output} is the folder of the base or an adapter: give another --output")
    own = next((found for folder in reversed(adapters) if (found := read_object(folder / _LLM2VEC))), {})
    folders = () if config.llm2vec else (*reversed(adapters), base)
    known = next(
        (read_settings(folder) for folder in folders if (folder / "modules.json").is_file()), TeacherFolder(base)
    )
    how = reading(config, own, known)
    return merge_folders(read_settings(base).body, adapters, output, how) | {"output": str(output)}


def reading(config: MergeConfig, llm2vec: dict[str, Any], known: TeacherFolder) -> Reading:
    """Return how the merged teacher reads a text: as the flags say, else LLM2Vec's config, else sentence-transformers'."""
    if known.projections or known.truncate_dim:
        raise InputError(
            f"{known.body} has sentence vectors after Dense modules or truncation, which are not kept: merge it with "
            "sentence-transformers and peft's merge_and_unload"
        )
    frame = FRAMES[config.llm2vec] if config.llm2vec else Frame()
    attention = "bidirectional" if config.llm2vec and config.attention == "auto" else config.attention
    pooling, include, length = config.pooling, config.include_prompt, config.max_length
    if config.llm2vec:
        if pooling is None:
            mode = llm2vec.get("pooling_mode", "mean")
            if mode not in _POOLING:
                raise InputError(f"{_LLM2VEC}: pooling_mode {printable(mode)} is not supported: give --pooling")
            pooling = _POOLING[mode]
            frame = frame._replace(after=frame.after + frame.end) if mode == "eos_token" else frame
        # the first token, which is before any instruction, is pooled with it
        include = pooling == "cls" or llm2vec.get("skip_instruction", True) is False if include is None else include
        if length is None and isinstance(given := llm2vec.get("max_length"), int) and given >= 4:
            length = given
    mode = pooling or known.pooling
    if mode not in POOLING_KEYS:
        raise InputError(f"{known.body} has the pooling {printable(mode)}, which is not supported: give --pooling")
    return Reading(
        bidirectional=None if attention == "auto" else attention == "bidirectional",
        before=frame.before if config.before is None else config.before,
        after=frame.after if config.after is None else config.after,
        pooling=mode,
        include_prompt=known.include_prompt if include is None else include,
        include_frame=config.llm2vec is None or include is not False,
        max_length=length or known.max_length,
        normalize=known.normalize,
        prompt=known.prompt,
        tokenizer=tokenizer_settings(known),
    )
