"""float8 through torchao: refused in words where a device lacks it; saved and loaded in torchao's format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_quant import quantize, quantize_dynamic
from hf_quant.quantization import float8
from hf_quant.quantization.float8 import quantize_float8
from hf_quant.targets import select_modules
from tests.tiny import logits, tiny_bert


def test_elsewhere_the_error_says_what_is_needed() -> None:
    model = tiny_bert()
    for call in (quantize, quantize_dynamic):
        with pytest.raises(
            ValueError,
            match=r"scheme 'float8_dynamic' runs on GPUs of compute capability 8\.9 or newer, but the model is on "
            r"'cpu'\. Move it there \(model\.to\(\"cuda\"\)\), or use int8_dynamic\.",
        ):
            call(model, "float8_dynamic")
    assert not hasattr(model.config, "quantization_config")


class _On:
    """A model whose first parameter says that it lies on a GPU."""

    def parameters(self) -> Any:
        return iter([type("Parameter", (), {"device": torch.device("cuda")})()])


def test_an_older_gpu_and_a_missing_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        ValueError, match=r"needs compute capability 8\.9 or newer; Tesla T4 has 7\.5\. Use int8_dynamic"
    ):
        float8.require_float8(_On())  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"needs torchao: pip install 'hf_quant\[float8\]'"):
        float8.require_float8(_On())  # type: ignore[arg-type]


def test_options_that_do_not_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.quantization.post_training.require_float8", lambda model: None)
    with pytest.raises(
        ValueError, match=r"overrides cannot go with scheme 'float8_dynamic', which torchao carries out"
    ):
        quantize(tiny_bert(), "float8_dynamic", overrides={"*.query": None})


def test_the_saved_model_is_plain_torchao(tmp_path: Path) -> None:
    """With the one float8 configuration of torchao that a CPU runs."""
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_bert().eval()
    expected = logits(model)
    quantize_float8(model, select_modules(model, ["*.query", "*.key"]), torchao.Float8WeightOnlyConfig())
    got = logits(model)
    assert 0 < (got - expected).abs().max() < 0.2 * expected.abs().max()
    model.save_pretrained(tmp_path / "float8")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float8")
    assert torch.equal(logits(loaded), got)
    kinds = {
        name: type(module.weight).__name__ for name, module in loaded.named_modules() if name.endswith("self.key")
    }
    assert set(kinds.values()) == {"Float8Tensor"}
    assert type(loaded.bert.pooler.dense.weight) is torch.nn.Parameter
