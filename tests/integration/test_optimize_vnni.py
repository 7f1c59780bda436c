"""optimize() with the package's own kernels, on CPUs that have AVX-512 VNNI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_quant import load_quantized, optimize, quantize_dynamic, quantize_static
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime import choice, vnni
from tests.integration.test_optimize_models import CLOSE, MODELS, SAME, flat, found
from tests.zoo import batch_for, build, outputs

pytestmark = pytest.mark.skipif(not vnni.available(), reason="this CPU has no AVX-512 VNNI, or has AMX too")

SPECIES = pytest.mark.parametrize(
    "species",
    [pytest.param(name, marks=() if name in ("bert", "vit", "llama", "t5") else pytest.mark.slow) for name in MODELS],
)


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "choose", lambda *_: "vnni")
    yield
    torch._dynamo.reset()


def same(floats: Tensor, expected: Tensor, got: Tensor) -> None:
    """Equal but for rounding of sums, which may round a value after it to the other side, for better or worse."""
    assert sqnr(expected, got) > SAME or (
        sqnr(expected, got) > CLOSE and sqnr(floats, got) > sqnr(floats, expected) - 1
    )


@SPECIES
def test_static_layers(species: str) -> None:
    model = build(species)
    batch = batch_for(species, model)
    floats = flat(model, batch)
    model = quantize_static(model, [batch], progress=False)
    expected = flat(model, batch)
    model = optimize(model, compile=False, dtype="float32")
    same(floats, expected, flat(model, batch))
    assert found(model) == [replace(MODELS[species], attentions=0)]


@SPECIES
def test_dynamic_layers(species: str) -> None:
    model = build(species)
    batch = batch_for(species, model)
    floats = flat(model, batch)
    model = quantize_dynamic(model, progress=False)
    expected = flat(model, batch)
    model = optimize(model, compile=False, dtype="float32")
    same(floats, expected, flat(model, batch))
    assert found(model) == [replace(MODELS[species], attentions=0)]  # activation functions end layers here too


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_attention_by_integers(scheme: str, compile: bool) -> None:
    model = build("bert")
    batch = batch_for("bert", model)
    model = quantize_dynamic(model) if scheme == "dynamic" else quantize_static(model, [batch], progress=False)
    expected = flat(model, batch)
    model = optimize(model, compile=compile)
    assert sqnr(expected, flat(model, batch)) > CLOSE
    graph = model.forward._forward.graphs[0]
    assert graph.attentions == 2
    assert graph.norms == 5  # of the embeddings, and two a layer
    assert graph.ended == 4  # all but that of the embeddings take in a product
    assert graph.joined == 2  # one a layer
    assert graph.rounded == (2 if scheme == "static" else 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        flat(model, batch)
    calls = {row.key: row.count for row in seen.key_averages()}
    assert calls["hf_quant::vnni_attention"] == 2 * calls["hf_quant::bool_mask"], "one mask for all layers"


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("species", ["bert", "roberta", "distilbert"])
def test_padding_is_left_out(species: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(species)
    batch = {name: value[:1].expand(6, -1).clone() for name, value in batch_for(species, model).items()}
    total = batch["input_ids"].shape[1]
    batch["attention_mask"] = (torch.arange(total) < torch.tensor([2, total, 3, 5, 2, 4])[:, None]).long()
    model = quantize_dynamic(model) if scheme == "dynamic" else quantize_static(model, [batch], progress=False)
    expected = outputs(model, batch)
    seen: list[tuple[list[int], int]] = []
    skipping = vnni.skipping_padding
    monkeypatch.setattr(vnni, "skipping_padding", lambda *given: [seen.append(given), skipping(*given)][1])
    model = optimize(model, compile=False)
    for _ in range(2):
        seen.clear()
        got = outputs(model, batch)
        for name, value in expected.items():
            tokens = batch["attention_mask"].bool() if value.shape[1] == total else torch.ones(6, dtype=torch.bool)
            assert sqnr(value[tokens], got[name][tokens]) > CLOSE, name
    assert seen == [([2, 2, 3, 4, 5, total], total)]


def test_layers_all_in_bfloat16() -> None:
    model = quantize_dynamic(build("bert"), progress=False)
    batch = batch_for("bert", model)
    expected = flat(model, batch)
    model = optimize(model, compile=False, dtype="bfloat16")
    assert {value.dtype for value in outputs(model, batch).values()} == {torch.bfloat16}
    assert sqnr(expected, flat(model, batch)) > CLOSE


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_what_is_saved_is_what_was_loaded(scheme: str, tmp_path) -> None:
    model = build("bert")
    batch = batch_for("bert", model)
    model = quantize_dynamic(model) if scheme == "dynamic" else quantize_static(model, [batch], progress=False)
    model.save_pretrained(tmp_path / "before")
    optimized = optimize(model, batch, compile=False)
    optimized.save_pretrained(tmp_path / "after")
    before, after = (load_quantized(tmp_path / name).state_dict() for name in ("before", "after"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
