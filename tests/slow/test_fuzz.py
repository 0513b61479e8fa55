"""Fuzzing of every reader: a damaged input gives a documented error or a sound result, in bounded time and memory.

The slow test reads 10,000 in total, or as many as `MSENSE_FUZZ` says.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzzing
import pytest
from executors import small_partitions
from faulty import Corpus
from fuzz_readers import READERS
from fuzzing import KINDS, Child, Edit
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from students import shipped

COUNT = int(os.environ.get("MSENSE_FUZZ", 10_000))
SEALED = ("labels", "labels, verified", "run folder")  # whose JSON files have a checksum
_unit = st.floats(0, 1, exclude_max=True)
edits: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(st.sampled_from(KINDS), _unit, _unit, st.binary(min_size=1, max_size=9)), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, make_teacher: Callable[..., Path]) -> Iterator[Child]:
    """The reading subprocess, with an undamaged folder for every reader."""
    root = tmp_path_factory.mktemp("whole")
    teacher = make_teacher("bert", pooling="mean_tokens")
    folders = {"teacher": teacher, **{name: root / name for name in READERS if name != "teacher"}}
    for kind in ("static", "layers:1", "table"):
        shipped(teacher, folders[f"student {kind}"], kind)
    (root / "made").mkdir()
    made = Corpus(root / "made", teacher)
    with small_partitions():
        made.build("dict", max_occurrences=60)
        for name in ("labels", "labels, verified"):
            made.label(str(folders[name]), held_out=0.3, soft_targets=2)
            folders[name] = made.labels(folders[name])
    for name, reader in READERS.items():
        if reader.write is not None:
            folders[name].mkdir()
            reader.write(folders[name])
    own = Child("fuzz_readers", {name: str(folder) for name, folder in folders.items()})
    yield own
    own.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs(child: Child, name: str) -> None:
    outcomes: Counter[str] = Counter()
    failures: list[str] = []

    @settings(
        max_examples=-(-COUNT // len(READERS)), deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(file=st.sampled_from(READERS[name].files), changes=edits, reseal=st.booleans())
    def read(file: str, changes: list[Edit], reseal: bool) -> None:
        reseal &= name in SEALED and file.endswith((".json", ".done"))
        outcome = child.run(name, file, changes, reseal)
        outcomes[outcome.partition(":")[0]] += 1
        if outcome not in ("refused", "same", "other"):
            failures.append(f"{name}, {file}, {changes}, {reseal}: {outcome}")

    read()
    assert not failures, f"{dict(outcomes)}: " + "\n\n".join(failures[:5])
    assert outcomes["refused"] > 0


def test_the_fuzzer_detects_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    expected = {  # the last two end the subprocess
        "read": "other",
        "memory": "memory: ",
        "error": "crash: Trace",
        "hashed": "silent: a change",
        "hang": "hang: over 1 s",
        "crash": "crash: the process ended with 3",
    }
    child = Child("fuzz_faults", dict.fromkeys(expected, str(tmp_path)))
    for name, outcome in expected.items():
        monkeypatch.setattr(fuzzing, "SECONDS", 1 if name == "hang" else 60)
        assert child.run(name, "a", [("flip", 0.0, 0.0, b"x")], False).startswith(outcome)
    child.close()
