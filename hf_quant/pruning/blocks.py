"""Which channels of the layers before reach which input channels of a layer, asked by gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def find_blocks(
    inputs: Sequence[Tensor],
    makers: Mapping[str, Sequence[Tensor]],
    between: Mapping[str, Tensor],
    single: bool,
) -> dict[tuple[str, int], Tensor] | None:
    """The smallest equal blocks of a layer's input channels that do not mix, and the channels that each is made from.

    Args:
        inputs (sequence of `torch.Tensor`): what each run of the layer read, (..., channels), with the graph.
        makers (`dict`): by name, the leaves of that graph that are outputs of layers, (..., channels of the maker).
        between (`dict`): by name, Parameters that the graph uses, any shape.
        single (`bool`): whether blocks of a single channel are asked for, behind an activation function or a gate;
            otherwise, larger ones.

    Returns:
        `dict`: by name and dimension, int64 of (blocks, positions), ascending positions that belong to each block:
        -1 of each maker, and of `between` what belongs to one block only. `None` if there are no such blocks, or if
        a maker has channels that reach no block, several, or a block has more of them than another.
    """
    probe = _Probe(inputs)
    axes = {(name, -1): runs for name, runs in makers.items()}
    size = _block_size(probe, axes)
    if size is None or (size == 1) != single or (single and not _varies(probe, makers)):
        return None
    count = probe.channels // size
    for name, parameter in between.items():
        axes.update({(name, dim): [parameter] for dim in range(parameter.ndim) if parameter.shape[dim] >= count})
    numbers = torch.arange(probe.channels) // size
    index = _positions(probe, axes, numbers, count)
    return index if all((name, -1) in index for name in makers) else None


def rows_of(values: Tensor, dim: int = -1) -> Tensor:
    """(..., channels, ...) to (everything else, channels)."""
    moved = values.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1])


class _Probe:
    """Gradients of positive combinations of a layer's input channels."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.channels = inputs[0].shape[-1]
        drawn = torch.rand(self.channels, generator=torch.Generator().manual_seed(0)) + 0.5
        self.weights = drawn.to(inputs[0].device)

    def gradients(self, chosen: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """With respect to each leaf, of its shape; `chosen` is boolean, (channels,)."""
        weights = torch.where(chosen.to(self.weights.device), self.weights, 0.0)
        directions = [weights.to(values.dtype).expand_as(values) for values in self.inputs]
        found = torch.autograd.grad(self.inputs, leaves, directions, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]

    def reached(
        self, chosen: Tensor, axes: Mapping[tuple[str, int], Sequence[Tensor]]
    ) -> dict[tuple[str, int], Tensor]:
        """Which positions along each axis reach any of the chosen channels; boolean."""
        leaves = list({id(leaf): leaf for runs in axes.values() for leaf in runs}.values())
        grads = dict(zip(map(id, leaves), self.gradients(chosen, leaves), strict=True))
        return {
            (name, dim): torch.stack([rows_of(grads[id(leaf)], dim).ne(0).any(0) for leaf in runs]).any(0).cpu()
            for (name, dim), runs in axes.items()
        }


def _block_size(probe: _Probe, axes: Mapping[tuple[str, int], Sequence[Tensor]]) -> int | None:
    """The distance of the nearest channel that is made from nothing that channel 0 is made from."""
    numbers = torch.arange(probe.channels)
    first = probe.reached(numbers == 0, axes)
    if any(bool(pattern.all()) for pattern in first.values()):
        return None
    for size in range(1, probe.channels):
        if probe.channels % size == 0:
            other = probe.reached(numbers == size, axes)
            if not any(bool((first[axis] & other[axis]).any()) for axis in first):
                return size
    return None


def _positions(
    probe: _Probe, axes: Mapping[tuple[str, int], Sequence[Tensor]], numbers: Tensor, count: int
) -> dict[tuple[str, int], Tensor]:
    """The positions that reach each block, for the axes of which each position reaches exactly one.

    `numbers` is the block of each channel. For each bit of the number one gradient asks for the blocks whose bit is
    1, another for the rest: a position that reaches one block answers to exactly one of both, and so spells it.
    """
    owner: dict[tuple[str, int], Tensor] = {}
    exact: dict[tuple[str, int], Tensor] = {}
    for bit in range((count - 1).bit_length()):
        on = (numbers >> bit & 1).bool()
        ones, zeros = probe.reached(on, axes), probe.reached(~on, axes)
        for axis in axes:
            owner[axis] = owner.get(axis, 0) + (ones[axis].long() << bit)
            exact[axis] = exact.get(axis, True) & (ones[axis] ^ zeros[axis])
    found: dict[tuple[str, int], Tensor] = {}
    for axis, owners in owner.items():
        shares = torch.bincount(owners, minlength=count)
        if bool(exact[axis].all()) and len(shares) == count and bool((shares == shares[0]).all()):
            found[axis] = torch.argsort(owners, stable=True).reshape(count, -1)
    return found


def _varies(probe: _Probe, makers: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether an activation function or a gate lies between: a mere product of two matrices has no neurons."""
    leaves = [leaf for runs in makers.values() for leaf in runs]
    found = probe.gradients(torch.ones(probe.channels, dtype=torch.bool), leaves)
    # A single row (what a pooler reads) cannot tell, and counts as varying.
    return any(len(rows) == 1 or not torch.equal(rows, rows[:1].expand_as(rows)) for rows in map(rows_of, found))
