"""Twins: nodes of a graph with the same edges, such as equal points. Walkers go to them alike.

In exact numbers that stays so for ever. In floating point a difference in rounding grows by the power of `inflation` in a
round, until one of them takes all: from float64 too late to be seen before convergence, from float32 soon. So where a
flow goes on in float64, its twins are made equal again.
"""

import numpy as np
import torch
from numpy.typing import NDArray

TOLERANCE = 1e-12  # relative, of sums of weights in float64, and absolute, of a walker's chances to take an edge


def find_twins(chances: torch.Tensor, sums: torch.Tensor) -> list[NDArray[np.int64]] | None:
    """Find sets of twins.

    Args:
        chances: float64 [n, n], from rows to columns.
        sums: float64 [n], of the weights that chances were made of.

    Returns:
        Each set's nodes; None if nodes whose weights have the same sum are no twins, though they may tie as well.
    """
    ordered, order = sums.sort()
    apart = (ordered.diff() >= TOLERANCE * ordered[:-1]).cpu().numpy()
    sets = [some for some in np.split(order.cpu().numpy(), np.flatnonzero(apart) + 1) if len(some) > 1]
    return sets if all(_are_twins(chances, torch.from_numpy(some).to(chances.device)) for some in sets) else None


def _are_twins(chances: torch.Tensor, some: torch.Tensor) -> bool:
    """Whether some nodes, int64 [m], have the same edges to and from all others, the same loops and edges among them."""

    def alike(x: torch.Tensor) -> bool:
        return not x.numel() or float((x - x[:1]).abs().amax()) <= TOLERANCE

    others = torch.ones(len(chances), dtype=torch.bool, device=chances.device).index_fill_(0, some, False)
    among = chances[some][:, some]
    loops = torch.eye(len(some), dtype=torch.bool, device=chances.device)
    return (
        alike(chances[some][:, others])
        and alike(chances[others][:, some].T)
        and alike(among[loops])
        and alike(among[~loops])
    )


def make_equal(values: torch.Tensor, live: NDArray[np.int64], twins: list[NDArray[np.int64]]) -> None:
    """Give twins the flow of their first, in place, unless only some of them are live.

    Args:
        values: [n, L], see `Flow`.
        live: int64 [L], each column's row; what comes again is padding.
        twins: each set's rows.
    """
    column_of = {row: column for column, row in reversed(list(enumerate(live.tolist())))}
    for rows in twins:
        columns = [column_of[row] for row in rows.tolist() if row in column_of]
        if len(rows) < 2 or 0 < len(columns) < len(rows):
            continue
        values[rows] = values[rows[0]].clone()
        if columns:
            loop, edge = values[rows[0], columns[:2]].tolist()
            values[:, columns] = values[:, columns[:1]].clone()
            values[np.ix_(rows, columns)] = edge
            values[rows, columns] = loop
