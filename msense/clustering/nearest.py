"""The points nearest to each centroid, which become the exemplars of its sense."""

from collections.abc import Sequence

import numpy as np

Places = dict[str, np.ndarray]
PLACE = ("token", "sense", "rank", "distance", "unit", "row", "position")


def merge_exemplars(several: Sequence[Places], count: int) -> Places:
    """Return the exemplars nearest to each sense; ties go to the earlier ones."""
    places = {f"exemplar_{name}": np.concatenate([p[f"exemplar_{name}"] for p in several]) for name in PLACE}
    chosen, rank = nearest_points(places["exemplar_sense"], places["exemplar_distance"], count)
    return {name: column[chosen] for name, column in places.items()} | {"exemplar_rank": rank}


def exemplar_places(
    found: tuple[np.ndarray, np.ndarray],
    senses: np.ndarray,
    points: np.ndarray,
    places: dict[str, np.ndarray],
    count: int,
) -> dict[str, np.ndarray]:
    """Find the points nearest to every sense.

    Args:
        found: sense of each point inside its token, int32 [n], and the squared distance to it, float32 [n].
        senses: int64 [T], senses of each token.
        points: int64 [T], points of each token, sum n.
        places: token, unit, row and position of each point.
        count: how many a sense.

    Returns:
        The columns of `exemplars.PLACE`, each named `exemplar_...`; distances stay squared.
    """
    assignment, distance = found
    sense = assignment + np.repeat(np.cumsum(senses) - senses, points)
    chosen, rank = nearest_points(sense, distance, count)
    columns = {name: column[chosen] for name, column in places.items()}
    columns |= {"sense": assignment[chosen], "rank": rank, "distance": distance[chosen]}
    return {f"exemplar_{name}": columns[name] for name in PLACE}


def nearest_points(sense: np.ndarray, distance: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices int64 [m] of the points nearest to each sense, sorted by sense, and their ranks int32 [m].

    Args:
        sense: int [n], sense of each point.
        distance: float32 [n], its distance.
        count: limit per sense; ties go to the earlier point.
    """
    order = np.lexsort((distance, sense))
    rank = np.arange(len(order)) - np.searchsorted(sense[order], sense[order])
    chosen = rank < count
    return order[chosen], rank[chosen].astype(np.int32)
