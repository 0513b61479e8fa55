"""Metadata of a teacher, read without loading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from msense.constants import MAX_DIM, MAX_VOCABULARY
from msense.errors import InputError
from msense.teacher.files import check_files, check_vocabulary, loading, locate, read_settings, weights_fingerprint
from msense.tokenizer import fingerprint, special_tokens_around

LONGEST_BY_DEFAULT = 512
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # a tokenizer needs one of them
# model types whose position ids start after the padding token's id, as RoBERTa's do
POSITIONS_AFTER_PADDING = (
    "roberta",
    "mpnet",
    "camembert",
    "longformer",
    "xmod",
    "data2vec-text",
    "ibert",
    "luke",
    "esm",
)


class TeacherOptions(BaseModel):
    """How a teacher is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    revision: str | None = Field(None, description="branch, tag or commit of the teacher on the hub")
    layer: int = Field(-1, description="hidden layer to read: 0 the embeddings, n the n-th layer, -1 the last")
    max_length: int | None = Field(
        None,
        ge=4,
        description="longest passage in tokens, special tokens included; default: the teacher's own, at most 512",
    )
    prompt: str | None = Field(
        None, description="text before every passage; default: the teacher's default prompt, if it has one"
    )
    special_tokens: Literal["auto", "include", "exclude"] = Field(
        "auto", description="whether [CLS], [SEP] and the like have senses; auto: as the teacher's pooling uses them"
    )


@dataclass(frozen=True)
class TeacherInfo:
    """The teacher's properties that stages need without its weights; recorded in the manifest."""

    name: str
    revision: str | None
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    dim: int
    layer: int
    pooling: str
    special_tokens: str  # include or exclude; `auto` is resolved
    normalize: bool
    prompt: str
    max_length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    excluded: tuple[int, ...]
    decoder: bool = False  # a causal language model


def load_teacher_info(name: str, options: TeacherOptions) -> tuple[TeacherInfo, Tokenizer]:
    """Load a teacher's metadata, and its tokenizer without truncation and padding, but not its weights.

    Raises:
        InputError: the folder, model config, tokenizer or an option is invalid.
    """
    from transformers import AutoConfig

    folder = locate(name, options.revision)
    body, pooling, normalize, longest, prompt = read_settings(folder)
    check_files(name, body)
    with loading(repr(name)):
        text_config = AutoConfig.from_pretrained(body, trust_remote_code=False).get_text_config()
    layers, dim, vocab_size = _sizes(name, text_config)
    if not -layers - 1 <= options.layer <= layers:
        raise InputError(f"layer {options.layer} does not exist: give --layer 0 (embeddings) to {layers}")
    tokenizer = _load_tokenizer(name, body)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    if (tokens := backend.get_vocab_size(with_added_tokens=True)) > vocab_size:
        raise InputError(
            f"teacher {name!r}: the tokenizer has {tokens} tokens, but the model only {vocab_size} embeddings: give a "
            "folder whose tokenizer and model belong together"
        )
    check_vocabulary(name, body, vocab_size)
    with loading(f"{name!r} (tokenizer)"):
        prefix, suffix = special_tokens_around(backend)
    prompt = options.prompt if options.prompt is not None else prompt
    is_auto = options.special_tokens == "auto"
    rule = ("include" if pooling == "mean" else "exclude") if is_auto else options.special_tokens
    info = TeacherInfo(
        name=name if not Path(name).is_dir() else folder.name,
        revision=folder.name if folder.parent.name == "snapshots" else options.revision,  # a commit, not a branch
        fingerprint=weights_fingerprint(body),
        tokenizer_fingerprint=fingerprint(backend),
        vocab_size=vocab_size,
        dim=dim,
        layer=options.layer,
        pooling=pooling,
        special_tokens=rule,
        normalize=normalize,
        prompt=prompt,
        max_length=_max_length(options.max_length, longest, (tokenizer.model_max_length, max_positions(text_config))),
        prefix=prefix,
        suffix=suffix,
        prompt_ids=tuple(backend.encode(prompt, add_special_tokens=False).ids) if prompt else (),
        excluded=excluded_tokens(tokenizer, rule, is_auto),
        decoder=_is_decoder(text_config.model_type),
    )
    return info, backend


def _load_tokenizer(name: str, body: Path) -> Any:
    """Load a teacher's tokenizer, which must provide character offsets."""
    from transformers import AutoTokenizer

    if not any(any(body.glob(pattern)) for pattern in _VOCABULARIES):
        raise InputError(f"teacher {name!r} has no tokenizer: put its tokenizer.json beside config.json")
    with loading(f"{name!r} (tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(body, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"teacher {name!r} has no fast tokenizer (tokenizer.json), which msense needs for character offsets: convert "
            "it with transformers, or give another teacher"
        )
    return tokenizer


def _is_decoder(model_type: str) -> bool:
    """Return whether a model type is a causal language model only."""
    from transformers.models.auto import modeling_auto as auto

    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()


def _sizes(name: str, config: Any) -> tuple[int, int, int]:
    """Return a model's number of layers, embedding size and vocabulary size."""
    sizes: list[Any] = [getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
    layers, dim, vocab_size = sizes
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(
            f"teacher {name!r}: config.json specifies {layers} layers, {dim} dimensions and {vocab_size} tokens: give a "
            "text model"
        )
    if dim > MAX_DIM or vocab_size > MAX_VOCABULARY:
        raise InputError(
            f"teacher {name!r} has {dim} dimensions and {vocab_size} tokens; a dictionary supports at most {MAX_DIM} and "
            f"{MAX_VOCABULARY}: give a smaller teacher"
        )
    return layers, dim, vocab_size


def excluded_tokens(tokenizer: Any, rule: str, auto: bool) -> tuple[int, ...]:
    """Return the ids of tokens that are never sampled, labelled or replaced, in increasing order.

    Args:
        tokenizer: the teacher's.
        rule: "include" excludes the padding token only, "exclude" every special token except the unknown token.
        auto: also exclude a decoder's BOS (a BOS that is not the CLS token), which is an attention sink.
    """
    excluded = {tokenizer.pad_token_id}
    if tokenizer.pad_token_id in (tokenizer.eos_token_id, tokenizer.unk_token_id):
        excluded = set()  # the id has a second meaning; padding is identified by the mask
    if rule == "exclude":
        excluded |= set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    elif auto and tokenizer.bos_token_id not in (None, tokenizer.cls_token_id):
        excluded.add(tokenizer.bos_token_id)
    return tuple(sorted(int(i) for i in excluded if i is not None))


def _max_length(requested: int | None, usual: int | None, limits: tuple[int | None, ...]) -> int:
    """Return the longest passage in tokens: the requested or the teacher's usual one, within its limits."""
    # Tokenizers represent "no limit" by a huge number.
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1 << 24]
    if requested and known and requested > min(known):
        raise InputError(f"max_length {requested} exceeds the {min(known)} tokens that this teacher can read: lower it")
    return requested or min([*known, usual or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT])


def max_positions(config: Any) -> int | None:
    """Return the maximum number of tokens that the position embeddings of a model support."""
    count = getattr(config, "max_position_embeddings", None)
    unused = (config.pad_token_id or 0) + 1 if any(kind in config.model_type for kind in POSITIONS_AFTER_PADDING) else 0
    return count - unused if isinstance(count, int) else None
