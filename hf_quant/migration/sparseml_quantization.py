"""SparseML's quantization modifiers, in their three forms; what llm-compressor does without training is listed."""

from __future__ import annotations

import re

from .names import FILL_IN, OPEN, module_patterns
from .reading import Node
from .section import Section
from .sparseml_training import Training
from .values import scheme_name

ONE_SHOT = {
    "GPTQModifier": "without training; nearest: hf-quant quantize MODEL --rounding gptq",
    "SparseGPTModifier": "prunes without training; nearest: pruning with criterion: block_fisher",
    "OBCQModifier": "prunes without training; nearest: pruning with criterion: block_fisher",
    "WandaPruningModifier": "prunes without training; nearest: pruning with criterion: first_order",
    "SmoothQuantModifier": "without training; nearest: hf-quant quantize MODEL --equalize smoothquant",
    "AWQModifier": "without training; nearest: hf-quant quantize MODEL --equalize awq",
}
_PRESETS = {
    "W8A8": (8, "dynamic", None),
    "W8A16": (8, None, None),
    "W4A16": (4, None, 128),
    "W4A8": (4, "dynamic", 128),
}
_INPUTS = "hf_quant quantizes the inputs of Linear layers, not the outputs"
_FLOAT_CLASSES = re.compile(
    r"(Layer|Batch|RMS)Norm\w*|Softmax|Tanh|GELU\w*|ReLU|SiLU|Dropout|\w*Activation|QATMatMul\w*|Matmul\w*"
)
_REST = {
    "model_fuse_fn_name": "transformers models have no convolution and batch norm to fuse",
    "model_fuse_fn_kwargs": "transformers models have no convolution and batch norm to fuse",
    "freeze_bn_stats_epoch": "transformers models have no batch norm",
    "exclude_batchnorm": "transformers models have no batch norm",
    "quantize_conv_activations": "convolutions stay in float",
    "quantize_embedding_activations": _INPUTS,
    "reduce_range": "kernels that would overflow are not chosen; all 8 bits are used",
    "num_calibration_steps": "ranges follow the training batches",
    "activation_qconfig_kwargs": "activations are asymmetric int8 per tensor",
    "weight_qconfig_kwargs": "weights are symmetric int8 per output channel",
    "custom_quantizable_module_types": "Linear, Conv1D and Embedding only",
    "tensorrt": "the layout is that of compressed-tensors",
    "kv_cache_scheme": "caches stay in float",
    "strict": "a pattern that matches no module is always an error",
}


def one_shot(name: str, section: Section) -> None:
    """A modifier that works without training."""
    section.draft.none(section.line, name, ONE_SHOT[name])
    section.rest(dict.fromkeys(section.values, f"belongs to {name}"))


def quantization(name: str, section: Section, training: Training) -> None:
    """A quantization modifier as the quantization section."""
    draft = section.draft
    if "scheme" in (draft.sections.get("quantization") or {}):
        draft.none(section.line, name, "a second one; a recipe quantizes by one scheme")
        section.rest(dict.fromkeys(section.values, f"belongs to a second {name}"))
        return
    _scheme(name, section)
    if "start_epoch" in section.values:
        training.step("quantization", "start_step", section, "start_epoch")
    static = draft.get("quantization", "scheme") == "int8_static"
    freeze = section.number("disable_quantization_observer_epoch")
    if freeze is not None and freeze > 0 and static:
        training.step("quantization", "freeze_step", section, "disable_quantization_observer_epoch")
    elif not static:
        section.kept("disable_quantization_observer_epoch", "nothing", "only static schemes observe ranges")
    start = draft.get("quantization", "start_step") or 0.0
    if static and freeze is None and start >= 0.9:
        why = "the source never freezes ranges; halfway between the start of QAT and the end"
        draft.default("quantization", "freeze_step", round((1 + start) / 2, 6), why)
    if "quantize_embeddings" in section.values:
        wanted = section.flag("quantize_embeddings", default=True)
        section.put("quantization", "embeddings", wanted, "quantize_embeddings")
    if "quantize_linear_activations" in section.values:
        outputs = section.flag("quantize_linear_activations", default=True)
        section.kept("quantize_linear_activations", "float outputs, int8 inputs", _INPUTS if outputs else "")
    _modules(section)
    _ignored(section)
    for key in ("exclude_module_types", "scheme_overrides"):
        for item in _texts(section.items(key)):
            if _FLOAT_CLASSES.fullmatch(item.value):
                draft.kept(
                    item.line, f"{key}: {item.value}", "float", "only Linear, Conv1D and Embedding are quantized"
                )
            elif item.value == "Embedding" and key == "exclude_module_types":
                draft.put("quantization", "embeddings", False, item.line, f"{key}: Embedding")
            else:
                draft.none(
                    item.line,
                    f"{key}: {item.value}",
                    "a recipe has one scheme; nearest: `ignore`, or hf-quant quantize --override",
                )
    section.rest(_REST)


def _scheme(name: str, section: Section) -> None:
    """The scheme, from `scheme`, from `config_groups`, or from numbers of bits."""
    draft = section.draft
    node, groups = section.take("scheme"), section.take("config_groups")
    line, source = section.line, name
    if groups is not None and isinstance(groups.value, dict) and groups.value:
        first, *others = groups.value.items()
        for key, other in others:
            draft.none(other.line, f"config_groups.{key}", "a recipe quantizes by one scheme")
        node, line, source = first[1], first[1].line, f"config_groups.{first[0]}"
    elif node is not None:
        line, source = node.line, section.source("scheme")
    scheme, remark = "int8_static", ""
    if node is not None and isinstance(node.value, dict):
        scheme, remark = _from_parts(Section(draft, node, source.split(":")[0]))
    elif node is not None and str(node.value) in _PRESETS:
        scheme, remark = scheme_name(*_PRESETS[str(node.value)])
    elif node is not None and str(node.value) not in ("default", "deepsparse"):
        scheme, remark = "int8_dynamic", "no scheme of hf_quant; nearest is int8_dynamic"
    else:
        bits, activation_bits = section.number("weight_bits"), section.number("activation_bits")
        # A bare modifier is int8; `activation_bits: False` and 0 were ways to say that activations stay in float.
        if bits is not None or activation_bits is not None:
            scheme, remark = scheme_name(int(bits or 8), "static" if activation_bits != 0 else None)
            line, source = section.line_of("weight_bits"), section.source("weight_bits")
            section.kept(
                "activation_bits",
                "int8 activations" if activation_bits else "float activations",
                "" if activation_bits in (None, 0, 8) else "activations are int8 or float",
            )
    if not scheme:
        draft.none(line, source, f"{remark}; int8_static instead")
        scheme, remark = "int8_static", "the nearest"
    draft.put("quantization", "scheme", scheme, line, source, remark)


def _from_parts(scheme: Section) -> tuple[str, str]:
    """The name for `weights` and `input_activations` with their bits."""
    draft = scheme.draft
    weights, inputs = scheme.take("weights"), scheme.take("input_activations")
    remarks, bits, group = [], 8, None
    if weights is not None:
        part = Section(draft, weights, f"{scheme.name}.weights")
        bits = int(part.number("num_bits") or 8)
        group = None if part.number("group_size") in (None, -1) else int(part.number("group_size") or 0)
        if part.word("type") == "float":
            remarks.append("weights are integers; nearest: hf-quant quantize MODEL --scheme float8_dynamic")
        if not part.flag("symmetric", default=True):
            remarks.append("weights are symmetric")
        if part.word("strategy") == "tensor":
            remarks.append("weights have a scale per output channel")
        for key in ("num_bits", "group_size", "type", "symmetric", "strategy"):
            part.kept(key, "`scheme`")
        part.rest({"kwargs": "observers are hf_quant's", "observer": "a weight's range is its own", "dynamic": "-"})
    activations = None
    if inputs is not None:
        part = Section(draft, inputs, f"{scheme.name}.input_activations")
        dynamic = part.flag("dynamic", default=False)
        symmetric = part.flag("symmetric", default=False)
        activations = ("dynamic_symmetric" if symmetric else "dynamic") if dynamic else "static"
        if part.number("num_bits") not in (None, 8):
            remarks.append("activations are int8")
        if symmetric and not dynamic:
            remarks.append("static activations are asymmetric")
        for key in ("num_bits", "dynamic", "type", "symmetric", "strategy"):
            part.kept(key, "`scheme`")
        part.rest({"kwargs": "observers are hf_quant's", "observer": "ranges are a mean, then an EMA"})
    scheme.none("output_activations", _INPUTS)
    for target in scheme.words("targets"):
        if target == "Linear":
            scheme.kept("targets", "all but the head")
        else:
            draft.put(
                "quantization",
                "targets",
                module_patterns(draft, target, scheme.line_of("targets")),
                scheme.line_of("targets"),
                scheme.source("targets"),
            )
    scheme.rest()
    name, remark = scheme_name(bits, activations, group)
    return name, "; ".join([*([remark] if remark else []), *remarks])


def _modules(section: Section) -> None:
    """`submodules`, or `targets`: subtrees to quantize."""
    for key in ("submodules", "targets"):
        names = [name for name in section.words(key) if name != "Linear"]
        patterns = [one for name in names for one in module_patterns(section.draft, name, section.line_of(key))]
        if patterns:
            section.put("quantization", "targets", patterns, key, _open(patterns))
        else:
            section.kept(key, "all but the head")


def _ignored(section: Section) -> None:
    patterns: list[str] = []
    for item in _texts(section.items("ignore")):
        source = f"ignore: {item.value}"
        if _FLOAT_CLASSES.fullmatch(item.value):
            section.draft.kept(item.line, source, "float", "only Linear, Conv1D and Embedding are quantized")
        elif item.value == "Embedding":
            section.draft.put("quantization", "embeddings", False, item.line, source)
        elif item.value == "lm_head":
            section.draft.kept(item.line, source, "float", "heads stay in float by default")
        elif re.fullmatch(r"[A-Z]\w*", item.value):
            section.draft.none(item.line, source, "a class; nearest: patterns of names in `ignore`")
        else:
            patterns += module_patterns(section.draft, item.value, item.line)
    if patterns:
        section.put("quantization", "ignore", patterns, "ignore", _open(patterns))


def _open(patterns: list[str]) -> str:
    return OPEN if any(pattern.startswith(FILL_IN) for pattern in patterns) else ""


def _texts(items: list[Node]) -> list[Node]:
    """Texts, or the keys of mappings, each with its line."""
    return [
        Node(str(name), line)
        for item in items
        for name, line in (
            [(key, value.line) for key, value in item.value.items()]
            if isinstance(item.value, dict)
            else [(item.value, item.line)]
        )
    ]
