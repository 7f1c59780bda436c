"""Pruning in Neural Compressor configurations."""

from __future__ import annotations

import re
from collections.abc import Callable

from .names import FILL_IN, OPEN, regex_patterns
from .neural_compressor_training import REST, train
from .section import Section
from .values import share


def prunings(section: Section, epochs: float | None) -> None:
    """A pruning configuration, and the configurations in it, which take its values for their defaults."""
    draft = section.draft
    approach = section.take("approach")
    epochs = train(section, epochs)
    if approach is not None and isinstance(approach.value, dict):  # 1.x: approach: {weight_compression: ...}
        for name, body in approach.value.items():
            inner = Section(draft, body, name)
            prunings(inner, epochs)
            inner.rest(REST)
        return
    parts = [*section.items("pruning_configs"), *section.items("pruners")]
    if not parts:
        _pruning(section, section, epochs)
    for node in parts:
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
    for key, into in (
        ("op_names", "targets"),
        ("names", "targets"),
        ("excluded_op_names", "ignore"),
        ("exclude_names", "ignore"),
    ):
        where = holder(key)
        patterns = [
            one for name in where.words(key) for one in regex_patterns(draft, name, "search", where.line_of(key))
        ]
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


def _steps(part: int, holder: Callable[[str], Section], epochs: float | None) -> None:
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


def _criterion(part: int, holder: Callable[[str], Section], structure: str) -> None:
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
