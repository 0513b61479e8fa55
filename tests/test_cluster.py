"""`cluster.yaml`: what Ray's own validator says of it, and what that does not look at."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def check(cluster: dict[str, Any]) -> None:
    """Everything that a cluster must have; an AssertionError or a ValidationError tells what it lacks."""
    validate_config(prepare_config(copy.deepcopy(cluster)))
    python = re.search(r"requires-python = \">=(\d)\.(\d+)\"", (ROOT / "pyproject.toml").read_text())
    assert python
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    assert pinned[1] == ray.__version__
    assert re.fullmatch(
        rf"rayproject/ray:{re.escape(pinned[1])}-py{python[1]}{python[2]}-cu\d+", cluster["docker"]["image"]
    )
    assert set(LISTS + STARTS) <= cluster.keys(), "Ray's defaults would step in"
    assert "-c constraints.txt" in " ".join(cluster["setup_commands"])
    for name in STARTS:
        start = " ".join(cluster[name])
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r"RAY_task_\w+=\d+ ", "", start), f"{name}: open to everybody"
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
    assert "0.0.0.0" not in yaml.safe_dump(cluster)
    for remote, local in cluster["file_mounts"].items():
        assert remote.startswith("/home/ray/")
        assert local.startswith("~") or (ROOT / local).exists(), local
    _check_nodes(cluster)


def _check_nodes(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types[cluster["head_node_type"]]
    assert set(head["resources"].values()) == {0}, "the head would work"
    for name, kind in types.items():
        node = kind["node_config"]
        assert re.fullmatch(r"[a-z][a-z0-9-]*\.\d*x?[a-z]+", node["InstanceType"]), name
        assert node["SecurityGroupIds"], f"{name}: Ray would make a group whose SSH port is open to the world"
        assert all(disk["Ebs"]["VolumeSize"] >= 200 for disk in node["BlockDeviceMappings"]), name
        known = {"InstanceType", "ImageId", "SecurityGroupIds", "IamInstanceProfile", "MetadataOptions"}
        assert node.keys() <= known | {"BlockDeviceMappings", "InstanceMarketOptions", "KeyName", "SubnetIds"}, name
    workers = [kind for name, kind in types.items() if name != cluster["head_node_type"]]
    assert all(kind["resources"]["GPU"] and not kind["min_workers"] for kind in workers)
    spot = [k["priority"] for k in workers if "InstanceMarketOptions" in k["node_config"]]
    rest = [k["priority"] for k in workers if "InstanceMarketOptions" not in k["node_config"]]
    assert min(spot) > max(rest), "spot first"
    assert cluster["provider"]["cache_stopped_nodes"] is False
    assert 0 < cluster["idle_timeout_minutes"] <= 30


def test_the_cluster_file_is_valid(cluster: dict[str, Any]) -> None:
    check(cluster)


def _in(cluster: dict[str, Any], *path: str) -> dict[str, Any]:
    for name in path:
        cluster = cluster[name]
    return cluster


MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown key": lambda c: c.update(maxworkers=3),
    "unknown key of a node type": lambda c: _in(c, "available_node_types", "gpu_spot").update(gpus=1),
    "unknown key of docker": lambda c: _in(c, "docker").update(tag="x"),
    "wrong type": lambda c: c.update(max_workers="many"),
    "no such head": lambda c: c.update(head_node_type="boss"),
    "image of another Ray": lambda c: _in(c, "docker").update(image="rayproject/ray:2.59.0-py311-cu130"),
    "image of another Python": lambda c: _in(c, "docker").update(image="rayproject/ray:2.60.0-py312-cu130"),
    "a list that is not stated": lambda c: c.pop("setup_commands"),
    "no constraints": lambda c: c.update(setup_commands=["pip install msense"]),
    "no token": lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
    "dashboard for all": lambda c: c.update(
        head_start_ray_commands=["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"]
    ),
    "a file that is not there": lambda c: _in(c, "file_mounts").update({"/home/ray/x": "no/such/file"}),
    "a head that works": lambda c: _in(c, "available_node_types", "head", "resources").update(CPU=4),
    "a group made by Ray": lambda c: _in(c, "available_node_types", "gpu_spot", "node_config").pop("SecurityGroupIds"),
    "on demand first": lambda c: _in(c, "available_node_types", "gpu_on_demand").update(priority=11),
    "a mistyped field of AWS": lambda c: _in(c, "available_node_types", "head", "node_config").update(ImageID="ami"),
    "workers without GPUs": lambda c: _in(c, "available_node_types", "gpu_spot", "resources").update(GPU=0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(cluster: dict[str, Any], mistake: str) -> None:
    MISTAKES[mistake](cluster)
    with pytest.raises((AssertionError, ValidationError, ValueError, KeyError)):
        check(cluster)


def test_what_the_comment_says_is_there() -> None:
    commands = re.findall(r"python (jobs/\w+\.py)", TEXT)
    assert commands
    assert all((ROOT / name).is_file() for name in commands)
    assert TEXT.count("REPLACE") >= 4
