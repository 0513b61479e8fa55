"""Drivers on Ray in processes of their own, which tests kill, with a small corpus cut into many work items."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from executors import RayWithFaults, die_once, small_partitions

from msense.runtime.executor import Row, TrainingResult, Work, Worker, name_of
from msense.runtime.ray_executor import RayExecutor

SMALL = (60_000, 60_000)


@dataclass(frozen=True)
class Options:
    """How a driver is disturbed; see `RayWithFaults`."""

    log: Path
    faults: dict[str, Row] = field(default_factory=dict)
    kill_driver_at: tuple[str, int] | None = None
    delay: Callable[[Work], Work] | None = None
    light: bool = False  # use `LightTeacher`
    meet: Path | None = None  # folder: items of two stages wait until nodes have had some on two nodes
    step: int = 0  # training step of the fault "training"


class LightTeacher:
    """A teacher that needs no loading: a function of token, position and length."""

    def embed(self, ids: Any, mask: Any) -> Any:
        import torch

        place = torch.arange(ids.shape[1]) / torch.from_numpy(mask).sum(dim=1, keepdim=True)
        return torch.sin((torch.from_numpy(ids) + place)[..., None] * torch.arange(1, 17))


class DrivenExecutor(RayWithFaults):
    """Runs work on Ray with the faults of `Options`, in small shards."""

    def __init__(self, executor: RayExecutor, options: Options) -> None:
        super().__init__(executor, options.log, options.faults, options.kill_driver_at, options.delay)
        self.options = options

    def _logged(self, place: str, work: Work) -> Work:
        meet = self.options.meet
        if meet and place in ("embed", "clustering"):
            work = Meeting(work, meet / place, first=3 if place == "embed" else 0)
        return super()._logged(place, SmallShards(work))

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Any) -> Any:
        return super().map_actors(name, partial(light_actor, actor) if self.options.light else actor, arguments, items)

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        result = super().run(work, *arguments, device=device)
        self._die_at(f"after {name_of(work)}", 1)
        return result

    @contextmanager
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        with super().clustering_workers(actor, *arguments) as workers:
            yield [WatchedWorker(worker, self._die_at) for worker in workers]

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> TrainingResult:
        self._die_at("training", 1)
        if fault := self.faults.get("training"):
            worker = partial(train_with_fault, worker, self.options.step, fault)
        return super().train(name, worker, settings, folder)


class WatchedWorker:
    """A clustering worker; the driver may die when it calls a method."""

    def __init__(self, worker: Worker, die_at: Callable[[str, int], None]) -> None:
        self.worker, self.die_at = worker, die_at

    def call(self, method: str, *arguments: Any) -> Any:
        self.die_at(f"large tokens: {method}", 1)
        return self.worker.call(method, *arguments)


class SmallShards:
    """Work that cuts small shards on a worker."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.__name__ = name_of(work)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from msense.stages import embedding_store

        embedding_store.SHARD_BYTES = SMALL
        return self.work(*arguments, **options)


class LastFirst:
    """Work that is slower for the first items than for the last."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, *arguments: object) -> object:
        if arguments and isinstance(arguments[0], dict) and "number" in arguments[0]:
            time.sleep(0.6 / (1 + arguments[0]["number"]))
        return self.work(*arguments)


class Deadly:
    """Work, and an actor, that records each item and dies at item 1."""

    def __init__(self, tried: Path, first: int | None = None) -> None:
        self.tried = tried
        if first is not None:
            self(first)

    def __call__(self, item: int) -> Row:
        with self.tried.open("a") as file:
            file.write(f"{item}\n")
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"item": item}


class Meeting:
    """Work that waits, from item `first` on, until it has been called on two nodes."""

    def __init__(self, work: Work, folder: Path, first: int) -> None:
        self.work, self.folder, self.first = work, folder, first

    def __call__(self, item: Row, *more: Any) -> Any:
        import ray

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ray.get_runtime_context().get_node_id()).touch()
        until = time.monotonic() + 300
        while item["number"] >= self.first and len(list(self.folder.iterdir())) < 2:
            if time.monotonic() > until:
                raise RuntimeError("no call from another node")
            time.sleep(0.05)
        return self.work(item, *more)


def light_actor(actor: Work, **arguments: Any) -> Any:
    """Make an actor with a light teacher, on a worker."""
    from msense.stages import embed, label

    embed.load_teacher = label.load_teacher = lambda settings: LightTeacher()
    return actor(**arguments)


def train_with_fault(worker: Work, step: int, fault: Row, settings: Any, session: Any) -> Any:
    """Run a training worker; the first one to reach a step, counted in each worker, dies there or waits for that."""
    from msense.training.distiller import Trainer

    original, steps = Trainer.backward, count(1)

    def counted(self: Trainer, *arguments: Any) -> dict:
        if next(steps) == step:
            die_once(fault["flag"], fault.get("hold", False))
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "backward", counted)
        return worker(settings, session)


def run(settings: dict, options: Options) -> dict:
    """Build, or distill if the settings name a dictionary, on the Ray of this process."""
    from msense.config.build import BuildConfig
    from msense.config.distill import DistillConfig
    from msense.pipelines.build import build_dictionary
    from msense.pipelines.distill import distill_student

    executor = DrivenExecutor(RayExecutor.connect(settings.get("workers")), options)
    with small_partitions():
        if "dictionary" in settings:
            return distill_student(DistillConfig(**settings), executor)
        return build_dictionary(BuildConfig(**settings), executor)


def drive(settings: dict, options: Options, address: str, auth: str) -> None:
    """Run a job on a cluster, to which Ray connects when it is imported."""
    os.environ |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": auth}
    run(settings, options)


def start(settings: dict, options: Options, address: str | None = None) -> BaseProcess:
    """Start a driver on a cluster, by default that of the test session; a fork server imports its modules."""
    if address is None:
        import ray

        address = ray.get_runtime_context().gcs_address
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["driver", "msense.pipelines.build", "msense.pipelines.distill", "ray.data", "torch", "transformers"]
    )
    arguments = (json.loads(json.dumps(settings)), options, address, os.environ.get("RAY_AUTH_MODE", "token"))
    process = context.Process(target=drive, args=arguments)
    process.start()
    return process
