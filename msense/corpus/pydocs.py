"""The `pydocs` corpus: docstrings of installed Python packages, used by the demo.

Sources are parsed with `ast` and never imported, so no package code runs. Memory: one source file.
"""

import ast
import importlib.util
import warnings
from collections.abc import Sequence
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
    chosen = list(names) or [name for name in DEFAULT_PACKAGES if importlib.util.find_spec(name)]
    if not chosen:
        raise InputError(f"pydocs: none of {', '.join(DEFAULT_PACKAGES)} is installed; name others, as in pydocs:pip")
    return chosen


def source_files(package: str) -> list[tuple[str, Path]]:
    """Return (name relative to the package's parent folder, path) of a package's Python files, sorted by name.

    Raises:
        InputError: no such top-level package is installed, or it has no Python source.
    """
    try:  # a dotted name would import the parent package
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # `__main__` and some others have no spec
        spec = None
    if spec is None:
        raise InputError(
            f"pydocs: no package {package!r} is installed here; pip install it, or name top-level packages"
        )
    roots = spec.submodule_search_locations
    if roots is None:
        files = [(f"{package}.py", Path(spec.origin))] if spec.origin and spec.origin.endswith(".py") else []
    else:
        paths = [(Path(root), path) for root in roots for path in Path(root).rglob("*.py") if path.is_file()]
        files = [(f"{package}/{path.relative_to(root).as_posix()}", path) for root, path in paths]
    if not files:
        raise InputError(f"pydocs: package {package!r} has no Python source; name another package")
    return sorted(files)


def package_version(package: str, files: Sequence[tuple[str, Path]]) -> str:
    """Return the version of a package's distribution; without one, the time of its latest change."""
    distributions = importlib.metadata.packages_distributions().get(package)
    if distributions:
        return importlib.metadata.version(distributions[0])
    return f"changed {max(path.stat().st_mtime_ns for _, path in files)}"


def docstrings(source: bytes) -> list[tuple[str, str]]:
    """Return (qualified name, cleaned docstring) pairs of one source file in source order; the module's name is "".

    Repeated names (property setters, overloads) get the suffixes "#2", "#3" and so on.

    Raises:
        PARSE_ERRORS: the source is not valid Python.
    """
    with warnings.catch_warnings():  # invalid escapes in other people's source
        warnings.simplefilter("ignore")
        module = ast.parse(source)
    result: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    stack: list[tuple[str, ast.AST]] = [("", module)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | _Definition) and (text := ast.get_docstring(node)) is not None:
            seen[name] = seen.get(name, 0) + 1
            result.append((name if seen[name] == 1 else f"{name}#{seen[name]}", text))
        # Definitions occur in statements, never in expressions, which are skipped.
        below = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.excepthandler | ast.match_case)]
        stack.extend((_qualified(name, child), child) for child in reversed(below))
    return result


def _qualified(parent: str, node: ast.AST) -> str:
    """Return the qualified name of a definition below `parent`; other statements keep the parent's."""
    if not isinstance(node, _Definition):
        return parent
    return f"{parent}.{node.name}" if parent else node.name
