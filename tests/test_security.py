"""What the code never does; `test_secrets` has what it never writes down."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "msense").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])  # benchmarks read their own files
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
FORBIDDEN_CALLS |= {"pd.read_pickle", "torch.hub.load", "load_dataset", "runpy.run_path"}


def offences(tree: ast.AST) -> Iterator[str]:
    """Ways to run what somebody else has written, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            switches = ("shell", "trust_remote_code", "allow_pickle")
            wrong = name in FORBIDDEN_CALLS or any(given.get(switch, "False") != "False" for switch in switches)
            wrong |= name == "torch.load" and given.get("weights_only") != "True"
            wrong |= name == "np.load" and given.get("allow_pickle") != "False"
            loads = re.fullmatch(r"Auto\w+\.from_(pretrained|config)|SentenceTransformer", name)
            wrong |= bool(loads) and "trust_remote_code" not in given
            if wrong:
                yield f"{node.lineno}: {ast.unparse(node)[:100]}"


def test_nothing_that_is_read_is_ever_run() -> None:
    assert len(FILES) > 80
    found = [f"{path.relative_to(ROOT)}:{what}" for path in FILES for what in offences(ast.parse(path.read_text()))]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "np.load(path)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(words, shell=True)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=given)",
        "AutoModel.from_config(config)",
        "SentenceTransformer(name)",
        "numpy.load(path, allow_pickle=given)",
        "subprocess.run(words, shell=given)",
    ],
)
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert list(offences(ast.parse(code)))
