"""What is held in memory while a model is quantized: never a second float model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from hf_quant import quantize, quantize_dynamic
from tests.tiny import Sentences


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that were made inside and are still held, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                if storage._cdata not in self.known and not any(_shares(value, arg) for arg in args):
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def _shares(value: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and value.untyped_storage()._cdata == other.untyped_storage()._cdata


def _bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=512, max_position_embeddings=32)).eval()


def _bytes(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def _largest(model: nn.Module) -> int:
    return max(parameter.nbytes for parameter in model.parameters())


def test_the_watch_sees_what_is_held_and_what_is_let_go() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.zeros(500)
    assert kept.nbytes == live.now == 4000
    assert live.peak == 6000


QUANTIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "int8_dynamic": lambda model: quantize_dynamic(model, inplace=True, progress=False),
    "int4_weight_only": lambda model: quantize_dynamic(model, "int4_weight_only", inplace=True, progress=False),
    "int4_weight_only, mse": lambda model: quantize(
        model, "int4_weight_only", rounding="mse", inplace=True, progress=False
    ),
    # A histogram of 64 kB an activation is nothing beside a real layer, but much beside these.
    "int8_static": lambda model: quantize(
        model, "int8_static", Sentences(2, 4), observer="minmax", inplace=True, progress=False
    ),
    "int8_static, equalized": lambda model: quantize(
        model,
        "int8_static",
        Sentences(2, 4),
        observer="minmax",
        equalize="smoothquant",
        inplace=True,
        progress=False,
    ),
}


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_quantizing_in_place_adds_less_than_one_layer_s_work_to_the_float_model(kind: str) -> None:
    with LiveBytes() as live:
        model = _bert()
        float_bytes, largest = _bytes(model), _largest(model)
        live.peak = live.now  # making it took more: initialization is not what is measured
        assert live.now >= float_bytes
        QUANTIZERS[kind](model)
    # One layer's work: its float values, quanta and integers at once, a few rows at a time where it is large.
    assert live.peak <= float_bytes + 3 * largest
    assert live.now < 0.4 * float_bytes, "the float weights are gone"


def test_quantizing_a_copy_adds_the_quantized_model_only() -> None:
    model = _bert()
    with LiveBytes() as live:
        int8 = quantize_dynamic(model, progress=False)
    assert live.peak <= _bytes(int8) + 3 * _largest(model)
