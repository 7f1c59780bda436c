"""What Neural Compressor configurations say of training and distillation."""

from __future__ import annotations

from .report import TEACHER
from .section import Section
from .values import plain

REST = {
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
_TEACHER = "the file names no teacher; without this key the float model teaches itself"


def train(section: Section, epochs: float | None) -> float | None:
    """What a `train` part of 1.x says; gives the number of epochs, `epochs` where that is known already."""
    node = section.take("train")
    if node is None:
        return epochs
    draft, part = section.draft, Section(section.draft, node, "train")
    for key in ("epoch", "end_epoch"):
        known = part.number(key)
        if known is not None and known > 0:
            epochs = epochs or known
            if draft.get("training", "num_train_epochs") != epochs:
                part.put("training", "num_train_epochs", plain(epochs), key)
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


def distillation(section: Section, epochs: float | None) -> None:
    """A distillation configuration."""
    draft = section.draft
    train(section, epochs)
    for key in ("criterion", "KnowledgeDistillationLossConfig"):
        node = section.take(key)
        if node is not None and isinstance(node.value, dict):
            inner = Section(draft, node, key)
            nested = [(name, body) for name, body in node.value.items() if isinstance(body.value, dict)]
            for name, body in nested:
                inner.noted.add(name)
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
    draft.default("distillation", "teacher", TEACHER, _TEACHER)


def _loss(section: Section) -> None:
    draft = section.draft
    if section.number("temperature") is not None:
        section.put("distillation", "temperature", section.number("temperature"), "temperature")
    node = section.take("loss_weights")
    if node is not None:
        weights = node.plain()
        if not (
            isinstance(weights, list)
            and len(weights) == 2
            and all(type(one) in (int, float) for one in weights)
            and min(weights) >= 0
            and sum(weights) > 0
        ):
            raise draft.fail(
                node.line, f"`loss_weights` must be two numbers from 0, of labels and teacher, but is {node.show()}"
            )
        section.put("distillation", "hardness", round(weights[1] / sum(weights), 6), "loss_weights")
    kinds = section.words("loss_types")
    near = "" if set(kinds) <= {"CE", "KL"} else "the softmax of the teacher with a temperature"
    section.kept("loss_types", "labels and soft targets", near)
    draft.default("distillation", "teacher", TEACHER, _TEACHER)
    section.rest()
