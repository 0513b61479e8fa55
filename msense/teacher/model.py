"""The teacher: any Hugging Face encoder or decoder body, run with DeepSpeed inference.

Only safetensors weights are loaded, and remote code is never executed. Memory: the model and the hidden states of one
batch.
"""

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from msense.config import MAX_DIM, MAX_TOKEN_NUMBERS, MAX_VOCABULARY, BuildConfig
from msense.errors import BadInput
from msense.teacher_folder import (
    body_folder,
    check_files,
    check_vocabulary,
    loading,
    locate,
    read_settings,
    weights_fingerprint,
)
from msense.tokens import PassageSpec, fingerprint, special_frame

if TYPE_CHECKING:
    import torch


LONGEST_BY_DEFAULT = 512
TOKEN_BUDGET = {
    "cpu": 1024,
    "cuda": 16384,
}  # padded tokens per batch; constant, so that batches are the same everywhere
# model types whose position ids start after the padding token's id, as RoBERTa's do
_AFTER_PADDING = ("roberta", "mpnet", "camembert", "longformer", "xmod", "data2vec-text", "ibert", "luke", "esm")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # a tokenizer needs one of them


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

    def passage_spec(self, config: BuildConfig) -> PassageSpec:
        """Return how to cut this teacher's passages."""
        return PassageSpec(
            max_length=self.max_length,
            prefix=self.prefix,
            suffix=self.suffix,
            prompt=self.prompt_ids,
            excluded=self.excluded,
            stride=config.stride,
            seed=config.seed,
            dedup=config.dedup,
            text_column=config.text_column,
            sample=config.sample,
        )


def describe(name: str, config: BuildConfig) -> tuple[TeacherInfo, Tokenizer]:
    """Load a teacher's metadata and tokenizer, without its weights.

    Args:
        name: folder, hub name or the demo teacher.
        config: its layer, prompt, maximum length and special-token rule are checked against the model.

    Returns:
        The metadata, and the tokenizer without truncation and padding.

    Raises:
        BadInput: the folder, model config, tokenizer or a setting is invalid.
    """
    from transformers import AutoConfig

    folder = locate(name, config.revision)
    body, pooling, normalize, longest, prompt = read_settings(folder)
    check_files(name, body)
    with loading(repr(name)):
        text_config = AutoConfig.from_pretrained(body, trust_remote_code=False).get_text_config()
    layers, dim, vocab_size = _sizes(name, text_config)
    _check_settings(config, layers, dim)
    tokenizer = _load_tokenizer(name, body)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    if (tokens := backend.get_vocab_size(with_added_tokens=True)) > vocab_size:
        raise BadInput(
            f"teacher {name!r}: the tokenizer has {tokens} tokens, but the model only {vocab_size} embeddings: give a "
            "folder whose tokenizer and model belong together"
        )
    check_vocabulary(name, body, vocab_size)
    with loading(f"{name!r} (tokenizer)"):
        prefix, suffix = special_frame(backend)
    prompt = config.prompt if config.prompt is not None else prompt
    rule = config.special_tokens
    if rule == "auto":
        rule = "include" if pooling == "mean" else "exclude"
    info = TeacherInfo(
        name=name if not Path(name).is_dir() else folder.name,
        revision=folder.name if folder.parent.name == "snapshots" else config.revision,  # a commit, not a branch
        fingerprint=weights_fingerprint(body),
        tokenizer_fingerprint=fingerprint(backend),
        vocab_size=vocab_size,
        dim=dim,
        layer=config.layer,
        pooling=pooling,
        special_tokens=rule,
        normalize=normalize,
        prompt=prompt,
        max_length=_max_length(config.max_length, longest, (tokenizer.model_max_length, positions(text_config))),
        prefix=prefix,
        suffix=suffix,
        prompt_ids=tuple(backend.encode(prompt, add_special_tokens=False).ids) if prompt else (),
        excluded=excluded_tokens(tokenizer, rule, config.special_tokens == "auto"),
        decoder=_is_decoder(text_config.model_type),
    )
    info.passage_spec(config)  # raises for an invalid stride or prompt before anything is written
    return info, backend


def _check_settings(config: BuildConfig, layers: int, dim: int) -> None:
    """Raise for a layer or a number of senses that a teacher of this size does not support."""
    if not -layers - 1 <= config.layer <= layers:
        raise BadInput(f"layer {config.layer} does not exist: give --layer 0 (embeddings) to {layers}")
    if isinstance(config.senses, int) and config.senses * dim > MAX_TOKEN_NUMBERS:
        raise BadInput(
            f"{config.senses} senses of {dim} dimensions exceed {MAX_TOKEN_NUMBERS} numbers per token: give --senses "
            f"{MAX_TOKEN_NUMBERS // dim} or less"
        )


def _load_tokenizer(name: str, body: Path) -> Any:  # noqa: ANN401 - a transformers tokenizer
    """Load a teacher's tokenizer, which must provide character offsets."""
    from transformers import AutoTokenizer

    if not any(any(body.glob(pattern)) for pattern in _VOCABULARIES):
        raise BadInput(f"teacher {name!r} has no tokenizer: put its tokenizer.json beside config.json")
    with loading(f"{name!r} (tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(body, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"teacher {name!r} has no fast tokenizer (tokenizer.json), which msense needs for character offsets: convert "
            "it with transformers, or give another teacher"
        )
    return tokenizer


def _is_decoder(model_type: str) -> bool:
    """Return whether a model type is a causal language model only."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _sizes(name: str, config: Any) -> tuple[int, int, int]:  # noqa: ANN401 - a transformers config
    """Return a model's number of layers, embedding size and vocabulary size."""
    sizes: list[Any] = [getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
    layers, dim, vocab_size = sizes
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise BadInput(
            f"teacher {name!r}: config.json specifies {layers} layers, {dim} dimensions and {vocab_size} tokens: give a "
            "text model"
        )
    if dim > MAX_DIM or vocab_size > MAX_VOCABULARY:
        raise BadInput(
            f"teacher {name!r} has {dim} dimensions and {vocab_size} tokens; a dictionary supports at most {MAX_DIM} and "
            f"{MAX_VOCABULARY}: give a smaller teacher"
        )
    return layers, dim, vocab_size


def excluded_tokens(tokenizer: Any, rule: str, auto: bool) -> tuple[int, ...]:  # noqa: ANN401 - a transformers tokenizer
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


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the dtype that `auto` stands for: bfloat16 where the device supports it natively."""
    import torch

    if dtype != "auto":
        return dtype
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


class Teacher:
    """A loaded teacher; `embed` returns the hidden states of a padded batch.

    Example:
        >>> teacher = Teacher("all-MiniLM-L6-v2", revision=None, layer=-1, dtype="float32", device="cpu")
        >>> ids, mask = pad_batch([np.array([101, 2924, 102])])
        >>> teacher.embed(ids, mask).shape
        torch.Size([1, 3, 384])
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        layer: int,
        dtype: str,
        device: str,
        threads: int = 1,
        keep: str | None = None,
    ) -> None:
        """Load a teacher; `keep` truncates it, for example `layers:2` to its first two layers."""
        os.environ.setdefault("DS_ACCELERATOR", device)  # read once, when DeepSpeed is first imported in this process
        import torch

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        import deepspeed
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        body = body_folder(name, revision)
        model = load_body(body, name, getattr(torch, dtype))
        if keep is not None:
            from msense.student.transformer import keep_layers

            keep_layers(model, keep)
        self.layer = layer
        self.device = device
        if device == "cuda":
            model = model.to(device)
        self.takes_positions = takes_positions(model)
        self.engine = deepspeed.init_inference(model, dtype=getattr(torch, dtype), replace_with_kernel_inject=False)

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> "torch.Tensor":
        """Compute the hidden states of one batch.

        Args:
            ids: int [B, L], token ids; arbitrary where the mask is 0.
            mask: bool [B, L], padding on either side.

        Returns:
            [B, L, D] in the teacher's dtype, on its device; rows of padding are meaningless.
        """
        import torch

        last = self.layer in (-1, int(self.engine.module.config.get_text_config().num_hidden_layers))
        optional = {}
        if not mask[:, 0].all() and self.takes_positions:  # left padding must not shift the positions
            optional["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0)).to(self.device)
        with torch.inference_mode():
            output = self.engine(
                input_ids=torch.from_numpy(ids.astype(np.int64)).to(self.device),
                attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self.device),
                output_hidden_states=not last,
                **optional,
            )
        hidden: torch.Tensor = output.last_hidden_state if last else output.hidden_states[self.layer]
        return hidden


def takes_positions(model: Any) -> bool:  # noqa: ANN401 - a transformers model
    """Return whether a model needs explicit position ids for input that is padded on the left."""
    if any(kind in model.config.model_type for kind in _AFTER_PADDING):
        return False  # these derive positions from the padding token
    return "position_ids" in inspect.signature(model.forward).parameters


def token_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Group passages of similar length into padded batches of at most `budget` tokens (at least one passage).

    Args:
        lengths: int64 [P].
        budget: padded tokens per batch.

    Yields:
        int64 [B], indices into `lengths`, shortest passages first.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        candidates = order[start : start + budget]
        padded_tokens = lengths[candidates] * np.arange(1, len(candidates) + 1)
        stop = start + max(1, int(np.searchsorted(padded_tokens, budget, side="right")))
        yield order[start:stop]
        start = stop


def pad_batch(rows: list[np.ndarray], pad: int = 0, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """Return passages padded on the right (or left): token ids int32 [B, L] and mask bool [B, L]."""
    lengths = np.array([len(r) for r in rows])[:, None]
    columns = np.arange(lengths.max())
    mask = columns < lengths if side == "right" else columns >= lengths.max() - lengths
    ids = np.full(mask.shape, pad, dtype=np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def load_body(folder: Path, name: str, dtype: Any) -> Any:  # noqa: ANN401 - a transformers model
    """Load a teacher's model; of an encoder-decoder model, the encoder.

    Raises:
        BadInput: loading fails, or the checkpoint would leave parts of the model at random values.
    """
    from transformers import AutoModel

    with loading(repr(name)):
        model, report = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
        )
    mismatched = sorted(item for item in report["mismatched_keys"] if "pooler" not in item[0])
    if mismatched:
        key, actual, expected = mismatched[0]
        raise BadInput(
            f"teacher {name!r}: {len(mismatched)} tensors differ in shape from config.json, first {key} ({list(actual)} "
            f"instead of {list(expected)}): give a folder whose weights and config.json belong together"
        )
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        missing = [key for key in missing if not key.startswith("decoder.")]
        model = model.encoder
    if missing:
        raise BadInput(
            f"teacher {name!r}: the weights lack {len(missing)} tensors of the model, first {missing[0]}: give a folder "
            "whose weights and config.json belong together"
        )
    model.config.use_cache = False
    return model.eval()


def _max_length(requested: int | None, usual: int | None, limits: tuple[int | None, ...]) -> int:
    """Return the longest passage in tokens: the requested or the teacher's usual one, within its limits."""
    # Tokenizers represent "no limit" by a huge number.
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1 << 24]
    if requested and known and requested > min(known):
        raise BadInput(f"max_length {requested} exceeds the {min(known)} tokens that this teacher can read: lower it")
    return requested or min([*known, usual or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT])


def positions(config: Any) -> int | None:  # noqa: ANN401 - a transformers config
    """Return the maximum number of tokens that the position embeddings of a model support."""
    count = getattr(config, "max_position_embeddings", None)
    unused = (config.pad_token_id or 0) + 1 if any(kind in config.model_type for kind in _AFTER_PADDING) else 0
    return count - unused if isinstance(count, int) else None
