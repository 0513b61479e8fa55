"""Split a flow that has fallen apart into connected components into several smaller flows."""

from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msense.clustering.mcl.flow import Flow, exact_if_small

_Component: TypeAlias = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # its block, rows and columns
SPLIT_WORK = 1 << 22  # multiplications per product below which a search for components does not pay off
LABEL_PASSES = 12  # after so many passes of label propagation a graph counts as connected
SPLIT_WIDTH = 16  # components of up to so many nodes share a flow; larger ones share it within a factor of 2


def split(flow: Flow) -> list[Flow]:
    """Split blocks into connected components where that may save work; flow never crosses between components."""
    values = flow.values
    if values.numel() * values.shape[2] <= SPLIT_WORK:
        return [flow]
    edges = values.sign().float()  # much faster than a comparison
    full = float(edges.mean())
    if full > flow.full / 2:  # two components of equal size halve it
        return [flow]
    labels, live = _components(edges, flow.live), flow.live.cpu().numpy()
    alive = (values.amax(1) > 0).cpu().numpy()
    by_size: dict[int, list[_Component]] = {}
    for block, label in enumerate(labels):
        real, columns = np.flatnonzero(flow.nodes[block] >= 0), np.flatnonzero(alive[block])
        for value in np.unique(label[real]):
            rows = real[label[real] == value]
            component = (block, rows, columns[label[live[block, columns]] == value])
            by_size.setdefault(max(len(rows), SPLIT_WIDTH).bit_length(), []).append(component)
    if sum(map(len, by_size.values())) <= len(values):
        return [replace(flow, full=full)]
    return [_cut(flow, live, components) for components in by_size.values()]


def _cut(flow: Flow, live: NDArray[np.int64], components: list[_Component]) -> Flow:
    """Return one flow whose blocks are the given components; `live` is `flow.live` in NumPy."""
    n, size = max(len(rows) for _, rows, _ in components), max(len(columns) for _, _, columns in components)
    values = flow.values.new_zeros(len(components), n, size)
    places, nodes = np.zeros((len(components), size), np.int64), np.full((len(components), n), -1)
    for at, (block, rows, columns) in enumerate(components):
        chosen = flow.values[block].index_select(0, torch.from_numpy(rows).to(values.device))
        chosen = chosen.index_select(1, torch.from_numpy(columns).to(values.device))
        values[at, : len(rows), : len(columns)] = chosen
        places[at, : len(columns)] = np.searchsorted(rows, live[block, columns])
        nodes[at, : len(rows)] = flow.nodes[block, rows]
    graph = flow.graph[[block for block, _, _ in components]]
    return exact_if_small(Flow(values, torch.from_numpy(places).to(values.device), nodes, graph, 1.0, flow.twins))


def _components(edges: torch.Tensor, live: torch.Tensor) -> NDArray[np.int64]:
    """Label the nodes of each block by component: int64 [B, n]; all 0 if LABEL_PASSES do not suffice.

    A node's label is the greatest node known to be in its component. Each pass propagates labels along incoming edges,
    along outgoing edges, and then from the node that a label names. Edges are 0 or 1, float32 [B, n, L]; labels in
    float32 are fast and exact.
    """
    labels = torch.arange(edges.shape[1], device=edges.device, dtype=torch.float32).repeat(len(edges), 1)
    for _ in range(LABEL_PASSES):
        incoming = torch.maximum((edges * labels[..., None]).amax(1), labels.gather(1, live))
        outgoing = torch.maximum((edges * incoming[:, None]).amax(2), labels)
        after = outgoing.scatter_reduce(1, live, incoming, "amax")
        after = after.gather(1, after.long())
        if torch.equal(after, labels):
            return labels.long().cpu().numpy()
        labels = after
    return np.zeros(labels.shape, np.int64)
