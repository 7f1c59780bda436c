"""The accuracy guard: the fewest layers in float with which a quantized model keeps its accuracy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..progress import progress_bar
from ..runtime.base import quantized_modules
from .guard_metric import Judge
from .guard_report import AccuracyError, GuardResult, unmet, unsteady
from .guard_results import LayerSensitivity, TradeOff
from .guard_search import PATIENCE, PROBES, Layers, Search, layer_sensitivity, own_weight_sqnr, record_batches

# Equalization's scales, or another model's weights, are at 2 dB and less in some layer; 3 bits are at 13.
_MIN_WEIGHT_SQNR, _LEAST_BITS = 5.0, 3

__all__ = ["AccuracyError", "GuardResult", "meet_accuracy"]


def meet_accuracy(
    float_model: nn.Module,
    quantized_model: nn.Module,
    evaluate: Callable[[Any], Any],
    *,
    max_drop: float = 0.01,
    relative: bool = False,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    donor: nn.Module | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
    max_float_layers: int | None = None,
    progress: bool = True,
) -> GuardResult:
    """Put the fewest layers of a quantized model back to float with which it keeps its accuracy.

    ```python
    quantized = quantize_dynamic(model, "int4_weight_only")
    print(meet_accuracy(model, quantized, evaluate, max_drop=0.01, metric="accuracy"))
    ```

    If the quantized model meets the target, nothing is done. Otherwise layers are ranked by what each alone costs:
    the error of the model's output, and for the 8 most sensitive ones the metric, which counts first. Then as many
    as needed are put back to float in that order, found by galloping and bisection, and those that turn out not to be
    needed are quantized again. The model that is returned is evaluated once more. Of n layers about
    `20 + 2 log2(n)` models are evaluated, and about 2n where the metric contradicts the ranking.

    Args:
        float_model (`torch.nn.Module`): the model that accuracy is held against; stays as it is.
        quantized_model (`torch.nn.Module`): changed in place; shares no tensor with the others afterwards.
        evaluate (callable): takes a model, in eval mode, and returns its metric, or a `dict` of metrics as a
            Trainer's `evaluate` does (its prefix `eval_` may be left out).
        max_drop (`float`, *optional*, defaults to 0.01): how much worse than the float model the result may be.
        relative (`bool`, *optional*, defaults to `False`): whether `max_drop` is a share of the float model's value
            rather than in the metric's own unit.
        metric (`str`, *optional*): which entry of the `dict`; needed where there are several. Where `evaluate`
            returns a number, its name.
        higher_is_better (`bool`, *optional*): the metric's direction. By default `False` where its name has one of
            the words loss, nll, perplexity, ppl, bpb, bpc, entropy, error, err, mse, rmse, mae, mape, wer, cer, ter,
            mer, fid, ece or brier, and else `True`.
        donor (`torch.nn.Module`, *optional*): where float layers come from, if not from `float_model`: the equalized
            float model, where the quantized one was made from that; its layers fit no other. Stays as it is.
        batches (list of `dict`, *optional*): keyword arguments of `forward`, on which layers are ranked. By default
            the first calls that `evaluate` makes are kept: up to 4, and to 32 rows.
        max_float_layers (`int`, *optional*): how many modules may be in float at most; by default all but one.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.

    Returns:
        [`GuardResult`]: the metric before and after, which layers stay in float, and the trade-off curve.

    Raises:
        [`AccuracyError`]: if no such model was found; says the best one, and leaves the model fully quantized.
        `ValueError`: for bad arguments, a metric that `evaluate` does not return or that is NaN, or a donor whose
            layers do not fit. The model is then as it was.
    """
    source = float_model if donor is None else donor
    _check_arguments(evaluate, max_drop, max_float_layers, batches)
    _check_models(float_model, quantized_model, source)
    judge = Judge(evaluate, max_drop, relative, metric, higher_is_better)
    recorded: list[Mapping[str, Any]] = list(batches or ())
    with _eval_mode(float_model, quantized_model, source):
        seen: list[dict[str, Any]] = []
        with record_batches(float_model, seen):
            judge.start(float_model)
        value = judge.value(quantized_model, "the quantized model")
        # Only now: `evaluate` may have moved the models to another device.
        layers = Layers(quantized_model, source)
        search = Search(layers, lambda: judge.value(quantized_model, "a partly quantized model"), judge.meets)
        search.values.update({frozenset(): value, layers.all: judge.float_value})
        if judge.meets(value):
            return _result(judge, search, value, (), [], [])
        try:
            with progress_bar("Measuring sensitivity", len(layers.names), progress) as advance:
                sqnr = layer_sensitivity(layers, recorded or seen, advance)
            expected = PROBES + PATIENCE + 2 * math.ceil(math.log2(len(layers.names) + 1)) + 1
            with progress_bar("Searching the fewest float layers", expected, progress) as search.progress:
                order = _ranking(search, judge, sqnr)
                kept = search.fewest(order, max_float_layers)
                if kept is None:
                    best = _best(judge, search, max_float_layers)
                    found = _result(judge, search, search.value(best), best, order, sqnr)
                    raise unmet(found, list(layers.quantized), max_float_layers)
                layers.keep(kept)
                value = judge.value(quantized_model, "the returned model")
            if not judge.meets(value):
                raise unsteady(_result(judge, search, value, kept, order, sqnr), search.value(kept))
        except BaseException:
            layers.put(())
            raise
    return _result(judge, search, value, kept, order, sqnr)


def _ranking(search: Search, judge: Judge, sqnr: Sequence[float]) -> list[int]:
    """The layers, the most sensitive first: by the metric where that was measured, and by SQNR."""
    order = sorted(range(len(sqnr)), key=lambda index: -math.inf if math.isnan(sqnr[index]) else sqnr[index])
    # The sort is stable: of equal effects on the metric, which few examples hide, SQNR decides.
    probed = sorted(order[:PROBES], key=lambda index: -judge.drop(search.alone(index)))
    return probed + order[PROBES:]


def _best(judge: Judge, search: Search, max_float_layers: int | None) -> frozenset[int]:
    """Of what was evaluated and is allowed, the layers in float with which the metric is best."""
    layers = search.layers
    limit = layers.count(layers.all) - 1 if max_float_layers is None else max_float_layers
    allowed = [key for key in search.values if key != layers.all and layers.count(key) <= limit]
    return min(allowed, key=lambda key: (judge.drop(search.values[key]), layers.count(key)))


def _result(
    judge: Judge,
    search: Search,
    value: float,
    kept: Collection[int],
    order: Sequence[int],
    sqnr: Sequence[float],
) -> GuardResult:
    layers = search.layers
    changes = {
        index: search.values[rest] - judge.float_value
        for index in order
        if (rest := layers.all - {index}) in search.values
    }
    best: dict[int, TradeOff] = {}
    for key in sorted(search.values, key=lambda key: (-judge.drop(search.values[key]), -layers.size(key))):
        best[layers.count(key)] = TradeOff(layers.count(key), search.values[key], layers.size(key))
    return GuardResult(
        metric=str(judge.metric),
        float_value=judge.float_value,
        value=value,
        drop=judge.drop(value),
        target=judge.max_drop,
        kept=tuple(name for index in order if index in kept for name in layers.names[index]),
        sensitivity=tuple(
            LayerSensitivity(
                " + ".join(layers.names[index]), sqnr[index], changes.get(index), layers.bytes_saved[index]
            )
            for index in order
        ),
        curve=tuple(best[count] for count in sorted(best)),
        evaluations=judge.calls,
        layers=layers.count(layers.all),
        relative=judge.relative,
        higher_is_better=judge.higher_is_better,
    )


@contextmanager
def _eval_mode(*models: nn.Module) -> Iterator[None]:
    flags = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model in models:
            for module in model.modules():
                module.training = flags.get(module, flags[model])


def _check_arguments(
    evaluate: Any, max_drop: float, max_float_layers: int | None, batches: Sequence[Mapping[str, Any]] | None
) -> None:
    if not callable(evaluate):
        raise TypeError(
            f"`evaluate` is a {type(evaluate).__name__}; needed: a function that takes a model and returns its "
            "metric, such as `lambda model: Trainer(model, ...).evaluate()`."
        )
    number = isinstance(max_drop, numbers.Real) and not isinstance(max_drop, bool)
    if not number or not math.isfinite(max_drop) or max_drop < 0:
        raise ValueError(
            f"`max_drop` is {max_drop!r}; allowed: a finite number of at least 0, in the metric's own unit (0.01 is "
            "one point of an accuracy between 0 and 1), or a share of the float value with relative=True. Write, for "
            "example, max_drop=0.01."
        )
    if max_float_layers is not None and (type(max_float_layers) is not int or max_float_layers < 0):
        raise ValueError(
            f"`max_float_layers` is {max_float_layers!r}; allowed: a whole number of at least 0, or None for all "
            "layers but one. Write, for example, max_float_layers=8."
        )
    if batches is not None and not (batches and all(isinstance(batch, Mapping) for batch in batches)):
        raise ValueError(
            "`batches` holds "
            + (f"a {type(batches[0]).__name__}" if batches else "no batch")
            + "; needed: at least one dict of keyword arguments of `forward`. Leave it out to use what `evaluate` "
            "feeds the model."
        )


def _check_models(float_model: nn.Module, quantized_model: nn.Module, donor: nn.Module) -> None:
    quantized = quantized_modules(quantized_model)
    if not quantized:
        raise ValueError(
            f"`quantized_model` ({type(quantized_model).__name__}) has no quantized module. Quantize it first, and "
            "keep the float model: quantize_dynamic(model) leaves it as it is unless `inplace=True`."
        )
    for role, model in (("float_model", float_model), ("donor", donor)):
        inside = quantized_modules(model)
        if inside:
            raise ValueError(
                f"`{role}` has {len(inside)} quantized modules, such as {next(iter(inside))}. Pass the float model "
                "that was quantized; load its checkpoint again if it was quantized in place."
            )
    modules = dict(donor.named_modules())
    decibels: dict[str, float] = {}
    for name, module in quantized.items():
        weight = getattr(modules.get(name), "weight", None)
        shape = tuple(module.stored_shapes()[-1][2])
        expected = shape[::-1] if module.transposed else shape
        if not isinstance(weight, Tensor) or tuple(weight.shape) != expected:
            found = "no such module" if weight is None else f"one of shape {tuple(weight.shape)}"
            raise ValueError(
                f"{name} is quantized and has a weight of shape {expected}, but the float model has {found}. Pass the "
                "float model that `quantized_model` was made from, or as `donor` the one that has its float layers."
            )
        if module.stored_bits >= _LEAST_BITS:
            decibels[name] = own_weight_sqnr(modules[name], module)
    worst = min(decibels, key=lambda name: decibels[name], default="")
    if worst and not decibels[worst] >= _MIN_WEIGHT_SQNR:
        raise ValueError(
            f"the quantized weight of {worst} is not that of the float model: they differ by {decibels[worst]:.1f} dB "
            f"(at least {_MIN_WEIGHT_SQNR:.0f} are needed). It was made from another checkpoint, or from an equalized "
            "model, whose layers have weights of their own. Pass the float model that was quantized as `donor`."
        )
