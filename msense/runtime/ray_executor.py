"""Ray, seen from the jobs: connect, map work over tasks or actors, report progress.

Work items and results are small rows of plain values (paths and counts); embeddings never pass through here. A local
Ray is started when no cluster is named. Every task asks for half a CPU, so that Ray Data's own operators always find
room; how many run at a time is set by the size of the pool.
"""

import atexit
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from msense.errors import MsenseError
from msense.io.scratch import scratch_folder
from msense.runtime.executor import _MEMORY, Row, _failure, _merge, guard, unwrap
from msense.runtime.progress import track, warn_of_skew
from msense.runtime.resources import TASK_CPUS, Node, Resources, plan_workers

logger = logging.getLogger(__name__)
RETRIES = 3  # of a task whose worker died: a crash is survived, work that always kills its worker is not tried for ever
RESTARTS = 10  # of an actor: nodes may come and go, but one that always dies is not made for ever
MERGED_AT_ONCE = 4
_COUNTED = ("CPU", "GPU", "memory")
MANY = 1 << 20  # workers: more than any cluster has
LONGEST_TEMP = 26  # characters of the temporary folder's path: those of Ray's sockets in it must not exceed 107


def connect(workers: int | None = None, gpus_per_actor: float = 1.0) -> Resources:
    """Connect to the cluster of RAY_ADDRESS, or start a local Ray; return what to use of it.

    Args:
        workers: actors and tasks at a time, but no more than there are GPUs and CPUs; None = a teacher actor a GPU
            (a CPU where there is none), a task a CPU.
        gpus_per_actor: GPUs of a teacher actor.

    Raises:
        BadInput: the cluster has no node that could ever run the job.
    """
    if "ray" not in sys.modules:  # Ray reads these when it is imported
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # else without end
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a local Ray is closed to other users of the machine
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # its progress is told by `track`
        if not os.environ.get("RAY_ADDRESS"):
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data's own actors alarm without cause
    import ray

    if not ray.is_initialized():
        environment = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "LOCAL_SIZE": "1",
            "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        }
        options: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "logging_level": logging.WARNING}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {
                "include_dashboard": False,
                "log_to_driver": False,
                "num_cpus": max(os.cpu_count() or 1, workers or 1),
            }
            if not os.environ.get("RAY_TMPDIR"):
                environment["TMPDIR"] = options["_temp_dir"] = _temporary_folder()
        ray.init(**options)
    resources = plan_workers(nodes(), workers, gpus_per_actor)
    if not any(node.count and node.offers.get("CPU") for node in resources.nodes):
        logger.info("the cluster has no CPUs yet: its autoscaler is asked for nodes")
    return replace(resources, most=(workers or MANY) if os.environ.get("RAY_ADDRESS") else 0)


def nodes() -> list[Node]:
    """Return the nodes that are there, and those that an autoscaler may start."""
    import ray
    from ray._private.state import state  # whence Ray Data and Ray Train have it

    here = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    found = [Node({name: own[name] for name in _COUNTED if name in own}, 1, 1) for own in here]
    config = state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        offers = {name: float(group.resources[name]) for name in _COUNTED if name in group.resources}
        most = group.max_count if group.max_count >= 0 else len(here) + 1
        found.append(Node(offers, 0, most))
    return found


def refreshed(resources: Resources) -> Resources:
    """Return the same with the nodes that are there now; as they are where Ray is not running."""
    import ray

    return replace(resources, nodes=nodes()) if ray.is_initialized() else resources


def _temporary_folder() -> str:
    """Return a folder for the files of a local Ray, which is stopped and forgotten when this process ends."""
    import ray

    usual = Path(tempfile.gettempdir())
    held = ExitStack()  # left in reverse order; a folder of a killed process goes when the next one is made
    folder = held.enter_context(scratch_folder(usual if len(str(usual)) <= LONGEST_TEMP else Path("/tmp")))
    held.callback(ray.shutdown)
    atexit.register(held.close)  # after Ray's own registration, hence before it
    return str(folder)


def map_data(name: str, work: Callable[[Any], Row], items: Sequence[Any], resources: Resources) -> Iterator[Row]:
    """Run `work` on every item in tasks of Ray Data; yield the rows it returns, in any order.

    Raises:
        BadInput, MsenseError: what the work raised, on the driver's side again.
    """
    from ray.data import TaskPoolStrategy

    if items:
        pool = TaskPoolStrategy(size=min(resources.tasks, len(items)))
        yield from _run(name, _Guarded(work), items, pool, {"num_cpus": TASK_CPUS, "max_retries": RETRIES})


def map_actors(name: str, actor: type, arguments: Row, items: Sequence[Any], resources: Resources) -> Iterator[Row]:
    """Run the items through a pool of actors, one a GPU or CPU worker; yield the rows they return, in any order.

    Args:
        name: the stage, for progress.
        actor: a class; `actor(**arguments)` loads what it needs, calling it with an item does the work.
        arguments: what every actor is made with.
        items: the work.
        resources: how many actors, on which device.

    Raises:
        BadInput, MsenseError: what an actor raised, on the driver's side again.
    """
    from ray.data import ActorPoolStrategy

    if items:
        now, most = min(resources.actors, len(items)), min(max(resources.actors, resources.most), len(items))
        grows = {"min_size": 1, "initial_size": now, "max_size": most}  # onto nodes that come later
        pool = ActorPoolStrategy(**(grows if most > now else {"size": now}), max_tasks_in_flight_per_actor=2)
        needs: Row = dict(resources.teacher)
        # not RETRIES: until Ray knows that a node is gone, calls of its actors fail every second or so, and count
        needs |= {"max_restarts": RESTARTS, "max_task_retries": -1}
        yield from _run(name, _GuardedActor, items, pool, {**needs, "fn_constructor_args": (actor, arguments)})


def map_tasks(
    name: str,
    work: Callable[..., Row],
    items: Sequence[Any],
    resources: Resources,
    *common: Any,  # noqa: ANN401 - handed on to `work`
    needs: dict[str, float] | None = None,
) -> Iterator[Row]:
    """Run `work(item, *common)` on every item in plain Ray tasks; yield the rows it returns, in any order.

    `needs` is what Ray is to set aside for each. For short work: Ray Data's scheduler starts about ten tasks a second.

    Raises:
        BadInput, MsenseError: what the work raised.
    """
    for _, reference in track(name, _window(name, work, items, resources, common, needs), len(items)):
        yield get(reference)


def reduce_tasks(name: str, work: Callable[..., Any], slices: Sequence[Any], resources: Resources, *common: Any) -> Any:  # noqa: ANN401 - an ObjectRef
    """Run `work(slice, *common)` on every slice and add the results up as they come, a few at a time.

    Args:
        name: the stage, for progress and the dashboard.
        work: returns a value with `merge(other)`; the order of merging must not matter.
        slices: the work, at least one.
        resources: how many tasks at a time.
        common: arguments of every task; may be object references.

    Returns:
        A reference to the total, which stays in the object store.
    """
    import ray

    merge = ray.remote(_merge).options(name=f"{name}: merge", num_cpus=TASK_CPUS)
    done: list[Any] = []
    for _, reference in track(name, _window(name, work, slices, resources, common), len(slices)):
        done.append(reference)
        if len(done) == MERGED_AT_ONCE:
            done = [merge.remote(*done)]
    return merge.remote(*done) if len(done) > 1 else done[0]


def _window(
    name: str,
    work: Callable[..., Any],
    items: Sequence[Any],
    resources: Resources,
    common: tuple[Any, ...],
    needs: dict[str, float] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Keep as many tasks running as there are workers; yield (number, object reference) of each as it is done."""
    import ray

    task = ray.remote(work).options(name=name, scheduling_strategy="SPREAD", **(needs or {"num_cpus": TASK_CPUS}))
    running: dict[Any, tuple[int, float]] = {}
    seconds: list[float] = []

    def first_done() -> tuple[int, Any]:
        reference = ray.wait(list(running))[0][0]
        number, began = running.pop(reference)
        seconds.append(time.monotonic() - began)
        return number, reference

    for number, item in enumerate(items):
        if len(running) >= _tasks_now(resources):
            yield first_done()
        running[task.remote(item, *common)] = number, time.monotonic()
    while running:
        yield first_done()
    warn_of_skew(name, seconds)


def _tasks_now(resources: Resources) -> int:
    """Return how many tasks may run at a time, nodes that came later counted."""
    import ray

    if resources.most <= resources.tasks:
        return resources.tasks
    return max(resources.tasks, min(resources.most, int(ray.cluster_resources().get("CPU", 0))))


def run_task(work: Callable[..., Any], *arguments: Any, device: str = "cpu") -> Any:  # noqa: ANN401 - what the work returns
    """Run one task away from the driver, on a GPU if `device` is "cuda"; arguments may be object references."""
    import ray

    needs = {"num_cpus": TASK_CPUS, "num_gpus": int(device == "cuda"), "name": _name_of(work)}
    return get(ray.remote(work).options(**needs).remote(*arguments))


def submit(work: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - an ObjectRef
    """Start one task and return a reference to its result."""
    import ray

    return ray.remote(work).options(num_cpus=TASK_CPUS, name=_name_of(work)).remote(*arguments)


def _name_of(work: Callable[..., Any]) -> str:
    """Return what the dashboard calls a task."""
    return getattr(work, "__name__", type(work).__name__).strip("_").replace("_", " ")


def get(reference: Any) -> Any:  # noqa: ANN401 - what the task returned
    """Wait for a result, or for several.

    Raises:
        BadInput, MsenseError, OSError: what the work raised.
        MsenseError: the work's process died, again and again.
    """
    import ray

    with _in_plain_words():
        return ray.get(reference)


@contextmanager
def _in_plain_words() -> Iterator[None]:
    """Turn Ray's errors into what the work raised, or into a word about its death."""
    import ray

    died = (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.RayActorError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.NodeDiedError,
    )
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if failure := _failure(error.cause):
            raise failure from None
        if isinstance(error.cause, died):  # what the work was given never came to be
            raise _gone(error.cause) from error
        raise
    except died as error:
        raise _gone(error) from error


def _gone(error: Exception) -> MsenseError:
    """Say that Ray gave up on a piece of work."""
    first = next(iter(str(error).strip().splitlines()), "")
    return MsenseError(
        f"a worker died again and again at the same work ({type(error).__name__}: {first}). {_MEMORY}; Ray's logs tell "
        "more (those of a local Ray stay if RAY_TMPDIR names a folder)"
    )


class _Guarded:
    """A task's function: rows in, rows out."""

    def __init__(self, work: Callable[[Any], Row]) -> None:
        self.work = work
        self.__name__ = _name_of(work)

    def __call__(self, row: Row) -> Row:
        return guard(self.work, json.loads(row["item"]))


class _GuardedActor:
    """An actor's function; what its making raises is told with the first item."""

    def __init__(self, actor: type, arguments: Row) -> None:
        def make(arguments: Row) -> Row:
            self.actor = actor(**arguments)
            return {}

        made = guard(make, arguments)
        self.failure = made if made["error"] else None

    def __call__(self, row: Row) -> Row:
        return self.failure or guard(self.actor, json.loads(row["item"]))


def _run(name: str, function: Any, items: Sequence[Any], pool: Any, options: Row) -> Iterator[Row]:  # noqa: ANN401 - Ray's
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"item": json.dumps(item)} for item in items]
    with warnings.catch_warnings():  # until Ray 2.64 there is no other way to bound retries
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(function, compute=pool, **options)
    dataset.set_name(name.replace(" ", "_"))
    seconds = []
    with _in_plain_words():
        for row in track(name, dataset.iter_rows(), len(rows)):
            seconds.append(row["seconds"])
            yield unwrap(row)
    warn_of_skew(name, seconds)
