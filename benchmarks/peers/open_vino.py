"""OpenVINO on the files that `peers.files` converted, tuned for latency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .cases import Batch

Predict = Callable[[Batch], np.ndarray]


def load(folder: Path, threads: int, step_and_precision: str) -> Predict:
    """`step_and_precision` is such as `"openvino bf16"`; the precision is that of what is not int8."""
    import openvino

    step, precision = step_and_precision.split()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(folder / step / "model.xml", "CPU", settings)
    request = compiled.create_infer_request()

    def predict(batch: Batch) -> np.ndarray:
        return request.infer(batch)[0].copy()

    return predict
