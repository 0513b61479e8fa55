"""No code that runs what a file says: read off the syntax of every module of the package and the jobs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p for name in ("msense", "jobs") for p in (ROOT / name).rglob("*.py"))
BANNED_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
BANNED_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *("pd.read_pickle", "pandas.read_pickle", "torch.hub.load", "load_dataset", "runpy.run_path", "runpy.run_module"),
}
ALLOWED = {("jobs/benches/parts.py", "pickle")}  # it asks how long what Ray sends would be; it unpickles nothing


def found(tree: ast.AST) -> Iterator[str]:
    """Yield what is not wanted in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.partition(".")[0] in BANNED_IMPORTS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
            if called in BANNED_CALLS or called.endswith(".read_pickle"):
                yield called
            if called == "torch.load" and told.get("weights_only") != "True":
                yield "torch.load"
            for name in ("trust_remote_code", "allow_pickle", "shell"):
                if told.get(name, "False") != "False":
                    yield f"{name}={told[name]}"
            loads = called.endswith("SentenceTransformer") or re.fullmatch(r"Auto\w+\.from_(pretrained|config)", called)
            if loads and told.get("trust_remote_code") != "False":
                yield f"{called} without trust_remote_code=False"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_comes_out_of_files(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    wrong = [what for what in found(ast.parse(path.read_text())) if (name, what) not in ALLOWED]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from cloudpickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
        "yaml.load(f, Loader=L)", "exec(x)", "AutoModel.from_pretrained(x)", "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "AutoConfig.from_pretrained(x, trust_remote_code=told)",
        "subprocess.run(x, shell=True)", "os.system(x)", "pd.read_pickle(x)", "SentenceTransformer(x)",
    ],
)  # fmt: skip
def test_what_is_not_wanted_is_seen(source: str) -> None:
    assert list(found(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    ["torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "yaml.safe_load(f)", "model.eval()"],
)
def test_what_is_wanted_is_let_by(source: str) -> None:
    assert list(found(ast.parse(source))) == []
