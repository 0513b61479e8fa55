"""Settings of `msense make`, which composes a build and a distillation."""

from typing import Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

from msense.config.base import HelpGroups, JobConfig, error_line, validate_config
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.errors import InputError

_SET_HERE = {"dictionary", "dry_run", "time_teacher"}  # settings of the steps that have no meaning here
# of a text that the build has read; the columns also of queries
_OF_CORPUS = {"text_column", "id_column", "prompt_column", "dedup"}


def _help_groups() -> HelpGroups:
    """Return the common settings, then all others that `msense build` and `msense distill` have."""
    common = ("corpus", "teacher", "student", "epochs", "output", "workers", "local", "log_level")
    groups: HelpGroups = {"Common options": common}
    shown = {*common, *_SET_HERE}
    for title, model in (("Options of msense build", BuildConfig), ("Options of msense distill", DistillConfig)):
        groups[title] = tuple(name for own in model.help_groups.values() for name in own if name not in shown)
        shown |= {*groups[title]}
    return groups


class MakeConfig(JobConfig):
    """Settings of `msense make`; those of `msense build` and `msense distill` are passed on to them.

    Example:
        >>> build, distill = MakeConfig(corpus=("texts/",), output="run", epochs=3).steps()
        >>> build.output, distill.dictionary, distill.epochs
        ('run/dictionary', 'run/dictionary', 3)
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    help_groups: ClassVar[HelpGroups] = _help_groups()

    corpus: tuple[str, ...] = Field(
        min_length=1,
        description="texts: files, folders or globs of *.txt, *.jsonl, *.parquet or *.csv (local, s3://, gs://), or "
        "hf://dataset; see `msense build --help`",
    )
    teacher: str | None = Field(None, description=BuildConfig.model_fields["teacher"].description)
    student: str = Field("static", description=DistillConfig.model_fields["student"].description)
    output: str = Field("runs/mine", description="folder or URI of the runs dictionary/ and student/")

    @classmethod
    def flag_fields(cls) -> dict[str, FieldInfo]:
        """Return the settings that have flags: its own, and those of the build and the distillation."""
        steps = {**DistillConfig.model_fields, **BuildConfig.model_fields, **cls.model_fields}
        return {name: field for name, field in steps.items() if name not in _SET_HERE}

    def steps(self) -> tuple[BuildConfig, DistillConfig]:
        """Return the settings of the build and of the distillation.

        Raises:
            InputError: a setting is invalid, or known to neither.
        """
        given = self.model_dump(exclude_unset=True)
        known = self.flag_fields()
        lines = [
            f"{name}: not a setting of `msense make`; use it with `msense build` and `msense distill`"
            if name in _SET_HERE
            else error_line({"loc": (name,), "type": "extra_forbidden", "msg": ""}, known)
            for name in given
            if name not in known
        ]
        if lines:
            raise InputError("invalid settings (--help describes all settings):\n" + "\n".join(f"  {x}" for x in lines))
        root = self.output.rstrip("/")
        places = {"dictionary": f"{root}/dictionary", "output": f"{root}/student", "student": self.student}
        build = {name: value for name, value in given.items() if name in BuildConfig.model_fields}
        unread = {"dedup"} if "queries" in given else _OF_CORPUS
        own = DistillConfig.model_fields.keys() - unread - {"corpus", "teacher"}
        distill: dict[str, Any] = {name: value for name, value in given.items() if name in own}
        return (
            validate_config(BuildConfig, {**build, "output": places["dictionary"]}),
            validate_config(DistillConfig, {**distill, **places}),
        )
