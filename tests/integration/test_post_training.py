"""quantize_dynamic: any AutoModel, from memory or disk, without touching the float model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_quant import load_quantized, quantize, quantize_dynamic, save_quantized
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import use_kernel
from hf_quant.runtime.modules import Int8Linear
from tests.tiny import Sentences, logits, tiny_bert, tiny_gpt2, tiny_llama

SCHEMES = ("int8_dynamic", "int8_weight_only")


def _text() -> dict[str, Tensor]:
    return Sentences(4).batch(4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_float_model_is_untouched_and_shares_nothing(scheme: str) -> None:
    model = tiny_bert().train()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    int8 = quantize_dynamic(model, scheme, progress=False)
    after = model.state_dict(keep_vars=True)
    assert model.training
    assert list(after) == list(before)
    assert all(after[name] is value and torch.equal(value, copy) for name, (value, copy) in before.items())
    assert not getattr(model.config, "quantization_config", None)
    assert not hasattr(model, "hf_quantizer")
    pointers = {value.data_ptr() for value in after.values()}
    assert all(value.data_ptr() not in pointers for value in int8.state_dict().values())
    assert int8.config is not model.config
    assert not any(module.training for module in int8.modules())


@pytest.mark.parametrize(
    ("maker", "ignore"), [(tiny_bert, "*.layer.0.*"), (tiny_llama, "*.up_proj"), (tiny_gpt2, "*.c_proj")]
)
def test_some_layers_of_each_kind(maker: Any, ignore: str, tmp_path: Path) -> None:
    int8 = quantize_dynamic(maker(), ignore=[ignore], progress=False)
    save_quantized(int8, tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8")
    assert list(quantized_modules(loaded)) == list(quantized_modules(int8))
    assert torch.equal(logits(loaded), logits(int8))


def test_inplace_changes_and_returns_the_model() -> None:
    model = tiny_bert()
    classifier = model.classifier.weight
    assert quantize_dynamic(model, inplace=True, progress=False) is model
    assert isinstance(model.bert.pooler.dense, Int8Linear)
    assert model.classifier.weight is classifier


def test_gradients_of_the_float_model_are_not_copied() -> None:
    model = tiny_bert()
    model(**_text(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    int8 = quantize_dynamic(model, progress=False)
    assert all(parameter.grad is None for parameter in int8.parameters())
    assert model.classifier.weight.grad is not None


def test_folder_in_int8_model_out(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "float")
    for path in (tmp_path / "float", str(tmp_path / "float")):
        int8 = quantize_dynamic(path, progress=False)
        assert torch.equal(logits(int8), logits(quantize_dynamic(model, progress=False)))


def test_class_and_options_of_from_pretrained(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "float")
    base = quantize_dynamic(tmp_path / "float", auto_class=AutoModel, progress=False)
    assert type(base).__name__ == "BertModel"
    three = quantize_dynamic(
        tmp_path / "float",
        auto_class=AutoModelForSequenceClassification,
        num_labels=3,
        ignore_mismatched_sizes=True,
        progress=False,
    )
    assert three.classifier.out_features == 3
    half = quantize_dynamic(tmp_path / "float", dtype=torch.bfloat16, progress=False)
    assert quantized_modules(half)["bert.pooler.dense"].weight_scale.dtype == torch.bfloat16


def test_options_of_from_pretrained_beside_a_model_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'dtype': no argument of quantize; those of from_pretrained"):
        quantize_dynamic(tiny_bert(), dtype=torch.bfloat16)


def test_a_plain_module_is_quantized_too() -> None:
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4))
    int8 = quantize_dynamic(model, progress=False)
    assert set(quantized_modules(int8)) == {"0", "1"}
    ids = torch.randint(0, 10, (2, 3))
    assert sqnr(model(ids), int8(ids)) > 30


def test_a_mid_training_checkpoint_is_a_float_model(tmp_path: Path) -> None:
    from hf_quant import QATCallback
    from tests.tiny import make_trainer

    trainer = make_trainer(
        tmp_path, callbacks=[QATCallback(convert=False)], changes={"save_strategy": "steps", "save_steps": 4}
    )
    trainer.train()
    int8 = quantize_dynamic(tmp_path / "run" / "checkpoint-8", progress=False)
    assert len(quantized_modules(int8)) == 16


def test_dynamic_static_and_weight_only_differ_as_they_should() -> None:
    """On the reference kernel, weight-only has no activation error: it is the closest to float."""
    model = tiny_bert()
    with use_kernel("reference"):
        expected = logits(model)
        dynamic, weight_only = (
            sqnr(expected, logits(quantize_dynamic(model, scheme, progress=False))) for scheme in SCHEMES
        )
    assert weight_only > dynamic


def test_progress_bar_goes_to_standard_error_and_can_be_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    quantize_dynamic(tiny_bert(), progress=False)
    silent = capfd.readouterr()
    assert silent.out == ""
    assert "Quantizing" not in silent.err
    quantize_dynamic(tiny_bert())
    assert capfd.readouterr().out == ""


def test_signature_is_the_documented_one() -> None:
    assert list(inspect.signature(quantize_dynamic).parameters) == ["model", "scheme", "options"]
    parameters = inspect.signature(quantize).parameters
    assert list(parameters)[:3] == ["model", "scheme", "calibration"]
    assert parameters["scheme"].default == "int8_dynamic"
    assert parameters["inplace"].default is False
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("targets", "ignore", "inplace"))
