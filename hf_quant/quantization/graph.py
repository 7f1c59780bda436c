"""Where a scale per channel can move from one layer into the next: found by watching a forward, not from a list."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from .channels import UNSCALED, Channels, tensors_in


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
    elif is_dataclass(output) and not isinstance(output, Cache):
        yield from tensors_of(vars(output))


class _Trace(TorchDispatchMode):
    """Watches norms and Linear-like modules by hooks, and the operations between them."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        super().__init__()
        self.modules = {
            name: module for name, module in model.named_modules() if is_linear(module) or _is_norm(module)
        }
        self.selected = {name for name in names if name in self.modules and is_linear(self.modules[name])}
        self.owners: dict[int, list[str]] = defaultdict(list)
        holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.broken: set[str] = set()  # their own weights may not change
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self.owners[id(parameter)].append(name)
                if holders[id(parameter)] > 1:
                    self.broken.add(name)
        self.runs: Counter[str] = Counter()
        self.inside = False
        self.channels = Channels()
        self.offsets: dict[str, int] = {}
        self.uses: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def groups(self) -> list[ScalingGroup]:
        """What was found, after the run."""
        broken = self.broken | {name for name, count in self.runs.items() if count > 1}
        found: list[ScalingGroup] = []
        taken: set[str] = set()
        for source, lost in self.channels.lost.items():
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
            tensors = tensors_in((args, kwargs))
            for tensor in tensors:
                if name not in self.selected or len(tensors) > 1 or self.runs[name] > 0:
                    self.channels.lose(tensor)
                    continue
                for source, labels in self.channels.of(tensor).items():
                    rows = labels.reshape(-1, labels.shape[-1])
                    if rows.shape[0] > 0 and torch.equal(rows, rows[:1].expand_as(rows)):
                        self.uses[source][name] = rows[0].to(self.channels.lost[source].device)
                    else:
                        self.channels.lose_channels(source, labels)

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """A hook for the module of that name: labels its output if its channels can be scaled."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            try:
                self.runs[name] += 1
                fits = isinstance(output, Tensor) and output.ndim > 0 and output.shape[-1] == channels_of(module)
                if self.runs[name] > 1 or not fits:
                    return
                if not is_linear(module):
                    offset = _offset(module, args, kwargs, output)
                    if offset is None:
                        return
                    self.offsets[name] = offset
                self.channels.start(name, output)
            finally:
                self.inside = False

        return hook

    def returned(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook for models: what they return is read by others."""
        for tensor in tensors_of(output):
            self.channels.lose(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self.inside:
            for tensor in tensors_in((args, kwargs)):
                self.broken.update(self.owners.get(id(tensor), ()))
            self.channels.follow(func, args, kwargs, output)
        return output


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
    bias = own.get("bias")
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        return module.forward(*args, **kwargs)
    finally:
        module._parameters.update(own)


def _close(values: Tensor, expected: Tensor) -> bool:
    """Equal up to half precision's rounding, and not both zero, which would prove nothing."""
    size = torch.linalg.vector_norm(expected)
    return bool((size > 0) & (torch.linalg.vector_norm(values - expected) <= 0.02 * size))
