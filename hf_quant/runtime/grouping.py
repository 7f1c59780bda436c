"""Which rows of a batch run together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def split_batch(lengths: Sequence[int], overhead: int, most: int | None = None) -> list[list[int]]:
    """The rows of a batch in the groups that cost least, each padded to its longest row.

    A group costs `overhead + rows * longest` tokens. No other grouping costs less. Groups of more than
    `most` tokens are then cut into equal ones.

    Args:
        lengths (sequence of `int`): tokens of each row, at least 0.
        overhead (`int`): what one more forward costs, in tokens, at least 0.
        most (`int`, *optional*): tokens that a forward of several rows may have, padding included; at least 1.

    Returns:
        `list[list[int]]`: the numbers of the rows in each group, each row once; groups by length, shortest first.

    Raises:
        `ValueError`: if `overhead` or a length is negative, or `most` is less than 1.
    """
    if overhead < 0:
        raise ValueError(f"overhead is {overhead}, but a forward costs at least 0 tokens. Give 0 or more.")
    if most is not None and most < 1:
        raise ValueError(f"most is {most}, but a forward has at least 1 token. Give 1 or more, or None.")
    if min(lengths, default=0) < 0:
        raise ValueError(f"a row has {min(lengths)} tokens. Lengths are 0 or more.")
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # Rows of one length stay together: taking some of them into a group of longer rows never helps.
    distinct, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    cost = np.zeros(len(ends), dtype=np.int64)  # of the rows before each end
    start = np.zeros(len(ends), dtype=np.int64)  # of the last group among them
    for last, longest in enumerate(distinct, start=1):
        costs = cost[:last] + overhead + (ends[last] - ends[:last]) * longest
        start[last] = costs.argmin()
        cost[last] = costs[start[last]]
    groups = []
    last = len(distinct)
    while last:
        groups += _pieces(order[ends[start[last]] : ends[last]], int(distinct[last - 1]), most)
        last = int(start[last])
    return groups[::-1]


def _pieces(group: list[int], longest: int, most: int | None) -> list[list[int]]:
    """A group in as few equal pieces as keep to `most` tokens, or of one row each."""
    rows = len(group) if most is None or not longest else max(1, most // longest)
    count = -(-len(group) // rows)
    cuts = [len(group) * piece // count for piece in range(count + 1)]
    return [group[low:high] for low, high in itertools.pairwise(cuts)]
