"""The contract of all executors: results, handles, errors that come back as themselves, and processes that die."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import work

from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.runtime import Executor, LocalExecutor, open_executor
from msense.runtime.ray_executor import OOM_RETRIES, RESTARTS, RayExecutor

KINDS = ["local", "spawned", "ray"]
SLOW_ON_RAY = ["local", "spawned", pytest.param("ray", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def make_executor(request: pytest.FixtureRequest) -> Callable[[str], Executor]:
    """Return the executor of a kind; processes and Ray are shared by all tests."""
    made: dict[str, Executor] = {}

    def make(kind: str) -> Executor:
        if kind == "ray":
            request.getfixturevalue("ray")
            return RayExecutor.connect(workers=2)
        return made.setdefault(kind, LocalExecutor(1 if kind == "local" else 2, device="cpu"))

    return make


@pytest.fixture
def executor(request: pytest.FixtureRequest, make_executor: Callable[[str], Executor]) -> Executor:
    return make_executor(request.param)


@pytest.mark.parametrize("executor", KINDS, indirect=True)
def test_results(executor: Executor) -> None:
    rows = list(executor.map("adding", work.add, [1, 2, 3, 4], 10))
    assert sorted(row["item"] for row in rows) == [11, 12, 13, 14]
    local = isinstance(executor, LocalExecutor) and executor.workers == 1
    assert ({row["pid"] for row in rows} == {os.getpid()}) == local
    (alone,) = executor.map("isolated", work.add, [1], isolated=True)
    assert alone["pid"] != os.getpid()
    assert list(executor.map("nothing", work.add, [])) == list(executor.map_actors("x", work.Adder, {}, [])) == []
    made = executor.map_actors("actors", work.Adder, {"offset": 5}, list(range(4)))
    assert sorted(row["item"] for row in made) == [5, 6, 7, 8]
    offset = executor.put(100)
    total = executor.reduce("totals", work.Total, list(range(9)), offset)
    assert sorted(executor.get(total).numbers) == list(range(100, 109))
    assert executor.get([executor.put(7), offset]) == [7, 100]
    assert executor.run(max, offset, 4) == 100


@pytest.mark.parametrize("executor", KINDS, indirect=True)
def test_clustering_workers_keep_their_state(executor: Executor) -> None:
    with executor.clustering_workers(work.Adder, 10) as workers:
        assert len(workers) == executor.resources.clusterers
        shared = executor.put([1, 2])
        first = executor.get([call("held", shared) for call in workers])
        assert first == [(1, 13)] * len(workers)
        assert executor.get(workers[0]("held", [])) == (2, 10)
    if isinstance(executor, LocalExecutor):
        with executor.clustering_workers(work.Adder, -1) as (first, *_):  # noqa: SIM117 - the next line raises
            with pytest.raises(InputError, match="a negative offset"):
                executor.get(first("held", []))


@pytest.mark.parametrize("executor", KINDS, indirect=True)
def test_errors_come_back_as_themselves(executor: Executor) -> None:
    for name, (_, kind, message) in work.ERRORS.items():
        calls: dict[str, Callable[[], object]] = {
            "map": lambda name=name: list(executor.map("failing", work.fail, [name])),
            "reduce": lambda name=name: executor.get(executor.reduce("failing", work.fail, [name])),
            "run": lambda name=name: executor.run(work.fail, name),
            "handle": lambda name=name: executor.run(max, executor.reduce("failing", work.fail, [name]), 1),
        }
        for where, call in calls.items():
            with pytest.raises(kind, match=message) as caught:
                call()
            assert name in ("OSError", "bug") or type(caught.value) is kind, where
    on_ray = isinstance(executor, RayExecutor)  # which starts new processes for every actor, and reports bugs itself
    for name in ["DictionaryError"] if on_ray else work.ERRORS:
        _, kind, message = work.ERRORS[name]
        with pytest.raises(kind.__mro__[:2], match=message):
            list(executor.map_actors("failing", work.Adder, {"offset": 0}, [name]))
    with pytest.raises(InputError, match="a negative offset"):
        list(executor.map_actors("failing", work.Adder, {"offset": -1}, [1, 2]))


def items(deaths: int) -> list[dict]:
    return [{"number": number, "deaths": deaths if number == 1 else 0} for number in range(4)]


@pytest.mark.parametrize("kind", SLOW_ON_RAY)
def test_work_whose_process_dies_is_retried_and_then_given_up(
    make_executor: Callable[[str], Executor], kind: str, tmp_path: Path
) -> None:
    executor, tried = make_executor(kind), str(tmp_path)
    rows = executor.map("dying", work.die, items(1), tried, isolated=True)
    assert sorted(row["number"] for row in rows) == [0, 1, 2, 3]
    assert (tmp_path / "1").read_text() == "2"
    (tmp_path / "1").unlink()
    item = {"number": 1, "deaths": 99, "uri": "/corpus/bad.parquet"}
    at = "/corpus/bad" if kind != "ray" else "the same work"
    with pytest.raises(MsenseError, match=rf"a worker process died repeatedly at {at}.*lack of memory.*--workers"):
        list(executor.map("dying", work.die, [item], tried, isolated=True))
    assert (tmp_path / "1").read_text() == str(OOM_RETRIES + 1)
    assert list(executor.map("adding", work.add, [1], isolated=True))  # the executor goes on
    if kind != "local":
        (tmp_path / "1").unlink()
        actors = executor.map_actors("dying", work.Dying, {"tried": tried}, items(1))
        assert sorted(row["number"] for row in actors) == [0, 1, 2, 3]
    if kind == "ray":
        for arguments in ({"tried": tried}, {"tried": tried, "at_once": True}):
            for file in tmp_path.iterdir():
                file.unlink()
            with pytest.raises(MsenseError, match=r"a worker process died repeatedly .*lack of memory"):
                list(executor.map_actors("dying", work.Dying, arguments, items(99)[1:2]))
            (file,) = tmp_path.iterdir()
            assert file.read_text() == str(RESTARTS + 1)


@pytest.mark.parametrize("kind", SLOW_ON_RAY)
def test_training_resumes_from_its_last_checkpoint(
    make_executor: Callable[[str], Executor], kind: str, tmp_path: Path
) -> None:
    executor = make_executor(kind)
    settings = {"steps": 5, "fail_at": 4, "flag": str(tmp_path / "flag")}
    if isinstance(executor, LocalExecutor):
        with pytest.raises(MsenseError, match=r"^training failed: .*interrupted$"):
            executor.train("t", work.train, settings, str(tmp_path / "training"))
        latest = sorted(path.name for path in (tmp_path / "training" / "t").iterdir() if path.is_dir())
        assert latest == ["step_2", "step_3"]
    history, checkpoint = executor.train("t", work.train, settings, str(tmp_path / "training"))
    assert (tmp_path / "flag").exists()
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5]
    assert [row["resumed"] for row in history] == [1, 1, 1, 0, 0]
    with storage.local_folder(checkpoint) as folder:
        assert (folder / "step").read_text() == "5"


def test_the_executor_of_a_job() -> None:
    assert open_executor(local=True).resources.tasks == 1
    assert open_executor(local=True, workers=3).workers == 3
