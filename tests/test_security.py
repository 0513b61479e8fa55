"""The code never executes what it reads: no unpickling, eval, shells, or remote code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "msense").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])  # benchmarks read their own files
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "yaml.load"}
FORBIDDEN_CALLS |= {"yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "torch.hub.load", "load_dataset"}


def offences(tree: ast.AST) -> Iterator[str]:
    """Yield the lines that could execute foreign code."""
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


def test_nothing_that_is_read_is_executed() -> None:
    assert len(FILES) > 80
    lines = [f"{path.relative_to(ROOT)}:{what}" for path in FILES for what in offences(ast.parse(path.read_text()))]
    assert lines == []


def test_offences_are_detected() -> None:
    """One offence per line."""
    code = """import pickle
        from dill import loads
        torch.load(path)
        np.load(path)
        numpy.load(path, allow_pickle=given)
        yaml.load(text)
        eval(text)
        subprocess.run(words, shell=given)
        AutoModel.from_config(config)
        AutoModel.from_pretrained(name, trust_remote_code=given)
        SentenceTransformer(name)"""
    lines = [line.strip() for line in code.splitlines()]
    assert [line for line in lines if not list(offences(ast.parse(line)))] == []
