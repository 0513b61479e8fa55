"""Merge a base model and LoRA adapters into one teacher folder. Memory: see `msense.teacher.merging`."""

from pathlib import Path
from typing import Any, NamedTuple

from msense.config.merge import MergeConfig
from msense.errors import InputError
from msense.io.untrusted import printable
from msense.teacher.files import ADAPTER_CONFIG, locate, read_object
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
    named = read_object(adapters[0] / ADAPTER_CONFIG).get("base_model_name_or_path")
    name = config.teacher or named
    if not isinstance(name, str) or not name:
        raise InputError(f"adapter {adapters[0]} names no base model: give it with --teacher")
    try:
        base = locate(name, config.revision)
    except InputError as error:
        raise InputError(f"{error}; give the base model with --teacher") from error
    if output.resolve() in {base.resolve(), *(folder.resolve() for folder in adapters)}:
        raise InputError(f"{output} is the folder of the base or an adapter: give another --output")
    own = next((found for folder in reversed(adapters) if (found := read_object(folder / _LLM2VEC))), {})
    return merge_folders(base, adapters, output, reading(config, own)) | {"output": str(output)}


def reading(config: MergeConfig, llm2vec: dict[str, Any]) -> Reading:
    """Return how the merged teacher reads a text: as the flags say, else as LLM2Vec's config, else by default."""
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
    return Reading(
        bidirectional=None if attention == "auto" else attention == "bidirectional",
        before=frame.before if config.before is None else config.before,
        after=frame.after if config.after is None else config.after,
        pooling=pooling or "mean",
        include_prompt=True if include is None else include,
        include_frame=config.llm2vec is None or include is not False,
        max_length=length,
    )
