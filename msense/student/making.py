"""Initialize students from a teacher, another encoder or a dictionary's token means.

Memory: the student's weights in float32 and their gradients; of the teacher, only what the student has is read.
"""

from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from msense.dictionary import SenseDictionary, TeacherName
from msense.errors import InputError, StudentError
from msense.io.untrusted import format_errors
from msense.student.config import LONGEST, StudentConfig, StudentSettings, check_dictionary
from msense.student.static import confidence, token_means
from msense.student.student import Student
from msense.student.transformer import BodySource, TransformerBody, load_weights, read_source
from msense.teacher.body import load_stored, truncate_layers
from msense.teacher.pooling import POOLINGS, SentenceHead, load_head
from msense.teacher.spec import TeacherInfo, TeacherOptions, load_teacher_info


def init_student(
    settings: StudentSettings,
    dictionary: SenseDictionary,
    teacher: str,
    revision: str | None = None,
    seen: np.ndarray | None = None,
) -> Student:
    """Return an untrained student in float32 on the CPU, of a dictionary and its teacher (name or folder, revision).

    `seen`, integers [V], are the token counts of the training passages; default: those of the dictionary's corpus.

    Raises:
        StudentError: dictionary, teacher and student do not match, or a setting is invalid.
        InputError: the teacher cannot be loaded.
    """
    if not 0 <= settings.prior_count < float("inf"):
        raise StudentError(f"prior_count is {settings.prior_count}, but must be finite and not negative")
    own = dictionary.config
    options = TeacherOptions(revision=revision, prompt=own.prompt, attention=own.attention)
    info, tokenizer = load_teacher_info(teacher, options)
    head = load_head(teacher, info)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.kind in ("static", "table"):
            student = Student(_config(settings, info, head, dictionary, None)).float()
            table = _token_table(teacher, info)
        else:
            source = _load_transformer(settings.kind, info, teacher)
            student = Student(_config(settings, info, head, dictionary, source)).float()
    body = student.body
    if isinstance(body, TransformerBody):
        load_weights(body, source)
    else:
        counts = dictionary.token_counts if seen is None else seen
        with torch.no_grad():
            body.means.copy_(token_means(dictionary, table))
            body.confidence.copy_(confidence(dictionary, counts, settings.prior_count))
            if student.config.is_table:  # special tokens surround the training texts
                added = tokenizer.get_added_tokens_decoder()  # a frame may have ordinary words
                special = [i for i in {*info.prefix, *info.suffix} if i in added]
                body.means[special] = body.confidence[special] = 0.0
    # a table, whose config knows no prompt that is not pooled, is trained on passages that have one
    head.pooling, head.skip = student.config.pooling, info.skip if student.config.is_table else student.config.skip
    student.sentence_head = head
    return student


def _config(
    settings: StudentSettings,
    info: TeacherInfo,
    head: SentenceHead,
    dictionary: SenseDictionary,
    source: BodySource | None,
) -> StudentConfig:
    """Return the student's config; maximum length and prompt are those that the dictionary was built with."""
    length = dictionary.config.max_length or info.max_length
    names = ("pooling", "prompt", "include_prompt", "include_frame", "skip")
    own: dict[str, Any] = {name: getattr(info, name) for name in names}
    if settings.pooling == "mean" or (settings.pooling == "auto" and source is None and info.pooling in POOLINGS):
        own["pooling"] = "mean"  # without attention, the first or the last token knows nothing of the text
    if settings.kind == "table":  # a prompt that is not pooled has no influence
        body: dict[str, Any] = {}
        own = {"pooling": "mean", "prompt": info.prompt if info.pools_all else ""}
        length = LONGEST
    elif source is None:
        body = {"static": {"units": settings.units, "kernel_size": settings.kernel_size}}
    else:
        body = {"body": source.settings}
        length = min(length, source.max_positions or length)
    try:
        config = StudentConfig(
            kind=settings.kind,
            teacher=TeacherName(name=info.name, revision=info.revision, fingerprint=info.fingerprint),
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            dim=info.dim,
            vocab_size=info.vocab_size,
            normalize=info.normalize,
            max_length=length,
            projections=tuple(projection.config for projection in head.projections),
            truncate_dim=info.truncate_dim,
            truncation_side=info.truncation_side,
            heads="one" if settings.kind == "table" else settings.heads,
            **own,
            **body,
        )
    except ValidationError as error:
        raise StudentError(
            f"invalid student of teacher {info.name!r} ({format_errors(error)}): change the settings or the teacher"
        ) from error
    check_dictionary(config, dictionary.config)
    return config


def _token_table(teacher: str, info: TeacherInfo) -> Tensor:
    """Return the teacher's token embeddings [V, D_in] as stored."""
    table: Tensor = load_stored(teacher, info.revision, info.attention).get_input_embeddings().weight.detach()
    return table


def _load_transformer(kind: str, info: TeacherInfo, teacher: str) -> BodySource:
    """Load what the student's transformer is initialized from."""
    if kind.startswith("layers:"):
        model = load_stored(teacher, info.revision, info.attention)
        truncate_layers(model, kind)
        return read_source(model)
    try:
        own, _ = load_teacher_info(kind, TeacherOptions())
        source = read_source(load_stored(kind, None))
    except StudentError:
        raise
    except InputError as error:
        raise StudentError(f"cannot load student {kind!r}: {error}") from error
    if own.tokenizer_fingerprint != info.tokenizer_fingerprint:
        raise StudentError(
            f"student {kind!r} has another tokenizer ({own.tokenizer_fingerprint[:12]}, {own.vocab_size} tokens) than "
            f"teacher {info.name!r} ({info.tokenizer_fingerprint[:12]}, {info.vocab_size} tokens), which the senses "
            "belong to: give an encoder with the same tokenizer, layers:n or static"
        )
    return source
