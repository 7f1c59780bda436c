"""Generation by an optimized decoder, without Inductor: the rewritten graphs run operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_quant import optimize
from hf_quant.runtime import half
from tests.tiny import VOCAB, int8_model, tiny_llama

NEW = 8


def prompts(rows: int = 2, length: int = 6, padding: int = 0) -> dict[str, Tensor]:
    """Random prompts; the first has `padding` tokens on its left."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], cache: str | None, new: int = NEW) -> Any:
    """Greedy tokens and the logits of each step."""
    return model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


def graphs(model: Any) -> list[Any]:
    return model.forward._forward.graphs


@pytest.mark.parametrize("cache", [pytest.param(None, marks=pytest.mark.slow), "static"])
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static", "int8_weight_only", "int4_weight_only"])
def test_greedy_tokens_are_those_of_the_model_before(scheme: str, cache: str | None) -> None:
    config = {"hidden_size": 128, "intermediate_size": 256} if scheme == "int4_weight_only" else {}
    model = int8_model(tiny_llama(**config), scheme)
    for inputs in (prompts(1), prompts(2, padding=3)):
        expected = generate(model, inputs, cache)
        if inputs["input_ids"].shape[0] == 1:
            optimized = optimize(int8_model(tiny_llama(**config), scheme), compile=False, dtype="float32")
        got = generate(optimized, inputs, cache)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", [None, "static"])
def test_more_tokens_need_no_more_graphs(cache: str | None) -> None:
    model = optimize(int8_model(tiny_llama(num_hidden_layers=1), "int8_dynamic"), compile=False, dtype="float32")
    generate(model, prompts(1), cache, new=4)
    made = len(graphs(model))
    assert made <= 3, "for the prompt and for what follows; a cache that grows needs one more"
    generate(model, prompts(1), cache, new=4)
    assert len(graphs(model)) == made
    generate(model, prompts(1, length=9), cache, new=16)
    assert len(graphs(model)) <= made + 2, "lengths that differ are marked once"
    made = len(graphs(model))
    generate(model, prompts(1, length=11), cache, new=19)
    assert len(graphs(model)) == made


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int4_weight_only"])
def test_layers_of_weights_alone_are_merged_exactly(scheme: str) -> None:
    config = {"hidden_size": 128, "intermediate_size": 256}
    model = int8_model(tiny_llama(**config), scheme)
    with torch.no_grad():
        expected = model(**prompts()).logits
        stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model = optimize(model, compile=False, dtype="float32")
        got = model(**prompts()).logits
    assert [found.merged for found in graphs(model)] == [4], "query, key and value, gate and up, in each of two blocks"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def large_head() -> Any:
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": half.LEAST_WEIGHTS // 64}
    return int8_model(tiny_llama(**sizes), "int8_dynamic")


@pytest.mark.skipif(not half.available(), reason="torch has no float16 product here")
def test_a_large_head_is_read_in_float16_for_a_few_tokens() -> None:
    model = optimize(large_head(), compile=False)
    generate(model, prompts(), "static")
    head = model.lm_head
    assert isinstance(head, half.HalfLinear)
    assert head.half_copy.packed is not None, "generation came by"
    assert head.weight is model.model.embed_tokens.weight
    assert head.weight.dtype == torch.float32
    hidden = torch.randn(2, 1, head.in_features)
    exact = torch.nn.functional.linear(hidden, head.weight)
    with torch.no_grad():
        assert (head(hidden) - exact).norm() < 2**-11 * exact.norm()


def test_a_large_head_stays_in_float32_where_that_was_asked_for() -> None:
    model = optimize(large_head(), compile=False, dtype="float32")
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.skipif(not half.available(), reason="torch has no float16 product here")
def test_more_rows_than_a_few_are_multiplied_in_the_layers_own_dtype() -> None:
    layer = torch.nn.Linear(1024, 1024)
    plain = torch.nn.Linear(1024, 1024)
    plain.load_state_dict(layer.state_dict())
    assert half.halve(torch.nn.Sequential(layer)) == ["0"]
    for dtype, few, many in ((torch.float32, 32, 33), (torch.bfloat16, 8, 9)):
        layer.to(dtype)
        plain.to(dtype)
        x = torch.randn(many, 1024).to(dtype)
        with torch.no_grad():
            assert torch.equal(layer(x), plain(x))
            got, expected = layer(x[:few]), plain(x[:few])
        assert got.dtype == dtype
        assert not torch.equal(got, expected)
        exact = x[:few].double() @ plain.weight.double().t() + plain.bias.double()
        tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-11
        assert (got.double() - exact).norm() < tolerance * exact.norm()


def test_layers_that_float16_cannot_hold_are_left() -> None:
    layer = torch.nn.Linear(1024, 1024)
    layer.weight.data[0, 0] = 1e5
    small = torch.nn.Linear(512, 512)
    model = torch.nn.Sequential(layer, small)
    assert half.halve(model) == []
    assert all(type(module) is torch.nn.Linear for module in model)
