"""Hostile inputs for every reader: a documented error or a sound result comes out, in bounded time and memory.

`make test` reads a few hundred, `-m slow` 10,000, or as many as `MSENSE_FUZZ` says.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzzing
import pytest
from fuzz_readers import READERS, WHOLE
from fuzzing import KINDS, Child, Edit
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from students import shipped
from test_dictionary_hostile import full

COUNT = int(os.environ.get("MSENSE_FUZZ", 10_000))
_unit = st.floats(0, 1, exclude_max=True)
edits: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(st.sampled_from(KINDS), _unit, _unit, st.binary(min_size=1, max_size=9)), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, make_teacher: Callable[..., Path]) -> Iterator[Child]:
    """The process that reads copies of whole folders."""
    root = tmp_path_factory.mktemp("whole")
    teacher = make_teacher("bert", pooling="mean_tokens")
    folders = {"teacher": teacher, "dictionary": root / "dictionary"}
    full(folders["dictionary"])
    for kind in ("static", "layers:1"):
        folders[f"student {kind}"] = root / f"student {kind}"
        shipped(teacher, folders[f"student {kind}"], kind)
    for name, write in WHOLE.items():
        folders[name] = root / name
        folders[name].mkdir()
        write(folders[name])
    assert folders.keys() == READERS.keys()
    own = Child("fuzz_readers", {name: str(folder) for name, folder in folders.items()})
    yield own
    own.close()


def fuzz(child: Child, name: str, count: int) -> Counter[str]:
    """Read so many hostile inputs; none may end badly."""
    ends: Counter[str] = Counter()
    bad: list[str] = []

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(file=st.sampled_from(READERS[name].files), changes=edits, reseal=st.booleans())
    def read(file: str, changes: list[Edit], reseal: bool) -> None:
        sealed = file.endswith((".json", ".done")) and name in ("labels", "labels, verified", "run folder", "results")
        end = child.run(name, file, changes, reseal and sealed)
        ends[end.partition(":")[0]] += 1
        if end not in ("refused", "same", "other"):
            bad.append(f"{name}, {file}, {changes}, {reseal and sealed}: {end}")

    read()
    assert not bad, f"{dict(ends)}: " + "\n\n".join(bad[:5])
    return ends


@pytest.mark.parametrize("name", READERS)
def test_a_few_hostile_inputs(child: Child, name: str) -> None:
    ends = fuzz(child, name, 12)
    assert ends["refused"] + ends["same"] + ends["other"] == ends.total() >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_hostile_inputs(child: Child, name: str, tell: Callable[[str], None]) -> None:
    count = -(-COUNT // len(READERS))
    ends = fuzz(child, name, count)
    tell(
        f"{name}: {ends.total()} hostile inputs: {ends['refused']} refused, {ends['same']} read as before, {ends['other']} "
        "read as they now say; 0 crashes, 0 hangs, 0 silent"
    )
    assert ends["refused"] > 0


def test_what_may_not_be_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    ends = ("crash", "hang", "take", "fail", "read", "hashed")
    own = Child("fuzz_faults", dict.fromkeys(ends, str(tmp_path)))
    assert own.run("read", "a", [("flip", 0.0, 0.0, b"x")], False) == "other"
    wanted = {
        "crash": "crash: the process ended with 3",
        "hang": "hang: over 1 s",
        "take": "memory: ",
        "fail": "crash: Trace",
    }
    for name, words in {**wanted, "hashed": "silent: a change"}.items():
        monkeypatch.setattr(fuzzing, "SECONDS", 1 if name == "hang" else 60)
        assert own.run(name, "a", [("flip", 0.0, 0.0, b"x")], False).startswith(words)
    own.close()
