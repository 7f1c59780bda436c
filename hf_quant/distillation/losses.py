"""The losses of knowledge distillation, and which positions of a batch they count; pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.masks import batch_masks, mask_for

IGNORED = -100  # the label of a position that no loss of transformers counts
_CHUNK, _DEVICE_CHUNK = 2**17, 2**26  # logits at a time
LayerMap = bool | dict[int, int]
QUESTION_OUTPUTS = ("start_logits", "end_logits")


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) || softmax(student / T)), the soft targets of Hinton et al. (2015), section 2.

    The factor T² keeps the size of the gradients when T changes (their section 2.1, eq. 4).

    Args:
        student, teacher (`torch.Tensor`): logits, float32, (..., classes). The teacher gets no gradient.
        temperature (`float`): T.

    Returns:
        `torch.Tensor`: in nats, float32, (...).
    """
    classes = student.shape[-1]
    losses = _SoftTargets.apply(student.reshape(-1, classes), teacher.reshape(-1, classes), temperature)
    return losses.view(student.shape[:-1])


class _SoftTargets(torch.autograd.Function):
    """The loss of each row of (rows, classes); the gradient (their eq. 2, times T²) is computed along.

    A vocabulary's logits are large: a few rows at a time stay in the CPU's cache, and one tensor of their size is kept
    for the backward pass instead of four.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        losses, gradient = student.new_empty(len(student)), torch.empty_like(student)
        rows = max(1, (_CHUNK if student.device.type == "cpu" else _DEVICE_CHUNK) // student.shape[-1])
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            log_p = F.log_softmax(teacher[part] / temperature, -1)
            log_q = F.log_softmax(student[part] / temperature, -1)
            p = log_p.exp()
            torch.sub(log_q.exp(), p, out=gradient[part])
            losses[part] = log_p.sub_(log_q).mul_(p).sum(-1)
        ctx.save_for_backward(gradient)
        ctx.temperature = temperature
        return losses * temperature**2

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream[0] * ctx.temperature)[:, None], None, None


def soft_label_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same for labels that do not exclude each other: T² · KL of Bernoulli distributions, elementwise.

    Args:
        student, teacher (`torch.Tensor`): logits, float32, of one shape.
        temperature (`float`): T.

    Returns:
        `torch.Tensor`: in nats, of that shape.
    """
    t, s = teacher / temperature, student / temperature
    p = torch.sigmoid(t)
    divergence = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return divergence * temperature**2


def masked_mean(values: Tensor, mask: Tensor | None, count: Tensor | int | float | None = None) -> Tensor:
    """The sum over the positions that count, divided by their number, or by `count`.

    Args:
        values (`torch.Tensor`): float32.
        mask (`torch.Tensor`, *optional*): boolean, of the shape of `values`; all positions count without it.
        count (*optional*): what the Trainer divides a batch's loss by, under gradient accumulation the number of
            items of all its batches.

    Returns:
        `torch.Tensor`: a scalar; 0 where nothing counts.
    """
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    if count is None:
        count = values.numel() if mask is None else mask.sum().clamp(min=1)
    return values.sum() / (count.to(values.device) if isinstance(count, Tensor) else count)


def counted_positions(shape: Sequence[int], batch: Mapping[str, Any], shifted: bool) -> Tensor | None:
    """Which positions of the logits the task's own loss counts.

    Args:
        shape: of the logits: (batch, classes) or (batch, length, classes).
        batch: the keyword arguments of the forward.
        shifted (`bool`): whether position i predicts the label at i + 1, as in a causal language model.

    Returns:
        `torch.Tensor` or `None`: boolean, (batch,) or (batch, length); with `shifted`, `False` at the last position.
            `None`: all count.
    """
    given = batch.get("shift_labels")  # shifted by the collator already
    labels = batch.get("labels") if given is None else given
    if isinstance(labels, Tensor) and not labels.is_floating_point() and tuple(labels.shape) == tuple(shape[:-1]):
        counted = labels != IGNORED
    elif len(shape) == 3:
        fitting = [mask for mask in batch_masks(batch) if tuple(mask.shape) == tuple(shape[:-1])]
        if len(fitting) != 1:
            return None
        counted = fitting[0]
    else:
        return None
    return F.pad(counted[:, 1:], (0, 1)) if shifted and given is None and len(shape) == 3 else counted


def prediction_loss(
    student: Mapping[str, Any],
    teacher: Mapping[str, Tensor],
    batch: Mapping[str, Any],
    temperature: float,
    *,
    problem: str | None = None,
    shifted: bool = False,
    count: Tensor | int | None = None,
) -> tuple[Tensor, Tensor | float]:
    """What the student's predictions are off the teacher's, over the positions that the task's loss counts.

    The squared error for regression, Bernoulli distributions for multi-label classification, else
    [`soft_target_loss`]; for question answering the mean of both ends, padding left out.

    Args:
        student, teacher: outputs by name: `logits` of (batch, classes) or (batch, length, classes), or `start_logits`
            and `end_logits` of (batch, length).
        batch: the keyword arguments of the student's forward.
        temperature (`float`): T.
        problem (`str`, *optional*): the config's `problem_type`.
        shifted (`bool`, *optional*, defaults to `False`): whether position i predicts the label at i + 1.
        count (*optional*): the Trainer's `num_items_in_batch`.

    Returns:
        `tuple`: the loss, a float32 scalar; and this batch's share of the items that the Trainer divides by, 1 without
            gradient accumulation.

    Raises:
        `ValueError`: if both outputs are not of one such shape.
    """
    names = output_names(student)
    for name in names:
        if name not in teacher or tuple(teacher[name].shape) != tuple(student[name].shape):
            there = f"of {tuple(teacher[name].shape)}" if name in teacher else "none"
            raise ValueError(
                f"the student's {name} are of {tuple(student[name].shape)}, the teacher's {there}: they say different "
                "things. Use a teacher with the same head, labels and vocabulary."
            )
    own = {name: student[name].float() for name in names}
    target = {name: teacher[name].detach().float() for name in names}
    if names == QUESTION_OUTPUTS:
        ends = [_end_loss(own[name], target[name], batch, temperature) for name in names]
        return (ends[0] + ends[1]) / 2, 1.0
    mine, theirs = own["logits"], target["logits"]
    if mine.ndim not in (2, 3):
        raise ValueError(
            f"logits of shape {tuple(mine.shape)} cannot be distilled; (batch, classes) and (batch, length, classes) "
            "can. Leave DistillationCallback out."
        )
    # The losses of transformers for these two are means over the batch, whatever `num_items_in_batch` is: so are ours,
    # so that `hardness` weighs like against like.
    if mine.ndim == 2 and (problem == "regression" or mine.shape[-1] == 1):
        return F.mse_loss(mine, theirs), 1.0
    if mine.ndim == 2 and problem == "multi_label_classification":
        return masked_mean(soft_label_loss(mine, theirs, temperature), None), 1.0
    counted = counted_positions(mine.shape, batch, shifted)
    loss = masked_mean(soft_target_loss(mine, theirs, temperature), counted, count)
    if count is None:
        return loss, 1.0
    return loss, (mine[..., 0].numel() if counted is None else counted.sum()) / count


def output_names(outputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Which outputs hold predictions.

    Raises:
        `ValueError`: if none does.
    """
    if all(isinstance(outputs.get(name), Tensor) for name in QUESTION_OUTPUTS):
        return QUESTION_OUTPUTS
    if isinstance(outputs.get("logits"), Tensor):
        return ("logits",)
    raise ValueError(
        f"the model's output has {', '.join(outputs) or 'nothing'}, but no `logits` (or `start_logits` and "
        "`end_logits`) to distill. Use a model with a head."
    )


def _end_loss(student: Tensor, teacher: Tensor, batch: Mapping[str, Any], temperature: float) -> Tensor:
    """Of one end of an answer: a distribution over the positions of a text, without its padding."""
    masks = [mask for mask in batch_masks(batch) if mask.shape == student.shape]
    if len(masks) == 1:
        # Finite, so that no 0 · infinity arises; both give such a position a probability of exactly 0.
        student, teacher = (logits.masked_fill(~masks[0], -1e9) for logits in (student, teacher))
    return soft_target_loss(student, teacher, temperature).mean()


def checked_layers(argument: str, wanted: Any) -> LayerMap:
    """What a user gives for `hidden_states` or `attention`.

    Raises:
        `TypeError`: if it is neither a `bool` nor a map of layer numbers.
    """
    if isinstance(wanted, bool):
        return wanted
    if not isinstance(wanted, Mapping) or not wanted:
        raise TypeError(f"`{argument}` must be True, False or a map of layers such as {{2: 4, 4: 8}}, got {wanted!r}")
    for layer in (*wanted.keys(), *wanted.values()):
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"`{argument}` maps numbers of layers, such as {{2: 4, 4: 8}}, but has {layer!r}")
    return dict(wanted)


def layer_pairs(wanted: LayerMap, student: int, teacher: int, first: int, argument: str) -> list[tuple[int, int]]:
    """Which layer of the student learns from which of the teacher.

    The uniform map is that of DistilBERT and TinyBERT (Jiao et al., 2020, section 3): layer i of S learns from layer
    i · T / S of T, rounded, so the last learns from the last.

    Args:
        wanted (`bool` or `dict[int, int]`): a map, or `True` for the uniform one.
        student, teacher (`int`): how many there are.
        first (`int`): the number of the first layer: 1 for hidden states, where 0 is the embeddings; 0 for attention.
        argument (`str`): the callback's argument, for the message.

    Raises:
        `ValueError`: if the map names a layer that is not there.
    """
    if not isinstance(wanted, Mapping):
        return [(first + i, first + max(1, round((i + 1) * teacher / student)) - 1) for i in range(student)]
    for mine, theirs in wanted.items():
        for layer, count, whose in ((mine, student, "student"), (theirs, teacher, "teacher")):
            if not 0 <= layer < count + first:
                raise ValueError(
                    f"`{argument}` maps layer {mine} of the student to layer {theirs} of the teacher, but the "
                    f"{whose}'s go from 0 to {count + first - 1}" + (" (0: the embeddings)." if first else ".")
                )
    return list(wanted.items())


def hidden_state_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[tuple[int, int]], batch: Mapping[str, Any]
) -> Tensor:
    """The mean squared error of hidden states, over layers, unpadded positions and features.

    Args:
        student, teacher: a tensor a layer, (batch, length, width).
        pairs: layers of the student and the teacher.
        batch: the keyword arguments of the forward, for the attention mask.

    Raises:
        `ValueError`: if the widths differ.
    """
    losses = []
    masks = batch_masks(batch)
    for mine, theirs in pairs:
        own, target = student[mine].float(), teacher[theirs].detach().float()
        if own.shape != target.shape:
            raise ValueError(
                f"the student's hidden states are {own.shape[-1]} wide (layer {mine}, {tuple(own.shape)}), the "
                f"teacher's {target.shape[-1]} (layer {theirs}, {tuple(target.shape)}), and no projection is added to "
                "the model. Use `hidden_states=False`, or a teacher of the same width."
            )
        losses.append(masked_mean(F.mse_loss(own, target, reduction="none").mean(-1), mask_for(own, masks)))
    return torch.stack(losses).mean()


def attention_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[tuple[int, int]], batch: Mapping[str, Any]
) -> Tensor:
    """The squared distance of attention distributions, over layers, heads and unpadded queries.

    Squares rather than a divergence: a student in training drops attention out, so it has exact zeros.

    Args:
        student, teacher: a tensor a layer, probabilities, (batch, heads, queries, keys).
        pairs: layers of the student and the teacher.
        batch: the keyword arguments of the forward, for the attention mask.

    Raises:
        `ValueError`: if a layer gave none, or the numbers of heads differ.
    """
    losses = []
    masks = batch_masks(batch)
    for mine, theirs in pairs:
        own, target = student[mine].float(), teacher[theirs].detach().float()
        if own.shape != target.shape:
            raise ValueError(
                f"the student's attention is of {tuple(own.shape)} (layer {mine}), the teacher's of "
                f"{tuple(target.shape)} (layer {theirs}): (batch, heads, queries, keys) must be alike. Use "
                "`attention=False`, or a teacher with as many heads."
            )
        distance = (own - target).square().sum(-1).mean(1)
        fitting = [mask for mask in masks if mask.shape == distance.shape]
        losses.append(masked_mean(distance, fitting[0] if len(fitting) == 1 else None))
    return torch.stack(losses).mean()
