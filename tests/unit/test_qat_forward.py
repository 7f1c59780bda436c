"""What QAT modules compute: fake-quant, in float or in real int8, with the straight-through gradient."""

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
from hf_quant.quantization.fake_quantize import fake_quantize, fake_quantize_symmetric
from hf_quant.quantization.qat import QATConv1D, QATEmbedding, QATState, prepare
from hf_quant.runtime.kernels import Kernel, choose_kernel, onednn_is_exact, use_kernel
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules
from tests.tiny import INT8_SCHEMES, tiny_bert, tiny_gpt2, tiny_llama

schemes = pytest.mark.parametrize("scheme", INT8_SCHEMES)
makers = pytest.mark.parametrize("maker", [tiny_bert, tiny_llama, tiny_gpt2])
seeds = st.integers(0, 2**16)


def _prepared(model: nn.Module, scheme: str = "int8_static", **options: object) -> QATState:
    return prepare(model, SCHEMES[scheme], select_modules(model, **options))  # type: ignore[arg-type]


@pytest.fixture
def reference() -> Iterator[None]:
    """Fake-quant in float, whatever this machine multiplies fastest."""
    with use_kernel("reference"):
        yield


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


@schemes
def test_output_may_be_changed_in_place(scheme: str) -> None:
    """As Longformer scales its queries, and Wav2Vec2 masks its features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    state = _prepared(model, scheme)
    state.observing = state.fake_quantizing = True
    values = torch.randn(2, 3, 8, requires_grad=True)
    output = model(values)
    output /= 2.0
    output[:, 0] = 0.0
    output.sum().backward()
    changed = [values.grad.clone(), model[0].weight.grad.clone()]
    values.grad = None
    model.zero_grad()
    state.observing = False
    (model(values)[:, 1:] / 2.0).sum().backward()
    torch.testing.assert_close(changed, [values.grad, model[0].weight.grad])


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
