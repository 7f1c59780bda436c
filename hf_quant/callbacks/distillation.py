"""Knowledge distillation as a callback: a teacher beside the model that a Trainer fine-tunes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distillation.cache import TeacherCache
from ..distillation.hook import DistillationHook
from ..distillation.losses import checked_layers
from ..distillation.teacher import Teacher, check_teacher, load_teacher, require_attention, self_teacher
from ..quantization.float_models import require_unquantized
from ..runtime.base import quantized_modules
from .base import add_to_logs, before_conversion, check_step, join_trainer, resolve_step, run_notes

_RECORD = "hf_quant.distillation"


class DistillationCallback(TrainerCallback):
    """Lets a model learn from a teacher while it is fine-tuned, pruned or quantized.

    ```python
    trainer = Trainer(model=model, args=args, ..., callbacks=[DistillationCallback("bert-large-mrpc"), QATCallback()])
    trainer.train()
    ```

    The loss of the model's output becomes `(1 - hardness) · task + hardness · (T² · KL(teacher || student) + ...)`
    (Hinton et al., 2015), over the positions that the task's loss counts: labels other than -100, or unpadded ones.
    For regression it is the squared error. It works in any Trainer that takes the loss from the model's output, and
    another Trainer is refused before its first optimizer step. Evaluation is not touched.

    Without a `teacher`, the float model teaches its own pruned or int8 version: a frozen copy of the weights is made
    when the callback meets the model, which takes their memory once more.

    The teacher is no part of the model: it is never trained, saved, wrapped or copied along, and draws no random
    numbers, so a resumed run goes on to the same bytes as one left alone.

    Args:
        teacher (`str`, `Path` or `PreTrainedModel`, *optional*):
            A folder or hub id, loaded as the class that its config names, in the student's dtype; or a model, which is
            put into eval mode. Quantized ones are passed as a model.
        hardness (`float`, *optional*, defaults to 0.5):
            Weight of the teacher against the task, in (0, 1].
        temperature (`float`, *optional*, defaults to 2.0):
            T, by which logits are divided on both sides; above 0.
        hidden_states (`bool` or `dict[int, int]`, *optional*, defaults to `False`):
            Whether hidden states are to be alike, in the mean squared error; or which layer of the student learns from
            which of the teacher (0 is the embeddings). `True`: spread evenly. The widths must be equal.
        attention (`bool` or `dict[int, int]`, *optional*, defaults to `False`):
            The same for attention probabilities, in the squared distance. Both models need the attention
            implementation `"eager"`.
        cache (`str` or `Path`, *optional*):
            A folder in which the teacher's outputs are kept, float32, by the content of each row: 4 bytes for each
            output of each unpadded position, which for a language model is its vocabulary. Only for predictions.
        start_step (`int` or `float`, *optional*, defaults to 0):
            First step with a teacher. An `int` counts optimizer steps, a `float` in [0, 1) is a share of all.
        end_step (`int` or `float`, *optional*):
            First step without it again; by default there is none.

    Raises:
        `TypeError`, `ValueError`: for values that are not allowed, steps that leave no phase, a quantized or damaged
            checkpoint, and a teacher with another vocabulary, tokenizer or label map than the model's.
        `RuntimeError`: if the Trainer does not train on the loss of the model's output.
    """

    def __init__(
        self,
        teacher: str | os.PathLike[str] | nn.Module | None = None,
        *,
        hardness: float = 0.5,
        temperature: float = 2.0,
        hidden_states: bool | Mapping[int, int] = False,
        attention: bool | Mapping[int, int] = False,
        cache: str | os.PathLike[str] | None = None,
        start_step: int | float = 0,
        end_step: int | float | None = None,
    ) -> None:
        if teacher is not None and not isinstance(teacher, (str, os.PathLike, nn.Module)):
            raise TypeError(f"`teacher` is a folder, a hub id or a model, got {teacher!r}")
        for name, value in (("hardness", hardness), ("temperature", temperature)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` must be a number, got {value!r}")
        if not 0 < hardness <= 1:
            raise ValueError(f"`hardness` weighs the teacher against the task and must lie in (0, 1], not {hardness}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"`temperature` divides the logits and must be above 0, not {temperature}.")
        self.hidden_states = checked_layers("hidden_states", hidden_states)
        self.attention = checked_layers("attention", attention)
        if cache is not None and (hidden_states is not False or attention is not False):
            raise ValueError(
                "`cache` keeps predictions only: hidden states and attention are too large for a disk. Leave `cache` "
                "out, or `hidden_states` and `attention`."
            )
        check_step("start_step", start_step)
        if end_step is not None:
            check_step("end_step", end_step)
            if type(start_step) is type(end_step) and end_step <= start_step:
                _raise_no_phase(start_step, end_step)
        self.teacher = teacher
        self.hardness = hardness
        self.temperature = temperature
        self.cache = cache
        self.start_step = start_step
        self.end_step = end_step
        self._teacher: Teacher | None = None
        self._student: nn.Module | None = None  # the model that the teacher was made for
        self._hook: DistillationHook | None = None

    def attach(self, trainer: Any) -> DistillationCallback:
        """Add this callback to a Trainer that exists already, or that has a `model_init`.

        Use it instead of `callbacks=[...]` to have the losses in TensorBoard and other reporters, which see the logs
        before callbacks passed to the Trainer do, and to resume a run with `model_init` and no `teacher`.

        Args:
            trainer (`transformers.Trainer`): a trainer that is not training.

        Returns:
            [`DistillationCallback`]: itself.
        """
        _check_arguments(trainer.args)
        join_trainer(trainer, self, lambda model: self._prepare(model, trainer.processing_class))
        return self

    def check(self, model: nn.Module, processing_class: Any = None) -> None:
        """Refuse a model that cannot learn from this callback's teacher; loads the teacher, changes nothing.

        Args:
            model (`torch.nn.Module`): a float model.
            processing_class (*optional*): its tokenizer.

        Raises:
            `ValueError`: as the Trainer would on being made.
        """
        if self.teacher is None:
            require_unquantized(model)
            if self.attention is not False:
                require_attention("model", model)
        else:
            self._prepare(model, processing_class)

    def check_steps(self, max_steps: int) -> tuple[int, int]:
        """The first step with the teacher, and the first without it again.

        Raises:
            `ValueError`: if no step is left between them.
        """
        start = resolve_step(self.start_step, max_steps)
        end = max_steps if self.end_step is None else resolve_step(self.end_step, max_steps)
        if start >= max_steps:
            raise ValueError(
                f"`start_step` ({self.start_step}, step {start}) is not before the end of training ({max_steps} "
                "steps): no step with a teacher is left. Lower `start_step` or train longer."
            )
        if end <= start:
            _raise_no_phase(self.start_step, end if self.end_step is None else self.end_step)
        return start, end

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Load the teacher, or copy the model, before the weights change."""
        _check_arguments(args)
        if model is not None:
            self._prepare(model, processing_class)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the phase and the teacher of the run that is resumed, and put the hooks on the model."""
        if model is None:
            return
        start, end = self.check_steps(state.max_steps)
        if run_notes(state).setdefault("distillation", self) is not self:
            raise ValueError("two DistillationCallbacks would each halve the other's loss. Use one for each Trainer.")
        self._prepare(model, processing_class)
        teacher = self._teacher
        assert teacher is not None
        teacher.precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        identity = teacher.identity()
        self._check_resumed(teacher, identity["weights"], state)
        teacher.to(next(model.parameters()).device)
        self._remove()
        self._hook = DistillationHook(
            model,
            teacher,
            self.hardness,
            self.temperature,
            self.hidden_states,
            self.attention,
            self._opened_cache(teacher, identity),
        )
        self._set_phase(state)
        before_conversion(state).append(self._remove)
        if state.is_world_process_zero:
            print(
                f"distilling from {teacher.name}: hardness {self.hardness}, temperature {self.temperature}, steps "
                f"{start} to {end}"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the phase, a function of the step alone."""
        self._set_phase(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that the weights are about to learn from the teacher."""
        if self._hook is not None and self._hook.active:
            self._hook.check_used()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the cache, so that a resumed run finds what this one used."""
        self._flush()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the cache, so that other processes find these rows in the next epoch."""
        self._flush()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add both losses to the training logs, means since the last ones."""
        if logs is None or "loss" not in logs or self._hook is None:
            return
        averages = self._hook.averages(args.world_size if args.average_tokens_across_devices else 1)
        if averages is None:
            return
        add_to_logs(logs, {"distillation_loss": averages[0], "task_loss": averages[1]}, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off the model."""
        self._remove()

    def _remove(self) -> None:
        if self._hook is not None:
            self._flush()
            self._hook.remove()
            self._hook = None

    def _flush(self) -> None:
        if self._hook is not None and self._hook.cache is not None:
            self._hook.cache.flush()

    def _prepare(self, model: nn.Module, processing_class: Any) -> None:
        if self._student is model:
            return
        if quantized_modules(model):
            raise RuntimeError(
                f"this {type(model).__name__} is int8 already; its weights cannot be trained. Start from a float "
                "model."
            )
        attention = self.attention is not False
        if self.teacher is None:
            teacher = self_teacher(model)
        elif self._teacher is None or isinstance(self.teacher, nn.Module):
            teacher = load_teacher(self.teacher, model, attention)
        else:
            teacher = self._teacher
        if attention:
            require_attention("student", model)
            require_attention("teacher", teacher.model)
        if not teacher.copied:
            check_teacher(model, teacher, processing_class)
        self._teacher, self._student = teacher, model

    def _set_phase(self, state: TrainerState) -> None:
        if self._hook is not None:
            start, end = self.check_steps(state.max_steps)
            self._hook.active = start <= state.global_step < end

    def _opened_cache(self, teacher: Teacher, identity: dict[str, str]) -> TeacherCache | None:
        if self.cache is None:
            return None
        if teacher.encoder_decoder:
            raise ValueError(
                f"`cache` does not serve the encoder-decoder {teacher.name}: its outputs depend on the padding of "
                "labels. Leave `cache` out."
            )
        return TeacherCache(self.cache, identity)

    def _check_resumed(self, teacher: Teacher, weights: str, state: TrainerState) -> None:
        """A resumed run has the teacher that it began with."""
        record = state.stateful_callbacks.get(_RECORD)
        if state.global_step > 0 and record is not None and record["teacher"] != weights:
            raise ValueError(
                f"training resumes at step {state.global_step} with other weights of the teacher ({teacher.name}) "
                "than it began with."
                + (
                    " Without `teacher` they are the model's when the Trainer is made: start from the same model, and "
                    "call .attach(trainer) before train() if the Trainer has a `model_init`."
                    if teacher.copied
                    else " Pass the same teacher, or start a new run from the checkpoint's weights."
                )
            )
        state.stateful_callbacks[_RECORD] = {"teacher": weights}


def _check_arguments(args: TrainingArguments) -> None:
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}: the Trainer then computes the loss outside "
            "of the model, where distillation cannot add to it. Set it to 0; soft targets smooth labels already."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"this Trainer would copy the model to {args.n_gpu} GPUs in one process (DataParallel), and a teacher is "
            "on one. Start it with torchrun or accelerate launch, or show it one GPU."
        )


def _raise_no_phase(start: int | float, end: int | float) -> None:
    raise ValueError(
        f"`end_step` ({end}) must come after `start_step` ({start}): the teacher teaches between them. Lower "
        "`start_step` or raise `end_step`."
    )
