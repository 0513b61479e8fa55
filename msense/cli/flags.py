"""Jobs as commands: settings from flags and YAML files; flags override files, and files override the defaults.

cyclopts splits the command line and prints the help. It passes values on as text, so that pydantic converts them and reports
all unknown flags and invalid values at once.
"""

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import yaml
from cyclopts import App, CycloptsError, Group, Parameter, Token
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from msense.cli.console import console
from msense.config.base import CommandConfig, validate_config
from msense.errors import InputError
from msense.text import redact

JobT = TypeVar("JobT", bound=CommandConfig)
CONFIGS = files("msense") / "configs"
_OF_ALL = {  # flags that are no settings
    "config": FieldInfo(
        annotation=tuple[Path, ...],
        default=(),
        description="YAML files of settings, or names of configurations that come with msense (see --help of msense); later "
        "ones override earlier ones, and flags override all",
    ),
    "json": FieldInfo(annotation=bool, default=False, description="print the result as one JSON object"),
}
_MAX_YAML_BYTES = 1 << 20
# PyYAML raises most of these for values that do not match their tag
_YAML_ERRORS = (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError, ArithmeticError)


@dataclass(frozen=True)
class Job(Generic[JobT]):
    """A command whose flags are the fields of a model of settings."""

    model: type[JobT]
    run: Callable[[JobT], Any]
    show: Callable[[Any], None]  # prints the result of `run` as tables
    to_json: Callable[[Any], Mapping[str, Any]] = dict  # of the result of `run`
    positional: str = ""  # the field whose values may be given without its flag

    def app(self, name: str, examples: str) -> App:
        """Return the command; `examples` are command lines that its help ends with."""

        def job(**given: Any) -> None:
            self.start(given, given.pop("unknown"))

        fields = {**self.model.flag_fields(), **_OF_ALL}
        keyword, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        greedy = not self.positional  # reports several values of a flag that takes one, instead of an unknown argument
        parameters = []
        for own, group in self._groups().items():
            kind = either if own == self.positional else keyword
            flag = _flag(fields[own], group, greedy=greedy)
            parameters.append(inspect.Parameter(own, kind, default=None, annotation=flag))
        hidden = inspect.Parameter("unknown", keyword, annotation=Annotated[list[str], Parameter(parse=False)])
        job.__signature__ = inspect.Signature([*parameters, hidden])  # type: ignore[attr-defined]
        app = App(name=name, help_format="plaintext", version_flags=(), help_epilogue=f"Examples:\n{examples}")
        app.default(job)
        return app

    def _groups(self) -> dict[str, Group]:
        """Return the group of every flag in the help, in the order of the help."""
        groups: dict[str, Group] = {}
        for title, names in self.model.help_groups.items():
            group = Group.create_ordered(title)
            groups |= dict.fromkeys((*names, *(() if groups else _OF_ALL)), group)
        return groups

    def start(self, given: Mapping[str, Any], unknown: Sequence[str] = ()) -> None:
        """Run the job with flags as cyclopts splits them, and print its result."""
        config = self.parse(given, unknown)
        logging.getLogger("msense").setLevel(config.log_level.upper())
        if not given.get("json"):
            self.show(self.run(config))
            return
        with _stdout_to_stderr():
            result = self.run(config)
        sys.stdout.write(json.dumps(self.to_json(result)) + "\n")

    def parse(self, given: Mapping[str, Any], unknown: Sequence[str] = ()) -> JobT:
        """Return the settings of flags, as cyclopts splits them, and of the files of `--config`.

        Raises:
            InputError: flags, keys or values are invalid; the message lists every error.
        """
        if given.get("config") == []:  # as with an unset variable
            raise InputError("--config: no value; give a file, or omit the flag")
        values: dict[str, Any] = {}
        for file in given.get("config") or ():
            values |= read_config(file)
        # unknown flags are no settings, and quoted so that errors call them flags
        values |= dict.fromkeys(repr(token.partition("=")[0]) for token in unknown)
        for name, value in given.items():
            if name not in _OF_ALL:
                single = isinstance(value, list) and len(value) == 1 and not _is_list(self.model.flag_fields()[name])
                values[name] = value[0] if single else value
        return validate_config(self.model, values)


def call(app: App, words: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    Raises:
        InputError: wrong usage.
    """
    try:
        command, bound, unknown, ignored = app.parse_known_args(words, console=console())
    except CycloptsError as error:  # such as --dedup=maybe
        error.verbose = False
        raise InputError(f"{error} (--help describes all flags)") from error
    if "unknown" in ignored:  # of a job, which reports them with all other errors
        bound.arguments["unknown"] = unknown
    elif unknown:
        raise InputError(f"unknown argument {unknown[0]!r} (--help describes all flags)")
    return command(**bound.arguments) or 0


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries and other processes print on stdout to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (tuple, dict)


def _flag(field: FieldInfo, group: Group, *, greedy: bool) -> Any:
    """Return the annotation of a flag: its type on the command line, and its help."""
    default = field.default
    if isinstance(default, dict):
        default = [f"{key}={value:g}" for key, value in default.items()]
    elif isinstance(default, float):
        default = f"{default:g}"
    text = " ".join(default) if isinstance(default, list | tuple) else str("" if default is None else default)
    shared: dict[str, Any] = {
        "help": ("(required) " if field.is_required() else "") + (field.description or ""),
        "group": group,
        "show_default": False if field.is_required() or default is False or not text else lambda _: text,
    }
    if field.annotation in (bool, bool | None):
        return Annotated[bool | None, Parameter(**shared, allow_repeating=True)]
    options: dict[str, Any] = {} if _is_list(field) else {"converter": _last_values}
    options |= {"metavar": _metavar(field.annotation), "consume_multiple": greedy or _is_list(field), "negative": ()}
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


def config_names() -> dict[str, str]:
    """Return the configurations that come with msense: names, and the first line of each file."""
    own = sorted((file for file in CONFIGS.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text().split("\n")[0].strip("# :.") for file in own}


def read_config(file: str) -> dict[str, Any]:
    """Read a YAML mapping, of a file or of a configuration that comes with msense; keys may be written with - or _.

    Raises:
        InputError: there is no such file or configuration, or its content is no mapping of settings.
    """
    try:
        path = Path(file)
        if path.suffix == "" and path.name == file and file in config_names():
            path = Path(str(CONFIGS / f"{file}.yaml"))
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ValueError("not a regular file")
        if (size := path.stat().st_size) > _MAX_YAML_BYTES:
            raise ValueError(f"{size} bytes, but the maximum is {_MAX_YAML_BYTES}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict | None):
            raise ValueError(f"a {type(values).__name__} instead of settings")
    except (*_YAML_ERRORS, yaml.YAMLError) as error:
        message = f"cannot read the config file {file!r}: {redact(str(error))}"
        remedy = f"It must be UTF-8 text with lines `setting: value`, or one of {', '.join(config_names())}."
        raise InputError(f"{message}\n{remedy}") from error
    return {str(key).replace("-", "_"): value for key, value in (values or {}).items()}
