"""SparseML's modifiers of epochs, learning rates and distillation."""

from __future__ import annotations

from typing import Any

from .report import TEACHER, Draft
from .section import Section
from .values import LAST, plain, share

_LOGS = "logs go where `training.report_to` says"


class Training:
    """The epochs that all modifiers share, and learning rates, which make one schedule together.

    Args:
        draft ([`Draft`]): to be filled.
        epochs (`float`, *optional*): of the whole training, where it is known.
    """

    def __init__(self, draft: Draft, epochs: float | None) -> None:
        self.draft, self.epochs = draft, epochs
        self._rates: list[tuple[str, Section, float, float | None]] = []

    def step(self, part: str | int, key: str, section: Section, from_key: str) -> bool:
        """Sets a step of the recipe from an epoch; says so where the number of epochs is not known."""
        epoch = section.number(from_key)
        if epoch is None:
            return False
        if epoch <= 0:
            return section.put(part, key, 0.0, from_key)
        if self.epochs is None:
            section.none(from_key, "the number of epochs is not in the file; give it with --epochs")
            return False
        remark = f"epoch {epoch:g} of {self.epochs:g} is the end; the last share of training is {LAST}"
        return section.put(part, key, share(epoch, self.epochs), from_key, remark if epoch >= self.epochs else "")

    def epoch_range(self, section: Section) -> None:
        """The length of the training."""
        start, end = section.number("start_epoch"), section.number("end_epoch")
        if start and start > 0:
            section.none("start_epoch", "a training starts at epoch 0")
        else:
            section.kept("start_epoch", "the start of training")
        if end is None or end <= 0:
            section.none("end_epoch", "no number of epochs; set training.num_train_epochs")
        elif self.epochs is not None and end < self.epochs:
            section.kept("end_epoch", "the same training", f"it ends at epoch {self.epochs:g}")
        else:
            section.put("training", "num_train_epochs", plain(self.epochs or end), "end_epoch")

    def add_learning_rate(self, name: str, section: Section) -> None:
        """Notes a learning rate; [`~Training.finish`] makes a schedule of all."""
        start, end = section.number("start_epoch") or 0.0, section.number("end_epoch")
        self._rates.append((name, section, max(start, 0.0), end if end is not None and end > 0 else None))
        groups = "one learning rate for all parameters; nearest: `optim` and a Trainer of your own"
        section.none("param_groups", groups)
        section.none("constant_logging", _LOGS)

    def weight_decay(self, section: Section) -> None:
        """A `SetWeightDecayModifier`."""
        if section.number("weight_decay") is not None:
            section.put("training", "weight_decay", section.number("weight_decay"), "weight_decay")
        if section.number("start_epoch"):
            section.none("start_epoch", "weight decay is the same from the first step on")
        section.kept("start_epoch", "the start of training")
        section.none("param_groups", "one weight decay for all parameters but biases and norms")

    def finish(self) -> None:
        """Makes one schedule of the learning rates; those that do not fit in are listed."""
        rates = sorted(self._rates, key=lambda rate: rate[2])
        if len(rates) > 1 and self._warms_up(rates[0], rates[1]):
            name, section, _, end = rates.pop(0)
            section.kept("start_epoch", "the start of training")
            remark = "a Trainer warms up from 0" if section.number("init_lr") else ""
            if self.epochs is not None and end is not None:
                section.put("training", "warmup_steps", share(end, self.epochs), "end_epoch", remark)
            section.kept("init_lr", "the start of the warm-up", remark)
            section.kept("final_lr", "`learning_rate`")
            section.kept("lr_func", "a linear warm-up", "" if section.word("lr_func") == "linear" else "not linear")
        for index, (name, section, start, end) in enumerate(rates):
            if index:
                self.draft.none(section.line, name, "a Trainer has one schedule of the learning rate; it is the first")
                section.rest(dict.fromkeys(section.values, f"belongs to a further {name}"))
                continue
            if start > 0 and not self.draft.get("training", "warmup_steps"):
                section.kept("start_epoch", "the start of training", "a Trainer's schedule begins with it")
            section.kept("start_epoch", "the start of the schedule")
            if name == "SetLearningRateModifier":
                section.number("learning_rate")
                if "learning_rate" in section.values:
                    section.put("training", "learning_rate", section.number("learning_rate"), "learning_rate")
                    section.put("training", "lr_scheduler_type", "constant", "learning_rate")
                section.kept("end_epoch", "the end of training")
            else:
                self._function(section, end)
        for _, section, _, _ in self._rates:
            section.rest()

    def _warms_up(self, first: tuple[str, Section, float, float | None], second: tuple[Any, ...]) -> bool:
        name, section, start, end = first
        if name != "LearningRateFunctionModifier":
            return False
        low, high = section.number("init_lr"), section.number("final_lr")
        rises = low is not None and high is not None and low < high
        return rises and start == 0 and end is not None and end <= float(second[2])

    def _function(self, section: Section, end: float | None) -> None:
        kind, first, final = section.word("lr_func") or "linear", section.number("init_lr"), section.number("final_lr")
        if first is not None:
            section.put("training", "learning_rate", first, "init_lr")
        final = final or 0.0
        remark = "" if kind in ("linear", "cosine") else f"no schedule is {kind}; linear is the nearest"
        if kind == "cosine":
            name, kwargs = ("cosine_with_min_lr", {"min_lr": final}) if final else ("cosine", None)
        else:
            name, kwargs = ("polynomial", {"lr_end": final, "power": 1.0}) if final else ("linear", None)
        from_key = "lr_func" if "lr_func" in section.values else "final_lr"
        section.put("training", "lr_scheduler_type", name, from_key, remark)
        if kwargs:
            section.put("training", "lr_scheduler_kwargs", kwargs, "final_lr")
        section.kept("final_lr", "the end of the schedule")
        section.none("cycle_epochs", "no schedule goes up and down again by epochs")
        early = end is not None and self.epochs is not None and end < self.epochs
        section.kept("end_epoch", "the end of training", "a Trainer's schedule goes on to the end" if early else "")


def distillation(name: str, section: Section, training: Training) -> None:
    """A distillation modifier as the distillation section."""
    draft = section.draft
    if name == "PerLayerDistillationModifier":
        remark = "hidden states by layer, compared as hf_quant does"
        draft.put("distillation", "hidden_states", True, section.line, name, remark)
        for key in ("student_layer_names", "teacher_layer_names", "student_names", "teacher_names"):
            section.none(key, "layers named by hand; nearest: a map of layers in `hidden_states`")
        section.none("gain", "hidden states have their own weight; nearest: hardness")
    if section.number("hardness") is not None:
        section.put("distillation", "hardness", section.number("hardness"), "hardness")
    if section.number("temperature") is not None:
        section.put("distillation", "temperature", section.number("temperature"), "temperature")
    start = section.number("start_epoch")
    if start is not None and start > 0:
        training.step("distillation", "start_step", section, "start_epoch")
    section.kept("start_epoch", "the start of training")
    end = section.number("end_epoch")
    if end is not None and end > 0 and (training.epochs is None or end < training.epochs):
        training.step("distillation", "end_step", section, "end_epoch")
    section.kept("end_epoch", "the end of training")
    why = "the source has its teacher on the command line; without this key, the float model teaches itself"
    draft.default("distillation", "teacher", TEACHER, why)
    section.none(
        "distill_output_keys", "the outputs are those of the model's task: logits, start_logits and end_logits"
    )
    section.none("teacher_input_keys", "the teacher gets the batch that the model gets")
    section.none("update_frequency", "distillation works at each step")
