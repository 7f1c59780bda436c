"""SparseML's pruning modifiers."""

from __future__ import annotations

import re

from .names import FILL_IN, OPEN, parameter_patterns
from .section import Section
from .sparseml_training import Training
from .values import share

_SCORES = {"magnitude": "magnitude", "movement": "movement"}
_CRITERIA = {
    "GMPruningModifier": "magnitude",
    "GlobalMagnitudePruningModifier": "magnitude",
    "MagnitudePruningModifier": "magnitude",
    "MovementPruningModifier": "movement",
    "OBSPruningModifier": "block_fisher",
    "OBSXPruningModifier": "block_fisher",
    "MFACPruningModifier": "block_fisher",
    "MFACGlobalPruningModifier": "block_fisher",
    "ACDCPruningModifier": "magnitude",
    "StructuredPruningModifier": "l2",
    "ConstantPruningModifier": "",
}
_FISHER = "gradients are gathered over one `frequency` before each update; nothing to set"
_REST = {
    "num_grads": _FISHER,
    "grad_sampler_kwargs": _FISHER,
    "num_pages": _FISHER,
    "mfac_options": _FISHER,
    "use_gradient_buffering": _FISHER,
    "damp": "hf_quant damps by its own rule",
    "num_recomputations": "the Fisher matrix is read anew at each update",
    "phased": "phases of dense training; hf_quant's zeros never return",
    "momentum_buffer_reset": "only dense phases need it; hf_quant has none",
    "allow_reintroduction": "hf_quant's zeros never return",
    "param_group_dependency_map": "hf_quant finds what depends on what by running the model",
    "log_types": "logs go where `training.report_to` says",
}


def pruning(name: str, section: Section, training: Training) -> bool:
    """A pruning modifier as a pruning section; `False` if the name is none."""
    draft = section.draft
    if name in ("LayerPruningModifier", "LayerThinningModifier"):
        nearest = {
            "LayerPruningModifier": "layers by name; nearest: structure: layer with shrink: true chooses by score",
            "LayerThinningModifier": "nearest: shrink: true with structure: head, neuron or layer",
        }[name]
        draft.none(section.line, name, nearest)
        section.rest(dict.fromkeys(section.values, f"belongs to {name}"))
        return True
    if name not in _CRITERIA:
        return False
    targets = _targets(section)
    same = [part for part in range(len(draft.prunings)) if (draft.get(part, "targets") or []) == targets]
    whole = [part for part in range(len(draft.prunings)) if draft.get(part, "targets") is None]
    if name == "ConstantPruningModifier" and (same or (draft.prunings and not targets)):
        draft.kept(section.line, name, "the masks of pruning stay to the end anyway")
        for key in section.values:
            section.kept(key, "the masks of pruning stay to the end anyway")
        return True
    if same or whole:
        draft.none(
            section.line, name, "prunes weights that another one prunes; nearest: one `schedule: [[step, share]]`"
        )
        section.rest(dict.fromkeys(section.values, f"belongs to a second pruning of the same weights, {name}"))
        return True
    part = draft.new_pruning()
    if name == "ConstantPruningModifier":
        draft.put(part, "schedule", "constant", section.line, name)
        for key in ("start_epoch", "end_epoch", "update_frequency"):
            section.kept(key, "zeros are kept from the first step to the last")
    else:
        _sparsity(name, section, part)
        _steps(section, part, training)
        _what(name, section, part)
    if targets:
        open_ones = any(target.startswith(FILL_IN) for target in targets)
        section.put(part, "targets", targets, "params", OPEN if open_ones else "")
    _leave_enabled(section)
    section.rest(_REST)
    return True


def _sparsity(name: str, section: Section, part: int) -> None:
    key = "compression_sparsity" if name == "ACDCPruningModifier" else "final_sparsity"
    node = section.take(key)
    structure = _structure(section)
    acdc = "ACDC trains sparse and dense in turns; hf_quant prunes gradually, and zeros never return"
    if node is not None and isinstance(node.value, dict):
        goals: dict[str, float] = {}
        for sparsity, names in node.value.items():
            for pattern in parameter_patterns(section, names):
                try:
                    goals[pattern] = float(sparsity)
                except ValueError:
                    raise section.draft.fail(names.line, f"{sparsity!r} in `{key}` is no share of weights") from None
        section.put(part, key, goals, key)
    elif ":" in structure:
        section.kept(key, f"`structure: {structure}` says it")
    elif section.number(key) is not None:
        section.put(part, "final_sparsity", section.number(key), key, acdc if name == "ACDCPruningModifier" else "")
    initial = section.take("init_sparsity")
    if initial is not None and isinstance(initial.value, str):
        section.none("init_sparsity", "a share read from the weights; nearest: zeros that are there stay and count")
    elif initial is not None:
        value = section.number("init_sparsity")
        section.put(part, "initial_sparsity", value, "init_sparsity")


def _steps(section: Section, part: int, training: Training) -> None:
    start, end = section.number("start_epoch"), section.number("end_epoch")
    func = section.word("inter_func")
    # Without an end, or at once: everything is pruned at the start.
    if end is None or end < 0 or (start is not None and end <= start):
        key = "end_epoch" if "end_epoch" in section.values else "start_epoch"
        section.put(part, "schedule", "one_shot", key, "")
        training.step(part, "start_step", section, "start_epoch")
        section.kept("inter_func", "all at once")
        section.kept("update_frequency", "all at once")
        return
    training.step(part, "start_step", section, "start_epoch")
    training.step(part, "end_step", section, "end_epoch")
    if func in ("cubic", "linear"):
        section.put(part, "schedule", func, "inter_func")
    elif func is not None:
        section.put(part, "schedule", "linear", "inter_func", f"no schedule is {func}; linear is the nearest")
    frequency = section.number("update_frequency")
    if frequency is not None and frequency <= 0:
        section.put(part, "frequency", 1, "update_frequency")
    elif frequency is not None and training.epochs is None:
        section.none("update_frequency", "the number of epochs is not in the file; give it with --epochs")
    elif frequency is not None and training.epochs is not None:
        section.put(part, "frequency", max(share(frequency, training.epochs), 1e-6), "update_frequency")


def _what(name: str, section: Section, part: int) -> None:
    criterion, remark, key = _CRITERIA[name], "", "score_type"
    score = section.take("score_type")
    if name.startswith("GM") and score is not None:
        criterion = _SCORES.get(str(score.value), "magnitude")
        remark = "" if str(score.value) in _SCORES else f"no criterion is {score.show()}; magnitude is the nearest"
    if name.startswith(("MFAC", "OBSX")):
        remark = "hf_quant inverts the Fisher matrix block by block (oBERT)"
    block = section.number("fisher_block_size")
    if criterion == "block_fisher" and block is not None:
        size = min((2, 4, 8, 16, 32, 64, 128), key=lambda known: abs(known - block))
        criterion, key = f"block_fisher_{size}", "fisher_block_size"
        remark = remark or ("" if size == block else f"blocks of {block:g}; hf_quant has 2 to 128")
    if key in section.values:
        section.put(part, "criterion", criterion, key, remark)
    else:
        section.draft.put(part, "criterion", criterion, section.line, name, remark)
    structure = _structure(section)
    node = section.take("mask_type")
    if node is not None and structure:
        units = "whole rows and columns become 0; structure: neuron or head with shrink: true removes them"
        section.put(part, "structure", structure, "mask_type", units if structure in ("row", "column") else "")
    elif node is not None:
        section.none("mask_type", "nearest: structure: unstructured, 2:4, 4x1, row, column, head, neuron or layer")
    everywhere = section.flag("global_sparsity", default=name.startswith(("GlobalMagnitude", "MFACGlobal")))
    if ":" not in structure:
        if "global_sparsity" in section.values:
            section.put(part, "scope", "global" if everywhere else "layer", "global_sparsity")
        else:
            why = f"{name} without global_sparsity"
            section.draft.put(part, "scope", "global" if everywhere else "layer", section.line, why)
    section.kept("global_sparsity", f"`structure: {structure}` says it")


def _structure(section: Section) -> str:
    """The structure of a `mask_type`; empty where there is none such."""
    node = section.take("mask_type")
    if node is None:
        return ""
    value = node.plain()
    if isinstance(value, list) and len(value) == 2 and all(isinstance(size, int) for size in value):
        sizes = ["" if size == -1 else str(size) for size in value]
        return {("1", ""): "row", ("", "1"): "column"}.get((sizes[0], sizes[1]), "x".join(sizes) if all(sizes) else "")
    word = str(value)
    known = {"unstructured": word, "block4": "1x4", "tensorrt": "2:4", "filter": "row", "channel": "column"}
    return known.get(word) or (word if re.fullmatch(r"[1-9]\d?:[1-9]\d?", word) else "")


def _leave_enabled(section: Section) -> None:
    if section.flag("leave_enabled", default=True):
        section.kept("leave_enabled", "masks stay to the end")
    else:
        section.none("leave_enabled", "hf_quant's zeros never return; masks stay to the end")


def _targets(section: Section) -> list[str]:
    node = section.take("params")
    if node is None or node.value in ("__ALL_PRUNABLE__", "__ALL__", ["__ALL_PRUNABLE__"]):
        section.kept("params", "all but the head", "the head is pruned there too; name it in `targets`")
        return []
    patterns = parameter_patterns(section, node)
    if any(word in ("__ALL_PRUNABLE__", "__ALL__") for word in section.words("params")):
        section.kept("params", "all but the head", "the head is pruned there too; name it in `targets`")
        return []
    return patterns
