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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from msense.errors import InputError, MsenseError
from msense.io.scratch import scratch_folder
from msense.runtime import ray_training
from msense.runtime.executor import (
    Executor,
    Row,
    TrainingResult,
    Worker,
    died,
    expected_errors,
    merged,
    name_of,
    reportable,
)
from msense.runtime.progress import track, warn_of_skew
from msense.runtime.resources import TASK_CPUS, Node, Resources, plan_workers

logger = logging.getLogger(__name__)

RETRIES = 3  # of a task whose worker died: enough to survive crashes, bounded for work that always kills its worker
RESTARTS = 10  # of an actor: nodes may come and go
MERGED_AT_ONCE = 4
_RESOURCES = ("CPU", "GPU", "memory")
MAX_WORKERS = 1 << 20  # more than any cluster has
MAX_TEMP_PATH = 26  # characters of the temporary folder: paths of Ray's sockets in it must not exceed 107


class RayExecutor(Executor):
    """Runs work on the Ray cluster that this process is connected to.

    Example:
        >>> executor = RayExecutor.connect(workers=2)
        >>> executor.run(max, 3, 5)
        5
    """

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    @classmethod
    def connect(cls, workers: int | None = None, gpus_per_actor: float = 1.0) -> "RayExecutor":
        """Connect to the cluster of RAY_ADDRESS, or start a local Ray.

        Args:
            workers: actors and tasks at a time, at most one per GPU or CPU; None = one per GPU or CPU.
            gpus_per_actor: GPUs of a teacher actor.

        Raises:
            InputError: no node of the cluster could ever run the job.
        """
        _initialize(workers)
        resources = plan_workers(nodes(), workers, gpus_per_actor)
        if not any(node.count and node.offers.get("CPU") for node in resources.nodes):
            logger.info("the cluster has no CPUs yet; waiting for its autoscaler to add nodes")
        return cls(replace(resources, most=(workers or MAX_WORKERS) if os.environ.get("RAY_ADDRESS") else 0))

    def map(
        self,
        name: str,
        work: Callable[..., Row],
        items: Sequence[Any],
        *common: Any,
        isolated: bool = False,
        needs: Mapping[str, float] | None = None,
    ) -> Iterator[Row]:
        """Run `work(item, *common)` in plain Ray tasks, see `Executor.map`."""
        for reference in track(name, self._window(name, work, items, common, needs), len(items)):
            yield self.get(reference)

    def map_actors(self, name: str, actor: type, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        """Run the items through a pool of actors fed by Ray Data, see `Executor.map_actors`."""
        if not items:
            return
        import ray
        from ray.data import ActorPoolStrategy

        now = min(self.resources.actors, len(items))
        most = min(max(self.resources.actors, self.resources.most), len(items))
        grows = {"min_size": 1, "initial_size": now, "max_size": most}  # onto nodes that join later
        pool = ActorPoolStrategy(**(grows if most > now else {"size": now}), max_tasks_in_flight_per_actor=2)
        options: Row = {**self.resources.teacher, "fn_constructor_args": (actor, arguments)}
        # unlimited task retries: until Ray knows that a node is gone, calls of its actors fail every second and are counted
        options |= {"max_restarts": RESTARTS, "max_task_retries": -1}
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"item": json.dumps(item)} for item in items]
        with warnings.catch_warnings():  # until Ray 2.64 there is no other way to bound retries
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                _GuardedActor, compute=pool, **options
            )
        dataset.set_name(name.replace(" ", "_"))
        seconds = []
        with _plain_errors():
            for row in track(name, dataset.iter_rows(), len(rows)):
                seconds.append(row["seconds"])
                yield _unwrap(row)
        warn_of_skew(name, seconds)

    def reduce(self, name: str, work: Callable[..., Any], items: Sequence[Any], *common: Any) -> Any:
        """Run `work(item, *common)` in tasks and merge the results a few at a time, see `Executor.reduce`."""
        import ray

        merge = ray.remote(merged).options(name=f"{name}: merge", num_cpus=TASK_CPUS)
        done: list[Any] = []
        for reference in track(name, self._window(name, work, items, common, None), len(items)):
            done.append(reference)
            if len(done) == MERGED_AT_ONCE:
                done = [merge.remote(*done)]
        return merge.remote(*done) if len(done) > 1 else done[0]

    def run(self, work: Callable[..., Any], *arguments: Any, device: str = "cpu") -> Any:
        """Run one task away from the driver, see `Executor.run`."""
        import ray

        needs = {"num_cpus": TASK_CPUS, "num_gpus": int(device == "cuda"), "name": name_of(work)}
        return self.get(ray.remote(work).options(**needs).remote(*arguments))

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Start one task and return a reference to its result."""
        import ray

        return ray.remote(work).options(num_cpus=TASK_CPUS, name=name_of(work)).remote(*arguments)

    def put(self, value: Any) -> Any:
        """Put a value into the object store and return a reference to it."""
        import ray

        return ray.put(value)

    def get(self, handle: Any) -> Any:
        """Wait for a result, or for several, see `Executor.get`."""
        import ray

        with _plain_errors():
            return ray.get(handle)

    @contextmanager
    def clustering_workers(self, actor: type, *arguments: Any) -> Iterator[list[Worker]]:
        """Start actors that share the points of large tokens, see `Executor.clustering_workers`."""
        import ray

        needs = {**self.resources.clustering, "max_restarts": 3, "scheduling_strategy": "SPREAD"}
        needs |= {"max_task_retries": -1}  # see `map_actors`
        count = replace(self.resources, nodes=nodes()).clusterers
        workers = [ray.remote(actor).options(**needs).remote(*arguments) for _ in range(count)]
        try:
            yield [_RayWorker(worker) for worker in workers]
        finally:
            for worker in workers:
                ray.kill(worker)

    def train(self, name: str, worker: Callable[..., Any], settings: Any, folder: str) -> TrainingResult:
        """Train with Ray Train, see `Executor.train`."""
        return ray_training.train(name, worker, settings, folder, self.resources)

    def _window(
        self,
        name: str,
        work: Callable[..., Any],
        items: Sequence[Any],
        common: tuple[Any, ...],
        needs: Mapping[str, float] | None,
    ) -> Iterator[Any]:
        """Keep as many tasks running as there are workers; yield the object reference of each when it is done."""
        import ray

        task = ray.remote(work).options(name=name, scheduling_strategy="SPREAD", **(needs or {"num_cpus": TASK_CPUS}))
        running: dict[Any, float] = {}
        seconds: list[float] = []

        def first_done() -> Any:
            reference = ray.wait(list(running))[0][0]
            seconds.append(time.monotonic() - running.pop(reference))
            return reference

        for item in items:
            if len(running) >= self._tasks_now():
                yield first_done()
            running[task.remote(item, *common)] = time.monotonic()
        while running:
            yield first_done()
        warn_of_skew(name, seconds)

    def _tasks_now(self) -> int:
        """Return how many tasks may run at a time, including those on nodes that joined later."""
        import ray

        if self.resources.most <= self.resources.tasks:
            return self.resources.tasks
        return max(self.resources.tasks, min(self.resources.most, int(ray.cluster_resources().get("CPU", 0))))


class _RayWorker:
    """A Ray actor, called by the name of a method."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.actor, method).remote(*arguments)


def _initialize(workers: int | None) -> None:
    """Connect to Ray unless this process is connected already."""
    if "ray" not in sys.modules:  # Ray reads these when it is imported
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # the default is without limit
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a local Ray is closed to other users of the machine
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # `track` reports its progress
        if not os.environ.get("RAY_ADDRESS"):
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data's own actors warn without cause
    import ray

    if ray.is_initialized():
        return
    environment = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LOCAL_SIZE": "1",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
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

    deaths = (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.RayActorError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.NodeDiedError,
    )
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if failure := reportable(error.cause):
            raise failure from None
        if isinstance(error.cause, deaths):  # an argument of the work was never computed
            raise _died(error.cause) from error
        raise
    except deaths as error:
        raise _died(error) from error


def _died(error: Exception) -> MsenseError:
    """Return the error for work that Ray gave up on."""
    first = next(iter(str(error).strip().splitlines()), "")
    logs = "Ray's logs have more (those of a local Ray are kept if RAY_TMPDIR names a folder)"
    return MsenseError(f"{died('at the same work', f'{type(error).__name__}: {first}')}; {logs}")


def _unwrap(row: Row) -> Row:
    """Return what the work returned, or raise what it raised."""
    if row["error"]:
        raise (InputError if row["usage"] else MsenseError)(row["error"])
    value: Row = json.loads(row["result"])
    return value


def _guard(work: Callable[[Any], Row], item: Any) -> Row:
    """Run work so that an expected error travels as a row, not as a traceback through Ray Data."""
    began = time.monotonic()
    try:
        result = json.dumps(work(item))
        return {"result": result, "error": "", "usage": False, "seconds": time.monotonic() - began}
    except expected_errors() as error:
        failure = reportable(error)
        if failure is None:
            raise
        return {"result": "", "error": str(failure), "usage": isinstance(failure, InputError), "seconds": 0.0}


class _GuardedActor:
    """An actor of Ray Data; an error of its construction is reported with the first item."""

    def __init__(self, actor: type, arguments: Row) -> None:
        def make(arguments: Row) -> Row:
            self.actor = actor(**arguments)
            return {}

        made = _guard(make, arguments)
        self.failure = made if made["error"] else None

    def __call__(self, row: Row) -> Row:
        return self.failure or _guard(self.actor, json.loads(row["item"]))
