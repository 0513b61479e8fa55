"""Twins: nodes of a graph with the same edges, such as equal points, whose flows are equal in exact arithmetic.

In floating point, rounding differences grow by the power `inflation` in each round until one twin takes all the flow:
in float64 too slowly to matter before convergence, in float32 soon. So twins are made equal when a flow switches from
float32 to float64.
"""

import numpy as np
import torch
from numpy.typing import NDArray

TOLERANCE = 1e-12  # relative for sums of float64 weights, absolute for transition probabilities


def find_twins(chances: torch.Tensor, sums: torch.Tensor) -> list[NDArray[np.int64]] | None:
    """Return the nodes of each set of twins, or None if nodes have equal sums but are no twins: they may tie as well.

    `chances` float64 [n, n] are transition probabilities from rows to columns, normalised by `sums` float64 [n].
    """
    ordered, order = sums.sort()
    apart = (ordered.diff() >= TOLERANCE * ordered[:-1]).cpu().numpy()
    sets = [nodes for nodes in np.split(order.cpu().numpy(), np.flatnonzero(apart) + 1) if len(nodes) > 1]
    return sets if all(_are_twins(chances, torch.from_numpy(nodes).to(chances.device)) for nodes in sets) else None


def _are_twins(chances: torch.Tensor, nodes: torch.Tensor) -> bool:
    """Return whether nodes, int64 [m], have equal edges to and from all others, equal loops and edges between them."""

    def alike(x: torch.Tensor) -> bool:
        return not x.numel() or float((x - x[:1]).abs().amax()) <= TOLERANCE

    others = torch.ones(len(chances), dtype=torch.bool, device=chances.device).index_fill_(0, nodes, False)
    among = chances[nodes][:, nodes]
    loops = torch.eye(len(nodes), dtype=torch.bool, device=chances.device)
    to_others, from_others = chances[nodes][:, others], chances[others][:, nodes].T
    return all(map(alike, (to_others, from_others, among[loops], among[~loops])))


def equalize_twins(values: torch.Tensor, live: NDArray[np.int64], twins: list[NDArray[np.int64]]) -> None:
    """Give all twins of a set (given as rows) the flow of the first one, in place, unless only some of them are live.

    `values` [n, L] and `live` int64 [L] are as in `Flow`; repeated rows in `live` are padding.
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
