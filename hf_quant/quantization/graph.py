"""Where a scale per channel can move from one layer into the next: found by watching a forward, not from a list."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

UNSCALED = -1  # the label of an element that no channel of the source scales

_aten = torch.ops.aten
# The same elements in another order or number; the same operation is done to the labels.
_MOVES = {
    _aten.transpose, _aten.permute, _aten.t, _aten.expand, _aten.squeeze, _aten.unsqueeze, _aten.slice, _aten.select,
    _aten.split, _aten.split_with_sizes, _aten.unbind, _aten.cat, _aten.stack, _aten.repeat, _aten.roll, _aten.flip,
    _aten.index_select,
}  # fmt: skip
_RESHAPES = {_aten.view, _aten.reshape, _aten._unsafe_view, _aten._reshape_alias}
# f(x / s) = f(x) / s for positive s, element by element.
_HOMOGENEOUS = {
    _aten.clone, _aten.alias, _aten.detach, _aten._to_copy, _aten.relu, _aten.relu_, _aten.leaky_relu,
    _aten.leaky_relu_, _aten.neg,
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


@dataclass(frozen=True)
class ScalingGroup:
    """A layer whose output channels may be divided by any positive scales if its consumers' columns are multiplied.

    Args:
        source (`str`): qualified name of the norm or the Linear-like module.
        kind (`str`): `"norm"` or `"linear"`.
        consumers (`tuple[str, ...]`): the Linear-like modules that read the output, and nothing else does.
        columns (`tuple[tuple[int, ...], ...]`): for each consumer and each of its input features the channel of the
            source that scales it, or [`UNSCALED`]. Channels that no consumer names must keep their scale: something
            else reads them (the query and key of a fused projection). With grouped-query attention a channel of the
            value projection is named once for each query head.
        offset (`int`, *optional*, defaults to 0): for norms, whether the output is proportional to `weight` (0) or
            to `1 + weight` (1: Gemma).
    """

    source: str
    kind: Literal["norm", "linear"]
    consumers: tuple[str, ...]
    columns: tuple[tuple[int, ...], ...] = field(repr=False)
    offset: int = 0


def find_scaling_groups(model: nn.Module, batch: Mapping[str, Any], names: Collection[str]) -> list[ScalingGroup]:
    """Find the layers whose output is read by selected Linear-like modules only, from one run of the model.

    Every element of a norm's or Linear's output is labelled with its channel, and the labels follow it through all
    operations that a scale per channel commutes with: views, copies, concatenation, ReLU, products with other
    tensors, attention on the side of the values, products of matrices whose summed elements share a label. A channel
    that is read in any other way (a residual sum, an activation function, another norm, query or key, the model's
    output) is no part of a group. Left out too: modules that run more than once, share a weight, or whose weight is
    read without calling them. What a `PreTrainedModel` inside the model returns counts as output: others call it.

    Args:
        model (`torch.nn.Module`): the float model; it runs once, in eval mode, without gradients, and is not changed.
        batch (mapping): keyword arguments of its forward; a few rows are enough. Branches that the forward does not
            take with them are not seen.
        names (collection of `str`): the modules whose columns may be scaled; those that are no plain `nn.Linear` or
            transformers `Conv1D` are passed over.

    Returns:
        `list[ScalingGroup]`: in the order in which the sources run; no module is a consumer in two groups.
    """
    trace = _Trace(model, names)
    handles = [
        handle
        for name, module in trace.modules.items()
        for handle in (
            module.register_forward_pre_hook(trace.before(name), with_kwargs=True),
            module.register_forward_hook(trace.after(name), with_kwargs=True),
        )
    ]
    handles += [
        module.register_forward_hook(trace.returned)
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module is not model
    ]
    try:
        with evaluating(model), trace:
            trace.returned(model, (), model(**batch))
    finally:
        for handle in handles:
            handle.remove()
    return trace.groups()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain `nn.Linear` or transformers `Conv1D`, no subclass of them."""
    return type(module) in (nn.Linear, Conv1D)


def channels_of(module: nn.Module) -> int:
    """How many output channels a norm or a Linear-like module has."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[-1 if isinstance(module, Conv1D) else 0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns, without its cache: only the model itself reads keys and values from it."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)
    elif hasattr(output, "__dict__") and not isinstance(output, Cache):
        yield from tensors_of(vars(output))


class _Trace(TorchDispatchMode):
    """Follows each source's channels through the operations between modules.

    A tensor's labels are a dict of integer tensors of its shape, by source: the channel that scales each element.
    Labels go when their tensor goes, so a reused address is no danger and memory is freed as the model frees it.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        super().__init__()
        self.modules = {
            name: module for name, module in model.named_modules() if is_linear(module) or _is_norm(module)
        }
        self.selected = {name for name in names if name in self.modules and is_linear(self.modules[name])}
        self.owners: dict[int, list[str]] = defaultdict(list)
        self.holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.broken: set[str] = set()  # their own weights may not change
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self.owners[id(parameter)].append(name)
                if self.holders[id(parameter)] > 1:
                    self.broken.add(name)
        self.runs: Counter[str] = Counter()
        self.inside = False
        self.labels = WeakTensorKeyDictionary()
        self.lost: dict[str, Tensor] = {}  # by source, for each channel and, last, for UNSCALED
        self.offsets: dict[str, int] = {}
        self.uses: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def groups(self) -> list[ScalingGroup]:
        """What was found, after the run."""
        broken = self.broken | {name for name, count in self.runs.items() if count > 1}
        found: list[ScalingGroup] = []
        taken: set[str] = set()
        for source, lost in self.lost.items():
            for consumer, columns in self.uses[source].items():
                if consumer in broken:
                    lost[columns] = True
            lost[UNSCALED] = True
            kept = {
                consumer: torch.where(lost[columns], UNSCALED, columns)
                for consumer, columns in self.uses[source].items()
                if not bool(lost[columns].all())
            }
            if not kept or source in broken or taken & set(kept):
                continue
            taken |= set(kept)
            found.append(
                ScalingGroup(
                    source,
                    "linear" if is_linear(self.modules[source]) else "norm",
                    tuple(kept),
                    tuple(tuple(columns.tolist()) for columns in kept.values()),
                    self.offsets.get(source, 0),
                )
            )
        return found

    def before(self, name: str) -> Callable[..., None]:
        """A pre-hook for the module of that name: notes what it reads, and hides its own operations."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.inside:
                return
            self.inside = True
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            for tensor in tensors:
                if name not in self.selected or len(tensors) > 1:
                    self.lose(tensor)
                    continue
                for source, labels in self.labels.get(tensor, {}).items():
                    rows = labels.reshape(-1, labels.shape[-1])
                    if rows.shape[0] > 0 and torch.equal(rows, rows[:1].expand_as(rows)):
                        self.uses[source][name] = rows[0]
                    else:
                        self._lose(source, labels)

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """A hook for the module of that name: labels its output if its channels can be scaled."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            try:
                self.runs[name] += 1
                channels = channels_of(module)
                fits = isinstance(output, Tensor) and output.ndim > 0 and output.shape[-1] == channels
                if self.runs[name] > 1 or not fits:
                    return
                if not is_linear(module):
                    offset = _offset(module, args, kwargs, output)
                    if offset is None:
                        return
                    self.offsets[name] = offset
                self.lost[name] = torch.zeros(channels + 1, dtype=torch.bool, device=output.device)
                each = torch.arange(channels, dtype=torch.int32, device=output.device)
                self.labels[output] = {name: each.expand(output.shape)}
            finally:
                self.inside = False

        return hook

    def returned(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook for models: what they return is read by others."""
        for tensor in tensors_of(output):
            self.lose(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self.inside:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            for tensor in tensors:
                self.broken.update(self.owners.get(id(tensor), ()))
            if any(tensor in self.labels for tensor in tensors):
                self._follow(func, args, kwargs, tensors, output)
        return output

    def lose(self, tensor: Tensor) -> None:
        """Note that a tensor is read in a way that a scale would change."""
        for source, labels in self.labels.get(tensor, {}).items():
            self._lose(source, labels)

    def _lose(self, source: str, labels: Tensor) -> None:
        self.lost[source][labels.to(self.lost[source].device)] = True

    def _mark(self, tensor: Tensor, source: str, labels: Tensor) -> None:
        if bool((labels != UNSCALED).any()):
            self.labels[tensor] = {**self.labels.get(tensor, {}), source: labels}

    def _labels_of(self, tensor: Tensor, source: str) -> Tensor:
        known = self.labels.get(tensor, {}).get(source)
        return (
            torch.full((), UNSCALED, dtype=torch.int32, device=tensor.device).expand(tensor.shape)
            if known is None
            else known
        )

    def _follow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], output: Any) -> None:
        packet = func.overloadpacket
        sources = {source for tensor in tensors for source in self.labels.get(tensor, {})}
        if packet in _SHAPE_ONLY:
            return
        if packet in _MOVES:
            for source in sources:
                swap = tree_map_only(Tensor, lambda tensor, of=source: self._labels_of(tensor, of), (args, kwargs))
                for tensor, labels in zip(tree_leaves(output), tree_leaves(func(*swap[0], **swap[1])), strict=True):
                    self._mark(tensor, source, labels)
        elif (packet in _RESHAPES and func is not _aten.view.dtype) or packet in _HOMOGENEOUS:
            for source, labels in self.labels[args[0]].items():
                self._mark(output, source, labels.reshape(output.shape).to(output.device))
        elif packet in (_aten.mul, _aten.div):
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
        left, right = (self.labels.get(arg, {}) if isinstance(arg, Tensor) else {} for arg in args[:2])
        for source in [*left, *(source for source in right if source not in left)]:
            if source in right and (source in left or packet is _aten.div):
                for labels in (side[source] for side in (left, right) if source in side):
                    self._lose(source, labels)
            else:
                self._mark(output, source, (left if source in left else right)[source].expand(output.shape))

    def _product(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        """`x @ y`: a scale goes through if all elements that are summed up share it."""
        for tensor, other, dim in ((left, right, -1), (right, left, -2)):
            for source, labels in self.labels.get(tensor, {}).items():
                one = labels.narrow(dim, 0, min(1, labels.shape[dim]))
                if source in self.labels.get(other, {}) or not _repeats(labels, one):
                    self._lose(source, labels)
                else:
                    self._mark(output, source, one.expand(output.shape))

    def _attention(self, args: Any, tensors: list[Tensor], output: Tensor) -> None:
        """softmax(query key^T) value, each (batch, heads, length, size): a scale of the values goes through."""
        query, value = args[0], args[2]
        for tensor in tensors:
            if tensor is not value:
                self.lose(tensor)
        for source, labels in self.labels.get(value, {}).items():
            one = labels[..., :1, :]
            if value is query or value is args[1] or not _repeats(labels, one):
                self._lose(source, labels)
            else:  # several query heads may share one value head
                shared = one.repeat_interleave(query.shape[-3] // labels.shape[-3], -3)
                self._mark(output, source, shared.expand(output.shape))


def _repeats(labels: Tensor, one: Tensor) -> bool:
    return labels.numel() > 0 and torch.equal(labels, one.expand_as(labels))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module may be a norm: [`_offset`] finds out."""
    parameters = module._parameters
    weight = parameters.get("weight")
    known = all(value is None or name in ("weight", "bias") for name, value in parameters.items())
    return known and weight is not None and weight.ndim == 1 and weight.numel() > 1 and not module._modules


def _offset(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> int | None:
    """Whether output channel j is proportional to `weight[j]` (0), to `1 + weight[j]` (1), or to neither (`None`).

    The module runs with two other weights and no bias, and its true output must follow from either.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias = module._parameters.get("bias")
    rising = torch.linspace(0.5, 1.5, weight.numel(), dtype=weight.dtype, device=weight.device)
    falling = rising.flip(0)
    first, second = (_run_with(module, other, args, kwargs).float() for other in (rising, falling))
    shift = 0.0 if bias is None else bias.float()
    for offset in (0, 1):
        normed = first / (rising.float() + offset)
        if _close(second, normed * (falling.float() + offset)) and _close(
            output.float(), normed * (weight.float() + offset) + shift
        ):
            return offset
    return None


def _run_with(module: nn.Module, weight: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The output with another weight and no bias; hooks do not run."""
    own = dict(module._parameters)
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if own.get("bias") is not None:
        module._parameters["bias"] = nn.Parameter(torch.zeros_like(own["bias"]), requires_grad=False)
    try:
        return module.forward(*args, **kwargs)
    finally:
        module._parameters.update(own)


def _close(values: Tensor, expected: Tensor) -> bool:
    """Equal up to half precision's rounding, and not both zero, which would prove nothing."""
    size = torch.linalg.vector_norm(expected)
    return bool((size > 0) & (torch.linalg.vector_norm(values - expected) <= 0.02 * size))
