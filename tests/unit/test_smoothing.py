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


class Gated(nn.Module):
    """The feed-forward block of a language model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.gate, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def _typical_error(model: Gated, rows: Tensor, reference: Tensor) -> float:
    """Mean relative error of the outputs of all tokens but the first."""
    got = quantize(model, "int8_dynamic", targets=["down"], progress=False)(rows)
    errors = (got - reference).square().sum(-1) / reference.square().sum(-1)
    return float(errors[0, 1:].mean())


def test_a_giant_token_does_not_choose_for_all_others() -> None:
    ratios = []
    for seed in range(5):
        model, rows = Gated(seed).eval(), torch.randn(1, 200, 16)
        rows[:, 0] *= 300
        reference = model(rows).detach()
        smoothed = copy.deepcopy(model)
        smooth(smoothed, [{"x": rows}], {"down": get_scheme("int8_dynamic")})
        ratios.append(_typical_error(smoothed, rows, reference) / _typical_error(model, rows, reference))
    assert max(ratios) < 1.05, "by the sum of squares alone this was hundreds of times worse"


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
