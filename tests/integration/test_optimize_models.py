"""optimize() on many architectures: what is found in their graphs, and that outputs stay what they were."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_quant import optimize, quantize_dynamic, quantize_static
from hf_quant.quantization.sensitivity import sqnr
from tests.tiny import tiny_bert
from tests.zoo import batch_for, build, outputs

pytestmark = pytest.mark.usefixtures("one_kernel")

SAME = 50.0  # dB; one value of these models rounded to the other side costs more than that
CLOSE = 28.0  # dB, in bfloat16: rounding a value by 2^-9 rounds some of the int8 values after it to the other side


@dataclass(frozen=True)
class Found:
    """Of the model's only graph. Products of one attention count alone where a model writes its softmax out."""

    layers: int
    merged: int
    fused: int
    attentions: int


# Two layers each, of query, key, value, output, up and down, if nothing else is said.
MODELS = {
    "bert": Found(13, 2, 2, 2),  # and a pooler
    "roberta": Found(12, 2, 2, 2),
    "distilbert": Found(12, 2, 2, 2),
    "electra": Found(12, 2, 2, 2),
    "vit": Found(12, 2, 2, 2),
    "mpnet": Found(12, 2, 2, 4),  # a bias of positions: softmax written out
    "albert": Found(14, 2, 0, 2),  # a projection of embeddings and a pooler; its GELU is written out
    "modernbert": Found(8, 0, 0, 2),  # query, key, value are one layer; half of the activation gates the other half
    "deberta-v2": Found(16, 4, 2, 0),  # keys and queries of positions are merged too; its products are not 4-D
    "llama": Found(14, 4, 0, 2),  # gate and up are merged too
    "qwen2": Found(14, 4, 0, 2),
    "gpt2": Found(8, 0, 0, 2),  # query, key, value are one layer; its GELU is written out
    "t5": Found(16, 3, 2, 3),  # one layer of each stack; the decoder's second attention merges keys and values
}


def found(model: Any) -> list[Found]:
    """What was found in each graph of an optimized model."""
    graphs = model.forward._forward.graphs
    return [Found(graph.layers, graph.merged, graph.fused, graph.attentions) for graph in graphs]


def flat(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """All that a model returns, as one vector."""
    return torch.cat([value.float().flatten() for value in outputs(model, batch).values()])


@pytest.mark.parametrize("species", MODELS)
def test_static_layers_are_merged_and_fused_and_give_the_same(species: str) -> None:
    model = build(species)
    batch = batch_for(species, model)
    model = quantize_static(model, [batch], progress=False)
    expected = flat(model, batch)
    model = optimize(model, compile=False, dtype="float32")
    assert sqnr(expected, flat(model, batch)) > SAME
    assert found(model) == [replace(MODELS[species], attentions=0)]


@pytest.mark.parametrize(
    "species",
    [
        pytest.param(name, marks=() if name in ("bert", "mpnet", "llama", "t5") else pytest.mark.slow)
        for name in MODELS
    ],
)
def test_dynamic_layers_with_attention_in_bfloat16(species: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.runtime.cpu.native_bfloat16", lambda: "bf16")
    model = build(species)
    batch = batch_for(species, model)
    floats = flat(model, batch)
    model = quantize_dynamic(model, progress=False)
    expected = flat(model, batch)
    model = optimize(model, compile=False)
    got = flat(model, batch)
    assert found(model) == [replace(MODELS[species], fused=0)]  # a token's range is known only after its products
    assert torch.equal(got, expected) or sqnr(expected, got) > CLOSE
    assert sqnr(floats, got) > sqnr(floats, expected) - 5  # an error of about int8's own is added to it


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_forward_that_breaks_its_graph(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    # What is compiled of one layer must not serve another: only guards tell them apart there.
    model = build("deberta")
    batch = batch_for("deberta", model)
    if scheme == "static":
        model = quantize_static(model, [batch], progress=False)
    else:
        model = quantize_dynamic(model, progress=False)
    expected = flat(model, batch)
    with caplog.at_level(logging.WARNING, logger="hf_quant"):
        model = optimize(model, compile=False, dtype="float32")
        assert sqnr(expected, flat(model, batch)) > SAME
        assert sqnr(expected, flat(model, batch)) > SAME
    told = [record.message for record in caplog.records if record.name.startswith("hf_quant")]
    assert [message.split(":")[0] for message in told] == ["the forward is captured in parts, which is slower"]
    assert sum(graph.layers for graph in found(model)) >= 6  # each layer its own


def test_a_forward_that_depends_on_values() -> None:
    model = build("wanderer")
    model = quantize_dynamic(model, progress=False)
    batches = [batch_for("wanderer", model)]
    batches += [{"input_ids": batches[0]["input_ids"] + shift} for shift in (1, 2)]  # other layers run
    expected = [flat(model, batch) for batch in batches]
    model = optimize(model, compile=False, dtype="float32")
    for batch, reference in zip(batches, expected, strict=True):
        assert sqnr(reference, flat(model, batch)) > SAME


def test_models_of_one_class_do_not_share_graphs() -> None:
    models = [quantize_dynamic(tiny_bert(seed, num_hidden_layers=1), progress=False) for seed in (0, 1)]
    batch = batch_for("bert", models[0])
    expected = [flat(model, batch) for model in models]
    optimized = [optimize(copy.deepcopy(model), compile=False, dtype="float32") for model in models]
    for _ in range(2):
        for model, reference in zip(optimized, expected, strict=True):
            assert sqnr(reference, flat(model, batch)) > SAME
    for model, reference in zip(models, expected, strict=True):  # copied before: untouched
        assert torch.equal(flat(model, batch), reference)


@pytest.mark.parametrize("species", ["bert", "llama", "t5"])
def test_all_in_bfloat16(species: str) -> None:
    model = quantize_dynamic(build(species), progress=False)
    batch = batch_for(species, model)
    expected = flat(model, batch)
    model = optimize(model, compile=False, dtype="bfloat16")
    assert {value.dtype for value in outputs(model, batch).values()} == {torch.bfloat16}
    assert sqnr(expected, flat(model, batch)) > CLOSE
