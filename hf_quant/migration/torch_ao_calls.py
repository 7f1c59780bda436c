"""What calls and names of torch.ao.quantization and torchao say about a scheme."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from .report import Draft
from .values import scheme_name

_WITHOUT = "without training; `hf-quant quantize MODEL --scheme {}` does that, this recipe trains with it"
_OBSERVERS = "ranges: a mean of batches, then a moving one; weights by their own range per output channel"
# Names of torch.ao: bits, activations, and whether they belong to training.
_QCONFIGS: dict[str, tuple[int, str | None, bool]] = {
    "get_default_qat_qconfig": (8, "static", True),
    "get_default_qat_qconfig_mapping": (8, "static", True),
    "get_default_qconfig": (8, "static", False),
    "get_default_qconfig_mapping": (8, "static", False),
    "default_qat_qconfig": (8, "static", True),
    "default_qat_qconfig_v2": (8, "static", True),
    "default_per_channel_qat_qconfig": (8, "static", True),
    "default_qconfig": (8, "static", False),
    "default_per_channel_qconfig": (8, "static", False),
    "default_dynamic_qconfig": (8, "dynamic", False),
    "default_dynamic_qat_qconfig": (8, "dynamic", True),
    "per_channel_dynamic_qconfig": (8, "dynamic", False),
    "default_weight_only_qconfig": (8, None, False),
    "default_embedding_qat_qconfig": (8, None, True),
    "float_qparams_weight_only_qconfig": (8, None, False),
    "float_qparams_weight_only_qconfig_4bit": (4, None, False),
}
# Names of torchao: bits, activations, group (0: per channel), and the argument that says another group.
_TORCHAO: dict[str, tuple[int, str | None, int]] = {
    "Int8WeightOnlyConfig": (8, None, 0),
    "int8_weight_only": (8, None, 0),
    "Int8DynamicActivationInt8WeightConfig": (8, "dynamic_symmetric", 0),
    "int8_dynamic_activation_int8_weight": (8, "dynamic_symmetric", 0),
    "Int8StaticActivationInt8WeightConfig": (8, "static", 0),
    "Int4WeightOnlyConfig": (4, None, 128),
    "int4_weight_only": (4, None, 128),
    "Int8DynamicActivationInt4WeightConfig": (4, "dynamic", 32),
    "int8_dynamic_activation_int4_weight": (4, "dynamic", 32),
    "Int8DynActInt4WeightQATQuantizer": (4, "dynamic", 256),
    "Int4WeightOnlyQATQuantizer": (4, None, 256),
    "IntxWeightOnlyConfig": (8, None, 0),
    "Int8DynamicActivationIntxWeightConfig": (8, "dynamic", 0),
}


@dataclass(frozen=True)
class Unknown:
    """A value that is not in the text: a name, a call.

    Args:
        text (`str`): how it is written.
        node (`ast.AST`): the same, parsed.
    """

    text: str
    node: ast.AST

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Call:
    """A call, or a name that stands for a setting.

    Args:
        name (`str`): dotted, by the imports.
        node (`ast.AST`): the call.
        args (list), keywords (dict): plain values, or [`Unknown`].
        line (`int`): where it stands.
    """

    name: str
    node: ast.AST
    args: list[Any]
    keywords: dict[str, Any]
    line: int

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def source(self) -> str:
        """How it is written."""
        return ast.unparse(self.node)


def quantizes(draft: Draft, call: Call) -> bool:
    """Notes the scheme that a call or a name says; `False` if it says none."""
    last = call.last
    if last in _QCONFIGS:
        _qconfig(draft, call)
    elif last == "QConfig" and isinstance(call.node, ast.Call):
        _own_qconfig(draft, call)
    elif last == "quantize_dynamic":
        _quantize_dynamic(draft, call)
    elif last == "quantize_":
        _quantize_in_place(draft, call)
    elif last in _TORCHAO and isinstance(call.node, ast.Call) and last.endswith("Quantizer"):
        _torchao(draft, call, trained=True)
    else:
        return False
    return True


def _qconfig(draft: Draft, call: Call) -> None:
    bits, activations, trained = _QCONFIGS[call.last]
    scheme, remark = scheme_name(bits, activations)
    remarks = [remark] if remark else []
    if not trained:
        remarks.append(_WITHOUT.format(scheme))
    draft.put("quantization", "scheme", scheme, call.line, call.source, "; ".join(remarks))
    for backend in [arg for arg in (*call.args, *call.keywords.values()) if isinstance(arg, str)]:
        became = "the kernel that is fastest and exact on the machine that runs the model"
        draft.kept(call.line, f"backend {backend!r}", became)


def _own_qconfig(draft: Draft, call: Call) -> None:
    weight, activation = (call.keywords.get(key) for key in ("weight", "activation"))
    if weight is None and activation is None and len(call.args) == 2:
        activation, weight = call.args
    bits = _bits(weight) or 8
    text = activation.text if isinstance(activation, Unknown) else ""
    written = ast.unparse(activation.node) if isinstance(activation, Unknown) else ""
    kind: str | None = "static"
    if activation is None or text.endswith("Identity") or "NoopObserver" in written:
        kind = None
    elif "Dynamic" in written or "is_dynamic=True" in written:
        kind = "dynamic"
    scheme, remark = scheme_name(bits, kind)
    remarks = [remark] if remark else []
    if not scheme:
        scheme, remarks = "int8_static", [*remarks, "int8_static instead"]
    if _bits(activation) not in (None, 8):
        remarks.append(f"activations of {_bits(activation)} bits; they are int8 here")
    draft.put("quantization", "scheme", scheme, call.line, "QConfig(...)", "; ".join(remarks))
    for name, value in (("activation", activation), ("weight", weight)):
        if isinstance(value, Unknown):
            draft.none(call.line, f"{name}={ast.unparse(value.node)}", _OBSERVERS)


def _bits(value: Any) -> int | None:
    """The number of bits of `quant_min` and `quant_max` in an observer's arguments."""
    if not isinstance(value, Unknown):
        return None
    limits: dict[str, int] = {}
    for node in ast.walk(value.node):
        if isinstance(node, ast.keyword) and node.arg in ("quant_min", "quant_max"):
            try:
                limits[node.arg] = int(ast.literal_eval(node.value))
            except (ValueError, TypeError, SyntaxError):
                return None
    if len(limits) < 2 or not 0 < limits["quant_max"] - limits["quant_min"] < 2**32:
        return None
    return (limits["quant_max"] - limits["quant_min"]).bit_length()


def _quantize_dynamic(draft: Draft, call: Call) -> None:
    types = call.args[1] if len(call.args) > 1 else call.keywords.get("qconfig_spec")
    dtype = str(call.args[2] if len(call.args) > 2 else call.keywords.get("dtype", "torch.qint8"))
    if not dtype.endswith("qint8"):
        draft.none(call.line, f"dtype={dtype}", "nearest: `training.bf16`, or int8_dynamic")
    scheme = "int8_dynamic"
    draft.put("quantization", "scheme", scheme, call.line, "quantize_dynamic(...)", _WITHOUT.format(scheme))
    names = [str(item).rpartition(".")[2] for item in types] if isinstance(types, list) else []
    if isinstance(types, dict):
        draft.none(call.line, f"qconfig_spec={types}", "a recipe has one scheme; nearest: `targets`")
    elif isinstance(types, Unknown):
        draft.none(call.line, f"qconfig_spec={types}", "what it holds, the text does not say; nearest: `targets`")
    if "Embedding" not in names:
        why = "quantize_dynamic leaves embeddings in float here"
        draft.put("quantization", "embeddings", False, call.line, why)
    for name in names:
        if name in ("Linear", "Embedding"):
            draft.kept(call.line, name, "all but the head", "the head is quantized there too; name it in `targets`")
        else:
            draft.none(call.line, name, "only Linear, Conv1D and Embedding are quantized")


def _quantize_in_place(draft: Draft, call: Call) -> None:
    """torchao's `quantize_(model, config, filter_fn)`."""
    config = call.args[1] if len(call.args) > 1 else call.keywords.get("config")
    node = config.node if isinstance(config, Unknown) else None
    text = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    trained = False
    if isinstance(node, ast.Call) and text.endswith(("QATConfig", "IntXQuantizationAwareTrainingConfig")):
        trained = True
        step = next((ast.unparse(key.value) for key in node.keywords if key.arg == "step"), "")
        if step:
            draft.kept(call.line, f"step={step}", "QATCallback prepares, and converts when training ends")
        inner = [*node.args, *(key.value for key in node.keywords if key.arg in ("base_config", None))]
        found = next((arg for arg in inner if isinstance(arg, ast.Call)), None)
        if found is None:
            missing = (
                "" if "convert" in step and draft.get("quantization", "scheme") else "the text names no base_config"
            )
            if missing:
                draft.none(call.line, call.source, f"{missing}; nearest: `scheme`")
            return
        node = found
    if not isinstance(node, ast.Call):
        draft.none(call.line, call.source, "what the config is, the text does not say; nearest: `scheme`")
        return
    _torchao(draft, _as_call(node, call.line), trained)
    if "filter_fn" in call.keywords or len(call.args) > 2:
        draft.none(call.line, "filter_fn", "a function; nearest: patterns in `targets` or `ignore`")


def _as_call(node: ast.Call, line: int) -> Call:
    keywords = {key.arg: _plain(key.value) for key in node.keywords if key.arg}
    return Call(ast.unparse(node.func), node, [_plain(arg) for arg in node.args], keywords, line)


def _torchao(draft: Draft, call: Call, trained: bool) -> None:
    if call.last not in _TORCHAO:
        near = (
            "float8: hf-quant quantize MODEL --scheme float8_dynamic"
            if "loat8" in call.last
            else "a scheme of hf-quant"
        )
        draft.none(call.line, call.source, f"no scheme is this one; nearest: {near}")
        return
    bits, activations, group = _TORCHAO[call.last]
    remarks = []
    rest = dict(call.keywords)
    for key in ("group_size", "groupsize"):
        if isinstance(rest.get(key), int) and not isinstance(rest[key], bool):
            group = max(rest.pop(key), 0)
    weight_dtype = str(rest.pop("weight_dtype", ""))
    found = weight_dtype.rpartition("int")[2]
    if weight_dtype and found.isdigit():
        bits = int(found)
    granularity = rest.pop("granularity", rest.pop("weight_granularity", None))
    if isinstance(granularity, Unknown) and isinstance(granularity.node, ast.Call):
        sizes = [
            arg.value
            for arg in (*granularity.node.args, *(key.value for key in granularity.node.keywords))
            if isinstance(arg, ast.Constant) and isinstance(arg.value, int)
        ]
        group = sizes[0] if sizes else group
    scheme, remark = scheme_name(bits, activations, group or None)
    remarks += [remark] if remark else []
    if not scheme:
        draft.none(call.line, call.source, remark)
        return
    if not trained:
        remarks.append(_WITHOUT.format(scheme))
    draft.put("quantization", "scheme", scheme, call.line, call.source, "; ".join(remarks))
    why = f"{call.last} is for Linear layers"
    draft.put("quantization", "embeddings", False, call.line, why)
    for key, value in rest.items():
        draft.none(call.line, f"{key}={value}", "weights are symmetric by their own range; packing is the layout's")


def _plain(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Unknown(ast.unparse(node), node)
