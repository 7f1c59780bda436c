"""Run a model cut open: each layer's output is replaced by noise, so that gradients show what it reaches directly."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quantization.graph import evaluating, tensors_of
from ..quantization.qat import QATConv1D

_TOKENS = 16
_NOISE = 0.5  # small enough for no softmax or activation to saturate, whatever the model scales by


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, a transformers `Conv1D`, or a QAT module of either."""
    return isinstance(module, (nn.Linear, Conv1D, QATConv1D))


def output_dim(module: nn.Module) -> int:
    """The dimension of a Linear-like module's weight that its outputs lie along; the other one is its inputs'."""
    return 0 if isinstance(module, nn.Linear) else 1


@dataclass
class Cut:
    """What one forward showed, cut at the outputs of some modules.

    Args:
        inputs (`dict[str, list[torch.Tensor]]`): what each run of a module read, by module name; with its graph.
        outputs (`dict[str, list[torch.Tensor]]`): the noise that each run was made to return; leaves of the graph.
        returned (`list[torch.Tensor]`): the model's outputs, without caches.
        order (`list[str]`): the modules as they ran.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    returned: list[Tensor] = field(default_factory=list)
    order: list[str] = field(default_factory=list)


def run_cut(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping[str, Any], noise: float = _NOISE
) -> Cut:
    """Run the model once, in eval mode and with gradients, with noise in place of what the named modules return.

    A module whose first output is no float tensor is left as it is. The hooks of the model itself do not run: what
    they watch is training data. Random state, modes and flags are as before when this returns.

    Args:
        model (`torch.nn.Module`): neither its weights nor its gradients change.
        modules (`dict[str, torch.nn.Module]`): where to cut, by name.
        batch (mapping): keyword arguments of the forward.
        noise (`float`, *optional*, defaults to 0.5): its mean and standard deviation, so that no ReLU is closed for
            all rows; 0 makes every output zero.
    """
    cut = Cut()
    generator = torch.Generator().manual_seed(0)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            first = first_tensor((*args, *kwargs.values()))
            if first is not None:
                cut.inputs[name].append(first)

        return hook

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(first, Tensor) or not first.is_floating_point():
                return output
            drawn = (torch.randn(first.shape, generator=generator) + 1) * noise
            if first.numel() == first.shape[-1]:
                drawn = drawn.abs()  # a single row: ReLU shall not hide it
            leaf = drawn.to(first.device, first.dtype).requires_grad_()
            cut.order.append(name)
            cut.outputs[name].append(leaf)
            # The model gets a copy: it may change it in place.
            return leaf.clone() if first is output else type(output)((leaf.clone(), *output[1:]))

        return hook

    handles = []
    for name, module in modules.items():
        handles += [
            module.register_forward_pre_hook(before(name), with_kwargs=True),
            module.register_forward_hook(after(name)),
        ]
    try:
        with evaluating(model), torch.enable_grad(), _all_require_grad(model), torch.random.fork_rng():
            torch.manual_seed(0)
            cut.returned = list(tensors_of(model.forward(**batch)))
    finally:
        for handle in handles:
            handle.remove()
    return cut


class Sources:
    """From which of some leaves a tensor was computed; as bits of an integer, one bit for each leaf's name."""

    def __init__(self, leaves: Mapping[str, Iterable[Tensor]]) -> None:
        self.names = list(leaves)
        self._bits = {id(leaf): 1 << place for place, name in enumerate(leaves) for leaf in leaves[name]}
        self._known: dict[Any, int] = {}

    def of(self, tensors: Iterable[Tensor]) -> int:
        """The leaves of any of the tensors."""
        bits = 0
        for tensor in tensors:
            bits |= self._bits.get(id(tensor), 0) if tensor.grad_fn is None else self._walk(tensor.grad_fn)
        return bits

    def named(self, bits: int) -> list[str]:
        """The names that the bits stand for."""
        return [name for place, name in enumerate(self.names) if bits >> place & 1]

    def _walk(self, root: Any) -> int:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._known:
                stack.pop()
            elif (variable := getattr(node, "variable", None)) is not None:
                self._known[node] = self._bits.get(id(variable), 0)
            else:
                parents = [parent for parent, _ in node.next_functions if parent is not None]
                missing = [parent for parent in parents if parent not in self._known]
                stack.extend(missing)
                if not missing:
                    bits = 0
                    for parent in parents:
                        bits |= self._known[parent]
                    self._known[node] = bits
        return self._known[root]


def synthetic_batch(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that the model's forward takes, made from its config; the same ones each time.

    Raises:
        `ValueError`: if the model runs with none that could be thought of.
    """
    errors: list[str] = []
    for batch in _batches(model):
        try:
            with evaluating(model), torch.random.fork_rng():
                torch.manual_seed(0)
                model.forward(**batch)
            return batch
        except Exception as error:  # whatever a model raises on inputs that it cannot take
            errors.append(f"with {', '.join(batch)}: {type(error).__name__}: {str(error).strip()[:200]}")
    raise ValueError(
        f"{type(model).__name__} could not be run on made-up inputs ("
        + ("; ".join(errors) or f"nothing is known of its main input {_main_input(model)!r}")
        + "). Pass `batch`, keyword arguments of its forward."
    )


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first tensor among arguments."""
    return next((value for value in values if isinstance(value, Tensor)), None)


def _batches(model: nn.Module) -> Iterator[dict[str, Any]]:
    known = inspect.signature(model.forward).parameters
    main = _main_input(model)
    every = {}
    for name in ("input_ids", "pixel_values", "input_values", "input_features", "decoder_input_ids"):
        made = _make(model, name) if name in known or name == main else None
        if made is not None and (name != "input_ids" or main != "input_features"):
            every[name] = made
    few = {name: value for name, value in every.items() if name in (main, "decoder_input_ids")}
    for batch in (few, every):
        if batch:
            yield batch
            if "input_ids" in batch:  # several choices for each question
                yield {name: value[:, None] for name, value in batch.items()}
    # A property of transformers' models that may raise where nothing is known of them.
    dummies = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, dict) and dummies:
        device = next(model.parameters()).device
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in dummies.items()}


def _main_input(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))


def _make(model: nn.Module, name: str) -> Tensor | None:
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    if name in ("input_ids", "decoder_input_ids"):
        vocabulary = _number(config, "vocab_size")
        if vocabulary is None or (name == "decoder_input_ids" and not getattr(config, "is_encoder_decoder", False)):
            return None
        special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "cls", "sep")}
        allowed = [token for token in range(min(vocabulary, 1000)) if token not in special] or [0]
        longest = _number(config, "max_position_embeddings") or _TOKENS
        drawn = torch.randint(len(allowed), (1, max(2, min(_TOKENS, longest // 2))), generator=generator)
        ids = torch.tensor(allowed)[drawn]
        eos = getattr(config, "eos_token_id", None)
        if isinstance(eos, int) and 0 <= eos < vocabulary:
            ids[:, -1] = eos  # some classifiers read what stands there
        return ids.to(first.device)
    shape: tuple[int, ...] | None = None
    mels = _number(config, "num_mel_bins")
    if name == "pixel_values":
        size = _find(config, "image_size")
        height, width = size if isinstance(size, (list, tuple)) else (size or 224, size or 224)
        shape = (1, _number(config, "num_channels") or 3, height, width)
    elif name == "input_features" and mels:
        shape = (1, mels, 2 * (_number(config, "max_source_positions") or 1500))
    elif name == "input_values" and mels:
        shape = (1, _number(config, "max_length") or 1024, mels)
    elif name == "input_values":
        stride = torch.tensor(_find(config, "conv_stride") or [320]).prod()
        shape = (1, (_TOKENS + 2) * int(stride))
    return None if shape is None else torch.randn(shape, generator=generator).to(first.device, first.dtype)


def _number(config: Any, name: str) -> int | None:
    value = _find(config, name)
    return value if isinstance(value, int) else None


def _find(config: Any, name: str) -> Any:
    """A value of the config, or of the first config within it that has one."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    inner = [part for part in vars(config).values() if hasattr(part, "to_dict")] if hasattr(config, "to_dict") else []
    return next((found for part in inner if (found := _find(part, name)) is not None), None)


@contextmanager
def _all_require_grad(model: nn.Module) -> Iterator[None]:
    """Let frozen Parameters be seen in the graph too."""
    frozen = [
        parameter for parameter in model.parameters() if parameter.is_floating_point() and not parameter.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
