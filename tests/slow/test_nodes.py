"""Clusters of several nodes on one machine: nodes lost in every stage, and nodes that join while a job runs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import driver
import pytest
from driver import Options
from faulty import Outcome, records, same_metrics
from nodes import BIN, Namespaces, Nodes, in_small_partitions
from task_data import write_task
from test_kills import Runs

from msense.io import storage
from msense.pipelines.finetune import DONE
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
    """A head without CPUs and workers of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.temporary = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need short paths
        quiet = {"include_dashboard": False, "object_store_memory": 200 << 20, "temp_dir": self.temporary}
        quiet |= {"_system_config": {"health_check_period_ms": 1000}}  # notice a lost node sooner than after 15 s
        self.cluster = Cluster()
        patiently(lambda: self.cluster.add_node(num_cpus=0, **quiet))
        self.workers: dict[str, Any] = {}
        self.lost = 0

    def add(self, count: int = 1) -> None:
        """Start workers."""
        for _ in range(count):
            node = patiently(lambda: self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20))
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
    subprocess.run([str(BIN / "ray"), "get-auth-token", "--generate"], capture_output=True, check=True)
    made: list[Machines] = []

    def make(workers: int) -> Machines:
        made.append(Machines())
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
    return {p.name: p.read_bytes() for p in sorted((run / "labels").iterdir()) if p.suffix != ".done"}


def undisturbed(machines: Callable[[int], Machines], runs: Runs) -> tuple[Machines, Path]:
    """Build on a head and two workers; return them and a folder for flags."""
    three, flags = machines(2), runs.folder / "flags"
    flags.mkdir()
    finish(three.drive(runs.settings("whole"), Options(runs.log("whole"), light=True)))
    return three, flags


def holding(places: dict[str, str], flags: Path, log: Path) -> Options:
    """Return options by which one item of each place waits until its node is killed; its flag is named after the stage."""
    faults: dict[str, Row] = {place: {"flag": flags / stage, "hold": True} for stage, place in places.items()}
    return Options(log, faults, light=True, step=STEP)


def test_a_node_lost_in_each_stage_of_a_build_changes_nothing(
    machines: Callable[[int], Machines], runs: Runs, outcome: Outcome
) -> None:
    """Every stage loses a node on which a worker is busy."""
    three, flags = undisturbed(machines, runs)
    three.lose_flagged(three.drive(runs.settings("run"), holding(PLACES, flags, runs.log("run"))), flags)
    assert {flag.name for flag in flags.iterdir()} == set(PLACES)
    assert three.lost == len(PLACES)
    runs.same("run")
    assert runs.begun("run").keys() == runs.begun("whole").keys()
    (only,) = runs.journal("run")
    assert only["outcome"] == "finished"
    for stage in PLACES:
        outcome("node killed", stage, "run continues")


def test_a_node_lost_in_each_stage_of_a_distillation_changes_nothing(
    machines: Callable[[int], Machines], runs: Runs, outcome: Outcome
) -> None:
    """Labelling, then training, loses a node on which a worker is busy."""
    three, flags = undisturbed(machines, runs)
    given = {"dictionary": str(runs.folder / "whole"), "teacher": str(runs.teacher), "student": "static", "epochs": 2}
    given |= {"batch_tokens": 512, "dtype": "float32", "checkpoint_steps": 5, "workers": 2, "held_out": 0.2}
    whole, run = ({**given, "output": str(runs.folder / name)} for name in ("whole-student", "student"))
    finish(three.drive(whole, Options(runs.log("whole-student"), light=True)))
    places = {stage: stage for stage in ("labels", "training")}
    three.lose_flagged(three.drive(run, holding(places, flags, runs.log("student"))), flags)
    assert {flag.name for flag in flags.iterdir()} == set(places)
    assert labels_of(Path(run["output"])) == labels_of(Path(whole["output"])) != {}
    same_metrics(Path(run["output"]), Path(whole["output"]))
    for stage in places:
        outcome("node killed", stage, "run continues")


def test_a_node_that_joins_while_a_job_runs_is_used(machines: Callable[[int], Machines], runs: Runs) -> None:
    """The driver starts with one worker and waits at its fourth partition for a second."""
    growing = machines(1)
    places = runs.folder / "places"
    settings = {name: value for name, value in runs.settings("run").items() if name != "workers"}
    process = growing.drive(settings, Options(runs.log("run"), light=True, meet=places))
    until = time.monotonic() + LIMIT
    while not list(places.glob("embed/*")) and process.is_alive() and time.monotonic() < until:
        time.sleep(0.1)
    growing.add()
    finish(process)
    for stage in ("embed", "clustering"):
        assert {path.name for path in (places / stage).iterdir()} == set(growing.workers)
    finish(growing.drive(runs.settings("whole"), Options(runs.log("whole"), light=True)))
    runs.same("run")


def test_nodes_with_their_own_addresses_give_the_same_bytes_as_one_node(runs: Runs) -> None:
    """All jobs on a head and two workers, each in a network namespace, and on a local Ray."""
    try:
        spaces = Namespaces(3)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may make no network namespaces ({error})")
    nodes = Nodes()
    hosts = runs.folder / "hosts"
    hosts.mkdir()
    wait = f"""
    hosts = Path({str(hosts)!r})
    (hosts / socket.gethostname()).touch()
    while item["number"] >= 3 and len(list(hosts.iterdir())) < 2:
        time.sleep(0.05)
"""
    code = in_small_partitions(runs.folder / "code", wait)
    nodes.environment["PYTHONPATH"] = str(code)
    given = runs.settings("x")
    rows = [(f"{text}{' near' * (n % 5)}", text) for n in range(12) for text in ("the river is deep", "money is full")]
    task = write_task(runs.folder / "toy", dict.fromkeys(("train", "dev", "test"), rows))

    def commands(name: str, workers: int) -> list[list[str]]:
        run, teacher = runs.folder / name, given["teacher"]
        jobs = (
            f"build_dict --corpus {given['corpus'][0]} --max-occurrences 4000 --keep occurrences passages "
            f"--dtype float32 --workers {workers} --output {run}",
            f"distill --dictionary {run} --student static --epochs 2 --batch-tokens 512 --held-out 0.2 "
            f"--dtype float32 --workers {workers} --output {run}-student",
            f"evaluate --model teacher r=replaced:{run} --task toy={task} --shots 2 --draws 2 --no-cost "
            f"--dtype float32 --workers {workers} --output {run}.json",
            f"finetune --task toy={task} --epochs 2 --lr 3e-3 --train-dtype float32 --workers 2 --output {run}-teacher",
        )
        words = (job.split() for job in jobs)
        return [[sys.executable, f"jobs/{job}.py", *flags, "--teacher", teacher] for job, *flags in words]

    def run(jobs: list[list[str]], within: Sequence[str] = (), **more: str) -> None:
        for job in jobs:
            given = {"cwd": code, "env": {**nodes.environment, **more}, "timeout": LIMIT, "check": False}
            done = subprocess.run([*within, *job], capture_output=True, text=True, **given)
            assert done.returncode == 0, done.stderr

    try:
        address = f"{spaces.addresses[0]}:6379"
        for number, own in enumerate(spaces.addresses):
            options = ["--num-cpus", str(min(number, 1)), "--node-ip-address", own]
            if number == 0:
                options += ["--head", "--port", "6379", "--include-dashboard", "false"]
                options += ["--temp-dir", str(nodes.folder / "ray")]
            else:
                options += ["--address", address]
            nodes.start(*options, within=spaces.within(number))
            ready = f"import ray; ray.init({address!r}); assert len(ray.nodes()) == {number + 1}"
            nodes.wait_for([*spaces.within(0), sys.executable, "-c", ready], number)
        run(commands("spread", 2), spaces.within(0), RAY_ADDRESS=address)
        assert {path.name for path in hosts.iterdir()} == set(spaces.names[1:])
        partitions = (runs.folder / "spread" / "occurrences").glob("*.records")
        actors = {(storage.stats_of(str(path)) or {})["actor"].rpartition("-")[0] for path in partitions}
        assert actors == set(spaces.names[1:])
    finally:
        nodes.end()
        spaces.end()
    again = Nodes()
    nodes.environment = {**again.environment, "PYTHONPATH": str(code)}
    try:
        run(commands("alone", 1))
    finally:
        again.end()
    assert runs.bytes("spread") == runs.bytes("alone") != {}
    assert records(runs, "spread") == records(runs, "alone")
    spread, alone = (runs.folder / f"{name}-student" for name in ("spread", "alone"))
    assert labels_of(spread) == labels_of(alone) != {}
    same_metrics(spread, alone)
    reports = [json.loads((runs.folder / f"{name}.json").read_text())["tasks"] for name in ("spread", "alone")]
    assert reports[0] == reports[1] != []
    tuned = [storage.read_json(str(runs.folder / f"{name}-teacher" / DONE))["epochs"] for name in ("spread", "alone")]
    assert len(tuned[0]) == 2
    for one, other in zip(*tuned, strict=True):
        assert one | {"tokens_per_s": 0} == pytest.approx(other | {"tokens_per_s": 0}, rel=1e-3, abs=1e-3)
