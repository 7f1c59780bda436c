"""Quantize a trained model without training it."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import attach_quantizer
from ..errors import did_you_mean
from ..progress import progress_bar
from ..runtime.packed import require_dense_packing
from ..schemes import SCHEMES, Scheme, get_scheme
from ..targets import Selection, select_modules
from .bias_correction import correct_biases
from .calibration import Batch, Calibration, calibration_batches
from .convert import convert_float
from .equalization import awq_scale
from .float8 import FLOAT8, float8_dynamic_config, quantize_float8, require_float8
from .float_models import (
    load_float,
    own_tensors,
    require_device,
    require_merged_adapters,
    require_unquantized,
    shallow_copy,
)
from .gptq import gptq
from .guard import meet_accuracy
from .ranges import calibrate, require_observer
from .smoothing import smooth

logger = logging.getLogger(__name__)

ROUNDINGS = ("nearest", "mse", "gptq")
EQUALIZATIONS = ("smoothquant", "awq")


def quantize(
    model: PreTrainedModel | nn.Module | str | os.PathLike[str],
    scheme: str | Scheme = "int8_dynamic",
    calibration: Any = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    embeddings: bool = True,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    rounding: Literal["nearest", "mse", "gptq"] = "nearest",
    equalize: Literal["smoothquant", "awq"] | None = None,
    correct_bias: bool = False,
    observer: str = "minmax",
    max_drop: float | None = None,
    evaluate: Callable[[Any], float | Mapping[str, float]] | None = None,
    metric: str | None = None,
    relative: bool = False,
    auto_class: type[Any] | None = None,
    inplace: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Quantize a trained model of any `AutoModel` class.

    ```python
    quantize("my/bert", "int8_static", texts)
    quantize(model, "int4_weight_only", Calibration(texts, samples=64), rounding="gptq")
    quantize(model, "int8_dynamic", max_drop=0.01, evaluate=lambda model: accuracy(model))
    ```

    Args:
        model (`PreTrainedModel` or `str`): the model, or its folder or hub id.
        scheme (`str`, *optional*, defaults to `"int8_dynamic"`): see [`get_scheme`]; or `"float8_dynamic"`, on GPUs
            that multiply float8, through torchao and in its format.
        calibration ([`Calibration`] or its `data`, *optional*): needed by static schemes, `rounding="gptq"`,
            `equalize` and `correct_bias`.
        targets (list of `str`, *optional*): patterns of modules to quantize; see [`select_modules`].
        ignore (list of `str`, *optional*): patterns of modules to leave in float.
        embeddings (`bool`, *optional*, defaults to `True`): whether embeddings become int8.
        overrides (`dict`, *optional*): other schemes, or `None` for float, by pattern:
            `{"*.query": "int8_dynamic", "lm_head": None}`.
        rounding (`str`, *optional*, defaults to `"nearest"`): how weights become integers: `"nearest"`; `"mse"`, to
            the scale with the least squared error ([`search_scale`]); `"gptq"`, each weight making up for the error
            of those before ([`gptq`]).
        equalize (`str`, *optional*): scales moved from activations to weights, which changes nothing in float:
            `"smoothquant"` for int8 activations ([`smooth`]), `"awq"` for weights of few bits ([`awq_scale`]).
        correct_bias (`bool`, *optional*, defaults to `False`): whether biases make up for the mean error of their
            layer ([`correct_biases`]).
        observer (`str`, *optional*, defaults to `"minmax"`): how static ranges are found ([`calibrate`]).
        max_drop (`float`, *optional*): what the metric may lose; layers are put back into float, as few as will do,
            until it is met ([`meet_accuracy`]).
        evaluate (callable, *optional*): takes a model and returns a metric, or a dictionary of metrics.
        metric (`str`, *optional*): which of them counts.
        relative (`bool`, *optional*, defaults to `False`): whether `max_drop` is a share of the float model's metric.
        auto_class (*optional*): the class to load a path with; by default the one its config names.
        inplace (`bool`, *optional*, defaults to `False`): whether the model that was passed is changed. If not,
            it stays as it is, and shares no tensor with the result.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars and the guard's table.
        kwargs: passed on to `from_pretrained` where `model` is a path.

    Returns:
        the quantized model, in eval mode; its `save_pretrained` writes the compressed-tensors layout. With `max_drop`,
        its attribute `guard_result` is the [`GuardResult`].

    Raises:
        `ValueError`: for an unknown name, missing calibration data, a pattern that matches nothing, a model without a
            quantizable module or one that is quantized already, NaN in weights or activations.
        [`AccuracyError`]: if `max_drop` cannot be met; it says the best that was found.
    """
    float8 = scheme == FLOAT8
    scheme = get_scheme("int8_weight_only" if float8 else scheme)  # float8 takes the same layers
    _check_options(scheme, calibration, overrides, rounding, equalize, correct_bias, observer, max_drop, evaluate)
    if isinstance(model, (str, os.PathLike)):
        model, inplace = load_float(model, auto_class, **kwargs), True
    elif kwargs:
        raise TypeError(
            f"{', '.join(map(repr, kwargs))}: no argument of quantize; those of from_pretrained go with a path, but a "
            "model was passed."
        )
    require_unquantized(model)
    require_merged_adapters(model)
    require_device(model)
    if float8:
        require_float8(model)
        _refuse_with_float8(calibration=calibration, overrides=overrides, max_drop=max_drop, rounding=rounding)
        model = model if inplace else copy.deepcopy(model)
        quantize_float8(model, select_modules(model, targets, ignore, False), float8_dynamic_config())
        return model.eval()
    selection = select_modules(model, targets, ignore, embeddings, scheme, overrides)
    for name in selection.quantized:
        require_dense_packing(selection.scheme_of(name, scheme).bits)
    batches: list[Batch] = []
    if calibration is not None:
        given = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
        batches = calibration_batches(given, model)
    if not inplace:
        model = shallow_copy(model)
    mode = model.training
    model.eval()

    schemes = {
        name: selection.scheme_of(name, scheme) for name, kind in selection.quantized.items() if kind != "embedding"
    }
    if equalize == "smoothquant":
        smooth(model, batches, schemes)
    elif equalize == "awq":
        awq_scale(model, batches, [n for n, own in schemes.items() if own == scheme], scheme.bits, scheme.group_size)
    static = [name for name, own in schemes.items() if own.activations == "static"]
    ranges = {}
    if static:
        with progress_bar("Calibrating", len(batches), progress) as advance:
            ranges = calibrate(model, batches, static, observer, advance)
        selection = _without(selection, [name for name in static if name not in ranges])
        schemes = {name: own for name, own in schemes.items() if name in selection.quantized}
    twin = shallow_copy(model) if correct_bias or max_drop is not None else None
    integers = {}
    if rounding == "gptq":
        with progress_bar("GPTQ", len(schemes), progress) as advance:
            integers = gptq(model, batches, schemes, progress=advance)
    with progress_bar(f"Quantizing to {scheme.name}", len(selection.quantized), progress) as advance:
        search = rounding == "mse"
        convert_float(model, scheme, selection, advance, ranges=ranges, integers=integers, search=search)
    if correct_bias and twin is not None:
        correct_biases(twin, model, batches, list(schemes))
    if max_drop is not None and evaluate is not None and twin is not None:
        result = meet_accuracy(
            twin, model, evaluate, max_drop=max_drop, relative=relative, metric=metric, batches=batches[:4] or None,
            progress=progress,
        )  # fmt: skip
        if progress:
            print(result)
        model.guard_result = result
    if not inplace:
        own_tensors(model)
    model.train(mode)
    attach_quantizer(model)
    return model.eval()


def quantize_dynamic(
    model: PreTrainedModel | nn.Module | str | os.PathLike[str],
    scheme: str | Scheme = "int8_dynamic",
    **options: Any,
) -> Any:
    """Quantize any model without data: activations, where they are quantized, get their ranges at each forward.

    Args:
        model (`PreTrainedModel` or `str`): a model of any `AutoModel` class, or its folder or hub id.
        scheme (`str`, *optional*, defaults to `"int8_dynamic"`): any but the static ones: `"int8_dynamic"`,
            `"int8_weight_only"`, `"int4_weight_only"`, `"int4_dynamic"` ...; see [`get_scheme`].
        options: see [`quantize`].

    Returns:
        the quantized model, in eval mode; its `save_pretrained` writes the compressed-tensors layout.

    Raises:
        `ValueError`: as [`quantize`] does, and for a static scheme.
    """
    scheme = scheme if scheme == FLOAT8 else get_scheme(scheme)
    if isinstance(scheme, Scheme) and scheme.activations == "static":
        others = ", ".join(name for name, other in SCHEMES.items() if other.activations != "static")
        raise ValueError(
            f"scheme {scheme.name!r} needs observed activation ranges, which quantize_dynamic has no data for. "
            f"Call quantize_static with data, train with QATCallback({scheme.name!r}), or choose one of: {others}."
        )
    return quantize(model, scheme, **options)


def quantize_static(
    model: PreTrainedModel | nn.Module | str | os.PathLike[str],
    calibration: Any,
    scheme: str | Scheme = "int8_static",
    *,
    samples: int = 128,
    batch_size: int = 8,
    max_length: int | None = None,
    processing_class: Any = None,
    **options: Any,
) -> Any:
    """Quantize any model with activation ranges that are found once, on calibration data.

    ```python
    int8 = quantize_static("my/bert", texts)
    quantize_static(trainer.model, trainer, inplace=True)  # the Trainer's own batches; evaluate() is then int8
    ```

    Args:
        model (`PreTrainedModel` or `str`): a model of any `AutoModel` class, or its folder or hub id.
        calibration: texts, a data set, a `DataLoader`, a `Trainer`, or a [`Calibration`] of one of them.
        scheme (`str`, *optional*, defaults to `"int8_static"`): see [`get_scheme`].
        samples, batch_size, max_length, processing_class (*optional*): see [`Calibration`].
        options: see [`quantize`].

    Returns:
        the quantized model, in eval mode; its `save_pretrained` writes the compressed-tensors layout.

    Raises:
        `ValueError`: as [`quantize`] does.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration, samples, batch_size, max_length, processing_class)
    return quantize(model, scheme, calibration, **options)


def _check_options(
    scheme: Scheme,
    calibration: Any,
    overrides: Mapping[str, str | Scheme | None] | None,
    rounding: str,
    equalize: str | None,
    correct_bias: bool,
    observer: str,
    max_drop: float | None,
    evaluate: Callable[..., Any] | None,
) -> None:
    require_observer(observer)
    for name, value, allowed in (
        ("rounding", rounding, ROUNDINGS),
        ("equalize", equalize, (*EQUALIZATIONS, None)),
    ):
        if value not in allowed:
            known = [str(one) for one in allowed]
            raise ValueError(
                f"unknown {name} {value!r}{did_you_mean(str(value), known) or '.'} Choose one of: {', '.join(known)}."
            )
    if (max_drop is None) is not (evaluate is None):
        raise ValueError(
            "`max_drop` and `evaluate` go together: the guard needs what may be lost, and a function that takes a "
            f"model and returns its metric; got max_drop={max_drop!r}, evaluate={evaluate!r}."
        )
    others = [get_scheme(own) for own in (overrides or {}).values() if own is not None]
    needs = {
        "a static scheme": any(own.activations == "static" for own in (scheme, *others)),
        "rounding='gptq'": rounding == "gptq",
        f"equalize={equalize!r}": equalize is not None,
        "correct_bias": correct_bias,
    }
    wanting = [name for name, need in needs.items() if need]
    if wanting and calibration is None:
        raise ValueError(
            f"{', '.join(wanting)} needs `calibration`: a list of texts, a data set, a DataLoader or a Trainer, about "
            "128 samples."
        )


def _refuse_with_float8(**options: Any) -> None:
    given = [name for name, value in options.items() if value not in (None, "nearest")]
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot go with scheme {FLOAT8!r}, which torchao carries out. Leave it out."
        )


def _without(selection: Selection, unrun: list[str]) -> Selection:
    """The selection without modules that saw no sample: they have no range."""
    if not unrun:
        return selection
    logger.warning("%d modules never ran during calibration and stay in float: %s", len(unrun), ", ".join(unrun))
    quantized = {name: kind for name, kind in selection.quantized.items() if name not in unrun}
    if not quantized:
        raise ValueError(
            "no layer ran during calibration, so none has a range. Give data that the model's `forward` uses."
        )
    left = {**selection.left, **dict.fromkeys(unrun, "never ran during calibration")}
    return replace(selection, quantized=quantized, left=left)
