"""ONNX Runtime on the files that `peers.files` exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .cases import Batch

Predict = Callable[[Batch], np.ndarray]


def load(folder: Path, threads: int, step: str) -> Predict:
    return session(folder / step / "model.onnx", threads)


def session(path: Path, threads: int) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(batch: Batch) -> np.ndarray:
        return running.run(["logits"], batch)[0]

    return predict
