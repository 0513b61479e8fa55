"""Tables of the commands' flags, from their settings, for jobs/README.md."""

from pathlib import Path

from pages import write_between
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.config.finetune import FinetuneConfig
from msense.config.make import MakeConfig
from msense.config.merge import MergeConfig
from msense.evaluation.config import EvaluateConfig

CONFIGS: dict[str, type[BaseModel]] = {
    "build": BuildConfig,
    "distill": DistillConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "make": MakeConfig,
    "merge-teacher": MergeConfig,
}


def table(config: type[BaseModel]) -> str:
    """Return the flags of a command as a Markdown table, in alphabetical order."""
    rows = [
        f"| `{flag_of(name)}` | {_default(field)} | {_cell(field)} |" for name, field in config.model_fields.items()
    ]
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *sorted(rows)])


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def write(page: Path) -> bool:
    """Write the tables of all commands into a page; return whether that changed it."""
    changed = [name for name, config in CONFIGS.items() if write_between(page, name, table(config))]
    return bool(changed)


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is None or (isinstance(value, tuple | dict | str) and not value):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    words = [f"{k}={v:g}" for k, v in value.items()] if isinstance(value, dict) else value
    text = " ".join(words) if isinstance(words, list | tuple) else f"{words:g}" if isinstance(words, float) else words
    return f"`{text}`"


def _cell(field: FieldInfo) -> str:
    """Return a description that is one cell, whose signs are no markup outside of code."""
    parts = (field.description or "").replace("|", "\\|").split("`")
    parts[::2] = ["".join(f"\\{sign}" if sign in "*<>[]" else sign for sign in part) for part in parts[::2]]
    return "`".join(parts)
