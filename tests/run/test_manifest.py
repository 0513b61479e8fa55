"""Manifests of older versions: entries that they do not have change nothing at their defaults."""

from pathlib import Path

import pytest

from msense.errors import InputError
from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.manifest import STAGES_VERSION, check_manifest, inputs_hash, keep_stages_version, without_defaults

OLD = {"format": 1, "config": {"seed": 0}, "inputs": {}, "teacher": {"name": "t"}, "pins": {}}


def test_added_entries_count_only_where_they_differ_from_their_defaults() -> None:
    added = {"skip": 0, "include_prompt": True, "projections": [], "truncate_dim": None, "truncation_side": "right"}
    added["include_frame"] = True
    now = {**OLD, "config": {"seed": 0, "id_column": "id"}, "teacher": {"name": "t", **added}}
    assert without_defaults(now) == OLD
    for teacher in (
        {"skip": 3},
        {"include_prompt": False},
        {"projections": ["a"]},
        {"truncate_dim": 8},
        {"include_frame": False},
    ):
        changed = {**now, "teacher": {**now["teacher"], **teacher}}
        assert inputs_hash(without_defaults(changed)) != inputs_hash(OLD)
    assert without_defaults({**now, "config": {"id_column": "none"}})["config"] == {"id_column": "none"}
    columns = {f"{part}prompt_column": None for part in ("", "text.", "queries.")}
    assert without_defaults({**now, "config": {"seed": 0, **columns}}) == OLD
    assert without_defaults({**now, "config": {"prompt_column": "task"}})["config"] == {"prompt_column": "task"}


@pytest.mark.parametrize("finished", ["", "finished.json", "labels/labels.json", "student"])
@pytest.mark.parametrize("version", [{}, {"stages": 2}])
def test_only_a_finished_run_of_an_older_version_is_kept(tmp_path: Path, version: dict, finished: str) -> None:
    run, manifest = RunFolder(str(tmp_path)), {**OLD, "corpus": [], "pins": {"stages": STAGES_VERSION}}
    storage.write_json(run.manifest, {**OLD, "corpus": [], "pins": version})
    if finished:
        storage.write_json(str(tmp_path / finished), {})
    keep_stages_version(run, manifest)
    assert manifest["pins"] == (version if finished else {"stages": STAGES_VERSION})


def test_unfinished_runs_of_older_versions_are_refused_and_students_may_change(tmp_path: Path) -> None:
    def manifest(stages: int, **more: dict) -> dict:
        return {**OLD, "corpus": [], "dictionary": "d", "training": {"lr": 1}, "pins": {"stages": stages}, **more}

    def check(now: dict) -> None:
        check_manifest(RunFolder(str(tmp_path)), now)

    check(manifest(2))
    for name in ("labels/000000.safetensors", "labels/000000.safetensors.done"):  # inside the student's run
        storage.write_text(str(tmp_path / name), "")
    with pytest.raises(
        InputError,
        match=r"pins\.stages: 2 before, 3 now\nOnly the version of msense that began it can[\s\S]*another --output",
    ):
        check(manifest(3))
    storage.remove(str(tmp_path / "labels"))
    check(manifest(3))
    check(manifest(3, config={"seed": 1}))
    (tmp_path / "student").mkdir()
    with pytest.raises(InputError, match=r"config\.seed: 1 before, 2 now"):
        check(manifest(3, config={"seed": 2}))


@pytest.mark.parametrize("read", ["occurrences", "embeddings", "labels", "finished.json"])
def test_after_a_dry_run_the_teacher_may_be_run_otherwise(tmp_path: Path, read: str) -> None:
    def check(**now: dict) -> None:
        check_manifest(RunFolder(str(tmp_path)), {**OLD, "corpus": [], "pins": {"dtype": "float32"}, **now})

    def write(name: str) -> Path:
        storage.write_text(str(tmp_path / name), "")
        storage.write_text(str(tmp_path / f"{name}.done"), "")
        return tmp_path / name

    check()
    passages, _ = write("passages/000000.parquet"), write("plan/plan.safetensors")
    with pytest.raises(InputError, match=r"config\.seed: 0 before, 1 now"):
        check(config={"seed": 1}, pins={"dtype": "float32", "ranks": 2})
    assert passages.exists()
    check(pins={"dtype": "bfloat16", "ranks": 2})
    assert not passages.exists()
    write(read if "." in read else f"{read}/000000.x")
    with pytest.raises(InputError, match=r"pins\.ranks: 2 before, 4 now"):
        check(pins={"dtype": "bfloat16", "ranks": 4})
