"""What was measured, where, and with which versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from ..runtime.base import quantized_modules
from .results import Machine, ModelInfo
from .sizes import model_size


def origin(model: PreTrainedModel) -> str:
    """The folder or hub id that a model in memory came from; empty where it came from none."""
    return getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", "") or ""


def describe_model(given: PreTrainedModel | str | os.PathLike[str], model: PreTrainedModel) -> ModelInfo:
    """Name, class and size of a model.

    Args:
        given (`PreTrainedModel` or `str`): what the user passed.
        model (`transformers.PreTrainedModel`): the model itself.
    """
    path = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    return ModelInfo(
        name=path or origin(model) or "(in memory)",
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        int8_layers=len(quantized_modules(model)),
        size=model_size(model, path),
    )


def describe_machine(device: torch.device) -> Machine:
    """The processor, the device that both models ran on, and torch's threads."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass  # not Linux
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return Machine(cpu=cpu, device=name, threads=torch.get_num_threads())


def describe_versions() -> dict[str, str]:
    """Versions of hf_quant and of what its figures depend on."""
    return {
        "hf_quant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
