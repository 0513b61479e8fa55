"""Large tokens in parts: rounds, bytes, memory and time, held against the cost model of `msense.parts`.

Writes two million synthetic points in the format of a run's unit files (1.7 GB in the temporary folder), fits the
model's constants on a few small tokens, predicts larger ones and measures them on a local Ray. Every ratio is of things
timed in this run, in turn.
"""

import logging
import math
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benches.shared import Bench, Figures
from msense import kmeans, part_worker
from msense import parts as stage
from msense.occurrences import record_type
from msense.run_folder import RunFolder
from msense.runtime import Resources, connect
from msense.units import ClusterSettings, Range, read_ranges, stored

logger = logging.getLogger("msense.bench")

DIM, SENSES, UNITS, UNIT_ROWS = 384, 20, 8, 1 << 18
PART, ROUNDS, REPEATS = 1 << 17, 6, 3
SMALL = ((1 << 17, 20, 1 << 16), (1 << 17, 64, 1 << 16), (1 << 18, 20, 1 << 16), (1 << 18, 20, 1 << 14))
LARGE = (1, 2, 4, 8, 16)  # parts of PART points


class Case(NamedTuple):
    """A token to cluster: N points in parts of so many, K senses, W workers."""

    points: int
    senses: int
    part: int
    workers: int

    @property
    def parts(self) -> int:
        """Parts in all."""
        return math.ceil(self.points / self.part)

    @property
    def starts(self) -> range:
        """First rows of the parts."""
        return range(0, self.points, self.part)

    @property
    def own_parts(self) -> int:
        """Parts of the worker with most."""
        return math.ceil(self.parts / self.workers)

    @property
    def own_points(self) -> int:
        """Points of that worker."""
        return min(self.own_parts * self.part, self.points)

    @property
    def unheld(self) -> int:
        """Those of them that it reads anew each round."""
        return max(0, self.own_parts - part_worker.PARTS_HELD) * self.part

    @property
    def terms(self) -> list[float]:
        """What the model's constants a, e, f and c are multiplied by, for the seconds of a round."""
        return [self.own_points * DIM * self.senses, self.own_points * DIM, self.unheld * (20 + 2 * DIM), 1]

    @property
    def round_bytes(self) -> int:
        """Bytes of a round as the model has them: to the workers, and from them."""
        to_each = 4 * self.senses * DIM + 4 * DIM + 8 * self.senses
        return min(self.workers, self.parts) * (to_each + self.senses * (8 * DIM + 8))

    @property
    def worker_bytes(self) -> int:
        """Most memory of a worker as the model has it."""
        rows = part_worker.BLOCKS_AT_A_TIME * kmeans.BLOCK_ROWS
        held = min(self.own_parts, part_worker.PARTS_HELD) * min(self.part, self.points) * (2 * DIM + 16)
        return held + rows * (12 if self.unheld else 8) * DIM + 24 * self.senses * DIM


class Measured(NamedTuple):
    """What a token took."""

    round_seconds: float
    round_bytes: int  # as pickled: the state to each worker, and the workers' answers
    worker_bytes: float  # most memory of a worker, over what it had before
    driver_bytes: float


def parts(bench: Bench) -> Figures:
    """Measure large tokens: `parts.*_ratio` are the model over what is measured, for tokens it was not fitted on."""
    resources = connect(bench.workers)
    with tempfile.TemporaryDirectory() as folder:
        settings = ClusterSettings(
            run=RunFolder(folder),
            dim=DIM,
            store_dtype="float16",
            max_occurrences=0,
            max_points_per_part=PART,
            exemplars=3,
            kmeans=kmeans.KMeansConfig(k=SENSES, tol=0.0, max_rounds=ROUNDS),
            senses_by_token=False,
            device="cpu",
        )
        _write_units(settings)
        figures = _against_model(settings, resources)
        return figures | _scaling(settings, resources)


def _write_units(settings: ClusterSettings) -> None:
    """Write unit files of one token: a mixture of 64 normal clouds, the same 2^16 points over and over."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(64, DIM))
    base = (centres[rng.integers(0, 64, 1 << 16)] + rng.normal(size=(1 << 16, DIM))).astype(np.float16)
    for unit in range(UNITS):
        records = np.zeros(UNIT_ROWS, record_type(DIM))
        records["key"] = np.sort(rng.integers(0, 2**64, UNIT_ROWS, dtype=np.uint64))
        records["row"] = np.arange(UNIT_ROWS)
        for start in range(0, UNIT_ROWS, len(base)):
            records["embedding"][start : start + len(base)] = base.view(np.uint16)
        file = Path(settings.run.unit_file(unit))
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(records.data)


def _ranges(points: int) -> list[Range]:
    """Return rows of every unit, so many in all."""
    return [Range(unit, 0, points // UNITS) for unit in range(UNITS)]


def _settings(settings: ClusterSettings, case: Case) -> ClusterSettings:
    return replace(settings, max_points_per_part=case.part, kmeans=replace(settings.kmeans, k=case.senses))


def _against_model(settings: ClusterSettings, resources: Resources) -> Figures:
    """Fit the model on small tokens and hold it against larger ones, timed in turn with them."""
    small = [Case(*given, resources.tasks) for given in SMALL]
    large = [Case(number * PART, SENSES, PART, resources.tasks) for number in LARGE]
    large.append(Case(4 * PART, 100, PART, resources.tasks))
    with stage.part_workers(settings, resources) as workers:
        _run(settings, small[0], workers)
        found = [[_run(settings, case, workers).round_seconds for case in small + large] for _ in range(REPEATS)]
    taken = np.median(found, 0)
    logger.info("seconds a round, small tokens first: %s", np.round(found, 3).tolist())
    terms = np.array([case.terms for case in small + large])
    constants = _least_squares(terms[: len(small)] / taken[: len(small), None])
    figures: Figures = {f"parts.model_{name}": float(value) for name, value in zip("aefc", constants, strict=True)}
    figures |= _rounds(settings)
    ratios: dict[str, list[float]] = {"time": [], "bytes": [], "memory": []}
    for case, seconds, predicted in zip(large, taken[len(small) :], (terms @ constants)[len(small) :], strict=True):
        with stage.part_workers(settings, resources) as workers:
            _run(settings, Case(1 << 14, SENSES, 1 << 13, resources.tasks), workers)  # torch's own memory
            took = _run(settings, case, workers)
        name = f"parts.p{case.parts}_k{case.senses}"
        figures |= {f"{name}.round_s": float(seconds), f"{name}.round_bytes": took.round_bytes}
        figures |= {f"{name}.worker_mb": took.worker_bytes / 1e6, f"{name}.driver_mb": took.driver_bytes / 1e6}
        own = {
            "time": float(predicted / seconds),
            "bytes": case.round_bytes / took.round_bytes,
            "memory": case.worker_bytes / took.worker_bytes,
        }
        logger.info("%s: %s; model over measured: %s", name, took, own)
        figures |= {f"{name}.{what}_ratio": ratio for what, ratio in own.items()}
        for what, ratio in own.items():
            ratios[what].append(ratio)
    for what, all_of in ratios.items():
        figures[f"parts.{what}_ratio"] = statistics.median(all_of)
        figures |= {f"parts.{what}_ratio_low": min(all_of), f"parts.{what}_ratio_high": max(all_of)}
    return figures


def _rounds(settings: ClusterSettings) -> Figures:
    """Rounds until a token of one part settles by the usual tolerance."""
    own = replace(settings, kmeans=kmeans.KMeansConfig(k=SENSES))
    began = time.perf_counter()
    prepared = stage.prepare(0, _ranges(PART), own)
    seconds, state = time.perf_counter() - began, prepared.state
    worker = part_worker.PartWorker(own)
    while state.final is None:
        total = worker.partial(prepared.parts, state)
        empty = int((total.counts == 0).sum())
        state = kmeans.update(
            state, total, own.kmeans, worker.farthest(prepared.parts, state, empty) if empty else None
        )
    return {"parts.rounds": state.rounds, "parts.prepare_s": seconds}


def _least_squares(terms: np.ndarray) -> np.ndarray:
    """Return constants that are not negative, with which rows of terms come nearest to 1."""
    from sklearn.linear_model import LinearRegression

    size = np.where(terms.any(0), terms.max(0), 1)  # with many workers no part is read anew: no constant for that
    fit = LinearRegression(positive=True, fit_intercept=False).fit(terms / size, np.ones(len(terms)))
    found: np.ndarray = fit.coef_ / size
    return found


def _run(settings: ClusterSettings, case: Case, workers: list[Any]) -> Measured:
    """Run rounds of a token, from its first points, on workers that are there already; the last writes its file."""
    import ray

    own, told = _settings(settings, case), _pids(workers)
    places = [stage.Part(0, at, tuple(stage.cut(_ranges(case.points), at, at + case.part))) for at in case.starts]
    first = read_ranges(own, [Range(0, 0, case.senses)])[0]["embedding"]
    centroids = stored(np.ascontiguousarray(first), own.store_dtype).float().numpy()
    state = kmeans.BlockedState(0, centroids, np.zeros(DIM, np.float32), np.zeros(case.senses, np.int64))
    before = {pid: _memory(pid, "VmRSS", forget=True) for pid in told}
    token = stage._take_in(stage.Prepared(tuple(places), state), own, workers, [0] * len(workers))
    answers = [len(pickle.dumps(ray.get(asked), 5)) for asked in token.asked]
    sent = sum(answers) + len(token.homes) * len(pickle.dumps(token.state, 5))
    ends = []
    while token.close_round(own):
        ends.append(time.perf_counter())  # the first round, which reads the points, is before the first of these
    peak = [_memory(pid, "VmHWM") - had for pid, had in before.items()]
    return Measured(statistics.median(b - a for a, b in pairwise(ends)), sent, max(peak[1:]), peak[0])


def _pids(workers: list[Any]) -> list[int]:
    """Return the processes of the driver and of the workers."""
    import ray

    return [os.getpid(), *ray.get([worker.__ray_call__.remote(lambda _: os.getpid()) for worker in workers])]


def _memory(pid: int, name: str, *, forget: bool = False) -> float:
    """Return a process's memory now (VmRSS) or at its peak (VmHWM); `forget` the peak so far."""
    if forget:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024.0 * int(status.split(f"{name}:")[1].split()[0])


def _scaling(settings: ClusterSettings, resources: Resources) -> Figures:
    """Rounds a second of all workers over one, beside those of as many bare processes over one."""
    case = Case(4 * PART, SENSES, PART, resources.tasks)
    alone = Resources(actors=1, tasks=1, device="cpu")
    centroids = np.random.default_rng(0).normal(size=(SENSES, DIM)).astype(np.float32)
    state = kmeans.BlockedState(0, centroids, centroids[0], np.zeros(SENSES, np.int64))
    seconds: dict[str, list[float]] = {name: [] for name in ("one", "all", "bare_one", "bare_all")}
    with (
        stage.part_workers(settings, alone) as one,
        stage.part_workers(settings, resources) as every,
        _bare(settings, state, case.points, 1) as bare_one,
        _bare(settings, state, case.points, resources.tasks) as bare_all,
    ):
        _run(settings, case._replace(workers=1), one)
        _run(settings, case, every)
        for _ in range(REPEATS + 1):
            seconds["one"].append(_run(settings, case._replace(workers=1), one).round_seconds)
            seconds["bare_one"].append(_bare_round(bare_one))
            seconds["all"].append(_run(settings, case, every).round_seconds)
            seconds["bare_all"].append(_bare_round(bare_all))
    logger.info("seconds a round: %s", seconds)
    pairs = {"parts.scaling": ("one", "all"), "parts.ceiling": ("bare_one", "bare_all")}
    pairs |= {"parts.over_bare_one": ("one", "bare_one"), "parts.over_bare": ("all", "bare_all")}
    return {name: min(seconds[first]) / min(seconds[second]) for name, (first, second) in pairs.items()}


@contextmanager
def _bare(settings: ClusterSettings, state: kmeans.BlockedState, points: int, count: int) -> Iterator[list[Connection]]:
    """Start processes that hold an equal share of the points each and wait for the word to sum them up."""
    context, ends, processes = multiprocessing.get_context("spawn"), [], []
    for number in range(count):
        here, there = context.Pipe()
        shares = tuple(stage.cut(_ranges(points), number * points // count, (number + 1) * points // count))
        processes.append(context.Process(target=_bare_worker, args=(settings, state, shares, there)))
        processes[-1].start()
        ends.append(here)
    for end in ends:
        end.recv()
    try:
        yield ends
    finally:
        for end, process in zip(ends, processes, strict=True):
            end.send(False)
            process.join()


def _bare_worker(
    settings: ClusterSettings, state: kmeans.BlockedState, ranges: tuple[Range, ...], end: Connection
) -> None:
    """Sum up a share of the points whenever told to."""
    import torch

    torch.set_num_threads(1)
    points = stored(np.ascontiguousarray(read_ranges(settings, ranges)[0]["embedding"]), settings.store_dtype)
    state = replace(state, rounds=1)  # values are checked in the first round only
    kmeans.partial(points, state, settings.kmeans)
    end.send(True)
    while end.recv():
        for _ in range(ROUNDS):
            kmeans.partial(points, state, settings.kmeans)
        end.send(True)


def _bare_round(ends: list[Connection]) -> float:
    """Return the seconds of a round of bare processes."""
    began = time.perf_counter()
    for end in ends:
        end.send(True)
    for end in ends:
        end.recv()
    return (time.perf_counter() - began) / ROUNDS
