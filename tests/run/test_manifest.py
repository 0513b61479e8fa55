"""Manifests of older versions: entries that they do not have change nothing at their defaults."""

from pathlib import Path

import pytest

from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.manifest import add_stages_version, inputs_hash, without_defaults

OLD = {"format": 1, "config": {"seed": 0}, "inputs": {}, "teacher": {"name": "t"}, "pins": {}}


def test_added_entries_count_only_where_they_differ_from_their_defaults() -> None:
    added = {"skip": 0, "include_prompt": True, "projections": [], "truncate_dim": None, "truncation_side": "right"}
    now = {**OLD, "config": {"seed": 0, "id_column": "id"}, "teacher": {"name": "t", **added}}
    assert without_defaults(now) == OLD
    for teacher in ({"skip": 3}, {"include_prompt": False}, {"projections": ["a"]}, {"truncate_dim": 8}):
        changed = {**now, "teacher": {**now["teacher"], **teacher}}
        assert inputs_hash(without_defaults(changed)) != inputs_hash(OLD)
    assert without_defaults({**now, "config": {"id_column": "none"}})["config"] == {"id_column": "none"}


@pytest.mark.parametrize(("finished", "kept"), [(None, False), ("finished.json", True), ("labels/labels.json", True)])
def test_only_a_finished_run_of_an_older_version_is_kept(tmp_path: Path, finished: str | None, kept: bool) -> None:
    run, manifest = RunFolder(str(tmp_path)), {**OLD, "corpus": [], "pins": {}}
    storage.write_json(run.manifest, manifest)
    if finished:
        storage.write_json(str(tmp_path / finished), {})
    add_stages_version(run, manifest)
    assert ("stages" not in manifest["pins"]) == kept
