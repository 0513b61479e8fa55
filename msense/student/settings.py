"""Prompts and similarity of a student, in the file of sentence-transformers (config_sentence_transformers.json)."""

import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from msense.io.untrusted import printable
from msense.student.config import StudentConfig
from msense.student.files import STUDENT, checked_path
from msense.student.layout import StudentFiles
from msense.student.vectors import Similarity

_Name = Annotated[str, Field(max_length=4096)]
_Prompt = Annotated[str, Field(max_length=1 << 16)]


class EncoderSettings(BaseModel):
    """What sentence-transformers stores of all texts of a model; its other settings are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompts: dict[_Name, _Prompt | None] = Field(default_factory=dict, max_length=100)
    default_prompt_name: _Name | None = None
    similarity_fn_name: Similarity | None = "cosine"


def read_settings(files: StudentFiles, config: StudentConfig) -> EncoderSettings:
    """Return the settings of a student's folder; without a file, its only prompt is that of its config."""
    if not os.path.lexists(files.settings):
        return EncoderSettings(prompts={"default": config.prompt}, default_prompt_name="default")
    path = checked_path(files, files.settings)
    settings = STUDENT.valid(path, EncoderSettings, STUDENT.read_json(path))
    if settings.default_prompt_name is not None and settings.default_prompt_name not in settings.prompts:
        name = printable(settings.default_prompt_name)
        STUDENT.refuse(f"{path} has no prompt {name!r}, its default_prompt_name: correct the name")
    return settings
