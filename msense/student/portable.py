"""Students as models of sentence-transformers: their modules, the files of their tensors, and a check that others read them."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from msense.errors import InputError
from msense.io.scratch import atomic_path
from msense.student.config import StudentConfig
from msense.student.layout import StudentFiles
from msense.student.student import Student
from msense.student.tokenizer import StudentTokenizer
from msense.student.transformer import TransformerBody, body_settings
from msense.teacher.body import NEEDS_EQUAL_LENGTHS, is_encoder_decoder, load_body
from msense.teacher.files import POOLING_KEYS
from msense.teacher.pooling import ProjectionConfig

_CLASSES = "sentence_transformers.models"  # their names in all versions of sentence-transformers
_EMBEDDING = "embedding.weight"  # of a StaticEmbedding
_ENCODERS = (
    "t5",
    "mt5",
    "umt5",
    "longt5",
    "switch_transformers",
)  # of which sentence-transformers runs the encoder only
_ROUNDING = {
    "float32": 1e-5,
    "float16": 0.01,
    "bfloat16": 0.1,
}  # in parts of the largest number, by dtype of the weights
UNUSED = ("pooler.", "contact_head.")  # tensors that transformers adds to a body


def tensor_files(student: Student, files: StudentFiles) -> dict[Path, dict[str, str]]:
    """Return the files of a student's tensors; for each, a tensor's name in `Student.weights` and its name in the file."""
    names = student.weights()
    if not files.portable:
        return {files.weights: {name: name for name in names}}
    linear = [files.dense(number) / "model.safetensors" for number in range(len(student.config.projections) + 1)]
    first = int(student.adaptor is not None)
    places: dict[Path, dict[str, str]] = {files.weights: {}}
    for name in names:
        kind, _, rest = name.partition(".")
        if kind == "body":
            if own := _body_name(student, rest):
                places[files.weights][name] = own
        elif kind == "adaptor":
            places.setdefault(linear[0], {})[name] = f"linear.{rest}"
        elif kind == "sentence_head":
            number, _, own = rest.removeprefix("projections.").partition(".")
            places.setdefault(linear[first + int(number)], {})[name] = own
        else:
            places.setdefault(files.head, {})[name] = rest
    return places


def _body_name(student: Student, name: str) -> str | None:
    """Return a body's tensor as transformers or StaticEmbedding names it; None for one that is not stored."""
    if not isinstance(student.body, TransformerBody):
        return _EMBEDDING if name == "means" else None
    name = name.removeprefix("model.")
    if student.body.model.config.model_type not in _ENCODERS:
        return name
    return "shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}"


def write_modules(files: StudentFiles, student: Student, config: StudentConfig, tokenizer: Tokenizer) -> None:
    """Write everything of a portable student but tensors, tokenizer.json, senses and card."""
    body, adaptor = student.body, student.adaptor
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")] if config.body is not None else [("StaticEmbedding", "")]
    linear = list(config.projections)
    if adaptor is not None:
        sizes = {"in_features": adaptor.in_features, "out_features": adaptor.out_features}
        linear.insert(0, ProjectionConfig(**sizes, activation="Identity"))
    texts: dict[Path, Any] = {}
    for number, layer in enumerate(linear):
        folder = files.dense(number)
        kinds.append(("Dense", folder.name))
        texts[folder / "config.json"] = _dense_settings(layer)
    if config.normalize:
        kinds.append(("Normalize", f"{len(kinds)}_Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_CLASSES}.{kind}"}
        for number, (kind, path) in enumerate(kinds)
    ]
    texts[files.modules], texts[files.settings] = modules, _settings(config)
    if isinstance(body, TransformerBody):
        pooling = {key: mode == config.pooling for mode, key in POOLING_KEYS.items()}
        width = {"word_embedding_dimension": body.width}
        texts[files.pooling] = {**width, **pooling, "include_prompt": config.include_prompt}
        texts[files.transformer] = {"max_seq_length": config.max_length, "do_lower_case": False}
        if "add_pooling_layer" in inspect.signature(type(body.model)).parameters:  # has no weights here
            texts[files.transformer]["model_args"] = {"add_pooling_layer": False}
        texts[files.tokenizer_config] = _tokenizer_settings(config, tokenizer, body)
        texts[files.body_config] = {**body_settings(body.model), "architectures": [type(body.model).__name__]}
    for path, content in texts.items():
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)


def write_json(path: Path, content: Any) -> None:
    """Write a file of settings."""
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def prompt_settings(config: StudentConfig) -> dict[str, Any]:
    """Return the settings of sentence-transformers for all texts: queries and documents have the same prompt."""
    prompts = dict.fromkeys(("default", "query", "document"), config.prompt) if config.prompt else {}
    default = "default" if prompts else None
    common = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    return {**common, "prompts": prompts, "default_prompt_name": default}


def _settings(config: StudentConfig) -> dict[str, Any]:
    settings = prompt_settings(config) | ({"truncate_dim": config.truncate_dim} if config.truncate_dim else {})
    if config.is_table:  # for model2vec
        settings |= {"normalize": config.normalize, "max_length": None}
    return settings


def _dense_settings(layer: ProjectionConfig) -> dict[str, Any]:
    module = nn.modules.linear if layer.activation == "Identity" else nn.modules.activation
    settings = layer.model_dump(include={"in_features", "out_features", "bias"})
    settings["activation_function"] = f"{module.__name__}.{layer.activation}"
    return settings | ({"use_residual": True} if layer.residual else {})


def _tokenizer_settings(config: StudentConfig, tokenizer: Tokenizer, body: TransformerBody) -> dict[str, Any]:
    """Return a tokenizer_config.json: padding on the right, and no token types, as the student reads texts."""
    special = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length,
        "padding_side": "right",
        "truncation_side": config.truncation_side,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(special.values()),  # those whose tokens end a prompt
    }
    # padding is masked, so that any special token will do; position ids may depend on the model's own
    pad = special.get(body.inputs.pad, next(iter(special.values()), None))
    return settings | ({"pad_token": pad} if pad is not None else {})


def find_obstacle(files: StudentFiles, student: Student, reader: StudentTokenizer, dtype: str) -> str | None:
    """Return why the body of a student, written in a dtype, gives other vectors to sentence-transformers; None if not.

    Texts of several lengths are compared, padded together as sentence-transformers does.
    """
    from transformers import AutoModel

    assert isinstance(student.body, TransformerBody)
    if not student.config.include_frame:
        return "sentence-transformers pools the tokens that the tokenizer puts before a text"
    config = student.body.model.config
    kind = config.model_type
    if kind in NEEDS_EQUAL_LENGTHS:
        return f"a {kind} model reads padding, which sentence-transformers adds to texts of a batch"
    with torch.device("meta"):
        whole = AutoModel.from_config(config, trust_remote_code=False)
    if is_encoder_decoder(whole) and kind not in _ENCODERS:
        return f"sentence-transformers would also run the decoder of a {kind} model"
    if not _has_plain_tokenizer(files):
        return f"sentence-transformers would load a {kind} model's processor of other input than text"
    try:
        with torch.random.fork_rng(devices=[]), _silent():
            model = load_body(files.folder, str(files.folder), torch.float32)
        return _compare(files, model, student, reader, _ROUNDING[dtype])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except InputError:  # names the folder, which is not to be published
        return f"transformers reads other parts of a {kind} model than the student has"
    except Exception as error:  # noqa: BLE001 - of transformers, by any model
        return f"transformers cannot read a {kind} model of these layers alone ({type(error).__name__})"


def _has_plain_tokenizer(files: StudentFiles) -> bool:
    """Whether transformers' processor of a student, which sentence-transformers loads, is its tokenizer."""
    from transformers import AutoProcessor, PreTrainedTokenizerBase

    try:
        return isinstance(AutoProcessor.from_pretrained(files.folder, trust_remote_code=False), PreTrainedTokenizerBase)
    except Exception:  # noqa: BLE001 - of transformers, by any model
        return False


@contextmanager
def _silent() -> Iterator[None]:
    """Hide that transformers initializes a pooler, and its progress bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def _compare(
    files: StudentFiles, model: nn.Module, student: Student, reader: StudentTokenizer, rounding: float
) -> str | None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)
    special = " ".join(token.content for token in reader.tokenizer.get_added_tokens_decoder().values())
    text = "A river bank, near the\nbank (of 1,234 dogs)... déjà-vu! "
    texts = ["a", text, f" {text}  {special[:1000]} a", text * 4, *([""] if len(reader.ids([""])[0]) else [])]
    rows = reader.ids(texts, student.config.prompt)
    inputs = tokenizer(
        [student.config.prompt + text for text in texts], padding=True, truncation=True, return_tensors="pt"
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if [row.tolist() for row in rows] != [own[real].tolist() for own, real in zip(ids, mask, strict=True)]:
        return "transformers reads its tokenizer.json otherwise"
    device = next(student.parameters()).device
    training, ids, mask = student.training, ids.to(device), mask.to(device)
    student.eval()
    given = {"attention_mask": mask.long()} if student.body.inputs.takes_mask else {}
    actual = model.to(device)(input_ids=ids, **given).last_hidden_state
    expected = student.body(ids, mask)
    student.train(training)
    difference = float((actual - expected)[mask].abs().max() / expected[mask].abs().max().clamp(min=1.0))
    if not difference <= rounding:
        return f"its vectors differ in a padded batch of sentence-transformers (by {difference:.2g})"
    return None
