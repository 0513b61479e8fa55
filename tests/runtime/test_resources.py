"""Workers and reservations of a job: never more than a cluster offers, and never what no node could run."""

import logging

import pytest
from command_line import parse_flags
from hypothesis import given
from hypothesis import strategies as st

from msense.config.build import BuildConfig
from msense.errors import InputError
from msense.runtime.ray_executor import RayExecutor
from msense.runtime.resources import TASK_CPUS, WORKER_MEMORY, Node, Resources, plan_workers, shown_nodes

GB = 10**9
LAPTOP = Node({"CPU": 8, "memory": 16 * GB}, 1, 1)
HEAD = Node({"CPU": 0, "GPU": 0, "memory": 16 * GB}, 1, 1)
GPU_NODE = {"CPU": 8, "GPU": 2, "memory": 60 * GB}


def test_a_laptop() -> None:
    found = plan_workers([LAPTOP])
    assert (found.actors, found.tasks, found.device, found.trainers, found.clusterers) == (8, 8, "cpu", 8, 8)
    assert plan_workers([LAPTOP], workers=3).actors == 3
    assert plan_workers([LAPTOP], workers=30).tasks == 8


def test_gpus_are_shared_by_as_many_actors_as_requested() -> None:
    nodes = [HEAD, Node(GPU_NODE, 3, 3)]
    assert (plan_workers(nodes).actors, plan_workers(nodes).tasks, plan_workers(nodes).device) == (6, 24, "cuda")
    half = plan_workers(nodes, gpus_per_actor=0.5)
    assert (half.actors, half.trainers, half.clusterers) == (12, 6, 12)
    assert half.teacher == {"num_gpus": 0.5}
    assert plan_workers(nodes, workers=4, gpus_per_actor=0.5).actors == 4


def test_a_teacher_may_have_several_gpus(caplog: pytest.LogCaptureFixture) -> None:
    """Training and clustering keep what they have with one GPU per actor."""
    nodes = [HEAD, Node({"CPU": 16, "GPU": 4, "memory": 60 * GB}, 2, 2)]
    one, two = plan_workers(nodes), plan_workers(nodes, gpus_per_actor=2, ranks=2)
    assert (two.actors, two.teacher, two.grouped) == (4, {"num_gpus": 2}, True)
    assert (one.actors, one.teacher, one.grouped) == (8, {"num_gpus": 1.0}, False)
    assert (two.trainers, two.clusterers, two.clustering) == (one.trainers, one.clusterers, one.clustering)
    assert plan_workers(nodes, ranks=4) == plan_workers(nodes, gpus_per_actor=4, ranks=4)
    assert two.described()["asked"].startswith("4 teacher actors of 2 GPU, ")
    assert plan_workers(nodes, offload=True).grouped
    with pytest.raises(InputError, match=r"a teacher actor needs 8 GPU, but .* no node can ever run it"):
        plan_workers(nodes, gpus_per_actor=8, ranks=8)
    with pytest.raises(InputError, match=r"--gpus-per-actor 2, but this cluster offers no GPU .*--ranks 2"):
        plan_workers([LAPTOP], gpus_per_actor=2, ranks=2)


def test_a_teacher_may_have_several_cpus() -> None:
    found = plan_workers([LAPTOP], ranks=4)
    assert (found.actors, found.teacher, found.tasks, found.trainers) == (2, {"num_cpus": 4 * TASK_CPUS}, 8, 8)
    assert plan_workers([LAPTOP], workers=1, ranks=4).actors == 1
    with pytest.raises(InputError, match=r"a teacher actor needs 16 CPU"):
        plan_workers([LAPTOP], ranks=32)


def test_nodes_that_only_the_autoscaler_has_count() -> None:
    """A cluster that has scaled down to its head, which does no work, still counts as one with GPUs."""
    spot, on_demand = Node({"CPU": 8, "GPU": 1}, 0, 8), Node({"CPU": 8, "GPU": 1}, 0, 6)
    found = plan_workers([HEAD, spot, on_demand])
    assert (found.actors, found.tasks, found.device) == (8, 64, "cuda")  # not 14: one kind stands in for the other
    assert found.clusterers == 1  # clustering does not wait for nodes that may never come
    assert "up to 8 of 8 CPUs, 1 GPUs" in shown_nodes(found.nodes)


def test_a_job_that_no_node_could_run_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"a task needs 0\.5 CPU, but this cluster offers nodes: 1 of 16\.0 GB: no node"
    ):
        plan_workers([HEAD])
    apart = [Node({"CPU": 8}, 1, 1), Node({"CPU": 0, "GPU": 4}, 1, 1)]
    with pytest.raises(
        InputError, match=r"a clustering task needs 0\.5 CPU \+ 0\.5 GPU, but .* no node can ever run it"
    ):
        plan_workers(apart)
    with pytest.raises(InputError, match=r"0\.5 CPU \+ 17\.0 GB, but .*1 of 8 CPUs, 16\.0 GB.*--task-memory"):
        plan_workers([LAPTOP]).setting_aside(0, 17 * GB)
    with pytest.raises(InputError, match=r"a task needs 0\.5 CPU"):
        plan_workers([HEAD, Node({"CPU": 8}, 0, 0)])


def test_memory_is_set_aside_for_clustering(caplog: pytest.LogCaptureFixture) -> None:
    found = plan_workers([LAPTOP]).setting_aside(5 * GB, None)
    assert found.clustering == {"num_cpus": TASK_CPUS, "memory": 5 * GB + WORKER_MEMORY}
    assert found.clusterers == 2
    assert plan_workers([LAPTOP]).setting_aside(5 * GB, 2 * GB).clustering["memory"] == 2 * GB
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert plan_workers([LAPTOP]).setting_aside(50 * GB, None).task_memory == 16 * GB
    assert "may need 50.4 GB, but the largest node has 16.0 GB" in caplog.text
    assert plan_workers([Node({"CPU": 4}, 1, 1)]).setting_aside(GB, None).task_memory == 0  # unknown memory


amounts = st.fixed_dictionaries(
    {"CPU": st.integers(0, 9)},
    optional={"GPU": st.integers(0, 4), "memory": st.integers(1, 9).map(lambda gb: gb * GB)},
)
node = st.builds(
    lambda offers, count, more: Node(offers, count, count + more), amounts, st.integers(0, 3), st.integers(0, 2)
)


@given(st.lists(node, min_size=1, max_size=4), st.none() | st.integers(1, 20), st.sampled_from([0.25, 0.5, 1.0]))
def test_planned_work_fits(nodes: list[Node], workers: int | None, share: float) -> None:
    """Either the cluster is refused, or all kinds of work fit on it, as many at a time as planned."""
    try:
        found = plan_workers(nodes, workers, share).setting_aside(GB, None)
    except InputError:
        return
    assert min(found.actors, found.tasks, found.trainers, found.clusterers) >= 1
    for needs in (found.teacher, found.clustering):
        assert any(node.most and node.holds(needs) for node in nodes)
    room = sum(node.count * node.holds(found.clustering) for node in nodes)
    assert found.clusterers <= max(1, room)
    if workers:
        assert max(found.actors, found.tasks) <= workers
    if found.device == "cuda":
        gpus = max(
            [sum(n.count * n.offers.get("GPU", 0) for n in nodes), *(n.most * n.offers.get("GPU", 0) for n in nodes)]
        )
        assert found.actors * share <= gpus


def test_settings() -> None:
    assert parse_flags(BuildConfig, ["--task-memory", "4GB"]).task_memory == 4 * GB
    with pytest.raises(InputError, match=r"gpus_per_actor.*\n.*task_memory"):
        parse_flags(BuildConfig, ["--gpus-per-actor", "0", "--task-memory", "much"])


def test_the_resources_of_a_local_ray(ray: None) -> None:
    resources = RayExecutor.connect(workers=2).resources.setting_aside(GB, None)
    assert resources.described()["offered"].startswith("nodes: 1 of 3 CPUs, ")
    assert resources.described()["asked"].startswith(
        "2 teacher actors of 0.5 CPU, 2 tasks of 0.5 CPU, 2 of them clustering, of 0.5 CPU + "
    )
    with pytest.raises(InputError, match="no node can ever run it"):
        resources.setting_aside(GB, 10**15)


def test_resources_without_nodes() -> None:
    for gpus, cpus, actors in ((1, 1, 2), (8, 64, 16), (8, 2, 4)):
        resources = Resources(actors=gpus, tasks=cpus, device="cuda")
        assert resources.clusterers == actors
        assert actors * resources.clustering["num_cpus"] <= cpus
        assert actors * resources.clustering["num_gpus"] <= gpus
    assert Resources(actors=3, tasks=3, device="cpu").clusterers == 3
