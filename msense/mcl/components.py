"""Cuts a flow that has fallen into connected components into several small ones.

In: a flow. Out: flows of its components, those of like size in one. Holds a copy of what is not zero.
"""

from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msense.mcl.flow import Flow, exact_if_small

_Part: TypeAlias = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # a component's block, rows and columns

SPLIT_WORK = 1 << 22  # a flow whose product takes fewer multiplications is not worth looking for components
LABEL_PASSES = 12  # most passes of labels over a graph in search of its components
SPLIT_WIDTH = 16  # components of up to so many nodes go on in one flow; above, a flow spans a factor of 2


def split(flow: Flow) -> list[Flow]:
    """Cut blocks into their connected components, where that may spare work: nothing ever flows between them."""
    values = flow.values
    if values.numel() * values.shape[2] <= SPLIT_WORK:
        return [flow]
    edges = values.sign().float()  # much faster than a comparison
    full = float(edges.mean())
    if full > flow.full / 2:  # two components of equal size halve it
        return [flow]
    labels, live = _components(edges, flow.live), flow.live.cpu().numpy()
    alive = (values.amax(1) > 0).cpu().numpy()
    parts: dict[int, list[_Part]] = {}
    for block, label in enumerate(labels):
        real = np.flatnonzero(flow.nodes[block] >= 0)
        some = np.flatnonzero(alive[block])
        for value in np.unique(label[real]):
            rows, columns = real[label[real] == value], some[label[live[block, some]] == value]
            if len(columns):  # else a node without edges, which is in no cluster
                parts.setdefault(max(len(rows), SPLIT_WIDTH).bit_length(), []).append((block, rows, columns))
    if sum(map(len, parts.values())) <= len(values):
        return [replace(flow, full=full)]
    return [_cut(flow, live, like) for like in parts.values()]


def _cut(flow: Flow, live: NDArray[np.int64], parts: list[_Part]) -> Flow:
    """The flow of components, given the block, rows and columns of each, and `flow.live` in NumPy."""
    n, size = max(len(rows) for _, rows, _ in parts), max(len(columns) for _, _, columns in parts)
    values = flow.values.new_zeros(len(parts), n, size)
    places, nodes = np.zeros((len(parts), size), np.int64), np.full((len(parts), n), -1)
    for at, (block, rows, columns) in enumerate(parts):
        chosen = flow.values[block].index_select(0, torch.from_numpy(rows).to(values.device))
        chosen = chosen.index_select(1, torch.from_numpy(columns).to(values.device))
        values[at, : len(rows), : len(columns)] = chosen
        places[at, : len(columns)] = np.searchsorted(rows, live[block, columns])
        nodes[at, : len(rows)] = flow.nodes[block, rows]
    graph = flow.graph[[block for block, _, _ in parts]]
    return exact_if_small(Flow(values, torch.from_numpy(places).to(values.device), nodes, graph, 1.0, flow.twins))


def _components(edges: torch.Tensor, live: torch.Tensor) -> NDArray[np.int64]:
    """Label the nodes of each block: int64 [B, n], equal labels inside a component; all 0 if that takes long.

    Labels are the greatest node heard of. In a pass a column asks its comers, a row the places it goes to, and then
    every node the one that its label names. Edges float32 [B, n, L], 0 or 1; float32 labels are fast and exact.
    """
    labels = torch.arange(edges.shape[1], device=edges.device, dtype=torch.float32).repeat(len(edges), 1)
    for _ in range(LABEL_PASSES):
        heard = torch.maximum((edges * labels[..., None]).amax(1), labels.gather(1, live))
        told = torch.maximum((edges * heard[:, None]).amax(2), labels).scatter_reduce(1, live, heard, "amax")
        told = told.gather(1, told.long())
        if torch.equal(told, labels):
            return labels.long().cpu().numpy()
        labels = told
    return np.zeros(labels.shape, np.int64)
