"""Drivers in processes of their own, which tests kill or disturb, with a small corpus cut into many work items.

Patched functions reach Ray's workers by value, so that each work item is logged where it runs.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SMALL = (60_000, 60_000)


def light_teacher() -> type:
    """Return a class for a teacher that needs no loading: a function of token, position and length."""

    class LightTeacher:
        def __init__(self, name: str, **settings: object) -> None:
            pass

        def embed(self, ids: Any, mask: Any) -> Any:
            import torch

            place = torch.arange(ids.shape[1]) / torch.from_numpy(mask).sum(dim=1, keepdim=True)
            return torch.sin((torch.from_numpy(ids) + place)[..., None] * torch.arange(1, 17))

    return LightTeacher


def logged(function: Callable, log: Path, stage: str, key: str) -> Callable:
    """Return the function, which appends "stage number" to the log when it starts on an item."""

    def call(item: dict, *more: object, **named: object) -> object:
        with log.open("a") as file:
            file.write(f"{stage} {item[key]}\n")
        return function(item, *more, **named)

    return call


def in_small_pieces(log: Path, patch: Callable[[Any, str, Any], None], light: bool = False) -> None:
    """Cut a small corpus into several partitions and shards, and log each work item when a worker starts on it.

    Args:
        log: file of lines "stage number".
        patch: sets an attribute.
        light: use `light_teacher`.
    """
    from msense.pipelines import build
    from msense.stages import cluster, embed, exemplars, passages, plan, sense_counts

    write_plan, teacher = plan._write, light_teacher()

    def small_shards(*arguments: object) -> object:
        from msense.stages import embed

        embed.SHARD_BYTES = SMALL
        return write_plan(*arguments)

    class LoggedActor(embed.EmbedActor):
        def __init__(self, **given: object) -> None:
            if light:
                from msense.stages import embed

                embed.Teacher = teacher
            super().__init__(**given)

        def __call__(self, item: dict) -> dict:
            return logged(super().__call__, log, "occurrences", "number")(item)

    patch(embed, "UNIT_BYTES", SMALL)
    patch(plan, "_write", small_shards)
    patch(passages, "_write_piece", logged(passages._write_piece, log, "passages", "number"))
    patch(sense_counts, "look_at_shard", logged(sense_counts.shard_sense_counts, log, "senses", "shard"))
    patch(cluster, "cluster_shard", logged(cluster.cluster_shard, log, "clustering", "shard"))
    patch(exemplars, "_resolve_unit", logged(exemplars._resolve_unit, log, "exemplars", "number"))
    patch(build, "OccurrenceActor", LoggedActor)


def labels_in_small_pieces(log: Path, patch: Callable[[Any, str, Any], None]) -> None:
    """Label one block per partition with a light teacher, and log like `in_small_pieces`."""
    from msense.stages import label

    teacher = light_teacher()

    class LoggedLabelActor(label.LabelActor):
        def __init__(self, **given: object) -> None:
            from msense.stages import label

            label.load_teacher = lambda settings: teacher(settings.teacher)
            super().__init__(**given)

        def __call__(self, item: dict) -> dict:
            return logged(super().__call__, log, "labels", "number")(item)

    patch(label, "UNIT_BYTES", (1, 1))
    patch(label, "LabelActor", LoggedLabelActor)


def connect_to(address: str, auth: str = "token") -> None:
    """Set the cluster that Ray connects to when it is imported."""
    os.environ |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": auth}


def drive(settings: dict, address: str, log: str, kill_at: tuple[str, int] | None, light: bool) -> None:
    """Build, or distill without training, and die when stage `kill_at[0]` has finished `kill_at[1]` items."""
    connect_to(address)
    from msense.config.build import BuildConfig
    from msense.config.distill import DistillConfig
    from msense.io import storage
    from msense.pipelines import distill as distill_module
    from msense.pipelines.build import build_dictionary
    from msense.runtime import ray_executor
    from msense.runtime.progress import track
    from msense.stages import distributed_kmeans

    in_small_pieces(Path(log), setattr, light)
    track, write_json = track, storage.write_json

    def killing_track(name: str, rows: Iterator, total: int) -> Iterator:
        for number, row in enumerate(track(name, rows, total), 1):
            if (name, number) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    def killing_write(uri: str, value: dict) -> None:
        if kill_at and uri.endswith(kill_at[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(uri, value)

    ray_executor.track = distributed_kmeans.track = killing_track
    storage.write_json = killing_write
    if "dictionary" in settings:
        labels_in_small_pieces(Path(log), setattr)
        distill_module.train = lambda *_: {}
        distill_module.distill_student(DistillConfig(**settings))
    else:
        build_dictionary(BuildConfig(**settings))


def disturbed(step: int, flag: Path, kill: bool) -> Callable:
    """Return the function of a training worker; the first worker to reach a step dies there, or waits to be killed.

    Args:
        step: step of the whole training, counted in each worker.
        flag: file that gets the id of the worker's node; once it exists, nothing happens.
        kill: die rather than wait.
    """

    def worker(given: dict) -> list:
        import time

        from msense.stages import train_worker
        from msense.training import distiller

        original, steps = distiller.Trainer._step, [0]

        def counted(self: object, *arguments: object) -> dict:
            steps[0] += 1
            if steps[0] == step and not flag.exists():
                import ray

                flag.write_text(ray.get_runtime_context().get_node_id())
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)
            return original(self, *arguments)

        distiller.Trainer._step = counted
        return train_worker.train_worker(given)

    return worker


def drive_training(settings: dict, address: str, step: int, flag: str) -> None:
    """Distill, with training; wait at a step until this process is killed."""
    connect_to(address)
    from msense.config.distill import DistillConfig
    from msense.pipelines import distill as distill_module
    from msense.stages import train

    train.worker = disturbed(step, Path(flag), kill=False)
    distill_module.distill_student(DistillConfig(**settings))


def held_once(function: Callable, flag: Path) -> Callable:
    """Return a function whose first call writes the id of its node to a file and waits until that node is killed."""

    def call(*arguments: object, **named: object) -> object:
        import time
        from contextlib import suppress

        import ray

        with suppress(FileExistsError), flag.open("x") as file:
            file.write(ray.get_runtime_context().get_node_id())
            file.flush()
            time.sleep(600)
        return function(*arguments, **named)

    return call


def met(function: Callable, folder: Path, first: int = 0) -> Callable:
    """Return a function that waits, from item `first` on, until it has been called on two nodes."""

    def call(item: dict, *more: object) -> object:
        import time

        import ray

        (folder / ray.get_runtime_context().get_node_id()).touch()
        until = time.monotonic() + 300
        while item.get("number", item.get("shard")) >= first and len(list(folder.iterdir())) < 2:
            if time.monotonic() > until:
                raise RuntimeError("no call from another node")
            time.sleep(0.05)
        return function(item, *more)

    return call


def lose_a_node_in_each_stage(flags: Path, step: int) -> None:
    """Make one item of each stage, and a training worker at `step`, wait until its node is killed."""
    from msense.pipelines import build
    from msense.stages import (
        assemble,
        cluster,
        distributed_kmeans,
        exemplars,
        label,
        passages,
        plan,
        sense_counts,
        train,
    )
    from msense.stages.distributed_kmeans_worker import ChunkWorker

    places = {
        "passages": (passages, "_write_piece"),
        "plan": (plan, "_select"),
        "senses": (sense_counts, "look_at_shard"),
    }
    places |= {"clustering": (cluster, "cluster_shard"), "exemplars": (exemplars, "_resolve_unit")}
    for stage, (module, name) in places.items():
        setattr(module, name, held_once(getattr(module, name), flags / stage))
    build.assemble = held_once(assemble.assemble, flags / "dictionary")
    for stage, module, name in (("occurrences", build, "OccurrenceActor"), ("labels", label, "LabelActor")):
        actor = getattr(module, name)
        setattr(module, name, type(name, (actor,), {"__call__": held_once(actor.__call__, flags / stage)}))
    worker = ChunkWorker

    class HeldWorker(worker):
        def partial(self, part: object, state: Any) -> object:
            if state.rounds >= 1:
                return held_once(super().partial, flags / "large tokens")(part, state)
            return super().partial(part, state)

    distributed_kmeans.ChunkWorker = HeldWorker
    train.worker = disturbed(step, flags / "training", kill=False)


def meet_on_two_nodes(folder: Path) -> None:
    """Make teacher actors, from the fourth partition on, and clustering tasks wait until they run on two nodes."""
    from msense.pipelines import build
    from msense.stages import cluster
    from msense.stages.embed import EmbedActor

    for name in ("occurrences", "clustering"):
        (folder / name).mkdir(parents=True)
    actor = EmbedActor
    call = met(lambda item, self: actor.__call__(self, item), folder / "occurrences", first=3)
    build.EmbedActor = type("MeetingActor", (actor,), {"__call__": lambda self, item: call(item, self)})
    cluster.cluster_shard = met(cluster.cluster_shard, folder / "clustering")


def drive_on_nodes(settings: dict, address: str, auth: str, log: str, change: tuple[Callable, tuple] | None) -> None:
    """Build, or distill with training, with a light teacher, after calling `change` with its arguments."""
    connect_to(address, auth)
    from msense.config.build import BuildConfig
    from msense.config.distill import DistillConfig
    from msense.pipelines import distill as distill_module
    from msense.pipelines.build import build_dictionary

    in_small_pieces(Path(log), setattr, light=True)
    labels_in_small_pieces(Path(log), setattr)
    if change:
        change[0](*change[1])
    if "dictionary" in settings:
        distill_module.distill_student(DistillConfig(**settings))
    else:
        build_dictionary(BuildConfig(**settings))


def start(settings: dict, log: Path, kill_at: tuple[str, int] | None = None, light: bool = False) -> BaseProcess:
    """Start a driver that builds or labels."""
    return start_process(drive, settings, str(log), kill_at, light)


def start_process(target: Callable, settings: dict, *arguments: object, address: str | None = None) -> BaseProcess:
    """Start a driver on the cluster at `address`, by default that of the test session; a fork server imports its modules."""
    import ray

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["driver", "msense.pipelines.build", "msense.pipelines.distill", "ray.data", "torch", "transformers"]
    )
    address = address or ray.get_runtime_context().gcs_address
    plain = json.loads(json.dumps(settings))
    process = context.Process(target=target, args=(plain, address, *arguments))
    process.start()
    return process
