"""Settings of `msense make`, which composes a build and a distillation."""

from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from msense.config.base import HelpGroups, JobConfig, validate_config
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.errors import InputError

_SET_HERE = {"dictionary", "dry_run", "time_teacher"}
_OF_CORPUS = {"text_column", "id_column", "dedup"}  # which only the build reads


class MakeConfig(JobConfig):
    """Settings of `msense make`; further ones are passed on to the build and to the distillation, as each knows them.

    Example:
        >>> build, distill = MakeConfig(corpus=("texts/",), output="run", epochs=3).steps()
        >>> build.output, distill.dictionary, distill.epochs
        ('run/dictionary', 'run/dictionary', 3)
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    help_groups: ClassVar[HelpGroups] = {
        "Common options": ("corpus", "teacher", "student", "output", "workers", "local", "log_level"),
    }

    corpus: tuple[str, ...] = Field(
        min_length=1,
        description="texts: files, folders or globs of *.txt, *.jsonl, *.parquet or *.csv (local, s3://, gs://), or "
        "hf://dataset; see `msense build --help`",
    )
    teacher: str | None = Field(None, description=BuildConfig.model_fields["teacher"].description)
    student: str = Field("static", description=DistillConfig.model_fields["student"].description)
    output: str = Field("runs/mine", description="folder or URI of the runs dictionary/ and student/")

    def steps(self) -> tuple[BuildConfig, DistillConfig]:
        """Return the settings of the build and of the distillation.

        Raises:
            InputError: a setting is invalid, or known to neither.
        """
        given = self.model_dump(exclude_unset=True)
        known = (BuildConfig.model_fields.keys() | DistillConfig.model_fields.keys()) - _SET_HERE
        if unknown := [name for name in given if name not in known]:
            raise InputError(
                f"unknown setting {unknown[0]}: give settings of `msense build` and `msense distill`, such as `epochs: 3`, in "
                "a file with --config"
            )
        root = self.output.rstrip("/")
        places = {"dictionary": f"{root}/dictionary", "output": f"{root}/student", "student": self.student}
        build = {name: value for name, value in given.items() if name in BuildConfig.model_fields}
        own = DistillConfig.model_fields.keys() - _OF_CORPUS - {"corpus", "teacher"}
        distill: dict[str, Any] = {name: value for name, value in given.items() if name in own}
        return (
            validate_config(BuildConfig, {**build, "output": places["dictionary"]}),
            validate_config(DistillConfig, {**distill, **places}),
        )
