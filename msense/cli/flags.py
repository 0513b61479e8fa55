"""Settings from flags and the YAML file of `--config`: flags override the file, and the file overrides the defaults.

cyclopts splits the command line and prints the help. It passes values on as text, so that pydantic converts them and reports
all unknown flags and invalid values at once.
"""

import inspect
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from cyclopts import App, CycloptsError, Group, Parameter, Token
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from msense.cli.console import console
from msense.config.base import JobConfig, validate_config
from msense.errors import InputError
from msense.text import redact

JobT = TypeVar("JobT", bound=JobConfig)
COMMON = (  # flags that the help lists first
    *("config", "dictionary", "model", "task", "corpus", "teacher", "student", "senses", "objective", "epochs", "lr"),
    *("output", "workers", "local", "dry_run"),
)
_COMMON_GROUP, _EXPERT_GROUP = Group.create_ordered("Common options"), Group.create_ordered("Expert options")
_CONFIG = FieldInfo(annotation=Path, default=None, description="YAML file of settings, which flags override")
_MAX_YAML_BYTES = 1 << 20
# PyYAML raises most of these for values that do not match their tag
_YAML_ERRORS = (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError, ArithmeticError)


def parse_flags(model: type[JobT], description: str | None, argv: Sequence[str] | None = None) -> JobT:
    """Return the settings of the command line and of the YAML file of `--config`, and apply the log level.

    Each field of `model` becomes a flag. `--help` prints `description` and the flags, and ends the process.

    Raises:
        InputError: flags, keys or values are invalid; the message lists every error.

    Example:
        >>> parse_flags(BuildConfig, "Build.", ["--corpus", "a.txt", "b.txt", "--no-dedup"]).corpus
        ('a.txt', 'b.txt')
    """
    fields = {"config": _CONFIG, **model.model_fields}
    given = _split_arguments(fields, description, sys.argv[1:] if argv is None else argv)
    values = _read_yaml(given.pop("config")) if "config" in given else {}
    config = validate_config(model, values | given)
    logging.getLogger("msense").setLevel(config.log_level.upper())
    return config


def _split_arguments(fields: dict[str, FieldInfo], description: str | None, argv: Sequence[str]) -> dict[str, Any]:
    """Return the text of every given flag by its field, and unknown arguments as quoted names, which are no settings."""

    def job(**_: Any) -> None:
        """Stand for the job in the parser."""

    places = {name: COMMON.index(name) if name in COMMON else len(COMMON) for name in fields}
    keyword, names = inspect.Parameter.KEYWORD_ONLY, sorted(fields, key=places.__getitem__)
    flags = [inspect.Parameter(n, keyword, default=None, annotation=_flag(n, fields[n])) for n in names]
    job.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    app = App(help=description or "", help_format="plaintext", version_flags=(), group_commands=_COMMON_GROUP)
    app.default(job)
    try:
        command, bound, unknown, _ = app.parse_known_args(argv, console=console())
    except CycloptsError as error:  # such as --dedup=maybe
        error.verbose = False
        raise InputError(f"{error} (--help describes all flags)") from error
    if command is not job:  # the command that prints the help
        command(*bound.args, **bound.kwargs)
        raise SystemExit(0)
    given: dict[str, Any] = dict.fromkeys(repr(token.partition("=")[0]) for token in unknown)
    for name, value in bound.arguments.items():
        single = isinstance(value, list) and len(value) == 1 and not _is_list(fields[name])
        given[name] = value[0] if single else value
    return given


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (tuple, dict)


def _flag(name: str, field: FieldInfo) -> Any:
    """Return the annotation of a flag: its type on the command line, and its help."""
    default = field.default
    if isinstance(default, dict):
        default = [f"{key}={value:g}" for key, value in default.items()]
    elif isinstance(default, float):
        default = f"{default:g}"
    text = " ".join(default) if isinstance(default, list | tuple) else str("" if default is None else default)
    shared: dict[str, Any] = {
        "help": ("(required) " if field.is_required() else "") + (field.description or ""),
        "group": _COMMON_GROUP if name in COMMON else _EXPERT_GROUP,
        "show_default": False if field.is_required() or default is False or not text else lambda _: text,
    }
    if field.annotation is bool:
        return Annotated[bool | None, Parameter(**shared, allow_repeating=True)]
    options: dict[str, Any] = {} if _is_list(field) else {"converter": _last_values}
    options |= {"metavar": _metavar(field.annotation), "consume_multiple": True, "negative": ()}
    return Annotated[list[str] | None, Parameter(**shared, **options)]


def _last_values(_: Any, tokens: Sequence[Token]) -> list[str]:
    """Return the values of a flag's last occurrence, of which validation accepts exactly one."""
    start = max(number for number, token in enumerate(tokens) if token.index == 0)
    return [token.value for token in tokens[start:]]


def _metavar(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(parts)
    if origin in (Union, UnionType):
        return "|".join(_metavar(part) for part in parts if part is not NoneType)
    if origin is dict:
        return "NAME=VALUE ..."
    if origin is tuple:
        return f"{_metavar(parts[0])} ..."
    return {int: "N", float: "F", ByteSize: "BYTES", Path: "FILE"}.get(annotation, "TEXT")


def _read_yaml(file: str) -> dict[str, Any]:
    """Read a YAML mapping; keys may be written with - or _."""
    try:
        path = Path(file)
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ValueError("not a regular file")
        if (size := path.stat().st_size) > _MAX_YAML_BYTES:
            raise ValueError(f"{size} bytes, but the maximum is {_MAX_YAML_BYTES}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict | None):
            raise ValueError(f"a {type(values).__name__} instead of settings")
    except (*_YAML_ERRORS, yaml.YAMLError) as error:
        message = f"cannot read the config file {file!r}: {redact(str(error))}"
        raise InputError(f"{message}\nIt must be UTF-8 text with lines `setting: value`.") from error
    return {str(key).replace("-", "_"): value for key, value in (values or {}).items()}
