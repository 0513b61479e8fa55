"""Bad input, through the command itself: what to spoil, the exit code, and the words that the user then reads.

Every run of a row is also held to this: no traceback, no control character and no secret on the terminal, no secret in
the run folder, and no dictionary unless the exit code is 0.
"""

import errno
import gzip
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file

from msense import SenseDictionary
from msense.cli import run_job
from msense.corpus import cut_pieces

MakeTeacher = Callable[..., Path]
Spoil = Callable[[Path], object]
Patch = pytest.MonkeyPatch
in_process = pytest.mark.usefixtures("in_process")
ESCAPE = "\x1b[31mred\x07\x9b1m"
SECRET = "hunter2"
LINES = ["the bank of the river is deep", "money is in the bank", "a cat sat on the mat", "the river runs full !"]


@dataclass
class Told:
    """What a run gave its user."""

    code: int
    text: str  # stdout and stderr
    output: Path

    def bad_documents(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.output / "bad_documents.jsonl").read_text().splitlines()]


Run = Callable[..., Told]


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_dict_job", Path(__file__).parents[1] / "jobs/build_dict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def good_teacher(make_teacher: MakeTeacher) -> Path:
    return make_teacher("bert")


@pytest.fixture
def teacher(tmp_path: Path, good_teacher: Path) -> Path:
    return shutil.copytree(good_teacher, tmp_path / "teacher")


@pytest.fixture
def run(tmp_path: Path, job: ModuleType, teacher: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Give the command with good settings; flags that are given win over them."""

    def call(*flags: object) -> Told:
        (tmp_path / "good.txt").write_text("\n".join(LINES * 3))
        good = ["--teacher", teacher, "--output", tmp_path / "run"]
        good += [] if "--corpus" in flags else ["--corpus", tmp_path / "good.txt"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in ("build_dict.py", *good, "--exemplars", 0, *flags)])
        monkeypatch.setattr(logging.root, "handlers", [])  # so that log lines go to stderr as they do for a user
        capfd.readouterr()
        try:
            code = run_job(job.main)
        except SystemExit as stop:  # argparse
            code = stop.code
        text = "".join(capfd.readouterr())
        assert "Traceback" not in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert SECRET not in text
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]
        assert (tmp_path / "run" / "dictionary").exists() == (code == 0)
        return Told(code, " ".join(text.split()), tmp_path / "run")

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


# --- the corpus

# fmt: off
CORPORA: list[tuple[str, Spoil, int, str]] = [
    ("no corpus given", lambda d: [], 2, r"no corpus: say where the text is with --corpus"),
    ("an empty name", lambda d: "", 2, r"corpus: is empty; give a value"),
    ("a path that is not there", lambda d: d / "none.txt", 2, r"none.txt: no such file or folder; check the path"),
    ("a name with control characters", lambda d: f"{d}/{ESCAPE}/a.txt", 2, r"/red1m/a.txt: no file there that can be read"),
    ("a name with a NUL", lambda d: f"{d}/a\0b", 2, r"corpus: holds a NUL character or is not UTF-8; write it"),
    ("an empty folder", lambda d: folder(d / "new"), 2, r"new: no file there that can be read; accepted are \*.txt and"),
    ("no file of a known kind", lambda d: write(d / "new/a.pdf", "x").parent, 2, r"no file there .*accepted are \*.txt"),
    ("a file of an unknown kind", lambda d: write(d / "a.pdf", "x"), 2, r"a.pdf: not a kind of file .*accepted are"),
    ("a pipe", lambda d: os.mkfifo(d / "a.txt") or d / "a.txt", 2, r"a.txt: neither a file nor a folder .*leave it out"),
    ("a pipe in a folder", lambda d: os.mkfifo(d / "a.txt") or d, 2, r"a.txt: neither a file nor a folder"),
    ("a link in a circle", lambda d: (d / "a.txt").symlink_to(d / "a.txt") or d, 2, r"symbolic links.*check the path"),
    ("a name that is not UTF-8", lambda d: write(d / "new/\udcff.txt", "x").parent, 2, r"name is not UTF-8.*rename it"),
    ("the same file twice", lambda d: [write(d / "a.txt", "x")] * 2, 2, r"a.txt: the corpus has it twice; name it"),
    ("a file of no byte", lambda d: write(d / "a.txt", ""), 2, r"a.txt has no text \(no documents in it\): check the path"),
    ("blank documents only", lambda d: write(d / "a.txt", " \n\t\n"), 2, r"has no text \(2 empty\): see .*bad_documents.jsonl"),
    ("bad documents only", lambda d: write(d / "a.jsonl", '{"text": 3}\n{\n'), 2, r"\(1 bad JSON; 1 no text\): see .*bad_doc"),
    ("no text column in jsonl", lambda d: write(d / "a.jsonl", '{"body": "x"}'), 2, r"'text'; it has 'body': .*--text-col"),
    ("no text column in csv", lambda d: write(d / "a.csv", "body,n\nx,1\n"), 2, r"'text'; it has 'body', 'n': .*--text-col"),
    ("no text column in parquet", lambda d: table(d / "a.parquet", body=["x"]), 2, r"it has 'body': choose with --text-c"),
    ("a column with control characters", lambda d: write(d / "a.csv", f"{ESCAPE}\nx\n"), 2, r"no column 'text'; it has '"),
    ("a text column of numbers", lambda d: table(d / "a.parquet", text=[1]), 2, r"'text' holds int64, not strings; cast it"),
    ("an id twice", lambda d: write(d / "a.jsonl", '{"id": "p", "text": "a cat"}\n' * 2), 2, r"id 'p' is there twice: .*or"),
    ("an id with control characters twice", lambda d: write(d / "a.csv", f"id,text\n{ESCAPE},a\n" * 2), 2, r"id .* there twice"),
    ("a damaged parquet file", lambda d: write(d / "a.parquet", "PAR1 no PAR1"), 2, r"a.parquet: .*damaged .*restore it"),
    ("a cut-off gz file", lambda d: write(d / "a.txt.gz", gzip.compress(b"x\n" * 99)[:-9]), 2, r"txt.gz .*damaged .*rest"),
    ("a zst file that is none", lambda d: write(d / "a.jsonl.zst", "no"), 2, r"cannot be read as jsonl.zst .*damaged"),
    ("a dataset out of reach", lambda d: "hf://no/such", 2, r"hf://no/such: the Hub gives no parquet .*hf auth login"),
    ("a dataset named with a secret", lambda d: f"hf://u:{SECRET}@a/b", 2, r"hf://a/b: write hf://dataset\[:config\]"),
    ("an unknown scheme", lambda d: f"foo://u:{SECRET}@b/x.txt", 2, r"foo://b/x.txt: Protocol not known.*give a local path"),
    ("a secret in an s3 URI", lambda d: f"s3://key:{SECRET}@b/x.txt", 2, r"s3://b/x.txt: .*no credentials .*AWS_PROFILE"),
    ("no bucket", lambda d: "s3://", 2, r"s3://: names no bucket; write s3://bucket/path"),
    ("a secret in a query", lambda d: f"http://u:{SECRET}@localhost:1/x.txt?token={SECRET}", 2, r"localhost:1/x.txt: no such"),
    ("a server that is down", lambda d: f"ftp://u:{SECRET}@localhost:1/x", 1, r"ftp://localhost:1/x: .*run the same command"),
    ("an unknown package", lambda d: "pydocs:nosuch", 2, r"no package 'nosuch' is installed here; pip install it"),
]
# fmt: on


@in_process
@pytest.mark.parametrize(("spoil", "code", "words"), [row[1:] for row in CORPORA], ids=[row[0] for row in CORPORA])
def test_a_corpus_that_is(tmp_path: Path, run: Run, spoil: Spoil, code: int, words: str) -> None:
    given = spoil(folder(tmp_path / "corpus"))
    told = run("--corpus", *(given if isinstance(given, list) else [given]))
    assert told.code == code
    assert re.search(words, told.text), told.text


@in_process
def test_a_file_that_may_not_be_read(tmp_path: Path, run: Run, monkeypatch: Patch) -> None:
    """As root nothing is closed, so the refusal is made up."""
    plain = LocalFileSystem._open

    def fail(self: LocalFileSystem, path: str, *rest: object, **options: object) -> object:
        if path.endswith("closed.txt"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return plain(self, path, *rest, **options)

    monkeypatch.setattr(LocalFileSystem, "_open", fail)
    told = run("--corpus", write(tmp_path / "closed.txt", "the bank"))
    assert told.code == 2
    assert re.search(r"closed.txt: no permission to read it .*allow it, or give other credentials", told.text)


@in_process
def test_s3_without_its_package_and_without_credentials(run: Run, monkeypatch: Patch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        patch.setitem(sys.modules, "s3fs", None)
        told = run("--corpus", "s3://b/x.txt")
        assert (told.code, told.text.partition("error: ")[2]) == (
            2,
            "s3://b/x.txt: s3:// needs a package that is not installed: pip install s3fs",
        )
    pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    told = run("--corpus", "s3://b/x.txt")
    assert told.code == 2
    assert re.search(r"s3://b/x.txt: S3 refused .*locate credentials\): give credentials: AWS_PROFILE", told.text)


# --- single documents: skipped and counted, or the run stops

# fmt: off
SKIPPED: list[tuple[str, str, bytes, str, str]] = [
    ("an empty line", "a.txt", b"a cat\n \n", "a.txt:1", "empty"),
    ("a line that is not UTF-8", "a.txt", b"a cat\n\xff\xfe\n", "a.txt:1", "not UTF-8"),
    ("broken JSON", "a.jsonl", b'{"text": "a cat"}\n{"text": \n', "a.jsonl:1", "bad JSON"),
    ("JSON nested too deep", "a.jsonl", b'{"text": "a cat"}\n' + b"[" * 99_999, "a.jsonl:1", "bad JSON"),
    ("a row without text", "a.jsonl", b'{"text": "a cat"}\n{"id": 3}\n', "a.jsonl:1", "no text"),
    ("a csv row that ends early", "a.csv", b"n,text\n1,a cat\n2\n", "a.csv:1", "no text"),
    ("a csv quote left open", "a.csv", b'n,text\n1,a cat\n2,"a\n', "a.csv:1", "bad CSV row"),
    ("an id that is not UTF-8", "a.jsonl", b'{"text": "a cat"}\n{"id": "\\ud800", "text": "x"}', "a.jsonl:1", "not UTF-8"),
    ("50 MB on one line", "a.txt", b"a cat\n%s\nthe end\n", "a.txt:1", "too long"),
]
# fmt: on


@in_process
@pytest.mark.parametrize(
    ("name", "raw", "document", "reason"), [row[1:] for row in SKIPPED], ids=[row[0] for row in SKIPPED]
)
def test_a_bad_document_is_skipped_and_counted_or_stops_a_strict_run(
    tmp_path: Path, run: Run, name: str, raw: bytes, document: str, reason: str
) -> None:
    corpus = write(tmp_path / name, raw.replace(b"%s", b"x" * 50_000_000))
    strict = run("--corpus", corpus, "--on-bad-document", "fail")
    assert strict.code == 2
    assert re.search(rf"bad document {document}: {reason} .*--on-bad-document skip goes past it", strict.text)
    told = run("--corpus", corpus)
    assert told.code == 0
    assert json.loads((told.output / "summary.json").read_text())["stages"]["passages"]["seconds"] < 2
    assert f"skipped 1 bad document (1 {reason}), the first 100 of each kind in bad_documents.jsonl" in told.text
    assert [(bad["id"], bad["reason"]) for bad in told.bad_documents()] == [(document, reason)]


@in_process
def test_the_first_hundred_of_each_reason_are_listed_in_input_order(
    tmp_path: Path, run: Run, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("msense.passages.cut_pieces", lambda files: cut_pieces(files, piece_bytes=100))
    kinds = {b"": "empty", b"\xff": "not UTF-8", b"a cat": ""}
    lines = [b"", b"\xff", b"a cat", b""] * 30
    names = ["a.txt", "b.txt", "c.txt"]
    for name in names:
        write(tmp_path / "corpus" / name, b"\n".join([*lines, b""]))
    bad = [(f"{name}:{row}", kinds[line]) for name in names for row, line in enumerate(lines) if kinds[line]]
    first = [item for n, item in enumerate(bad) if sum(other[1] == item[1] for other in bad[:n]) < 100]
    told = run("--corpus", tmp_path / "corpus")
    assert told.code == 0
    assert len(bad) == 270
    assert "skipped 270 bad documents (180 empty, 90 not UTF-8)" in told.text
    assert [(row["id"], row["reason"]) for row in told.bad_documents()] == first
    assert len(list((tmp_path / "run" / "passages").glob("*.parquet"))) > 3


# --- the teacher


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


def cut(path: Path) -> None:
    write(path, path.read_bytes()[:-100])


def slow(teacher: Path) -> None:
    (teacher / "tokenizer.json").unlink()
    write(teacher / "vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    write(teacher / "tokenizer_config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}')


def module(teacher: Path, kind: str, path: str) -> None:
    write(
        teacher / "modules.json",
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": f"x.{kind}", "path": path}]),
    )


F32 = ("--dtype", "float32")
BF16 = ("--dtype", "bfloat16")
# fmt: off
TEACHERS: list[tuple[str, Spoil, tuple[str, ...], int, str]] = [
    ("unknown to the hub", lambda t: None, ("--teacher", "no/such"), 2, r"'no/such' is no folder .*check the name or give"),
    ("a path that is not there", lambda t: None, ("--teacher", "/no/such"), 2, r"'/no/such': there is no such folder: check"),
    ("a file", lambda t: None, ("--teacher", __file__), 2, r"is a file: give the folder that holds config.json"),
    ("an empty name", lambda t: None, ("--teacher", ""), 2, r"teacher: is empty; give a value, or leave the setting out"),
    ("named far too long", lambda t: None, ("--teacher", "a" * 300), 2, r"no usable name \(File name too long\): give a folder"),
    ("named with control characters", lambda t: None, ("--teacher", f"no/{ESCAPE}"), 2, r"teacher 'no/.* check the name or"),
    ("named with a secret", lambda t: None, ("--teacher", f"https://u:{SECRET}@h/t?x={SECRET}"), 2, r"'https://h/t': .*check"),
    ("an empty folder", lambda t: shutil.rmtree(t) or t.mkdir(), (), 2, r"has no safetensors weights; nothing else"),
    ("without weights", lambda t: (t / "model.safetensors").unlink(), (), 2, r"has no safetensors weights; .*save the model"),
    ("pickled", pickle, (), 2, r"no safetensors weights but pytorch_model.bin; nothing else is read: save the model anew"),
    ("cut off in its weights", lambda t: cut(t / "model.safetensors"), (), 2, r"model.safetensors is damaged .*fetch it again"),
    ("of other weights", lambda t: settings_of(t, num_hidden_layers=3), (), 2, r"lack 16 tensors .*belong together"),
    ("of other shapes", lambda t: settings_of(t, intermediate_size=64), (), 2, r"6 tensors of another shape .*belong togeth"),
    ("lacking a shard", lambda t: write(t / "model.safetensors.index.json", '{"weight_map": {"a": "b"}}'), (), 2, r"file b"),
    ("broken in config.json", lambda t: write(t / "config.json", "{"), (), 2, r"config.json cannot be read as JSON .*restore it"),
    ("of wrong types in config.json", lambda t: settings_of(t, vocab_size="x"), (), 2, r"does not load: .*'vocab_size'"),
    ("of no layers", lambda t: settings_of(t, num_hidden_layers=-2), (), 2, r"gives -2 layers, .*give a model of text"),
    ("of a vocabulary beyond all", lambda t: settings_of(t, vocab_size=10**12), (), 2, r"1000000000000 tokens; a dictionary has"),
    ("of more tokens than weights", lambda t: settings_of(t, vocab_size=4 * 10**6), (), 2, r"promises 4000000 tokens, more"),
    ("too wide for so many senses", lambda t: settings_of(t, hidden_size=50_000), ("--senses", "60000"), 2, r"--senses 5368 or"),
    ("of an unknown architecture", lambda t: settings_of(t, model_type="nosuch"), (), 2, r"type `nosuch` .*transformers knows"),
    ("wanting remote code", remote_code, (), 2, r"contains custom code .*is never run"),
    ("without a tokenizer", lambda t: [f.unlink() for f in t.glob("tok*")], (), 2, r"has no tokenizer: put its tok"),
    ("broken in tokenizer.json", lambda t: write(t / "tokenizer.json", "{"), (), 2, r"its tokenizer does not load: .*tokenizer"),
    ("foreign in tokenizer.json", lambda t: write(t / "tokenizer.json", "[]"), (), 2, r"its tokenizer does not load: "),
    ("of a slow tokenizer", slow, (), 2, r"no fast tokenizer \(tokenizer.json\).*convert it with transformers, or give another"),
    ("smaller than its tokenizer", lambda t: settings_of(t, vocab_size=10), (), 2, r"25 tokens, its model only 10 embeddings"),
    ("of a module that is not there", lambda t: module(t, "Pooling", "p"), (), 2, r"folder 'p', which is not there: fetch"),
    ("of a module outside", lambda t: module(t, "Pooling", "../p"), (), 2, r"'../p', which leaves the folder: give a teacher"),
    ("of a module with control characters", lambda t: module(t, ESCAPE, "p"), (), 0, r"teacher's red1m module is left out"),
    ("asked for a layer it lacks", lambda t: None, ("--layer", "9"), 2, r"layer 9 is not .*0 \(embeddings\) to 2; choose with"),
    ("asked for too long passages", lambda t: None, ("--max-length", "65"), 2, r"65 is more than the 64 .*can read: lower it"),
    ("asked for too wide a stride", lambda t: None, ("--stride", "62"), 2, r"stride 62 must be smaller than the 62 .*lower it"),
    ("asked for too long a prompt", lambda t: None, ("--prompt", "a " * 70), 2, r"70 tokens of prompt .*or shorten --prompt"),
    ("of NaN embeddings", lambda t: bias(t, float("nan")), F32, 1, r"NaN or infinite embeddings in float32: .*check its weights"),
    ("of NaN in bfloat16", lambda t: bias(t, float("nan")), BF16, 1, r"NaN or infinite .*in bfloat16: give --dtype float32"),
    ("of infinite embeddings", lambda t: bias(t, float("inf")), F32, 1, r"NaN or infinite embeddings in float32"),
    ("of embeddings too large", lambda t: bias(t, 1e10), F32, 1, r"too large for float16: give --store-dtype bfloat16"),
    ("of large ones in bfloat16", lambda t: bias(t, 1e10), (*F32, "--store-dtype", "bfloat16"), 0, r"dictionary"),
    ("of embeddings too large for all", lambda t: bias(t, 1e30), (*F32, "--store-dtype", "bfloat16"), 1, r"of 1e\+30, but"),
]
# fmt: on


@in_process
@pytest.mark.parametrize(
    ("spoil", "flags", "code", "words"), [row[1:] for row in TEACHERS], ids=[row[0] for row in TEACHERS]
)
def test_a_teacher_that_is(
    teacher: Path, run: Run, spoil: Spoil, flags: tuple[str, ...], code: int, words: str
) -> None:
    spoil(teacher)
    told = run(*flags)
    assert told.code == code
    assert re.search(words, told.text), told.text
    assert not (teacher / "ran").exists()


# --- the settings


def yaml(content: str) -> Spoil:
    return lambda d: ["--config", write(d / "run.yaml", content)]


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(b)}: &{chr(b)} [*{chr(b - 1)}{f', *{chr(b - 1)}' * 9}]\n" for b in range(98, 110)
)
# fmt: off
SETTINGS: list[tuple[str, Spoil, str]] = [
    ("no senses", lambda d: ["--senses", "0"], r"senses: must be a number from 1 to 65534, .*\(given: '0'\)"),
    ("too many senses", lambda d: ["--senses", "70000"], r"senses: must be a number from 1 to 65534, .*\(given: '70000'\)"),
    ("a budget in letters", lambda d: ["--sense-budget", "much"], r"sense_budget: must be an average .* or a size, .*'much'"),
    ("a budget below one sense", lambda d: ["--sense-budget", "0.5"], r"sense_budget: must be an average from 1 on.*'0.5'"),
    ("a budget beside a number", lambda d: ["--senses", "9", "--sense-budget", "7"], r"sense_budget: is for senses auto, not 9"),
    ("mcl beside auto", lambda d: ["--mcl", "inflation=2"], r"mcl: is for senses mcl, not auto: leave it out, or"),
    ("an unknown option of mcl", lambda d: ["--mcl", "power=2"], r"mcl: power is no option of mcl; these are: expansion"),
    ("an option of mcl without value", lambda d: ["--mcl", "inflation"], r"mcl: inflation has no value; give name=value"),
    ("mcl without inflation", lambda d: ["--mcl", "inflation=1"], r"mcl: Markov .*inflation is 1.0, but must be above 1"),
    ("half an expansion", lambda d: ["--mcl", "expansion=2.5"], r"mcl: expansion: .*integer"),
    ("no runs of k-means", lambda d: ["--n-init", "0"], r"n_init: .*greater than or equal to 1"),
    ("senses in letters", lambda d: ["--senses", "abc"], r"senses: must be a number from 1 to 65534, .*\(given: 'abc'\)"),
    ("a cap beyond all", lambda d: ["--max-occurrences", "9" * 30], r"max_occurrences: .*less than or equal to 2147483647"),
    ("an unknown flag", lambda d: ["--colour", ESCAPE], r"unrecognized arguments: --colour red"),
    ("an unknown key", yaml("sense: 3"), r"sense: there is no such setting; is it senses\? \(given: 3\)"),
    ("wrong types", yaml("layer: x\ndedup: maybe\nkeep: {a: b}"), r"dedup: .*boolean.*layer: .*integer.*keep: .*tuple"),
    ("a list for a file", yaml("- 1"), r"run.yaml' must hold `setting: value` lines, found a list"),
    ("YAML that does not parse", yaml("a: ["), r"cannot read the config file .*It must be UTF-8 text of `setting: value`"),
    ("YAML that is not UTF-8", yaml("\udcff"), r"cannot read the config file .*'utf-8' codec"),
    ("YAML that runs commands", yaml("seed: !!python/object/apply:os.system ['touch ran']"), r"could not determine a constr"),
    ("YAML of terabytes", yaml(BOMB), r"a: there is no such setting \(given: \['x', 'x'\]\)"),
    ("YAML nested too deep", yaml("a: " + "[" * 3000), r"cannot read the config file .*recursion"),
    ("YAML that quotes a secret", yaml(f"keep: s3://k:{SECRET}@b?t={SECRET}"), r"keep.0: .*given: 's3://b'"),
    ("a missing file", lambda d: ["--config", d / "none.yaml"], r"none.yaml': .*No such file"),
    ("no file name", lambda d: ["--config", ""], r"cannot read the config file ''"),
    ("an output that is a file", lambda d: ["--output", write(d / "o", "")], r"output: .*/o is a file; name a folder"),
    ("an output below a file", lambda d: ["--output", write(d / "o", "") / "p/q"], r"output: .*/o is a file; name a folder"),
    ("an empty output", lambda d: ["--output", ""], r"output: is empty; give a value"),
    ("an output with a secret", lambda d: ["--output", f"s3://k:{SECRET}@b/x"], r"output: takes no credentials in the URI"),
    ("an output on the web", lambda d: ["--output", "hf://a/b"], r"nothing can be written to hf://; give a local folder"),
]
# fmt: on


@in_process
@pytest.mark.parametrize(("spoil", "words"), [row[1:] for row in SETTINGS], ids=[row[0] for row in SETTINGS])
def test_wrong_settings_end_with_2(tmp_path: Path, run: Run, monkeypatch: Patch, spoil: Spoil, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    told = run(*spoil(tmp_path))
    assert told.code == 2
    assert re.search(words, told.text), told.text
    assert not (tmp_path / "ran").exists()


@in_process
def test_all_wrong_settings_are_told_at_once(tmp_path: Path, run: Run) -> None:
    told = run(*yaml("colour: red\nsenses: few\n")(tmp_path), "--coverage", "1.5", "--metric", "l3", "--stride", "-1")
    assert told.code == 2
    for words in ("colour: there is no such", "senses: must be a number", "coverage: ", "metric: ", "stride: "):
        assert words in told.text


@in_process
def test_an_output_that_may_not_be_written(tmp_path: Path, run: Run, monkeypatch: Patch) -> None:
    """As root nothing is closed, so the refusal is made up."""
    plain = os.mkdir

    def fail(path: object, *rest: object, **options: object) -> None:
        if "closed" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        plain(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", fail)
    told = run("--output", tmp_path / "closed" / "run")
    assert told.code == 1
    assert re.search(r"Permission denied.*closed", told.text)


@in_process
def test_a_setting_that_was_mended_goes_into_the_same_folder(tmp_path: Path, run: Run) -> None:
    """The remedy that an error names must work: nothing of the failed run may stand against it."""
    corpus = write(tmp_path / "a.jsonl", '{"body": "the bank"}\n')
    assert "choose with --text-column" in run("--corpus", corpus).text
    assert run("--corpus", corpus, "--text-column", "body").code == 0


# --- fewer senses than asked for


@in_process
def test_a_token_has_at_most_as_many_senses_as_different_embeddings(
    tmp_path: Path, run: Run, make_teacher: MakeTeacher
) -> None:
    corpus = write(tmp_path / "a.txt", "a cat\na cat\na cat sat\nthe cat\na dog\n")
    told = run("--corpus", corpus, *F32, "--senses", 50)
    assert told.code == 0
    dictionary = SenseDictionary.load(told.output)
    cat, dog = (dictionary.find(word).tokens[0].token_id for word in ("cat", "dog"))
    assert sorted(dictionary.senses(cat).counts.tolist()) == [1, 1, 2]  # "a cat" is there twice
    assert dictionary.senses(dog).counts.tolist() == [1]
    shutil.rmtree(told.output)
    assert run("--corpus", corpus, *F32, "--teacher", make_teacher("llama"), "--layer", 0, "--senses", 3).code == 0
    senses = SenseDictionary.load(told.output).senses
    token = SenseDictionary.load(told.output).find("cat").tokens[0].token_id
    assert senses(token).counts.tolist() == [4]  # layer 0 has one embedding a token


# --- through Ray's workers


@pytest.fixture
def quiet_ray(ray: None, monkeypatch: Patch) -> None:
    """Ray as a job has it: the job asks for errors only before Ray Data is imported, which a test comes too late for."""
    import ray.data  # noqa: F401

    monkeypatch.setattr(logging.getLogger("ray.data"), "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logging.getLogger("ray.data"), "propagate", False)


@pytest.mark.usefixtures("quiet_ray")
def test_a_bad_document_in_a_ray_task_is_told_plainly(tmp_path: Path, run: Run) -> None:
    told = run("--corpus", write(tmp_path / "a.txt", b"a cat\n\xff\n"), "--on-bad-document", "fail")
    assert told.code == 2
    assert re.search(r"error: bad document a.txt:1: not UTF-8 .*--on-bad-document skip goes past it$", told.text)
    assert not re.search(r"RayTaskError|ray::|ray\.exceptions", told.text)


@pytest.mark.usefixtures("quiet_ray")
def test_a_teacher_that_fails_in_a_ray_actor_is_told_plainly(teacher: Path, run: Run) -> None:
    settings_of(teacher, num_hidden_layers=3)
    told = run()
    assert told.code == 2
    assert re.search(r"error: the weights of teacher .* lack 16 tensors .*config.json belong together$", told.text)
    assert not re.search(r"RayTaskError|ray::|ray\.exceptions", told.text)
