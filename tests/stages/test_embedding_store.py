"""Partitions, shards and exemplars against plain loops; and the status of a run."""

import re
import tempfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty import Corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from msense.cli.status import show_status
from msense.clustering.selection import exemplar_places, nearest_points
from msense.errors import InputError
from msense.stages.embedding_store import (
    PARTITION_BYTES,
    SHARD_BYTES,
    TARGET_SHARDS,
    as_stored,
    cut_partitions,
    cut_shards,
    longest_first,
    record_type,
    stored,
    within_budget,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=30), st.integers(0, 3))
def test_nearest_equals_a_loop(points: list[tuple[int, int]], count: int) -> None:
    table = np.array(points, np.int64).reshape(-1, 2)
    chosen, rank = nearest_points(table[:, 0], table[:, 1].astype(np.float32), count)
    expected = []
    for sense in sorted({sense for sense, _ in points}):
        mine = sorted((i for i, p in enumerate(points) if p[0] == sense), key=lambda i: (points[i][1], i))
        expected += [(i, r) for r, i in enumerate(mine[:count])]
    assert list(zip(chosen.tolist(), rank.tolist(), strict=True)) == expected


def test_exemplar_places_by_token_and_sense() -> None:
    found = np.array([0, 1, 1, 0], np.int32), np.array([4, 9, 1, 0.25], np.float32)
    names = ("token", "unit", "row", "position")
    places = {name: np.arange(4, dtype=np.int32) + 10 * i for i, name in enumerate(names)}
    chosen = exemplar_places(*found, np.array([2, 1]), np.array([3, 1]), places, 1)
    assert chosen["exemplar_sense"].tolist() == [0, 1, 0]
    assert chosen["exemplar_row"].tolist() == [20, 22, 23]
    assert chosen["exemplar_distance"].tolist() == [4, 1, 0.25]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_shards_cover_the_vocabulary_and_large_tokens_stand_alone(stored_counts: list[int]) -> None:
    counts = np.array(stored_counts, dtype=np.int64) * 20_000
    borders = cut_shards(counts, 16, 1 << 30)
    assert borders[0] == 0
    assert borders[-1] == len(counts)
    assert (np.diff(borders) > 0).all()
    size = record_type(16).itemsize
    target = int(np.clip(counts.sum() * size // TARGET_SHARDS, *SHARD_BYTES)) // size
    for first, last in pairwise(borders.tolist()):
        assert last - first == 1 or counts[first:last].max() <= target // 2
        assert last - first == 1 or counts[first:last].sum() <= 1.5 * target


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=50))
def test_partitions_are_runs_of_blocks_of_about_equal_output(stored_counts: list[int]) -> None:
    numbers = np.arange(len(stored_counts))
    columns = {"piece": numbers // 7, "block": numbers % 7, "stored": np.array(stored_counts)}
    columns |= {"needed": columns["stored"] % 50, "needed_tokens": 3 * (columns["stored"] % 1000)}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(columns), f"{folder}/blocks.parquet")
        partitions = cut_partitions(f"{folder}/blocks.parquet", dim=384)
    places = [place for p in partitions for place in zip(p.splits, p.blocks, strict=True)]
    assert places == [divmod(number, 7) for number in numbers.tolist()]
    assert [p.number for p in partitions] == list(range(len(partitions)))
    least = PARTITION_BYTES[0] // record_type(384).itemsize
    assert all(p.stored <= least + 40_000 for p in partitions)
    assert sum(p.stored for p in partitions) == sum(stored_counts)
    assert sum(p.tokens for p in partitions) == columns["needed_tokens"].sum()
    order = longest_first(partitions)
    assert sorted(p.number for p in order) == list(range(len(partitions)))
    assert all(a.tokens >= b.tokens for a, b in pairwise(order))
    sizes = [768 * p.tokens + 20 * p.passages for p in partitions]
    for budget in (0, sum(sizes) // 2, sum(sizes)):
        kept = [p.kept for p in within_budget(partitions, 768, 20, budget)]
        assert sum(size for size, keep in zip(sizes, kept, strict=True) if keep) <= budget
        assert kept == sorted(kept, reverse=True)
    assert all(kept)


def test_stored_bits_round_trip() -> None:
    values = np.array([[1.5, -2.25], [0, 65504]], np.float32)
    for dtype in ("float16", "bfloat16"):
        bits = as_stored(values, dtype)
        assert bits.dtype == np.uint16
        np.testing.assert_allclose(stored(bits, dtype).float().numpy(), values, rtol=0.01)


@pytest.mark.usefixtures("in_process")
def test_status_counts_what_is_finished(made: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        show_status(str(made.folder))
    made.stop_at("embed", calls=4)
    next(made.folder.glob("run/occurrences/*.records")).unlink()  # a marker without its file does not count
    show_status(str(made.folder / "run"))
    shown = capsys.readouterr().out
    assert re.search(r"2 of [0-9]+ partitions", shown)
    assert re.search(r" 0 of [0-9]+ shards", shown)
    assert "rerun the build command to resume" in shown
