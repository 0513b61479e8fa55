"""The docstrings of Python packages installed here: the corpus of the demo.

In: package names. Out: their source files, sorted, and the cleaned docstrings of one file with their qualified names.
Everything is read from source with `ast`; no package is imported, so nothing of it runs. In memory: one source file.
"""

import ast
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

from msense.errors import BadInput

DEFAULT_PACKAGES = ("torch", "ray", "transformers", "scipy", "numpy", "pandas", "sklearn")
PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse raises on bad source

_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def choose_packages(names: Sequence[str]) -> list[str]:
    """The packages to read: those named, or those of the default list that are installed.

    Raises:
        BadInput: no name was given and no default package is installed.
    """
    chosen = list(names) or [name for name in DEFAULT_PACKAGES if importlib.util.find_spec(name)]
    if not chosen:
        raise BadInput(f"pydocs: none of {', '.join(DEFAULT_PACKAGES)} is installed; name others, as in pydocs:pip")
    return chosen


def source_files(package: str) -> list[tuple[str, Path]]:
    """The Python files of an installed package: (name below the folder that holds the package, path), sorted by name.

    Raises:
        BadInput: no such top-level package is installed, or it has no Python source.
    """
    try:  # a dotted name would import the parent package
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # `__main__` and the like have no spec
        spec = None
    if spec is None:
        raise BadInput(f"pydocs: no package {package!r} is installed here; pip install it, or name top-level packages")
    roots = spec.submodule_search_locations
    if roots is None:
        files = [(f"{package}.py", Path(spec.origin))] if spec.origin and spec.origin.endswith(".py") else []
    else:
        paths = [(Path(root), path) for root in roots for path in Path(root).rglob("*.py") if path.is_file()]
        files = [(f"{package}/{path.relative_to(root).as_posix()}", path) for root, path in paths]
    if not files:
        raise BadInput(f"pydocs: the package {package!r} has no Python source here; name another one")
    return sorted(files)


def package_version(package: str, files: Sequence[tuple[str, Path]]) -> str:
    """The version of the distribution that holds a package; of one never installed, the time of its latest change."""
    distributions = importlib.metadata.packages_distributions().get(package)
    if distributions:
        return importlib.metadata.version(distributions[0])
    return f"changed {max(path.stat().st_mtime_ns for _, path in files)}"


def docstrings(source: bytes) -> list[tuple[str, str]]:
    """The docstrings of one source file in source order: (qualified name, cleaned text); the module's name is "".

    A name that comes again (the setter of a property, an overload) gets "#2", "#3" and so on.

    Raises:
        PARSE_ERRORS: it is not Python source.
    """
    with warnings.catch_warnings():  # other people's invalid escapes are no news
        warnings.simplefilter("ignore")
        module = ast.parse(source)
    found: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    stack: list[tuple[str, ast.AST]] = [("", module)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, _Scope) and (text := ast.get_docstring(node)) is not None:
            seen[name] = seen.get(name, 0) + 1
            found.append((name if seen[name] == 1 else f"{name}#{seen[name]}", text))
        # Definitions stand in statements, never in expressions: those are not walked.
        below = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.excepthandler | ast.match_case)]
        stack.extend((_qualified(name, child), child) for child in reversed(below))
    return found


def _qualified(parent: str, node: ast.AST) -> str:
    """The qualified name of a class or function under `parent`; any other statement adds nothing."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return parent
    return f"{parent}.{node.name}" if parent else node.name
