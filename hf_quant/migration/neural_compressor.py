"""Intel Neural Compressor configurations: 1.x YAML, and the keys of 2.x config classes in YAML or JSON."""

from __future__ import annotations

import re
from typing import Any

from .names import FILL_IN, OPEN, regex_patterns
from .reading import Node
from .report import TEACHER, Draft
from .section import Section
from .values import ZERO_POINT, scheme_name, share

_QUANTIZATION = ("quantization", "PostTrainingQuantConfig", "QuantizationAwareTrainingConfig", "quantization_config")
_PRUNING = ("pruning", "WeightPruningConfig", "weight_compression", "pruning_config")
_DISTILLATION = ("distillation", "DistillationConfig", "distillation_config")
_BARE_QUANTIZATION = ("approach", "op_type_dict", "op_name_dict")
_BARE_PRUNING = ("target_sparsity", "pruning_configs", "pruning_type")
_WITHOUT = "without training; `hf-quant quantize MODEL --scheme {}` does that, this recipe trains with it"
_REST = {
    "tuning": "nearest: hf-quant quantize MODEL --max-drop, which keeps an accuracy",
    "accuracy_criterion": "nearest: hf-quant quantize MODEL --max-drop, which keeps an accuracy",
    "tuning_criterion": "nearest: hf-quant quantize MODEL --max-drop",
    "evaluation": "nearest: the recipe's `evaluation`",
    "calibration": "ranges follow the training batches; nearest: hf-quant quantize --calibration",
    "calibration_sampling_size": "ranges follow the training batches; nearest: hf-quant quantize --samples",
    "version": "a description",
    "device": "the Trainer chooses the device",
    "backend": "kernels are chosen on the machine that runs the model",
    "excluded_precisions": "nearest: `training.bf16`",
    "recipes": "nearest: options of hf-quant quantize",
    "reduce_range": "kernels that would overflow are not chosen",
    "quant_level": "no search over configurations; nearest: hf-quant compare --schemes",
    "inputs": "inputs are those of the batches",
    "outputs": "outputs are those of the model",
    "optimization": "nothing is rewritten",
    "mixed_precision": "nearest: `training.bf16`",
}


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
        draft.default("training", "num_train_epochs", epochs, "--epochs")
    model = top.take("model")
    if model is not None and isinstance(model.value, dict):
        part = Section(draft, model, "model")
        if part.word("name") is not None:
            part.none("name", "a label, not where the model is; nearest: `model`")
        part.rest({"framework": "PyTorch", "inputs": _REST["inputs"], "outputs": _REST["outputs"]})
    elif model is not None:
        top.put("", "model", top.word("model"), "model")
    for names, bare, read in (
        (_QUANTIZATION, _BARE_QUANTIZATION, _quantization),
        (_PRUNING, _BARE_PRUNING, _prunings),
        (_DISTILLATION, (), _distillation),
    ):
        for name in names:
            found = top.take(name)
            if found is not None:
                section = Section(draft, found, name)
                read(section, epochs)
                section.rest(_REST)
        if any(key in top.values for key in bare):
            read(top, epochs)
    top.rest(_REST)


def _train(section: Section, epochs: float | None) -> float | None:
    """A `train` part of 1.x; gives the number of epochs."""
    node = section.take("train")
    if node is None:
        return epochs
    draft, part = section.draft, Section(section.draft, node, "train")
    for key in ("epoch", "end_epoch"):
        known = part.number(key)
        if known is not None and known > 0:
            epochs = epochs or known
            if draft.get("training", "num_train_epochs") != epochs:
                part.put("training", "num_train_epochs", epochs, key)
            part.kept(key, "`training.num_train_epochs`")
    part.kept("start_epoch", "the start of training")
    optimizer = part.take("optimizer")
    if optimizer is not None and isinstance(optimizer.value, dict):
        for name, body in optimizer.value.items():
            values = Section(draft, body, f"optimizer.{name}")
            for key, field in (("learning_rate", "learning_rate"), ("weight_decay", "weight_decay")):
                if values.number(key) is not None:
                    values.put("training", field, values.number(key), key)
            values.rest(dict.fromkeys(values.values, "nearest: `training.optim`"))
    loss = part.take("criterion")
    if loss is not None and isinstance(loss.value, dict):
        for name, body in loss.value.items():
            if name == "KnowledgeDistillationLoss":
                _loss(Section(draft, body, name))
            else:
                draft.none(body.line, f"criterion.{name}", "the loss is the model's own")
    part.rest(dict.fromkeys(part.values, "nearest: the fields of `training`"))
    return epochs


def _quantization(section: Section, epochs: float | None) -> None:
    draft = section.draft
    approach = section.word("approach") or "static"
    _train(section, epochs)
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
    line = section.line_of("approach")
    if not scheme:
        scheme, remarks = "int8_static", [*remarks, "int8_static instead"]
    draft.put("quantization", "scheme", scheme, line, section.source("approach"), "; ".join(remarks))


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
        near = "" if algorithm == "minmax" else f"{algorithm}; nearest: hf-quant quantize --method"
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


def _prunings(section: Section, epochs: float | None) -> None:
    """A pruning configuration, and the configurations in it, which take its values for their defaults."""
    draft = section.draft
    approach = section.take("approach")
    epochs = _train(section, epochs)
    if approach is not None and isinstance(approach.value, dict):  # 1.x: approach: {weight_compression: ...}
        for name, body in approach.value.items():
            inner = Section(draft, body, name)
            _prunings(inner, epochs)
            inner.rest(_REST)
        return
    found = [key for key in ("pruning_configs", "pruners") if section.take(key) is not None]
    parts: list[Node] = []
    for key in found:
        value = section.values[key]
        parts += value.value if isinstance(value.value, list) else [value]
    if not parts:
        _pruning(section, section, epochs)
    own = set(section.read)
    for node in parts:
        section.read = set(own)  # each configuration reads what it shares
        inner = Section(draft, node, "pruning_configs")
        _pruning(inner, section, epochs)
        inner.rest()


def _pruning(inner: Section, outer: Section, epochs: float | None) -> None:
    draft, part = inner.draft, inner.draft.new_pruning()

    def holder(key: str) -> Section:
        return inner if key in inner.values or inner is outer else outer

    def number(key: str) -> float | None:
        return holder(key).number(key)

    def word(key: str) -> str | None:
        return holder(key).word(key)

    structure = _structure(word("pattern") or "4x1")
    fixed = ":" in structure
    if structure and "pattern" in holder("pattern").values:
        holder("pattern").put(part, "structure", structure, "pattern")
    elif structure:
        draft.default(part, "structure", structure, "the default of Neural Compressor")
    else:
        holder("pattern").none("pattern", "nearest: structure: 4x1, 2:4, row, column or unstructured")
    if fixed:
        holder("target_sparsity").kept("target_sparsity", f"`structure: {structure}` says it")
    elif number("target_sparsity") is not None:
        holder("target_sparsity").put(part, "final_sparsity", number("target_sparsity"), "target_sparsity")
    else:
        draft.default(part, "final_sparsity", 0.9, "the default of Neural Compressor")
    if number("initial_sparsity"):
        holder("initial_sparsity").put(part, "initial_sparsity", number("initial_sparsity"), "initial_sparsity")
    _steps(part, holder, epochs)
    _criterion(part, holder, structure)
    scope = word("pruning_scope")
    if scope in ("global", "local") and not fixed:
        value = "global" if scope == "global" else "layer"
        holder("pruning_scope").put(part, "scope", value, "pruning_scope")
    holder("pruning_scope").kept("pruning_scope", f"`structure: {structure}` says it")
    for key, into in (("op_names", "targets"), ("names", "targets"), ("excluded_op_names", "ignore"),
                      ("exclude_names", "ignore")):
        where = holder(key)
        patterns = [one for name in where.words(key) for one in regex_patterns(draft, name, "search", where.line_of(key))]
        if patterns:
            where.put(part, into, patterns, key, OPEN if any(one.startswith(FILL_IN) for one in patterns) else "")
        else:
            where.kept(key, "no pattern")
    for key in ("pruning_op_types", "prune_layer_type"):
        names = holder(key).words(key)
        near = "" if set(names) <= {"Linear"} else "Linear and Conv1D are pruned; convolutions are not"
        holder(key).kept(key, "all Linear layers but the head", near)
    for key, why in _PRUNING_REST.items():
        holder(key).none(key, why)


_PRUNING_REST = {
    "max_sparsity_ratio_per_op": "nearest: final_sparsity by pattern",
    "min_sparsity_ratio_per_op": "nearest: final_sparsity by pattern",
    "sparsity_decay_type": "nearest: `schedule`",
    "criterion_type": "nearest: `criterion`",
    "criterion_reduce_type": "a block is worth the sum of its weights' scores",
    "reduce_type": "a block is worth the sum of its weights' scores",
    "resume_from_pruned_checkpoint": "zeros that are there stay and count",
    "low_memory_usage": "scores lie in the dtype of the weights",
    "update_frequency_on_step": "nearest: `frequency`",
}


def _steps(part: int, holder: Any, epochs: float | None) -> None:
    draft = holder("start_step").draft
    for source_keys, key in ((("start_step", "start_epoch"), "start_step"), (("end_step", "end_epoch"), "end_step")):
        for name in source_keys:
            where = holder(name)
            value = where.number(name)
            if value is None:
                continue
            if name.endswith("_step"):
                where.put(part, key, int(value), name)
            elif epochs is None:
                where.none(name, "the number of epochs is not in the file; give it with --epochs")
            else:
                where.put(part, key, share(value, epochs), name)
    start, end = draft.get(part, "start_step"), draft.get(part, "end_step")
    if isinstance(start, int) and end is None:
        draft.none(holder("start_step").line_of("start_step"), "start_step without end_step", "nearest: both in steps")
    where = holder("pruning_frequency")
    for name in ("pruning_frequency", "update_frequency"):
        where = holder(name)
        value = where.number(name)
        if value is not None:
            where.put(part, "frequency", max(int(value), 1), name)
    decay = holder("sparsity_decay_type")
    kind = {"exp": "cubic", "cube": "cubic", "cos": "cosine", "linear": "linear"}.get(
        str(decay.word("sparsity_decay_type")).lower()
    )
    if kind:
        exponential = "no schedule is exponential; cubic is the nearest"
        near = exponential if decay.word("sparsity_decay_type") == "exp" else ""
        decay.put(part, "schedule", kind, "sparsity_decay_type", near)
    kept = holder("sparsity_decay_type")
    if not kind:
        kept.none("sparsity_decay_type", "nearest: schedule: cubic, linear or cosine")


def _criterion(part: int, holder: Any, structure: str) -> None:
    where = holder("pruning_type")
    key = "pruning_type" if "pruning_type" in where.values else "prune_type"
    where = holder(key)
    word = where.word(key)
    known = {
        "magnitude": ("magnitude", ""),
        "basic_magnitude": ("magnitude", ""),
        "gradient": ("first_order", "weight times gradient"),
        "snip": ("first_order", "|weight x gradient| of single batches; gradients are gathered here"),
        "snip_progressive": ("first_order", "snip in patterns that grow; gradients are gathered here"),
        "snip_momentum": ("first_order", "a moving mean of |weight x gradient|; gradients are gathered here"),
        "snip_momentum_progressive": ("first_order", "a moving mean of |weight x gradient|, in patterns that grow"),
        "group_lasso": ("l2", "a regularization; the norm of a group is the nearest"),
        "gradient_sensitivity": ("first_order", "for heads; with structure: head"),
    }
    if word in known:
        criterion, remark = known[word]
        where.put(part, "criterion", criterion, key, remark)
    elif word is not None:
        where.none(key, "nearest: criterion: magnitude, first_order, movement or block_fisher")
    else:
        default = "the default of Neural Compressor is snip_momentum; first_order is the nearest"
        where.draft.default(part, "criterion", "first_order", default)


def _structure(pattern: str) -> str:
    """The structure of a pattern; in N:M, N of M weights are pruned there, and kept here."""
    pattern = pattern.removeprefix("tile_pattern_")
    if pattern in ("1x1", "unstructured"):
        return "unstructured"
    if pattern in ("channelx1", "1xchannel"):
        return "column" if pattern == "channelx1" else "row"
    ratio = re.fullmatch(r"(\d{1,2}):(\d{1,2})", pattern) or re.fullmatch(r"(\d{1,2})in(\d{1,2})", pattern)
    if ratio and 0 < int(ratio[1]) < int(ratio[2]):
        return f"{int(ratio[2]) - int(ratio[1])}:{ratio[2]}"
    return pattern if re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", pattern) else ""


def _distillation(section: Section, epochs: float | None) -> None:
    draft = section.draft
    _train(section, epochs)
    for key in ("criterion", "KnowledgeDistillationLossConfig"):
        node = section.take(key)
        if node is not None and isinstance(node.value, dict):
            inner = Section(draft, node, key)
            nested = [(name, body) for name, body in node.value.items() if isinstance(body.value, dict)]
            for name, body in nested:
                inner.read.add(name)
                if name.startswith("KnowledgeDistillationLoss"):
                    _loss(Section(draft, body, name))
                else:
                    draft.none(body.line, f"criterion.{name}", "nearest: hidden_states: true")
            if not nested:
                _loss(inner)
            inner.rest()
    if any(key in section.values for key in ("temperature", "loss_weights", "loss_types")):
        _loss(section)
    teacher = section.take("teacher_model") or section.take("teacher")
    if teacher is not None and isinstance(teacher.value, str):
        key = "teacher_model" if "teacher_model" in section.values else "teacher"
        section.put("distillation", "teacher", teacher.value, key)
    draft.default("distillation", "teacher", TEACHER, "the file names no teacher; without this key the float model teaches")


def _loss(section: Section) -> None:
    draft = section.draft
    if section.number("temperature") is not None:
        section.put("distillation", "temperature", section.number("temperature"), "temperature")
    node = section.take("loss_weights")
    if node is not None:
        weights = node.plain()
        if not (isinstance(weights, list) and len(weights) == 2 and all(type(one) in (int, float) for one in weights)
                and min(weights) >= 0 and sum(weights) > 0):
            raise draft.fail(node.line, f"`loss_weights` must be two numbers from 0, of labels and teacher, but is {node.show()}")
        section.put("distillation", "hardness", round(weights[1] / sum(weights), 6), "loss_weights")
    kinds = section.words("loss_types")
    near = "" if set(kinds) <= {"CE", "KL"} else "the softmax of the teacher with a temperature"
    section.kept("loss_types", "labels and soft targets", near)
    draft.default("distillation", "teacher", TEACHER, "the file names no teacher; without this key the float model teaches")
    section.rest()
