"""From QAT modules (or float ones) to int8 modules, with proof that both compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.base import QuantizedModule
from ..runtime.kernels import int_mm_is_exact, use_kernel
from ..runtime.modules import Int8Embedding, Int8Linear
from ..runtime.packed import PackedLinear
from ..schemes import Scheme
from ..targets import Kind, Selection, replace_modules, require_finite
from .qat import QATConv1D, QATEmbedding, QATLinear, QATState, qat_modules
from .sensitivity import first_output, output_sqnr, sqnr, weight_sqnr

# Fake-quant and int8 differ by the rounding of float32 sums only: about 100 dB for one layer on equal inputs. A
# wrong scale or zero point gives 40 dB at the very most.
MIN_LAYER_SQNR = 60.0
# Through a whole network one such rounding may turn a quantum over, which later layers amplify.
MIN_LOGITS_SQNR = 20.0


class ParityError(RuntimeError):
    """Fake-quant and int8 do not compute the same; the model was left as it was."""


@dataclass
class Conversion:
    """What became of a model's layers.

    Args:
        scheme ([`Scheme`]): of the Linear layers.
        quantized (`dict[str, Kind]`): kind of module by name.
        left (`dict[str, str]`): reason by name for each module left in float.
        layer_sqnr (`dict[str, float]`): int8 against fake-quant on equal inputs, decibels by name.
        logits_sqnr (`float`, *optional*): the same for the model's output on the parity batches.
        error_sqnr (`dict[str, float]`): quantized weights against float weights, decibels by name.
        schemes (`dict[str, Scheme]`): of the modules whose scheme is not the model's.
    """

    scheme: Scheme
    quantized: dict[str, Kind]
    left: dict[str, str]
    layer_sqnr: dict[str, float] = field(default_factory=dict)
    logits_sqnr: float | None = None
    error_sqnr: dict[str, float] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)


def convert_module(
    module: nn.Module,
    scheme: Scheme,
    input_range: tuple[Tensor, Tensor] | None = None,
    integers: tuple[Tensor, Tensor] | None = None,
    search: bool = False,
) -> Int8Linear | Int8Embedding | PackedLinear:
    """The quantized module for a float or QAT Linear, Conv1D or Embedding.

    Args:
        module (`torch.nn.Module`): stays as it is.
        scheme ([`Scheme`]): of a Linear or Conv1D.
        input_range (`tuple`, *optional*): smallest and largest input, shape (); for static schemes. A QAT module
            has its own.
        integers (`tuple`, *optional*): the weight as integers and scales, as [`quantize_weight`] gives them; by
            default the weight is rounded.
        search (`bool`, *optional*, defaults to `False`): see [`quantize_weight`].
    """
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    bias: Tensor | None = getattr(module, "bias", None)
    transposed = not isinstance(module, (nn.Linear, nn.Embedding))
    fake_quant = getattr(module, "activation_fake_quant", None)
    if fake_quant is not None:
        input_range = fake_quant.observer.min_val, fake_quant.observer.max_val
    new: Int8Linear | Int8Embedding | PackedLinear
    if isinstance(module, nn.Embedding):
        new = Int8Embedding.from_float(weight, module.padding_idx)
    elif scheme.packed and integers is not None:
        new = PackedLinear.from_integers(*integers, bias, scheme, transposed)
    elif scheme.packed:
        new = PackedLinear.from_float(weight, bias, scheme, transposed, search)
    elif integers is not None:
        new = Int8Linear.from_integers(*integers, bias, scheme, input_range, transposed)
    else:
        new = Int8Linear.from_float(weight, bias, scheme, input_range, transposed, search)
    return new.train(module.training)


def convert_float(
    model: nn.Module,
    scheme: Scheme,
    selection: Selection,
    progress: Callable[[], None] | None = None,
    *,
    ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    integers: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    search: bool = False,
) -> None:
    """Swap the selected float modules for quantized ones, in place, one at a time.

    Args:
        model (`torch.nn.Module`): changed in place.
        scheme ([`Scheme`]): of the Linear layers that the selection gives no scheme of their own.
        selection ([`Selection`]): which modules; see [`select_modules`].
        progress (callable, *optional*): called once for each module.
        ranges (`dict`, *optional*): of the inputs by module name, for static schemes; see [`calibrate`].
        integers (`dict`, *optional*): weights that are integers already, by module name; see [`gptq`].
        search (`bool`, *optional*, defaults to `False`): see [`quantize_weight`].

    Raises:
        `ValueError`: if a weight holds NaN or infinity; the model is then unchanged.
    """
    for name in selection.quantized:
        require_finite(name, model.get_submodule(name))
    shared: dict[int, Tensor] = {}
    for name in selection.quantized:
        module = model.get_submodule(name)
        given = (integers or {}).get(name)
        new = convert_module(module, selection.scheme_of(name, scheme), (ranges or {}).get(name), given, search)
        _share(shared, module, new)
        replace_modules(model, {name: new})
        if progress is not None:
            progress()


def _share(shared: dict[int, Tensor], module: nn.Module, new: QuantizedModule) -> None:
    """Modules that share a float weight share the int8 one; `select_modules` packs no such weight."""
    if isinstance(new, (Int8Linear, Int8Embedding)):
        new.int8_weight = shared.setdefault(id(module.weight), new.int8_weight)


@torch.no_grad()
def convert_qat(
    model: nn.Module,
    state: QATState,
    scheme: Scheme,
    selection: Selection,
    batches: Sequence[Mapping[str, Any]],
    progress: Callable[[], None] | None = None,
) -> Conversion:
    """Swap QAT modules for int8 ones after proving on real batches that both compute the same.

    A module whose inputs were never observed has no range: it is put back to float and named in the result.

    Args:
        model (`torch.nn.Module`): a prepared model; changed in place.
        state ([`QATState`]): what [`prepare`] returned.
        scheme ([`Scheme`]): the scheme that it was prepared for.
        selection ([`Selection`]): the selection that it was prepared for.
        batches (list of `dict`): keyword arguments of `forward`, on the model's device.
        progress (callable, *optional*): called once for each module.

    Raises:
        [`ParityError`]: naming the layer, if int8 and fake-quant differ; the model is then unchanged.
        `ValueError`: if a weight holds NaN or infinity; the model is then unchanged.
    """
    originals = qat_modules(model)
    for name, module in originals.items():
        require_finite(name, module)
    result = Conversion(scheme, {}, dict(selection.left), schemes=dict(selection.schemes))
    replacements: dict[str, nn.Module] = {}
    shared: dict[int, Tensor] = {}
    for name, module in originals.items():
        fake_quant = getattr(module, "activation_fake_quant", None)
        if fake_quant is not None and not fake_quant.observed:
            replacements[name] = float_module(module)
            result.left[name] = "its inputs were never observed"
        else:
            new = convert_module(module, module.scheme)
            _share(shared, module, new)
            replacements[name] = new
            result.quantized[name] = selection.quantized[name]
            result.error_sqnr[name] = _weight_sqnr(module, new)
        if progress is not None:
            progress()
    if not result.quantized:
        raise ValueError(
            "no layer has an activation range: nothing was observed in training mode. Train for at least one "
            "step with observers on (`start_step` below the number of training steps)."
        )

    mode, flags = model.training, (state.observing, state.fake_quantizing)
    # Mixed precision as accelerate sets it up wraps `forward`. Through it both sides would differ by bfloat16's
    # rounding, some 25 dB after a whole network, and that proves little.
    wrapped = model.__dict__.get("forward")
    if wrapped is not None and "_original_forward" in model.__dict__:
        model.forward = model.__dict__["_original_forward"]
    model.eval()
    state.observing, state.fake_quantizing = False, True
    unobserved = {name for name in originals if name not in result.quantized}
    expected: list[Tensor] = []
    try:
        replace_modules(model, {name: replacements[name] for name in unobserved})
        pairs = {name: (originals[name], replacements[name]) for name in result.quantized}
        # By the reference kernel: training may have multiplied integers already, which would prove nothing.
        with use_kernel("reference"), _LayerParity(pairs) as parity:
            expected = [first_output(model, batch) for batch in batches]
        result.layer_sqnr = parity.check()
        replace_modules(model, {name: replacements[name] for name in result.quantized})
        # A kernel that packs no weights, for the same reason.
        device = next(iter(originals.values())).weight.device
        with use_kernel("int_mm" if int_mm_is_exact(device) else None):
            got = [first_output(model, batch) for batch in batches]
        result.logits_sqnr = _check_logits(expected, got, result.layer_sqnr)
    except BaseException:
        replace_modules(model, originals)
        state.observing, state.fake_quantizing = flags
        raise
    finally:
        if wrapped is not None:
            model.forward = wrapped
        model.train(mode)
    if state.handle is not None:
        state.handle.remove()
    return result


def float_module(module: QATLinear | QATConv1D | QATEmbedding) -> nn.Module:
    """The float module that a QAT module was made from, on the same Parameters."""
    from transformers.pytorch_utils import Conv1D

    kinds: dict[type[nn.Module], type[nn.Module]] = {
        QATLinear: nn.Linear,
        QATEmbedding: nn.Embedding,
        QATConv1D: Conv1D,
    }
    kind = kinds[type(module)]
    new = kind.__new__(kind)
    own = ("state", "scheme", "activation_fake_quant")
    new.__dict__ = {
        key: {k: v for k, v in value.items() if k not in own} if type(value) is dict else value
        for key, value in module.__dict__.items()
        if key not in own
    }
    return new


class _LayerParity:
    """Runs each int8 module on the very inputs of its fake-quant twin, in float32."""

    def __init__(self, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
        self.pairs = pairs
        self.worst: dict[str, float] = {}

    def __enter__(self) -> _LayerParity:
        self.handles = [
            original.register_forward_hook(self._hook(name, original, new.eval()))
            for name, (original, new) in self.pairs.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str, original: nn.Module, new: nn.Module) -> Callable[[nn.Module, Any, Tensor], None]:
        def compare(module: nn.Module, args: tuple[Tensor, ...], expected: Tensor) -> None:
            values = args[0]
            if torch.is_autocast_enabled(values.device.type):
                # Half-precision products would drown what is looked for.
                with torch.autocast(values.device.type, enabled=False):
                    if values.is_floating_point():
                        values = values.to(module.weight.dtype)  # type: ignore[arg-type]
                    expected = original.forward(values)
            with torch.autocast(values.device.type, enabled=False), use_kernel(None):
                decibels = sqnr(expected, new.forward(values))
            if isinstance(new, Int8Linear):
                new.unpack()  # the float weights are still there: do not hold every packed weight beside them
            self.worst[name] = min(self.worst.get(name, float("inf")), decibels)

        return compare

    def check(self) -> dict[str, float]:
        for name, decibels in self.worst.items():
            if not decibels >= MIN_LAYER_SQNR:
                weight_dtype = self.pairs[name][0].weight.dtype
                if weight_dtype == torch.float32 or not decibels >= MIN_LOGITS_SQNR:
                    raise ParityError(
                        f"{name}: int8 and fake-quant differ by {decibels:.1f} dB (at least {MIN_LAYER_SQNR:.0f} "
                        "dB are needed), so the int8 model would not be the one that was trained. The model was "
                        f"left in float. Put {name!r} into `ignore`, or report this with your torch version."
                    )
        return self.worst


def _check_logits(expected: list[Tensor], got: list[Tensor], layers: Mapping[str, float]) -> float | None:
    if not expected:
        return None
    decibels = min(output_sqnr(before, after) for before, after in zip(expected, got, strict=True))
    if not decibels >= MIN_LOGITS_SQNR:
        worst = min(layers, key=lambda name: layers[name]) if layers else "none"
        raise ParityError(
            f"the outputs of the int8 model differ from fake-quant by {decibels:.1f} dB (at least "
            f"{MIN_LOGITS_SQNR:.0f} dB are needed); the least exact layer is {worst}. The model was left in float. "
            f"Put {worst!r} into `ignore`, or report this with your torch version."
        )
    return decibels


def _weight_sqnr(module: nn.Module, new: QuantizedModule) -> float:
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight_sqnr(weight.t() if new.transposed else weight, new.integers, new.weight_scale)
