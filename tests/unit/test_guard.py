"""The accuracy guard's search, on metrics whose answer is known."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_quant import quantize_dynamic
from hf_quant.quantization.convert import convert_float
from hf_quant.quantization.guard import AccuracyError, GuardResult, meet_accuracy
from hf_quant.quantization.guard_search import Layers, layer_sensitivity, record_batches
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime.base import quantized_modules
from hf_quant.schemes import get_scheme
from hf_quant.targets import select_modules


class Chain(nn.Module):
    """Linear layers `layers.0`, `layers.1` ... one after the other, each with a tanh."""

    def __init__(self, count: int, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(count)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"logits": x}


class Sum(Chain):
    """The same side by side: each layer's error reaches the output alike."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.stack([layer(x) for layer in self.layers]).sum(0)}


Metric = Callable[[frozenset[int]], float]


class Evaluate:
    """A metric that depends only on which layers are quantized. Counts calls, and checks how it is called."""

    def __init__(self, metric: Metric, runs: bool = False) -> None:
        self.metric = metric
        self.runs = runs
        self.seen: list[frozenset[int]] = []

    def __call__(self, model: nn.Module) -> float:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        if self.runs:
            model(torch.ones(2, 4))
        quantized = frozenset(int(name.rpartition(".")[2]) for name in quantized_modules(model))
        self.seen.append(quantized)
        return self.metric(quantized)


def additive(harms: Sequence[float]) -> Metric:
    return lambda quantized: 1.0 - math.fsum(harms[index] for index in quantized)


def pair(count: int) -> tuple[Chain, Chain]:
    model = Chain(count)
    return model, quantize_dynamic(model, "int8_weight_only", progress=False)


def indices(names: Sequence[str]) -> list[int]:
    return [int(name.rpartition(".")[2]) for name in names]


def in_float(model: nn.Module) -> list[int]:
    return [index for index, layer in enumerate(model.layers) if type(layer) is nn.Linear]  # type: ignore[arg-type]


def guard(pair: tuple[nn.Module, nn.Module], evaluate: Any, **kwargs: Any) -> GuardResult:
    return meet_accuracy(*pair, evaluate, progress=False, **kwargs)


def test_a_target_that_is_met_needs_two_evaluations_and_no_search() -> None:
    models, evaluate = pair(3), Evaluate(additive([0.001, 0.002, 0.003]))
    result = guard(models, evaluate)
    assert evaluate.seen == [frozenset(), frozenset({0, 1, 2})]
    assert (result.kept, result.sensitivity, result.evaluations) == ((), (), 2)
    assert (result.float_value, result.value) == (1.0, pytest.approx(0.994))
    assert result.drop == pytest.approx(0.006)
    assert [point.float_layers for point in result.curve] == [0, 3]
    assert in_float(models[1]) == []


def test_a_drop_of_exactly_the_target_is_allowed() -> None:
    assert 0.9 - 0.89 > 0.01, "by rounding alone"
    assert guard(pair(2), Evaluate(lambda quantized: 0.89 if quantized else 0.9)).kept == ()


@settings(max_examples=40)
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8), st.floats(0.0, 2.0))
def test_additive_harms_give_the_fewest_layers_that_any_search_could(harms: list[float], max_drop: float) -> None:
    """Up to 8 layers each one's own harm is measured; keeping the most harmful is then the best that can be."""
    metric, everything = additive(harms), range(len(harms))

    def reachable(count: int) -> bool:
        return any(
            1.0 - metric(frozenset(everything) - set(kept)) <= max_drop
            for kept in itertools.combinations(everything, count)
        )

    fewest = next((count for count in range(len(harms)) if reachable(count)), None)
    assume(all(abs(1.0 - metric(frozenset(q)) - max_drop) > 1e-9 for n in everything for q in
               itertools.combinations(everything, n + 1)))  # fmt: skip
    models, evaluate = pair(len(harms)), Evaluate(metric)
    if fewest is None:
        with pytest.raises(AccuracyError):
            guard(models, evaluate, max_drop=max_drop)
        assert in_float(models[1]) == []
        return
    result = guard(models, evaluate, max_drop=max_drop)
    assert len(result.kept) == fewest
    assert result.drop <= max_drop
    assert sorted(indices(result.kept)) == in_float(models[1])
    assert result.value == metric(frozenset(everything) - set(in_float(models[1])))


@settings(max_examples=60)
@given(st.integers(2, 12), st.integers(0, 2**16), st.floats(0.0, 1.0))
def test_whatever_can_be_met_is_met_if_more_float_is_never_worse(count: int, seed: int, max_drop: float) -> None:
    """Random monotone metrics, in which harms hide behind and depend on one another, with nothing of SQNR's order."""
    random = np.random.default_rng(seed)
    groups = [frozenset(random.choice(count, random.integers(1, count + 1), False).tolist()) for _ in range(4)]
    weights = random.random(4)

    def metric(quantized: frozenset[int]) -> float:
        return 1.0 - sum(w for w, group in zip(weights, groups, strict=True) if group & quantized)

    possible = any(1.0 - metric(frozenset({index})) <= max_drop for index in range(count))
    models, evaluate = pair(count), Evaluate(metric)
    if not possible:
        with pytest.raises(AccuracyError):
            guard(models, evaluate, max_drop=max_drop)
        return
    result = guard(models, evaluate, max_drop=max_drop)
    assert 1.0 - metric(frozenset(range(count)) - set(in_float(models[1]))) <= max_drop + 1e-9
    assert len(result.kept) < count
    if count <= 9:  # no more failures in a row than the search puts up with
        for index in in_float(models[1]):
            without = frozenset(range(count)) - set(in_float(models[1])) | {index}
            assert 1.0 - metric(without) > max_drop, "none of the layers in float is needless"
    assert evaluate.seen[-1] == frozenset(range(count)) - set(in_float(models[1])), "what is returned was evaluated"
    assert len(set(evaluate.seen[:-1])) == len(evaluate.seen) - 1, "nothing else was evaluated twice"
    assert result.evaluations == len(evaluate.seen) <= 2 * count + 2 * math.log2(count) + 14


@pytest.mark.parametrize("bad", [[0], [39], [5, 6, 30], [0, 9, 18, 27, 36], list(range(0, 40, 2))])
def test_of_forty_layers_far_fewer_models_are_evaluated_than_there_are_layers(bad: list[int]) -> None:
    """Where harm follows the error of the output, as it should: the layers named here have 4 bits."""
    model = Sum(40, 32)
    schemes = {"*": "int8_weight_only"} | {f"layers.{index}": "int4_weight_only" for index in bad}
    quantized = _quantized_by(model, schemes)
    evaluate = Evaluate(additive([0.1 if index in bad else 0.0 for index in range(40)]))
    result = guard((model, quantized), evaluate, max_drop=0.05, batches=[{"x": torch.randn(8, 32)}])
    assert sorted(indices(result.kept)) == bad
    assert result.evaluations <= 2 + 8 + 2 * math.log2(40) + 8 + 1


def _quantized_by(model: nn.Module, schemes: Mapping[str, str]) -> Any:
    """Each layer with the scheme of the last pattern that fits."""
    quantized = copy.deepcopy(model)
    overrides = dict(reversed(schemes.items()))
    default = get_scheme("int8_weight_only")
    convert_float(quantized, default, select_modules(quantized, scheme=default, overrides=overrides))
    return quantized


def test_a_wrong_ranking_costs_evaluations_but_not_the_target() -> None:
    """The least sensitive layer by SQNR is the only one that the metric minds: all beginnings of the order fail."""
    model = Chain(20, 32)
    quantized = _quantized_by(model, {"*": "int4_weight_only", "layers.7": "int8_weight_only"})
    evaluate = Evaluate(lambda quantized: 0.0 if 7 in quantized else 1.0, runs=False)
    result = guard((model, quantized), evaluate, max_drop=0.1)
    assert result.sensitivity[-1].name == "layers.7"
    assert indices(result.kept) == [7]
    assert result.value == 1.0


def test_output_error_ranks_the_layers_and_the_metric_of_the_most_sensitive_counts_first() -> None:
    model = Sum(12, 32)
    four_bits = {f"layers.{index}": "int4_weight_only" for index in (2, 8)}
    quantized = _quantized_by(model, {"*": "int8_weight_only", **four_bits})
    harms = [0.01] * 12
    harms[2], harms[8] = 0.02, 0.05
    batches = [{"x": torch.randn(4, 32)}, {"x": torch.randn(4, 32)}]
    result = guard((model, quantized), Evaluate(additive(harms)), max_drop=0.12, batches=batches)
    assert result.kept == ("layers.8",)
    by_name = {layer.name: layer for layer in result.sensitivity}
    assert [layer.name for layer in result.sensitivity[:2]] == ["layers.8", "layers.2"]
    assert by_name["layers.8"].change == pytest.approx(-0.05)
    assert sum(layer.change is not None for layer in result.sensitivity) == 8
    assert {layer.sqnr for layer in result.sensitivity if layer.sqnr < 40} == {
        by_name["layers.2"].sqnr,
        by_name["layers.8"].sqnr,
    }
    # By hand: the float model with the quantized layer 2.
    model.layers[2], kept = _quantized_by(model, {"*": "int4_weight_only"}).layers[2], model.layers[2]
    got = torch.cat([model(**batch)["logits"] for batch in batches])
    model.layers[2] = kept
    expected = torch.cat([model(**batch)["logits"] for batch in batches])
    assert by_name["layers.2"].sqnr == pytest.approx(sqnr(expected, got), abs=1e-3)


def test_lower_is_better_by_the_metric_s_name_or_by_order() -> None:
    def loss(quantized: frozenset[int]) -> float:
        return 2.0 + (0.5 if 1 in quantized else 0.0)

    for returned, kwargs in (
        (lambda value: {"eval_loss": value, "eval_runtime": 3.0, "epoch": 1.0}, {}),
        (lambda value: {"eval_word_error_rate": value, "eval_f1": 0.0}, {"metric": "eval_word_error_rate"}),
        (lambda value: value, {"metric": "perplexity"}),
        (lambda value: value, {"higher_is_better": False}),
    ):
        evaluate = Evaluate(loss)
        result = guard(pair(3), lambda model, e=evaluate, r=returned: r(e(model)), max_drop=0.1, **kwargs)
        assert result.kept == ("layers.1",)
        assert not result.higher_is_better
        assert result.drop == 0.0
        change = next(layer.change for layer in result.sensitivity if layer.name == "layers.1")
        assert change == 0.5, "signed as the metric is"


def test_a_better_metric_is_no_drop() -> None:
    result = guard(pair(2), Evaluate(lambda quantized: 2.0 if quantized else 1.0), max_drop=0)
    assert result.drop == -1.0
    result = guard(pair(2), Evaluate(lambda quantized: 2.0 if quantized else 1.0), max_drop=1, higher_is_better=False)
    assert result.drop == 1.0


def test_relative() -> None:
    def perplexity(quantized: frozenset[int]) -> float:
        return 20.0 + 0.5 * len(quantized)

    absolute = guard(pair(4), Evaluate(perplexity), max_drop=0.05, metric="ppl", higher_is_better=True)
    assert absolute.drop == -2.0
    result = guard(pair(4), Evaluate(perplexity), max_drop=0.05, relative=True, metric="ppl")
    assert len(result.kept) == 2, "5 % of 20 is 1"
    assert (result.drop, result.relative) == (0.05, True)


def test_relative_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric of the float model is 0, of which max_drop=0.01 is no share. Use"):
        guard(pair(2), Evaluate(lambda quantized: -float(len(quantized))), relative=True)


def test_negative_metrics_have_a_share_too() -> None:
    result = guard(pair(2), Evaluate(lambda q: -4.0 - len(q)), max_drop=0.25, relative=True, metric="log_likelihood")
    assert len(result.kept) == 1
    assert result.drop == 0.25


def test_what_cannot_be_met_says_the_best_that_was_found_and_leaves_the_model_quantized() -> None:
    models = pair(4)
    before = dict(models[1].named_modules())
    with pytest.raises(AccuracyError) as caught:
        guard(models, Evaluate(additive([0.03, 0.2, 0.024, 0.1])), max_drop=0.02, metric="accuracy")
    assert str(caught.value) == (
        "accuracy of the float model is 1 and may get worse by 0.02, and no model that meets this was found with at "
        "least one layer quantized. The best has accuracy 0.976, a drop of 0.024, with 3 of 4 layers in float: all "
        "but layers.2. To go on, allow max_drop=0.024, or quantize with more bits, smaller groups or calibration. "
        "The model was left fully quantized."
    )
    assert dict(models[1].named_modules()) == before
    assert isinstance(caught.value, ValueError)
    assert caught.value.best.value == pytest.approx(0.976)
    assert len(caught.value.best.sensitivity) == 4


def test_what_the_error_proposes_is_enough() -> None:
    harms = [0.0123456, 0.2, 0.0234567]
    with pytest.raises(AccuracyError, match=r"allow max_drop=0\.0124,") as caught:
        guard(pair(3), Evaluate(additive(harms)), max_drop=0.001)
    assert caught.value.best.kept == ("layers.1", "layers.2")
    assert guard(pair(3), Evaluate(additive(harms)), max_drop=0.0124).kept == ("layers.1", "layers.2")


def test_max_float_layers_is_a_limit() -> None:
    harms = [0.3, 0.2, 0.1, 0.1]
    assert len(guard(pair(4), Evaluate(additive(harms)), max_drop=0.25, max_float_layers=2).kept) == 2
    match = (
        r"at most 1 layers in float. The best has metric 0.6, .* 1 of 4 layers in float: layers.0. .*allow max_d.*0.4"
    )
    with pytest.raises(AccuracyError, match=match + ", or raise max_float_layers=1") as caught:
        guard(pair(4), Evaluate(additive(harms)), max_drop=0.25, max_float_layers=1)
    assert caught.value.best.kept == ("layers.0",)
    with pytest.raises(AccuracyError, match=r"at most 0 layers in float. The best .* with no layer in float"):
        guard(pair(4), Evaluate(additive(harms)), max_drop=0.25, max_float_layers=0)


def test_a_single_layer_cannot_be_given_up() -> None:
    with pytest.raises(AccuracyError, match="with no layer in float"):
        guard(pair(1), Evaluate(additive([0.5])))


def test_an_evaluation_that_gives_other_values_each_time_is_found_out() -> None:
    values = iter([1.0, 0.5, *[0.5, 1.0] * 2, 0.7, 0.7])
    models = pair(2)
    with pytest.raises(AccuracyError, match=r"found a model with metric 1, but evaluated once more it has 0.[57]: "):
        guard(models, lambda model: next(values))
    assert in_float(models[1]) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [2, 4, 6])
def test_an_interruption_leaves_the_model_quantized_and_its_mode_as_it_was(error: Any, after: int) -> None:
    models = pair(4)
    models[0].train()
    models[0].layers[2].eval()
    evaluate = Evaluate(additive([0.0, 0.4, 0.0, 0.0]))

    def breaks(model: nn.Module) -> float:
        if len(evaluate.seen) == after:
            raise error
        return evaluate(model)

    with pytest.raises(error):
        guard(models, breaks)
    assert in_float(models[1]) == []
    assert [layer.training for layer in models[0].layers] == [True, True, False, True]
    assert not models[1].training
    assert not models[0]._forward_pre_hooks


def test_modes_and_random_state_are_as_before_and_nothing_is_shared() -> None:
    models = pair(4)
    models[1].train()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    draws: list[float] = []
    evaluate = Evaluate(additive([0.0, 0.4, 0.0, 0.0]))

    def draw(model: nn.Module) -> float:
        draws.append(float(torch.rand(1)))
        return evaluate(model)

    assert guard(models, draw).kept == ("layers.1",)
    assert torch.equal(torch.rand(1), expected)
    assert len(set(draws)) == 1, "each model sees the same random numbers"
    assert all(module.training for module in models[1].modules())
    assert models[0].training
    assert {id(p) for p in models[0].parameters()}.isdisjoint(id(p) for p in models[1].parameters())
    assert models[1].layers[1].weight.data_ptr() != models[0].layers[1].weight.data_ptr()
    assert torch.equal(models[1].layers[1].weight, models[0].layers[1].weight)


def test_float_layers_come_from_the_donor() -> None:
    """An equalized model: the same function, but each layer's weights are other ones."""

    class Relu(Chain):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layers[1](torch.relu(self.layers[0](x)))}

    model, donor = Relu(2), Relu(2)
    with torch.no_grad():
        donor.layers[0].weight.mul_(8.0)
        donor.layers[0].bias.mul_(8.0)
        donor.layers[1].weight.div_(8.0)
    x = torch.randn(16, 4)
    torch.testing.assert_close(model(x), donor(x))

    def evaluate(candidate: nn.Module) -> float:
        candidate(x)
        return 1.0 if type(candidate.layers[0]) is nn.Linear else 0.0  # type: ignore[index]

    quantized = quantize_dynamic(donor, "int8_weight_only", progress=False)
    match = r"weight of layers.0 is not that of the float model: they differ by -?\d+.\d dB .*Pass the float"
    with pytest.raises(ValueError, match=match):
        guard((model, quantized), pytest.fail)
    result = guard((model, quantized), evaluate, donor=donor)
    assert result.kept == ("layers.0",)
    assert torch.equal(quantized.layers[0].weight, donor.layers[0].weight)
    assert quantized.layers[0].weight is not donor.layers[0].weight


def test_layers_that_share_a_weight_go_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.last.weight = self.first.weight

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.last(self.other(self.first(x))),)

    def evaluate(model: nn.Module) -> float:
        model(torch.ones(2, 4))
        return 0.0 if "last" in quantized_modules(model) else 1.0

    model = Tied()
    quantized = quantize_dynamic(model, "int8_weight_only", targets=["*"], progress=False)
    with pytest.raises(AccuracyError, match="at most 1 layers"):
        guard((model, quantized), evaluate, max_float_layers=1)
    result = guard((model, quantized), evaluate, max_float_layers=2)
    assert result.kept == ("first", "last")
    assert quantized.first.weight is quantized.last.weight
    assert quantized.first.weight is not model.first.weight
    tied = next(layer for layer in result.sensitivity if layer.name == "first + last")
    # One float weight of 16 values against one int8 weight, and a scale for each of 4 rows in both modules.
    assert tied.bytes_saved == 16 * 4 - 16 - 2 * 4 * 4
    assert [point.float_layers for point in result.curve] == [0, 1, 2, 3]


def test_sizes_are_those_of_the_states() -> None:
    models = pair(4)

    def size(model: nn.Module) -> int:
        return sum(value.nbytes for value in model.state_dict().values())

    quantized = size(models[1])
    result = guard(models, Evaluate(additive([0.0, 0.4, 0.0, 0.3])))
    sizes = {point.float_layers: point.size for point in result.curve}
    assert sizes[0] == quantized
    assert sizes[2] == size(models[1])
    assert sizes[4] == size(models[0])
    assert {layer.bytes_saved for layer in result.sensitivity} == {16 * 4 - 16 - 4 * 4}


def test_float_layers_take_the_dtype_of_the_quantized_model() -> None:
    model = Chain(3)
    quantized = quantize_dynamic(Chain(3).to(torch.bfloat16), "int8_weight_only", progress=False)
    result = guard((model, quantized), Evaluate(additive([0.0, 0.5, 0.0])))
    assert result.kept == ("layers.1",)
    assert quantized.layers[1].weight.dtype == torch.bfloat16
    assert model.layers[1].weight.dtype == torch.float32


@pytest.mark.parametrize("returned", [0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), 1])
def test_numbers_of_any_library(returned: Any) -> None:
    assert guard(pair(2), lambda model: {"accuracy": returned}).float_value in (0.5, 1.0)


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (None, TypeError, "`evaluate` returned None as metric; needed: a number"),
        (True, TypeError, "`evaluate` returned True as metric"),
        ("0.5", TypeError, "`evaluate` returned '0.5' as metric"),
        (np.zeros(2), TypeError, r"`evaluate` returned array\(\[0., 0.\]\) as metric"),
        (math.nan, ValueError, "metric of the float model is nan: nothing can be held"),
        (math.inf, ValueError, "metric of the float model is inf"),
        ({}, ValueError, "returned nothing. Say which"),
        (
            {"eval_f1": 1.0, "eval_accuracy": 1.0, "eval_runtime": 2.0},
            ValueError,
            "returned f1, accuracy. Say which of",
        ),
    ],
)
def test_what_evaluate_must_not_return(returned: Any, error: type[Exception], match: str) -> None:
    models = pair(2)
    with pytest.raises(error, match=match):
        guard(models, lambda model: returned)
    assert in_float(models[1]) == []


def test_a_metric_that_is_not_returned_is_found_before_any_search() -> None:
    calls: list[nn.Module] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        calls.append(model)
        return {"eval_accuracy": 1.0, "eval_f1": 1.0}

    match = (
        "metric 'acuracy' is not among what `evaluate` returned; did you mean 'accuracy'.*It returned: accuracy, f1"
    )
    with pytest.raises(ValueError, match=match):
        guard(pair(2), evaluate, metric="acuracy")
    assert len(calls) == 1


def test_nan_of_a_quantized_model_is_an_error_and_infinite_loss_only_bad() -> None:
    models = pair(3)
    with pytest.raises(ValueError, match=r"metric of the quantized model is nan \(1 of the float model\)"):
        guard(models, Evaluate(lambda quantized: math.nan if quantized else 1.0))
    with pytest.raises(ValueError, match="metric of a partly quantized model is nan"):
        guard(models, Evaluate(lambda quantized: math.nan if len(quantized) == 1 else 1.0 - len(quantized)))
    with pytest.raises(ValueError, match="metric of the quantized model is inf"):
        guard(models, Evaluate(lambda quantized: math.inf if quantized else 1.0))
    assert in_float(models[1]) == []
    result = guard(models, Evaluate(lambda q: math.inf if 1 in q else 1.0), metric="loss")
    assert result.kept == ("layers.1",)


@pytest.mark.parametrize("max_drop", [-0.1, math.nan, math.inf, True, "0.01", None])
def test_bad_max_drop(max_drop: Any) -> None:
    with pytest.raises(ValueError, match=r"`max_drop` is .*; allowed: a finite number of at least 0.*max_drop=0.01"):
        guard(pair(2), pytest.fail, max_drop=max_drop)


@pytest.mark.parametrize("limit", [-1, True, 1.5, "2"])
def test_bad_max_float_layers(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"`max_float_layers` is .*; allowed: a whole number of at least 0"):
        guard(pair(2), pytest.fail, max_float_layers=limit)


@pytest.mark.parametrize(("batches", "found"), [([], "no batch"), ([torch.ones(2)], "a Tensor")])
def test_bad_batches(batches: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"`batches` holds {found}; needed: at least one dict"):
        guard(pair(2), pytest.fail, batches=batches)


def test_bad_models() -> None:
    model, quantized = pair(3)
    with pytest.raises(ValueError, match=r"`quantized_model` \(Chain\) has no quantized module. Quantize it first"):
        guard((model, model), pytest.fail)
    with pytest.raises(ValueError, match=r"`float_model` has 3 quantized modules, such as layers.0. Pass the float"):
        guard((quantized, quantized), pytest.fail)
    with pytest.raises(ValueError, match="`donor` has 3 quantized modules"):
        guard((model, quantized), pytest.fail, donor=quantized)
    with pytest.raises(ValueError, match=r"layers.2 is quantized .* of shape \(4, 4\), but the float model has no"):
        guard((Chain(2), quantized), pytest.fail)
    with pytest.raises(ValueError, match=r"layers.0 .* but the float model has one of shape \(6, 6\)"):
        guard((Chain(3, 6), quantized), pytest.fail)
    with pytest.raises(TypeError, match="`evaluate` is a float; needed: a function that takes a model"):
        guard((model, quantized), 0.5)


def test_sensitivity_without_batches_is_that_of_the_weights() -> None:
    model = Chain(3, 32)
    layers = Layers(_quantized_by(model, {"*": "int8_weight_only", "layers.1": "int4_weight_only"}), model)
    decibels = layer_sensitivity(layers, [])
    assert decibels[1] + 15 < min(decibels[0], decibels[2])
    assert decibels[1] == pytest.approx(sqnr(model.layers[1].weight, layers.quantized["layers.1"].weight), abs=1e-3)


def test_padding_does_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
            return (self.first(x) + self.second(x),)

    model = Tokens()
    layers = Layers(quantize_dynamic(model, "int8_weight_only", progress=False), model)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    quiet = torch.randn(2, 3, 4)
    loud = torch.where(mask[..., None].bool(), quiet, 1000 * quiet)
    found = [layer_sensitivity(layers, [{"x": x, "attention_mask": mask}]) for x in (quiet, loud)]
    assert found[0] == found[1]
    assert found[0] != layer_sensitivity(layers, [{"x": loud, "attention_mask": torch.ones_like(mask)}])


def test_the_first_calls_are_kept_as_keywords() -> None:
    model, batches = Chain(2), []  # type: tuple[Chain, list[dict[str, Any]]]
    with record_batches(model, batches):
        for rows in (20, 10, 10, 2, 1, 1):
            model(torch.full((rows, 4), float(rows)))
        model(x=torch.ones(1, 4))
    model(torch.ones(1, 4))
    assert [len(batch["x"]) for batch in batches] == [20, 10, 2], "32 rows are enough"
    batches.clear()
    with record_batches(model, batches):
        for _ in range(6):
            model(torch.ones(50, 4))
    assert len(batches) == 1, "the first, however large"


def test_printed() -> None:
    result = guard(
        pair(12), Evaluate(additive([0.3 if index == 4 else 0.0 for index in range(12)])), metric="accuracy"
    )
    lines = str(result).splitlines()
    assert lines[0].startswith("accuracy: float 1, now 1; worse by 0, allowed 0.01; 1 of 12 quantized layers are back")
    row = next(line.split() for line in lines if "layers.4" in line)
    assert (row[0], row[2:]) == ("layers.4", ["-0.3", "0.00", "float"])
    assert sum(line.split()[-1:] == ["quantized"] for line in lines) == 10, "nine rows, and the caption"
    assert "and 2 less sensitive ones, quantized" in str(result)
    curve = [line.split() for line in lines[lines.index("Trade-off: the best of each number") :]]
    assert ["0", "0.00", "0.7"] in curve
    assert ["12", "0.00", "1"] in curve
    assert "all layers stay quantized (2 evaluations)" in str(guard(pair(2), Evaluate(additive([0.0, 0.0]))))
