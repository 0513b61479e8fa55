"""Flags and a YAML file in, a validated model of settings out: for every job, whatever its settings are.

Flags win over the file, the file over the defaults, and all errors are shown at once.
"""

import argparse
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from msense.config.base import ConfigT, validate_config
from msense.errors import InputError
from msense.text import plain, redact

_YAML_BYTES = 1 << 20
_YAML_ERRORS = (  # what PyYAML raises on values that are not of their tag's kind
    *(OSError, ValueError, RecursionError, yaml.YAMLError),
    *(AttributeError, LookupError, TypeError, ArithmeticError),
)


def parse_flags(model: type[ConfigT], description: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Make a config from the command line and the YAML file of `--config`.

    Args:
        model: the pydantic model; each field becomes a flag with the field's description as help.
        description: first lines of `--help`.
        argv: arguments, without the program's name; default: those of the process.

    Raises:
        InputError: a flag, key or value is wrong; the message lists every error.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="YAML file with any of the settings below; flags win over it"
    )
    for name, field in model.model_fields.items():
        told = _flag(field.annotation, None if field.is_required() else field.default, field.description)
        parser.add_argument("--" + name.replace("_", "-"), dest=name, default=argparse.SUPPRESS, **told)
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    return validate_config(model, {**({} if file is None else _read_yaml(file)), **given})


class _Parser(argparse.ArgumentParser):
    """A parser that quotes the command line without its control characters."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(plain(message), file)


def _flag(annotation: Any, default: object, description: str | None) -> dict[str, Any]:
    """Return argparse's keywords for a field; values stay text, pydantic converts them."""
    shown = " ".join(default) if isinstance(default, tuple) else default
    if isinstance(default, dict):
        shown = " ".join(f"{name}={value:g}" for name, value in default.items())
    text = (description or "").replace("%", "%%") + (f" (default: {shown})" if shown not in (None, "", False) else "")
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if get_origin(annotation) in (tuple, dict):
        return {
            "action": "extend",
            "nargs": "*",
            "help": text,
            "metavar": "X" if get_origin(annotation) is tuple else "NAME=VALUE",
        }
    options = (
        [a for a in get_args(annotation) if a is not type(None)]
        if get_origin(annotation) in (Union, types.UnionType)
        else [annotation]
    )
    shapes = [get_args(a) if get_origin(a) is Literal else [{int: "N", float: "F"}.get(a, "X")] for a in options]
    return {"help": text, "metavar": "|".join(str(name) for shape in shapes for name in shape)}


def _text_of(path: Path) -> str:
    """Read a file of settings: opening a pipe would wait for ever, and no such file is large."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no plain file")
    if (size := path.stat().st_size) > _YAML_BYTES:
        raise ValueError(f"it has {size} bytes, at most {_YAML_BYTES} are read")
    return path.read_text(encoding="utf-8")


def _read_yaml(file: str) -> dict[str, Any]:
    """Read a YAML mapping; keys may be written with - or _."""
    try:
        values = yaml.safe_load(_text_of(Path(file)))
    except _YAML_ERRORS as error:
        raise InputError(
            f"cannot read the config file {file!r}: {redact(str(error))}\nIt must be UTF-8 text of `setting: value` lines."
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"the config file {file!r} must hold `setting: value` lines, found a {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}
