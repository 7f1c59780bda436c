"""Prepare a model for quantization-aware training: modules that compute as int8 will, on the same Parameters."""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..schemes import Scheme
from ..targets import Selection, replace_modules, require_finite
from .fake_quantize import fake_quantize, fake_quantize_symmetric, fake_quantize_tokens, fake_quantize_weight
from .int8_training import QuantizedInput, int8_linear, quantize_input, runs_in_int8, version_of
from .masks import batch_masks, mask_for
from .observers import MovingAverageMinMax, batch_range

_KEPT_INPUTS = 2  # batches kept for the parity check at convert


@dataclass(eq=False)
class QATState:
    """What all QAT modules of one model share.

    Plain Python flags, not buffers: the phase is a function of the training step, so nothing has to be saved,
    an inactive phase costs nothing, and a compiled model is recompiled only when the phase changes.

    Args:
        observing (`bool`): whether activation ranges follow the batches (in training mode only).
        fake_quantizing (`bool`): whether weights, embeddings and activations are fake-quantized.
        masks (list of `torch.Tensor`): the attention masks of the present batch, boolean, (batch, length).
        inputs (deque of `dict`): keyword arguments of the last forwards, for the parity check.
        handle (`RemovableHandle`, *optional*): takes off the hook that fills `masks` and `inputs`.
        last_range, last_input (*optional*): of the activation seen last, for layers that read the same one.
    """

    observing: bool = False
    fake_quantizing: bool = False
    masks: list[Tensor] = field(default_factory=list)
    inputs: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_KEPT_INPUTS))
    handle: RemovableHandle | None = None
    last_range: tuple[weakref.ref[Tensor], int | None, tuple[Tensor, Tensor]] | None = None
    last_input: QuantizedInput | None = None

    def range_of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The range of an activation without its padding; found once for query, key and value."""
        if torch.compiler.is_compiling():
            return batch_range(values, mask_for(values, self.masks))
        last, version = self.last_range, version_of(values)
        if last is None or last[0]() is not values or last[1] != version or version is None:
            found = batch_range(values, mask_for(values, self.masks))
            last = self.last_range = weakref.ref(values), version, found
        return last[2]


class ActivationFakeQuantize(nn.Module):
    """Fake-quant of an input with static per-tensor ranges."""

    def __init__(self, state: QATState, device: torch.device) -> None:
        super().__init__()
        self.state = state
        self.observer = MovingAverageMinMax(device=device)
        # Until there is a range: without one, all inputs would become 0.
        self.skip = True

    @property
    def observed(self) -> bool:
        """Whether there is a range at all."""
        return bool(self.observer.num_batches > 0)

    def observe(self, values: Tensor) -> None:
        """Let the range follow `values`, if this is the time for it."""
        if self.state.observing and self.training and values.numel() > 0 and not _recomputing():
            self.observer.update(*self.state.range_of(values))
            if self.skip:
                self.skip = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        batches = state_dict.get(prefix + "observer.num_batches")
        if batches is not None:
            self.skip = not bool(batches > 0)

    def forward(self, values: Tensor) -> Tensor:
        """`values` as int8 would see them; the same shape and dtype."""
        return values if self.skip else fake_quantize(values, *self.observer.qparams())


class QATLinear(nn.Linear):
    """`nn.Linear` that computes as int8 will; it shares the float module's Parameters."""

    state: QATState
    scheme: Scheme
    activation_fake_quant: ActivationFakeQuantize | None

    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in_features) to (..., out_features)."""
        return _linear(self, input, self.weight)


class QATConv1D(nn.Module):
    """Transformers' `Conv1D`, with its weight of (in, out), that computes as int8 will."""

    state: QATState
    scheme: Scheme
    activation_fake_quant: ActivationFakeQuantize | None
    nf: int
    nx: int
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., nx) to (..., nf)."""
        return _linear(self, x, self.weight.t())


def _linear(module: QATLinear | QATConv1D, values: Tensor, weight: Tensor) -> Tensor:
    fake_quant = module.activation_fake_quant
    if fake_quant is not None:
        fake_quant.observe(values)
    if not module.state.fake_quantizing or values.numel() == 0:
        return F.linear(values, weight, module.bias)
    unquantized = module.scheme.activations is None or (fake_quant is not None and fake_quant.skip)
    if not unquantized and not module.scheme.packed and runs_in_int8(values):
        qparams = None if fake_quant is None else fake_quant.observer.qparams()
        module.state.last_input = quantize_input(values, qparams, module.state.last_input, module.scheme.symmetric)
        return int8_linear(values, weight, module.bias, module.state.last_input)
    if fake_quant is not None:
        values = fake_quant(values)
    elif module.scheme.activations == "dynamic":
        values = fake_quantize_tokens(values, module.scheme.symmetric)
    return F.linear(values, fake_quantize_weight(weight, module.scheme), module.bias)


class QATEmbedding(nn.Embedding):
    """`nn.Embedding` whose looked-up rows are fake-quantized, one scale a row."""

    state: QATState
    scheme: Scheme

    def forward(self, input: Tensor) -> Tensor:
        """`input` (...) of indices to (..., embedding_dim)."""
        rows = super().forward(input)
        # A row's scale depends on that row alone, so only the rows in use have to be quantized.
        return fake_quantize_symmetric(rows, (-1,)) if self.state.fake_quantizing else rows


QAT_MODULES = (QATLinear, QATConv1D, QATEmbedding)


def prepare(model: nn.Module, scheme: Scheme, selection: Selection) -> QATState:
    """Swap the selected modules for QAT modules that hold the very same `nn.Parameter` objects.

    Names of parameters do not change, so the optimizer, weight tying and plain checkpoints go on working. The
    model computes as before until a phase is switched on in the returned state.

    Args:
        model (`torch.nn.Module`): changed in place.
        scheme ([`Scheme`]): what becomes of the Linear layers.
        selection ([`Selection`]): which modules; see [`select_modules`].

    Returns:
        [`QATState`]: the switches that all QAT modules of the model share.

    Raises:
        `ValueError`: if a weight to be quantized holds NaN or infinity.
    """
    for name in selection.quantized:
        require_finite(name, model.get_submodule(name))
    state = QATState()
    modules = {name: model.get_submodule(name) for name in selection.quantized}
    replace_modules(
        model, {name: _qat_module(old, selection.scheme_of(name, scheme), state) for name, old in modules.items()}
    )
    watcher = _InputWatcher(state, list(inspect.signature(model.forward).parameters))
    state.handle = model.register_forward_pre_hook(watcher, with_kwargs=True)
    return state


def qat_modules(model: nn.Module) -> dict[str, QATLinear | QATConv1D | QATEmbedding]:
    """The QAT modules of a model by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QAT_MODULES)}


def _qat_module(module: nn.Module, scheme: Scheme, state: QATState) -> nn.Module:
    # Made without __init__, which would allocate a second weight only to throw it away.
    new: nn.Module
    if isinstance(module, nn.Linear):
        new = QATLinear.__new__(QATLinear)
    elif isinstance(module, nn.Embedding):
        new = QATEmbedding.__new__(QATEmbedding)
    else:
        new = QATConv1D.__new__(QATConv1D)
    # The float module's whole state: Parameters, hooks that users put there, sizes, training flag.
    new.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    new.state = state
    new.scheme = scheme
    if not isinstance(module, nn.Embedding):
        static = scheme.activations == "static"
        device = module.weight.device
        new.activation_fake_quant = (
            ActivationFakeQuantize(state, device).train(module.training)  # type: ignore[arg-type]
            if static
            else None
        )
    return new


class _InputWatcher:
    """Forward pre-hook of the whole model: notes the batch's attention masks and its keyword arguments.

    A class rather than a closure, so that a deep copy of the model watches its own state.
    """

    def __init__(self, state: QATState, parameters: list[str]) -> None:
        self.state = state
        self.parameters = parameters

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self.state.masks = batch_masks(inputs)
        self.state.last_range = self.state.last_input = None
        # A used cache changes with each forward: both sides of the proof would not get the same input.
        if not torch.compiler.is_compiling() and inputs.get("past_key_values") is None:
            self.state.inputs.append(_detached(inputs))


def _detached(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _recomputing() -> bool:
    """Whether this forward is the second one, which activation checkpointing runs during backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
