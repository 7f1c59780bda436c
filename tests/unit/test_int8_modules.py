"""What the int8 modules are beside their arithmetic: buffers, copies, dtypes, and no training."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_quant import quantize_dynamic
from hf_quant.qparams import dequantize, symmetric_scale
from hf_quant.quantization.convert import convert_module
from hf_quant.quantization.fake_quantize import fake_quantize_symmetric
from hf_quant.runtime import kernels
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import onednn_is_exact, use_kernel
from hf_quant.runtime.modules import Int8Embedding, Int8Linear
from hf_quant.schemes import SCHEMES

BOUNDS = (torch.tensor(-2.0), torch.tensor(3.0))
schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))


def _linear(scheme: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator).to(dtype)
    bias = torch.randn(6, generator=generator).to(dtype)
    return Int8Linear.from_float(weight, bias, SCHEMES[scheme], BOUNDS)


def _values(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize(
    ("scheme", "buffers"),
    [
        ("int8_dynamic", {"weight": (6, 16), "weight_scale": (6, 1), "bias": (6,)}),
        ("int8_weight_only", {"weight": (6, 16), "weight_scale": (6, 1), "bias": (6,)}),
        (
            "int8_static",
            {"weight": (6, 16), "weight_scale": (6, 1), "bias": (6,), "input_scale": (1,), "input_zero_point": (1,)},
        ),
    ],
)
def test_names_and_shapes_are_the_layouts(scheme: str, buffers: dict[str, tuple[int, ...]]) -> None:
    layer = _linear(scheme)
    state = layer.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == buffers
    assert not list(layer.parameters())
    assert {name for name, value in state.items() if value.dtype == torch.int8} == {
        name for name in ("weight", "input_zero_point") if name in buffers
    }


def test_no_bias_is_no_buffer() -> None:
    layer = Int8Linear.from_float(torch.randn(3, 4), None, SCHEMES["int8_dynamic"])
    assert set(layer.state_dict()) == {"weight", "weight_scale"}
    assert layer(torch.randn(2, 4)).shape == (2, 3)


@schemes
def test_weight_is_fake_quants(scheme: str) -> None:
    weight = torch.randn(6, 16)
    layer = Int8Linear.from_float(weight, None, SCHEMES[scheme], BOUNDS)
    assert torch.equal(dequantize(layer.int8_weight, layer.weight_scale), fake_quantize_symmetric(weight, (-1,)))


@schemes
def test_weight_read_from_outside_is_the_float_one(scheme: str) -> None:
    """Models multiply by it, or cast to its dtype; a Conv1D's is (in, out), as its float one was."""
    weight = torch.randn(6, 16)
    linear = Int8Linear.from_float(weight, None, SCHEMES[scheme], BOUNDS)
    conv1d = Int8Linear.from_float(weight.t(), None, SCHEMES[scheme], BOUNDS, transposed=True)
    table = Int8Embedding.from_float(weight)
    expected = fake_quantize_symmetric(weight, (-1,))
    assert torch.equal(linear.weight, expected)
    assert torch.equal(conv1d.weight, expected.t())
    assert torch.equal(table.weight, expected)
    assert linear.state_dict()["weight"].dtype == torch.int8


def test_static_scheme_needs_a_range() -> None:
    with pytest.raises(ValueError, match=r"scheme 'int8_static' needs the range of the inputs: pass `input_range`"):
        Int8Linear.from_float(torch.randn(3, 4), None, SCHEMES["int8_static"])


@schemes
def test_conv1d_becomes_the_linear_of_its_transpose(scheme: str) -> None:
    conv = Conv1D(6, 16)
    nn.init.normal_(conv.bias)
    linear = nn.Linear(16, 6)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    ours = Int8Linear.from_float(conv.weight, conv.bias, SCHEMES[scheme], BOUNDS, transposed=True)
    twin = Int8Linear.from_float(linear.weight, linear.bias, SCHEMES[scheme], BOUNDS)
    assert ours.transposed
    assert not twin.transposed
    assert torch.equal(ours(_values()), twin(_values()))


@schemes
def test_deepcopy_shares_nothing_and_computes_the_same(scheme: str) -> None:
    layer = _linear(scheme).eval()
    expected = layer(_values())  # packs the weight for oneDNN
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(_values()), expected)
    layer.int8_weight.zero_()
    assert torch.equal(twin(_values()), expected)


@schemes
def test_state_dict_loaded_after_packing_takes_effect(scheme: str) -> None:
    first, second = _linear(scheme, seed=0), _linear(scheme, seed=1)
    expected = second(_values())
    assert not torch.equal(first(_values()), expected)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(_values()), expected)


@schemes
def test_state_dict_assigned_after_packing_takes_effect(scheme: str) -> None:
    first, second = _linear(scheme, seed=0), _linear(scheme, seed=1)
    first(_values())
    first.load_state_dict(second.state_dict(), assign=True)
    assert torch.equal(first(_values()), second(_values()))


@schemes
def test_state_dict_loaded_into_a_parent_after_packing_takes_effect(scheme: str) -> None:
    first, second = nn.Sequential(_linear(scheme, seed=0)), nn.Sequential(_linear(scheme, seed=1))
    first(_values())
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(_values()), second(_values()))


def test_float_weights_are_not_cast_into_it() -> None:
    """A float checkpoint in an int8 model: weights below one would all become 0."""
    linear = quantize_dynamic(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 6)), progress=False)
    embedding = quantize_dynamic(nn.Sequential(nn.LayerNorm(16), nn.Embedding(6, 16)), progress=False)
    for model, twin in ((linear, nn.Linear(16, 6)), (embedding, nn.Embedding(6, 16))):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        norm = nn.LayerNorm(16)
        nn.init.normal_(norm.weight)
        with pytest.raises(RuntimeError, match=r"1\.weight.*float32.*int8"):
            model.load_state_dict(nn.Sequential(norm, twin).state_dict(), strict=False)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_tensors_put_in_by_assignment_take_effect() -> None:
    """As accelerate and the loader of transformers do."""
    first, second = _linear("int8_static", seed=0), _linear("int8_static", seed=1)
    first(_values())
    for name, value in second.named_buffers():
        setattr(first, name, value.clone())
    assert torch.equal(first(_values()), second(_values()))


@schemes
def test_casting_after_packing_takes_effect(scheme: str) -> None:
    """`.to(bfloat16)` rounds scales and bias; the int8 weight stays the same tensor."""
    layer, fresh = _linear(scheme), _linear(scheme).bfloat16()
    layer(_values())
    layer.bfloat16()
    assert layer.int8_weight.dtype == torch.int8
    assert torch.equal(layer(_values()), fresh(_values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@schemes
def test_half_precision_inputs_come_back_as_they_came(scheme: str, dtype: torch.dtype) -> None:
    layer = _linear(scheme, dtype=dtype)
    got = layer(_values(dtype))
    assert got.dtype == dtype
    with use_kernel("reference"):
        expected = layer(_values(dtype))
    assert expected.dtype == dtype
    # Sums of 16 products in the input's precision against sums in float32, rounded once.
    noise = (got.float() - expected.float()).abs().max()
    assert noise <= 2**3 * torch.finfo(dtype).eps * expected.float().abs().max()


@schemes
def test_half_precision_input_of_a_float32_layer(scheme: str) -> None:
    layer = _linear(scheme)
    got = layer(_values(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    expected = layer(_values(torch.bfloat16).float())
    assert (got.float() - expected).abs().max() <= 2**-6 * expected.abs().max()


@schemes
def test_autocast_leaves_the_integers_alone(scheme: str) -> None:
    layer = _linear(scheme).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(_values())
    assert (got.float() - layer(_values())).abs().max() <= 2**-5 * layer(_values()).abs().max()


@schemes
def test_training_is_refused_in_words(scheme: str) -> None:
    layer = _linear(scheme).train()
    with pytest.raises(
        RuntimeError, match=r"int8 modules cannot be trained: .* Train the float checkpoint .* and quantize again"
    ):
        layer(_values().requires_grad_())


def test_a_network_of_int8_modules_alone_has_no_gradient_to_give() -> None:
    layer = nn.Sequential(_linear("int8_dynamic")).train()
    with pytest.raises(RuntimeError, match="does not require grad"):
        layer(_values()).sum().backward()


def test_embedding_rows_are_fake_quants() -> None:
    table = nn.Embedding(20, 8, padding_idx=3)
    module = Int8Embedding.from_float(table.weight, table.padding_idx)
    ids = torch.tensor([[0, 3, 19], [7, 7, 1]])
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "weight": (20, 8),
        "weight_scale": (20, 1),
    }
    assert torch.equal(module(ids), fake_quantize_symmetric(table.weight.detach(), (-1,))[ids])
    assert torch.equal(module(ids)[0, 1], torch.zeros(8))
    assert module.padding_idx == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embedding_returns_its_dtype(dtype: torch.dtype) -> None:
    module = Int8Embedding.from_float(torch.randn(5, 8).to(dtype))
    assert module(torch.tensor([1, 2])).dtype == dtype
    assert module.int8_weight.dtype == torch.int8


def test_embedding_of_nothing() -> None:
    module = Int8Embedding.from_float(torch.randn(5, 8))
    assert module(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 8)


def test_rows_of_zeros_stay_zeros() -> None:
    module = Int8Embedding.from_float(torch.zeros(3, 4))
    assert torch.equal(module(torch.arange(3)), torch.zeros(3, 4))


@pytest.mark.parametrize("training", [True, False])
def test_convert_keeps_the_mode(training: bool) -> None:
    for module in (nn.Linear(4, 4), nn.Embedding(4, 4), Conv1D(4, 4)):
        assert convert_module(module.train(training), SCHEMES["int8_dynamic"]).training is training


@schemes
def test_print_says_what_it_is(scheme: str) -> None:
    assert repr(_linear(scheme)) == f"Int8Linear(in_features=16, out_features=6, bias=True, scheme='{scheme}')"
    assert repr(Int8Embedding(4, 2)) == "Int8Embedding(4, 2)"


def test_int8_modules_are_found_by_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([_linear("int8_dynamic")])})
    assert list(quantized_modules(model)) == ["b.0"]


@schemes
def test_torch_compile_gives_the_same_numbers(scheme: str) -> None:
    layer = _linear(scheme).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), use_kernel("reference"):
        torch.testing.assert_close(compiled(_values()), layer(_values()), rtol=0, atol=1e-5)


@pytest.mark.skipif(not onednn_is_exact(), reason="this CPU or torch build has no exact oneDNN int8 product")
def test_a_saved_module_holds_no_packed_weight() -> None:
    layer = _linear("int8_static")
    before = save(layer.state_dict())
    layer(_values())
    assert save(layer.state_dict()) == before


def test_scale_of_every_channel_is_its_own() -> None:
    weight = torch.randn(6, 16) * torch.logspace(-3, 3, 6)[:, None]
    layer = Int8Linear.from_float(weight, None, SCHEMES["int8_dynamic"])
    assert torch.equal(layer.weight_scale, symmetric_scale(weight, (-1,)))
    assert (layer.int8_weight.abs().amax(-1) >= 127).all()


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_the_integer_product_compiles_as_it_does_on_cuda(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def chosen(device: str) -> str:
        seen.append(device)
        return "int_mm"

    monkeypatch.setattr(kernels, "_compiled_kernel", torch.compiler.assume_constant_result(chosen))
    layer = _linear(scheme).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(_values()), layer(_values()), rtol=0, atol=1e-5)
    assert seen == ["cpu"]
