"""Many sequences as one forest, so that nothing is computed twice and no padding is computed at all.

Completions of one group share their prompt, and often their first sampled tokens too. A causal model gives equal prefixes equal
hidden states, so a prefix needs computing once. The nodes of the forest are the distinct (prefix, token) pairs of a batch; linear
layers, norms and the head run over nodes; only attention sees rows, and only one row per leaf of the forest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each token of each sequence lives in the forest.

    Args:
        tokens: [N] token of each node.
        positions: [N] its position in its sequence.
        parent: [N] node of the token before it; −1 at a root.
        node: [B, L] node of each token of the batch; where a row has ended, its last node again.
        leaves: [leaves, L] the same for the rows that attention runs on: those that are no prefix of another row.
        place: [N] index into the flattened `leaves` at which the node stands.
        lengths: [B] tokens of each row.
    """

    tokens: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    parent: Int[Tensor, " N"]
    node: Int[Tensor, "B L"]
    leaves: Int[Tensor, "leaves L"]
    place: Int[Tensor, " N"]
    lengths: Int[Tensor, " B"]

    def __len__(self) -> int:
        return self.tokens.shape[0]


def pack(
    tokens: Int[Tensor, "B L"],
    lengths: Int[Tensor, " B"],
    share: bool = True,
    routing: Int[Tensor, "B L layers k"] | None = None,
) -> Packing:
    """The forest of a right-padded batch.

    Rows are sorted lexicographically; a row then shares with the row before it exactly their longest common prefix, and a column
    of equal prefixes is one contiguous run, whose first row owns the node.

    Args:
        tokens: anything beyond a row's length.
        lengths: ≥ 1.
        share: False keeps every row apart (needed where equal prefixes may differ in kept tokens).
        routing: experts to be replayed; tokens that go to different ones share nothing from there on. Rows stand in the same order
            as without, wherever equal prefixes have equal routing.
    """
    device, rows = tokens.device, tokens.shape[0]
    length = lengths.cpu().numpy()
    width = int(length.max())
    grid = np.arange(width) < length[:, None]
    table = np.where(grid, tokens[:, :width].cpu().numpy(), -1)
    key = table if routing is None else _told_apart(table, routing[:, :width].cpu().numpy())
    order = np.lexsort(key.T[::-1]) if share else np.arange(rows)
    table, key, inside = table[order], key[order], grid[order]
    shared = np.zeros(rows, dtype=np.int64)
    if share:
        same = (key[1:] == key[:-1]) & inside[1:]
        shared[1:] = np.where(same.all(1), width, same.argmin(1))
    fresh = (np.arange(width) >= shared[:, None]) & inside
    number = np.cumsum(fresh.ravel()).reshape(rows, width) - 1
    owner = np.maximum.accumulate(np.where(fresh, np.arange(rows)[:, None], 0), axis=0)
    node = number[owner, np.arange(width)]
    last = node[np.arange(rows), length[order] - 1]
    node = np.where(inside, node, last[:, None])

    is_leaf = np.ones(rows, dtype=bool)
    is_leaf[:-1] = shared[1:] < length[order][:-1]
    leaf_node, leaf_inside = node[is_leaf], inside[is_leaf]
    place = np.empty(int(fresh.sum()), dtype=np.int64)
    flat = np.flatnonzero(leaf_inside)
    place[leaf_node.ravel()[flat][::-1]] = flat[::-1]
    owner_row, column = np.nonzero(fresh)
    parent = np.where(column > 0, node[owner_row, column - 1], -1)
    back = np.empty(rows, dtype=np.int64)
    back[order] = np.arange(rows)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Packing(
        tokens=tensor(table[owner_row, column]),
        positions=tensor(column),
        parent=tensor(parent),
        node=tensor(node[back]),
        leaves=tensor(leaf_node),
        place=tensor(place),
        lengths=lengths,
    )


def _told_apart(table: np.ndarray, routing: np.ndarray) -> np.ndarray:
    """One number for each (token, routing) in place of the token, in the tokens' order; −1 past a row's end."""
    choices = np.ascontiguousarray(routing.reshape(table.size, -1))
    whole = choices.view(np.dtype((np.void, choices.dtype.itemsize * choices.shape[1])))[:, 0]
    kinds, number = np.unique(whole, return_inverse=True)
    return np.where(table < 0, -1, table * len(kinds) + number.reshape(table.shape))
