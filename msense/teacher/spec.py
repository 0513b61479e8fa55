"""Metadata of a teacher, read without loading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, normalizers

from msense.constants import MAX_DIM, MAX_VOCABULARY
from msense.errors import InputError
from msense.io.untrusted import printable
from msense.teacher.files import (
    ATTENTION_KEYS,
    TeacherFolder,
    check_files,
    check_vocabulary,
    loading,
    locate,
    read_object,
    read_settings,
)
from msense.teacher.fingerprint import weights_fingerprint
from msense.tokenizer import fingerprint, skipped_tokens, special_tokens_around

TruncationSide = Literal["right", "left"]
Attention = Literal["auto", "causal", "bidirectional"]
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
    "lilt",
    "layoutlmv3",
    "markuplm",
)
# model types that give no vector of each token of a text alone, beside those that `Teacher` finds when it is loaded
_UNSUPPORTED = {"bros": "needs the place of every token on a page", "reformer": "gives two states of each token"}


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
    attention: Attention = Field(
        "auto",
        description="a decoder's attention: each token sees those before it (causal) or all (bidirectional, as LLM2Vec's); "
        "auto: as config.json says",
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
    skip: int = 0  # tokens at the start of a passage that the sentence vector is not pooled from; see `skipped_tokens`
    include_prompt: bool = True  # whether a prompt's tokens are pooled
    projections: tuple[str, ...] = ()  # fingerprints of the Dense modules after pooling
    truncate_dim: int | None = None  # of the sentence vector
    truncation_side: TruncationSide = "right"  # where a text that is too long loses tokens
    attention: Attention = "auto"  # as in `TeacherOptions`
    include_frame: bool = True  # whether the tokens that the tokenizer puts before a text are pooled

    @property
    def pools_all(self) -> bool:
        """Whether sentence vectors are pooled from all tokens, whatever the prompt."""
        return self.include_prompt and self.include_frame


def load_teacher_info(name: str, options: TeacherOptions) -> tuple[TeacherInfo, Tokenizer]:
    """Load a teacher's metadata, and its tokenizer without truncation and padding, but not its weights.

    Raises:
        InputError: the folder, model config, tokenizer or an option is invalid.
    """
    from transformers import AutoConfig

    folder = locate(name, options.revision)
    own = read_settings(folder)
    body, pooling = own.body, own.pooling
    check_files(name, body)
    with loading(repr(name)):
        text_config = AutoConfig.from_pretrained(body, trust_remote_code=False).get_text_config()
    decoder = is_decoder(text_config.model_type)
    if not decoder and options.attention == "causal":
        raise InputError(
            f"teacher {name!r} is no decoder: a {text_config.model_type} model sees the tokens after each token by design; "
            "omit --attention"
        )
    if decoder and options.attention == "auto":
        check_attention(name, read_object(body / "config.json"))
    layers, dim, vocab_size = _sizes(name, text_config)
    if not -layers - 1 <= options.layer <= layers:
        raise InputError(f"layer {options.layer} does not exist: give --layer 0 (embeddings) to {layers}")
    tokenizer = _load_tokenizer(name, own)
    backend = _backend(name, own, tokenizer, vocab_size)
    check_vocabulary(name, body, vocab_size)
    with loading(f"{name!r} (tokenizer)"):
        prefix, suffix = special_tokens_around(backend)
    prompt = options.prompt if options.prompt is not None else own.prompt
    is_auto = options.special_tokens == "auto"
    rule = ("include" if pooling == "mean" else "exclude") if is_auto else options.special_tokens
    limits = max(tokenizer.model_max_length, own.max_length or 0), max_positions(text_config)
    max_length = _max_length(options.max_length, own.max_length, limits)
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
        normalize=own.normalize,
        prompt=prompt,
        max_length=max_length,
        prefix=prefix,
        suffix=suffix,
        prompt_ids=tuple(backend.encode(prompt, add_special_tokens=False).ids) if prompt else (),
        excluded=excluded_tokens(tokenizer, rule, is_auto),
        decoder=decoder,
        skip=skipped_tokens(
            backend, prompt, max_length, include_prompt=own.include_prompt, include_frame=own.include_frame
        ),
        include_prompt=own.include_prompt,
        include_frame=own.include_frame,
        projections=tuple(map(weights_fingerprint, own.projections)),
        truncate_dim=own.truncate_dim,
        truncation_side="left" if tokenizer.truncation_side == "left" else "right",
        attention=options.attention,
    )
    return info, backend


def _load_tokenizer(name: str, own: TeacherFolder) -> Any:
    """Load a teacher's tokenizer, which must provide character offsets."""
    from transformers import AutoTokenizer

    if not any(any(own.body.glob(pattern)) for pattern in _VOCABULARIES):
        raise InputError(f"teacher {name!r} has no tokenizer: put its tokenizer.json beside config.json")
    with loading(f"{name!r} (tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(own.body, trust_remote_code=False, **own.tokenizer_options)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"teacher {name!r} has no fast tokenizer (tokenizer.json), which msense needs for character offsets: convert "
            "it with transformers, or give another teacher"
        )
    return tokenizer


def _backend(name: str, own: TeacherFolder, tokenizer: Any, vocab_size: int) -> Tokenizer:
    """Return the bare tokenizer, whose tokens must all have an embedding."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    if own.lower_case:
        _add_lower_case(backend)
    token, number = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if number >= vocab_size:
        raise InputError(
            f"teacher {name!r}: the tokenizer has token {number} ({printable(token)!r}), but the model only {vocab_size} "
            "embeddings: give a folder whose tokenizer and model belong together"
        )
    return backend


def _add_lower_case(tokenizer: Tokenizer) -> None:
    """Lower-case texts before anything else, as sentence-transformers does for `do_lower_case`."""
    given = tokenizer.normalizer
    parts = list(given) if isinstance(given, normalizers.Sequence) else [given] if given else []  # type: ignore[call-overload]
    bert = any(isinstance(part, normalizers.BertNormalizer) and part.lowercase for part in parts)
    if not bert and not any(isinstance(part, normalizers.Lowercase) for part in parts):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([given] if given else [])])


def check_attention(name: str, config: dict[str, Any]) -> None:
    """Raise InputError for a decoder whose own code, which is never run, may have another attention."""
    inner = config.get("text_config")
    settings = (config, inner if isinstance(inner, dict) else {})
    if config.get("auto_map") and all(part.get(key) is None for part in settings for key in ATTENTION_KEYS):
        raise InputError(
            f"teacher {name!r}: config.json names code of its own (auto_map), which is never run and may change the "
            "attention of this decoder: give --attention causal (each token sees those before it) or bidirectional (it sees "
            'all), as that code does, or add "is_causal": true or false to config.json'
        )


def is_decoder(model_type: str) -> bool:
    """Return whether a model type is a causal language model only."""
    from transformers.models.auto import modeling_auto as auto

    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()


def _sizes(name: str, config: Any) -> tuple[int, int, int]:
    """Return a model's number of layers, embedding size and vocabulary size."""
    sizes: list[Any] = [getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
    layers, dim, vocab_size = sizes
    if config.model_type in _UNSUPPORTED:
        reason = _UNSUPPORTED[config.model_type]
        raise InputError(f"teacher {name!r} is a {config.model_type} model, which {reason}: give another teacher")
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
    """Return the maximum number of tokens that a model reads: position embeddings, or where BigBird's attention turns sparse."""
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")
    count = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    if not isinstance(count, int) or count <= 0:  # XLNet's is -1
        return None
    if getattr(config, "attention_type", None) == "block_sparse":  # BigBird's, of longer texts
        count = min(count, (5 + 2 * config.num_random_blocks) * config.block_size)
    if not any(kind in config.model_type for kind in POSITIONS_AFTER_PADDING):
        return count
    return count - 1 - (1 if config.model_type == "mpnet" else config.pad_token_id or 0)  # MPNet's is always 1
