"""`python -m msense show`: output and exit codes."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from tiny import make, with_tokenizer, word_piece

from msense.__main__ import main
from msense.cli.show import show_text
from msense.dictionary import DictionaryFiles, SenseDictionary
from msense.dictionary.contexts import exemplar_schema
from msense.student.layout import StudentFiles
from msense.text import clean

BANK, CAPITAL_BANK = 2, 7
EVIL = "\x1b[31mred\x1b[0m \x1b]0;title\x07[bold]x[/bold]\x00\u202egnp\u202c\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dictionary in which `bank` has three senses, with contexts."""
    path = tmp_path_factory.mktemp("show")
    rows = [
        (BANK, sense, rank, rank / 2, f"left {sense}{rank} of the ", "bank", f" right {sense}{rank}", "d")
        for sense in range(3)
        for rank in range(4)
    ]
    rows.append((CAPITAL_BANK, 0, 0, 0.0, EVIL * 40, f"Ba{EVIL}nk", EVIL * 40, "d"))
    rows.append((CAPITAL_BANK, 1, 0, 0.0, "漢字" * 60, "bank", "漢字" * 60, "d"))
    rows.append((CAPITAL_BANK, 2, 0, 0.0, "", " bank", "", "d"))
    with_tokenizer(word_piece(), path, [2, 0, 3, 0, 1, 1, 1, 4])
    columns = [pa.array(column, f.type) for column, f in zip(zip(*rows, strict=True), exemplar_schema(), strict=True)]
    pq.write_table(pa.Table.from_arrays(columns, schema=exemplar_schema()), DictionaryFiles(path).exemplars)
    return path


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")


def test_senses_are_sorted_by_count_with_aligned_contexts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(folder), "BANK"]) == 0
    lines = capsys.readouterr().out.splitlines()
    d = SenseDictionary.load(folder)
    own = d.senses(BANK)
    assert lines[0] == f"bank  token 2, 3 senses, {d.token_counts[BANK]:,} occurrences in the corpus"
    order = sorted(range(3), key=lambda sense: (-own.counts[sense], sense))
    heads = [line.split() for line in lines if line.startswith("  sense")]
    assert [int(head[1]) for head in heads] == order
    assert [int(head[3]) for head in heads] == sorted(own.counts.tolist(), reverse=True)
    assert heads[0][5] == f"{own.counts[order[0]] / own.counts.sum():.1%}"
    assert heads[0][8] == f"{own.rms_distance[order[0]]:.3g}"
    contexts = [line for line in lines if "[bank]" in line]
    assert len(contexts) == 9
    assert len({line.index("[bank]") for line in contexts}) == 1
    assert contexts[0].strip() == f"left {order[0]}0 of the [bank] right {order[0]}0"


@pytest.mark.parametrize(
    ("flags", "senses", "contexts"), [(["--senses", "2", "--exemplars", "1"], 2, 2), (["--exemplars", "0"], 3, 0)]
)
def test_limits(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], senses: int, contexts: int) -> None:
    assert main(["show", str(folder), "BANK", *flags]) == 0
    out = capsys.readouterr().out
    assert (out.count("  sense "), out.count("[bank]")) == (senses, contexts)


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_contexts_stay_on_their_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["show", str(folder), "Bank"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out
    assert not set("\x00\x07\r\u202e") & set(out)
    assert "[bold]x[/bold]" in out  # printed literally, not as markup
    assert ("\x1b[1m" in out) == ("\x1b" in out) == terminal
    shown = [clean(line) for line in out.split("\n")]
    assert all(cell_len(line) <= 72 for line in shown)
    columns = [cell_len(line[: line.index("bank")]) for line in shown if line.startswith("    ") and "bank" in line]
    assert len(columns) >= 2
    assert len(set(columns)) == 1


def test_words_without_senses_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(folder), "unbans", "river", "xyz\x1b[2J"]) == 1
    out = capsys.readouterr().out
    assert "'unbans' is not a single token: the tokenizer splits it into 3 tokens (un ##ban ##s)" in out
    assert "'river' is in the vocabulary as 'river' (id 3), but has no senses" in out
    assert "unknown to the tokenizer" in out
    assert "\x1b" not in out
    assert main(["show", str(folder), "unbans", "BANK"]) == 0  # one has senses


def test_a_missing_dictionary_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "nowhere"), "bank"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "nowhere has no config.json" in captured.err
    assert captured.out == ""
    make([1]).save(tmp_path)  # a dictionary without a tokenizer
    assert main(["show", str(tmp_path), "bank"]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_a_text_is_shown_by_whole_words_with_the_senses_of_their_tokens(
    shipped_student: tuple, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    encoder, _, dictionary, folder = shipped_student
    text = "The Bank,\nnear \x1b zzz dogs!"
    assert show_text(str(folder), text) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["word", "sense", "prob", "nearest", "example"]
    tokens = iter(encoder.tokens(text))
    for label, line in zip(["The", "Bank", ",", "near", "␣", "zzz", "dogs", "  dog·", "  ·s", "!"], lines, strict=True):
        assert line[:6].rstrip() == label
        if label == "dogs":  # of two tokens, which follow
            assert line == label
            continue
        token = next(tokens)
        if token.sense < 0:
            assert line.split()[1:] == ["-", "no", "senses"]
            continue
        single = len(dictionary.senses(token.token_id).counts) == 1
        assert line[6:].split(maxsplit=2)[:2] == [str(token.sense), "only" if single else f"{token.probability:.0%}"]
        assert line[6:].split(maxsplit=2)[2] == f"a river [bank] of {token.token_id}.{token.sense}.0"
    assert len({line.index("[bank]") for line in lines if "[bank]" in line}) == 1


def test_what_a_text_lacks_is_explained(
    shipped_student: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(shipped_student[3], tmp_path / "s")
    (StudentFiles(folder).dictionary / "exemplars.parquet").unlink()
    assert show_text(str(folder), "near " * 30) == 0
    out = capsys.readouterr().out
    assert "the text is truncated: the student reads 24 tokens\nno examples: the student's dictionary has none" in out
    assert show_text(str(folder), " ") == 1
    assert "the text has no tokens" in capsys.readouterr().out


def test_clean() -> None:
    assert clean("plain text, \x1b[1;31mred\x1b[m, \x1bcreset") == "plain text, red, reset"
    assert clean("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07") == "link"
    assert clean("a\tb\nc\u2028d") == "a b c d"
    assert clean("\x9b31mx\x00\x7f\u200b\u202e\ud800") == "31mx"


def test_a_dictionary_is_no_student(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "run" / "dictionary")
    for place in (folder, tmp_path / "run"):
        assert main(["show", str(place), "--text", "the bank"]) == 2
        assert f"{place} is a dictionary or the run that built it: give a student" in capsys.readouterr().err
