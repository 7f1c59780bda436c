"""From scores to masks: single weights, N:M, blocks, rows and columns; over all weights or within each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import did_you_mean

UNIT_KINDS = ("head", "neuron", "layer")
_PLAIN = {
    "unstructured": "single weights",
    "row": "output channels of a layer; tokens of an embedding",
    "column": "input channels of a layer",
    "head": "attention heads, with their query, key, value and output",
    "neuron": "feed-forward neurons, with up, gate and down",
    "layer": "whole layers",
    "2:4": "N:M: at most N weights of M consecutive inputs stay",
    "4x1": "RxC: blocks of R outputs by C inputs",
}


@dataclass(frozen=True)
class Structure:
    """What is pruned as one.

    Args:
        name (`str`): as a user writes it.
        kind (`str`): `"block"`, `"n_m"`, or one of `"head"`, `"neuron"`, `"layer"`.
        rows, columns (`int`, *optional*): size of a block, outputs by inputs; 0 stands for all of them.
        keep, of (`int`, *optional*): N and M of N:M.
    """

    name: str
    kind: str
    rows: int = 1
    columns: int = 1
    keep: int = 0
    of: int = 0

    @property
    def in_units(self) -> bool:
        """Whether parts of several layers hang together, so that they could be removed."""
        return self.kind in UNIT_KINDS

    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse a weight that the structure does not divide.

        Args:
            name (`str`): of the layer, for the message.
            shape (`torch.Size`): of its weight, (out, in).

        Raises:
            `ValueError`: naming the layer, its shape and what would fit.
        """
        out, inputs = shape
        if self.kind == "n_m" and inputs % self.of:
            raise ValueError(
                f"{name} has {inputs} inputs, which {self.name} does not divide: {inputs} is no multiple of "
                f"{self.of}. Put it into `ignore`, or use another structure."
            )
        rows, columns = self.block(shape)
        if out % rows or inputs % columns:
            raise ValueError(
                f"{name} has a weight of {out} x {inputs}, which blocks of {self.name} do not divide. Put it into "
                "`ignore`, or use another block."
            )

    def block(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns of one block in a weight of that shape."""
        return self.rows or shape[0], self.columns or shape[1]

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the structure itself fixes, if it does."""
        return 1 - self.keep / self.of if self.kind == "n_m" else None


def get_structure(name: str) -> Structure:
    """The structure with that name.

    Raises:
        `ValueError`: for an unknown name, saying which there are.
    """
    text = str(name)
    if text in UNIT_KINDS:
        return Structure(text, text)
    if text == "unstructured":
        return Structure(text, "block")
    if text in ("row", "column"):
        return Structure(text, "block", 0 if text == "column" else 1, 0 if text == "row" else 1)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        keep, of = int(match[1]), int(match[2])
        if not 0 < keep < of:
            raise ValueError(
                f"structure {name!r} must keep more than 0 and fewer than {of} weights of {of}, as 2:4 does"
            )
        return Structure(text, "n_m", keep=keep, of=of)
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        rows, columns = int(match[1]), int(match[2])
        if min(rows, columns) < 1:
            raise ValueError(f"a block of {name!r} holds no weight; write 1x4, 4x1, 16x1 ...")
        return Structure(text, "block", rows, columns)
    known = "; ".join(f"{key}: {what}" for key, what in _PLAIN.items())
    raise ValueError(f"unknown structure {name!r}{did_you_mean(text, _PLAIN) or '.'} There are {known}.")


def choose(
    scores: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    goals: Mapping[str, float],
    structure: Structure,
    scope: str,
) -> dict[str, Tensor]:
    """Choose what to prune: the blocks with the lowest scores, and all that is pruned already.

    Args:
        scores (`dict[str, torch.Tensor]`): float32 scores of every weight, (out, in), by layer.
        pruned (`dict[str, torch.Tensor]`): of the same shapes, boolean: what is pruned already and stays so.
        goals (`dict[str, float]`): the sparsity wanted of each layer, in [0, 1]. With scope `"global"`, layers with
            the same goal share it: some lose more, others less.
        structure ([`Structure`]): not one of units; see [`choose_units`].
        scope (`str`): `"global"` or `"layer"`.

    Returns:
        `dict[str, torch.Tensor]`: boolean, of the scores' shapes: what is pruned from now on. Each layer keeps one
        block at least.
    """
    units: dict[str, Tensor] = {}
    for name, score in scores.items():
        gone = blocks_of(pruned[name], structure)
        units[name] = torch.where(gone, -torch.inf, _pool(score, structure))
        if structure.kind == "n_m":
            units[name].masked_fill_(_survivors(units[name], structure), torch.inf)
    sets = _shared_goals(goals) if scope == "global" else [([name], goals[name]) for name in scores]
    chosen: dict[str, Tensor] = {}
    for names, goal in sets:
        sizes = [scores[name].numel() / units[name].numel() for name in names]
        weights = sum(scores[name].numel() for name in names)
        lost = lowest([units[name].flatten() for name in names], sizes, round(goal * weights))
        for name, mask in zip(names, lost, strict=True):
            gone = units[name].isneginf().logical_or_(mask.view(units[name].shape))
            chosen[name] = spread(gone, scores[name].shape, structure)
    return {name: chosen[name] for name in scores}


def choose_units(
    scores: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    goals: Mapping[str, float],
    scope: str,
) -> dict[str, Tensor]:
    """Choose the units to prune, the same way: scores, masks and result have shape (units,), by group.

    Units with the score infinity are never pruned.
    """
    masked = {name: torch.where(pruned[name], -torch.inf, score) for name, score in scores.items()}
    sets = _shared_goals(goals) if scope == "global" else [([name], goals[name]) for name in scores]
    chosen: dict[str, Tensor] = {}
    for names, goal in sets:
        groups = [masked[name] for name in names]
        lost = lowest(groups, [1] * len(groups), round(goal * sum(group.numel() for group in groups)))
        chosen.update((name, mask | masked[name].isneginf()) for name, mask in zip(names, lost, strict=True))
    return {name: chosen[name] for name in scores}


def lowest(groups: list[Tensor], sizes: list[float], count: int) -> list[Tensor]:
    """Mark the units with the lowest scores until `count` weights are marked; each group keeps its best unit.

    Args:
        groups (list of `torch.Tensor`): scores (units,), float32; minus infinity for what has to go.
        sizes (list of `float`): weights in a unit of each group.
        count (`int`): weights to mark. Where units do not sum up to it, the nearest number of them.

    Returns:
        list of `torch.Tensor`: boolean masks (units,), True for what is marked.
    """
    best = [int(group.argmax()) for group in groups]
    kept = [float(group[at]) for group, at in zip(groups, best, strict=True)]
    for group, at in zip(groups, best, strict=True):
        group[at] = torch.inf  # a layer that lost all its weights passes no signal: it could not be trained any more
    flat = torch.cat(groups) if len(groups) > 1 else groups[0]
    if len(set(sizes)) == 1:
        marked = _lowest_count(flat, min(round(count / sizes[0]), flat.numel()))
    else:
        each = torch.cat([torch.full((len(g),), size) for g, size in zip(groups, sizes, strict=True)]).to(flat.device)
        order = flat.argsort(stable=True)
        reached = each[order].double().cumsum(0)
        take = int((reached - each[order] / 2 < count).sum())
        marked = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        marked[order[:take]] = True
    marked &= ~torch.isposinf(flat)
    for group, at, score in zip(groups, best, kept, strict=True):
        group[at] = score
    return list(marked.split([len(group) for group in groups]))


def _lowest_count(flat: Tensor, count: int) -> Tensor:
    """Exactly `count` of the lowest; among equal ones, the first."""
    if count <= 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    alive = flat[flat.isneginf().logical_not_()]  # selecting is slow among many equal values, and these are known
    wanted = count - (len(flat) - len(alive))
    if wanted <= 0:
        threshold = -math.inf
    elif flat.device.type == "cpu":
        # Introselect: a tenth of the time of torch.kthvalue.
        threshold = float(np.partition(alive.numpy(), wanted - 1)[wanted - 1])
    else:
        threshold = float(alive.kthvalue(wanted).values)
    marked = flat <= threshold
    surplus = int(marked.sum()) - count
    if surplus > 0:
        equal = (flat == threshold).nonzero().flatten()
        marked[equal[len(equal) - surplus :]] = False
    return marked


def _survivors(scores: Tensor, structure: Structure) -> Tensor:
    """The N best of each M consecutive inputs, which N:M never prunes."""
    groups = scores.view(-1, structure.of)
    best = groups.topk(structure.keep, dim=1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, best, True).view(scores.shape)


def _pool(scores: Tensor, structure: Structure) -> Tensor:
    """The mean score of each block, so that blocks of different sizes compare."""
    rows, columns = structure.block(scores.shape)
    if rows == columns == 1:
        return scores.contiguous()
    out, inputs = scores.shape
    return scores.reshape(out // rows, rows, inputs // columns, columns).mean((1, 3))


def blocks_of(mask: Tensor, structure: Structure) -> Tensor:
    """A mask of weights (out, in) as one of blocks: True for those of which all weights are marked."""
    rows, columns = structure.block(mask.shape)
    if rows == columns == 1:
        return mask
    out, inputs = mask.shape
    return mask.reshape(out // rows, rows, inputs // columns, columns).all(3).all(1)


def spread(mask: Tensor, shape: torch.Size, structure: Structure) -> Tensor:
    """A mask of blocks as one of weights, of that shape."""
    rows, columns = structure.block(shape)
    if rows == columns == 1:
        return mask
    blocks = mask[:, None, :, None].expand(-1, rows, -1, columns)
    return blocks.reshape(shape)


def _shared_goals(goals: Mapping[str, float]) -> list[tuple[list[str], float]]:
    sets: dict[float, list[str]] = {}
    for name, goal in goals.items():
        sets.setdefault(goal, []).append(name)
    return [(names, goal) for goal, names in sets.items()]
