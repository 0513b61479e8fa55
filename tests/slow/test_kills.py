"""SIGKILL to workers and drivers in every stage of a build on Ray: the same bytes, and almost no item run twice."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import driver
import numpy as np
import pytest
from faulty import Corpus, MakeTeacher, Outcome, records
from tiny import WORDS

from msense.config.build import BuildConfig
from msense.errors import MsenseError
from msense.io import storage
from msense.pipelines import build
from msense.pipelines.build import build_dictionary
from msense.runtime import ray_executor
from msense.runtime.resources import Resources
from msense.stages import assemble, cluster, distributed_kmeans, exemplars, passages, plan, sense_counts
from msense.stages.distributed_kmeans_worker import ChunkWorker
from msense.stages.embed import EmbedActor

pytestmark = pytest.mark.usefixtures("ray")
KEPT = ("passages", "occurrences", "centroids")


class Runs(Corpus):
    """Builds of one corpus, compared with an undisturbed one named "whole"."""

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
        """Return how often each work item was started."""
        return Counter(self.log(name).read_text().splitlines()) if self.log(name).exists() else Counter()

    def bytes(self, name: str) -> dict[str, bytes]:
        """Return the files that must not differ: dictionary, occurrences and centroids."""
        folders = ("dictionary", "occurrences", "centroids")
        return {f"{below}/{k}": v for below in folders for k, v in self.files(name, below, markers=False).items()}

    def records(self, name: str) -> tuple[int, int]:
        """Return the number of stored occurrences and of distinct ones."""
        return records(self, name)

    def same(self, name: str) -> None:
        """Compare a finished run with the undisturbed one."""
        assert self.bytes(name) == self.bytes("whole")
        assert self.records(name) == self.records("whole")
        assert not list((self.folder / name).rglob(".*.part"))
        assert not list((self.folder / name).rglob("*-round*"))

    def wait_quiet(self, name: str) -> None:
        """Wait until the workers of a killed driver are gone."""
        seen, since = None, time.monotonic()
        while time.monotonic() - since < 2:
            now = self.begun(name), self.finished(name)
            if now != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.1)

    def finished(self, name: str) -> set[str]:
        """Return the work items whose done marker exists."""
        stages = {"passages": "passages", "occurrences": "occurrences", "senses": "senses"}
        stages |= {"centroids": "clustering", "contexts": "exemplars"}
        return {
            f"{stage} {int(path.name.partition('.')[0])}"
            for folder, stage in stages.items()
            for path in (self.folder / name / folder).glob("0*.done")
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
    assert min(Counter(key.split()[0] for key in begun).values()) >= 3  # several items per stage
    assert len(list((made.folder / "whole" / "centroids").glob("token-*.safetensors"))) >= 2
    return made


def killed_once(function: Callable, flag: Path, at: str = "", calls: int = 1) -> Callable:
    """Return the function, whose first worker dies: at once, or at its call number `calls` of `storage.at`."""

    def call(*arguments: object, **named: object) -> object:
        from msense.dictionary import format as dictionary_format

        left = [calls]

        def die(*given: object) -> object:
            left[0] -= 1
            if not flag.exists() and not left[0]:
                if given and isinstance(given[0], Path):  # in the middle of a write
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
    """Every stage loses a worker, where possible between writing a file and its done marker."""
    driver.in_small_pieces(runs.log("run"), monkeypatch.setattr)
    flags = runs.folder / "flags"
    flags.mkdir()
    places = [(passages, "_write_piece", "write_json"), (plan, "_count", ""), (plan, "_select", "")]
    places += [(plan, "_duplicates", ""), (plan, "_write", "write_json"), (build, "write_index", "write_json")]
    places += [(sense_counts, "look_at_shard", "write_json"), (sense_counts, "_merge_shards", "write_json")]
    places += [(cluster, "cluster_shard", "write_json"), (exemplars, "_resolve_unit", "write_json")]
    for module, name, at in places:
        monkeypatch.setattr(module, name, killed_once(getattr(module, name), flags / name, at))
    monkeypatch.setattr(build, "assemble", killed_once(assemble.assemble, flags / "assemble", "scratch_name", 4))
    actor, worker = EmbedActor, ChunkWorker

    class DyingActor(actor):
        def __call__(self, item: dict) -> dict:
            return killed_once(super().__call__, flags / "actor", "write_json")(item)

    class DyingWorker(worker):
        def partial(self, part: object, state: object) -> object:
            if state.rounds >= 1:
                return killed_once(super().partial, flags / "worker")(part, state)
            return super().partial(part, state)

    monkeypatch.setattr(build, "OccurrenceActor", DyingActor)
    monkeypatch.setattr(distributed_kmeans, "PartWorker", DyingWorker)
    build_dictionary(BuildConfig(**runs.settings("run")))
    runs.same("run")
    assert {path.name for path in flags.iterdir()} == {name for _, name, _ in places} | {"assemble", "actor", "worker"}
    begun = runs.begun("run")
    assert begun.keys() == runs.begun("whole").keys()
    again = Counter(key.split()[0] for key, count in begun.items() for _ in range(count - 1))
    assert again == {"passages": 1, "occurrences": 1, "senses": 1, "clustering": 1, "exemplars": 1}
    build_dictionary(BuildConfig(**runs.settings("run")))
    last = runs.journal("run")[-1]
    assert last["stages"] == {"dictionary": {"kept": 1}}  # no file of a dead worker counts as finished
    for stage in KILLS:
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
        runs.wait_quiet("chain")
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
            assert begun[key] == int(count), (stage, key)  # items finished before the driver died are not repeated
    journal = runs.journal("chain")
    assert [record["outcome"] for record in journal] == [""] * len(KILLS) + ["finished"]
    units = len(list((runs.folder / "whole" / "occurrences").glob("*.records")))
    assert journal[-1]["stages"]["occurrences"] == {"kept": units, "damaged": 0, "made": 0}
    assert journal[-1]["stages"]["plan"] == {"kept": 2, "damaged": 0}


def last_first(function: Callable) -> Callable:
    """Return the function, slower for the first items than for the last."""

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
        works = [(passages, "_write_piece"), (sense_counts, "look_at_shard")]
        for module, work in (*works, (cluster, "cluster_shard"), (exemplars, "_resolve_unit")):
            monkeypatch.setattr(module, work, last_first(getattr(module, work)))
        actor = EmbedActor

        class SlowActor(actor):
            def __call__(self, item: dict) -> dict:
                return last_first(super().__call__)(item)

        monkeypatch.setattr(build, "OccurrenceActor", SlowActor)
    build_dictionary(BuildConfig(**runs.settings(name, workers=workers, max_points_per_part=parts_of)))
    own, whole = (  # the centroids' files depend on the chunks of large tokens
        {key: data for key, data in runs.bytes(run).items() if not key.startswith("centroids")}
        for run in (name, "whole")
    )
    assert own == whole


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

    class Stillborn:
        def __init__(self) -> None:
            deadly(1)

    resources = Resources(actors=2, tasks=2, device="cpu")
    for run, times in (
        (lambda: list(ray_executor.map_tasks("x", deadly, [0, 1, 2], resources)), ray_executor.RETRIES + 1),
        (lambda: list(ray_executor.map_data("x", deadly, [0, 1, 2], resources)), ray_executor.RETRIES + 1),
        (lambda: list(ray_executor.map_actors("x", Deadly, {}, [0, 1, 2], resources)), ray_executor.RESTARTS + 1),
        (lambda: list(ray_executor.map_actors("x", Stillborn, {}, [0], resources)), ray_executor.RESTARTS + 1),
    ):
        tried.write_text("")
        with pytest.raises(MsenseError, match=r"a worker died .*ran out of memory"):
            run()
        assert tried.read_text().count("1\n") == times


@pytest.mark.slow
def test_twenty_kills_at_random_moments(runs: Runs, tell: Callable[[str], None]) -> None:
    """A driver is killed and its command rerun, two at a time, with a teacher that needs no loading."""

    def run(name: str) -> BaseProcess:
        settings = runs.settings(name, workers=1, max_points_per_part=131072)
        return driver.start(settings, runs.log(name), light=True)

    run("first").join()  # imports the modules shared by all drivers
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
        runs.wait_quiet(name)
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
    tell(f"20 drivers killed at random moments: 20 times the same bytes, {sum(again)} work items started twice")
