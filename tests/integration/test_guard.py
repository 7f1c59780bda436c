"""The accuracy guard on transformers' models, with metrics of their outputs."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from hf_quant import load_quantized, quantize_dynamic, save_quantized
from hf_quant.quantization.guard import AccuracyError, meet_accuracy
from hf_quant.quantization.guard_search import Layers, layer_sensitivity, record_batches
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime.base import quantized_modules
from tests.tiny import Sentences, int8_model, logits, make_trainer, tiny_bert, tiny_gpt2, tiny_llama

REPOSITORY = Path(__file__).resolve().parents[2]
MRPC_MODEL = REPOSITORY / "build" / "glue" / "mrpc" / "float"
MRPC_ROWS = REPOSITORY.parent / "shared" / "data" / "glue" / "mrpc" / "validation.parquet"


def agreement(model: nn.Module, rows: int = 64) -> Callable[[nn.Module], dict[str, float]]:
    """The share of next tokens, or classes, on which a model agrees with `model`, batch by batch."""
    data = Sentences(rows, seed=11)
    batches = [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(data.input_ids.split(8), data.attention_mask.split(8), strict=True)
    ]
    model.eval()
    with torch.no_grad():
        labels = [model(**batch).logits.argmax(-1) for batch in batches]

    def evaluate(other: nn.Module) -> dict[str, float]:
        same = [other(**batch).logits.argmax(-1) == label for batch, label in zip(batches, labels, strict=True)]
        return {"agreement": torch.cat(same).double().mean().item()}

    return evaluate


def kept_in_float(model: nn.Module, names: tuple[str, ...]) -> bool:
    return not set(names) & set(quantized_modules(model)) and all(
        model.get_submodule(name).weight.is_floating_point() for name in names
    )


@torch.no_grad()
def logits_of(model: Any, data: Sentences) -> Tensor:
    return model.eval()(**data.batch(len(data))).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("make", "bits"), [(tiny_bert, 2), (tiny_gpt2, 3), (tiny_llama, 3)])
def test_few_bits_become_as_good_as_asked_and_survive_a_reload(
    make: Callable[[], Any], bits: int, tmp_path: Path
) -> None:
    model = make().eval()
    expected = copy.deepcopy(model.state_dict())
    quantized = quantize_dynamic(model, f"int{bits}_weight_only", progress=False)
    count = len(quantized_modules(quantized))
    evaluate = agreement(model)
    before = evaluate(quantized)["agreement"]
    result = meet_accuracy(model, quantized, evaluate, max_drop=0.1, progress=False)
    assert before < 0.9 <= evaluate(quantized)["agreement"] == result.value
    assert result.float_value == 1.0
    assert kept_in_float(quantized, result.kept)
    assert 0 < len(result.kept) < count
    assert len(quantized_modules(quantized)) == count - len(result.kept)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert {value.data_ptr() for value in model.state_dict().values()}.isdisjoint(
        value.data_ptr() for value in quantized.state_dict().values()
    )
    save_quantized(quantized, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved")
    assert set(quantized_modules(loaded)) == set(quantized_modules(quantized))
    assert torch.equal(logits(loaded), logits(quantized))


def test_with_a_trainer_s_evaluate(tmp_path: Path) -> None:
    model = tiny_bert()
    quantized = quantize_dynamic(model, "int2_weight_only", progress=False)
    data = Sentences(16, seed=1)
    data.labels = logits_of(model, data).argmax(-1)

    def evaluate(candidate: Any) -> dict[str, float]:
        trainer = make_trainer(tmp_path, candidate, eval_dataset=data)
        assert isinstance(trainer, Trainer)
        return trainer.evaluate()

    with pytest.raises(ValueError, match=r"`evaluate` returned loss, accuracy. Say which .* metric='loss'"):
        meet_accuracy(model, quantized, evaluate, progress=False)
    before = evaluate(quantized)["eval_loss"]
    result = meet_accuracy(model, quantized, evaluate, metric="loss", max_drop=0.005, relative=True, progress=False)
    assert result.metric == "loss"
    assert not result.higher_is_better
    assert result.kept
    assert result.value <= result.float_value * 1.005 < before
    assert result.value == evaluate(quantized)["eval_loss"]


def test_static_activations() -> None:
    model = tiny_bert().eval()
    quantized = int8_model(copy.deepcopy(model), "int8_static")
    reference = logits(model)

    def error(candidate: Any) -> float:
        return float(torch.nn.functional.mse_loss(logits(candidate), reference))

    before = error(quantized)
    result = meet_accuracy(model, quantized, error, metric="mse", max_drop=before / 4, progress=False)
    assert error(quantized) == result.value <= before / 4
    assert kept_in_float(quantized, result.kept)


def test_tied_embeddings_go_back_together_and_stay_tied(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    quantized = quantize_dynamic(model, "int8_weight_only", targets=["*"], progress=False)
    tied = ("model.embed_tokens", "lm_head")

    def evaluate(candidate: Any) -> float:
        candidate(**Sentences(4).batch(4))
        return 0.0 if set(tied) & set(quantized_modules(candidate)) else 1.0

    result = meet_accuracy(model, quantized, evaluate, progress=False)
    assert result.kept == tied
    assert quantized.lm_head.weight is quantized.model.embed_tokens.weight
    assert quantized.lm_head.weight is not model.lm_head.weight
    save_quantized(quantized, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(quantized))


def test_the_sensitivity_is_that_of_a_model_with_one_layer_quantized() -> None:
    model = tiny_bert().eval()
    quantized = quantize_dynamic(model, "int4_weight_only", progress=False)
    batch = Sentences(8, seed=3).batch(8)
    layers = Layers(quantized, model)
    found = dict(zip([names[0] for names in layers.names], layer_sensitivity(layers, [batch]), strict=True))
    name = "bert.encoder.layer.1.attention.self.value"
    one = quantize_dynamic(model, "int4_weight_only", targets=[name], progress=False)
    with torch.no_grad():
        assert found[name] == pytest.approx(sqnr(model(**batch).logits, one(**batch).logits), abs=1e-3)
    assert len(quantized_modules(quantized)) == len(found), "left quantized"
    assert found[name] < found["bert.embeddings.token_type_embeddings"], "4 bits against 8"


def test_generation_gives_batches_that_can_be_repeated() -> None:
    model = tiny_llama().eval()
    batches: list[dict[str, Any]] = []
    prompt = torch.tensor([[5, 6, 7]])

    def tokens(candidate: Any) -> Tensor:
        return candidate.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    with record_batches(model, batches):
        expected = tokens(model)
    assert [batch["input_ids"].tolist() for batch in batches] == [prompt.tolist()], "later steps need their cache"
    quantized = quantize_dynamic(model, "int8_weight_only", progress=False)
    assert all(math.isfinite(value) for value in layer_sensitivity(Layers(quantized, model), batches))
    result = meet_accuracy(
        model, quantized, lambda other: float((tokens(other) == expected).float().mean()), progress=False
    )
    assert result.value >= 0.99


def test_what_two_bits_cannot_do_is_said() -> None:
    model = tiny_bert().eval()
    quantized = quantize_dynamic(model, "int2_weight_only", progress=False)
    before = logits(quantized)
    reference = logits(model)

    def error(candidate: Any) -> float:
        return float((logits(candidate) - reference).abs().max())

    match = (
        r"error of the float model is 0 and may get worse by 1e-09, and no .* with \d+ of \d+ layers in float: all but"
    )
    with pytest.raises(AccuracyError, match=match) as caught:
        meet_accuracy(model, quantized, error, metric="error", max_drop=1e-9, progress=False)
    assert torch.equal(logits(quantized), before)
    assert 0 < caught.value.best.value < error(quantized)


@pytest.mark.real
@pytest.mark.timeout(3600)
def test_mrpc_in_few_bits_keeps_its_accuracy() -> None:
    """Figures are printed: `pytest -m real -s tests/integration/test_guard.py`."""
    if not MRPC_MODEL.is_dir() or not MRPC_ROWS.is_file():
        pytest.skip("no float MRPC model in build/glue/mrpc/float, or no GLUE files beside this checkout")
    from datasets import Dataset

    from hf_quant.quantization.post_training import load_float

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        model = load_float(MRPC_MODEL, AutoModelForSequenceClassification).eval()
        tokenizer = AutoTokenizer.from_pretrained(MRPC_MODEL)
        rows = Dataset.from_parquet(str(MRPC_ROWS))
        encoded = [tokenizer(row["sentence1"], row["sentence2"], truncation=True) for row in rows]
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]["input_ids"]))
        chunks = [order[start : start + 32] for start in range(0, len(order), 32)]
        batches = [dict(tokenizer.pad([encoded[row] for row in chunk], return_tensors="pt")) for chunk in chunks]
        labels = [torch.tensor([rows[row]["label"] for row in chunk]) for chunk in chunks]

        def accuracy(candidate: Any) -> dict[str, float]:
            right = [
                (candidate(**b).logits.argmax(-1) == y).sum().item() for b, y in zip(batches, labels, strict=True)
            ]
            return {"accuracy": sum(right) / len(rows)}

        for scheme, max_drop in (("int4_weight_only", 0.0), ("int2_weight_only", 0.01)):
            quantized = quantize_dynamic(model, scheme, progress=False)
            before = accuracy(quantized)["accuracy"]
            result = meet_accuracy(model, quantized, accuracy, max_drop=max_drop)
            print(f"\n{scheme}: {before:.4f} before\n{result}")
            print(json.dumps({"scheme": scheme, "before": before, "after": result.value, "kept": len(result.kept)}))
            assert result.float_value > 0.75, "the float model has learned"
            assert accuracy(quantized)["accuracy"] == result.value >= result.float_value - max_drop - 1e-9
            assert len(result.kept) < result.layers
            assert result.evaluations <= 2 + 8 + 14 + result.layers
    finally:
        torch.set_num_threads(threads)
