"""Resumed runs: changes that are refused, changes that do not matter, files left behind, and `status`."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from executors import INSIDE, StoppedError, before
from faulty import ALL, PLACES, Corpus, Outcome, flip_a_byte

from msense.cli.status import show_status
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.pipelines.job import PINNED_PACKAGES
from msense.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("in_process")


@contextmanager
def restored(text: Path) -> Iterator[None]:
    """Restore the content and times of a file at the end."""
    before, times = text.read_bytes(), text.stat()
    try:
        yield
    finally:
        text.write_bytes(before)
        os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))


AFRESH = r"[\s\S]*another --output"


def test_changed_inputs_are_refused_by_name(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    made.build("run")
    finished = made.files("run")
    for setting, value in (("senses", 5), ("metric", "cosine"), ("seed", 1), ("max_occurrences", 7), ("stride", 1)):
        with pytest.raises(InputError, match=rf"config\.{setting}: .* before, {value!r} now{AFRESH}"):
            made.build("run", **{setting: value})
    version = metadata.version
    for package in PINNED_PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", lambda name, own=package: "0.9" if name == own else version(name))
            with pytest.raises(InputError, match=rf"pins\.{package}: '.*' before, '0\.9' now{AFRESH}"):
                made.build("run")
    text, more = made.folder / "corpus" / "a.txt", made.folder / "corpus" / "c.txt"
    with restored(made.teacher / "model.safetensors"):
        flip_a_byte(made.teacher / "model.safetensors")
        with pytest.raises(InputError, match=rf"teacher\.fingerprint: .* before, .* now{AFRESH}"):
            made.build("run")
    with restored(text):
        text.write_bytes(text.read_bytes() + b"one more\n")
        with pytest.raises(InputError, match=rf"inputs\.a\.txt: .* before, .* now{AFRESH}"):
            made.build("run")
    more.write_text("the bank\n")
    with pytest.raises(InputError, match=rf"inputs\.c\.txt: None before, .* now{AFRESH}"):
        made.build("run")
    more.unlink()
    made.build("run", log_level="warning", max_points_per_part=2048, keep=("passages",))
    assert made.files("run") == finished


def test_a_second_driver_and_changed_settings_are_refused_in_each_stage(made: Corpus, outcome: Outcome) -> None:
    """A build is interrupted by a second driver, then stops, in one stage after the other."""
    for stage in PLACES:

        def meanwhile() -> None:
            with pytest.raises(InputError, match=rf"another driver .*run.* \(process {os.getpid()} on host .*\): wait"):
                made.build("run")
            raise StoppedError

        with pytest.raises(StoppedError):
            made.build("run", before(INSIDE[stage][0], meanwhile, INSIDE[stage][1]))
        outcome("second driver", stage, "refused")
        with pytest.raises(InputError, match=rf"config\.senses: 'auto' before, 5 now{AFRESH}"):
            made.build("run", senses=5)
        outcome("input changed", stage, "refused")
    assert len(made.journal()) == len(PLACES)


def test_inputs_that_change_while_they_are_read_are_refused(made: Corpus) -> None:
    text, weights = made.folder / "corpus" / "b.txt", made.teacher / "model.safetensors"
    made.build("whole")
    with restored(text), pytest.raises(InputError, match=r"the corpus changed while it was read: b\.txt was .*, is "):
        made.build("run", before("passages", lambda: text.write_text("the cat\n"), 2))
    with restored(weights), pytest.raises(MsenseError, match=r"the weights of teacher .* changed"):
        made.build("run", before("write", lambda: flip_a_byte(weights)))
    made.build("run")  # uses nothing of the changed files
    assert made.files("run") == made.files("whole")


def test_files_made_from_other_inputs_do_not_count(made: Corpus) -> None:
    """A worker of a killed driver may write late, after the folder was reused with other settings."""
    made.build("whole", keep=ALL)
    made.build("other", seed=1, keep=ALL)
    made.stop_at("passages")
    for name in ("passages", "plan", "occurrences", "centroids"):
        shutil.copytree(made.folder / "other" / name, made.folder / "run" / name, dirs_exist_ok=True)
    made.build("run", keep=ALL)
    assert made.files("run") == made.files("whole")
    assert made.journal()[-1]["stages"]["embed"]["kept"] == 0


def test_a_finished_run_may_be_moved(made: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    made.build("run")
    (made.folder / "run").rename(made.folder / "moved")
    assert made.build("moved")["dictionary"] == str(made.folder / "moved" / "dictionary")
    show_status(str(made.folder / "moved"))
    assert "run/dictionary" not in capsys.readouterr().out.replace("\n", "")


def test_same_bytes_after_the_corpus_moved_and_in_another_order_of_roots(made: Corpus) -> None:
    second = made.folder / "more"
    second.mkdir()
    (second / "z.txt").write_text("the deep river is near\n")
    here = (str(made.folder / "corpus"), str(second))
    made.build("whole", corpus=here)
    made.stop_at("clustering", corpus=here)
    moved = made.folder / "elsewhere"
    moved.mkdir()
    for name in ("corpus", "more"):
        (made.folder / name).rename(moved / name)
    made.build("run", corpus=(str(moved / "more"), str(moved / "corpus")))
    assert made.files("run") == made.files("whole")
    assert made.journal()[-1]["stages"]["passages"] == {"kept": 3, "damaged": 0, "made": 0}
    manifest = (made.folder / "run" / "manifest.json").read_text()
    pins = storage.read_json(RunFolder(str(made.folder / "run")).manifest)["pins"]
    assert {"stages", "dtype", "device", "token_budget", "threads", "tf32", "python", *PINNED_PACKAGES} == set(pins)
    assert str(made.folder) not in manifest.partition('"inputs"')[2]


@pytest.mark.parametrize("keep", [(), ("occurrences", "centroids"), ALL])
def test_only_what_keep_names_is_left(made: Corpus, keep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = made.folder / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    made.stop_at("exemplars", keep=keep)
    tokenizer = made.folder / "run" / "dictionary" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for temporary in ("../../plan/.plan.safetensors.0123abcd.part", ".tokenizer.json.89ef0123.part"):
        (tokenizer / temporary).write_bytes(b"left by a killed process")
    made.build("run", keep=keep)
    always = {".lock", "bad_documents.jsonl", "dictionary", "finished.json", "journal.json", "manifest.json", "plan"}
    always |= {"summary.json", "teacher.json", "tokenizer.json"} | ({"senses"} if "centroids" in keep else set())
    left = {path.name for path in (made.folder / "run").iterdir()}
    assert left | {".lock"} == always | set(keep)
    assert not list((made.folder / "run").rglob(".*.part"))
    assert not list((made.folder / "run").rglob("*-round*"))
    assert not list(scratch.iterdir())


def test_foreign_files_are_not_removed(made: Corpus) -> None:
    """Not even those named like temporary files."""
    (made.folder / "run" / "mine").mkdir(parents=True)
    mine = [made.folder / "run" / name for name in (".x.part", ".x.0123abcd.part", "mine/.x.0123abcd.part")]
    for path in mine:
        path.write_text("mine")
    made.build("run", keep=())
    assert [path.read_text() for path in mine] == ["mine"] * 3
    (made.folder / "other" / "passages").mkdir(parents=True)
    with pytest.raises(InputError, match=r"passages exists without manifest\.json"):
        made.build("other")
    assert (made.folder / "other" / "passages").exists()


def test_status_reports_what_each_driver_kept_and_made(
    made: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.stop_at("assemble", keep=ALL)
    file = made.folder / "run" / "occurrences" / "000001.records"
    flip_a_byte(file)
    (made.folder / "run" / "occurrences" / "000002.records.done").unlink()
    partitions = len(list(file.parent.glob("*.records")))
    made.build(keep=ALL)
    monkeypatch.setenv("COLUMNS", "400")
    run = RunFolder(str(made.folder / "run"))
    show_status(run.root)
    shown = capsys.readouterr().out
    assert re.search(r" points, at most [0-9]+ senses per token *\n", shown)
    first, second = [line for line in shown.splitlines() if line.startswith("driver")]
    assert f"embed {partitions} made" in first
    assert "failed: StoppedError" in first
    assert f"embed {partitions - 2} kept + 1 damaged + 2 made" in second
    assert second.rstrip().endswith("finished")
    drivers = made.journal()
    storage.write_json(run.journal, {"drivers": [*drivers, {**drivers[0], "stages": {"plan": {}}, "outcome": ""}]})
    show_status(run.root)
    assert "plan started. no outcome recorded: running or killed (process" in capsys.readouterr().out
