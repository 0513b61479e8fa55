"""Invalid input, through the job itself: how to prepare it, the exit code, and the message that the user reads.

Every run also checks that there is no traceback, control character or secret on the terminal, no secret in the run
folder, and no dictionary unless the exit code is 0.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from msense.__main__ import main
from msense.corpus import cut_splits

MakeTeacher = Callable[..., Path]
Prepare = Callable[[Path], object]
Patch = pytest.MonkeyPatch
ESCAPE = "\x1b[31mred\x07\x9b1m"
SECRET = "hunter2"
LINES = ["the bank of the river is deep", "money is in the bank", "a cat sat on the mat", "the river runs full !"]


@dataclass
class Outcome:
    """Exit code, output and folder of a run."""

    code: int
    text: str  # stdout and stderr
    output: Path

    def bad_documents(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.output / "bad_documents.jsonl").read_text().splitlines()]


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def good_teacher(make_teacher: MakeTeacher) -> Path:
    return make_teacher("bert")


@pytest.fixture
def teacher(tmp_path: Path, good_teacher: Path) -> Path:
    return shutil.copytree(good_teacher, tmp_path / "teacher")


@pytest.fixture
def run(tmp_path: Path, teacher: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the job with valid settings, overridden by the given flags."""

    def call(*flags: object) -> Outcome:
        (tmp_path / "good.txt").write_text("\n".join(LINES * 3))
        good = ["--local", "--teacher", teacher, "--output", tmp_path / "run"]
        good += [] if "--corpus" in flags else ["--corpus", tmp_path / "good.txt"]
        monkeypatch.setattr(logging.root, "handlers", [])  # so that log lines go to stderr, as for a user
        capfd.readouterr()
        code = main([str(word) for word in ("build", *good, "--exemplars", 0, *flags)])
        text = "".join(capfd.readouterr())
        assert "Traceback" not in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert SECRET not in text
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]
        assert (tmp_path / "run" / "dictionary").exists() == (code == 0)
        return Outcome(code, " ".join(text.split()), tmp_path / "run")

    return call


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
    return path


def table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


# --- corpora

# fmt: off
CORPORA: list[tuple[str, Prepare, int, str]] = [
    ("no corpus given", lambda d: [], 2, "corpus: no value; give one"),
    ("an empty name", lambda d: "", 2, r"corpus: is empty; give a value"),
    ("a name with control characters", lambda d: f"{d}/{ESCAPE}/a.txt", 2, r"/red1m/a.txt: no readable file there"),
    ("a name with a NUL", lambda d: f"{d}/a\0b", 2, r"corpus: contains a NUL character or is not UTF-8; use"),
    ("no file of a known kind", lambda d: write(d / "new/a.pdf", "x").parent, 2, r"no readable file there; accepted are \*.txt"),
    ("a file of an unknown kind", lambda d: write(d / "a.pdf", "x"), 2, r"a.pdf: unsupported file format; accepted are"),
    ("a pipe", lambda d: os.mkfifo(d / "a.txt") or d / "a.txt", 2, r"a.txt: a pipe, socket or device.*exclude it"),
    ("a circular link", lambda d: (d / "a.txt").symlink_to(d / "a.txt") or d, 2, r"symbolic links.*check the path"),
    ("a name that is not UTF-8", lambda d: write(d / "new/\udcff.txt", "x").parent, 2, r"name.* is not UTF-8; rename it"),
    ("a duplicate file", lambda d: [write(d / "a.txt", "x")] * 2, 2, r"a.txt: the corpus contains this file twice; list"),
    ("an empty file", lambda d: write(d / "a.txt", ""), 2, r"a.txt has no text \(it has no documents\): check"),
    ("blank documents only", lambda d: write(d / "a.txt", " \n\t\n"), 2, r"has no text \(2 empty\): see .*bad_documents.jsonl"),
    ("bad documents only", lambda d: write(d / "a.jsonl", '{"text": 3}\n{\n'), 2, r"\(1 bad JSON; 1 no text\): see .*bad_doc"),
    ("a column with control characters", lambda d: write(d / "a.csv", f"{ESCAPE}\nx\n"), 2, r"no column 'text'; available: '"),
    ("a text column of numbers", lambda d: table(d / "a.parquet", text=[1]), 2, r"'text' holds int64, not text; cast it"),
    ("a duplicate id with escapes", lambda d: write(d / "a.csv", f"id,text\n{ESCAPE},a\n" * 2), 2, r"id .* occurs twice"),
    ("an unreachable dataset", lambda d: "hf://no/such", 2, r"hf://no/such: the Hub provides no parquet .*hf auth login"),
    ("a dataset named with a secret", lambda d: f"hf://u:{SECRET}@a/b", 2, r"hf://a/b: .*write hf://dataset\[:config\]"),
    ("an unknown scheme", lambda d: f"foo://u:{SECRET}@b/x.txt", 2, r"foo://b/x.txt: Protocol not known.*use a local path"),
    ("a secret in an s3 URI", lambda d: f"s3://key:{SECRET}@b/x.txt", 2, r"s3://b/x.txt: .*no credentials .*AWS_PROFILE"),
    ("no bucket", lambda d: "s3://", 2, r"s3://: names no bucket; write s3://bucket/path"),
    ("a secret in a query", lambda d: f"http://u:{SECRET}@localhost:1/x.txt?token={SECRET}", 2, r"localhost:1/x.txt: no such"),
    ("a server that is down", lambda d: f"ftp://u:{SECRET}@localhost:1/x", 1, r"ftp://localhost:1/x: .*run the same command"),
]
# fmt: on


@pytest.mark.parametrize(("prepare", "code", "message"), [row[1:] for row in CORPORA], ids=[row[0] for row in CORPORA])
def test_invalid_corpora(tmp_path: Path, run: Run, prepare: Prepare, code: int, message: str) -> None:
    given = prepare(folder(tmp_path / "corpus"))
    result = run("--corpus", *(given if isinstance(given, list) else [given]))
    assert result.code == code
    assert re.search(message, result.text), result.text


# fmt: off
SKIPPED: list[tuple[str, str, bytes, str, str]] = [
    ("a line that is not UTF-8", "a.txt", b"a cat\n\xff\xfe\n", "a.txt:1", "not UTF-8"),
    ("broken JSON", "a.jsonl", b'{"text": "a cat"}\n{"text": \n', "a.jsonl:1", "bad JSON"),
    ("a csv quote left open", "a.csv", b'n,text\n1,a cat\n2,"a\n', "a.csv:1", "bad CSV row"),
    ("20 MB on one line", "a.txt", b"a cat\n%s\nthe end\n", "a.txt:1", "too long"),
]
# fmt: on


@pytest.mark.parametrize(
    ("name", "raw", "document", "reason"), [row[1:] for row in SKIPPED], ids=[row[0] for row in SKIPPED]
)
def test_a_bad_document_is_skipped_and_counted_or_stops_a_strict_run(
    tmp_path: Path, run: Run, name: str, raw: bytes, document: str, reason: str
) -> None:
    corpus = write(tmp_path / name, raw.replace(b"%s", b"x" * 20_000_000))
    strict = run("--corpus", corpus, "--on-bad-document", "fail")
    assert strict.code == 2
    assert re.search(
        rf"bad document {document}: {reason} .*skip bad documents with --on-bad-document skip", strict.text
    )
    result = run("--corpus", corpus)
    assert result.code == 0
    assert f"skipped 1 bad document (1 {reason}), the first 100 of each kind in bad_documents.jsonl" in result.text
    assert [(bad["id"], bad["reason"]) for bad in result.bad_documents()] == [(document, reason)]


def test_the_first_hundred_of_each_reason_are_listed_in_input_order(
    tmp_path: Path, run: Run, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("msense.stages.passages.cut_splits", lambda files: cut_splits(files, split_bytes=100))
    kinds = {b"": "empty", b"\xff": "not UTF-8", b"a cat": ""}
    lines = [b"", b"\xff", b"a cat", b""] * 30
    names = ["a.txt", "b.txt", "c.txt"]
    for name in names:
        write(tmp_path / "corpus" / name, b"\n".join([*lines, b""]))
    bad = [(f"{name}:{row}", kinds[line]) for name in names for row, line in enumerate(lines) if kinds[line]]
    first = [item for n, item in enumerate(bad) if sum(other[1] == item[1] for other in bad[:n]) < 100]
    result = run("--corpus", tmp_path / "corpus")
    assert result.code == 0
    assert len(bad) == 270
    assert "skipped 270 bad documents (180 empty, 90 not UTF-8)" in result.text
    assert [(row["id"], row["reason"]) for row in result.bad_documents()] == first
    assert len(list((tmp_path / "run" / "passages").glob("*.parquet"))) > 3


# --- teachers


def settings_of(teacher: Path, name: str = "config.json", **changes: object) -> None:
    settings = json.loads((teacher / name).read_text())
    write(teacher / name, json.dumps(settings | changes))


def remote_code(teacher: Path) -> None:
    write(
        teacher / "evil.py",
        f"open({str(teacher / 'ran')!r}, 'w')\nfrom transformers import BertConfig as C, BertModel as M",
    )
    settings_of(teacher, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})


def pickle(teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()
    write(teacher / "pytorch_model.bin", f"cposix\nsystem\n(S'touch {teacher / 'ran'}'\ntR.")


def bias(teacher: Path, value: float) -> None:
    weights = load_file(teacher / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.bias"].fill_(value)
    save_file(weights, teacher / "model.safetensors")


def slow(teacher: Path) -> None:
    (teacher / "tokenizer.json").unlink()
    write(teacher / "vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    write(teacher / "tokenizer_config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}')


def module(teacher: Path, kind: str, path: str) -> None:
    write(
        teacher / "modules.json",
        json.dumps(
            [
                {"type": "sentence_transformers.models.Transformer", "path": ""},
                {"type": f"sentence_transformers.models.{kind}", "path": path},
            ]
        ),
    )


F32 = ("--dtype", "float32")
BF16 = ("--dtype", "bfloat16")
# fmt: off
TEACHERS: list[tuple[str, Prepare, tuple[str, ...], int, str]] = [
    ("a missing path", lambda t: None, ("--teacher", "/no/such"), 2, r"'/no/such': no such folder: check"),
    ("a file", lambda t: None, ("--teacher", __file__), 2, r"is a file: give the folder that holds config.json"),
    ("an empty name", lambda t: None, ("--teacher", ""), 2, r"teacher: is empty; give a value, or omit the setting"),
    ("named far too long", lambda t: None, ("--teacher", "a" * 300), 2, r"not a valid name \(File name too long\): give a"),
    ("named with a secret", lambda t: None, ("--teacher", f"https://u:{SECRET}@h/t?x={SECRET}"), 2, r"'https://h/t': .*check"),
    ("without weights", lambda t: (t / "model.safetensors").unlink(), (), 2, r"has no safetensors weights, .*save the model"),
    ("pickled", pickle, (), 2, r"no safetensors weights \(but pytorch_model.bin\), the only format .*save the model with"),
    ("of other weights", lambda t: settings_of(t, num_hidden_layers=3), (), 2, r"lack 16 tensors .*belong together"),
    ("of other shapes", lambda t: settings_of(t, intermediate_size=64), (), 2, r"6 tensors differ in shape .*belong together"),
    ("lacking a shard", lambda t: write(t / "model.safetensors.index.json", '{"weight_map": {"a": "b"}}'), (), 2, r"file b"),
    ("with a broken config.json", lambda t: write(t / "config.json", "{"), (), 2, r"cannot read .*config.json as JSON"),
    ("with wrong types in config.json", lambda t: settings_of(t, vocab_size="x"), (), 2, r"cannot load teacher .*'vocab_size'"),
    ("of no layers", lambda t: settings_of(t, num_hidden_layers=-2), (), 2, r"specifies -2 layers, .*give a text model"),
    ("with a huge vocabulary", lambda t: settings_of(t, vocab_size=10**12), (), 2, r"1000000000000 tokens; a dictionary"),
    ("with more tokens than weights", lambda t: settings_of(t, vocab_size=4 * 10**6), (), 2, r"specifies 4000000 tokens, more"),
    ("too wide for so many senses", lambda t: settings_of(t, hidden_size=50_000), ("--senses", "60000"), 2, r"--senses 5368 or"),
    ("of an unknown architecture", lambda t: settings_of(t, model_type="nosuch"), (), 2, r"type `nosuch` .*transformers knows"),
    ("with remote code", remote_code, (), 2, r"contains custom code .*is never run"),
    ("without a tokenizer", lambda t: [f.unlink() for f in t.glob("tok*")], (), 2, r"has no tokenizer: put its tok"),
    ("with a broken tokenizer.json", lambda t: write(t / "tokenizer.json", "{"), (), 2, r"load teacher .*\(tokenizer\): "),
    ("of a slow tokenizer", slow, (), 2, r"no fast tokenizer \(tokenizer.json\).*convert it with transformers, or give another"),
    ("with a missing module", lambda t: module(t, "Pooling", "p"), (), 2, r"folder 'p', which does not exist: download"),
    ("with escapes in a module", lambda t: module(t, ESCAPE, "p"), (), 2, r"has the module \S*red\S*1m, .*use another teacher"),
    ("with too long a prompt", lambda t: None, ("--prompt", "a " * 70), 2, r"70 tokens of prompt .*or shorten --prompt"),
    ("of NaN embeddings", lambda t: bias(t, float("nan")), F32, 1, r"float32 embeddings are NaN or infinite: check its weights"),
    ("of NaN in bfloat16", lambda t: bias(t, float("nan")), BF16, 1, r"bfloat16 embeddings are NaN .*: use --dtype float32"),
    ("of embeddings too large", lambda t: bias(t, 1e10), F32, 1, r"too large for float16: use --store-dtype bfloat16"),
    ("of large ones in bfloat16", lambda t: bias(t, 1e10), (*F32, "--store-dtype", "bfloat16"), 0, r"dictionary"),
    ("of embeddings too large for any dtype", lambda t: bias(t, 1e30), (*F32, "--store-dtype", "bfloat16"), 1, r"reach 1e\+30,"),
]
# fmt: on


@pytest.mark.parametrize(
    ("prepare", "flags", "code", "message"), [row[1:] for row in TEACHERS], ids=[row[0] for row in TEACHERS]
)
def test_invalid_teachers(
    teacher: Path, run: Run, prepare: Prepare, flags: tuple[str, ...], code: int, message: str
) -> None:
    prepare(teacher)
    result = run(*flags)
    assert result.code == code
    assert re.search(message, result.text), result.text
    assert not (teacher / "ran").exists()


# --- settings


def yaml(content: str) -> Prepare:
    return lambda d: ["--config", write(d / "run.yaml", content)]


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(b)}: &{chr(b)} [*{chr(b - 1)}{f', *{chr(b - 1)}' * 9}]\n" for b in range(98, 110)
)
# fmt: off
SETTINGS: list[tuple[str, Prepare, str]] = [
    ("too many senses", lambda d: ["--senses", "70000"], r"senses: must be a number from 1 to 65534, .*\(given: '70000'\)"),
    ("a budget below one sense", lambda d: ["--sense-budget", "0.5"], r"sense_budget: must be an average of at least 1.*'0.5'"),
    ("a budget beside a number", lambda d: ["--senses", "9", "--sense-budget", "7"], r"sense_budget: requires --senses auto"),
    ("mcl beside auto", lambda d: ["--mcl", "inflation=2"], r"mcl: requires --senses mcl, not auto: omit it, or"),
    ("an unknown option of mcl", lambda d: ["--mcl", "power=2"], r"mcl: unknown option power; the options are: expansion"),
    ("mcl without inflation", lambda d: ["--mcl", "inflation=1"], r"mcl: Markov .*inflation is 1.0, but must be from 1"),
    ("a cap out of range", lambda d: ["--max-occurrences", "9" * 30], r"max_occurrences: .*less than or equal to 2147483647"),
    ("an unknown flag", lambda d: ["--colour", ESCAPE], r"'--colour': unknown flag"),
    ("an unknown key", yaml("sense: 3"), r"sense: unknown setting; did you mean senses\?"),
    ("wrong types", yaml("layer: x\ndedup: maybe\nkeep: {a: b}"), r"layer: .*integer.*dedup: .*boolean.*keep: .*tuple"),
    ("YAML that runs commands", yaml("seed: !!python/object/apply:os.system ['touch ran']"), r"could not determine a constr"),
    ("YAML of terabytes", yaml(f"{BOMB}seed: *m"), r"seed: .* \(given: \[\[\[.*m: unknown setting"),
    ("YAML of a list", yaml("[1, 2]"), r"cannot read the config file .*a list instead of settings"),
    ("YAML that is not UTF-8", yaml("\udcff"), r"cannot read the config file .*utf-8"),
    ("a missing YAML file", lambda d: ["--config", d / "none.yaml"], r"cannot read the config file .*none.yaml"),
    ("a folder instead of YAML", lambda d: ["--config", d], r"cannot read the config file .*not a regular file"),
    ("YAML nested too deep", yaml("a: " + "[" * 3000), r"cannot read the config file .*recursion"),
    ("YAML that quotes a secret", yaml(f"keep: s3://k:{SECRET}@b?t={SECRET}"), r"keep.0: .*given: 's3://b'"),
    ("an output that is a file", lambda d: ["--output", write(d / "o", "")], r"output: .*/o is a file; give a new"),
    ("an output below a file", lambda d: ["--output", write(d / "o", "") / "p/q"], r"output: .*/o is a file; give a new"),
    ("an output with a secret", lambda d: ["--output", f"s3://k:{SECRET}@b/x"], r"output: contains credentials; remove them"),
    ("an output on the web", lambda d: ["--output", "hf://a/b"], r"output: hf:// is read-only; give a local folder"),
]
# fmt: on


@pytest.mark.parametrize(("prepare", "message"), [row[1:] for row in SETTINGS], ids=[row[0] for row in SETTINGS])
def test_invalid_settings_exit_with_2(
    tmp_path: Path, run: Run, monkeypatch: Patch, prepare: Prepare, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*prepare(tmp_path))
    assert result.code == 2
    assert re.search(message, result.text), result.text
    assert not (tmp_path / "ran").exists()


def test_a_corrected_setting_works_with_the_same_folder(tmp_path: Path, run: Run) -> None:
    """The remedy in an error message must work, whatever the failed run left."""
    corpus = write(tmp_path / "a.jsonl", '{"body": "the bank"}\n')
    assert "choose one with --text-column" in run("--corpus", corpus).text
    assert run("--corpus", corpus, "--text-column", "body").code == 0
