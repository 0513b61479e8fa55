"""Builds and distillations on Ray whose drivers, in processes of their own, and workers are logged, delayed and killed."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from executors import small_partitions

from msense.runtime.executor import Row, TrainingResult, Work, Worker, name_of
from msense.runtime.ray_executor import RayExecutor


@dataclass(frozen=True)
class Options:
    """How a job is disturbed; a place is the name of a stage as the executor sees it, or of a function that runs alone."""

    log: Path  # lines "place number" of all items that were started
    faults: dict[str, Row] = field(default_factory=dict)  # by place: arguments of `DrivenWork.fail`
    kill_driver_at: tuple[str, int] | None = None  # place, and number of finished items there
    light: bool = False  # use `LightTeacher`
    meet: Path | None = None  # folder: items of two stages wait until nodes have had some on two nodes
    step: int = 0  # training step of the fault "training"
    ranks: int = 1  # of the teacher
    processes: Path | None = (
        None  # gets the ids of the processes of each replica of a teacher of several ranks, a line each
    )


class LightTeacher:
    """A teacher that needs no loading: a function of token, position and length."""

    def embed(self, ids: Any, mask: Any) -> Any:
        import torch

        place = torch.arange(ids.shape[1]) / torch.from_numpy(mask).sum(dim=1, keepdim=True)
        return torch.sin((torch.from_numpy(ids) + place)[..., None] * torch.arange(1, 17))


class DrivenWork:
    """Work on a worker: cuts small shards, and logs, waits or dies as the options say."""

    def __init__(self, work: Work, place: str, options: Options) -> None:
        self.work, self.place, self.options = work, place, options

    def __call__(self, *arguments: Any) -> Any:
        from msense.stages import embedding_store

        embedding_store.SHARD_BYTES = (60_000, 60_000)
        item = arguments[0] if arguments else {}
        if isinstance(item, dict) and "number" in item:
            with self.options.log.open("a") as file:
                file.write(f"{self.place} {item['number']}\n")
            if self.options.meet and self.place in ("embed", "clustering"):
                meet(self.options.meet / self.place, wait=self.place == "clustering" or item["number"] >= 3)
        if self.place in self.options.faults:
            return self.fail(arguments, **self.options.faults[self.place])
        return self.work(*arguments)

    def fail(self, arguments: tuple, flag: Path, at: str = "", hold: bool = False) -> Any:
        """Run the work, in which `die_once` is called: at the call of a function of `storage` (in a write), or at once.

        At "ranks", every process of a teacher of several ranks dies once, this one last.
        """
        from msense.io import storage

        if at == "ranks":
            marks = [flag.with_name(f"{flag.name} {rank}") for rank in range(self.options.ranks)]
            for mark, process in reversed(list(zip(marks, replica_of(self.work), strict=True))):
                if not mark.exists():
                    mark.touch()
                    os.kill(process, signal.SIGKILL)
                    break
            return self.work(*arguments)
        if not at:
            die_once(flag, hold)
            return self.work(*arguments)
        with pytest.MonkeyPatch.context() as patch:
            original = getattr(storage, at)
            patch.setattr(storage, at, lambda *given: (die_once(flag, hold), original(*given))[1])
            return self.work(*arguments)


def die_once(flag: Path, hold: bool = False) -> None:
    """Kill this process unless the flag exists; with `hold`, wait until its node is killed."""
    try:
        file = flag.open("x")
    except FileExistsError:
        return
    if not hold:
        os.kill(os.getpid(), signal.SIGKILL)
    import ray

    with file:
        file.write(ray.get_runtime_context().get_node_id())
    time.sleep(600)


def meet(folder: Path, wait: bool) -> None:
    """Record this node in a folder; if `wait`, wait for a second one."""
    import ray

    folder.mkdir(parents=True, exist_ok=True)
    (folder / ray.get_runtime_context().get_node_id()).touch()
    until = time.monotonic() + 300
    while wait and len(list(folder.iterdir())) < 2:
        if time.monotonic() > until:
            raise RuntimeError("no call from another node")
        time.sleep(0.05)


def driven_actor(actor: Work, place: str, options: Options, **arguments: Any) -> DrivenWork:
    """Make an actor on a worker."""
    if options.light:
        from msense.stages import reading

        reading.load_teacher = lambda settings: LightTeacher()
    made = actor(**arguments)
    if options.processes:
        with options.processes.open("a") as file:
            print(*replica_of(made), file=file)
    return DrivenWork(made, place, options)


def replica_of(actor: Any) -> list[int]:
    """Return the ids of the processes of an actor's teacher: its own, and those of the other ranks."""
    return [os.getpid(), *(follower.pid for follower in actor.reader.teacher.followers)]


class DyingChunkWorker:
    """A clustering worker that dies once in the second round of a token."""

    def __init__(self, actor: Work, fault: Row | None, *arguments: Any) -> None:
        self.worker, self.fault = actor(*arguments), fault

    def __getattr__(self, method: str) -> Work:
        return getattr(self.worker, method)

    def partial(self, chunks: object, state: Any) -> object:
        if self.fault and state.rounds:
            die_once(self.fault["flag"], self.fault.get("hold", False))
        return self.worker.partial(chunks, state)


class DrivenExecutor(RayExecutor):
    """Runs work on Ray with the faults of `Options`, in small shards."""

    def __init__(self, options: Options, workers: int | None = None) -> None:
        super().__init__(RayExecutor.connect(workers, ranks=options.ranks).resources)
        self.options = options

    def _die_at(self, place: str, number: int = 1) -> None:
        if (place, number) == self.options.kill_driver_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, place: str, rows: Iterator[Row]) -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            self._die_at(place, number)
            yield row

    def map(self, name: str, work: Work, items: Sequence[Any], *common: Any, **options: Any) -> Iterator[Row]:
        return self._counted(name, super().map(name, DrivenWork(work, name, self.options), items, *common, **options))

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        made = partial(driven_actor, actor, name, self.options)
        return self._counted(name, super().map_actors(name, made, arguments, items))

    def reduce(self, name: str, work: Work, items: Sequence[Any], *common: Any) -> Any:
        self._die_at(name)
        return super().reduce(name, DrivenWork(work, name, self.options), items, *common)

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        place = name_of(work)
        self._die_at(place)
        result = super().run(DrivenWork(work, place, self.options), *arguments, device=device)
        self._die_at(f"after {place}")
        return result

    @contextmanager
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        made = partial(DyingChunkWorker, actor, self.options.faults.get("large tokens"))
        with super().clustering_workers(made, *arguments) as workers:
            yield [partial(self._call, worker) for worker in workers]

    def _call(self, worker: Worker, method: str, *arguments: Any) -> Any:
        self._die_at(f"large tokens: {method}")
        return worker(method, *arguments)

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> TrainingResult:
        self._die_at("training")
        if fault := self.options.faults.get("training"):
            worker = partial(train_with_fault, worker, self.options.step, fault)
        return super().train(name, worker, settings, folder)


def train_with_fault(worker: Work, step: int, fault: Row, settings: Any, session: Any) -> Any:
    """Run a training worker; the first one to reach a step, counted in each worker, dies there or waits for that."""
    from msense.training.distiller import Trainer

    original, steps = Trainer.backward, count(1)

    def counted(self: Trainer, *arguments: Any) -> dict:
        if next(steps) == step:
            die_once(**fault)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "backward", counted)
        return worker(settings, session)


def run(settings: dict, options: Options, cluster: dict[str, str] | None = None) -> dict:
    """Build, or distill if the settings name a dictionary, on a cluster or on the Ray of this process."""
    os.environ |= cluster or {}  # Ray connects when it is imported
    from msense.config.build import BuildConfig
    from msense.config.distill import DistillConfig
    from msense.pipelines.build import build_dictionary
    from msense.pipelines.distill import distill_student

    executor = DrivenExecutor(options, settings.get("workers"))
    with small_partitions():
        if "dictionary" in settings:
            return distill_student(DistillConfig(**settings), executor)
        return build_dictionary(BuildConfig(**settings), executor)


def start(settings: dict, options: Options, address: str | None = None) -> BaseProcess:
    """Start a driver on a cluster, by default that of the test session; a fork server imports its modules."""
    if address is None:
        import ray

        address = ray.get_runtime_context().gcs_address
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["driver", "msense.pipelines.build", "msense.pipelines.distill", "ray.data", "torch", "transformers"]
    )
    cluster = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    process = context.Process(target=run, args=(json.loads(json.dumps(settings)), options, cluster))
    process.start()
    return process
