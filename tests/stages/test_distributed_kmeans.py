"""Large tokens in chunks: what is read, what is sent, and the same bytes for any chunks and workers."""

import math
import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from executors import ShuffledExecutor
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from msense.clustering.kmeans import KMeansConfig, blocks, seeding
from msense.io import storage
from msense.io.arrays import load_arrays, save_arrays
from msense.run.folder import RunFolder
from msense.runtime import LocalExecutor
from msense.stages import distributed_kmeans, distributed_kmeans_worker, embedding_store
from msense.stages.cluster import cluster_shard
from msense.stages.distributed_kmeans import LargeTokenStage
from msense.stages.distributed_kmeans_worker import Chunk, ChunkWorker, _exact
from msense.stages.embedding_store import ClusterSettings, Range, read_rows, record_type

DIM, TOKENS, ROWS = 8, (3, 5), 5000


def write_run(folder: Path, rows: int = ROWS, partitions: int = 3) -> ClusterSettings:
    """Write a run folder with two large tokens in every partition, the K of each, and a shard for every token."""
    run, rng = RunFolder(str(folder)), np.random.default_rng(0)
    settings = ClusterSettings(run, DIM, "float16", 0, 1024, 3, KMeansConfig(k=4, max_rounds=12), True, "cpu")
    centres = rng.normal(size=(12, DIM)) * 4
    for partition in range(partitions):
        records = np.zeros(rows // partitions * len(TOKENS), record_type(DIM))
        records["token"] = np.repeat(TOKENS, rows // partitions)
        records["key"] = rng.integers(0, 1 << 14, len(records))  # with ties
        records["row"], records["position"] = np.arange(len(records)), rng.integers(0, 99, len(records))
        values = centres[rng.integers(0, 12, len(records))] + rng.normal(size=(len(records), DIM))
        records["embedding"] = values.astype(np.float16).view(np.uint16)
        records[:] = records[np.lexsort((records["key"], records["token"]))]
        run.publish(run.partition_file(partition), lambda path, data=records.data: path.write_bytes(data))
    senses = np.zeros(9, np.int64)
    senses[list(TOKENS)] = 7, 11
    borders = np.array([0, 0, 0, 0, *[rows // partitions] * 2, *[len(records)] * 4])
    run.publish(run.senses, lambda path: save_arrays(path, {"senses": senses}))
    run.publish(run.offsets, lambda path: save_arrays(path, {"offsets": np.stack([borders] * partitions)}))
    return settings


def clustered(settings: ClusterSettings, workers: int, points: int) -> dict[int, bytes]:
    """Cluster the large tokens in chunks of this many points; return the contents of their files, and remove them."""
    stage = LargeTokenStage(replace(settings, max_points_per_part=points), {token: token for token in TOKENS})
    executor = ShuffledExecutor(random.Random(0), workers)
    assert stage.reduce(executor, list(stage.process(executor, range(len(TOKENS))))) == stage.outputs
    names = [Path(file).name for file in stage.outputs]
    left = sorted(path.name for path in Path(settings.run.centroids).iterdir())
    assert left == sorted([*names, *(name + storage.MARKER for name in names)])  # no state of a round
    data = {token: Path(settings.run.token_file(token)).read_bytes() for token in TOKENS}
    storage.remove(settings.run.centroids)
    return data


@pytest.mark.parametrize("cap", [0, 3000])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_chunks_give_the_result_of_the_whole_token(
    tmp_path: Path, cap: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_run(tmp_path)
    settings = replace(settings, kmeans=replace(settings.kmeans, metric=metric), max_occurrences=cap)
    results = []
    for workers, points, held in ((1, 1024, 4), (2, 1024, 1), (3, 2048, 4), (2, 4096, 2)):
        monkeypatch.setattr(distributed_kmeans_worker, "CHUNKS_HELD", held)
        monkeypatch.setattr(distributed_kmeans, "CHUNKS_HELD", held)
        results.append(clustered(settings, workers, points))
    assert all(files == results[0] for files in results)
    whole = replace(settings, max_points_per_part=ROWS)
    for token in TOKENS:
        cluster_shard({"number": token, "first": token, "last": token + 1}, whole)
        expected = load_arrays(settings.run.shard_file(token))
        (tmp_path / "file").write_bytes(results[0][token])
        actual = load_arrays(str(tmp_path / "file"))
        assert actual["sizes"].tolist() == [{3: 7, 5: 11}[token]]
        for name, array in actual.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows read from partition files: by chunk workers ("chunks"), and by everything else ("ranges")."""
    rows: Counter[str] = Counter()

    def count(name: str) -> Callable[..., np.ndarray]:
        def read(uri: str, dim: int, start: int, stop: int) -> np.ndarray:
            rows[name] += stop - start
            return read_rows(uri, dim, start, stop)

        return read

    monkeypatch.setattr(distributed_kmeans_worker, "read_rows", count("chunks"))
    monkeypatch.setattr(embedding_store, "read_rows", count("ranges"))
    return rows


def test_a_token_is_prepared_from_its_first_points_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counter[str]
) -> None:
    settings = write_run(tmp_path, 60_000)
    monkeypatch.setattr(seeding, "SEED_POINTS", 2000)
    chunks, state = distributed_kmeans.prepare(3, 3, settings)
    assert counted["ranges"] == 2000
    assert counted["chunks"] < 4500  # of 60,000 rows, to locate the end of the first 2000
    assert sum(len(r) for chunk in chunks for r in chunk.ranges) == 60_000
    assert len(state.centroids) == 7


def test_rows_of_held_chunks_are_read_once(tmp_path: Path, counted: Counter[str]) -> None:
    settings = write_run(tmp_path, 6 * 1024)
    chunks, state = distributed_kmeans.prepare(3, 3, settings)
    worker, counted["chunks"] = ChunkWorker(settings), 0
    assert len(chunks) == distributed_kmeans_worker.CHUNKS_HELD + 2
    for number in (1, 2, 3):
        worker.partial(chunks, state)
        assert counted["chunks"] == (6 + 2 * (number - 1)) * 1024
        assert list(worker.held) == chunks[: distributed_kmeans_worker.CHUNKS_HELD]
    far = worker.farthest(chunks, state, 3)
    assert (np.diff(far.distance) <= 0).all()
    worker.finish(chunks, blocks.update(state, worker.partial(chunks, state), KMeansConfig(max_rounds=1)))
    assert not worker.held


def test_what_is_sent_does_not_grow_with_the_points(tmp_path: Path) -> None:
    sent = []
    for points in (2, 30):
        settings = write_run(tmp_path / str(points), points * 1024)
        chunks, state = distributed_kmeans.prepare(3, 3, settings)
        worker = ChunkWorker(settings)
        total = worker.partial(chunks, state)
        done, places = worker.finish(chunks, blocks.update(state, total, replace(settings.kmeans, max_rounds=1)))
        assert max(len(total.inertia), len(done.squares)) <= 4
        assert len(places["exemplar_rank"]) == 3 * 7
        sent.append(len(pickle.dumps(total, 5)))
    assert abs(sent[1] - sent[0]) <= 40
    assert sent[1] < 7 * (8 * DIM + 8) + 1000


FLOATS = st.lists(st.floats(0, 1e30), min_size=1, max_size=60)


@given(FLOATS, FLOATS)
def test_a_few_numbers_stand_for_an_exact_sum(first: list[float], second: list[float]) -> None:
    few = [*_exact(np.array(first)), *_exact(np.array(second))]
    assert math.fsum(few) == math.fsum([*first, *second])
    assert len(_exact(np.array(first * 50))) <= 40


PARTITIONS = st.lists(
    st.tuples(st.integers(1, 1500), st.integers(1, 2000), st.integers(0, 2000)), min_size=1, max_size=4
)


@hypothesis_settings(deadline=None, max_examples=60)
@given(PARTITIONS, st.floats(0, 1.1))
def test_first_rows_by_key_are_located_in_windows(partitions: list[tuple[int, int, int]], share: float) -> None:
    """Also for uneven keys, for which windows have to grow: the n keys of a partition lie in [low, low + width)."""
    rng = np.random.default_rng(0)
    keys = [np.sort(rng.integers(low, low + width, n).astype(np.uint64)) for n, width, low in partitions]
    count = int(share * sum(map(len, keys)))

    def read(_: object, ranges: list[Range]) -> list[np.ndarray]:
        return [keys[r.partition][r.start : r.stop].view([("key", "<u8")]) for r in ranges]

    ranges = [Range(partition, 0, len(k)) for partition, k in enumerate(keys)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_kmeans, "read_blocks", read)
        patch.setattr(distributed_kmeans, "WINDOW", 1)
        first = distributed_kmeans.first_ranges_by_key(None, ranges, count)
    chosen = np.argsort(np.concatenate(keys), kind="stable")[:count]
    number = np.repeat(np.arange(len(keys)), [len(k) for k in keys])[chosen]
    assert {r.partition: (r.start, r.stop) for r in first} == {u: (0, n) for u, n in Counter(number.tolist()).items()}


def test_chunks_go_to_the_workers_of_lowest_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = distributed_kmeans.Rounds(LocalExecutor(device="cpu"), "abc", write_run(tmp_path))
    monkeypatch.setattr(rounds, "_begin_round", lambda token: None)
    rounds.load[:] = 2, 0, 1
    chunks = [Chunk(3, 1024 * number, ()) for number in range(5)]
    token = rounds.start(chunks, blocks.BlockedState(3, *[np.zeros(1)] * 3))
    assert token.homes == [("a", chunks[:1]), ("b", chunks[1:4]), ("c", chunks[4:])]
    assert rounds.load.tolist() == [3, 3, 2]
