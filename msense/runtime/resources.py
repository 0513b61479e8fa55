"""Decide how many workers a job has and what is reserved for each, given the nodes of a cluster."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from msense.errors import InputError
from msense.text import size

logger = logging.getLogger(__name__)
TASK_CPUS = 0.5
TASK_GPUS = 0.5  # of a clustering task: one task reads while another computes
# environment of workers: one thread each for linear algebra
SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOCAL_SIZE"), "1")
SINGLE_THREADED["TOKENIZERS_PARALLELISM"] = "false"
WORKER_MEMORY = 400 << 20  # of an idle process that has loaded torch
_TASK = {"num_cpus": TASK_CPUS}
_RAY_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}


@dataclass(frozen=True)
class Node:
    """Nodes of one kind."""

    offers: Mapping[str, float]  # CPU and GPU, and memory in bytes if known
    count: int  # now
    most: int  # including those that the autoscaler may start

    def holds(self, needs: Mapping[str, float]) -> int:
        """Return how many tasks with these needs fit on one node; unknown memory does not limit them."""
        wanted = {_RAY_NAMES[name]: amount for name, amount in needs.items() if amount}
        if "memory" not in self.offers:
            wanted.pop("memory", None)
        return int(min((self.offers.get(name, 0) / amount for name, amount in wanted.items()), default=0))

    def __str__(self) -> str:
        offers = [f"{self.offers.get(name, 0):g} {name}s" for name in ("CPU", "GPU") if self.offers.get(name)]
        offers += [size(self.offers["memory"])] if self.offers.get("memory") else []
        return f"{self.count or f'up to {self.most}'} of {', '.join(offers) or 'nothing'}"


@dataclass(frozen=True)
class Resources:
    """The share of a cluster that a job uses."""

    actors: int  # teacher actors at a time
    tasks: int  # other tasks at a time
    device: str  # "cuda" or "cpu", for all teacher actors and clustering tasks
    gpus_per_actor: float = 1.0  # one, a share of it, or as many as there are ranks
    ranks: int = 1  # processes of a teacher actor, each with a GPU or CPU of its own
    offload: bool = False  # whether actors keep the teacher's weights in host memory
    task_memory: int = 0  # bytes reserved for a clustering task
    most: int = 0  # limit of actors and tasks where nodes may join later; else 0
    nodes: Sequence[Node] = field(default=(), compare=False)  # empty if unknown

    @property
    def teacher(self) -> dict[str, float]:
        """Resources reserved for a teacher actor; they also bound a growing pool."""
        if self.device == "cuda":
            return {"num_gpus": self.ranks if self.ranks > 1 else self.gpus_per_actor}
        return {"num_cpus": (1.0 if self.most else TASK_CPUS) * self.ranks}

    @property
    def grouped(self) -> bool:
        """Whether a teacher actor joins a process group, which must end with the process that runs it."""
        return self.ranks > 1 or self.offload

    @property
    def clustering(self) -> dict[str, float]:
        """Resources reserved for a clustering task or actor."""
        needs = {"num_cpus": TASK_CPUS} | ({"num_gpus": TASK_GPUS} if self.device == "cuda" else {})
        return needs | ({"memory": self.task_memory} if self.task_memory else {})

    @property
    def trainers(self) -> int:
        """Number of training workers: one per GPU, however many actors share it or GPUs an actor has."""
        return max(1, int(self.actors * self.gpus_per_actor)) if self.device == "cuda" else self.tasks

    @property
    def clusterers(self) -> int:
        """Number of clustering actors: at most as many as fit at once, as all must run together."""
        wanted = self.tasks
        if self.device == "cuda":
            wanted = int(min(self.actors * self.gpus_per_actor / TASK_GPUS, self.tasks / TASK_CPUS))
        room = sum(node.count * node.holds(self.clustering) for node in self.nodes) if self.nodes else wanted
        return max(1, min(wanted, room))

    def setting_aside(self, needed: float, given: int | None) -> "Resources":
        """Return the same resources with memory reserved for each clustering task.

        It is `needed` bytes, an upper bound, at most what the largest node has; or what the user has `given`.

        Raises:
            InputError: no node has `given` bytes.
        """
        largest = max((int(node.offers.get("memory", 0)) for node in self.nodes if node.most), default=0)
        wanted = int(needed) + WORKER_MEMORY
        if not given and largest and wanted > largest:
            sizes = f"a clustering task may need {size(wanted)}, but the largest node has {size(largest)}"
            logger.warning("%s: if it runs out of memory, lower --max-points-per-part or use larger nodes", sizes)
        resources = replace(self, task_memory=given or (min(wanted, largest) if largest else 0))
        resources.check()
        return resources

    def described(self) -> dict[str, str]:
        """Return what the cluster offers and what the job reserves, for a dry run."""
        wanted = (
            f"{self.actors} teacher actors of {shown_needs(self.teacher)}, {self.tasks} tasks of {shown_needs(_TASK)}, "
            f"{self.clusterers} of them clustering, of {shown_needs(self.clustering)}"
        )
        return {"offered": shown_nodes(self.nodes) if self.nodes else "this machine", "asked": wanted}

    def check(self) -> None:
        """Raise InputError if some task needs more than any node has, including those that the autoscaler may start."""
        training = {"num_cpus": TASK_CPUS} | ({"num_gpus": 1.0} if self.device == "cuda" else {})
        kinds = {"a task": _TASK, "a teacher actor": self.teacher, "a clustering task": self.clustering}
        for what, needs in {**kinds, "a training worker": training}.items():
            if self.nodes and not any(node.most and node.holds(needs) for node in self.nodes):
                how = " with --task-memory or a smaller --max-points-per-part" if "memory" in needs else ""
                raise InputError(
                    f"{what} needs {shown_needs(needs)}, but this cluster offers {shown_nodes(self.nodes)}: no node can ever run "
                    f"it. Add larger nodes, or reduce the need{how}"
                )


def shown_needs(needs: Mapping[str, float]) -> str:
    """Return resources of a task for a message."""
    amounts = [f"{needs[key]:g} {_RAY_NAMES[key]}" for key in ("num_cpus", "num_gpus") if needs.get(key)]
    return " + ".join(amounts + ([size(needs["memory"])] if needs.get("memory") else []))


def shown_nodes(nodes: Sequence[Node]) -> str:
    """Return the nodes of a cluster for a message."""
    return "nodes: " + "; ".join(str(node) for node in nodes if node.most)


def plan_workers(
    nodes: Sequence[Node],
    workers: int | None = None,
    gpus_per_actor: float = 1.0,
    ranks: int = 1,
    offload: bool = False,
) -> Resources:
    """Return the share of a cluster that a job uses.

    Args:
        nodes: those of the cluster, and those that its autoscaler may start.
        workers: limit of concurrent actors and tasks; None = one teacher actor per GPU share (per CPU without GPUs) and
            one task per CPU.
        gpus_per_actor: GPUs of a teacher actor; with 0.5, two share one.
        ranks: processes of a teacher actor, each with one GPU, or one CPU without GPUs.
        offload: see `Resources`.

    Raises:
        InputError: no node could ever run the job.
    """
    device = "cuda" if _total(nodes, {"num_gpus": min(1.0, gpus_per_actor)}) else "cpu"
    if device == "cpu" and gpus_per_actor > 1:
        raise InputError(
            f"--gpus-per-actor {gpus_per_actor:g}, but this cluster offers no GPU ({shown_nodes(nodes)}): add nodes with GPUs, "
            f"or give --ranks {gpus_per_actor:g} to split the teacher over CPUs"
        )
    gpus_per_actor = ranks if ranks > 1 else gpus_per_actor
    cpus = _total(nodes, {"num_cpus": 1})
    tasks = min(workers or cpus, max(1, cpus))  # at half a CPU each, this leaves room for others
    actors = max(
        1, _total(nodes, {"num_gpus": gpus_per_actor}) if device == "cuda" else _total(nodes, {"num_cpus": ranks})
    )
    actors = min(workers or actors, actors)
    resources = Resources(actors, tasks, device, gpus_per_actor, ranks, offload, nodes=nodes)
    resources.check()
    return resources


def _total(nodes: Sequence[Node], needs: Mapping[str, float]) -> int:
    """Return how many tasks fit on the current nodes, or on those of one kind that the autoscaler may start if more."""
    return max([sum(n.count * n.holds(needs) for n in nodes), *(n.most * n.holds(needs) for n in nodes)])
