"""Intel Neural Compressor configurations: 1.x YAML, and the keys of 2.x config classes in YAML or JSON."""

from __future__ import annotations

import re

from .names import FILL_IN, OPEN, regex_patterns
from .neural_compressor_pruning import prunings
from .neural_compressor_training import REST, distillation, train
from .reading import Node
from .report import Draft
from .section import Section
from .values import ZERO_POINT, plain, scheme_name

_QUANTIZATION = ("quantization", "PostTrainingQuantConfig", "QuantizationAwareTrainingConfig", "quantization_config")
_PRUNING = ("pruning", "WeightPruningConfig", "weight_compression", "pruning_config")
_DISTILLATION = ("distillation", "DistillationConfig", "distillation_config")
_BARE_QUANTIZATION = ("approach", "op_type_dict", "op_name_dict")
_BARE_PRUNING = ("target_sparsity", "pruning_configs", "pruning_type")
_WITHOUT = "without training; `hf-quant quantize MODEL --scheme {}` does that, this recipe trains with it"


def is_neural_compressor(node: Node) -> bool:
    """Whether a file's values look like a Neural Compressor configuration."""
    known = {*_QUANTIZATION, *_PRUNING, *_DISTILLATION, *_BARE_QUANTIZATION, *_BARE_PRUNING}
    return isinstance(node.value, dict) and bool(known & node.value.keys())


def read_neural_compressor(node: Node, draft: Draft, epochs: float | None) -> None:
    """Fills a draft with what a Neural Compressor configuration says.

    Args:
        node ([`Node`]): the file.
        draft ([`Draft`]): to be filled.
        epochs (`float`, *optional*): of the whole training, in the place of what the file says.

    Raises:
        [`MigrationError`]: for a value that cannot be what its key wants, at its line.
    """
    top = Section(draft, node, "")
    if epochs is not None:
        draft.default("training", "num_train_epochs", plain(epochs), "--epochs")
    model = top.take("model")
    if model is not None and isinstance(model.value, dict):
        part = Section(draft, model, "model")
        if part.word("name") is not None:
            part.none("name", "a label, not where the model is; nearest: `model`")
        part.kept("framework", "PyTorch")
        part.rest({"inputs": REST["inputs"], "outputs": REST["outputs"]})
    elif model is not None:
        top.put("", "model", top.word("model"), "model")
    for names, bare, read in (
        (_QUANTIZATION, _BARE_QUANTIZATION, _quantization),
        (_PRUNING, _BARE_PRUNING, prunings),
        (_DISTILLATION, (), distillation),
    ):
        for name in names:
            found = top.take(name)
            if found is not None:
                section = Section(draft, found, name)
                read(section, epochs)
                section.rest(REST)
        if any(key in top.values for key in bare):
            read(top, epochs)
    top.rest(REST)


def _quantization(section: Section, epochs: float | None) -> None:
    draft = section.draft
    approach = section.word("approach") or "static"
    train(section, epochs)
    kind = "dynamic" if "dynamic" in approach else None if "weight_only" in approach else "static"
    bits, group, remarks = 8, None, []
    for key in ("model_wise", "op_type_dict", "op_name_dict", "op_wise"):
        node = section.take(key)
        if node is None:
            continue
        part = Section(draft, node, key)
        if key == "model_wise":
            own, group = _operator(part, key)
            bits = own if own is not None else bits
            continue
        for name in list(part.values):
            body = part.take(name)
            if body is None:
                continue
            own, own_group = _operator(Section(draft, body, f"{key}.{name}"), name)
            source = f"{key}.{name}"
            if own is None:
                _keep_float(draft, source, name, by_type=key == "op_type_dict", line=body.line)
            elif name in (".*", "Linear"):
                bits, group = own, own_group
            else:
                draft.none(body.line, source, "a recipe has one scheme; nearest: `targets` or `ignore`")
    scheme, remark = scheme_name(bits, kind, group)
    remarks += [remark] if remark else []
    trained = "aware" in approach or approach == "qat" or section.name == "QuantizationAwareTrainingConfig"
    if approach in ("auto", "post_training_auto_quant"):
        remarks.append("auto tries static, then dynamic; nearest: hf-quant compare --schemes")
    if scheme and not trained:
        remarks.append(_WITHOUT.format(scheme))
    if not scheme:
        scheme, remarks = "int8_static", [*remarks, "int8_static instead"]
    section.put("quantization", "scheme", scheme, "approach", "; ".join(remarks))


def _operator(part: Section, name: str) -> tuple[int | None, int | None]:
    """The bits and group size of an operator's weights; `None` bits where they stay in float."""
    draft = part.draft
    bits: int | None = 8
    group: int | None = None
    for key in ("weight", "activation"):
        node = part.take(key)
        if node is None:
            continue
        values = Section(draft, node, f"{part.name}.{key}")
        dtypes = values.words("dtype")
        if key == "weight" and dtypes and all(re.fullmatch(r"fp\d+|bf16", dtype) for dtype in dtypes):
            bits = None
        if key == "weight" and bits is not None:
            sizes = [int(found[1]) for dtype in dtypes if (found := re.fullmatch(r"u?int(\d)", dtype))]
            number = values.number("bits")
            bits = int(number) if number is not None else sizes[0] if sizes else 8
            size = values.number("group_size")
            group = int(size) if size is not None and size > 0 else None
        for known in ("dtype", "bits", "group_size"):
            values.kept(known, "float" if bits is None else "`scheme`")
        same = {"weight": ("sym", "per_channel"), "activation": ("asym", "per_tensor")}[key]
        values.kept("scheme", "`scheme`", "" if set(values.words("scheme")) <= {same[0]} else ZERO_POINT)
        per = "a scale per output channel" if key == "weight" else "a scale per tensor, or per token if dynamic"
        values.kept("granularity", per, "" if set(values.words("granularity")) <= {same[1]} else per)
        algorithm = "; ".join(values.words("algorithm"))
        near = "" if algorithm == "minmax" else f"{algorithm}; nearest: hf-quant quantize --observer"
        values.kept("algorithm", "a weight's own range" if key == "weight" else "ranges of training batches", near)
        values.rest()
    part.rest()
    return bits, group


def _keep_float(draft: Draft, source: str, name: str, *, by_type: bool, line: int) -> None:
    if by_type:
        if name.lower() == "embedding":
            draft.put("quantization", "embeddings", False, line, source)
        elif name.lower() == "linear":
            draft.none(line, source, "all Linear layers in float; nearest: no `quantization`")
        else:
            draft.kept(line, source, "float", "only Linear, Conv1D and Embedding are quantized")
        return
    patterns = regex_patterns(draft, name, "fullmatch", line)
    have = draft.get("quantization", "ignore")
    if have is None:
        draft.put("quantization", "ignore", patterns, line, source, OPEN if patterns[0].startswith(FILL_IN) else "")
    else:
        have.extend(pattern for pattern in patterns if pattern not in have)
        draft.kept(line, source, f"quantization.ignore: {patterns}")
