"""`cluster.yaml`: Ray's own validator, and checks that it lacks."""

import re
from pathlib import Path

import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
LISTS = {"initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"}
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
NODE_KEYS = {"InstanceType", "ImageId", "SecurityGroupIds", "IamInstanceProfile", "MetadataOptions", "KeyName"}
NODE_KEYS |= {"BlockDeviceMappings", "InstanceMarketOptions", "SubnetIds"}


def test_the_cluster_file_is_complete_and_closed_to_the_world() -> None:
    cluster = yaml.safe_load(TEXT)
    validate_config(prepare_config(yaml.safe_load(TEXT)))
    python = re.search(r"requires-python = \">=(\d)\.(\d+)\"", (ROOT / "pyproject.toml").read_text())
    assert python
    assert f"ray=={ray.__version__}\n" in (ROOT / "constraints.txt").read_text()
    image = rf"rayproject/ray:{re.escape(ray.__version__)}-py{python[1]}{python[2]}-cu\d+"
    assert re.fullmatch(image, cluster["docker"]["image"])
    assert {*LISTS, *STARTS} <= cluster.keys(), "Ray's defaults would apply"
    assert "-c constraints.txt" in " ".join(cluster["setup_commands"])
    for name in STARTS:
        start = " ".join(cluster[name])
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r"RAY_task_\w+=\d+ ", "", start), f"{name}: no token"
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
    assert "0.0.0.0" not in yaml.safe_dump(cluster)
    for remote, local in cluster["file_mounts"].items():
        assert remote.startswith("/home/ray/")
        assert local.startswith("~") or (ROOT / local).exists(), local
    types = dict(cluster["available_node_types"])
    for name, kind in types.items():
        node = kind["node_config"]
        assert node["SecurityGroupIds"], f"{name}: Ray would create a group whose SSH port is open to the world"
        assert all(disk["Ebs"]["VolumeSize"] >= 200 for disk in node["BlockDeviceMappings"]), name
        assert node.keys() <= NODE_KEYS, name
    assert set(types.pop(cluster["head_node_type"])["resources"].values()) == {0}, "the head would run tasks"
    assert all(kind["resources"]["GPU"] and not kind["min_workers"] for kind in types.values())
    spot = {k["priority"]: "InstanceMarketOptions" in k["node_config"] for k in types.values()}
    assert [spot[priority] for priority in sorted(spot)] == [False, True], "spot instances first"
    assert cluster["provider"]["cache_stopped_nodes"] is False
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    commands = re.findall(r"python (jobs/\w+\.py)", TEXT)
    assert commands
    assert all((ROOT / name).is_file() for name in commands)
