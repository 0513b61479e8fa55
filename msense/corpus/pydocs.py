"""The `pydocs` corpus: docstrings of installed Python packages, used by the demo.

Sources are parsed with `ast` and never imported, so no package code runs. Memory: one source file.
"""

import ast
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from msense.errors import InputError

DEFAULT_PACKAGES = ("torch", "ray", "transformers", "scipy", "numpy", "pandas", "sklearn")
PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)  # raised by ast.parse for invalid source
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def choose_packages(names: Sequence[str]) -> list[str]:
    """Return the named packages, or by default the installed ones of `DEFAULT_PACKAGES`.

    Raises:
        InputError: no name was given and no default package is installed.
    """
    chosen = list(names) or [name for name in DEFAULT_PACKAGES if find_spec(name)]
    if not chosen:
        raise InputError(f"pydocs: none of {', '.join(DEFAULT_PACKAGES)} is installed; name others, as in pydocs:pip")
    return chosen


def source_files(package: str) -> list[tuple[str, Path]]:
    """Return (name relative to the package's parent folder, path) of a package's Python files, sorted by name.

    Raises:
        InputError: no such top-level package is installed, or it has no Python source.
    """
    try:  # a dotted name would import the parent package
        spec = find_spec(package) if package.isidentifier() else None
    except ValueError:  # `__main__` and some others have no spec
        spec = None
    if spec is None:
        raise InputError(
            f"pydocs: no package {package!r} is installed here; pip install it, or name top-level packages"
        )
    if spec.submodule_search_locations is None:
        files = [(f"{package}.py", Path(spec.origin))] if spec.origin and spec.origin.endswith(".py") else []
    else:
        roots = [Path(root) for root in spec.submodule_search_locations]
        paths = [(root, path) for root in roots for path in root.rglob("*.py") if path.is_file()]
        files = [(f"{package}/{path.relative_to(root).as_posix()}", path) for root, path in paths]
    if not files:
        raise InputError(f"pydocs: package {package!r} has no Python source; name another package")
    return sorted(files)


def package_version(package: str, files: Sequence[tuple[str, Path]]) -> str:
    """Return the version of a package's distribution; without one, the time of its latest change."""
    if distributions := metadata.packages_distributions().get(package):
        return metadata.version(distributions[0])
    return f"changed {max(path.stat().st_mtime_ns for _, path in files)}"


def docstrings(source: bytes) -> list[tuple[str, str]]:
    """Return (qualified name, cleaned docstring) pairs of one source file in source order; the module's name is "".

    Repeated names (property setters, overloads) get the suffixes "#2", "#3" and so on.

    Raises:
        PARSE_ERRORS: the source is not valid Python.
    """
    with warnings.catch_warnings():  # invalid escapes in other people's source
        warnings.simplefilter("ignore")
        stack: list[tuple[str, ast.AST]] = [("", ast.parse(source))]
    result: list[tuple[str, str]] = []
    seen: Counter[str] = Counter()
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | _Definition) and (text := ast.get_docstring(node)) is not None:
            seen[name] += 1
            result.append((name if seen[name] == 1 else f"{name}#{seen[name]}", text))
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, _Definition):
                stack.append((f"{name}.{child.name}" if name else child.name, child))
            elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # expressions have no definitions
                stack.append((name, child))
    return result
