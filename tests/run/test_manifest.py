"""Manifests of older versions: entries that they do not have change nothing at their defaults."""

from msense.run.manifest import inputs_hash, without_defaults

OLD = {"format": 1, "config": {"seed": 0}, "inputs": {}, "teacher": {"name": "t"}, "pins": {}}


def test_added_entries_count_only_where_they_differ_from_their_defaults() -> None:
    added = {"skip": 0, "include_prompt": True, "projections": [], "truncate_dim": None, "truncation_side": "right"}
    now = {**OLD, "config": {"seed": 0, "id_column": "id"}, "teacher": {"name": "t", **added}}
    assert without_defaults(now) == OLD
    for teacher in ({"skip": 3}, {"include_prompt": False}, {"projections": ["a"]}, {"truncate_dim": 8}):
        changed = {**now, "teacher": {**now["teacher"], **teacher}}
        assert inputs_hash(without_defaults(changed)) != inputs_hash(OLD)
    assert without_defaults({**now, "config": {"id_column": "none"}})["config"] == {"id_column": "none"}
