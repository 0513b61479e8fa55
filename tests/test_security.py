"""What the code never does, and what it never writes down."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import ALL, Corpus

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "msense").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])  # benchmarks read their own files
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"}
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "aws-hunter2",
    "AWS_SESSION_TOKEN": "session-hunter2",
    "HF_TOKEN": "hf_hunter2",
    "RAY_AUTH_TOKEN": "ray-hunter2",
}


def offences(tree: ast.AST) -> Iterator[str]:
    """Ways to run what somebody else has written, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            wrong = name in FORBIDDEN_CALLS or given.get("shell") == "True"
            wrong |= given.get("trust_remote_code", "False") != "False"
            wrong |= name == "torch.load" and given.get("weights_only") != "True"
            wrong |= name == "np.load" and given.get("allow_pickle") != "False"
            wrong |= name.startswith("Auto") and name.endswith("from_pretrained") and "trust_remote_code" not in given
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
    ],
)
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert list(offences(ast.parse(code)))


@pytest.mark.usefixtures("in_process")
def test_tokens_and_keys_of_the_environment_are_not_written_down(
    made: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    made.build("run", keep=ALL)
    written = b"".join(path.read_bytes() for path in (made.folder / "run").rglob("*") if path.is_file())
    assert len(written) > 10_000
    assert b"hunter2" not in written
    assert "hunter2" not in caplog.text
