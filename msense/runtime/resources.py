"""What a cluster offers, and what a job takes of it.

Comes in: the nodes that Ray knows, and those that its autoscaler may start. Goes out: how many workers a job has and what
Ray sets aside for each; a job that no node could ever run is refused. Holds a few numbers a node.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from msense.errors import InputError
from msense.text import size

logger = logging.getLogger(__name__)
TASK_CPUS = 0.5
TASK_GPUS = 0.5  # of a clustering task: one reads while the other computes
WORKER_MEMORY = 400 << 20  # of a process that has loaded torch and done nothing yet
_TASK = {"num_cpus": TASK_CPUS}
_RAY_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}


@dataclass(frozen=True)
class Node:
    """Nodes of one kind."""

    offers: Mapping[str, float]  # CPU and GPU, and memory in bytes where it is known
    count: int  # there now
    most: int  # with those that the autoscaler may start

    def holds(self, needs: Mapping[str, float]) -> int:
        """Return how many pieces of work with such needs find room on one of them; memory not known is no limit."""
        asked = [(_RAY_NAMES[name], amount) for name, amount in needs.items() if amount]
        return int(min((self.offers.get(name, 0) / amount for name, amount in asked if self._known(name)), default=0))

    def _known(self, name: str) -> bool:
        return name != "memory" or name in self.offers

    def __str__(self) -> str:
        offers = [f"{self.offers.get(name, 0):g} {name}s" for name in ("CPU", "GPU") if self.offers.get(name)]
        offers += [size(self.offers["memory"])] if self.offers.get("memory") else []
        return f"{self.count or f'up to {self.most}'} of {', '.join(offers) or 'nothing'}"


@dataclass(frozen=True)
class Resources:
    """What the cluster offers and how much of it a job takes."""

    actors: int  # teacher actors at a time
    tasks: int  # other tasks at a time
    device: str  # "cuda" or "cpu", one kind for all teacher actors, and for all that clusters
    gpus_per_actor: float = 1.0
    task_memory: int = 0  # bytes that Ray sets aside for a task that clusters
    most: int = 0  # actors and tasks where nodes may come later; else there are no more than these
    nodes: Sequence[Node] = field(default=(), compare=False)  # none: not known

    @property
    def teacher(self) -> dict[str, float]:
        """What Ray is to set aside for a teacher actor; a pool that grows is bounded by nothing else."""
        if self.device == "cuda":
            return {"num_gpus": self.gpus_per_actor}
        return {"num_cpus": 1.0 if self.most else TASK_CPUS}

    @property
    def clustering(self) -> dict[str, float]:
        """What Ray is to set aside for a task or actor that clusters."""
        needs = {"num_cpus": TASK_CPUS} | ({"num_gpus": TASK_GPUS} if self.device == "cuda" else {})
        return needs | ({"memory": self.task_memory} if self.task_memory else {})

    @property
    def trainers(self) -> int:
        """Workers that train at a time: one a GPU, however many actors share it."""
        return max(1, int(self.actors * self.gpus_per_actor)) if self.device == "cuda" else self.actors

    @property
    def clusterers(self) -> int:
        """Actors that cluster at a time: no more than there is room for, or they would be waited for without end."""
        wanted = self.tasks
        if self.device == "cuda":
            wanted = int(min(self.actors * self.gpus_per_actor / TASK_GPUS, self.tasks / TASK_CPUS))
        room = sum(node.count * node.holds(self.clustering) for node in self.nodes) if self.nodes else wanted
        return max(1, min(wanted, room))

    def setting_aside(self, needed: float, given: int | None) -> "Resources":
        """Return the same with memory for each clustering task.

        Args:
            needed: bytes that it holds at most; of these no more is set aside than a node has, as they may be fewer.
            given: bytes to set aside whatever is needed.

        Raises:
            BadInput: no node has what is given.
        """
        largest = max((int(node.offers.get("memory", 0)) for node in self.nodes if node.most), default=0)
        wanted = int(needed) + WORKER_MEMORY
        if not given and largest and wanted > largest:
            logger.warning(
                "a clustering task may hold %s, but the largest node offers %s: if it dies, give a smaller "
                "--max-points-per-part or larger nodes",
                size(wanted),
                size(largest),
            )
        found = replace(self, task_memory=given or (min(wanted, largest) if largest else 0))
        found.check()
        return found

    def described(self) -> dict[str, str]:
        """Say what the cluster offers and what the job will ask of it, for a dry run."""
        asked = [f"{self.actors} teacher actors of {told(self.teacher)}", f"{self.tasks} tasks of {told(_TASK)}"]
        asked.append(f"{self.clusterers} of them clustering, of {told(self.clustering)}")
        return {"offered": described(self.nodes), "asked": ", ".join(asked)}

    def check(self) -> None:
        """Refuse what no node could ever run.

        Raises:
            BadInput: a kind of work asks for more than any node offers, now or when the autoscaler has started it.
        """
        training = {"num_cpus": TASK_CPUS} | ({"num_gpus": 1.0} if self.device == "cuda" else {})
        kinds = {"a task": _TASK, "a teacher actor": self.teacher, "a clustering task": self.clustering}
        for what, needs in {**kinds, "a training worker": training}.items():
            if self.nodes and not any(node.most and node.holds(needs) for node in self.nodes):
                raise InputError(
                    f"{what} asks for {told(needs)}, but this cluster offers {described(self.nodes)}: no node can ever run "
                    f"it. Add larger nodes, or ask for less{_remedy(needs)}"
                )


def _remedy(needs: Mapping[str, float]) -> str:
    return " with --task-memory or a smaller --max-points-per-part" if "memory" in needs else ""


def told(needs: Mapping[str, float]) -> str:
    """Say what is asked for."""
    asked = [f"{needs[key]:g} {_RAY_NAMES[key]}" for key in ("num_cpus", "num_gpus") if needs.get(key)]
    return " + ".join(asked + ([size(needs["memory"])] if needs.get("memory") else []))


def described(nodes: Sequence[Node]) -> str:
    """Say what a cluster offers."""
    here, coming = [n for n in nodes if n.count], [n for n in nodes if not n.count and n.most]
    text = "nodes: " + ("; ".join(map(str, here)) or "none")
    return text + (f"; its autoscaler may start {'; '.join(map(str, coming))}" if coming else "")


def plan_workers(nodes: Sequence[Node], workers: int | None = None, gpus_per_actor: float = 1.0) -> Resources:
    """Return what a job takes of a cluster.

    Args:
        nodes: what the cluster offers.
        workers: actors and tasks at a time, but no more than there is room for; None = a teacher actor for each share of a
            GPU (a CPU where there is none), a task a CPU.
        gpus_per_actor: GPUs of a teacher actor; half a GPU: two of them share one.

    Raises:
        BadInput: no node has a CPU.
    """
    share = {"num_gpus": gpus_per_actor}
    actors = _total(nodes, lambda node: node.holds(share) if node.offers.get("GPU") else 0)
    cpus = _total(nodes, lambda node: int(node.offers.get("CPU", 0)))
    if not any(node.most and node.offers.get("CPU", 0) >= TASK_CPUS for node in nodes):
        raise InputError(
            f"this cluster offers {described(nodes)}: no CPU to work on. Add a node with CPUs (`ray start --address=...`)"
        )
    tasks = min(workers or cpus, max(1, cpus))  # so that half a CPU each always leaves room for others
    device = "cuda" if actors else "cpu"
    found = Resources(min(workers or actors, actors) or tasks, tasks, device, gpus_per_actor, nodes=nodes)
    found.check()
    return found


def _total(nodes: Sequence[Node], of: Callable[[Node], int]) -> int:
    """Return what all nodes of now have, or all that the autoscaler may start of one kind if that is more."""
    return max([sum(node.count * of(node) for node in nodes), *(node.most * of(node) for node in nodes)])
