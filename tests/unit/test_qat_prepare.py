"""Preparing a model: QAT modules on the float model's own Parameters, and what they watch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from hf_quant.quantization.convert import float_module
from hf_quant.quantization.qat import QAT_MODULES, QATLinear, QATState, prepare, qat_modules
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules
from tests.tiny import Sentences, tiny_bert, tiny_gpt2, tiny_llama

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))
makers = pytest.mark.parametrize("maker", [tiny_bert, tiny_llama, tiny_gpt2])
seeds = st.integers(0, 2**16)


def _prepared(model: nn.Module, scheme: str = "int8_static", **options: object) -> QATState:
    return prepare(model, SCHEMES[scheme], select_modules(model, **options))  # type: ignore[arg-type]


@makers
@schemes
def test_parameters_are_the_same_objects_of_the_same_names(maker: object, scheme: str) -> None:
    model = maker()  # type: ignore[operator]
    before = dict(model.named_parameters(remove_duplicate=False))
    keys = set(model.state_dict())
    _prepared(model, scheme)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert {key for key in set(model.state_dict()) - keys if "activation_fake_quant.observer." not in key} == set()


@makers
def test_every_selected_module_is_swapped_and_no_other(maker: object) -> None:
    model = maker()  # type: ignore[operator]
    selection = select_modules(model)
    prepare(model, SCHEMES["int8_static"], selection)
    assert set(qat_modules(model)) == set(selection.quantized)
    assert {type(module) for module in qat_modules(model).values()} <= set(QAT_MODULES)


@makers
@pytest.mark.parametrize("training", [True, False])
def test_before_the_start_it_computes_what_it_did(maker: object, training: bool) -> None:
    model = maker().train(training)  # type: ignore[operator]
    batch = Sentences().batch()
    torch.manual_seed(3)
    expected = model(**batch).logits
    _prepared(model)
    torch.manual_seed(3)
    assert torch.equal(model(**batch).logits, expected)
    assert all(module.training is training for module in model.modules())


def test_ranges_move_in_training_mode_and_while_observing_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    state = _prepared(model)
    observer = model[0].activation_fake_quant.observer
    for observing, training, moved in ((False, True, False), (True, False, False), (True, True, True)):
        observer.reset()
        state.observing = observing
        model.train(training)(torch.randn(2, 4))
        assert bool(observer.num_batches) is moved


def test_padding_is_kept_out_of_the_ranges() -> None:
    model = tiny_bert().train()
    state = _prepared(model)
    state.observing = state.fake_quantizing = True
    batch = Sentences().batch(2)
    batch["attention_mask"][:, 5:] = 0
    torch.manual_seed(0)
    model(**batch)
    ranges = [module.activation_fake_quant.observer for module in _linears(model)]
    before = [(float(observer.min_val), float(observer.max_val)) for observer in ranges]

    for observer in ranges:
        observer.reset()
    batch["input_ids"][:, 5:] = 90  # other padding: nothing that is attended to changes
    torch.manual_seed(0)
    model(**batch)
    for observer, (low, high) in zip(ranges, before, strict=True):
        assert float(observer.min_val) == pytest.approx(low, rel=1e-5)
        assert float(observer.max_val) == pytest.approx(high, rel=1e-5)


def test_positional_and_keyword_arguments_are_kept_for_the_proof() -> None:
    model = tiny_bert()
    state = _prepared(model)
    batch = Sentences().batch(2)
    for _ in range(3):
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert len(state.inputs) == 2, "the last two only"
    assert torch.equal(state.inputs[-1]["input_ids"], batch["input_ids"])
    assert torch.equal(state.masks[0], batch["attention_mask"].bool())


def test_arguments_with_a_used_cache_are_not_kept_for_the_proof() -> None:
    """Each forward appends to it, so fake-quant and int8 would not be given the same."""
    model = tiny_llama().eval()
    state = _prepared(model)
    batch = Sentences().batch(2)
    model(**batch)
    model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert state.inputs
    assert all(kept.get("past_key_values") is None for kept in state.inputs)


def test_a_deep_copy_has_switches_of_its_own() -> None:
    model = tiny_bert()
    state = _prepared(model)
    twin = copy.deepcopy(model)
    state.fake_quantizing = True
    assert not next(iter(qat_modules(twin).values())).state.fake_quantizing
    twin(**Sentences().batch(2))
    assert not state.inputs


def test_hooks_of_users_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    _prepared(model)
    model(torch.randn(2, 4))
    assert seen == [1]


def test_float_module_gives_back_what_was_there() -> None:
    model = tiny_gpt2()
    before = {name: type(module) for name, module in model.named_modules()}
    weights = {name: model.get_submodule(name).weight for name in select_modules(model).quantized}
    _prepared(model)
    for name, module in qat_modules(model).items():
        restored = float_module(module)
        assert type(restored) is before[name]
        assert restored.weight is weights[name]
        assert set(restored.state_dict()) <= {"weight", "bias"}
        assert not {"state", "scheme", "activation_fake_quant"} & set(vars(restored))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_swapped(bad: float) -> None:
    model = tiny_bert()
    model.bert.pooler.dense.weight.data[3, 4] = bad
    with pytest.raises(
        ValueError,
        match=r"the weight of bert\.pooler\.dense holds 1 NaN or infinite values of 1024, so",
    ):
        _prepared(model)
    assert not qat_modules(model)


def test_a_module_that_hangs_in_two_places_is_swapped_in_both() -> None:
    """As the class heads of Deformable DETR: one module, many names."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    _prepared(model)
    assert isinstance(model["first"], QATLinear)
    assert model["second"] is model["first"]


def _linears(model: nn.Module) -> list[QATLinear]:
    return [module for module in model.modules() if isinstance(module, QATLinear)]
