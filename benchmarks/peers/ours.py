"""hf_quant's int8 models: as loaded, and after `hf_quant.optimize`, without and with the compiler."""

from __future__ import annotations

from pathlib import Path

import torch

from .pytorch import Predict, predict_with


def load(folder: Path, threads: int, step: str) -> Predict:
    from hf_quant import load_quantized

    torch.set_num_threads(threads)
    return predict_with(load_quantized(folder / step))


def optimized(folder: Path, threads: int, step: str) -> Predict:
    return _optimized(folder, threads, step, compile=False)


def compiled(folder: Path, threads: int, step: str) -> Predict:
    return _optimized(folder, threads, step, compile=True)


def _optimized(folder: Path, threads: int, step: str, compile: bool) -> Predict:
    from hf_quant import load_quantized, optimize

    torch.set_num_threads(threads)
    return predict_with(optimize(load_quantized(folder / step), compile=compile))
