"""PyTorch's own ways: float32 and bf16, eager and compiled, and the int8 of torch.ao and of torchao."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cases import Batch, read

Predict = Callable[[Batch], np.ndarray]


def plain(folder: Path, threads: int, dtype: str) -> Predict:
    torch.set_num_threads(threads)
    return predict_with(_model(folder, dtype))


def compiled(folder: Path, threads: int, dtype: str) -> Predict:
    torch.set_num_threads(threads)
    return _compiled(_model(folder, dtype))


def torchao(folder: Path, threads: int, _: str) -> Predict:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.set_num_threads(threads)
    model = _model(folder, "float32")
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _compiled(model)


def torch_ao(folder: Path, threads: int, engine: str) -> Predict:
    """torch.ao's dynamic int8 on a named engine, by default the one that [`fastest_engine`] found."""
    torch.set_num_threads(threads)
    engine = engine or json.loads((folder / "torch_ao" / "engine.json").read_text())["engine"]
    torch.backends.quantized.engine = engine
    model = _model(folder, "float32")
    return predict_with(torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8))


def fastest_engine(folder: Path, threads: int) -> dict[str, Any]:
    """Which engine of torch.ao is the fastest for 8 sentences, and the seconds of each."""
    batch = read(folder / "cases" / "batch8.npz")[0]
    seconds = {}
    for engine in ("onednn", "x86", "fbgemm"):
        if engine in torch.backends.quantized.supported_engines:
            predict = torch_ao(folder, threads, engine)
            seconds[engine] = fastest(functools.partial(predict, batch))
    return {"engine": min(seconds, key=lambda engine: seconds[engine]), "seconds": seconds}


def fastest(function: Callable[[], Any], rounds: int = 5) -> float:
    """The least seconds of a few calls after the first."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def predict_with(model: Any) -> Predict:
    """A function from a batch of arrays to float32 logits."""

    def predict(batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.float().numpy()

    return predict


def _model(folder: Path, dtype: str) -> Any:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification.from_pretrained(folder / "float", dtype=dtype).eval()


def _compiled(model: Any) -> Predict:
    """Compiled by Inductor with frozen weights: anew for each full shape, once for all lengths of texts."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    one_shape = predict_with(torch.compile(model, dynamic=False))
    any_shape = predict_with(torch.compile(model, dynamic=True))

    def predict(batch: Batch) -> np.ndarray:
        return (one_shape if batch["attention_mask"].all() else any_shape)(batch)

    return predict
