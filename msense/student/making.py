"""Students as they begin: weights copied from the teacher or another encoder, or token means.

Comes in: settings, a dictionary and the teacher's name. Goes out: a student in float32 on the CPU. Holds the teacher's
weights once beside it.
"""

from typing import Any, get_args

import numpy as np
import torch

from msense.config import BuildConfig
from msense.dictionary import SenseDictionary, TeacherName
from msense.errors import BadInput, StudentError
from msense.student.config import Pooling, StaticSizes, StudentConfig, StudentSettings
from msense.student.static import StaticBody, confidence, token_means
from msense.student.student import Student
from msense.student.transformer import TransformerBody, body_settings, keep_layers, load_weights
from msense.teacher import TeacherInfo, describe, load_body, positions
from msense.teacher_folder import body_folder


def make_student(
    settings: StudentSettings,
    dictionary: SenseDictionary,
    teacher: str,
    revision: str | None = None,
    seen: np.ndarray | None = None,
) -> Student:
    """Make a student that has not learnt anything yet.

    Args:
        settings: what it is to be.
        dictionary: the senses it is to speak in.
        teacher: the dictionary's teacher, by name or folder.
        revision: of the teacher.
        seen: integers [V], occurrences of each token in the training passages; default: those in the dictionary's corpus.

    Raises:
        StudentError: dictionary, teacher and student do not belong together, or a setting does not fit.
        BadInput: the teacher does not load.
    """
    info, _ = describe(teacher, BuildConfig(revision=revision))
    _check_teacher(info, dictionary)
    static = settings.kind == "static"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if not static:
            model = _transformer(settings.kind, info, teacher, revision)
            longest = positions(model.config.get_text_config())
            student = Student(_config(settings, info, dictionary, longest, body=body_settings(model)))
            assert isinstance(student.body, TransformerBody)
            load_weights(student.body, model)
            return student
        sizes = StaticSizes(units=settings.units, window=settings.window)
        student = Student(_config(settings, info, dictionary, None, static=sizes))
    assert isinstance(student.body, StaticBody)
    model = load_body(body_folder(teacher, revision), teacher, torch.float32)
    counts = dictionary.token_counts if seen is None else seen
    with torch.no_grad():
        student.body.means.copy_(token_means(dictionary, model.get_input_embeddings().weight))
        student.body.confidence.copy_(confidence(dictionary, counts, settings.stay))
    return student


def _config(
    settings: StudentSettings,
    info: TeacherInfo,
    dictionary: SenseDictionary,
    longest: int | None,
    **body: Any,  # noqa: ANN401 - one of two
) -> StudentConfig:
    """Describe a student; texts are as long, and begin as, those that the dictionary was made of."""
    length = dictionary.config.max_length or info.max_length
    return StudentConfig(
        kind=settings.kind,
        teacher=TeacherName(name=info.name, revision=info.revision, fingerprint=info.fingerprint),
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        dim=info.dim,
        vocab_size=info.vocab_size,
        pooling=info.pooling,
        normalize=info.normalize,
        max_length=min(length, longest or length),
        prompt=dictionary.config.prompt,
        heads=settings.heads,
        **body,
    )


def _check_teacher(info: TeacherInfo, dictionary: SenseDictionary) -> None:
    """Refuse a teacher that is not the dictionary's; a dictionary made in memory does not say much of its own."""
    config = dictionary.config
    facts = [
        ("tokenizer", config.tokenizer_fingerprint[:12], info.tokenizer_fingerprint[:12]),
        ("weights", config.teacher.fingerprint[:12], info.fingerprint[:12]),
        ("width", config.dim, info.dim),
        ("vocabulary size", config.vocab_size, info.vocab_size),
    ]
    for name, of_dictionary, of_teacher in facts:
        if of_dictionary != "" and of_dictionary != of_teacher:
            raise StudentError(
                f"teacher {info.name!r} is not the dictionary's: its {name} is {of_teacher}, not {of_dictionary}; give "
                f"{config.teacher.name!r} as it was when the dictionary was built"
            )
    if info.pooling not in get_args(Pooling):
        raise StudentError(
            f"teacher {info.name!r} pools by {info.pooling!r}, which no student does yet: give one that pools by mean, "
            "cls or lasttoken"
        )


def _transformer(kind: str, info: TeacherInfo, teacher: str, revision: str | None) -> Any:  # noqa: ANN401 - a model
    """Load the transformer that a student begins as."""
    if kind.startswith("layers:"):
        model = load_body(body_folder(teacher, revision), teacher, torch.float32)
        keep_layers(model, kind)
        return model
    try:
        own, _ = describe(kind, BuildConfig())
        model = load_body(body_folder(kind, None), kind, torch.float32)
    except BadInput as error:
        raise StudentError(f"student {kind!r} cannot be had: {error}") from error
    if own.tokenizer_fingerprint != info.tokenizer_fingerprint:
        raise StudentError(
            f"student {kind!r} has another tokenizer than teacher {info.name!r} ({own.tokenizer_fingerprint[:12]} of "
            f"{own.vocab_size} tokens, not {info.tokenizer_fingerprint[:12]} of {info.vocab_size}): senses are of tokens, so "
            "give an encoder of the same tokenizer, layers:n or static"
        )
    return model
