"""The pages: every block of commands or Python runs or says why not, and every flag, file, target and link exists."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import flag_tables
import pytest
import tiny
from fault_table import write as write_faults
from task_data import write_task
from teachers import write_teacher

from msense.__main__ import main

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "",
    ".github/",
    "jobs/",
    "jobs/benchmarks/",
    "msense/",
    "msense/evaluation/",
    "msense/explorer/",
    "msense/teacher/",
    "tests/",
)
PAGES = {f"{folder}{path.name}": path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
EVERY = "\n".join(TEXTS.values())
BLOCK = re.compile(r"^(?:<!-- (?P<mark>.*) -->\n)?```(?P<kind>.*)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
MARKS = ("not run: ",)
RUN = ("bash", "python")
SHOWN = ("bibtex", "text", "yaml")  # output, diagrams, files
OTHER_FLAGS = {"--config", "--help", "--json", "--no-pooled", "--no-cost", "--senses", "--exemplars", "--text"}
OTHER_FLAGS |= {"--data", "--sets", "--general", "--sts", "--peer-python"}  # of jobs/benchmark.py
OTHER_FLAGS |= {"--compare", "--evaluations", "--export", "--host", "--port", "--trainings"}  # of msense explore
OTHER_FLAGS |= {"--address", "--working-dir", "--submission-id", "--generate", "--index-url"}  # of Ray and pip
WORDS = ["cell", "decision", "gaussian", "kernel", "key", "leaf", "matrix", "tree", *tiny.WORDS]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    mark: str  # the comment before it
    kind: str
    text: str
    printed: str  # the text of the next block, if that shows output


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page."""
    found = [match.groupdict() for match in BLOCK.finditer(TEXTS[page])]
    later = [*found[1:], {"kind": "", "text": ""}]
    return [
        Block(page, own["mark"] or "", own["kind"], own["text"], after["text"] if after["kind"] == "text" else "")
        for own, after in zip(found, later, strict=False)
    ]


def commands(text: str) -> list[list[str]]:
    """Return the words of the commands in a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str]) -> int:
    """Run a command of msense in this process, without Ray and without the costs of models, and return its exit code."""
    assert words[0] == "msense", f"{words[0]} cannot be run here: give the block a comment <!-- not run: REASON -->"
    given = words[1:]
    if given[0] in {*flag_tables.CONFIGS, "make"}:
        given += ["--local", *(["--no-cost"] if given[0] == "evaluate" else [])]
    return main(given)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts, data, teacher, dictionaries and students that the pages name, all of them small."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "texts").mkdir()
    lines = [f"the {a} of a {b} is near the {a}" for a in WORDS for b in WORDS]
    (folder / "texts" / "a.txt").write_text("\n".join(lines))
    rows = [(line, f"c{number % 2}") for number, line in enumerate(lines)]
    for name in ("banking77", "sst2"):
        write_task(folder / "data" / name, {"train": rows[:60], "dev": rows[60:80], "test": rows[80:100]})
    (folder / "data" / "sts").mkdir()
    pairs = [f"{a},{b},{number}" for number, (a, b) in enumerate(zip(lines[:9], lines[9:18], strict=True))]
    (folder / "data" / "sts" / "dev.csv").write_text("\n".join(["s1,s2,score", *pairs]))
    docs = folder / "data" / "docs"
    docs.mkdir()
    for name, own in (("corpus", lines[:20]), ("queries", lines[:4])):
        records = [json.dumps({"_id": str(number), "text": text}) for number, text in enumerate(own)]
        (docs / f"{name}.jsonl").write_text("\n".join(records))
    (docs / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{n}\t{n}\t1\n" for n in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tiny, "WORDS", WORDS)
        write_teacher(folder / "BAAI" / "bge-base-en-v1.5", pooling="mean_tokens")
        build = "msense build --corpus texts/ --teacher BAAI/bge-base-en-v1.5 --output runs/senses"
        distill = "msense distill --dictionary runs/senses --student static --epochs 1 --output runs/student"
        assert [run(words) for words in commands(f"{build}\n{distill}")] == [0, 0]
        shutil.copytree("runs/senses", "runs/demo")
    return folder


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("page", [page for page in PAGES if any(own.kind in RUN for own in blocks(page))])
def test_blocks_run(
    page: str, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(shutil.copytree(example, tmp_path / "example"))
    for own in (own for own in blocks(page) if own.kind in RUN and not own.mark.startswith(MARKS)):
        capsys.readouterr()
        if own.kind == "bash":
            assert [words for words in commands(own.text) if run(words)] == []
        else:
            exec(compile(own.text, page, "exec"), {"__name__": "__main__"})
            printed = capsys.readouterr().out.splitlines()
            assert printed
            assert not own.printed or len(printed) == len(own.printed.splitlines())


def test_every_block_has_a_kind_and_every_mark_a_block() -> None:
    every = [own for page in PAGES for own in blocks(page)]
    assert [(own.page, own.text) for own in every if own.kind not in (*RUN, *SHOWN)] == []
    marks, fences = (len(re.findall(line, EVERY, flags=re.MULTILINE)) for line in ("^<!-- not run: ", "^```"))
    assert sum(own.mark.startswith("not run: ") for own in every) == marks
    assert 2 * len(every) == fences


def test_a_command_of_others_is_not_run_silently() -> None:
    with pytest.raises(AssertionError, match="not run: REASON"):
        run(["ray", "up", "cluster.yaml"])
    assert commands("a --b \\\n  'c d'  # e\n") == [["a", "--b", "c d"]]


def test_the_tables_of_flags_are_those_of_the_settings() -> None:
    assert not flag_tables.write(PAGES["jobs/README.md"]), "jobs/README.md has new tables of flags: commit it"


def test_every_flag_exists() -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", EVERY))
    known = {flag_tables.flag_of(name) for config in flag_tables.CONFIGS.values() for name in config.model_fields}
    assert flags <= known | OTHER_FLAGS
    assert flags >= known


def test_every_file_and_target_exists() -> None:
    folders = (*FOLDERS, "tests/support/", "tests/slow/")
    for name in re.findall(r"(?<![\w/])(?:[a-z]+/)*[a-z_0-9]+\.py\b", EVERY):
        assert any((ROOT / folder / name).exists() for folder in folders), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)\b", EVERY)) <= targets


def test_every_link_leads_somewhere() -> None:
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)]*)\)", text):
            if not target.startswith("https://"):
                name, _, anchor = target.partition("#")
                path = PAGES[page].parent / name if name else PAGES[page]
                assert path.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(path), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_benchmark_exists() -> None:
    named = re.findall(r"jobs/benchmark\.py ((?:[a-z]+ )*[a-z]+)", EVERY)
    known = set(re.findall(r'^    "(\w+)": "', (ROOT / "jobs" / "benchmark.py").read_text(), flags=re.MULTILINE))
    assert {name for names in named for name in names.split()} == known != set()


def test_the_readme_is_short_and_soon_useful() -> None:
    text = TEXTS["README.md"]
    lines = text.splitlines()
    assert len(text.split()) <= 2200
    assert next(n for n, line in enumerate(lines, 1) if line.startswith("pip install")) <= 40
    assert lines.index("```python") < 60


def test_faults_are_written_into_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- faults: begin -->\nold\n<!-- faults: end -->\nafter\n")
    write_faults({("disk full", "plan"): "reported", ("worker killed", "labels"): "run continues"}, page)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines[4] == "| worker killed |  |  |  |  |  |  |  |  | run continues |  |"
    assert lines[5] == "| disk full |  | reported |  |  |  |  |  |  |  |  |"
    assert "old" not in lines


def test_ci_knows_all_versions_of_python() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert '["3.11", "3.12", "3.13"]' in workflow
