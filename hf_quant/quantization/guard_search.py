"""Which quantized layers to put back to float: what each of them costs, and the search for the fewest."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.base import QuantizedModule, quantized_modules
from ..targets import replace_modules
from .masks import batch_masks, tokens
from .sensitivity import first_output, output_sqnr, weight_sqnr

# Layers whose own effect on the metric is measured, each with one evaluation: the most sensitive ones.
PROBES = 8
# The search gives up quantizing kept layers again after so many failures in a row.
PATIENCE = 8

_MAX_BATCHES, _MAX_ROWS = 4, 32
_MAX_VALUES = 2**24  # of the outputs that are held for comparison


class Layers:
    """The quantized layers of a model, which can be put back to float and quantized again.

    Modules that share one weight are one layer: either all of them are in float or none is.

    Args:
        model (`torch.nn.Module`): with quantized modules; changed in place by `put`.
        donor (`torch.nn.Module`): has the float modules under the same names. While a search lasts they hang in both
            models, so that float weights are not held twice.
    """

    def __init__(self, model: nn.Module, donor: nn.Module) -> None:
        self.model = model
        self.quantized = quantized_modules(model)
        by_weight: dict[int, list[str]] = {}
        for name in self.quantized:
            by_weight.setdefault(id(donor.get_submodule(name).weight), []).append(name)
        self.names = [tuple(names) for names in by_weight.values()]
        self.all = frozenset(range(len(self.names)))
        memo: dict[int, Any] = {}
        self.floats = {
            name: _fitting(donor.get_submodule(name), module, memo) for name, module in self.quantized.items()
        }
        self.bytes_saved = [
            state_bytes(self.floats[name] for name in names) - state_bytes(self.quantized[name] for name in names)
            for names in self.names
        ]
        self._quantized_bytes = state_bytes([model])

    def put(self, in_float: Collection[int]) -> None:
        """Have these layers in float, and all others quantized."""
        wanted: dict[str, nn.Module] = {}
        for index, names in enumerate(self.names):
            wanted |= {name: self.floats[name] if index in in_float else self.quantized[name] for name in names}
        replace_modules(self.model, wanted)

    def keep(self, in_float: Iterable[int]) -> None:
        """Have these layers in float for good, on tensors of their own."""
        in_float = list(in_float)
        names = [name for index in in_float for name in self.names[index]]
        # In one copy: modules that share a weight go on sharing it.
        copies = copy.deepcopy([self.floats[name] for name in names])
        self.put(())
        for name, module in zip(names, copies, strict=True):
            self.floats[name] = module
        self.put(in_float)

    def count(self, in_float: Iterable[int]) -> int:
        """How many modules these layers are."""
        return sum(len(self.names[index]) for index in in_float)

    def size(self, in_float: Iterable[int]) -> int:
        """Bytes of the model's state with these layers in float."""
        return self._quantized_bytes + sum(self.bytes_saved[index] for index in in_float)


def _fitting(module: nn.Module, quantized: QuantizedModule, memo: dict[int, Any]) -> nn.Module:
    """The float module itself, or a copy on the device and in the dtype of the quantized one."""
    weight, scale = module.weight, quantized.weight_scale
    if weight.device == scale.device and weight.dtype == scale.dtype:
        return module
    return copy.deepcopy(module, memo).to(scale.device, scale.dtype)


def state_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the distinct tensors in the modules' states."""
    tensors = {
        id(value): value.nbytes
        for module in modules
        for value in module.state_dict(keep_vars=True).values()
        if isinstance(value, Tensor)
    }
    return sum(tensors.values())


@contextmanager
def record_batches(model: nn.Module, batches: list[dict[str, Any]]) -> Iterator[None]:
    """Keep the first few calls of a model as keyword arguments of its `forward`: up to 4, and to 32 rows.

    Calls that go on from a cache or from an encoder's outputs are passed over: they cannot be repeated, or would
    leave out a part of the model.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    rows = 0

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        call = {**dict(zip(parameters, args, strict=False)), **kwargs}
        call = {name: value for name, value in call.items() if not _is_empty_cache(value)}
        tensors = [value for value in call.values() if isinstance(value, Tensor) and value.ndim > 0]
        plain = all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in call.values())
        if plain and tensors and len(batches) < _MAX_BATCHES and (not batches or rows + len(tensors[0]) <= _MAX_ROWS):
            batches.append(call)
            rows += len(tensors[0])

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _is_empty_cache(value: Any) -> bool:
    # What `generate` passes to its first call, which can be repeated without it.
    return hasattr(value, "get_seq_length") and int(value.get_seq_length()) == 0


@torch.no_grad()
def layer_sensitivity(
    layers: Layers,
    batches: Sequence[Mapping[str, Any]],
    progress: Callable[[], None] | None = None,
) -> list[float]:
    """SQNR of the model's output when one layer alone is quantized, for each layer, in decibels.

    One layer at a time, as in Wu et al. (2020), "Integer quantization for deep learning inference", section 5.1. The
    dual, one layer alone in float, would have to find a layer's share as the small difference of two large errors.
    Output positions that are padding are not counted. Without batches, the SQNR of the layer's weight.

    Args:
        layers ([`Layers`]): of the quantized model, in eval mode; left fully quantized.
        batches (list of `dict`): keyword arguments of `forward`.
        progress (callable, *optional*): called once for each layer.
    """
    result: list[float] = []
    reference: Tensor | None = None
    if batches:
        layers.put(layers.all)
        reference = _outputs(layers.model, batches)
    for index, names in enumerate(layers.names):
        if reference is None:
            result.append(min(own_weight_sqnr(layers.floats[name], layers.quantized[name]) for name in names))
        else:
            layers.put(layers.all - {index})
            result.append(output_sqnr(reference, _outputs(layers.model, batches)))
        if progress is not None:
            progress()
    layers.put(())
    return result


def _outputs(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """The model's outputs without padding, thinned out where they are large, as one vector on the CPU."""
    device = next((value.device for value in model.state_dict().values()), None)
    rows: list[Tensor] = []
    for batch in batches:
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        output = tokens(torch.atleast_1d(first_output(model, batch)), batch_masks(batch))
        rows.append(output[:: 1 + len(batches) * output.numel() // _MAX_VALUES].flatten().cpu())
    return torch.cat(rows)


def own_weight_sqnr(module: nn.Module, quantized: QuantizedModule) -> float:
    """SQNR of a quantized module's weight against the float module's, in decibels."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    integers, scale = quantized.integers.to(weight.device), quantized.weight_scale.to(weight.device)
    return weight_sqnr(weight.t() if quantized.transposed else weight, integers, scale)


class Search:
    """Looks for the fewest layers in float, and evaluates no model twice.

    Args:
        layers ([`Layers`]): of the quantized model.
        evaluate (callable): gives the metric of the layers' model as it is.
        good_enough (callable): whether a value of the metric meets the target.
        progress (callable, *optional*): called once for each evaluation.
    """

    def __init__(
        self,
        layers: Layers,
        evaluate: Callable[[], float],
        good_enough: Callable[[float], bool],
        progress: Callable[[], None] | None = None,
    ) -> None:
        self.layers = layers
        self.evaluate = evaluate
        self.good_enough = good_enough
        self.progress = progress
        self.values: dict[frozenset[int], float] = {}

    def value(self, in_float: Iterable[int]) -> float:
        """The metric with these layers in float."""
        key = frozenset(in_float)
        if key not in self.values:
            self.layers.put(key)
            self.values[key] = self.evaluate()
            if self.progress is not None:
                self.progress()
        return self.values[key]

    def meets(self, in_float: Iterable[int]) -> bool:
        """Whether the target is met with these layers in float."""
        return self.good_enough(self.value(in_float))

    def alone(self, index: int) -> float:
        """The metric when this layer alone is quantized."""
        return self.value(self.layers.all - {index})

    def fewest(self, order: Sequence[int], max_modules: int | None) -> list[int] | None:
        """The fewest layers in float that meet the target, in `order`; `None` if none are found.

        Looks for the shortest beginning of `order`, then quantizes each of its layers again that the target allows.
        Without `max_modules` something is found wherever it exists, if more layers in float never make the metric
        worse: should the order be so wrong that its beginnings fail, layers are tried alone.

        Args:
            order (list of `int`): every layer, the most sensitive first.
            max_modules (`int`, *optional*): how many modules may be in float.
        """
        limit = len(order) - 1
        if max_modules is not None:
            order = [index for index in order if self.layers.count([index]) <= max_modules]
            fitting = (count for count in range(len(order), 0, -1) if self.layers.count(order[:count]) <= max_modules)
            limit = min(limit, next(fitting, 0))
        count = self._shortest_beginning(order, limit)
        if count is None and max_modules is None:
            last = next((index for index in reversed(order) if self.meets(self.layers.all - {index})), None)
            if last is not None:
                order = [index for index in order if index != last] + [last]
                count = self._shortest_beginning(order, limit)
        return None if count is None else self._quantize_again(list(order[:count]))

    def _shortest_beginning(self, order: Sequence[int], limit: int) -> int | None:
        """How many layers of `order`, at most `limit`: 1, 2, 4, 8 ... until the target is met, then bisection."""
        if limit < 1:
            return None
        low, high = 0, 1
        while not self.meets(order[:high]):
            if high == limit:
                return None
            low, high = high, min(2 * high, limit)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.meets(order[:middle]) else (middle, high)
        return high

    def _quantize_again(self, kept: list[int]) -> list[int]:
        """What is left when each layer, the least sensitive first, is quantized again where the target allows it."""
        failures = 0
        for index in reversed(kept):
            without = [other for other in kept if other != index]
            if self.meets(without):
                kept, failures = without, 0
            else:
                failures += 1
                if failures == PATIENCE:
                    break
        return kept
