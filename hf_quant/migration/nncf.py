"""NNCF configurations: JSON with one or several compression algorithms."""

from __future__ import annotations

from .nncf_scopes import scopes
from .reading import Node
from .report import TEACHER, Draft, Part
from .section import Section
from .values import ZERO_POINT, plain, scheme_name, share

_PRUNINGS = ("magnitude_sparsity", "rb_sparsity", "movement_sparsity", "filter_pruning", "const_sparsity")
_TOP = {
    "input_info": "shapes come from the batches",
    "target_device": "kernels are chosen on the machine that runs the model",
    "accuracy_aware_training": "nearest: hf-quant quantize MODEL --max-drop, which keeps an accuracy",
    "compression_lr_multiplier": "one learning rate for all parameters",
    "log_dir": "nearest: `training.logging_dir`",
}
_EPOCHS = "the number of epochs is not in the file; give it with --epochs"


def is_nncf(node: Node) -> bool:
    """Whether a file's values look like an NNCF configuration."""
    items = node.value if isinstance(node.value, list) else [node]
    found = [
        isinstance(item.value, dict) and ("compression" in item.value or "algorithm" in item.value) for item in items
    ]
    return bool(found) and all(found)


def read_nncf(node: Node, draft: Draft, epochs: float | None) -> None:
    """Fills a draft with what an NNCF configuration says.

    Args:
        node ([`Node`]): the file: a configuration, or the value of its `compression` alone.
        draft ([`Draft`]): to be filled.
        epochs (`float`, *optional*): of the whole training, in the place of what the file says.

    Raises:
        [`MigrationError`]: for a value that cannot be what its key wants, at its line.
    """
    if isinstance(node.value, list) or "compression" not in node.value:
        algorithms = node
    else:
        top = Section(draft, node, "")
        algorithms = Node(top.items("compression"), node.line)
        epochs = _training(top, epochs)
        top.rest(_TOP)
    for item in algorithms.value if isinstance(algorithms.value, list) else [algorithms]:
        section = Section(draft, item, "compression")
        name = section.word("algorithm")
        if name is None:
            raise draft.fail(
                item.line, 'an algorithm of `compression` must name itself: `"algorithm": "quantization"`'
            )
        section.name = name
        section.noted.add("algorithm")
        if name in ("quantization", "experimental_quantization"):
            _quantization(section, epochs)
        elif name in _PRUNINGS:
            _pruning(name, section, epochs)
        elif name == "knowledge_distillation":
            _distillation(section)
        else:
            draft.none(section.line_of("algorithm"), section.source("algorithm"), "hf_quant has no such algorithm")
            section.rest(dict.fromkeys(section.values, f"belongs to {name}"))
        section.rest({"compression_lr_multiplier": "one learning rate for all parameters", "initializer": "-"})


def _training(top: Section, epochs: float | None) -> float | None:
    """What the example scripts of NNCF read beside `compression`; gives the number of epochs."""
    known = top.number("epochs")
    if known is not None and known > 0:
        epochs = epochs or known
        top.put("training", "num_train_epochs", plain(epochs), "epochs")
    elif epochs is not None:
        top.draft.default("training", "num_train_epochs", plain(epochs), "--epochs")
    if top.word("model") is not None:
        top.put("", "model", top.word("model"), "model")
    if top.number("batch_size") is not None:
        top.put("training", "per_device_train_batch_size", int(top.number("batch_size") or 1), "batch_size")
    optimizer = top.take("optimizer")
    if optimizer is not None:
        section = Section(top.draft, optimizer, "optimizer")
        for key, field in (("base_lr", "learning_rate"), ("weight_decay", "weight_decay")):
            if section.number(key) is not None:
                section.put("training", field, section.number(key), key)
        section.rest(dict.fromkeys(section.values, "nearest: `training.optim` and `training.lr_scheduler_type`"))
    return epochs


def _quantization(section: Section, epochs: float | None) -> None:
    draft = section.draft
    bits: dict[str, int] = {}
    for key in ("weights", "activations"):
        node = section.take(key)
        part = Section(draft, node or Node({}, section.line), key)
        bits[key] = int(part.number("bits") or 8)
        part.kept("bits", "`scheme`", "" if key == "weights" or bits[key] == 8 else "activations are int8")
        mode = part.word("mode")
        same = mode in (None, "symmetric" if key == "weights" else "asymmetric")
        part.kept("mode", "`scheme`", "" if same else ZERO_POINT)
        wanted = part.flag("per_channel", default=key == "weights")
        per = "a scale per output channel" if key == "weights" else "a scale per tensor"
        part.kept("per_channel", per, "" if wanted is (key == "weights") else per)
        scopes(part, "ignored_scopes", "quantization")
        part.rest(
            {"signed": "signs are hf_quant's", "narrow_range": "-128 to 127", "target_scopes": "nearest: `targets`"}
        )
    scheme, remark = scheme_name(bits["weights"], "static")
    if not scheme:
        scheme, remark = "int8_static", f"{remark}; int8_static instead"
    source = section.source("algorithm")
    draft.put("quantization", "scheme", scheme, section.line_of("algorithm"), source, remark)
    preset = section.word("preset")
    section.kept("preset", "`scheme`", "" if preset == "mixed" else ZERO_POINT)
    params = section.take("params")
    if params is not None:
        part = Section(draft, params, "params")
        for key in ("activations_quant_start_epoch", "weights_quant_start_epoch"):
            _step(part, "quantization", "start_step", key, epochs)
        part.rest(dict.fromkeys(part.values, "a staged schedule; nearest: `start_step` and `freeze_step`"))
    initializer = section.take("initializer")
    if initializer is not None:
        part = Section(draft, initializer, "initializer")
        part.none("range", "ranges follow the training batches; nearest: hf-quant quantize --calibration")
        part.none("batchnorm_adaptation", "transformers models have no batch norm")
        part.none("precision", "one number of bits for all; nearest: hf-quant compare --schemes")
        part.rest()
    scopes(section, "ignored_scopes", "quantization")
    rest = {
        "overflow_fix": "kernels that would overflow are not chosen",
        "scope_overrides": "a recipe has one scheme; nearest: `ignore`",
        "target_scopes": "nearest: patterns in `targets`",
        "quantize_inputs": "inputs of Linear layers are quantized",
        "quantize_outputs": "outputs stay in float",
        "export_to_onnx_standard_ops": "no ONNX is written",
    }
    section.rest(rest)


def _pruning(name: str, section: Section, epochs: float | None) -> None:
    draft, part = section.draft, section.draft.new_pruning()
    at, source = section.line_of("algorithm"), section.source("algorithm")
    params = section.take("params")
    inner = Section(draft, params or Node({}, section.line), f"{name}.params")
    what = "pruning" if name == "filter_pruning" else "sparsity"
    if name == "const_sparsity":
        draft.put(part, "schedule", "constant", at, source)
        scopes(section, "ignored_scopes", part)
        inner.rest(dict.fromkeys(inner.values, "zeros are kept as they are"))
        return
    if name == "movement_sparsity":
        _movement(inner, part, at, source, epochs)
    else:
        criterion, remark = (
            ("magnitude", "") if name == "magnitude_sparsity" else ("movement", "scores learnt as masks")
        )
        if name == "filter_pruning":
            criterion, remark = _importance(inner)
            draft.put(
                part, "structure", "row", at, source, "rows become 0; structure: neuron with shrink removes them"
            )
        if "filter_importance" not in inner.values:
            draft.put(part, "criterion", criterion, at, source, remark)
        importance = inner.word("weight_importance")
        if importance == "normed_abs":
            inner.put(part, "scope", "layer", "weight_importance", "norms by layer; a goal by layer is the nearest")
        inner.kept("weight_importance", "`criterion: magnitude`")
        mode = inner.word("sparsity_level_setting_mode")
        inner.kept("sparsity_level_setting_mode", "scope: global", "" if mode == "global" else "nearest: a mapping")
        everything = inner.flag("all_weights", default=False)
        if name == "filter_pruning" and "all_weights" in inner.values:
            inner.put(part, "scope", "global" if everything else "layer", "all_weights")
        _goal(inner, section, part, what, epochs)
    scopes(section, "ignored_scopes", part)
    scopes(section, "target_scopes", part, "targets")
    section.none(
        "sparse_structure_by_scopes",
        "nearest: one pruning by structure: structure: 32x32, row or column, with `targets`",
    )
    section.rest({"initializer": "transformers models have no batch norm to adapt"})
    inner.rest(
        {
            "enable_structured_masking": "nearest: structure: head or neuron with shrink: true",
            "update_per_optimizer_step": "masks are updated by `frequency`",
            "steps_per_epoch": "the Trainer knows it",
            "concave": "nearest: `schedule`",
            "patience": "masks do not wait for a loss; nearest: `schedule`",
            "interlayer_ranking_type": "nearest: criterion: first_order with scope: global",
            "prune_first_conv": "convolutions are not pruned",
            "prune_last_conv": "convolutions are not pruned",
            "prune_downsample_convs": "convolutions are not pruned",
            "prune_batch_norms": "transformers models have no batch norm",
        }
    )


def _movement(inner: Section, part: int, at: int, source: str, epochs: float | None) -> None:
    draft = inner.draft
    draft.put(part, "criterion", "soft_movement", at, source, "one threshold on learnt scores; the final share is set")
    why = "the source reaches a share by its regularization; choose the share of weights to prune"
    draft.default(part, "final_sparsity", 0.5, why)
    _step(inner, part, "start_step", "warmup_start_epoch", epochs)
    _step(inner, part, "end_step", "warmup_end_epoch", epochs)
    inner.none("importance_regularization_factor", "the share is set, not found; nearest: final_sparsity")
    for key in ("init_importance_threshold", "final_importance_threshold"):
        inner.none(key, "thresholds follow from the share; nearest: initial_sparsity and final_sparsity")
    if inner.number("power") is not None:
        inner.put(part, "schedule", _polynomial(inner.number("power") or 3), "power")
    inner.kept("schedule", "`schedule`")


def _importance(inner: Section) -> tuple[str, str]:
    word = inner.word("filter_importance") or "L2"
    criterion = {"L1": "l1", "L2": "l2"}.get(word, "l2")
    remark = "" if word in ("L1", "L2") else f"{word} compares filters with each other; l2 is the nearest"
    if "filter_importance" in inner.values:
        inner.put(len(inner.draft.prunings) - 1, "criterion", criterion, "filter_importance", remark)
    return criterion, remark


def _goal(inner: Section, section: Section, part: int, what: str, epochs: float | None) -> None:
    """The share to prune, and its way there."""
    draft, schedule = inner.draft, inner.word("schedule") or "exponential"
    inner.kept("schedule", "`schedule`")
    initial = section.number(f"{what}_init")
    steps, levels = inner.take("multistep_steps"), inner.take("multistep_sparsity_levels")
    if schedule == "multistep" and levels is not None and isinstance(levels.value, list):
        at = [
            0.0,
            *(_number(draft, item) for item in (steps.value if steps and isinstance(steps.value, list) else [])),
        ]
        if epochs is None:
            inner.none("multistep_steps", _EPOCHS)
            if levels.value:
                inner.put(
                    part, "final_sparsity", _number(draft, levels.value[-1]), "multistep_sparsity_levels", _EPOCHS
                )
            return
        pairs = [[share(step, epochs), _number(draft, level)] for step, level in zip(at, levels.value, strict=False)]
        if len(at) != len(levels.value):
            raise draft.fail(
                levels.line,
                f"{len(levels.value)} sparsity levels need {len(levels.value) - 1} steps between "
                f"them, but there are {len(at) - 1}",
            )
        inner.put(part, "schedule", pairs, "multistep_sparsity_levels")
        inner.kept("multistep_steps", "`schedule`")
        section.kept(f"{what}_init", "the first pair of `schedule`")
        return
    if inner.number(f"{what}_target") is not None:
        inner.put(part, "final_sparsity", inner.number(f"{what}_target"), f"{what}_target")
    else:
        draft.default(part, "final_sparsity", 0.5, f"the file has no {what}_target; 0.5 is NNCF's")
    if initial is not None and initial > 0:
        section.put(part, "initial_sparsity", initial, f"{what}_init")
    section.kept(f"{what}_init", "initial_sparsity: 0")
    power = inner.number("power")
    if schedule == "polynomial":
        name = _polynomial(power or 0.9)
        key = "power" if power is not None else "schedule"
        inner.put(part, "schedule", name, key)
    elif schedule in ("exponential", "exponential_with_bias", "adaptive", "baseline"):
        if schedule == "baseline":
            inner.put(part, "schedule", "one_shot", "schedule")
        else:
            draft.put(
                part,
                "schedule",
                "cubic",
                inner.line_of("schedule"),
                inner.source("schedule"),
                f"{schedule}: fast at first, then slower; cubic is the nearest",
            )
    else:
        inner.none("schedule", "nearest: cubic")
    warmup = inner.number("num_init_steps")
    if schedule != "baseline":
        if warmup is not None:
            _step(inner, part, "start_step", "num_init_steps", epochs)
        elif epochs is not None:
            draft.default(part, "start_step", 0.0, "NNCF prunes from the first epoch on")
        for key in (f"{what}_target_epoch", "pruning_steps"):
            _step(inner, part, "end_step", key, epochs)
    else:
        _step(inner, part, "start_step", "num_init_steps", epochs)
    inner.kept(f"{what}_freeze_epoch", "`end_step`", "masks stay as they are from `end_step` on")
    inner.none("pruning_flops_target", "a share of work, not of weights; nearest: final_sparsity")


def _number(draft: Draft, node: Node) -> float:
    if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
        raise draft.fail(node.line, f"a list of numbers holds {node.show()!r}")
    return float(node.value)


def _polynomial(power: float) -> str:
    return {1.0: "linear", 3.0: "cubic"}.get(float(power), f"polynomial_{power:g}")


def _step(section: Section, part: Part, key: str, from_key: str, epochs: float | None) -> None:
    epoch = section.number(from_key)
    if epoch is None:
        return
    if epochs is None and epoch > 0:
        section.none(from_key, _EPOCHS)
    else:
        section.put(part, key, share(epoch, epochs or 1.0), from_key)


def _distillation(section: Section) -> None:
    draft = section.draft
    kind = section.word("type")
    if kind is not None:
        section.kept("type", "softmax with a temperature", "" if kind == "softmax" else f"no {kind} of logits")
    scale = section.number("scale")
    if scale is not None and scale > 0:
        hardness = round(scale / (1 + scale), 6)
        section.put(
            "distillation", "hardness", hardness, "scale", "labels + scale x teacher, both divided by their sum"
        )
    if section.number("temperature") is not None:
        section.put("distillation", "temperature", section.number("temperature"), "temperature")
    draft.kept(section.line_of("algorithm"), section.source("algorithm"), "distillation")
    if "teacher" not in (draft.sections.get("distillation") or {}):
        why = "NNCF's teacher is the model before compression; write its fine-tuned folder, or remove this key"
        draft.default("distillation", "teacher", TEACHER, why)
    section.none("is_soft", "soft targets always")
