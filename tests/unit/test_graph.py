"""Scaling groups: found by watching the forward, in models of many kinds and around every kind of operation."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_quant.quantization.equalization import scale_group
from hf_quant.quantization.graph import find_scaling_groups
from hf_quant.targets import select_modules
from tests.tiny import Sentences, tiny_llama
from tests.zoo import batch_for, build

GATED = {
    "model.layers.0.input_layernorm": "q_proj k_proj v_proj",
    "model.layers.0.self_attn.v_proj": "o_proj",
    "model.layers.0.post_attention_layernorm": "gate_proj up_proj",
    "model.layers.0.mlp.up_proj": "down_proj",
}
GPT = {"h.0.ln_1": "c_attn", "h.0.attn.c_attn": "c_proj", "h.0.ln_2": "c_fc"}
VIT = {
    "layers.0.layernorm_before": "q_proj k_proj v_proj",
    "layers.0.attention.v_proj": "o_proj",
    "layers.0.layernorm_after": "fc1",
}
# Of the first layer (of encoder and decoder): sources, each with the last part of its consumers' names.
EXPECTED: dict[str, dict[str, str]] = {
    "bert": {"layer.0.attention.self.value": "dense"},  # post-norm: every LayerNorm also feeds the residual
    "deberta-v2": {"layer.0.attention.self.value_proj": "dense"},
    "modernbert": {
        "layers.0.attn.Wqkv": "Wo", "layers.0.mlp_norm": "Wi", "layers.0.mlp.Wi": "Wo",
    },
    "gpt2": {f"transformer.{source}": consumers for source, consumers in GPT.items()},
    "opt": {
        "layers.0.self_attn_layer_norm": "q_proj k_proj v_proj", "layers.0.self_attn.v_proj": "out_proj",
        "layers.0.final_layer_norm": "fc1", "layers.0.fc1": "fc2",  # ReLU
    },
    "llama": GATED, "mistral": GATED, "qwen2": GATED, "gemma": GATED,
    "gemma2": {  # the norms after attention and MLP feed the residual
        **{source: consumers for source, consumers in GATED.items() if "post_attention" not in source},
        "model.layers.0.pre_feedforward_layernorm": "gate_proj up_proj",
    },
    "phi3": {
        "layers.0.input_layernorm": "qkv_proj", "layers.0.self_attn.qkv_proj": "o_proj",
        "layers.0.post_attention_layernorm": "gate_up_proj", "layers.0.mlp.gate_up_proj": "down_proj",
    },
    "bloom": {
        "h.0.input_layernorm": "query_key_value", "h.0.self_attention.query_key_value": "dense",
        "h.0.post_attention_layernorm": "dense_h_to_4h",
    },
    "mixtral": {  # the second norm feeds the router and the experts
        source: consumers for source, consumers in GATED.items() if "self_attn" in source or "input" in source
    },
    "t5": {
        "encoder.block.0.layer.0.layer_norm": "q k v", "encoder.block.0.layer.0.SelfAttention.v": "o",
        "encoder.block.0.layer.1.layer_norm": "wi", "encoder.block.0.layer.1.DenseReluDense.wi": "wo",
        "decoder.block.0.layer.0.layer_norm": "q k v", "decoder.block.0.layer.0.SelfAttention.v": "o",
        "decoder.block.0.layer.1.layer_norm": "q", "decoder.block.0.layer.1.EncDecAttention.v": "o",
        "decoder.block.0.layer.2.layer_norm": "wi", "decoder.block.0.layer.2.DenseReluDense.wi": "wo",
    },
    "vit": VIT, "dinov2": {
        "layer.0.norm1": "q_proj k_proj v_proj", "layer.0.attention.v_proj": "o_proj", "layer.0.norm2": "fc1",
    },
    "albert": {"albert.embeddings.LayerNorm": "embedding_hidden_mapping_in"},  # its layers run twice
    "wanderer": {},  # runs layers in a loop, as often as the values say
}  # fmt: skip


def names_of(model: nn.Module) -> list[str]:
    return list(select_modules(model, embeddings=False).quantized)


@pytest.mark.parametrize("species", EXPECTED)
def test_the_groups_of_an_architecture(species: str) -> None:
    model = build(species)
    groups = find_scaling_groups(model, batch_for(species, model), names_of(model))
    numbers = {group: re.search(r"(?:layers?|h|block)\.(\d+)", group.source) for group in groups}
    first = [group for group, number in numbers.items() if number is None or number[1] == "0"]
    found = {group.source: " ".join(name.rpartition(".")[2] for name in group.consumers) for group in first}
    assert len(found) == len(EXPECTED[species])
    for end, consumers in EXPECTED[species].items():
        [source] = [source for source in found if source.endswith(end)]
        assert found[source] == consumers
    norms = [group for group in groups if group.kind == "norm"]
    assert all(group.offset == (1 if species.startswith("gemma") else 0) for group in norms)
    assert all("orm" in group.source or "ln_" in group.source for group in norms)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_query_heads_that_share_a_value_head_share_its_scales(attention: str) -> None:
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention)  # heads of 8
    groups = find_scaling_groups(model, Sentences(4).batch(2), names_of(model))
    [value] = [group for group in groups if group.source == "model.layers.0.self_attn.v_proj"]
    first, second = tuple(range(8)), tuple(range(8, 16))
    assert value.columns == (first + first + second + second,)


def test_of_a_fused_projection_only_the_values_are_scaled() -> None:
    model = build("gpt2")
    groups = find_scaling_groups(model, batch_for("gpt2", model), names_of(model))
    [fused] = [group for group in groups if group.source == "transformer.h.0.attn.c_attn"]
    assert fused.columns == (tuple(range(64, 96)),)  # after 32 queries and 32 keys


class Chain(nn.Module):
    """Two Linear layers and something between them."""

    def __init__(self, between: Callable[[Tensor], Any], width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(6, 12), nn.Linear(width, 5), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))  # type: ignore[no-any-return]


OTHER = torch.linspace(0.5, 2, 36).view(1, 3, 12)
MIX = torch.linspace(-1, 1, 9).view(1, 3, 3)

COMMUTE: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "nothing": (lambda x: x, 12),
    "relu": (F.relu, 12),
    "relu in place": (lambda x: F.relu(x, inplace=True), 12),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), 12),
    "product with a tensor": (lambda x: x * OTHER, 12),
    "product with a number": (lambda x: -3 * x / 2, 12),
    "quotient": (lambda x: x / OTHER, 12),
    "half": (lambda x: x.chunk(2, -1)[1], 6),
    "gate": (lambda x: x[..., :6].sigmoid() * x[..., 6:], 6),
    "order": (lambda x: torch.cat([x[..., 6:], x[..., :6]], -1).flip(-1), 12),
    "beside another": (lambda x: torch.cat([x, OTHER.expand_as(x)], -1), 24),
    "repeated": (lambda x: x.repeat_interleave(2, -1), 24),
    "heads": (lambda x: x.view(2, 3, 4, 3).transpose(1, 2).reshape(2, 4, 3, 3).permute(0, 2, 1, 3).flatten(2), 12),
    "rolled along the tokens": (lambda x: x.roll(1, 1), 12),
    "tokens side by side": (lambda x: x.reshape(2, 36)[:, ::3], 12),
    "one token": (lambda x: x[:, 0], 12),
    "mixed tokens": (lambda x: MIX @ x, 12),
    "mixed tokens, by einsum": (lambda x: torch.einsum("bqk,bkd->bqd", MIX.expand(2, 3, 3), x), 12),
    "mixed tokens, transposed": (lambda x: (x.mT @ MIX.mT).mT, 12),
    "values": (lambda x: F.scaled_dot_product_attention(OTHER[None], OTHER[None], x[:, None])[:, 0], 12),
    "its shape only": (lambda x: x * torch.zeros_like(x).add(2), 12),
    "branch by shape": (lambda x: x.relu() if x.shape[0] > 1 else x.exp(), 12),
}

DO_NOT: dict[str, Callable[[Tensor], Any]] = {
    "gelu": F.gelu,
    "sum with a tensor": lambda x: x + OTHER,
    "sum with a number": lambda x: x + 1,
    "square": lambda x: x * x,
    "relu squared": lambda x: F.relu(x).square(),
    "denominator": lambda x: OTHER / (x.abs() + 1),
    "rounded quotient": lambda x: torch.div(x, 0.1, rounding_mode="floor"),
    "integers": lambda x: (x * 100).long().float(),
    "mixed channels": lambda x: x @ torch.ones(12, 12),
    "channels as tokens": lambda x: x.mT.reshape(2, 3, 12),
    "query": lambda x: F.scaled_dot_product_attention(x[:, None], OTHER[None], OTHER[None])[:, 0],
    "all of attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "norm": lambda x: F.layer_norm(x, (12,)),
    "written into": lambda x: x.add_(1),
    "written elsewhere": lambda x: torch.zeros_like(x).copy_(x),
    "product in place": lambda x: torch.ones_like(x).mul_(x),
    "decides a branch": lambda x: x if x.mean() > 0 else -x,
    "a number of it": lambda x: x * float(x.detach().abs().max()),
}


@pytest.mark.parametrize("name", COMMUTE)
def test_scales_move_through_what_they_commute_with(name: str) -> None:
    between, width = COMMUTE[name]
    model, x = Chain(between, width).eval(), torch.randn(2, 3, 6)
    [group] = find_scaling_groups(model, {"x": x}, ["first", "second"])
    assert (group.source, group.kind, group.consumers) == ("first", "linear", ("second",))
    with torch.no_grad():
        expected = model(x)
        scale_group(model, group, torch.linspace(-2, 2, 12).exp())
        torch.testing.assert_close(model(x), expected)
    assert not torch.equal(model.first.weight, Chain(between, width).first.weight)


@pytest.mark.parametrize("name", DO_NOT)
def test_what_scales_do_not_commute_with_makes_no_group(name: str) -> None:
    assert find_scaling_groups(Chain(DO_NOT[name]), {"x": torch.randn(2, 3, 6)}, ["first", "second"]) == []


class Residual(nn.Module):
    """A norm, or two, between a residual stream and what reads it."""

    def __init__(self, post: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return (normed if self.post else x) + self.down(self.up(normed).tanh())  # type: ignore[no-any-return]


def test_a_norm_that_feeds_the_residual_is_no_source() -> None:
    batch = {"x": torch.randn(2, 3, 8)}
    [group] = find_scaling_groups(Residual(), batch, ["up", "down"])
    assert (group.source, group.kind, group.consumers) == ("norm", "norm", ("up",))
    assert find_scaling_groups(Residual(post=True), batch, ["up", "down"]) == []


def test_every_reader_must_be_selected() -> None:
    model, batch = tiny_llama(), Sentences(4).batch(2)
    names = names_of(model)
    sources = {group.source for group in find_scaling_groups(model, batch, names)}
    less = {group.source for group in find_scaling_groups(model, batch, set(names) - {"model.layers.0.mlp.gate_proj"})}
    assert sources - less == {"model.layers.0.post_attention_layernorm"}
    assert find_scaling_groups(model, batch, []) == []


class Twice(nn.Module):
    """Weights that more than one place reads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        if how == "tied":
            self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x))
        if self.how == "runs twice":
            hidden = self.second(self.first(hidden.tanh()))
        if self.how == "reads twice":
            hidden = hidden + self.second(x)
        if self.how == "by hand":
            hidden = hidden + F.linear(x, self.second.weight)
        if self.how == "source by hand":
            hidden = hidden + F.linear(x, self.first.weight)
        return self.third(hidden.tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["once", "tied", "runs twice", "reads twice", "by hand", "source by hand"])
def test_weights_with_a_second_reader_are_left_alone(how: str) -> None:
    groups = find_scaling_groups(Twice(how), {"x": torch.randn(2, 6)}, ["first", "second", "third"])
    assert [group.source for group in groups] == (["first"] if how == "once" else [])


def test_no_module_is_a_consumer_twice() -> None:
    class ReluGate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x).relu() * self.up(x))  # type: ignore[no-any-return]

    [group] = find_scaling_groups(ReluGate(), {"x": torch.randn(2, 6)}, ["gate", "up", "down"])
    assert (group.source, group.consumers) == ("gate", ("down",))


def test_what_a_model_inside_returns_is_output() -> None:
    model = build("bert")
    assert "bert.pooler.dense" in names_of(model)
    groups = find_scaling_groups(model, batch_for("bert", model), names_of(model))
    # Its classifier reads the pooler only, but `model.bert(...)` returns the last LayerNorm's output too.
    assert not any("bert.pooler.dense" in group.consumers for group in groups)


class Squared(nn.LayerNorm):
    """Nearly a norm: its output goes with the square of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight.square(), self.bias, self.eps)


class FromOne(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


@pytest.mark.parametrize(("kind", "offset"), [(nn.LayerNorm, 0), (FromOne, 1), (Squared, None), (nn.PReLU, None)])
def test_how_a_norm_depends_on_its_weight_is_tried_out(kind: Any, offset: int | None) -> None:
    model = nn.Sequential(kind(8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 2, 8))  # type: ignore[operator]
    before = copy.deepcopy(model.state_dict())
    groups = find_scaling_groups(model, {"input": torch.randn(12, 8)}, ["1"])
    assert [group.offset for group in groups] == ([] if offset is None else [offset])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_and_hooks_are_as_before_even_after_an_error() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    find_scaling_groups(model, Sentences(4).batch(2), names_of(model))
    with pytest.raises(TypeError):
        find_scaling_groups(model, {"input_ids": "text"}, names_of(model))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_half_precision_finds_the_same() -> None:
    for species in ("gemma", "gpt2"):
        model = build(species)
        batch = batch_for(species, model)
        expected = find_scaling_groups(model, batch, names_of(model))
        assert find_scaling_groups(model.to(torch.bfloat16), batch, names_of(model)) == expected
