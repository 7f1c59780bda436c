"""The hooks on a student's forward that ask the teacher and add to the loss of the model's output."""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from .cache import TeacherCache, cached_outputs
from .losses import LayerMap, attention_loss, hidden_state_loss, layer_pairs, output_names, prediction_loss
from .teacher import Teacher, base_model


class DistillationHook:
    """Adds what the student is off its teacher to the loss of each output, while `active`.

    It acts in training mode with gradients only, and only where the output has a loss, that is, where the model was
    given labels. Evaluation is never touched.

    Args:
        student (`torch.nn.Module`): the model in training, not wrapped. No module and no Parameter is added to it.
        teacher ([`Teacher`]): frozen.
        hardness, temperature, hidden_states, attention: see [`DistillationCallback`].
        cache ([`TeacherCache`], *optional*): where the teacher's outputs are kept.

    Attributes:
        active (`bool`): whether to act.
        added (`int`): how many losses were added to since the last [`~DistillationHook.check_used`].
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        hardness: float,
        temperature: float,
        hidden_states: LayerMap = False,
        attention: LayerMap = False,
        cache: TeacherCache | None = None,
    ) -> None:
        core = base_model(student)
        self.teacher = teacher
        self.hardness = hardness
        self.temperature = temperature
        self.hidden_states = hidden_states
        self.attention = attention
        self.cache = cache
        self.active = False
        self.added = 0
        self._used = 0
        self._parameters = list(inspect.signature(core.forward).parameters)
        self._config = getattr(core, "config", None)
        self._shifted = shifts_labels(core)
        self._divided = divides_by_count(core)
        self._as_tuple = False
        self._sums: Tensor | None = None
        self._forwards, self._steps, self._per_step = 0, 0, False
        watcher = _Watcher(self)
        self._handles: list[RemovableHandle] = [
            student.register_forward_pre_hook(watcher.before, with_kwargs=True),
            student.register_forward_hook(watcher.after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the student."""
        for handle in self._handles:
            handle.remove()
        self.active = False

    def check_used(self) -> None:
        """Before an optimizer step: refuse a Trainer that leaves the loss of the model's output aside.

        Raises:
            `RuntimeError`: if no loss was added to, or no gradient came back through one.
        """
        added, used = self.added, self._used
        self.added = self._used = 0
        self._steps += 1
        if added and used:
            return
        why = "no gradient came through it" if added else "the model was given no labels, so it computed none"
        raise RuntimeError(
            f"distillation adds to the loss of the model's output, but this Trainer does not train on that: {why}. It "
            "has a `compute_loss_func`, `label_smoothing_factor` or a `compute_loss` of its own. Use a Trainer that "
            "takes the loss from the output, or leave DistillationCallback out."
        )

    def averages(self, processes: int = 1) -> tuple[float, float] | None:
        """Means of distillation and task loss since the last call, over all processes; `None` if there was none.

        With `num_items_in_batch` a step's losses are parts of one mean, without it each is a mean: so they are added
        up or averaged, as the Trainer does. This is where they are moved to the CPU.

        Args:
            processes (`int`, *optional*, defaults to 1): by which the Trainer multiplies a loss that was divided by
                the items of all processes.
        """
        if self._sums is None or self._forwards == 0:
            return None
        sums = self._sums * (processes / max(1, self._steps) if self._per_step else 1 / self._forwards)
        self._sums, self._forwards, self._steps = None, 0, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            sums = sums / torch.distributed.get_world_size()
        distillation, task = sums.tolist()
        return distillation, task

    def _acts(self, student: nn.Module) -> bool:
        return self.active and student.training and torch.is_grad_enabled()

    def request(self, student: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The keyword arguments with what the losses need to see."""
        if not self._acts(student):
            return None
        asked = kwargs.get("return_dict")
        self._as_tuple = (getattr(self._config, "return_dict", True) if asked is None else asked) is False
        wanted = {name: True for name in self._requests() if not kwargs.get(name)}
        if self._as_tuple:
            wanted["return_dict"] = True
        return {**kwargs, **wanted} if wanted else None

    def add(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with what distillation adds to its `loss`; `None` leaves it as it is."""
        if not self._acts(student):
            return None
        if not isinstance(output, dict):
            raise ValueError(
                f"{type(student).__name__} returned a {type(output).__name__}, in which distillation cannot tell loss "
                "and logits. Let its forward return a dict with `loss` and `logits`."
            )
        task = output.get("loss")
        if task is None:
            return self._restored(output)
        batch = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        count = batch.get("num_items_in_batch")
        with torch.autocast(task.device.type, enabled=False):
            distillation = self._loss(output, batch, count if self._divided else None)
            total = (1 - self.hardness) * task + self.hardness * distillation
        self._note(distillation, task, count is not None)
        total.register_hook(self._flowed)
        output["loss"] = total
        return self._restored(output)

    def _loss(self, output: Mapping[str, Any], batch: Mapping[str, Any], count: Any) -> Tensor:
        inputs = self.teacher.inputs(batch)
        theirs: Mapping[str, Any]
        if self.cache is None:
            theirs = self.teacher(inputs, **dict.fromkeys(self._requests(), True))
        else:
            shapes = {name: output[name].shape for name in output_names(output)}
            theirs = cached_outputs(self.teacher, self.cache, inputs, shapes)
        problem = getattr(self._config, "problem_type", None)
        loss, share = prediction_loss(
            output, theirs, batch, self.temperature, problem=problem, shifted=self._shifted, count=count
        )
        if self.hidden_states is not False:
            mine, other = (_layers(found, "hidden_states") for found in (output, theirs))
            pairs = layer_pairs(self.hidden_states, len(mine) - 1, len(other) - 1, 1, "hidden_states")
            loss = loss + share * hidden_state_loss(mine, other, pairs, batch)
        if self.attention is not False:
            mine, other = (_layers(found, "attentions") for found in (output, theirs))
            pairs = layer_pairs(self.attention, len(mine), len(other), 0, "attention")
            loss = loss + share * attention_loss(mine, other, pairs, batch)
        return loss

    def _requests(self) -> list[str]:
        hidden = ["output_hidden_states"] if self.hidden_states is not False else []
        return hidden + (["output_attentions"] if self.attention is not False else [])

    def _restored(self, output: Any) -> Any:
        if not self._as_tuple or not isinstance(output, ModelOutput):
            return output
        extra = {name.removeprefix("output_") for name in self._requests()}
        return tuple(value for name, value in output.items() if name not in extra)

    def _note(self, distillation: Tensor, task: Tensor, per_step: bool) -> None:
        losses = torch.stack([distillation.detach(), task.detach().float()])
        self._sums = losses if self._sums is None else self._sums + losses
        self._forwards += 1
        self._per_step = per_step
        self.added += 1

    def _flowed(self, gradient: Tensor) -> None:
        self._used += 1


class _Watcher:
    """What is registered on the student. It does nothing on a copy of the student, and once nobody has the hook any
    more: a run that was interrupted leaves it on the model."""

    def __init__(self, hook: DistillationHook | None) -> None:
        self._hook = None if hook is None else weakref.ref(hook)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watcher:
        return _Watcher(None)

    @property
    def hook(self) -> DistillationHook | None:
        return None if self._hook is None else self._hook()

    # Outside of compiled graphs: the teacher is no part of the student's.
    @torch.compiler.disable
    def before(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hook = self.hook
        wanted = None if hook is None else hook.request(student, kwargs)
        return None if wanted is None else (args, wanted)

    @torch.compiler.disable
    def after(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hook = self.hook
        return None if hook is None else hook.add(student, args, kwargs, output)


def _layers(outputs: Mapping[str, Any], name: str) -> tuple[Tensor, ...]:
    found = outputs.get(name)
    if found is None:
        found = outputs.get(f"encoder_{name}")
    if not found or any(layer is None for layer in found):
        raise ValueError(
            f"the model gives no {name.replace('_', ' ')}: its output has {', '.join(outputs)}. Leave "
            f"`{'attention' if name == 'attentions' else name}` out."
        )
    return tuple(found)


def shifts_labels(model: nn.Module) -> bool:
    """Whether in the model's own loss position i predicts the label at i + 1."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if _loss_calls(model):  # the causal loss is also that of classes that name none (GPT-2)
        return LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss
    # Older ones shift by themselves, or do not: BART's decoder.
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and any(name.startswith("shift") for name in code.co_varnames)


def divides_by_count(model: nn.Module) -> bool:
    """Whether the model's own loss is divided by `num_items_in_batch`, which the Trainer passes to any that takes it.

    Many (BERT) ignore it and return the mean over the batch; then ours is a mean too, or `hardness` would weigh unlike
    against unlike under gradient accumulation.
    """
    passed = {keyword.arg for call in _loss_calls(model) for keyword in call.keywords}
    return not passed.isdisjoint({None, "num_items_in_batch"})  # None: **kwargs


def _loss_calls(model: nn.Module) -> list[ast.Call]:
    """Where the forward calls transformers' loss: no attribute says what becomes of labels, its source does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    except (OSError, TypeError, SyntaxError):
        return []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "loss_function"]
