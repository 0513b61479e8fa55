"""Clusters of several nodes on one machine: nodes lost in every stage, and nodes that join while a job runs."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import driver
import pytest
from driver import Options
from faulty import Outcome, same_metrics, wait_until
from ranks import write_body
from teachers import write_teacher
from test_kills import Runs

from msense.runtime.executor import Row

pytestmark = pytest.mark.slow
LIMIT = 420.0  # seconds per driver
STAGES = ("passages", "embed", "senses", "clustering", "large tokens", "exemplars")
PLACES = {**{stage: stage for stage in STAGES}, "plan": "plan: select", "dictionary": "assemble"}
NOT_REPLACED = "embed"  # this stage continues on the remaining node
STEP = 12  # training step at which a node is lost


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node, retrying after Ray's start-up timeout of 30 seconds."""
    for tries_left in (2, 1, 0):
        try:
            return start()
        except Exception as error:  # Ray raises no other
            if not tries_left or "timed out during startup" not in str(error):
                raise
    return None


class Machines:
    """A head without CPUs and workers of some CPUs each."""

    def __init__(self, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self.temporary = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need short paths
        quiet = {"include_dashboard": False, "object_store_memory": 200 << 20, "temp_dir": self.temporary}
        quiet |= {"_system_config": {"health_check_period_ms": 1000}}  # notice a lost node sooner than after 15 s
        self.cluster = Cluster()
        patiently(lambda: self.cluster.add_node(num_cpus=0, **quiet))
        self.workers: dict[str, Any] = {}
        self.cpus, self.lost = cpus, 0

    def add(self, count: int = 1) -> None:
        """Start workers."""
        for _ in range(count):
            node = patiently(lambda: self.cluster.add_node(num_cpus=self.cpus, object_store_memory=200 << 20))
            self.workers[node.node_id] = node

    def lose(self, node: str) -> None:
        """Kill all processes of a worker."""
        self.cluster.remove_node(self.workers.pop(node), allow_graceful=False)
        self.lost += 1

    def drive(self, settings: dict, options: Options) -> BaseProcess:
        """Start a driver on the head."""
        return driver.start(settings, options, self.cluster.address)

    def lose_flagged(self, process: BaseProcess, flags: Path) -> None:
        """Kill, and replace, each node that a file in `flags` names, until the driver ends."""
        seen: set[Path] = set()
        until = time.monotonic() + LIMIT
        while process.is_alive() and time.monotonic() < until:
            process.join(0.1)
            for flag in set(flags.iterdir()) - seen:
                if node := flag.read_text():
                    seen.add(flag)
                    if flag.name != NOT_REPLACED:
                        self.add(3 - len(self.workers))
                    self.lose(node)
        finish(process)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Machines]]:
    """Start clusters, with token authentication unless this process has already imported Ray without."""
    usual = "disabled" if "ray" in sys.modules else "token"
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", usual))
    subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "get-auth-token", "--generate"], capture_output=True, check=True
    )
    made: list[Machines] = []

    def make(workers: int, cpus: int = 1) -> Machines:
        made.append(Machines(cpus))
        made[-1].add(workers)
        return made[-1]

    yield make
    for machines in made:
        machines.cluster.shutdown()
        shutil.rmtree(machines.temporary, ignore_errors=True)


@pytest.fixture
def runs(tmp_path: Path, teacher: Path) -> Runs:
    return Runs(tmp_path, teacher)


def finish(process: BaseProcess) -> None:
    """Wait for a driver to succeed."""
    process.join(LIMIT)
    process.kill()
    process.join()
    assert process.exitcode == 0


def labels_of(run: Path) -> dict[str, bytes]:
    (folder,) = (run / "labels").iterdir()
    return {p.name: p.read_bytes() for p in sorted((folder / "labels").iterdir()) if p.suffix != ".done"}


def undisturbed(machines: Callable[[int], Machines], runs: Runs) -> Machines:
    """Build on a head and two workers, and return them."""
    three = machines(2)
    finish(three.drive(runs.settings("whole"), Options(runs.log("whole"), light=True)))
    return three


def lose_nodes(three: Machines, settings: dict, places: dict[str, str], flags: Path, outcome: Outcome) -> None:
    """Run a job; one item of each place waits until its node is killed, which a flag named after the stage asks for."""
    flags.mkdir()
    faults: dict[str, Row] = {place: {"flag": flags / stage, "hold": True} for stage, place in places.items()}
    options = Options(flags.parent / "run.log", faults, light=True, step=STEP)
    three.lose_flagged(three.drive(settings, options), flags)
    assert {flag.name for flag in flags.iterdir()} == set(places)
    for stage in places:
        outcome("node killed", stage, "run continues")


def test_a_node_lost_in_each_stage_of_a_build_changes_nothing(
    machines: Callable[[int], Machines], runs: Runs, outcome: Outcome
) -> None:
    """Every stage loses a node on which a worker is busy."""
    three = undisturbed(machines, runs)
    lose_nodes(three, runs.settings("run"), PLACES, runs.folder / "flags", outcome)
    assert three.lost == len(PLACES)
    runs.same("run")
    assert runs.begun("run").keys() == runs.begun("whole").keys()
    (only,) = runs.journal("run")
    assert only["outcome"] == "finished"


def test_a_node_lost_in_each_stage_of_a_distillation_changes_nothing(
    machines: Callable[[int], Machines], runs: Runs, outcome: Outcome
) -> None:
    """Labelling, then training, loses a node on which a worker is busy."""
    three = undisturbed(machines, runs)
    given = {"dictionary": str(runs.folder / "whole"), "teacher": str(runs.teacher), "student": "static", "epochs": 2}
    given |= {"batch_tokens": 512, "dtype": "float32", "checkpoint_steps": 5, "workers": 2, "held_out": 0.2}
    outputs = [str(runs.folder / name) for name in ("whole-student", "student")]
    whole, run = ({**given, "output": output, "labels": f"{output}/labels"} for output in outputs)
    finish(three.drive(whole, Options(runs.log("whole-student"), light=True)))
    lose_nodes(three, run, {"labels": "labels", "training": "training"}, runs.folder / "flags", outcome)
    assert labels_of(Path(run["output"])) == labels_of(Path(whole["output"])) != {}
    same_metrics(Path(run["output"]), Path(whole["output"]))


def test_a_node_lost_with_a_split_teacher_changes_nothing(
    machines: Callable[..., Machines], tmp_path: Path, outcome: Outcome
) -> None:
    """The node of a teacher of two ranks is killed; the teacher goes on on another one, and no rank is left."""
    teacher = write_teacher(tmp_path / "teacher")
    write_body(teacher, "bert", hidden_size=64)
    runs = Runs(tmp_path, teacher)
    three = machines(2, cpus=2)
    whole, run = ({**runs.settings(name), "ranks": 2, "workers": 1} for name in ("whole", "run"))
    finish(three.drive(whole, Options(runs.log("whole"), ranks=2)))
    flags = tmp_path / "flags"
    flags.mkdir()
    options = Options(runs.log("run"), {"embed": {"flag": flags / "embed", "hold": True}}, ranks=2)
    three.lose_flagged(three.drive(run, options), flags)
    assert three.lost == 1
    runs.same("run")
    wait_until(lambda: not all_ranks())
    outcome("node killed", "embed", "run continues")


def all_ranks() -> list[str]:
    """Return the processes of ranks on this machine."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(file.read_text().replace("\0", " "))
    return [line for line in lines if "-m msense.teacher.parallel" in line]


def test_a_node_that_joins_while_a_job_runs_is_used(machines: Callable[[int], Machines], runs: Runs) -> None:
    """The driver starts with one worker and waits at its fourth partition for a second."""
    growing = machines(1)
    places = runs.folder / "places"
    settings = {name: value for name, value in runs.settings("run").items() if name != "workers"}
    process = growing.drive(settings, Options(runs.log("run"), light=True, meet=places))
    wait_until(lambda: list(places.glob("embed/*")), LIMIT)
    growing.add()
    finish(process)
    for stage in ("embed", "clustering"):
        assert {path.name for path in (places / stage).iterdir()} == set(growing.workers)
    finish(growing.drive(runs.settings("whole"), Options(runs.log("whole"), light=True)))
    runs.same("run")
