"""The bytes that a recipe's result takes on disk, its zeros, and what training keeps in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..pruning.masks import UnitMasks
from ..pruning.pruner import Pruner
from ..pruning.rebuild import renamed
from ..pruning.units import UnitGroup
from ..runtime.base import QuantizedModule
from ..runtime.modules import Int8Embedding, Int8Linear
from ..runtime.packed import PackedLinear
from ..schemes import Scheme
from ..targets import Selection, is_transposed
from .targets import kept_units

# safetensors sorts tensors by dtype, these last ones first, then by name.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_STATES = {  # numbers of 4 bytes that an optimizer keeps for each weight
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
}


@dataclass(frozen=True)
class Size:
    """What a recipe's result weighs.

    Args:
        float_bytes (`int`): bytes of the weight files of the float model as it is.
        result_bytes (`int`): bytes of those of the pruned and quantized model, headers included.
        parameters (`int`): weights of the float model.
        kept (`int`): weights of the result; fewer where units are removed.
        zeros (`int`, *optional*): those of them that are 0; unknown where present zeros are kept.
    """

    float_bytes: int
    result_bytes: int
    parameters: int
    kept: int
    zeros: int | None

    @property
    def sparsity(self) -> float | None:
        """Share of the result's weights that are 0, embeddings and biases counted."""
        return None if self.zeros is None else self.zeros / self.kept


@dataclass(frozen=True)
class Memory:
    """Bytes that training keeps from its first step on; activations and what one step needs are not among them.

    Args:
        parameters (`int`): the model.
        gradients (`int`): of the weights that are trained.
        optimizer (`int`, *optional*): its state; `None` where nothing is known about that optimizer.
        pruning (`int`): masks, and what criteria gather.
        teacher (`int`, *optional*): another model's weights; `None` where the teacher's config was not found.
    """

    parameters: int
    gradients: int
    optimizer: int | None
    pruning: int
    teacher: int | None

    @property
    def total(self) -> int:
        """What is known of it."""
        return self.parameters + self.gradients + (self.optimizer or 0) + self.pruning + (self.teacher or 0)


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file as transformers writes it: 8 for a length, a header of JSON, and the tensors.

    Args:
        tensors (`dict[str, torch.Tensor]`): by name; the meta device will do.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-ranks[tensors[name].dtype], name)):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What `save_pretrained` writes of a float model: its state, each shared tensor once."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    seen: set[int] = set()
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen and name not in ignored:
            seen.add(id(value))
            found[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return found


def result_tensors(
    model: nn.Module, pruners: Mapping[int, Pruner], shrinking: set[int], selection: Selection | None, scheme: Scheme
) -> dict[str, Tensor]:
    """What is written of the result.

    Args:
        model (`torch.nn.Module`): the float model; the meta device will do.
        pruners (`dict[int, Pruner]`): of the recipe's prunings, by number.
        shrinking (`set[int]`): numbers of those that remove units.
        selection ([`Selection`], *optional*): what is quantized; `None`: nothing.
        scheme ([`Scheme`]): of the quantization.

    Raises:
        `ValueError`: if a scheme's groups do not divide a layer that has become narrower.
    """
    tensors = stored_tensors(model)
    groups: list[UnitGroup] = []
    keep: dict[str, Tensor] = {}
    for index in sorted(shrinking & pruners.keys()):
        plan = pruners[index].plan
        assert isinstance(plan, UnitMasks)
        groups += plan.groups
        keep |= kept_units(pruners[index])
    for group in groups:
        gone = int((~keep[group.name]).sum())
        for part in group.slices:
            if part.dim is not None and part.index is not None and part.parameter in tensors:
                shape = list(tensors[part.parameter].shape)
                shape[part.dim] -= part.index.shape[1] * gone
                tensors[part.parameter] = tensors[part.parameter].new_empty(shape)
    names = {name: renamed(name, groups, keep) for name in tensors}
    tensors = {new: tensors[name] for name, new in names.items() if new is not None}
    shared: set[int] = set()
    for name in selection.quantized if selection is not None else ():
        new, module = renamed(name, groups, keep), model.get_submodule(name)
        if new is None or selection is None:
            continue
        weight = tensors.pop(f"{new}.weight", None)
        if weight is None:  # written once, under another module's name
            weight = torch.empty(module.weight.shape, device="meta")  # type: ignore[arg-type]
        bias = tensors.pop(f"{new}.bias", None)
        shell = _shell(module, new, weight, bias is not None, selection.scheme_of(name, scheme))
        for key, value in shell.state_dict().items():
            if key != "weight" or id(module.weight) not in shared:
                tensors[f"{new}.{key}"] = value
        shared.add(id(module.weight))
    return tensors


def _shell(module: nn.Module, name: str, weight: Tensor, bias: bool, scheme: Scheme) -> QuantizedModule:
    """The quantized module of that size, without numbers."""
    if isinstance(module, nn.Embedding):
        return Int8Embedding(weight.shape[0], weight.shape[1], module.padding_idx, weight.dtype, "meta")
    transposed = is_transposed(module)
    outputs, inputs = weight.t().shape if transposed else weight.shape
    if scheme.group_size is not None and inputs % scheme.group_size:
        raise ValueError(
            f"{name} would have {inputs} inputs once units are removed, which the scheme {scheme.name!r} cannot "
            f"divide into groups of {scheme.group_size}. Prune to a multiple of {scheme.group_size}, or use a "
            "scheme without groups."
        )
    kind = PackedLinear if scheme.packed else Int8Linear
    return kind(inputs, outputs, scheme, bias, transposed, weight.dtype, "meta")


def predicted_sparsity(pruner: Pruner) -> tuple[float, float]:
    """The sparsity of the targets that is asked for, and the one that whole parts allow; shares in [0, 1]."""
    plan = pruner.plan
    wanted = pruner.total(pruner.final)
    sets: dict[object, list[str]] = {}
    for name, goal in pruner.final.items():
        sets.setdefault(goal if pruner.scope == "global" else name, []).append(name)
    gone = 0.0
    for names in sets.values():
        goal, parts = pruner.final[names[0]], sum(plan.blocks[name] for name in names)
        weights = sum(plan.sizes[name] for name in names)
        alike = len({plan.sizes[name] / plan.blocks[name] for name in names}) == 1
        gone += min(round(goal * parts), parts - len(names)) / parts * weights if alike else goal * weights
    return wanted, gone / sum(plan.sizes.values())


def count_zeros(pruner: Pruner) -> int:
    """How many numbers a pruning that removes nothing leaves at 0."""
    plan = pruner.plan
    if not isinstance(plan, UnitMasks):
        return round(predicted_sparsity(pruner)[1] * sum(plan.sizes.values()))
    shapes = {name: parameter.shape for name, parameter in pruner.model.named_parameters(remove_duplicate=False)}
    share = predicted_sparsity(pruner)[1]
    zeros = 0.0
    for group in plan.groups:
        for part in group.slices:
            if part.dim is not None and part.index is not None:
                shape = shapes[part.parameter]
                zeros += share * part.index.numel() * shape.numel() / shape[part.dim]
    return round(zeros)


def optimizer_bytes(args: TrainingArguments, model: nn.Module) -> int | None:
    """Bytes of the optimizer's state in float32, by its name in `TrainingArguments`; `None` for one not known here."""
    name = str(getattr(args.optim, "value", args.optim))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adafactor":  # one number a row and one a column
        flat = sum(parameter.nbytes for parameter in trained if parameter.ndim < 2)
        return flat + sum(4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2]) for p in trained if p.ndim > 1)
    if name not in _STATES or args.optim_args:
        return None
    return _STATES[name] * 4 * sum(parameter.numel() for parameter in trained)


def training_memory(
    args: TrainingArguments, model: nn.Module, pruners: Mapping[int, Pruner], teacher: int | None
) -> Memory:
    """What training keeps; see [`Memory`]."""
    return Memory(
        sum(value.nbytes for value in [*model.parameters(), *model.buffers()]),
        sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        optimizer_bytes(args, model),
        sum(pruner.memory for pruner in pruners.values()),
        teacher,
    )
