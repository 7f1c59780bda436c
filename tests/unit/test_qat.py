"""Preparing a model: QAT modules on the float model's own Parameters, and what they compute in each phase."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_quant.qparams import calculate_qparams
from hf_quant.quantization.convert import float_module
from hf_quant.quantization.fake_quantize import fake_quantize, fake_quantize_symmetric
from hf_quant.quantization.qat import QAT_MODULES, QATConv1D, QATEmbedding, QATLinear, QATState, prepare, qat_modules
from hf_quant.runtime.kernels import Kernel, choose_kernel, onednn_is_exact, use_kernel
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules
from tests.tiny import Sentences, tiny_bert, tiny_gpt2, tiny_llama

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))
makers = pytest.mark.parametrize("maker", [tiny_bert, tiny_llama, tiny_gpt2])
seeds = st.integers(0, 2**16)


def _prepared(model: nn.Module, scheme: str = "int8_static", **options: object) -> QATState:
    return prepare(model, SCHEMES[scheme], select_modules(model, **options))  # type: ignore[arg-type]


@pytest.fixture
def reference() -> Iterator[None]:
    """Fake-quant in float, whatever this machine multiplies fastest."""
    with use_kernel("reference"):
        yield


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


@pytest.mark.usefixtures("reference")
def test_linear_is_float_linear_on_fake_quantized_weight_and_input() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    weight, bias = model[0].weight, model[0].bias
    state = _prepared(model)
    state.observing = state.fake_quantizing = True
    values = torch.randn(5, 8)
    got = model(values)
    qparams = calculate_qparams(values.min(), values.max(), symmetric=False)
    assert torch.equal(got, F.linear(fake_quantize(values, *qparams), fake_quantize_symmetric(weight, (-1,)), bias))


@pytest.mark.usefixtures("reference")
def test_conv1d_is_the_linear_of_its_transpose() -> None:
    gpt2 = tiny_gpt2()
    conv = gpt2.transformer.h[0].mlp.c_fc
    linear = nn.Sequential(nn.Linear(32, 128))
    linear[0].weight.data, linear[0].bias.data = conv.weight.data.t().clone(), conv.bias.data.clone()
    states = [_prepared(gpt2), _prepared(linear)]
    for state in states:
        state.observing = state.fake_quantizing = True
    values = torch.randn(2, 3, 32)
    assert isinstance(gpt2.transformer.h[0].mlp.c_fc, QATConv1D)
    assert torch.equal(gpt2.transformer.h[0].mlp.c_fc(values), linear(values))


def test_embedding_rows_are_fake_quantized() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=0))
    table = model[0].weight
    state = _prepared(model)
    ids = torch.tensor([[0, 9], [4, 4]])
    assert torch.equal(model(ids), table[ids])
    state.fake_quantizing = True
    got = model(ids)
    assert torch.equal(got, fake_quantize_symmetric(table, (-1,))[ids])
    got.sum().backward()
    assert table.grad[:, 0].tolist() == [0, 0, 0, 0, 2, 0, 0, 0, 0, 1], "padding gets no gradient"


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
@given(seeds, st.booleans(), st.sampled_from([(3,), (2, 3), (1, 1), (2, 1, 3)]), st.integers(1, 20), st.integers(1, 9))
def test_training_in_real_int8_has_fake_quants_values_and_gradients(
    scheme: str, seed: int, bias: bool, shape: tuple[int, ...], in_features: int, out_features: int
) -> None:
    """Where the machine multiplies integers in training, too: the default kernel against the reference."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    values = torch.randn(*shape, in_features, generator=generator)
    upstream = torch.randn(*shape, out_features, generator=generator)
    state = _prepared(model, scheme)
    state.fake_quantizing = True
    if scheme == "int8_static":
        model[0].activation_fake_quant.observer.observe(torch.tensor([-1.0, 1.5]))  # clips some of the values

    def run(kernel: Kernel) -> list[Tensor]:
        model.zero_grad()
        leaf = values.clone().requires_grad_()
        with use_kernel(kernel):
            output = model(leaf)
        output.backward(upstream)
        return [output.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]

    for got, expected in zip(run(choose_kernel(values.device)), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@schemes
def test_equal_inputs_of_several_layers_and_changed_ones(scheme: str) -> None:
    """Query, key and value read one tensor: what is remembered of it must not outlive a change in place."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    state = _prepared(model, scheme)
    state.observing = state.fake_quantizing = True
    values = torch.randn(3, 8)
    first, second = model[0](values), model[1](values)
    values.mul_(5)
    again = model[0](values)
    state.observing = False
    fresh = model[0](values.clone())
    torch.testing.assert_close(again, fresh)
    assert not torch.equal(first, again)
    assert first.shape == second.shape
    if scheme == "int8_static":
        one, two = (layer.activation_fake_quant.observer for layer in model)
        assert (int(one.num_batches), int(two.num_batches)) == (2, 1)
        assert float(one.max_val) == pytest.approx(float(two.max_val) * 3)  # mean of 1 and 5


@schemes
def test_inference_mode(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    state = _prepared(model, scheme)
    state.observing = state.fake_quantizing = True
    values = torch.randn(3, 8)
    expected = model(values)
    with torch.inference_mode():
        got = model.eval()(values.clone())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_a_frozen_layer_below_gets_and_asks_no_gradient(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    state = _prepared(model, scheme)
    state.observing = state.fake_quantizing = True
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", ["onednn", "reference"])
@schemes
def test_bfloat16_autocast_gives_bfloat16_and_float32_gradients(scheme: str, kernel: str) -> None:
    if kernel == "onednn" and not onednn_is_exact():
        pytest.skip("this CPU or torch build has no exact oneDNN int8 product")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    state = _prepared(model, scheme)
    state.observing = state.fake_quantizing = True
    with use_kernel(kernel), torch.autocast("cpu", dtype=torch.bfloat16):  # type: ignore[arg-type]
        output = model(torch.randn(3, 8))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(module.activation_fake_quant is None or module.activation_fake_quant.observer.min_val.dtype
               == torch.float32 for module in model)  # fmt: skip


@pytest.mark.parametrize("kernel", ["onednn", "reference"])
@schemes
def test_an_empty_batch_goes_through(scheme: str, kernel: str) -> None:
    """As for an expert that no token was sent to."""
    if kernel == "onednn" and not onednn_is_exact():
        pytest.skip("this CPU or torch build has no exact oneDNN int8 product")
    model = nn.Sequential(nn.Linear(8, 4))
    state = _prepared(model, scheme)
    state.observing = state.fake_quantizing = True
    with use_kernel(kernel):  # type: ignore[arg-type]
        model(torch.randn(2, 8))
        output = model(torch.empty(0, 8))
    assert output.shape == (0, 4)
    output.sum().backward()


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


@pytest.mark.parametrize("phase", ["before", "observing", "frozen"])
@schemes
def test_compiled_in_one_graph_it_computes_the_same(scheme: str, phase: str) -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).train()
    ids = torch.randint(0, 10, (2, 5))
    state = _prepared(model, scheme)
    assert isinstance(model[0], QATEmbedding)
    state.observing = state.fake_quantizing = True
    model(ids)
    state.observing, state.fake_quantizing = phase == "observing", phase != "before"
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with use_kernel("reference"):
        expected, got = model(ids), compiled(ids)
        expected.square().sum().backward()
        got.square().sum().backward()
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
