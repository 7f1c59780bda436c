"""Bytes of a model by kind of layer, and on disk."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..runtime.base import QuantizedModule
from ..runtime.modules import Int8Embedding
from .results import ModelSize


def model_size(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> ModelSize:
    """Size of a model from its own state, by kind.

    Args:
        model (`torch.nn.Module`): float, prepared or quantized.
        folder (`str`, *optional*): where it was loaded from; a folder that is not there counts as none.
    """
    kinds = {name: _kind(module) for name, module in model.named_modules()}
    # With `keep_vars` shared tensors are the same storage, which is how ties are seen.
    tensors = [
        (kinds.get(key.rpartition(".")[0], "rest"), value)
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    ]
    totals = {"embeddings": 0, "linear": 0, "rest": 0}
    seen: set[tuple[object, ...]] = set()
    for kind, tensor in sorted(tensors, key=lambda item: list(totals).index(item[0])):
        key = (str(tensor.device), tensor.data_ptr(), tensor.nbytes) if tensor.data_ptr() else (id(tensor),)
        if key not in seen:
            seen.add(key)
            totals[kind] += tensor.nbytes
    return ModelSize(**totals, on_disk=weights_on_disk(folder))


def _kind(module: nn.Module) -> str:
    if isinstance(module, (nn.Embedding, Int8Embedding)):
        return "embeddings"
    return "linear" if isinstance(module, (nn.Linear, Conv1D, QuantizedModule)) else "rest"


def weights_on_disk(folder: str | os.PathLike[str] | None) -> int | None:
    """Bytes of the weight files of a saved model, all shards together; `None` where there are none."""
    if folder is None or not Path(folder).is_dir():
        return None
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        files = list(Path(folder).glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    return None
