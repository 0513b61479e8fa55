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
    """Return the points nearest to every sense, as the columns of `PLACE`; distances stay squared.

    Args:
        assignment: int32 [n], sense of each point inside its token.
        distance: float32 [n], squared distance to it.
        senses: int64 [T], senses of each token.
        points: int64 [T], points of each token, sum n.
        places: token, unit, row and position of each point.
        count: limit per sense.
    """
    sense = assignment + np.repeat(np.cumsum(senses) - senses, points)
    chosen, rank = nearest_points(sense, distance, count)
    columns = {name: column[chosen] for name, column in places.items()}
    columns |= {"sense": assignment[chosen], "rank": rank, "distance": distance[chosen]}
    return {f"exemplar_{name}": columns[name] for name in PLACE}


def nearest_points(sense: np.ndarray, distance: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices int64 [m] of the `count` points nearest to each sense, sorted by sense, and their ranks int32 [m].

    `sense` int [n] and `distance` float32 [n] are those of the points; ties go to the earlier point.
    """
    order = np.lexsort((distance, sense))
    rank = np.arange(len(order)) - np.searchsorted(sense[order], sense[order])
    chosen = rank < count
    return order[chosen], rank[chosen].astype(np.int32)


def sample(keys: np.ndarray, tokens: np.ndarray, max_occurrences: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the first `max_occurrences` points of every token by key (0 = all), ties in order of rows.

    Args:
        keys: [n] of the rows.
        tokens: integers [n].
        max_occurrences: limit per token.

    Returns:
        The chosen rows, int64 [m], sorted by token and row; and the rank of each by key within its token, int64 [m].
    """
    by_key = np.lexsort((keys, tokens))  # stable: equal keys stay in corpus order
    starts = np.flatnonzero(np.r_[True, np.diff(tokens[by_key]) != 0]) if len(by_key) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(by_key)) - np.repeat(starts, np.diff(np.r_[starts, len(by_key)]))
    if max_occurrences:
        by_key, rank = by_key[rank < max_occurrences], rank[rank < max_occurrences]
    corpus_order = np.lexsort((by_key, tokens[by_key]))
    return by_key[corpus_order], rank[corpus_order]
