"""Equalization and AWQ: the same function in float, and less lost when it is quantized."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_quant.quantization.equalization import awq_scale, equalize, scale_group
from hf_quant.quantization.float_models import shallow_copy
from hf_quant.quantization.graph import ScalingGroup, find_scaling_groups
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.targets import select_modules
from tests.tiny import Sentences, tiny_gpt2, tiny_llama
from tests.zoo import batch_for, build, outputs


def names_of(model: nn.Module) -> list[str]:
    return list(select_modules(model, embeddings=False).quantized)


def outliers(seed: int = 0) -> nn.Module:
    """A tiny Llama with three channels of each norm thirty times as large, as grown language models have them."""
    model = tiny_llama(seed, hidden_size=64, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[torch.randperm(64, generator=generator)[:3]] *= 30
    return model.eval()


def inputs_of(model: nn.Module, names: Sequence[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def batches(count: int = 16, seed: int = 3) -> list[dict[str, Tensor]]:
    data = Sentences(count, seed=seed)
    return [
        {name: values[start : start + 4] for name, values in data.batch(count).items()} for start in range(0, count, 4)
    ]


@functools.cache
def example(species: str, source: str) -> tuple[Any, dict[str, Tensor], ScalingGroup]:
    model = build(species)
    batch = batch_for(species, model)
    [group] = [group for group in find_scaling_groups(model, batch, names_of(model)) if group.source == source]
    return model, batch, group


@pytest.mark.parametrize("kind", ["linear", "conv1d", "norm", "gemma"])
@settings(max_examples=10)
@given(exponents=st.lists(st.floats(-6, 6), min_size=32, max_size=32))
def test_any_scales_leave_the_function_as_it_was(kind: str, exponents: list[float]) -> None:
    species, source = {
        "linear": ("opt", "model.decoder.layers.0.fc1"),
        "conv1d": ("gpt2", "transformer.h.0.attn.c_attn"),
        "norm": ("gpt2", "transformer.h.0.ln_1"),
        "gemma": ("gemma", "model.layers.0.input_layernorm"),
    }[kind]
    original, batch, group = example(species, source)
    model = shallow_copy(original)
    channels = {"linear": 64, "conv1d": 96}.get(kind, 32)
    scales = torch.tensor(exponents).exp2().repeat(3)[:channels]
    before, weight = outputs(model, batch)["logits"], model.get_submodule(source).weight
    scale_group(model, group, scales)
    assert sqnr(before, outputs(model, batch)["logits"]) > 90
    now: Any = model.get_submodule(source).weight
    if kind == "conv1d":
        torch.testing.assert_close(now[:, 64:], weight[:, 64:] / scales[64:])
        assert torch.equal(now[:, :64], weight[:, :64])  # queries and keys
    else:
        offset = 1 if kind == "gemma" else 0
        torch.testing.assert_close(now + offset, (weight + offset) / (scales[:, None] if kind == "linear" else scales))


def test_bad_scales_are_refused_before_anything_changes() -> None:
    model = tiny_gpt2()
    [group, *_] = find_scaling_groups(model, Sentences(4).batch(2), names_of(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"ln_1 has 32 channels .* shape \(31,\) from 1 to 1\."):
        scale_group(model, group, torch.ones(31))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"needs a positive, finite scale for each"):
            scale_group(model, group, torch.cat([torch.ones(31), torch.tensor([bad])]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "species", ["bert", "opt", "gpt2", "llama", "gemma", "qwen2", "modernbert", "mixtral", "t5", "vit", "swin", "clip"]
)
def test_models_compute_the_same_afterwards(species: str) -> None:
    model = build(species)
    batch, names = batch_for(species, model), names_of(model)
    expected, found = outputs(model, batch), len(find_scaling_groups(model, batch, names))
    scales = equalize(model, [batch], names)
    assert len(scales) == found > 0
    assert any((values.log2().abs() > 0.1).any() for values in scales.values())
    got = outputs(model, batch)
    assert min(sqnr(expected[name], got[name]) for name in expected) > 100
    awq_scale(model, [batch], names, 4, None, grid=4)
    got = outputs(model, batch)
    assert min(sqnr(expected[name], got[name]) for name in expected) > 100


def test_half_precision_models_compute_the_same_up_to_rounding() -> None:
    model = build("gemma").to(torch.bfloat16)
    batch = batch_for("gemma", model)
    expected = outputs(model, batch)["logits"].float()
    assert len(equalize(model, [batch], names_of(model))) == 8
    assert sqnr(expected, outputs(model, batch)["logits"].float()) > 30
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_the_scales_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    given = [{"input": torch.randn(5, 6)}, {"input": torch.randn(5, 6)}]
    with torch.no_grad():
        largest = torch.cat([model[0](batch["input"]) for batch in given]).abs().amax(0)
    weight = model[1].weight.detach()
    for alpha in (0.0, 0.3, 0.5, 1.0):
        scales = equalize(copy.deepcopy(model), given, ["0", "1"], alpha)["0"]
        torch.testing.assert_close(scales, largest**alpha / weight.abs().amax(0) ** (1 - alpha))
    equalize(model, given, ["0", "1"], 0.5)
    with torch.no_grad():  # at one half, activations and weights get the same maxima
        now = torch.cat([model[0](batch["input"]) for batch in given]).abs().amax(0)
    torch.testing.assert_close(now, model[1].weight.detach().abs().amax(0))


def test_channels_in_which_nothing_runs_keep_their_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0  # type: ignore[index]
        model[2].weight[:, 5] = 0  # type: ignore[index]
    batch = {"input": torch.randn(9, 6)}
    scales = equalize(copy.deepcopy(model), [batch], ["2"])["0"]
    assert scales[2] == scales[5] == 1
    assert torch.isfinite(scales).all()
    assert awq_scale(copy.deepcopy(model), [batch], ["2"], 3, None)["0"][2] == 1


def test_padding_is_not_counted() -> None:
    model, given = outliers(), batches()
    names = names_of(model)
    clean = equalize(copy.deepcopy(model), given, names)
    for batch in given:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 77)
    other = equalize(copy.deepcopy(model), given, names)
    assert all(torch.allclose(clean[name], other[name], rtol=1e-4) for name in clean)
    for batch in given:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    counted = equalize(copy.deepcopy(model), given, names)
    assert not all(torch.allclose(clean[name], counted[name], rtol=1e-4) for name in clean)


def test_a_float_model_that_shares_its_tensors_stays_as_it_was() -> None:
    model, [batch, *_] = outliers(), batches()
    model.get_submodule("model.layers.0.input_layernorm").weight.requires_grad_(False)  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    twin: Any = shallow_copy(model)
    assert equalize(twin, [batch], names_of(model))
    assert awq_scale(twin, [batch], names_of(model), 4, 32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(
        twin.model.layers[0].self_attn.q_proj.weight, before["model.layers.0.self_attn.q_proj.weight"]
    )
    assert twin.model.embed_tokens.weight is model.get_submodule("model.embed_tokens").weight
    assert not twin.model.layers[0].input_layernorm.weight.requires_grad
    assert twin.model.layers[1].input_layernorm.weight.requires_grad


class Sly(nn.Module):
    """Depends on a weight in a way that no operation shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.known = [self.layers[2].weight]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[1](self.layers[0](x)).tanh()
        hidden = self.layers[3](self.layers[2](hidden).relu())
        return hidden if self.layers[2].weight is self.known[0] else 1.01 * hidden  # type: ignore[no-any-return]


def test_a_group_that_changes_the_outputs_is_put_back_and_named(caplog: pytest.LogCaptureFixture) -> None:
    names, batch = [f"layers.{index}" for index in range(4)], {"x": torch.randn(5, 6)}
    model = Sly()
    expected, kept = model(**batch), dict(model.layers[2].named_parameters())
    with caplog.at_level(logging.WARNING):
        assert list(equalize(model, [batch], names)) == ["layers.0"]
    assert "layers.2 changed the outputs of Sly when scaled, and was put back" in caplog.text
    assert sqnr(expected, model(**batch)) > 100
    assert all(parameter is kept[name] for name, parameter in model.layers[2].named_parameters())


class Moody(nn.Module):
    """Sends large inputs another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden) if float(x.max()) < 5 else self.third(hidden.tanh())  # type: ignore[no-any-return]


def test_a_branch_that_only_some_batches_take_counts() -> None:
    calm, wild = {"x": torch.zeros(4, 6)}, {"x": torch.full((4, 6), 9.0)}
    names = ["first", "second", "third"]
    assert list(equalize(Moody(), [calm], names)) == ["first"]
    assert equalize(Moody(), [calm, wild], names) == {}
    assert equalize(Moody(), [wild, calm], names) == {}


def test_without_groups_nothing_changes() -> None:
    model = build("albert")
    before = dict(model.named_parameters())
    batch = batch_for("albert", model)
    for names in ([], ["albert.pooler"]):
        assert equalize(model, [batch], names) == {}
        assert awq_scale(model, [batch], names, 4, 32) == {}
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_bad_options_are_refused() -> None:
    model, given = outliers(), batches()
    with pytest.raises(ValueError, match=r"alpha is 1.5, but it shares out between 0"):
        equalize(model, given, names_of(model), 1.5)
    with pytest.raises(ValueError, match="no batch to observe"):
        equalize(model, [], names_of(model))
    with pytest.raises(ValueError, match="no batch to observe"):
        awq_scale(model, [], names_of(model), 4, 32)
    with pytest.raises(ValueError, match="grid is 0"):
        awq_scale(model, given, names_of(model), 4, 32, grid=0)
    with pytest.raises(ValueError, match=r"q_proj has 64 inputs, which groups of 48 do not divide"):
        awq_scale(model, given, names_of(model), 4, 48)


def test_a_batch_of_padding_only_is_passed_over() -> None:
    model, given = outliers(), batches()
    empty = {**given[0], "attention_mask": torch.zeros_like(given[0]["attention_mask"])}
    names = names_of(model)
    expected = equalize(copy.deepcopy(model), given, names)
    got = equalize(copy.deepcopy(model), [*given, empty], names)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert awq_scale(copy.deepcopy(model), [*given, empty], names, 4, 32)
    assert equalize(model, [empty], names) == {}


def test_activations_become_flatter() -> None:
    model, given = outliers(), batches()
    names = names_of(model)
    before = inputs_of(model, names, given[0])
    equalize(model, given, names)
    after = inputs_of(model, names, given[0])

    def spread(values: Tensor) -> float:
        high = values.abs().flatten(0, 1).amax(0)
        return float(high.max() / high.median())

    for name in names:
        if name.endswith(("q_proj", "gate_proj")):
            assert spread(before[name]) > 20
            assert spread(after[name]) < spread(before[name]) / 3
