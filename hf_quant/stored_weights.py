"""Which tensors of a model folder are weights, of what kind and scheme: told from headers, names and config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .layout import QUANT_METHOD, Stored, read_schemes

# What stands beside a weight of the same module and is none.
_BESIDE = re.compile(r"bias|weight_(\w+_)?(scale|shape|zero_point|g_idx)\w*|pruning_\w+")
_EMBEDDING = re.compile(r"emb(?!ed_out)|^(wte|wpe|shared|relative_attention_bias)$")


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor before it is read; `dtype` in safetensors' words, such as `"BF16"`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def is_float(self) -> bool:
        """Whether the dtype is one of floats."""
        return self.dtype.startswith(("F", "BF"))


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read; other weights, such as an adapter's, may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def read_headers(file: Path) -> dict[str, Header]:
    """What a safetensors file holds, by key: 8 bytes of length, then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    result = {}
    for key, value in header.items():
        start, end = value["data_offsets"]
        result[key] = Header(file, value["dtype"], tuple(value["shape"]), end - start)
    return result


def find_weights(tensors: Mapping[str, Header]) -> dict[str, str]:
    """The tensor that is the weight, by the name that a table gives it."""
    result = {}
    for key, header in tensors.items():
        owner, _, last = key.rpartition(".")
        if last in ("weight", "weight_packed") and len(header.shape) > 1:
            result[owner or last] = key
        elif header.is_float and not _BESIDE.fullmatch(last) and sum(size > 1 for size in header.shape) > 1:
            result[key] = key
    return result


def find_parts(weights: Mapping[str, str], tensors: Mapping[str, Header]) -> dict[str, list[str]]:
    """All tensors of each module: its weight, and those below it that belong to no other."""
    result: dict[str, list[str]] = {name: [key] for name, key in weights.items()}
    taken = set(weights.values())
    for key in tensors:
        owner = key
        while key not in taken and (owner := owner.rpartition(".")[0]):
            if owner in result:
                result[owner].append(key)
                break
    return result


def find_kinds(weights: Mapping[str, str], tensors: Mapping[str, Header]) -> dict[str, str]:
    """What kind of module holds each weight, as far as names and shapes tell.

    A bias is as long as the output: the weight's rows in a Linear, its columns in a Conv1D. Square ones are what the
    nearest others are.
    """
    kinds: dict[str, str] = {}
    told: dict[str, str] = {}
    square = []
    for name, key in weights.items():
        shape, bias = tensors[key].shape, tensors.get(f"{name}.bias")
        if len(shape) != 2 or key == name:
            kinds[name] = "other"
        elif bias is None:
            kinds[name] = "embedding" if _EMBEDDING.search(name.rpartition(".")[2]) else "linear"
        elif shape[0] == shape[1]:
            square.append(name)
        else:
            told[name] = "conv1d" if bias.shape == shape[1:] else "linear"
    for name in square:
        near: set[str] = set()
        prefix = name
        while prefix and not near:
            prefix = prefix.rpartition(".")[0]
            near = {kind for other, kind in told.items() if other.startswith(f"{prefix}." if prefix else "")}
        kinds[name] = "conv1d" if near == {"conv1d"} else "linear"
    return {**kinds, **told}


def read_forms(
    config: Path, weights: Mapping[str, str], kinds: dict[str, str], tensors: Mapping[str, Header]
) -> dict[str, Stored]:
    """How the layout holds each quantized weight, as far as it says; changes `kinds` where that is a Conv1D's.

    Raises:
        `ValueError`: if `config.json` is damaged or speaks of another layout.
    """
    try:
        layout = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is damaged ({error}). Copy or save the model again.") from error
    quantized = [name for name, key in weights.items() if not tensors[key].is_float or f"{key}_scale" in tensors]
    if not quantized and not layout:
        return {}
    if layout.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{config.parent} holds quantized weights, and its config.json gives quant_method "
            f"{layout.get('quant_method')!r}. Only float weights and {QUANT_METHOD!r} can be inspected: inspect the "
            "float model, or one that hf_quant saved."
        )
    from transformers.pytorch_utils import Conv1D

    targets = {target for group in (layout.get("config_groups") or {}).values() for target in group["targets"]}
    skeleton = nn.Module()  # modules of no size, for the layout's own matching by name and class
    for name in quantized:
        # Conv1D are stored as Linear are, (out, in); only the layout tells.
        if kinds[name] in ("linear", "conv1d"):
            kinds[name] = "conv1d" if "Conv1D" in targets and "Linear" not in targets else "linear"
        parent, _, last = name.rpartition(".")
        with torch.device("meta"):
            made = {"embedding": nn.Embedding, "conv1d": Conv1D}.get(kinds[name], nn.Linear)(1, 1)
        _container(skeleton, parent).add_module(last, made)
    forms = read_schemes(layout, skeleton)
    for name in quantized:
        packed = weights[name].endswith("_packed")
        if packed and f"{name}.weight_shape" not in tensors:
            raise ValueError(f"{config.parent} lacks {name}.weight_shape, so it is incomplete. Save it again.")
        # Some models have other names in memory than on disk, and the layout's exceptions are of those in memory.
        if name in forms and forms[name].packed is not packed:
            del forms[name]
    return forms


def _container(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root
