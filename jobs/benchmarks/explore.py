"""Benchmark `explore`: pages, search and neighbours of a dictionary (`--general`), their memory, and the index.

`--data` names a second dictionary to compare with.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared import Bench, Figures
from msense.dictionary import SenseDictionary
from msense.dictionary.neighbours import NeighbourIndex
from msense.io.extras import require

_QUERIES, _EXACT, _TOP, _TIMES = 50, 10, 10, 5


def explore(bench: Bench) -> Figures:
    """Return milliseconds of pages, recall@10 of neighbours against an exact search, MB of anonymous memory, and the index."""
    require("explore", "the benchmark explore")
    from starlette.testclient import TestClient

    from msense.explorer.app import make_app
    from msense.explorer.contents import open_contents

    if bench.general is None:
        raise SystemExit("explore needs --general DIR, a dictionary")
    figures: Figures = {}
    began = time.perf_counter()
    contents = open_contents(bench.general, bench.data)
    contents.prepare()
    figures["explore.start_s"] = time.perf_counter() - began
    client = TestClient(make_app(contents), base_url="http://localhost")
    figures["explore.first_view_ms"] = _milliseconds(lambda _: client.get("/"), [0])
    contents.prepare_rest()
    d = contents.dictionary
    tokens = np.random.default_rng(0).choice(np.flatnonzero(np.diff(d.offsets)), _QUERIES).tolist()
    figures["explore.next_view_ms"] = _milliseconds(lambda _: client.get("/"), range(_TIMES))
    figures["explore.token_ms"] = _milliseconds(lambda t: client.get(f"/token/{t}"), tokens)
    largest = int(np.diff(d.offsets).argmax())
    figures["explore.largest_token_ms"] = _milliseconds(lambda _: client.get(f"/token/{largest}"), range(_TIMES))
    queries = [d.token_texts[t][:length] for t in tokens[:9] for length in (1, 2, 3)] + ["unknownword"]
    figures["explore.search_ms"] = _milliseconds(lambda q: client.get("/search", params={"q": q}), queries)
    figures["explore.neighbours_ms"] = _milliseconds(lambda t: client.get(f"/neighbours/{t}/0"), tokens)
    if contents.other is not None:
        figures["explore.compare_ms"] = _milliseconds(lambda _: client.get("/compare"), range(_TIMES))
    figures["explore.anonymous_mb"] = _anonymous_bytes() / 1e6
    return figures | _index(d, tokens[:_EXACT])


def _index(d: SenseDictionary, tokens: Sequence[int]) -> Figures:
    """Return the seconds to make an index, its size, and the recall of its searches."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        index = NeighbourIndex.cached(d.ragged, lambda: d.fingerprint, Path(folder))
        seconds = time.perf_counter() - began
        exact = NeighbourIndex(d.ragged, index._mean, None)
        shared = [
            len({n[:2] for n in index.nearest(t, 0, _TOP)} & {n[:2] for n in exact.nearest(t, 0, _TOP)}) for t in tokens
        ]
        return {
            "explore.index_s": seconds,
            "explore.index_mb": index.nbytes / 1e6,
            "explore.recall": sum(shared) / (_TOP * len(tokens)),
        }


def _milliseconds(call: Callable[[Any], Any], values: Sequence[Any]) -> float:
    """Return the median milliseconds of a call."""
    seconds = []
    for value in values:
        began = time.perf_counter()
        answer = call(value)
        seconds.append(time.perf_counter() - began)
        assert answer.status_code == 200, answer.text
    return 1e3 * float(np.median(seconds))


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
