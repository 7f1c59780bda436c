"""Quantization-aware training as a callback: prepare, train with fake-quant, convert."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint import attach_quantizer
from ..progress import progress_bar
from ..quantization.convert import Conversion, convert_qat
from ..quantization.fake_quantize import fake_quantize_symmetric, fake_quantize_weight
from ..quantization.float_models import require_unquantized
from ..quantization.qat import ActivationFakeQuantize, QATConv1D, QATEmbedding, QATState, prepare, qat_modules
from ..runtime.base import quantized_modules
from ..schemes import Scheme, get_scheme
from ..tables import conversion_table, print_table, selection_line
from ..targets import Selection, select_modules
from .base import add_to_logs, before_conversion, check_step, join_trainer, resolve_step

logger = logging.getLogger(__name__)

_RECORD = "hf_quant.qat"


class QATCallback(TrainerCallback):
    """Trains a model so that it is int8 when `trainer.train()` returns.

    ```python
    trainer = Trainer(model=model, args=args, ..., callbacks=[QATCallback("int8_static")])
    trainer.train()
    trainer.evaluate()               # the int8 model's metrics
    trainer.save_model("bert-int8")  # int8 safetensors that plain from_pretrained reloads
    ```

    When the Trainer is made, the layers are swapped for QAT modules on the same Parameters. From `start_step` on
    they compute as int8 will (fake-quant, Jacob et al. 2018), so evaluation during training shows the int8
    model's metrics, and ranges follow the training batches (padding not counted). At `freeze_step` ranges stop
    moving. At the end, after the best checkpoint was loaded, the model is converted in place and proven equal to
    fake-quant on real batches.

    A checkpoint whose metric came before `start_step` is a float model's and is never loaded as the best one.
    Checkpoints hold float weights and ranges: they resume to the same bytes as a run left alone, and load with
    plain `from_pretrained`.

    Args:
        scheme (`str`, *optional*, defaults to `"int8_static"`):
            `"int8_static"`, `"int8_dynamic"`, `"int8_weight_only"`, `"int4_weight_only"`, `"int4_dynamic"` or another
            name that [`get_scheme`] knows.
        start_step (`int` or `float`, *optional*, defaults to 0):
            First step with fake-quant. An `int` counts optimizer steps, a `float` in [0, 1) is a share of them.
        freeze_step (`int` or `float`, *optional*, defaults to 0.9):
            First step at which activation ranges stay as they are. Only static schemes have such ranges.
        targets (list of `str`, *optional*):
            Patterns of modules to quantize, such as `["*.attention.*"]`. By default all Linear, Conv1D and
            Embedding modules but the head and modules that share their weight; see [`select_modules`].
        ignore (list of `str`, *optional*):
            Patterns of modules to leave in float.
        embeddings (`bool`, *optional*, defaults to `True`):
            Whether embeddings are quantized too.
        convert (`bool`, *optional*, defaults to `True`):
            Whether to convert to int8 when training ends. If not, the model stays a float QAT model.

    Attributes:
        conversion ([`Conversion`] or `None`): what was quantized, what was left, and the proof, after training.

    Raises:
        `ValueError`: for an unknown scheme, steps that leave no QAT phase, a pattern that matches no module, a
            model with nothing to quantize, or one that is quantized already.
    """

    def __init__(
        self,
        scheme: str | Scheme = "int8_static",
        *,
        start_step: int | float = 0,
        freeze_step: int | float = 0.9,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        embeddings: bool = True,
        convert: bool = True,
    ) -> None:
        self.scheme = get_scheme(scheme)
        check_step("start_step", start_step)
        check_step("freeze_step", freeze_step)
        static = self.scheme.activations == "static"
        if static and type(start_step) is type(freeze_step) and start_step >= freeze_step:
            _raise_no_phase(start_step, freeze_step)
        self.start_step = start_step
        self.freeze_step = freeze_step
        self.targets = targets
        self.ignore = ignore
        self.embeddings = embeddings
        self.convert = convert
        self.conversion: Conversion | None = None
        self._qat: QATState | None = None
        self._selection: Selection | None = None

    def attach(self, trainer: Any) -> QATCallback:
        """Add this callback to a Trainer that exists already, or that has a `model_init`.

        Use it instead of `callbacks=[...]` when a run with `model_init` is to be resumed, and to have ranges and
        quantization error in TensorBoard and other reporters: these see the logs before callbacks passed to the
        Trainer do.

        Args:
            trainer (`transformers.Trainer`): a trainer that is not training.

        Returns:
            [`QATCallback`]: itself.
        """
        join_trainer(trainer, self, self._prepare)
        return self

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Prepare before the optimizer is made and before a checkpoint is loaded."""
        if model is not None:
            self._prepare(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the schedule against the number of steps, and the checkpoint that is resumed."""
        if model is None:
            return
        start, freeze = self._steps(state.max_steps)
        if start >= state.max_steps:
            raise ValueError(
                f"`start_step` ({self.start_step}, step {start}) is not before the end of training "
                f"({state.max_steps} steps): no QAT phase is left. Lower `start_step` or train longer."
            )
        if self.scheme.activations == "static" and freeze <= start:
            _raise_no_phase(self.start_step, self.freeze_step)
        self._prepare(model)
        self._check_resumed(model, state, start)
        if state.global_step == 0:
            for fake_quant in _static_inputs(model):
                fake_quant.observer.reset()
                fake_quant.skip = True
        state.stateful_callbacks[_RECORD] = {
            "scheme": self.scheme.name,
            "start_step": start,
            "freeze_step": freeze,
            "modules": list(qat_modules(model)),
        }
        self._set_phase(state)
        if state.is_world_process_zero and self._selection is not None:
            print(f"QAT {selection_line(self.scheme, self._selection)}; fake-quant from step {start}")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the phase, a function of the step alone."""
        self._set_phase(state)
        if state.global_step == self._steps(state.max_steps)[0]:
            # Metrics so far are a float model's. The best checkpoint is to be the best int8 one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Average ranges over processes."""
        if model is not None and self._qat is not None and self._qat.observing:
            _average_over_processes(_static_inputs(model))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add phase, ranges and quantization error to the training logs."""
        if logs is None or model is None or "loss" not in logs or self._qat is None:
            return
        extra: dict[str, float] = {"qat_phase": self._phase(state.global_step - 1, state.max_steps)}
        if self._qat.fake_quantizing:
            extra["qat_weight_sqnr_db"] = round(_mean_weight_sqnr(model), 2)
            observers = [fake_quant.observer for fake_quant in _static_inputs(model)]
            if observers:
                extra["qat_range_min"] = round(min(float(observer.min_val) for observer in observers), 4)
                extra["qat_range_max"] = round(max(float(observer.max_val) for observer in observers), 4)
        add_to_logs(logs, extra, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Convert to int8, in place, and prove it."""
        if not self.convert or model is None or self._qat is None or self._selection is None:
            return
        start = self._steps(state.max_steps)[0]
        if state.global_step <= start and self.scheme.activations == "static":
            raise RuntimeError(
                f"training ended at step {state.global_step}, before anything was observed (`start_step` is step "
                f"{start}), so the model was left in float. Train past `start_step`, or lower it."
            )
        for finish in before_conversion(state):
            finish()
        main = state.is_world_process_zero
        batches = list(self._qat.inputs)
        with progress_bar("Converting to int8", len(qat_modules(model)), main and not args.disable_tqdm) as advance:
            self.conversion = convert_qat(model, self._qat, self.scheme, self._selection, batches, advance)
        self._qat = None
        attach_quantizer(model)
        model.eval()
        if main:
            print_table(conversion_table(self.conversion))

    def _prepare(self, model: nn.Module) -> None:
        if quantized_modules(model):
            raise RuntimeError(
                f"this {type(model).__name__} is int8 already, and int8 weights cannot be trained. To train on, make "
                "a new Trainer from a float checkpoint (a checkpoint-* folder of this run, or the model that it "
                "started from)."
            )
        prepared = qat_modules(model)
        if prepared:
            self._qat = next(iter(prepared.values())).state
            if self._selection is None:
                raise RuntimeError(
                    "this model was prepared by another QATCallback already. Use one QATCallback for each model."
                )
            return
        require_unquantized(model)
        self._selection = select_modules(model, self.targets, self.ignore, self.embeddings, self.scheme)
        self._qat = prepare(model, self.scheme, self._selection)

    def _steps(self, max_steps: int) -> tuple[int, int]:
        return resolve_step(self.start_step, max_steps), resolve_step(self.freeze_step, max_steps)

    def _phase(self, step: int, max_steps: int) -> int:
        """0 before fake-quant, 1 while ranges move, 2 when they are frozen."""
        start, freeze = self._steps(max_steps)
        return int(step >= start) + int(step >= max(start, freeze))

    def _set_phase(self, state: TrainerState) -> None:
        if self._qat is not None:
            phase = self._phase(state.global_step, state.max_steps)
            self._qat.fake_quantizing = phase > 0
            self._qat.observing = phase == 1

    def _check_resumed(self, model: nn.Module, state: TrainerState, start: int) -> None:
        record = (state.stateful_callbacks or {}).get(_RECORD)
        if record is not None:
            self._check_record(record, set(qat_modules(model)))
        inputs = _static_inputs(model)
        if state.global_step > start and inputs and not any(fake_quant.observed for fake_quant in inputs):
            raise ValueError(
                f"training resumes at step {state.global_step}, after `start_step` (step {start}), but no activation "
                "ranges were loaded, and they are never made up. If the checkpoint has them, the callback came too "
                "late to load them: pass it to Trainer(callbacks=[...]), or call .attach(trainer) before train() if "
                "the Trainer has a `model_init`. If the checkpoint was saved without QATCallback, set `start_step` "
                f"to {state.global_step} or later."
            )

    def _check_record(self, record: dict[str, Any], modules: set[str]) -> None:
        """What the checkpoint was trained for is what it must go on as."""
        if record["scheme"] != self.scheme.name:
            raise ValueError(
                f"the checkpoint was trained for scheme {record['scheme']!r}, but this QATCallback has "
                f"{self.scheme.name!r}. Use the same scheme, or start a new run from the checkpoint's weights."
            )
        for name in sorted(modules ^ set(record["modules"])):
            there, here = ("", "not ") if name in record["modules"] else ("not ", "")
            raise ValueError(
                f"the checkpoint was trained with {name} {there}quantized, but in this QATCallback it is {here}"
                "quantized. Use the same `targets`, `ignore` and `embeddings`, or start a new run from the "
                "checkpoint's weights."
            )


def _raise_no_phase(start: int | float, freeze: int | float) -> None:
    raise ValueError(
        f"`freeze_step` ({freeze}) must come after `start_step` ({start}): ranges are observed between them. Lower "
        "`start_step` or raise `freeze_step`."
    )


def _static_inputs(model: nn.Module) -> list[ActivationFakeQuantize]:
    return [module for module in model.modules() if isinstance(module, ActivationFakeQuantize)]


@torch.no_grad()
def _average_over_processes(inputs: list[ActivationFakeQuantize]) -> None:
    """Each process saw other batches. Ranges are means over batches, so the mean over processes is the range."""
    if not inputs or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size()
    if world == 1:
        return
    observers = [fake_quant.observer for fake_quant in inputs]
    ranges = torch.stack([torch.stack([observer.min_val, observer.max_val]) for observer in observers])
    torch.distributed.all_reduce(ranges)
    for observer, (low, high) in zip(observers, ranges / world, strict=True):
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)


@torch.no_grad()
def _mean_weight_sqnr(model: nn.Module) -> float:
    """Mean over layers of the weights' signal-to-quantization-noise ratio, in decibels."""
    ratios = []
    for module in qat_modules(model).values():
        weight = module.weight.detach()
        if isinstance(module, QATEmbedding):
            noise = weight - fake_quantize_symmetric(weight, (-1,))
        else:
            weight = weight.t() if isinstance(module, QATConv1D) else weight
            noise = weight - fake_quantize_weight(weight, module.scheme)
        ratios.append(weight.float().square().sum() / noise.float().square().sum().clamp(min=1e-30))
    return float((10 * torch.log10(torch.stack(ratios))).mean())
