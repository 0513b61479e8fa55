"""Faults of files, disks and rights, in every stage of a build without Ray: found, told, and mended by the next run."""

import itertools
import os
import pkgutil
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from msense import assemble, storage
from msense import build as build_module
from msense.build import build_dictionary
from msense.config import BuildConfig
from msense.errors import BadInput, MsenseError
from msense.manifest import PINNED_PACKAGES
from msense.occurrences import record_type
from msense.run_folder import RunFolder
from msense.status import show_status

pytestmark = pytest.mark.usefixtures("in_process")
MakeTeacher = Callable[..., Path]
Outcome = Callable[[str, str, str], None]
WORDS = ["the", "bank", "river", "money", "of", "is", "near", "deep", "full", "a", "cat", "dog", "sat", "on", "mat"]
ALL = ("passages", "occurrences", "centroids")

# a file of each kind, by stage: all that a driver stopped at its very end leaves behind
FILES = {
    "passages": ("passages/000000.parquet", "passages/000001.parquet.done", "passages/000000.bad.json"),
    "plan": ("plan/plan.safetensors", "plan/blocks.parquet", "plan/duplicates.safetensors", "plan/plan.safetensors.done"),
    "occurrences": ("occurrences/000001.records", "occurrences/000002.records.done", "occurrences/index.safetensors"),
    "senses": ("senses/000001.safetensors", "senses/000002.safetensors.done", "senses/senses.safetensors"),
    "clustering": ("centroids/000001.safetensors", "centroids/000002.safetensors.done"),
    "large tokens": ("centroids/token-00000004.safetensors", "centroids/token-00000004.safetensors.done"),
    "exemplars": ("contexts/index.parquet", "contexts/000001.parquet", "contexts/000002.parquet.done"),
    "dictionary": (
        "dictionary/dictionary.safetensors",
        "dictionary/config.json",
        "dictionary/exemplars.parquet",
        "dictionary/tokenizer/tokenizer.json",
        "dictionary/README.md",
        "finished.json",
    ),
}  # fmt: skip


class StoppedError(BaseException):
    """The process ends here."""


class Corpus:
    """A corpus and a teacher in a folder, and what a build of them gives."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        (folder / "corpus").mkdir()
        chances = np.array([12, 6] + [1] * 13) / 31
        for name in "ab":
            lines = [" ".join(rng.choice(WORDS, 24, p=chances)) for _ in range(150)]
            (folder / "corpus" / f"{name}.txt").write_text("\n".join([*lines, *lines[:5], ""]) + "\n")
        self.teacher = shutil.copytree(teacher, folder / "teacher")
        self.settings = {"corpus": (str(folder / "corpus"),), "teacher": str(self.teacher), "dtype": "float32"}
        self.settings |= {"max_occurrences": 6000, "max_points_per_part": 1024, "dedup": True}

    def build(self, name: str = "run", **settings: object) -> dict:
        return build_dictionary(BuildConfig(**{**self.settings, "output": str(self.folder / name), **settings}))

    def stop_at(self, function: str, name: str = "run", calls: int = 1, **settings: object) -> None:
        """Build until a function is called so often."""
        real, counted = pkgutil.resolve_name(function), itertools.count(1)

        def stop(*arguments: object) -> object:
            if next(counted) == calls:
                raise StoppedError
            return real(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(function, stop)
            with pytest.raises(StoppedError):
                self.build(name, **settings)

    def files(self, name: str, below: str = "dictionary", markers: bool = True) -> dict[str, bytes]:
        folder = self.folder / name / below
        files = (p for p in sorted(folder.rglob("*")) if p.is_file() and (markers or p.suffix != ".done"))
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    def journal(self, name: str = "run") -> list[dict]:
        return storage.read_json(RunFolder(str(self.folder / name)).journal)["drivers"]


@pytest.fixture
def made(tmp_path: Path, make_teacher: MakeTeacher) -> Corpus:
    return Corpus(tmp_path, make_teacher("bert"))


@pytest.fixture
def whole(made: Corpus) -> Corpus:
    """With "whole", a finished run that keeps all; and "stopped", the same, stopped just before it dropped contexts."""
    made.build("whole", keep=ALL)
    made.stop_at("msense.build._drop_intermediates", "stopped", keep=ALL)
    return made


def records(made: Corpus, name: str) -> tuple[int, int]:
    """Return the number of stored occurrences, and of different ones."""
    found = [
        np.fromfile(path, record_type(16))[["row", "position"]].tolist()
        for path in sorted((made.folder / name / "occurrences").glob("*.records"))
    ]
    places = [(unit, *place) for unit, rows in enumerate(found) for place in rows]
    return len(places), len(set(places))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


DAMAGES = {"file cut short": cut_short, "file gone": Path.unlink, "byte flipped": flip_a_byte}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_made_again(whole: Corpus, damage: str, outcome: Outcome) -> None:
    for stage, names in FILES.items():
        for name in names:
            shutil.rmtree(whole.folder / "run", ignore_errors=True)
            shutil.copytree(whole.folder / "stopped", whole.folder / "run")
            if stage != "dictionary":  # of a finished dictionary nothing else is looked at
                (whole.folder / "run" / "finished.json").unlink()
            DAMAGES[damage](whole.folder / "run" / name)
            whole.build("run", keep=ALL)
            for below in ("dictionary", "occurrences", "centroids", "passages", "plan"):
                assert whole.files("run", below, markers=False) == whole.files("whole", below, markers=False), name
            assert records(whole, "run") == records(whole, "whole")
            stages = whole.journal()[-1]["stages"]
            own = "clustering" if stage == "large tokens" else stage
            again = name == "occurrences/index.safetensors"  # is always made
            assert again or stages[own].get("made"), (name, stages)
            assert sum(counts.get("made", 0) for counts in stages.values()) <= 5, (name, stages)
        outcome(damage, stage, "made again")


def test_any_byte_of_any_file_may_flip(whole: Corpus) -> None:
    """Every file of a stopped run once, another byte each."""
    rng = np.random.default_rng(0)
    (whole.folder / "stopped" / "finished.json").unlink()
    names = sorted(str(p.relative_to(whole.folder / "stopped")) for p in (whole.folder / "stopped").rglob("*"))
    names = [n for n in names if (whole.folder / "stopped" / n).is_file() and n not in ("manifest.json", ".lock")]
    assert len(names) > 60
    for name in names:
        shutil.copytree(whole.folder / "stopped", whole.folder / "run")
        data = bytearray((whole.folder / "run" / name).read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (whole.folder / "run" / name).write_bytes(data)
        whole.build("run", keep=ALL)
        for below in ("dictionary", "plan", *ALL):
            assert whole.files("run", below, markers=False) == whole.files("whole", below, markers=False), name
        shutil.rmtree(whole.folder / "run")


def test_a_damaged_or_missing_manifest_is_refused(whole: Corpus) -> None:
    manifest = whole.folder / "stopped" / "manifest.json"
    flip_a_byte(manifest)
    with pytest.raises(BadInput, match=r"manifest\.json is damaged: .*start afresh, give another --output or delete"):
        whole.build("stopped")
    manifest.unlink()
    with pytest.raises(BadInput, match=r"passages is there, but no manifest\.json .* give another --output or delete"):
        whole.build("stopped")
    assert (whole.folder / "stopped" / "dictionary" / "config.json").exists()


# --- a disk that is full, rights that are lost ------------------------------------------------------------------------

PLACES = {
    "passages": "passages/000001.parquet",
    "plan": "plan/blocks.parquet",
    "occurrences": "occurrences/000002.records",
    "senses": "senses/senses.safetensors",
    "clustering": "centroids/000001.safetensors",
    "large tokens": "centroids/token-00000004-round.safetensors",
    "exemplars": "contexts/000001.parquet",
    "dictionary": "dictionary/dictionary.safetensors",
}


def fails_then_resumes(made: Corpus, told: str, mend: Callable[[], None]) -> None:
    """Check that a build fails in plain words and loses nothing finished, and that the next one ends as if nothing was."""
    with pytest.raises(MsenseError, match=told):
        made.build("run", keep=ALL)
    mend()
    assert made.journal()[-1]["outcome"].startswith("failed: cannot write")
    assert not list((made.folder / "run").rglob(".*.part"))
    units = {path: path.stat().st_mtime_ns for path in (made.folder / "run").rglob("*.records.done")}
    made.build("run", keep=ALL)
    assert made.files("run") == made.files("whole")
    assert records(made, "run") == records(made, "whole")
    assert {path: path.stat().st_mtime_ns for path in units} == units


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Patches that a test may undo without undoing those of its fixtures."""
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.mark.parametrize("stage", PLACES)
def test_a_full_disk_is_told_and_the_next_run_goes_on(
    made: Corpus, stage: str, patch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    """The system itself refuses more than some bytes a file, in the midst of a write, whoever writes."""
    import resource

    made.build("whole", keep=ALL)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            if function is rename_into and not str(arguments[0]).endswith(PLACES[stage]):
                return function(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                return function(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        return call

    rename_into = storage._rename_into
    patch.setattr(storage, "_rename_into", limited(rename_into))
    if stage == "dictionary":
        patch.setattr("msense.assemble.write_dictionary", limited(assemble.write_dictionary))
    where = re.escape(PLACES[stage]) if stage != "dictionary" else "dictionary"
    fails_then_resumes(made, rf"cannot write .*{where}: no space left \(.*File too large.*\); free some", patch.undo)
    outcome("disk full", stage, "told; next run goes on")


@pytest.fixture
def as_nobody(make_teacher: MakeTeacher) -> Iterator[Corpus]:
    """A corpus in a folder of a user without rights elsewhere, and this process as that user: root may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    made = Corpus(folder, make_teacher("bert"))
    made.build("whole", keep=ALL)  # imports all it needs
    if (user := os.geteuid()) == 0:
        folder.chmod(0o777)
        for path in folder.rglob("*"):
            path.chmod(path.stat().st_mode | 0o055)
        os.seteuid(65534)
    yield made
    os.seteuid(user)
    shutil.rmtree(folder)


@pytest.mark.parametrize("stage", PLACES)
def test_lost_rights_are_told_and_the_next_run_goes_on(
    as_nobody: Corpus, stage: str, patch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    folder = (as_nobody.folder / "run" / PLACES[stage]).parent

    def lost(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            if function is not rename_into or str(arguments[0]).endswith(PLACES[stage]):
                folder.mkdir(exist_ok=True)
                folder.chmod(0o555)
            return function(*arguments)

        return call

    rename_into = storage._rename_into
    patch.setattr(storage, "_rename_into", lost(rename_into))
    if stage == "dictionary":
        patch.setattr(build_module, "assemble", lost(assemble.assemble))

    def mend() -> None:
        patch.undo()
        folder.chmod(0o755)

    fails_then_resumes(as_nobody, r"cannot write .*: no permission \(.*\); allow this user to write there", mend)
    outcome("rights lost", stage, "told; next run goes on")


# --- other things than before -----------------------------------------------------------------------------------------

INSIDE = {
    "passages": "msense.passages.write_passages",
    "plan": "msense.plan._select",
    "occurrences": "msense.occurrences.select_unit",
    "senses": "msense.senses.sample",
    "clustering": "msense.clustering.read_ranges",
    "large tokens": "msense.parts.prepare",
    "exemplars": "msense.exemplars._context",
    "dictionary": "msense.assemble.write_dictionary",
}


def test_changed_things_are_refused_by_name(made: Corpus, patch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    made.build("run")
    before = made.files("run")
    afresh = r"[\s\S]*start afresh, give another --output or delete"
    for setting, value in (("senses", 5), ("metric", "cosine"), ("seed", 1), ("max_occurrences", 7), ("stride", 1)):
        with pytest.raises(BadInput, match=rf"config\.{setting}: .* then, {value!r} now{afresh}"):
            made.build("run", **{setting: value})
    version = metadata.version
    for package in PINNED_PACKAGES:
        patch.setattr(
            "msense.manifest.metadata.version", lambda name, other=package: "0.9" if name == other else version(name)
        )
        with pytest.raises(BadInput, match=rf"pins\.{package}: '.*' then, '0\.9' now{afresh}"):
            made.build("run")
    patch.undo()
    weights = made.teacher / "model.safetensors"
    data = weights.read_bytes()
    flip_a_byte(weights)
    with pytest.raises(BadInput, match=rf"teacher\.fingerprint: .* then, .* now{afresh}"):
        made.build("run")
    weights.write_bytes(data)
    text = made.folder / "corpus" / "a.txt"
    lines, times = text.read_bytes(), text.stat()
    text.write_bytes(lines + b"one more\n")
    with pytest.raises(BadInput, match=rf"inputs\.a\.txt: .* then, .* now{afresh}"):
        made.build("run")
    text.write_bytes(lines)
    os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))
    (made.folder / "corpus" / "c.txt").write_text("the bank\n")
    with pytest.raises(BadInput, match=rf"inputs\.c\.txt: None then, .* now{afresh}"):
        made.build("run")
    (made.folder / "corpus" / "c.txt").unlink()
    made.build("run", workers=3, log_level="warning", max_points_per_part=2048, keep=("passages",))
    assert made.files("run") == before
    for stage, function in INSIDE.items():
        made.stop_at(function, stage, calls=2 if stage == "passages" else 1)  # the second of two files
        with pytest.raises(BadInput, match=rf"config\.senses: 'auto' then, 5 now{afresh}"):
            made.build(stage, senses=5)
        outcome("input changed", stage, "refused")


def test_a_finished_run_is_never_taken_for_one_that_never_began(made: Corpus) -> None:
    made.build("run", keep=())
    before = made.files("run")
    with pytest.raises(BadInput, match=r"config\.senses: 'auto' then, 5 now"):
        made.build("run", senses=5)
    assert made.files("run") == before


def test_a_corpus_that_changes_while_it_is_read_is_refused(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    from msense import passages

    write = passages.write_passages

    def meddling(*arguments: object) -> dict:
        (made.folder / "corpus" / "b.txt").write_text("the cat\n")
        return write(*arguments)

    made.build("whole")
    text = made.folder / "corpus" / "b.txt"
    before, times = text.read_bytes(), text.stat()
    monkeypatch.setattr(passages, "write_passages", meddling)
    with pytest.raises(BadInput, match=r"the corpus changed while it was read: b\.txt was .*, is .* bring the former"):
        made.build("run")
    monkeypatch.setattr(passages, "write_passages", write)
    text.write_bytes(before)
    os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))
    made.build("run")  # nothing of the changed file is taken for the file
    assert made.files("run") == made.files("whole")


def test_weights_that_change_before_they_are_loaded_are_refused(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = build_module.describe

    def then_change(*arguments: object) -> object:
        found = describe(*arguments)
        flip_a_byte(made.teacher / "model.safetensors")
        return found

    monkeypatch.setattr(build_module, "describe", then_change)
    with pytest.raises(MsenseError, match=r"the weights of teacher .* changed, or this node has others"):
        made.build("run")


def test_files_of_a_run_made_of_other_things_do_not_count(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker of a killed driver writes late, after the same folder was begun with other settings."""
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
    with pytest.raises(BadInput, match=r"bad documents \(2 empty\)"):
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
            BadInput, match=rf"another driver works on .*run \(process {os.getpid()} on host .*\): wait"
        ):
            made.build("run")
        refused.append(stage)
        return function(*arguments)

    monkeypatch.setattr(INSIDE[stage], meanwhile)
    made.build("run")
    assert refused
    assert len(made.journal()) == 1
    outcome("second driver", stage, "refused")


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_same_bytes_after_the_corpus_moved_and_in_another_order_of_roots(made: Corpus) -> None:
    second = made.folder / "more"
    second.mkdir()
    (second / "z.txt").write_text("the deep river is near\n")
    here = (str(made.folder / "corpus"), str(second))
    made.build("whole", corpus=here)
    made.stop_at("msense.clustering.cluster", corpus=here)
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


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(), ("passages",), ("occurrences", "centroids"), ALL])
def test_only_what_keep_names_is_left(made: Corpus, keep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = made.folder / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    made.stop_at("msense.exemplars._context", keep=keep)
    (made.folder / "run" / "plan" / ".plan.safetensors.0123abcd.part").write_bytes(b"left by a killed process")
    (made.folder / "run" / "dictionary" / "tokenizer").mkdir(parents=True)
    (made.folder / "run" / "dictionary" / "tokenizer" / ".tokenizer.json.89ef0123.part").write_bytes(b"so is this")
    made.build("run", keep=keep)
    always = {".lock", "bad_documents.jsonl", "dictionary", "finished.json", "journal.json", "manifest.json", "plan"}
    kept = {"senses"} if "centroids" in keep else set()  # they say how many centroids there are to be
    left = {p.name for p in (made.folder / "run").iterdir()}
    assert left - {".lock"} == (always | {"summary.json", "tokenizer.json"} | set(keep) | kept) - {".lock"}
    assert not list((made.folder / "run").rglob(".*.part"))
    assert not list((made.folder / "run").rglob("*-round*"))
    assert not list(scratch.iterdir())


def test_nothing_of_somebody_else_is_removed(made: Corpus) -> None:
    """A folder that is no run folder keeps its own files, also those named like temporary ones."""
    (made.folder / "run" / "mine").mkdir(parents=True)
    mine = [made.folder / "run" / name for name in (".x.part", ".x.0123abcd.part", "mine/.x.0123abcd.part")]
    for path in mine:
        path.write_text("mine")
    made.build("run", keep=())
    assert [path.read_text() for path in mine] == ["mine"] * 3
    (made.folder / "other" / "passages").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"passages is there, but no manifest\.json"):
        made.build("other")
    assert (made.folder / "other" / "passages").exists()


def test_status_tells_what_each_driver_kept_and_made(
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
    assert re.search(r" points, [0-9]+ senses of one token at most *\n", shown)
    first, second = [line for line in shown.splitlines() if line.startswith("driver")]
    assert f"occurrences {units} made" in first
    assert "failed: StoppedError" in first
    assert f"occurrences {units - 2} kept + 1 damaged + 2 made" in second
    assert second.rstrip().endswith("finished")
    run = RunFolder(str(whole.folder / "stopped"))
    drivers = storage.read_json(run.journal)["drivers"]
    storage.write_json(run.journal, {"drivers": [*drivers, {**drivers[0], "stages": {"plan": {}}, "outcome": ""}]})
    show_status(run.root)
    assert "plan begun. no word of its end: at work or killed (process" in capsys.readouterr().out
