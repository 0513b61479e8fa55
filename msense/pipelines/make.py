"""Make a student from a text: build the dictionary, distill the student, and measure both.

Memory: of the build and the distillation; then the teacher, the student and `SPEED_TEXTS` texts.
"""

import os
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from msense.config.make import MakeConfig
from msense.constants import DEMO_TEACHER
from msense.dictionary import SenseDictionary
from msense.evaluation.cost import compare_speed
from msense.evaluation.spec import Spec
from msense.io.extras import require
from msense.pipelines.build import build_dictionary
from msense.pipelines.distill import distill_student
from msense.training.label_dataset import LabelSet

SPEED_TEXTS = 128


def make_student(config: MakeConfig) -> dict[str, Any]:
    """Build a dictionary, distill a student from it and measure it, or resume where an earlier run was interrupted.

    Returns `dictionary` and `student`, the run folders; `teacher`; `held_out`, metrics of the last epoch on held-out text; and
    `texts_per_second` of the teacher and the student.

    Raises:
        InputError: settings, text or teacher are invalid.
        MsenseError: a step failed; the same command resumes it.

    Example:
        >>> config = MakeConfig(corpus=("texts/",), student="static", output="runs/mine")
        >>> made = make_student(config)  # doctest: +SKIP
        >>> made["held_out"]["pooled_cosine"]  # doctest: +SKIP
    """
    require("train", "making a student")
    build, distill = config.steps()
    built = build_dictionary(build)
    distilled = distill_student(distill)
    teacher = build.teacher or DEMO_TEACHER
    texts = held_out_texts(distilled["labels"], built["dictionary"])
    specs = [
        Spec("teacher", "teacher", teacher=teacher, revision=build.revision, dtype=build.dtype),
        Spec("student", "student", distilled["student"]),
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "dictionary": build.output,
        "student": distill.output,
        "teacher": teacher,
        "held_out": distilled["stages"]["training"]["held_out"],
        "texts_per_second": compare_speed(specs, texts, device, os.cpu_count() or 1),
    }


def held_out_texts(labels: str, dictionary: str) -> list[str]:
    """Return the first held-out passages of labels, or of all if none is held out, at most `SPEED_TEXTS`."""
    own = LabelSet.open(labels)
    passages = own.held_out() if len(own.held_out()) else np.arange(len(own.lengths))
    passages = passages[own.kinds[passages] == 0][:SPEED_TEXTS]
    batch = own.read(passages)
    file = SenseDictionary.load(dictionary).tokenizer_file
    assert file is not None  # a build writes it
    rows = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    return Tokenizer.from_file(str(file)).decode_batch(rows)
