"""Labels that say which channel of a layer scales each element of a tensor, and what operations do to them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

UNSCALED = -1  # the label of an element that no channel of the source scales

_aten = torch.ops.aten
# The same elements in another order or number; the same operation is done to the labels.
_MOVES = {
    _aten.transpose, _aten.permute, _aten.t, _aten.expand, _aten.squeeze, _aten.unsqueeze, _aten.slice, _aten.select,
    _aten.split, _aten.split_with_sizes, _aten.unbind, _aten.cat, _aten.stack, _aten.repeat, _aten.roll, _aten.flip,
}  # fmt: skip
# f(x / s) = f(x) / s for positive s, element by element and in the same order.
_IN_PLACE = {_aten.relu_, _aten.leaky_relu_}
_SAME = _IN_PLACE | {
    _aten.view, _aten.reshape, _aten._unsafe_view, _aten._reshape_alias, _aten.clone, _aten.alias, _aten.detach,
    _aten._to_copy, _aten.relu, _aten.leaky_relu, _aten.neg,
}  # fmt: skip
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_fused_attention_overrideable,
}  # fmt: skip
# These look at shape, dtype and device only.
_SHAPE_ONLY = {
    _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_empty, _aten.new_zeros,
    _aten.new_ones, _aten.new_full,
}  # fmt: skip


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments, however nested."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Channels:
    """Which channel of which source scales the elements of each tensor, were that channel divided by a scale.

    A tensor's labels are a dict of int32 tensors of its shape, by source. They go when their tensor goes: a reused
    address is no danger, and memory is freed as the model frees it.

    Attributes:
        lost (`dict[str, torch.Tensor]`): for each source, whether something reads a channel in a way that a scale
            would change: bool, (channels + 1,), the last for [`UNSCALED`].
    """

    def __init__(self) -> None:
        self.labels = WeakTensorKeyDictionary()
        self.lost: dict[str, Tensor] = {}

    def start(self, source: str, output: Tensor) -> None:
        """Label a source's output (..., channels)."""
        channels = output.shape[-1]
        self.lost[source] = torch.zeros(channels + 1, dtype=torch.bool, device=output.device)
        each = torch.arange(channels, dtype=torch.int32, device=output.device)
        self.labels[output] = {source: each.expand(output.shape)}

    def of(self, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor's labels by source."""
        return self.labels.get(tensor, {})

    def lose(self, tensor: Tensor) -> None:
        """Note that a tensor is read in a way that a scale would change."""
        for source, labels in self.of(tensor).items():
            self.lose_channels(source, labels)

    def lose_channels(self, source: str, labels: Tensor) -> None:
        """The same of some channels of one source."""
        self.lost[source][labels.to(self.lost[source].device)] = True

    def follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Give the output of an operation its labels, or note the channels that it reads in another way."""
        tensors = tensors_in((args, kwargs))
        if not any(tensor in self.labels for tensor in tensors):
            return
        packet = func.overloadpacket
        if packet in _SHAPE_ONLY:
            return
        if func._schema.is_mutable and packet not in _IN_PLACE:
            for tensor in tensors:
                self.lose(tensor)
        elif packet in _MOVES:
            for source in {source for tensor in tensors for source in self.of(tensor)}:
                swap = tree_map_only(Tensor, partial(self._or_unscaled, source=source), (args, kwargs))
                for tensor, labels in zip(tree_leaves(output), tree_leaves(func(*swap[0], **swap[1])), strict=True):
                    self._mark(tensor, source, labels)
        elif packet in _SAME and func is not _aten.view.dtype and output.is_floating_point():
            for source, labels in self.of(args[0]).items():
                self._mark(output, source, labels.reshape(output.shape).to(output.device))
        elif packet in (_aten.mul, _aten.div) and not kwargs:
            self._scaled(packet, args, output)
        elif packet in (_aten.bmm, _aten.mm):
            self._product(args[0], args[1], output)
        elif packet in _ATTENTION:
            self._attention(args, tensors, output[0])
        else:
            for tensor in tensors:
                self.lose(tensor)

    def _scaled(self, packet: Any, args: Any, output: Tensor) -> None:
        """`x * y` or `x / y`, element by element."""
        left, right = (self.of(arg) if isinstance(arg, Tensor) else {} for arg in args[:2])
        for source in [*left, *(source for source in right if source not in left)]:
            if source in right and (source in left or packet is _aten.div):
                for labels in (side[source] for side in (left, right) if source in side):
                    self.lose_channels(source, labels)
            else:
                self._mark(output, source, (left if source in left else right)[source].expand(output.shape))

    def _product(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        """`x @ y`: a scale goes through if all elements that are summed up share it."""
        for tensor, other, dim in ((left, right, -1), (right, left, -2)):
            for source, labels in self.of(tensor).items():
                one = labels.narrow(dim, 0, min(1, labels.shape[dim]))
                if source in self.of(other) or not _repeats(labels, one):
                    self.lose_channels(source, labels)
                else:
                    self._mark(output, source, one.expand(output.shape))

    def _attention(self, args: Any, tensors: list[Tensor], output: Tensor) -> None:
        """softmax(query key^T) value, each (batch, heads, length, size): a scale of the values goes through."""
        query, value = args[0], args[2]
        for tensor in tensors:
            if tensor is not value:
                self.lose(tensor)
        for source, labels in self.of(value).items():
            one = labels[..., :1, :]
            if value is query or value is args[1] or not _repeats(labels, one):
                self.lose_channels(source, labels)
            else:  # several query heads may share one value head
                shared = one.repeat_interleave(query.shape[-3] // labels.shape[-3], -3)
                self._mark(output, source, shared.expand(output.shape))

    def _mark(self, tensor: Tensor, source: str, labels: Tensor) -> None:
        if bool((labels != UNSCALED).any()):
            self.labels[tensor] = {**self.of(tensor), source: labels}

    def _or_unscaled(self, tensor: Tensor, source: str) -> Tensor:
        unscaled = torch.full((), UNSCALED, dtype=torch.int32, device=tensor.device)
        return self.of(tensor).get(source, unscaled.expand(tensor.shape))


def _repeats(labels: Tensor, one: Tensor) -> bool:
    return labels.numel() > 0 and torch.equal(labels, one.expand_as(labels))
