"""Resumed runs: changes that are refused, changes that do not matter, files left behind, and `status`."""

import os
import pkgutil
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from faulty import ALL, Corpus, Outcome, flip_a_byte

from msense.cli.status import show_status
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.pipelines import build as build_module
from msense.pipelines.manifest import PINNED_PACKAGES
from msense.run.folder import RunFolder
from msense.teacher.spec import load_teacher_info

pytestmark = pytest.mark.usefixtures("in_process")

INSIDE = {
    "passages": "msense.stages.passages.write_passages",
    "plan": "msense.stages.plan._select",
    "occurrences": "msense.stages.embed.select_occurrences",
    "senses": "msense.stages.sense_counts.sample",
    "clustering": "msense.stages.cluster.read_ranges",
    "large tokens": "msense.stages.distributed_kmeans.prepare",
    "exemplars": "msense.stages.exemplars._context",
    "dictionary": "msense.stages.assemble.write_dictionary",
}


@contextmanager
def restored(text: Path) -> Iterator[None]:
    """Restore the content and times of a file at the end."""
    before, times = text.read_bytes(), text.stat()
    try:
        yield
    finally:
        text.write_bytes(before)
        os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_changed_inputs_are_refused_by_name(made: Corpus, patch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    made.build("run")
    before = made.files("run")
    afresh = r"[\s\S]*start afresh, give another --output or delete"
    for setting, value in (("senses", 5), ("metric", "cosine"), ("seed", 1), ("max_occurrences", 7), ("stride", 1)):
        with pytest.raises(InputError, match=rf"config\.{setting}: .* then, {value!r} now{afresh}"):
            made.build("run", **{setting: value})
    version = metadata.version
    for package in PINNED_PACKAGES:
        patch.setattr(
            "msense.run.manifest.metadata.version",
            lambda name, other=package: "0.9" if name == other else version(name),
        )
        with pytest.raises(InputError, match=rf"pins\.{package}: '.*' then, '0\.9' now{afresh}"):
            made.build("run")
    patch.undo()
    weights = made.teacher / "model.safetensors"
    data = weights.read_bytes()
    flip_a_byte(weights)
    with pytest.raises(InputError, match=rf"teacher\.fingerprint: .* then, .* now{afresh}"):
        made.build("run")
    weights.write_bytes(data)
    text = made.folder / "corpus" / "a.txt"
    refused = pytest.raises(InputError, match=rf"inputs\.a\.txt: .* then, .* now{afresh}")
    with restored(text), refused:
        text.write_bytes(text.read_bytes() + b"one more\n")
        made.build("run")
    (made.folder / "corpus" / "c.txt").write_text("the bank\n")
    with pytest.raises(InputError, match=rf"inputs\.c\.txt: None then, .* now{afresh}"):
        made.build("run")
    (made.folder / "corpus" / "c.txt").unlink()
    made.build("run", workers=3, log_level="warning", max_points_per_part=2048, keep=("passages",))
    assert made.files("run") == before
    for stage, function in INSIDE.items():
        made.stop_at(function, stage, calls=2 if stage == "passages" else 1)  # the second of two files
        with pytest.raises(InputError, match=rf"config\.senses: 'auto' then, 5 now{afresh}"):
            made.build(stage, senses=5)
        outcome("input changed", stage, "refused")


def test_a_corpus_that_changes_while_it_is_read_is_refused(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    from msense.corpus.chunking import write_passages
    from msense.stages import passages

    write, text = write_passages, made.folder / "corpus" / "b.txt"

    def meddling(*arguments: object) -> dict:
        text.write_text("the cat\n")
        return write(*arguments)

    made.build("whole")
    monkeypatch.setattr(passages, "write_passages", meddling)
    refused = pytest.raises(InputError, match=r"the corpus changed while it was read: b\.txt was .*, is ")
    with restored(text), refused:
        made.build("run")
    monkeypatch.setattr(passages, "write_passages", write)
    made.build("run")  # uses nothing of the changed file
    assert made.files("run") == made.files("whole")


def test_weights_that_change_before_they_are_loaded_are_refused(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = load_teacher_info

    def then_change(*arguments: object) -> object:
        found = describe(*arguments)
        flip_a_byte(made.teacher / "model.safetensors")
        return found

    monkeypatch.setattr(build_module, "describe", then_change)
    with pytest.raises(MsenseError, match=r"the weights of teacher .* changed, or this node has others"):
        made.build("run")


def test_files_made_from_other_inputs_do_not_count(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a killed driver may write late, after the folder was reused with other settings."""
    made.build("whole", keep=ALL)
    made.build("other", seed=1, keep=ALL)

    def late(run: RunFolder) -> None:
        for name in ("passages", "plan", "occurrences", "centroids"):
            if not (made.folder / "run" / name).exists():
                shutil.copytree(made.folder / "other" / name, made.folder / "run" / name)

    monkeypatch.setattr(build_module, "sweep", late)
    made.build("run", keep=ALL)
    assert made.files("run") == made.files("whole")
    assert made.journal()[-1]["stages"]["occurrences"]["kept"] == 0


def test_a_strict_run_refuses_what_a_finished_run_skipped(made: Corpus) -> None:
    made.build("run")
    with pytest.raises(InputError, match=r"bad documents \(2 empty\)"):
        made.build("run", on_bad_document="fail")


def test_a_finished_run_may_be_moved(made: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    made.build("run")
    (made.folder / "run").rename(made.folder / "moved")
    assert made.build("moved")["dictionary"] == str(made.folder / "moved" / "dictionary")
    show_status(str(made.folder / "moved"))
    assert "run/dictionary" not in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("stage", INSIDE)
def test_a_second_driver_is_refused_in_each_stage(
    made: Corpus, stage: str, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    function = pkgutil.resolve_name(INSIDE[stage])
    refused = []

    def meanwhile(*arguments: object) -> object:
        with pytest.raises(
            InputError, match=rf"another driver works on .*run \(process {os.getpid()} on host .*\): wait"
        ):
            made.build("run")
        refused.append(stage)
        return function(*arguments)

    monkeypatch.setattr(INSIDE[stage], meanwhile)
    made.build("run")
    assert refused
    assert len(made.journal()) == 1
    outcome("second driver", stage, "refused")


def test_same_bytes_after_the_corpus_moved_and_in_another_order_of_roots(made: Corpus) -> None:
    second = made.folder / "more"
    second.mkdir()
    (second / "z.txt").write_text("the deep river is near\n")
    here = (str(made.folder / "corpus"), str(second))
    made.build("whole", corpus=here)
    made.stop_at("msense.stages.cluster.cluster", corpus=here)
    moved = made.folder / "elsewhere"
    moved.mkdir()
    for name in ("corpus", "more"):
        (made.folder / name).rename(moved / name)
    made.build("run", corpus=(str(moved / "more"), str(moved / "corpus")))
    assert made.files("run") == made.files("whole")
    assert made.journal()[-1]["stages"]["passages"] == {"kept": 3, "damaged": 0, "made": 0}
    manifest = (made.folder / "run" / "manifest.json").read_text()
    pins = storage.read_json(RunFolder(str(made.folder / "run")).manifest)["pins"]
    assert {"dtype", "device", "token_budget", "threads", "tf32", "python", *PINNED_PACKAGES} == set(pins)
    assert str(made.folder) not in manifest.partition('"inputs"')[2]


@pytest.mark.parametrize("keep", [(), ("occurrences", "centroids"), ALL])
def test_only_what_keep_names_is_left(made: Corpus, keep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = made.folder / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    made.stop_at("msense.stages.exemplars._context", keep=keep)
    tokenizer = made.folder / "run" / "dictionary" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for temporary in ("../../plan/.plan.safetensors.0123abcd.part", ".tokenizer.json.89ef0123.part"):
        (tokenizer / temporary).write_bytes(b"left by a killed process")
    made.build("run", keep=keep)
    always = {".lock", "bad_documents.jsonl", "dictionary", "finished.json", "journal.json", "manifest.json", "plan"}
    always |= {"summary.json", "tokenizer.json"} | ({"senses"} if "centroids" in keep else set())
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
    with pytest.raises(InputError, match=r"passages is there, but no manifest\.json"):
        made.build("other")
    assert (made.folder / "other" / "passages").exists()


def test_status_reports_what_each_driver_kept_and_made(
    whole: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole.folder / "stopped" / "finished.json").unlink()
    unit = whole.folder / "stopped" / "occurrences" / "000001.records"
    flip_a_byte(unit)
    (whole.folder / "stopped" / "occurrences" / "000002.records.done").unlink()
    units = len(list(unit.parent.glob("*.records")))
    whole.build("stopped", keep=ALL)
    monkeypatch.setenv("COLUMNS", "400")
    show_status(str(whole.folder / "stopped"))
    shown = capsys.readouterr().out
    assert re.search(r" points, at most [0-9]+ senses per token *\n", shown)
    first, second = [line for line in shown.splitlines() if line.startswith("driver")]
    assert f"occurrences {units} made" in first
    assert "failed: StoppedError" in first
    assert f"occurrences {units - 2} kept + 1 damaged + 2 made" in second
    assert second.rstrip().endswith("finished")
    run = RunFolder(str(whole.folder / "stopped"))
    drivers = storage.read_json(run.journal)["drivers"]
    storage.write_json(run.journal, {"drivers": [*drivers, {**drivers[0], "stages": {"plan": {}}, "outcome": ""}]})
    show_status(run.root)
    assert "plan started. no outcome recorded: running or killed (process" in capsys.readouterr().out
