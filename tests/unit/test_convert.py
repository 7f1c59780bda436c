"""Convert: the proof on real batches, and what becomes of a model when it fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.quantization.convert import Conversion, ParityError, convert_qat
from hf_quant.quantization.qat import QATLinear, QATState, prepare
from hf_quant.runtime.modules import Int8Linear
from hf_quant.schemes import SCHEMES
from hf_quant.targets import Selection, select_modules
from tests.tiny import INT8_SCHEMES


class Network(nn.Module):
    """Two layers; a subclass changes what comes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.sum(), "logits": self.second(self.first(x).relu())}


def _trained(model: nn.Module, scheme: str = "int8_static") -> tuple[QATState, Selection]:
    selection = select_modules(model)
    state = prepare(model, SCHEMES[scheme], selection)
    state.observing = state.fake_quantizing = True
    for seed in range(3):
        model.train()(x=torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)))
    state.observing = False
    return state, selection


def _convert(model: nn.Module, scheme: str = "int8_static", **kwargs: Any) -> Conversion:
    state, selection = _trained(model, scheme)
    return convert_qat(model, state, SCHEMES[scheme], selection, list(state.inputs), **kwargs)


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_what_is_reported(scheme: str) -> None:
    steps: list[int] = []
    result = _convert(Network(), scheme, progress=lambda: steps.append(1))
    assert result.scheme is SCHEMES[scheme]
    assert result.quantized == {"first": "linear", "second": "linear"}
    assert set(result.layer_sqnr) == set(result.error_sqnr) == {"first", "second"}
    assert min(result.layer_sqnr.values()) > 100
    assert all(30 < decibels < 60 for decibels in result.error_sqnr.values())
    assert len(steps) == 2


def test_hooks_and_switches_are_taken_off() -> None:
    model = Network()
    _convert(model)
    assert not model._forward_pre_hooks
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    model = Network()
    state, selection = _trained(model)
    model.train(training)
    convert_qat(model, state, SCHEMES["int8_static"], selection, list(state.inputs))
    assert all(module.training is training for module in model.modules())


def test_without_batches_there_is_no_proof_but_a_model() -> None:
    model = Network()
    state, selection = _trained(model)
    result = convert_qat(model, state, SCHEMES["int8_static"], selection, [])
    assert result.layer_sqnr == {}
    assert result.logits_sqnr is None
    assert isinstance(model.first, Int8Linear)


@pytest.mark.parametrize("wrong", ["weight_scale", "bias", "input_scale", "weight"])
def test_a_wrong_layer_is_found_and_nothing_is_changed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per cent of a scale, one int8 step of every weight: either is far below the bar."""
    original = Int8Linear.from_float

    def broken(*args: Any, **kwargs: Any) -> Int8Linear:
        module = original(*args, **kwargs)
        if module.out_features == 4:
            buffer = module._buffers[wrong]
            assert buffer is not None
            changed = buffer.clamp(max=126) + 1 if wrong == "weight" else buffer * 1.01
            module._buffers[wrong] = changed + (0.01 if wrong == "bias" else 0)
        return module

    monkeypatch.setattr(Int8Linear, "from_float", broken)
    model = Network()
    state, selection = _trained(model)
    before = copy.deepcopy(model.state_dict())
    flags = state.observing, state.fake_quantizing
    with pytest.raises(ParityError, match=r"second: int8 and fake-quant differ by \d+\.\d dB \(at least 60 dB"):
        convert_qat(model, state, SCHEMES["int8_static"], selection, list(state.inputs))
    assert isinstance(model.first, QATLinear)
    assert isinstance(model.second, QATLinear)
    assert (state.observing, state.fake_quantizing) == flags
    assert model.training
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    monkeypatch.undo()
    convert_qat(model, state, SCHEMES["int8_static"], selection, list(state.inputs))
    assert isinstance(model.second, Int8Linear)


def test_weights_that_are_not_finite_change_nothing() -> None:
    model = Network()
    state, selection = _trained(model)
    model.second.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the weight of second holds 1 NaN or infinite values of 64"):
        convert_qat(model, state, SCHEMES["int8_static"], selection, list(state.inputs))
    assert isinstance(model.first, QATLinear)


def test_nothing_observed_at_all() -> None:
    model = Network()
    selection = select_modules(model)
    state = prepare(model, SCHEMES["int8_static"], selection)
    with pytest.raises(ValueError, match=r"no layer has an activation range: nothing was observed in training mode"):
        convert_qat(model, state, SCHEMES["int8_static"], selection, [])
    assert isinstance(model.first, QATLinear)


class Drawing(Network):
    """Masks at random, in evaluation too, as masked autoencoders do."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = super().forward(x)
        return {**output, "logits": output["logits"] * (torch.rand_like(output["logits"]) > 0.5)}


def test_models_that_draw_random_numbers_are_proven_on_equal_draws() -> None:
    model = Drawing()
    state, selection = _trained(model)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    result = convert_qat(model, state, SCHEMES["int8_static"], selection, list(state.inputs))
    assert result.logits_sqnr is not None
    assert result.logits_sqnr > 60
    assert torch.equal(torch.rand(3), expected), "and the program's own numbers go on undisturbed"


class Masked(Network):
    """Leaves no chance to a class that is not to be predicted."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = super().forward(x)
        output["logits"][:, 0] = float("-inf")
        return output


def test_masked_logits_do_not_spoil_the_proof() -> None:
    result = _convert(Masked())
    assert result.logits_sqnr is not None
    assert 60 < result.logits_sqnr < float("inf")
