"""One Ray for the session, small teachers and corpora, and stores that behave like S3."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import executors
import fault_table
import fsspec
import pytest
from fsspec import AbstractFileSystem
from teachers import write_teacher

if TYPE_CHECKING:
    from faulty import Corpus
    from s3_server import Server

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")  # a checkpoint costs as much, else two seconds
# what tests hand to Ray's workers may stand in modules beside this one
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH")))
)
INTEGRATION = (  # tests of whole runs: many builds and trainings, servers, processes
    "pipelines/", "jobs/", "slow/", "test_readme", "test_secrets", "io/test_s3", "run/test_lease", "runtime/test_executors",
    "stages/test_many_splits", "stages/test_label", "training/test_distill", "evaluation/test_mteb",
    "evaluation/test_evaluate", "cli/test_bad_input",
)  # fmt: skip
OUTCOMES: dict[tuple[str, str], str] = {}  # of (fault, stage)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use Ray, of which one process has the only one, and those that `make test-unit` leaves out."""
    for item in items:
        if "ray" in getattr(item, "fixturenames", ()) or "[ray" in item.name or "submit" in item.name:
            item.add_marker(pytest.mark.xdist_group("ray"))
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        if place.startswith(INTEGRATION):
            item.add_marker("integration")


@pytest.fixture
def outcome() -> Callable[[str, str, str], None]:
    """Record the outcome of a fault in a stage, which the test has checked."""

    def note(fault: str, stage: str, observed: str) -> None:
        OUTCOMES[fault, stage] = observed

    return note


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After a run of all tests, write the table of faults."""
    chosen = session.config.option
    whole = OUTCOMES and not hasattr(session.config, "workerinput")  # a worker of xdist runs a part of the tests
    if whole and exitstatus == 0 and not (chosen.markexpr or chosen.keyword or chosen.file_or_dir):
        fault_table.write(OUTCOMES)


@pytest.fixture
def memory() -> Iterator[AbstractFileSystem]:
    """The store in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator["Server"]:
    """A server that this process and those that it starts take for S3, with an empty bucket."""
    import s3fs
    from s3_server import BUCKET, KEY, SECRET, Server

    from msense.io import filesystems

    server = Server()
    given = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    for name, value in (given | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "3"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3fs.S3FileSystem.clear_instance_cache()
    server.empty()
    filesystems.filesystem(BUCKET)[0].mkdir("bucket")
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """The Ray that all tests share."""
    from msense.runtime.ray_executor import RayExecutor

    RayExecutor.connect(workers=3)
    import ray as ray_module

    yield
    ray_module.shutdown()


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `write_teacher` with new folders."""
    return lambda kind="bert", *given, **more: write_teacher(tmp_path_factory.mktemp(kind), kind, *given, **more)


@pytest.fixture
def in_process() -> Iterator[None]:
    """Cut a small corpus into many partitions, and run isolated work of a LocalExecutor in this process."""
    with executors.small_partitions():
        yield


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Patches that a test may undo without undoing those of its fixtures."""
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture
def made(tmp_path: Path, make_teacher: Callable[..., Path]) -> "Corpus":
    """A corpus and a teacher to build from."""
    from faulty import Corpus

    return Corpus(tmp_path, make_teacher("bert"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, make_teacher: Callable[..., Path]) -> "Corpus":
    """The finished run "whole", which keeps all files, and "stopped": the same before its contexts were removed.

    No test changes them.
    """
    from faulty import ALL, Corpus

    corpus = Corpus(tmp_path_factory.mktemp("built"), make_teacher("bert"))
    run, contexts = corpus.folder / "whole", corpus.folder / "contexts"
    with executors.small_partitions():
        corpus.build(
            "whole", executors.before("assemble", lambda: shutil.copytree(run / "contexts", contexts)), keep=ALL
        )
    shutil.copytree(run, corpus.folder / "stopped")
    contexts.rename(corpus.folder / "stopped" / "contexts")
    return corpus


@pytest.fixture(scope="session")
def teacher(make_teacher: Callable[..., Path]) -> Path:
    """A small teacher that nobody changes."""
    return make_teacher("bert")


@pytest.fixture(scope="session", params=["static", "layers:1"])
def shipped_student(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A shipped student that nobody changes: its encoder, the student, its dictionary, and the folder."""
    from students import shipped

    from msense import SenseEncoder

    folder = tmp_path_factory.mktemp("shipped") / "student"
    student, dictionary = shipped(teacher, folder, request.param)
    return SenseEncoder.from_pretrained(folder), student, dictionary, folder
