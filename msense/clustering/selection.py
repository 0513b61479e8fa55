"""Selection of points: the first ones of each token by key, and the nearest ones to each centroid, its exemplars."""

from collections.abc import Sequence

import numpy as np

Places = dict[str, np.ndarray]
PLACE = ("token", "sense", "rank", "distance", "unit", "row", "position")  # columns of exemplars, named `exemplar_...`


def merge_exemplars(several: Sequence[Places], count: int) -> Places:
    """Return the exemplars nearest to each sense; ties go to the earlier ones."""
    places = {f"exemplar_{name}": np.concatenate([p[f"exemplar_{name}"] for p in several]) for name in PLACE}
    chosen, rank = nearest_points(places["exemplar_sense"], places["exemplar_distance"], count)
    return {name: column[chosen] for name, column in places.items()} | {"exemplar_rank": rank}


def exemplar_places(
    assignment: np.ndarray, distance: np.ndarray, senses: np.ndarray, points: np.ndarray, places: Places, count: int
) -> Places:
    """Return the `count` points nearest to every sense, as the columns of `PLACE`; distances stay squared.

    `assignment` int32 [n] is each point's sense inside its token, `distance` float32 [n] the squared distance to it;
    `senses` and `points` int64 [T] are numbers per token; `places` are token, unit, row and position of each point.
    """
    sense = assignment + np.repeat(np.cumsum(senses) - senses, points)
    chosen, rank = nearest_points(sense, distance, count)
    columns = {name: column[chosen] for name, column in places.items()}
    columns |= {"sense": assignment[chosen], "rank": rank, "distance": distance[chosen]}
    return {f"exemplar_{name}": columns[name] for name in PLACE}


def nearest_points(sense: np.ndarray, distance: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices int64 [m] of the `count` points nearest to each sense, sorted by sense, and their ranks int32 [m].

    Ties go to the earlier point.
    """
    order = np.lexsort((distance, sense))
    rank = np.arange(len(order)) - np.searchsorted(sense[order], sense[order])
    chosen = rank < count
    return order[chosen], rank[chosen].astype(np.int32)


def first_by_key(keys: np.ndarray, tokens: np.ndarray, max_occurrences: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the first `max_occurrences` points of every token by key (0: all), ties in order of rows.

    Returns the chosen rows, int64 [m], sorted by token and row; and the rank of each by key within its token, int32 [m].
    """
    rows, rank = nearest_points(tokens, keys, max_occurrences or len(keys))
    corpus_order = np.lexsort((rows, tokens[rows]))
    return rows[corpus_order], rank[corpus_order]
