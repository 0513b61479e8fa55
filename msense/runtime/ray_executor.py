"""Run a job on Ray: connect to a cluster or start a local one, and map work over tasks and actors.

Ray Data hands the work of teacher actors to a pool of them; other work runs in plain Ray tasks, since Ray Data's scheduler
starts only about ten tasks a second. Every task reserves half a CPU, so that Ray Data's own operators always find room; the
number of tasks at a time is bounded by `Resources`.
"""

import atexit
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from msense.errors import InputError, MsenseError
from msense.io.scratch import scratch_folder
from msense.runtime.executor import (
    Executor,
    LazyActor,
    Needs,
    Row,
    TrainingResult,
    Work,
    Worker,
    died,
    merged,
    name_of,
    reportable,
)
from msense.runtime.progress import track
from msense.runtime.resources import SINGLE_THREADED, TASK_CPUS, Node, Resources, plan_workers

logger = logging.getLogger(__name__)
OOM_RETRIES = 3  # of a task whose worker died: enough to survive crashes, bounded for work that always kills its worker
RESTARTS = 10  # of an actor: nodes may come and go
MERGED_AT_ONCE = 4
_RESOURCES = ("CPU", "GPU", "memory")
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": str(OOM_RETRIES),  # the default is without limit
    "RAY_AUTH_MODE": "token",  # a local Ray is closed to other users of the machine
    "RAY_DATA_LOG_LEVEL": "ERROR",  # `track` reports its progress
}
_LOCAL_SETTINGS = {"RAY_BACKEND_LOG_LEVEL": "fatal"}  # Ray Data's own actors warn without cause
_ERRORS: tuple[type[Exception], ...] = (InputError, MsenseError, OSError)  # of actors, as their rows name them
MAX_WORKERS = 1 << 20  # more than any cluster has
MAX_TEMP_PATH = 26  # characters of the temporary folder: paths of Ray's sockets in it must not exceed 107


class RayExecutor(Executor):
    """Runs work on the Ray cluster that this process is connected to."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    @classmethod
    def connect(
        cls, workers: int | None = None, gpus_per_actor: float = 1.0, ranks: int = 1, offload: bool = False
    ) -> "RayExecutor":
        """Connect to the cluster of RAY_ADDRESS, or start a local Ray; for the arguments see `plan_workers`.

        Raises:
            InputError: no node of the cluster could ever run the job.
        """
        _initialize(workers)
        resources = plan_workers(nodes(), workers, gpus_per_actor, ranks, offload)
        if not any(node.count and node.offers.get("CPU") for node in resources.nodes):
            logger.info("the cluster has no CPUs yet; waiting for its autoscaler to add nodes")
        return cls(replace(resources, most=(workers or MAX_WORKERS) if os.environ.get("RAY_ADDRESS") else 0))

    def map(
        self, name: str, work: Work, items: Sequence[Any], *common: Any, isolated: bool = False, needs: Needs = None
    ) -> Iterator[Row]:
        for reference in track(name, self._window(name, work, items, common, needs), len(items)):
            yield self.get(reference)

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        if not items:
            return
        import ray
        from ray.data import ActorPoolStrategy

        now = min(self.resources.actors, len(items))
        most = min(max(self.resources.actors, self.resources.most), len(items))
        grows = {"min_size": 1, "initial_size": now, "max_size": most}  # onto nodes that join later
        pool = ActorPoolStrategy(**(grows if most > now else {"size": now}), max_tasks_in_flight_per_actor=2)
        options: Row = {**self.resources.teacher, "fn_constructor_args": (partial(actor, **arguments),)}
        # unlimited task retries: until Ray knows that a node is gone, calls of its actors fail every second and are counted
        options |= {"max_restarts": RESTARTS, "max_task_retries": -1}
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"item": json.dumps(item)} for item in items]
        with warnings.catch_warnings():  # until Ray 2.64 there is no other way to bound retries
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_RowActor, compute=pool, **options)
        dataset.set_name(name.replace(" ", "_"))
        with _plain_errors():
            for row in track(name, dataset.iter_rows(), len(rows)):
                for kind in _ERRORS:
                    if row["error"] == kind.__name__:
                        raise kind(row["result"])
                yield json.loads(row["result"])

    def reduce(self, name: str, work: Work, items: Sequence[Any], *common: Any) -> Any:
        merge = _task(f"{name}: merge").remote
        done: list[Any] = []
        for reference in track(name, self._window(name, work, items, common, None), len(items)):
            done.append(reference)
            if len(done) == MERGED_AT_ONCE:
                done = [merge(merged, *done)]
        return merge(merged, *done) if len(done) > 1 else done[0]

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        return self.get(_task(name_of(work), num_gpus=int(device == "cuda")).remote(work, *arguments))

    def put(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def get(self, handle: Any) -> Any:
        import ray

        with _plain_errors():
            return ray.get(handle)

    @contextmanager
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        import ray

        needs = {**self.resources.clustering, "max_restarts": 3, "scheduling_strategy": "SPREAD"}
        needs |= {"max_task_retries": -1}  # see `map_actors`
        count = replace(self.resources, nodes=nodes()).clusterers
        workers = [ray.remote(LazyActor).options(**needs).remote(partial(actor, *arguments)) for _ in range(count)]
        try:
            yield [worker.call.remote for worker in workers]
        finally:
            for worker in workers:
                ray.kill(worker)

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> TrainingResult:
        from msense.runtime import ray_training

        return ray_training.train(name, worker, settings, folder, self.resources)

    def _window(
        self, name: str, work: Work, items: Sequence[Any], common: tuple[Any, ...], needs: Needs
    ) -> Iterator[Any]:
        """Keep as many tasks running as there are workers; yield the object reference of each when it is done."""
        import ray

        task = _task(name, scheduling_strategy="SPREAD", **(needs or {}))
        running: list[Any] = []
        for item in items:
            if len(running) >= self._tasks_now():
                done, running = ray.wait(running)
                yield from done
            running.append(task.remote(work, item, *common))
        while running:
            done, running = ray.wait(running)
            yield from done

    def _tasks_now(self) -> int:
        """Return how many tasks may run at a time, including those on nodes that joined later."""
        import ray

        if self.resources.most <= self.resources.tasks:
            return self.resources.tasks
        return max(self.resources.tasks, min(self.resources.most, int(ray.cluster_resources().get("CPU", 0))))


def _call(work: Work, *arguments: Any) -> Any:
    return work(*arguments)


def _task(name: str, **options: Any) -> Any:
    """Return a Ray task that calls its first argument with the others; Ray itself makes tasks of plain functions only."""
    import ray

    return ray.remote(_call).options(**{"num_cpus": TASK_CPUS, "name": name, **options})


def _initialize(workers: int | None) -> None:
    """Connect to Ray unless this process is connected already."""
    if "ray" not in sys.modules:  # Ray reads these when it is imported
        local = {} if os.environ.get("RAY_ADDRESS") else _LOCAL_SETTINGS
        os.environ |= {name: value for name, value in (_SETTINGS | local).items() if name not in os.environ}
    import ray

    if ray.is_initialized():
        return
    environment = {**SINGLE_THREADED, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    options: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "logging_level": logging.WARNING}
    if not os.environ.get("RAY_ADDRESS"):
        cpus = max(os.cpu_count() or 1, workers or 1)
        options |= {"include_dashboard": False, "log_to_driver": False, "num_cpus": cpus}
        if not os.environ.get("RAY_TMPDIR"):
            environment["TMPDIR"] = options["_temp_dir"] = _temporary_folder()
    ray.init(**options)


def nodes() -> list[Node]:
    """Return the nodes that are there, and those that an autoscaler may start."""
    import ray
    from ray._private.state import state  # as Ray Data and Ray Train do

    here = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    known = [Node({name: own[name] for name in _RESOURCES if name in own}, 1, 1) for own in here]
    config = state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        offers = {name: float(group.resources[name]) for name in _RESOURCES if name in group.resources}
        most = group.max_count if group.max_count >= 0 else len(here) + 1
        known.append(Node(offers, 0, most))
    return known


def _temporary_folder() -> str:
    """Return a folder for the files of a local Ray; both end with this process."""
    import ray

    usual = Path(tempfile.gettempdir())
    held = ExitStack()  # left in reverse order; the folder of a killed process is removed when the next one is made
    folder = held.enter_context(scratch_folder(usual if len(str(usual)) <= MAX_TEMP_PATH else Path("/tmp")))
    held.callback(ray.shutdown)
    atexit.register(held.close)  # after Ray's own registration, hence before it
    return str(folder)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn Ray's errors into what the work raised, or into an error about its death."""
    import ray

    errors = ray.exceptions
    deaths = (errors.WorkerCrashedError, errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError)
    try:
        yield
    except (errors.RayTaskError, *deaths) as error:
        cause = error.cause if isinstance(error, errors.RayTaskError) else error
        if isinstance(cause, deaths):  # of the work, or of what computes its arguments
            first = next(iter(str(cause).strip().splitlines()), "")
            death = died("at the same work", f"{type(cause).__name__}: {first}")
            logs = "Ray's logs have more (those of a local Ray are kept if RAY_TMPDIR names a folder)"
            raise MsenseError(f"{death}; {logs}") from error
        if failure := reportable(cause):
            raise failure from None
        raise


class _RowActor(LazyActor):
    """An actor of Ray Data: expected errors are results, as Ray Data would wrap them."""

    def __call__(self, row: Row) -> Row:
        try:
            return {"result": json.dumps(self.call("__call__", json.loads(row["item"]))), "error": ""}
        except _ERRORS as error:
            kind = next(kind for kind in _ERRORS if isinstance(error, kind))
            return {"result": str(error), "error": kind.__name__}
