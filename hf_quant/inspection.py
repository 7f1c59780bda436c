"""What lies in a model folder: scheme, zeros and bytes of every weight, read tensor by tensor without a model."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import require_sound_folder
from .kernel_times import KernelTimes, kernel_table, kernel_times
from .layout import Stored
from .runtime.packed import unpack
from .schemes import make_scheme
from .stored_weights import Header, find_kinds, find_parts, find_weights, read_forms, read_headers, weight_files

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "hf_quant.inspection/1"  # raised when fields change their meaning
TEXT_WIDTH = 140  # names of modules are long
ZIP_LEVEL = 6
ZIP_SAMPLE = 4 * 2**20  # bytes of one tensor that are compressed; of a larger one, blocks spread evenly
ZIP_BLOCK = 2**16  # bytes; deflate looks back 2**15

_TRAINING = re.compile(r"(\.activation_fake_quant\.observer\.|\.pruning_)\w+$")


@dataclass(frozen=True)
class InspectedModule:
    """One weight of a checkpoint, with what lies beside it.

    Args:
        name (`str`): of the module; of the tensor where it is not called `weight`.
        kind (`str`): `"linear"`, `"conv1d"`, `"embedding"` or `"other"`, told by names and the bias's shape.
        scheme (`str`): of the layout, such as `"int4_weight_only_g64"`; the dtype where it is not quantized.
        shape (`tuple`): of the weight, unpacked; (out, in) for `"linear"`, (in, out) for a float `"conv1d"`.
        weights (`int`): how many.
        zeros (`int`): how many of them are exactly 0.
        pattern (`str` or `None`): the strictest N:M with M of 4 or 8, N of M / 2 or fewer, of which the weight has no
            more than N values other than 0 in each M consecutive inputs; `None` also where all are 0.
        zero_rows (`int`): output channels, or tokens of an embedding, that are all zero; 0 unless a matrix.
        zero_columns (`int`): input channels that are all zero; 0 unless a matrix.
        bytes (`int`): on disk, with bias, scales and what training keeps.
        training_bytes (`int`): of those, what only training needs: QAT ranges and sums of pruning criteria.
        zip_bytes (`int`): `bytes`, had the weight itself been compressed; see [`Inspection`].
    """

    name: str
    kind: str
    scheme: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    pattern: str | None
    zero_rows: int
    zero_columns: int
    bytes: int
    training_bytes: int
    zip_bytes: int

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """What [`inspect_folder`] found. `print` it, or write it with `to_json`.

    Weights are what has two dimensions or more; biases, norms and buffers are in `bytes` only. Weights that are tied
    are stored, and counted, once.

    `zip_bytes` is the size with all weights deflated by zlib at level 6, as a zip does it: an estimate of how little
    the file says, and nothing that can be loaded. Of a weight of more than 4 MiB, blocks of 64 KiB that are spread
    evenly are compressed, and the result scaled.

    Args:
        path (`str`): the folder.
        modules (tuple of [`InspectedModule`]): in the order of their names, numbers as numbers.
        files (`int`): how many files hold the weights.
        bytes (`int`): of those files.
        kernels (tuple of [`KernelTimes`], *optional*): which kernels this machine takes; where that was asked for.
    """

    path: str
    modules: tuple[InspectedModule, ...]
    files: int
    bytes: int
    kernels: tuple[KernelTimes, ...] | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(module.weights for module in self.modules)

    @property
    def zeros(self) -> int:
        """Weights that are exactly 0."""
        return sum(module.zeros for module in self.modules)

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def zip_bytes(self) -> int:
        """Bytes of the files, had the weights been compressed."""
        return self.bytes - sum(module.bytes - module.zip_bytes for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts; sparsities are fractions."""
        totals = {name: getattr(self, name) for name in ("weights", "zeros", "sparsity", "bytes", "zip_bytes")}
        modules = [{**asdict(one), "shape": list(one.shape), "sparsity": one.sparsity} for one in self.modules]
        found = {"path": self.path, "files": self.files, "totals": totals, "modules": modules}
        return found if self.kernels is None else {**found, "kernels": [one.to_dict() for one in self.kernels]}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The same as JSON; written to `path` where one is given."""
        text = json.dumps({"schema": SCHEMA, **self.to_dict()}, indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def table(self, every_module: bool = False) -> RenderableType:
        """For `rich`: one row for each family of modules that differ only by their number, or for every module."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("module", overflow="fold")
        for heading in ("count", "scheme", "shape", "zeros, %", "pattern", "MB"):
            justify: Any = "left" if heading in ("scheme", "pattern") else "right"
            table.add_column(heading, justify=justify, overflow="fold")
        families: dict[tuple[str, str, str], list[InspectedModule]] = defaultdict(list)
        for module in self.modules:
            families[module.name if every_module else _family(module.name), module.kind, module.scheme].append(module)
        for (name, kind, scheme), members in families.items():
            words = scheme if kind == "other" else f"{scheme} {kind}"
            shapes = {" x ".join(map(str, member.shape)) for member in members}
            shape = shapes.pop() if len(shapes) == 1 else "various"
            size = _megabytes(sum(member.bytes for member in members))
            table.add_row(name, str(len(members)), words, shape, _zeros(members), _found(members), size)
        parts: list[RenderableType] = [
            Text(self.path, style="bold"),
            Text(),
            table,
            Text(),
            *(Text(line) for line in self._notes()),
        ]
        if self.kernels is not None:
            parts += [Text(), kernel_table(self.kernels)]
        return Group(*parts)

    def _notes(self) -> list[str]:
        training = sum(module.training_bytes for module in self.modules)
        where = "1 file" if self.files == 1 else f"{self.files} files"
        lines = [
            f"{self.weights:,} weights, {self.zeros:,} of them zero ({_percent(self.sparsity)} %); "
            f"{_megabytes(self.bytes)} MB in {where}.",
            f"Zipped it would take about {_megabytes(self.zip_bytes)} MB (zlib level {ZIP_LEVEL}).",
        ]
        if training:
            lines.insert(1, f"{_megabytes(training)} MB are state that only training needs.")
        if self.zeros:
            lines.append(
                "Zeros make a dense file, int8 or float, no smaller and no faster: each takes as many bits and as "
                "much arithmetic as any other value. (2:4 in half precision on CUDA is faster: use_semi_structured.) "
                "No maintained sparse layout can be reloaded by plain transformers (compressed-tensors dropped its "
                "sparse compressors), so hf_quant writes none."
            )
        return lines

    def __rich__(self) -> RenderableType:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=TEXT_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def inspect_folder(path: str | os.PathLike[str], kernels: bool = False) -> Inspection:
    """Read what lies in a model folder: float or quantized, whole or in shards, finished or in the midst of training.

    No model is built, and one tensor at a time is in memory.

    Args:
        path (`str`): a local folder with `config.json` and safetensors weights. Hub ids are not read.
        kernels (`bool`, *optional*, defaults to `False`): also find the kernels that its quantized Linear layers get
            on this machine, by measurement where they are not known.

    Returns:
        [`Inspection`]

    Raises:
        `FileNotFoundError`: if there is no such folder, no `config.json`, no weights, or a shard is missing.
        `ValueError`: if a file is damaged, or the weights are quantized in a way that hf_quant cannot read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} is no local folder, and only those are inspected. Check the path, or download the model first: "
            f"hf download {path} --local-dir FOLDER"
        )
    require_sound_folder(folder)
    files = weight_files(folder)
    tensors = {key: header for file in files for key, header in read_headers(file).items()}
    weights = find_weights(tensors)
    kinds = find_kinds(weights, tensors)
    stored = read_forms(folder / "config.json", weights, kinds, tensors)
    parts = find_parts(weights, tensors)
    modules = []
    with ExitStack() as stack:
        from safetensors import safe_open

        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for name in sorted(weights, key=_natural):
            key = weights[name]
            tensor = opened[tensors[key].file].get_tensor(key)
            shape = tuple(tensor.shape)
            if key.endswith("weight_packed"):
                other = key.removesuffix("packed") + "shape"
                shape = tuple(opened[tensors[other].file].get_tensor(other).tolist())
            keys = parts[name]
            modules.append(_inspect(name, kinds[name], stored.get(name), tensor, shape, keys, tensors))
    size = sum(file.stat().st_size for file in files)
    times = None
    if kernels:
        layers = [one for one in modules if one.name in stored and one.kind in ("linear", "conv1d")]
        quantized = [one for one in layers if one.scheme.startswith("int")]
        times = kernel_times((one.scheme, one.shape[0], one.shape[1]) for one in quantized)
    return Inspection(str(folder), tuple(modules), len(files), size, times)


def _inspect(
    name: str,
    kind: str,
    stored: Stored | None,
    tensor: Tensor,
    shape: tuple[int, ...],
    keys: Iterable[str],
    tensors: Mapping[str, Header],
) -> InspectedModule:
    scheme = None if stored is None else stored.scheme or make_scheme(8, None)  # an embedding's, by row
    label = str(tensor.dtype).removeprefix("torch.")
    values = tensor
    if not tensor.is_floating_point():
        packed = tensor.dtype == torch.int32
        bits = scheme.bits if scheme is not None else 32 * tensor.shape[1] // shape[1] if packed else 8
        label = f"int{bits}" if scheme is None else scheme.name
        values = unpack(tensor, bits, shape[1]) if packed else tensor
    elif scheme is not None:
        label = f"{label} (config.json: {scheme.name})"
    zeros, pattern, rows, columns = _count(values, kind == "conv1d" and tensor.is_floating_point())
    size = sum(tensors[key].bytes for key in keys)
    training = sum(tensors[key].bytes for key in keys if _TRAINING.search(key))
    return InspectedModule(
        name, kind, label, shape, values.numel(), zeros, pattern, rows, columns, size, training,
        size - tensor.nbytes + _zip_size(tensor),
    )  # fmt: skip


def _count(values: Tensor, transposed: bool) -> tuple[int, str | None, int, int]:
    """Zeros, pattern, zero rows and zero columns of a weight, (out, in) unless `transposed`."""
    kept = (values.float() if values.element_size() == 1 and values.is_floating_point() else values) != 0
    zeros = kept.numel() - int(kept.sum())
    if kept.ndim != 2 or not zeros:
        return zeros, None, 0, 0
    kept = kept.t() if transposed else kept
    pattern = None
    for group in (8, 4):  # the stricter one last
        if kept.shape[1] % group == 0:
            most = int(kept.reshape(-1, group).sum(-1, dtype=torch.uint8).max())
            pattern = f"{most}:{group}" if 0 < most <= group // 2 else pattern
    return zeros, pattern, int((~kept.any(1)).sum()), int((~kept.any(0)).sum())


def _zip_size(tensor: Tensor) -> int:
    """Bytes of a deflated tensor; see [`Inspection`]."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if data.numel() > ZIP_SAMPLE:
        blocks = data[: data.numel() // ZIP_BLOCK * ZIP_BLOCK].view(-1, ZIP_BLOCK)
        data = blocks[:: -(-data.numel() // ZIP_SAMPLE)].reshape(-1)
    return round(len(zlib.compress(data.numpy().data, ZIP_LEVEL)) * (tensor.nbytes / max(1, data.numel())))


def _family(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _zeros(members: list[InspectedModule]) -> str:
    """Percent of zeros of all; in brackets, of the least and the most sparse member where they differ."""
    whole = sum(member.zeros for member in members) / max(1, sum(member.weights for member in members))
    ends = [_percent(find(member.sparsity for member in members)) for find in (min, max)]
    return _percent(whole) if ends[0] == ends[1] else f"{_percent(whole)} ({ends[0]} to {ends[1]})"


def _found(members: list[InspectedModule]) -> str:
    patterns = sorted({member.pattern or "none" for member in members})
    words = ["/".join(patterns)] if patterns != ["none"] else []
    for what in ("rows", "columns"):
        count = sum(getattr(member, f"zero_{what}") for member in members)
        words += [f"{count} zero {what if count > 1 else what[:-1]}"] if count else []
    return ", ".join(words)


def _percent(share: float) -> str:
    """One digit after the point; 0 and 100 are exact."""
    if share in (0.0, 1.0):
        return f"{share * 100:.0f}"
    if 0.0005 <= share < 0.9995:
        return f"{share * 100:.1f}"
    return "<0.1" if share < 0.5 else ">99.9"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}" if count < 1e8 else f"{count / 1e6:.0f}"
