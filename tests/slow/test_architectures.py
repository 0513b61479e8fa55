"""Every text family of the installed transformers: its vectors, padded batches and students; the table of the results.

`MSENSE_ARCHITECTURES=FILE` appends the results to a file of JSON lines, and writes the table,
`msense/teacher/ARCHITECTURES.md`, once it has those of all families; the last ones count.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from architectures import REFUSED, Outcome, families, sweep, table

import msense.teacher

TABLE = Path(msense.teacher.__file__).with_name("ARCHITECTURES.md")


@pytest.mark.slow
@pytest.mark.parametrize("kind", families())
def test_a_family_is_read_right_or_refused(kind: str, tmp_path: Path) -> None:
    outcome = sweep(kind, tmp_path)
    if results := os.environ.get("MSENSE_ARCHITECTURES"):
        with Path(results).open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    assert not outcome.is_wrong(), outcome
    assert outcome.is_refused() == (kind in REFUSED), outcome


@pytest.mark.slow
def test_few_families_are_refused() -> None:
    assert len(REFUSED) <= 15
    assert set(REFUSED) <= set(families())
    if results := os.environ.get("MSENSE_ARCHITECTURES"):
        lines = [Outcome(**json.loads(line)) for line in Path(results).read_text().splitlines()]
        outcomes = {outcome.kind: outcome for outcome in lines}
        if set(families()) <= outcomes.keys():
            TABLE.write_text(table({kind: outcomes[kind] for kind in families()}), encoding="utf-8")
