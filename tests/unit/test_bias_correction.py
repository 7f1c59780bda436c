"""Bias correction: exact on one layer, a gain on a whole model, and nothing done by halves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.quantization.bias_correction import correct_biases
from hf_quant.quantization.convert import convert_float
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.modules import Int8Linear
from hf_quant.schemes import get_scheme
from hf_quant.targets import select_modules
from tests.tiny import Sentences, int8_model, tiny_bert, tiny_gpt2, tiny_llama


def quantized_copy(model: nn.Module, scheme_name: str) -> Any:
    quantized = copy.deepcopy(model)
    scheme = get_scheme(scheme_name)
    convert_float(quantized, scheme, select_modules(quantized, embeddings=False, scheme=scheme))
    return quantized.eval()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.free = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, twice: bool = False) -> Tensor:
        x = torch.relu(self.first(x))
        if twice:
            x = torch.relu(self.first(x))
        return self.free(torch.relu(self.second(x)))


def outputs_of(model: nn.Module, name: str, **batch: Any) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model.eval()(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("scheme", ["int3_weight_only", "int8_dynamic"])
def test_mean_outputs_are_the_float_model_s_layer_by_layer(scheme: str) -> None:
    model, x = Chain(), torch.rand(40, 3, 32) + torch.rand(32)
    quantized = quantized_copy(model, scheme)
    names = ["first", "second", "free", "unused"]
    outputs_of(quantized, "first", x=x)  # a kernel may pack the bias here
    added = correct_biases(model, quantized, [{"x": x[:13]}, {"x": x[13:]}], names)
    assert list(added) == ["first", "second"]
    for name in added:
        expected = outputs_of(model, name, x=x).mean((0, 1))
        # Of corrected layers before it, through the kernel that serves the model.
        assert torch.allclose(outputs_of(quantized, name, x=x).mean((0, 1)), expected, atol=2e-6), name
        module = quantized.get_submodule(name)
        assert torch.allclose(module.bias, model.get_submodule(name).bias + added[name], atol=1e-6)
        assert added[name].abs().max() > 1e-5
    assert quantized.free.bias is None
    assert torch.equal(quantized.unused.bias, model.unused.bias)


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_one_layer_by_hand() -> None:
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.25, 0.5])
    layer = nn.Linear(2, 2)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    # Integers of 100 and 50 at a scale of 0.01: weights of 1 and 0.5 where the float model has 1 and 1.
    integers, scale = torch.tensor([[100, 0], [0, 50]], dtype=torch.int8), torch.full((2, 1), 0.01)
    quantized = One(Int8Linear.from_integers(integers, scale, bias, get_scheme("int8_weight_only"))).eval()
    added = correct_biases(One(layer), quantized, [{"x": torch.tensor([[1.0, 1.0], [5.0, 3.0]])}], ["layer"])
    assert added["layer"].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)  # half of the mean input, 2
    assert quantized.layer.bias.tolist() == pytest.approx([0.25, 1.5], abs=1e-6)


def test_padding_is_not_counted() -> None:
    model, x = Chain(), torch.rand(8, 5, 32)
    mask = torch.ones(8, 5, dtype=torch.long)
    mask[:, 3:] = 0
    garbage = torch.where(mask.bool().unsqueeze(-1), x, torch.tensor(50.0))
    plain = correct_biases(model, quantized_copy(model, "int4_weight_only"), [{"x": x[:, :3]}], ["first", "second"])
    padded = correct_biases(
        model,
        quantized_copy(model, "int4_weight_only"),
        [{"x": garbage, "attention_mask": mask}],
        ["first", "second"],
    )
    for name, added in plain.items():
        assert torch.allclose(padded[name], added, atol=1e-6)


def test_batches_of_different_lengths() -> None:
    model = tiny_bert()
    rows = Sentences(16, length=12, seed=3).batch(16)
    rows["attention_mask"][:8, 9:] = 0
    cut = [{key: value[:8, :9] for key, value in rows.items()}, {key: value[8:] for key, value in rows.items()}]
    names = list(select_modules(model, embeddings=False).quantized)
    whole, parts = (
        correct_biases(model, quantized_copy(model, "int8_weight_only"), batches, names) for batches in ([rows], cut)
    )
    assert list(whole) == list(parts) != []
    for name, added in whole.items():
        assert torch.allclose(parts[name], added, atol=1e-5), name


@torch.no_grad()
def output_error(model: nn.Module, quantized: nn.Module, batch: dict[str, Tensor]) -> float:
    return float((model.eval()(**batch).logits - quantized.eval()(**batch).logits).square().mean())


@pytest.mark.parametrize("scheme", ["int8_static", "int3_weight_only"])
def test_a_model_s_outputs_come_nearer(scheme: str) -> None:
    before = after = 0.0
    for seed in range(4):
        model = tiny_bert(seed, hidden_size=64, intermediate_size=128, hidden_act="relu").eval()
        if scheme == "int8_static":
            quantized: Any = int8_model(copy.deepcopy(model), scheme)
        else:
            quantized = quantized_copy(model, scheme)
        unseen = Sentences(64, seed=2).batch(64)
        before += output_error(model, quantized, unseen)
        batches = [Sentences(64, seed=seed).batch(64) for seed in (11, 12)]
        correct_biases(model, quantized, batches, quantized_modules(quantized))
        after += output_error(model, quantized, unseen)
    assert after < 0.9 * before


def test_conv1d() -> None:
    model = tiny_gpt2().eval()
    quantized = quantized_copy(model, "int4_weight_only")
    batch = Sentences(16, seed=4).batch(16)
    name = "transformer.h.1.attn.c_attn"
    correct_biases(model, quantized, [batch], quantized_modules(quantized))
    mask = batch["attention_mask"].bool()
    means = [outputs_of(each, name, **batch)[mask].mean(0) for each in (model, quantized)]
    assert torch.allclose(means[0], means[1], atol=1e-5)


def test_a_model_without_biases_does_not_run() -> None:
    model = tiny_llama()
    quantized = quantized_copy(model, "int8_dynamic")
    quantized.register_forward_pre_hook(lambda *_: 1 / 0)
    assert correct_biases(model, quantized, [Sentences(4).batch(4)], quantized_modules(quantized)) == {}


def test_first_call_counts_and_dtype_stays() -> None:
    model = Chain().bfloat16()
    quantized = quantized_copy(model, "int4_weight_only")
    x = torch.rand(40, 32).bfloat16()
    ticks: list[int] = []
    names = ["first", "second"]
    twice = correct_biases(model, quantized, [{"x": x, "twice": True}], names, lambda: ticks.append(1))
    assert len(ticks) == 2
    assert quantized.first.bias.dtype == torch.bfloat16
    assert twice["first"].dtype == torch.float32
    once = correct_biases(model, quantized_copy(model, "int4_weight_only"), [{"x": x}], names)
    assert torch.equal(once["first"], twice["first"])
    assert not torch.equal(once["second"], twice["second"])


def test_tensors_of_others_are_not_written_to() -> None:
    model = Chain()
    quantized = quantized_copy(model, "int4_weight_only")
    quantized.first.bias = model.first.bias.detach()
    kept = model.first.bias.clone()
    correct_biases(model, quantized, [{"x": torch.rand(40, 32)}], ["first"])
    assert torch.equal(model.first.bias, kept)


def test_nan_names_the_layer_and_leaves_all_biases() -> None:
    model = Chain()
    quantized = quantized_copy(model, "int4_weight_only")
    quantized.second.weight_scale[5, 0] = torch.nan
    biases = [quantized.first.bias, quantized.second.bias]
    with pytest.raises(ValueError, match=r"mean output of second is NaN or infinite in 1 of 64 channels"):
        correct_biases(model, quantized, [{"x": torch.rand(40, 32)}], ["first", "second"])
    assert quantized.first.bias is biases[0]
    assert quantized.second.bias is biases[1]


def test_nothing_to_take_a_mean_of() -> None:
    model = Chain()
    quantized = quantized_copy(model, "int4_weight_only")
    with pytest.raises(ValueError, match="no calibration batches"):
        correct_biases(model, quantized, [], ["first"])
    padding = {"x": torch.rand(2, 3, 32), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="only padding"):
        correct_biases(model, quantized, [padding], ["first"])
