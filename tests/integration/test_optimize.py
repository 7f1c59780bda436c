"""optimize(): what it takes and refuses, what stays as it was, and which graphs it makes."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant import load_quantized, optimize
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.compiler import CompiledForward
from hf_quant.runtime.modules import Int8Embedding, Int8Linear
from hf_quant.runtime.packed import PackedLinear
from hf_quant.schemes import get_scheme
from tests.tiny import Sentences, folder_bytes, int8_model, logits, tiny_bert

pytestmark = pytest.mark.usefixtures("one_kernel")

SAME = 50.0  # dB; one value of these models rounded to the other side costs more than that


def _bert() -> Any:
    """One layer: Dynamo takes seconds for each, and nothing here hangs on their number."""
    return tiny_bert(num_hidden_layers=1)


def _optimize(model: Any, **kwargs: Any) -> Any:
    return optimize(model, **{"compile": False, "dtype": "float32", **kwargs})


def _forward(model: Any) -> CompiledForward:
    forward: CompiledForward = model.forward._forward
    return forward


# What it takes.


def test_it_returns_the_model_in_eval_mode() -> None:
    model = int8_model(_bert(), "int8_dynamic").train()
    assert _optimize(model) is model
    assert not model.training


@pytest.mark.parametrize("convert", [str, Path])
def test_it_loads_a_folder(tmp_path: Path, convert: Callable[[Path], Any]) -> None:
    model = int8_model(_bert(), "int8_static")
    model.save_pretrained(tmp_path)
    assert sqnr(logits(model), logits(_optimize(convert(tmp_path)))) > SAME


IDS = torch.arange(12).view(2, 6) + 3


@pytest.mark.parametrize(
    ("examples", "graphs"),
    [
        (None, 0),
        ({"input_ids": IDS}, 1),
        (IDS, 1),
        ((IDS, torch.ones_like(IDS)), 1),
        ([{"input_ids": IDS}, {"input_ids": IDS[:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}], 2),
        ([IDS, (IDS[:1],)], 2),
    ],
)
def test_examples_make_graphs(examples: Any, graphs: int) -> None:
    model = _optimize(int8_model(_bert(), "int8_dynamic"), example_inputs=examples)
    assert len(_forward(model).graphs) == graphs


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int4_weight_only", "int4_dynamic"])
def test_other_schemes(scheme: str) -> None:
    model = int8_model(_bert(), scheme)
    expected = logits(model)
    if scheme == "int4_dynamic":  # no integer product for it
        with pytest.raises(ValueError, match="has no quantized Linear layer, so there is nothing to optimize"):
            _optimize(model)
        assert torch.equal(logits(model), expected)
        return
    optimized = _optimize(copy.deepcopy(model))
    assert sqnr(expected, logits(optimized)) > SAME
    assert [graph.merged for graph in _forward(optimized).graphs] == [1]
    for name, module in quantized_modules(model).items():
        if isinstance(module, (Int8Linear, PackedLinear)):
            other = optimized.get_submodule(name)
            assert torch.equal(other.integers, module.integers)
            assert torch.equal(other.weight, module.weight)


# What it refuses.


@pytest.mark.parametrize("make", [_bert, lambda: nn.Sequential(Int8Embedding.from_float(torch.randn(8, 4)))])
def test_nothing_to_optimize(make: Callable[[], nn.Module]) -> None:
    model = make()
    message = (
        f"{type(model).__name__} has no quantized Linear layer, so there is nothing to optimize. Quantize it first: "
        "hf_quant.quantize_dynamic(model), or load an int8 folder with hf_quant.load_quantized."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        _optimize(model)
    assert "forward" not in vars(model)


def test_an_unknown_dtype() -> None:
    model = int8_model(_bert(), "int8_dynamic")
    with pytest.raises(ValueError, match="dtype='float16' is unknown: choose one of auto, float32, bfloat16"):
        optimize(model, dtype="float16")  # type: ignore[arg-type]
    assert all(module.optimized is None for module in model.modules() if isinstance(module, Int8Linear))


def test_twice() -> None:
    model = _optimize(int8_model(_bert(), "int8_dynamic"))
    with pytest.raises(ValueError, match=r"is optimized already\. Load it again for other settings"):
        _optimize(model)


def test_training() -> None:
    model = _optimize(int8_model(_bert(), "int8_dynamic")).train()
    with pytest.raises(RuntimeError, match=r"an optimized model is for inference: call model\.eval\(\)"):
        model(IDS)
    assert model.eval()(IDS).logits.shape == (2, 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("used", [False, True])
def test_copies(copied: Callable[[Any], Any], used: bool) -> None:
    model = _optimize(int8_model(_bert(), "int8_static"), example_inputs=IDS if used else None)
    with pytest.raises(TypeError, match="an optimized model can be neither copied nor pickled"):
        copied(model)


def test_what_a_caller_does_wrong_is_said_and_changes_nothing() -> None:
    model = int8_model(_bert(), "int8_dynamic")
    expected = logits(model)
    model = _optimize(model)
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(2, 4))
    with pytest.raises(IndexError, match="index out of range"):
        model(IDS + 1000)
    assert sqnr(expected, logits(model)) > SAME
    assert not _forward(model)._in_parts


# What stays as it was.


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int8_weight_only", "int4_weight_only"])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_saving(scheme: str, dtype: str, tmp_path: Path) -> None:
    model = int8_model(_bert(), scheme)
    model.save_pretrained(tmp_path / "before")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model = _optimize(model, dtype=dtype, example_inputs=IDS)
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name]), name
    model.save_pretrained(tmp_path / "after")
    assert folder_bytes(tmp_path / "after") == folder_bytes(tmp_path / "before")


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_weights_are_held_once(scheme: str) -> None:
    plain = int8_model(_bert(), scheme)
    model = _optimize(copy.deepcopy(plain), example_inputs=IDS)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert all(module._buffers["weight"] is None and module._packed is None for module in linears.values())
    forward = _forward(model)
    held = 0
    for layer in (*forward._layers.values(), *forward._merged.values()):
        if layer._weight is not None:  # query, key and value gave theirs to a merged one
            plain_form = layer._weight._plain
            forms = [*layer._weight._forms.values(), *([] if plain_form is None else [plain_form])]
            held += sum(form.numel() for form in forms)
    assert held == sum(module.in_features * module.out_features for module in linears.values())
    for name, module in linears.items():  # and can be read as before
        before = plain.get_submodule(name)
        assert torch.equal(module.int8_weight, before.int8_weight)
        assert torch.equal(module.integers, before.integers)
        assert torch.equal(module.weight, before.weight)
        assert module.stored_shapes() == before.stored_shapes()


def test_nothing_global_changes() -> None:
    def now() -> tuple[Any, ...]:
        settings = (torch._dynamo.config.get_config_copy(), torch._inductor.config.get_config_copy())
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        return (
            *settings,
            *modes,
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
        )

    import torch._inductor.config  # so that it is there before

    before = now()
    model = _optimize(int8_model(_bert(), "int8_static"), example_inputs=[IDS, IDS[:1]], dtype="auto")
    model(IDS)
    assert now() == before


# Graphs of small modules.


class Block(nn.Module):
    """Layers of given input ranges, and what is done with them."""

    def __init__(self, scheme: str, use: Callable[[Block, Tensor], Any], **ranges: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, top in ranges.items():
            limits = (torch.tensor(-top), torch.tensor(top)) if scheme == "int8_static" else None
            bias = None if name == "no_bias" else torch.randn(16)
            self.add_module(name, Int8Linear.from_float(torch.randn(16, 16), bias, get_scheme(scheme), limits))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def _twice(block: Any, x: Tensor) -> Any:
    hidden = F.gelu(block.up(x))
    return block.down(hidden) + block.other(hidden)


def _changed_between(block: Any, x: Tensor) -> Any:
    hidden = x * 2
    first = block.up(hidden)
    hidden.add_(1.0)
    return first + block.other(hidden)


def _changed_after(block: Any, x: Tensor) -> Any:
    hidden = F.gelu(block.up(x))
    first = block.down(hidden)
    hidden.mul_(0.5)
    return first + hidden


def _one_layer_twice(block: Any, x: Tensor) -> Any:
    return block.up(x) + block.up(x)


def _linear_used_twice(block: Any, x: Tensor) -> Any:
    hidden = block.up(x)
    return block.down(F.gelu(hidden)) + hidden


@pytest.mark.parametrize(
    ("use", "ranges", "merged", "fused"),
    [
        (lambda block, x: block.down(F.gelu(block.up(x))), {"up": 3, "down": 4}, 0, 1),
        (lambda block, x: block.down(F.gelu(block.up(x), approximate="tanh")), {"up": 3, "down": 4}, 0, 1),
        (lambda block, x: block.down(F.relu(block.up(x))), {"up": 3, "down": 4}, 0, 1),
        (lambda block, x: block.down(torch.relu(block.up(x))), {"up": 3, "down": 4}, 0, 1),
        (lambda block, x: block.down(nn.ReLU(inplace=True)(block.up(x))), {"up": 3, "down": 4}, 0, 1),
        (lambda block, x: block.down(F.dropout(F.gelu(block.up(x)), 0.5, False)), {"up": 3, "down": 4}, 0, 1),
        (lambda block, x: block.down(F.silu(block.up(x))), {"up": 3, "down": 4}, 0, 0),
        (lambda block, x: (hidden := F.gelu(block.up(x)), block.down(hidden)), {"up": 3, "down": 4}, 0, 0),
        (lambda block, x: block.up(x) + block.no_bias(x), {"up": 3, "no_bias": 3}, 1, 0),
        (lambda block, x: block.up(x) + block.other(x), {"up": 3, "other": 2}, 0, 0),
        (_twice, {"up": 3, "down": 4, "other": 4}, 1, 1),
        (_twice, {"up": 3, "down": 4, "other": 5}, 0, 0),
        (_linear_used_twice, {"up": 3, "down": 4}, 0, 0),
        (_changed_between, {"up": 3, "other": 3}, 0, 0),
        (_changed_after, {"up": 3, "down": 4}, 0, 0),
        (_one_layer_twice, {"up": 3}, 0, 0),
    ],
)
def test_what_is_merged_and_fused(
    use: Callable[[Block, Tensor], Any], ranges: dict[str, float], merged: int, fused: int
) -> None:
    block = Block("int8_static", use, **ranges)
    x = torch.randn(3, 5, 16)
    expected = block(x)
    block = _optimize(block)
    got = block(x)
    if isinstance(expected, tuple):
        expected, got = torch.cat(expected), torch.cat(got)
    assert sqnr(expected, got) > SAME
    (graph,) = _forward(block).graphs
    assert (graph.layers, graph.merged, graph.fused) == (len(ranges) + (use is _one_layer_twice), merged, fused)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_dynamic_symmetric"])
@pytest.mark.parametrize("shape", [(3, 5, 16), (5, 16), (16,), (0, 16), (2, 0, 16)])
def test_dynamic_layers_with_and_without_bias(scheme: str, shape: tuple[int, ...]) -> None:
    block = Block(scheme, lambda block, x: block.up(x) - block.no_bias(x), up=0, no_bias=0)
    x = torch.randn(shape)
    expected = block(x)
    got = _optimize(block)(x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    assert [graph.merged for graph in _forward(block).graphs] == [1]


def test_a_graph_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.runtime.compiler._GRAPHS", 2)
    model = int8_model(_bert(), "int8_dynamic")
    calls = [{"output_attentions": attentions, "output_hidden_states": hidden, "return_dict": as_dict}
             for attentions in (False, True) for hidden in (False, True) for as_dict in (True, False)]  # fmt: skip
    batch = Sentences(4).batch(4)
    with torch.no_grad():
        expected = [model(**batch, **flags)[0] for flags in calls]
    model = _optimize(model)
    for flags, reference in zip(calls, expected, strict=True):
        assert sqnr(reference, model(**batch, **flags)[0]) > SAME
    assert _forward(model)._in_parts


def test_a_reloaded_copy_can_be_optimized_anew(tmp_path: Path) -> None:
    model = _optimize(int8_model(_bert(), "int8_static"))
    model.save_pretrained(tmp_path)
    assert sqnr(logits(model), logits(_optimize(load_quantized(tmp_path)))) > SAME
