"""SmoothQuant with a searched exponent: the float function stays, the quantized error falls."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_quant import quantize
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.quantization.smoothing import smooth
from hf_quant.schemes import Scheme, get_scheme
from tests.tiny import Sentences, logits, tiny_bert

from .test_equalization import batches, names_of, outliers


def schemes_of(model: nn.Module, scheme: str) -> dict[str, Scheme]:
    return dict.fromkeys(names_of(model), get_scheme(scheme))


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int4_dynamic", "int4_weight_only"])
def test_the_function_stays_and_the_quantized_model_gains(scheme: str) -> None:
    gains = []
    for seed in range(3):
        model = outliers(seed)
        expected = logits(model)
        plain = sqnr(expected, logits(quantize(model, scheme, batches(), progress=False)))
        smoothed = copy.deepcopy(model)
        done = smooth(smoothed, batches(), schemes_of(smoothed, scheme))
        assert done
        assert sqnr(expected, logits(smoothed)) > 100
        gains.append(sqnr(expected, logits(quantize(smoothed, scheme, batches(), progress=False))) - plain)
    # One range for all tokens suffers most from channels that are large in all of them.
    assert sum(gains) / 3 > {"int8_static": 3.0, "int8_dynamic": 1.0}.get(scheme, 0.2)
    assert scheme != "int8_static" or min(gains) > 1.0


def test_quantize_calls_it() -> None:
    model = outliers()
    smoothed = copy.deepcopy(model)
    smooth(smoothed, batches(), schemes_of(smoothed, "int8_static"))
    expected = quantize(smoothed, "int8_static", batches(), progress=False)
    got = quantize(model, "int8_static", batches(), equalize="smoothquant", progress=False)
    assert torch.equal(logits(got), logits(expected))


class Giant(nn.Module):
    """A norm and a layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16, elementwise_affine=True)
        self.layer = nn.Linear(16, 8)
        with torch.no_grad():
            self.norm.weight[3] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


def _layer_error(model: Giant, rows: Tensor, scheme: str) -> Tensor:
    """Relative error of each token's output."""
    expected = model(rows)
    got = quantize(model, scheme, [{"x": rows}], targets=["layer"], progress=False)(rows)
    return ((got - expected).square().sum(-1) / expected.square().sum(-1)).detach().flatten()


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_typical_tokens_choose_and_not_the_giant_ones(scheme: str) -> None:
    model, rows = Giant().eval(), torch.randn(1, 200, 16)
    smoothed = copy.deepcopy(model)
    assert list(smooth(smoothed, [{"x": rows}], {"layer": get_scheme(scheme)})) == ["norm"]
    before, after = _layer_error(model, rows, scheme), _layer_error(smoothed, rows, scheme)
    assert after.mean() < before.mean()
    assert scheme == "int8_dynamic" or after.median() < 0.5 * before.median()


def test_no_group_and_no_gain_leave_the_model_alone() -> None:
    model = tiny_bert().eval()
    names: Sequence[str] = ["bert.encoder.layer.0.attention.self.query"]  # post-norm: its input also feeds a residual
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert smooth(model, [Sentences(4).batch(4)], dict.fromkeys(names, get_scheme("int8_dynamic"))) == {}
    assert smooth(model, [Sentences(4).batch(4)], {}) == {}
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_bad_options_are_refused() -> None:
    model = outliers()
    with pytest.raises(ValueError, match="grid is 1, but alpha goes from 0 to 1 in at least 2 steps"):
        smooth(model, batches(), schemes_of(model, "int8_dynamic"), grid=1)
    with pytest.raises(ValueError, match="there is no batch to observe activations with"):
        smooth(model, [], schemes_of(model, "int8_dynamic"))
