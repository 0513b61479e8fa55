"""SIGKILL to workers and drivers in every stage of a build on Ray: the same bytes, and almost no item run twice."""

import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import driver
import numpy as np
import pytest
from driver import Options
from executors import INSIDE
from faulty import ALL, PLACES, Corpus, MakeTeacher, Outcome, records, write_corpus

from msense.runtime.executor import Row

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray")]
FOLDERS = {"passages": "passages", "occurrences": "embed", "senses": "senses", "centroids": "clustering"}
FOLDERS |= {"contexts": "exemplars"}  # their stages


class Runs(Corpus):
    """Builds of one corpus, compared with an undisturbed one named "whole"."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder, self.teacher = folder, teacher
        write_corpus(folder / "corpus", "abcdef", lines=80, repeated=0)

    def settings(self, name: str, **more: object) -> dict:
        given = {"corpus": (str(self.folder / "corpus"),), "teacher": str(self.teacher), "dtype": "float32"}
        given |= {"max_occurrences": 4000, "max_points_per_part": 1024, "keep": ALL, "workers": 2}
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

    def same(self, name: str) -> None:
        """Compare a finished run with the undisturbed one."""
        assert self.bytes(name) == self.bytes("whole")
        assert records(self, name) == records(self, "whole")
        assert not list((self.folder / name).rglob(".*.part"))
        assert not list((self.folder / name).rglob("*-round*"))

    def finished(self, name: str) -> set[str]:
        """Return the work items whose done marker exists."""
        done = (
            (stage, path) for folder, stage in FOLDERS.items() for path in (self.folder / name / folder).glob("0*.done")
        )
        return {f"{stage} {int(path.name.partition('.')[0])}" for stage, path in done}

    def wait_quiet(self, name: str) -> None:
        """Wait until the workers of a killed driver are gone."""
        seen, since = None, time.monotonic()
        while time.monotonic() - since < 2:
            now = self.begun(name), self.finished(name)
            if now != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def runs(ray: None, tmp_path_factory: pytest.TempPathFactory, make_teacher: MakeTeacher) -> Runs:
    made = Runs(tmp_path_factory.mktemp("kills"), make_teacher("bert"))
    driver.run(made.settings("whole"), Options(made.log("whole")))
    stored, different = records(made, "whole")
    assert stored == different > 10_000
    begun = made.begun("whole")
    assert max(begun.values()) == 1
    assert min(Counter(key.split()[0] for key in begun).values()) >= 3  # several items per stage
    assert len(list((made.folder / "whole" / "centroids").glob("token-*.safetensors"))) >= 2
    return made


KILLED_WORKERS = {  # place: function of `storage` at whose call the worker dies; "" = before the work
    "passages": "write_json", "plan: count": "", "plan: select": "", "plan: duplicates": "", "write": "write_json",
    "embed": "write_json", "write index": "write_json", "senses": "write_json", "merge shards": "write_json",
    "clustering": "write_json", "exemplars": "write_json", "assemble": "sha256_of", "large tokens": "",
}  # fmt: skip
KILLED_DRIVERS = {stage: INSIDE[stage] for stage in PLACES}  # place, and the number of finished items there
KILLED_DRIVERS |= {"plan": ("plan: select", 1), "large tokens": ("large tokens: finish", 1)}
KILLED_DRIVERS |= {"dictionary": ("after assemble", 1)}


def test_a_worker_killed_in_each_stage_changes_nothing(runs: Runs, outcome: Outcome) -> None:
    """Every stage loses a worker, where possible between writing a file and its done marker."""
    flags = runs.folder / "flags"
    flags.mkdir()
    faults: dict[str, Row] = {place: {"flag": flags / place, "at": at} for place, at in KILLED_WORKERS.items()}
    driver.run(runs.settings("run"), Options(runs.log("run"), faults))
    runs.same("run")
    assert {path.name for path in flags.iterdir()} == set(KILLED_WORKERS)
    begun = runs.begun("run")
    assert begun.keys() == runs.begun("whole").keys()
    repeated = Counter(key.split()[0] for key, count in begun.items() for _ in range(count - 1))
    assert repeated == dict.fromkeys(FOLDERS.values(), 1)
    driver.run(runs.settings("run"), Options(runs.log("again")))
    assert runs.journal("run")[-1]["stages"] == {"dictionary": {"kept": 1}}  # no file of a dead worker counts
    for stage in KILLED_DRIVERS:
        outcome("worker killed", stage, "run continues")


def test_drivers_killed_in_each_stage_one_after_the_other(runs: Runs, outcome: Outcome) -> None:
    settings, finished = runs.settings("chain"), {}
    for number, (stage, kill_at) in enumerate(KILLED_DRIVERS.items(), 1):
        process = driver.start(settings, Options(runs.log("chain"), kill_driver_at=kill_at))
        process.join()
        assert process.exitcode == -signal.SIGKILL, stage
        runs.wait_quiet("chain")
        done, before = runs.finished("chain"), runs.begun("chain")
        assert sum(before.values()) <= len(done) + number * settings["workers"]
        assert stage not in FOLDERS.values() or sum(key.startswith(stage) for key in done) >= 2
        finished |= {key: before[key] for key in done}
        outcome("driver killed", stage, "next run resumes")
    last = driver.start(settings, Options(runs.log("chain")))
    last.join()
    assert last.exitcode == 0
    runs.same("chain")
    assert not (runs.folder / "chain" / "contexts").exists()
    begun = runs.begun("chain")
    assert {key: begun[key] for key in finished} == finished  # items finished before a driver died are not repeated
    journal = runs.journal("chain")
    assert [record["outcome"] for record in journal] == [""] * len(KILLED_DRIVERS) + ["finished"]
    partitions = len(list((runs.folder / "whole" / "occurrences").glob("*.records")))
    assert journal[-1]["stages"]["embed"] == {"kept": partitions, "damaged": 0, "made": 0}


def test_twenty_kills_at_random_moments(runs: Runs) -> None:
    """A driver is killed and its command rerun, two at a time, with a teacher that needs no loading."""

    def run(name: str) -> BaseProcess:
        settings = runs.settings(name, workers=1, max_points_per_part=131072)
        return driver.start(settings, Options(runs.log(name), light=True))

    run("first").join()  # imports the modules shared by all drivers
    began = time.monotonic()
    run("once").join()
    whole, took = runs.bytes("once"), time.monotonic() - began
    assert records(runs, "once") == records(runs, "whole")

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
        assert records(runs, name) == records(runs, "whole")
        return sum(count - 1 for count in runs.begun(name).values())

    with ThreadPoolExecutor(2) as lanes:
        repeated = list(lanes.map(kill_and_resume, range(20)))
    assert max(repeated) <= 1
