"""SIGKILL to workers and drivers, in every stage of a build on a real Ray: the same bytes, and little done twice."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import driver
import numpy as np
import pytest
from tiny import WORDS

from msense import assemble, build, clustering, exemplars, parts, passages, plan, runtime, senses, storage
from msense.build import build_dictionary
from msense.config import BuildConfig
from msense.errors import MsenseError
from msense.occurrences import record_type
from msense.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("ray")
MakeTeacher = Callable[..., Path]
Outcome = Callable[[str, str, str], None]
KEPT = ("passages", "occurrences", "centroids")


class Runs:
    """Builds of one corpus, and what an undisturbed one gives."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        (folder / "corpus").mkdir()
        chances = np.array([12, 6] + [1] * 13) / 31
        for name in "abcdef":
            lines = [" ".join(rng.choice(WORDS, 24, p=chances)) for _ in range(80)]
            (folder / "corpus" / f"{name}.txt").write_text("\n".join(lines) + "\n")
        self.teacher = teacher

    def settings(self, name: str, **more: object) -> dict:
        given = {"corpus": (str(self.folder / "corpus"),), "teacher": str(self.teacher), "dtype": "float32"}
        given |= {"max_occurrences": 4000, "max_points_per_part": 1024, "keep": KEPT, "workers": 2}
        return {**given, "output": str(self.folder / name), **more}

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def begun(self, name: str) -> Counter:
        """Return how often each piece of work was begun."""
        return Counter(self.log(name).read_text().splitlines()) if self.log(name).exists() else Counter()

    def bytes(self, name: str) -> dict[str, bytes]:
        """Return all that must not differ: the dictionary, the occurrences, the centroids."""
        return {
            str(path.relative_to(self.folder / name)): path.read_bytes()
            for below in ("dictionary", "occurrences", "centroids")
            for path in sorted((self.folder / name / below).rglob("*"))
            if path.is_file() and path.suffix != ".done"
        }

    def records(self, name: str) -> tuple[int, int]:
        """Return the number of stored occurrences, and of different ones."""
        places = [
            (path.name, *place)
            for path in sorted((self.folder / name / "occurrences").glob("*.records"))
            for place in np.fromfile(path, record_type(16))[["row", "position"]].tolist()
        ]
        return len(places), len(set(places))

    def same(self, name: str) -> None:
        """Check a finished run against the undisturbed one."""
        assert self.bytes(name) == self.bytes("whole")
        assert self.records(name) == self.records("whole")
        assert not list((self.folder / name).rglob(".*.part"))
        assert not list((self.folder / name).rglob("*-round*"))

    def quiet(self, name: str) -> None:
        """Wait until the workers of a killed driver are gone."""
        seen, since = None, time.monotonic()
        while time.monotonic() - since < 2:
            now = self.begun(name), self.finished(name)
            if now != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.1)

    def finished(self, name: str) -> set[str]:
        """Return the pieces of work whose marker is there."""
        stages = {"passages": "*.parquet.done", "occurrences": "0*.records.done", "centroids": "0*.safetensors.done"}
        stages |= {"senses": "0*.safetensors.done", "contexts": "0*.parquet.done"}
        names = {"centroids": "clustering", "contexts": "exemplars"}
        return {
            f"{names.get(folder, folder)} {int(path.name.partition('.')[0])}"
            for folder, pattern in stages.items()
            for path in (self.folder / name / folder).glob(pattern)
        }


@pytest.fixture(scope="module")
def runs(ray: None, tmp_path_factory: pytest.TempPathFactory, make_teacher: MakeTeacher) -> Runs:
    from ray.cloudpickle import register_pickle_by_value

    register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    made = Runs(tmp_path_factory.mktemp("kills"), make_teacher("bert"))
    with pytest.MonkeyPatch.context() as patch:
        driver.in_small_pieces(made.log("whole"), patch.setattr)
        build_dictionary(BuildConfig(**made.settings("whole")))
    stored, different = made.records("whole")
    assert stored == different > 10_000
    begun = made.begun("whole")
    assert max(begun.values()) == 1
    assert min(Counter(key.split()[0] for key in begun).values()) >= 3  # several pieces of work in every stage
    assert len(list((made.folder / "whole" / "centroids").glob("token-*.safetensors"))) >= 2
    return made


def killed_once(function: Callable, flag: Path, at: str = "", calls: int = 1) -> Callable:
    """Return the function, but its first worker dies: at once, or where it calls `at` of `storage` so often."""

    def call(*arguments: object, **named: object) -> object:
        from msense import storage
        from msense.dictionary import format as dictionary_format

        left = [calls]

        def die(*given: object) -> object:
            left[0] -= 1
            if not flag.exists() and not left[0]:
                if given and isinstance(given[0], Path):  # in the midst of a write
                    given[0].with_name(f".{given[0].name}.0123abcd.part").write_bytes(b"half")
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given)

        if not at:
            original = function
            return die(*arguments)
        original = getattr(storage, at)
        if not flag.exists() and getattr(original, "__name__", "") != "die":
            setattr(storage, at, die)
            if hasattr(dictionary_format, at):
                setattr(dictionary_format, at, die)
        return function(*arguments, **named)

    return call


def test_a_worker_killed_in_each_stage_changes_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    """One build in which every stage loses a worker, after it has written a file and before its marker where it can."""
    driver.in_small_pieces(runs.log("run"), monkeypatch.setattr)
    flags = runs.folder / "flags"
    flags.mkdir()
    places = [(passages, "_write_piece", "write_json"), (plan, "_count", ""), (plan, "_select", "")]
    places += [(plan, "_duplicates", ""), (plan, "_write", "write_json"), (build, "write_index", "write_json")]
    places += [(senses, "look_at_shard", "write_json"), (senses, "_bring_together", "write_json")]
    places += [(clustering, "cluster_shard", "write_json"), (exemplars, "_resolve_unit", "write_json")]
    for module, name, at in places:
        monkeypatch.setattr(module, name, killed_once(getattr(module, name), flags / name, at))
    monkeypatch.setattr(build, "assemble", killed_once(assemble.assemble, flags / "assemble", "scratch_name", 4))
    actor, worker = build.OccurrenceActor, parts.PartWorker

    class DyingActor(actor):
        def __call__(self, item: dict) -> dict:
            return killed_once(super().__call__, flags / "actor", "write_json")(item)

    class DyingWorker(worker):
        def partial(self, part: object, state: object) -> object:
            if state.rounds >= 1:
                return killed_once(super().partial, flags / "worker")(part, state)
            return super().partial(part, state)

    monkeypatch.setattr(build, "OccurrenceActor", DyingActor)
    monkeypatch.setattr(parts, "PartWorker", DyingWorker)
    build_dictionary(BuildConfig(**runs.settings("run")))
    runs.same("run")
    killed = ["_write_piece", "_duplicates", "_count", "_select", "_write", "actor", "write_index", "cluster_shard"]
    killed += ["worker", "_resolve_unit", "assemble", "look_at_shard", "_bring_together"]
    assert {path.name for path in flags.iterdir()} == set(killed)
    begun = runs.begun("run")
    assert begun.keys() == runs.begun("whole").keys()
    again = Counter(key.split()[0] for key, count in begun.items() for _ in range(count - 1))
    assert again == {"passages": 1, "occurrences": 1, "senses": 1, "clustering": 1, "exemplars": 1}
    build_dictionary(BuildConfig(**runs.settings("run")))
    journal = storage.read_json(RunFolder(str(runs.folder / "run")).journal)["drivers"]
    assert journal[-1]["stages"] == {"dictionary": {"kept": 1}}  # nothing of the dead worker was taken for a file of it
    for stage in ("passages", "plan", "occurrences", "senses", "clustering", "large tokens", "exemplars", "dictionary"):
        outcome("worker killed", stage, "same run goes on")


KILLS = {
    "passages": ("passages", 2),
    "plan": ("plan: select", 1),
    "occurrences": ("occurrences", 2),
    "senses": ("senses", 2),
    "clustering": ("clustering", 2),
    "large tokens": ("clustering: large tokens", 1),
    "exemplars": ("exemplars", 2),
    "dictionary": ("finished.json", 1),
}


@pytest.mark.slow
def test_drivers_killed_in_each_stage_one_after_the_other(runs: Runs, outcome: Outcome) -> None:
    settings = runs.settings("chain")
    for stage, kill_at in KILLS.items():
        process = driver.start(settings, runs.log("chain"), kill_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL, stage
        runs.quiet("chain")
        done, before = runs.finished("chain"), runs.begun("chain")
        assert sum(before.values()) <= len(done) + (list(KILLS).index(stage) + 1) * settings["workers"]
        if stage in ("passages", "occurrences", "senses", "clustering", "exemplars"):
            assert sum(key.startswith(stage) for key in done) >= 2
        outcome("driver killed", stage, "next run goes on")
        (runs.folder / f"done-{stage}").write_text("\n".join(f"{key} {before[key]}" for key in done))
    last = driver.start(settings, runs.log("chain"))
    last.join()
    assert last.exitcode == 0
    runs.same("chain")
    assert not (runs.folder / "chain" / "contexts").exists()
    begun = runs.begun("chain")
    for stage in KILLS:
        for line in (runs.folder / f"done-{stage}").read_text().splitlines():
            key, count = line.rsplit(" ", 1)
            assert begun[key] == int(count), (stage, key)  # what was finished when the driver died was never done again
    journal = storage.read_json(RunFolder(str(runs.folder / "chain")).journal)["drivers"]
    assert [record["outcome"] for record in journal] == [""] * len(KILLS) + ["finished"]
    units = len(list((runs.folder / "whole" / "occurrences").glob("*.records")))
    assert journal[-1]["stages"]["occurrences"] == {"kept": units, "damaged": 0, "made": 0}
    assert journal[-1]["stages"]["plan"] == {"kept": 2, "damaged": 0}


def last_first(function: Callable) -> Callable:
    """Return the function, slower for the first pieces of work than for the last."""

    def call(item: dict, *more: object, **named: object) -> object:
        time.sleep(0.6 / (1 + item.get("number", item.get("shard", 0))))
        return function(item, *more, **named)

    return call


@pytest.mark.parametrize(
    ("workers", "block_bytes", "parts_of"),
    [pytest.param(1, 1 << 30, 131072, id="one"), pytest.param(3, 1, 2048, id="three", marks=pytest.mark.slow)],
)
def test_workers_ray_blocks_parts_and_finish_order_do_not_matter(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, workers: int, block_bytes: int, parts_of: int
) -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "target_max_block_size", block_bytes)
    monkeypatch.setattr(context, "target_min_block_size", block_bytes)
    name = f"workers-{workers}"
    driver.in_small_pieces(runs.log(name), monkeypatch.setattr)
    if workers > 1:
        works = [(passages, "_write_piece"), (senses, "look_at_shard")]
        for module, work in (*works, (clustering, "cluster_shard"), (exemplars, "_resolve_unit")):
            monkeypatch.setattr(module, work, last_first(getattr(module, work)))
        actor = build.OccurrenceActor

        class SlowActor(actor):
            def __call__(self, item: dict) -> dict:
                return last_first(super().__call__)(item)

        monkeypatch.setattr(build, "OccurrenceActor", SlowActor)
    build_dictionary(BuildConfig(**runs.settings(name, workers=workers, max_points_per_part=parts_of)))
    for below in ("dictionary", "occurrences"):  # centroids lie in other files when tokens are not cut into parts
        files = {key: data for key, data in runs.bytes(name).items() if key.startswith(below)}
        assert files == {key: data for key, data in runs.bytes("whole").items() if key.startswith(below)}
    begun = list(dict.fromkeys(key for key in runs.log(name).read_text().splitlines() if key.startswith("occ")))
    assert len(begun) >= 3


@pytest.mark.slow
def test_work_that_always_kills_its_worker_is_given_up(tmp_path: Path) -> None:
    tried = tmp_path / "tried"

    def deadly(item: int) -> dict:
        with tried.open("a") as file:
            file.write(f"{item}\n")
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"item": item}

    class Deadly:
        def __call__(self, item: int) -> dict:
            return deadly(item)

    resources = runtime.Resources(actors=2, tasks=2, device="cpu")
    for run, times in (
        (lambda: list(runtime.map_tasks("x", deadly, [0, 1, 2], resources)), runtime.RETRIES + 1),
        (lambda: list(runtime.map_data("x", deadly, [0, 1, 2], resources)), runtime.RETRIES + 1),
        (lambda: list(runtime.map_actors("x", Deadly, {}, [0, 1, 2], resources)), runtime.RESTARTS + 1),
    ):
        tried.write_text("")
        with pytest.raises(MsenseError, match=r"a worker died again and again .*ran out of memory"):
            run()
        assert tried.read_text().count("1\n") == times

    class Stillborn:
        def __init__(self) -> None:
            deadly(1)

    tried.write_text("")
    with pytest.raises(MsenseError, match=r"a worker died again and again"):
        list(runtime.map_actors("x", Stillborn, {}, [0], resources))
    assert tried.read_text().count("1\n") == runtime.RESTARTS + 1


@pytest.mark.slow
def test_a_disk_that_is_really_full(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder is a file system of its own that is too small; then it grows."""
    folder = runs.folder / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=400k", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        driver.in_small_pieces(runs.log("disk"), monkeypatch.setattr)
        with pytest.raises(
            MsenseError, match=r"cannot write .*: no space left \(.*No space left on device.*; free some"
        ):
            build_dictionary(BuildConfig(**runs.settings("disk")))
        done, begun = runs.finished("disk"), runs.begun("disk")
        assert any(key.startswith("passages") for key in done)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        build_dictionary(BuildConfig(**runs.settings("disk")))
        runs.same("disk")
        assert all(runs.begun("disk")[key] == begun[key] for key in done)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_the_command_killed_with_its_own_ray_and_given_again(runs: Runs) -> None:
    """`python jobs/build_dict.py`, killed when its first unit is there; nothing stays in the temporary folder."""
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    given = runs.settings("own")
    command = [sys.executable, "jobs/build_dict.py", "--corpus", *given["corpus"], "--teacher", given["teacher"]]
    command += ["--dtype", "float32", "--max-occurrences", "4000", "--keep", *KEPT]
    command += ["--max-points-per-part", "1024", "--workers", "2"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    outside |= {"TMPDIR": str(temporary)}
    process = subprocess.Popen([*command, "--output", given["output"]], env=outside, stderr=subprocess.DEVNULL)
    unit = runs.folder / "own" / "occurrences" / "000000.records.done"
    while not unit.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(
        [*command, "--output", given["output"]], env=outside, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    build_dictionary(BuildConfig(**runs.settings("straight")))
    for name, data in runs.bytes("straight").items():  # shards of the test session's workers may be smaller
        assert name.startswith("centroids") or "index" in name or runs.bytes("own")[name] == data
    assert storage.read_json(RunFolder(given["output"]).journal)["drivers"][-1]["stages"]["occurrences"]["kept"] >= 1
    temporary.rmdir()  # which it refuses if anything is left


@pytest.mark.slow
def test_twenty_kills_at_random_moments(runs: Runs, tell: Callable[[str], None]) -> None:
    """In two lanes, with a teacher that needs no loading: a driver is killed, and its command given again."""

    def run(name: str) -> BaseProcess:
        settings = runs.settings(name, workers=1, max_points_per_part=131072)
        return driver.start(settings, runs.log(name), light=True)

    run("first").join()  # imports what all drivers share
    began = time.monotonic()
    run("once").join()
    whole, took = runs.bytes("once"), time.monotonic() - began
    assert runs.records("once") == runs.records("whole")

    def kill_and_resume(number: int) -> int:
        rng = np.random.default_rng(number)
        for attempt in range(20):  # until the moment falls before the end
            name = f"random-{number}-{attempt}"
            process = run(name)
            process.join(rng.uniform(0.1, took))
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                break
        assert process.exitcode == -signal.SIGKILL
        runs.quiet(name)
        process = run(name)
        process.join()
        assert process.exitcode == 0
        assert runs.bytes(name) == whole
        assert runs.records(name) == runs.records("whole")
        again = sum(count - 1 for count in runs.begun(name).values())
        assert again <= 1
        return again

    with ThreadPoolExecutor(2) as lanes:
        again = list(lanes.map(kill_and_resume, range(20)))
    assert len(again) == 20
    tell(f"20 drivers killed at random moments: 20 times the same bytes, {sum(again)} pieces of work begun twice")
