"""How many optimizer steps a Trainer takes, when it evaluates and saves, and its learning rate: without a Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of one training in one process, as the Trainer counts them.

    Args:
        examples (`int`): rows of the training data, or windows of its texts.
        batch_size (`int`): examples of one batch.
        accumulation (`int`): batches of one step.
        per_epoch (`int`): steps of one pass over the data; the last one may have fewer batches.
        batches_per_epoch (`int`): batches of one pass.
        total (`int`): all steps, `state.max_steps` of the Trainer.
        warmup (`int`): steps in which the learning rate rises.
        scheduler (`str`): name of the learning rate's schedule.
        peak (`float`): highest learning rate asked for.
        evaluations (`tuple[int, ...]`): after which steps the Trainer evaluates; 0 is before the first one.
        saves (`tuple[int, ...]`): after which steps it saves a checkpoint.
        saves_best_only (`bool`): whether it saves only those evaluated that are the best so far.
    """

    examples: int
    batch_size: int
    accumulation: int
    per_epoch: int
    batches_per_epoch: int
    total: int
    warmup: int
    scheduler: str
    peak: float
    evaluations: tuple[int, ...] = ()
    saves: tuple[int, ...] = ()
    saves_best_only: bool = False

    def epoch(self, step: int) -> float:
        """Passes over the data after so many steps, as `state.epoch` has it."""
        whole, rest = divmod(step, self.per_epoch)
        return whole + min(1.0, rest * self.accumulation / self.batches_per_epoch)


def count_steps(args: TrainingArguments, examples: int) -> Steps:
    """The steps of a Trainer with these arguments on so many examples.

    Args:
        args (`transformers.TrainingArguments`): of the training.
        examples (`int`): rows of the training data, or windows of its texts.

    Raises:
        `ValueError`: if there is no step to take.
    """
    size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    drop = args.dataloader_drop_last
    if args.train_sampling_strategy == "batch_rebalance":  # whole steps, each of as many batches
        batches = accumulation * _divide(examples, size * accumulation, drop)
    else:
        batches = _divide(examples, size, drop)
    if batches == 0:
        raise ValueError(
            f"the training data have {examples} examples, which make no whole batch of {size}, and "
            "`dataloader_drop_last` drops the rest. Lower `per_device_train_batch_size`, or leave that out"
        )
    per_epoch = max(_divide(batches, accumulation, False), 1)
    total = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * per_epoch)
    if total == 0:
        what = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise ValueError(f"`{what}` is {getattr(args, what)}, so there is no step to take. Raise it")
    frame = Steps(
        examples,
        size,
        accumulation,
        per_epoch,
        batches,
        total,
        args.get_warmup_steps(total),
        str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        args.learning_rate,
    )
    best_only = args.save_strategy == SaveStrategy.BEST
    evaluations = _events(frame, args.eval_strategy, args.eval_steps, args.eval_delay)
    if args.eval_on_start:
        evaluations = (0, *evaluations)
    saves = evaluations if best_only else _events(frame, args.save_strategy, args.save_steps)
    return Steps(**{**vars(frame), "evaluations": evaluations, "saves": saves, "saves_best_only": best_only})


def learning_rates(args: TrainingArguments, total: int, steps: Iterable[int]) -> list[float] | None:
    """The learning rate of some steps, by the Trainer's own scheduler.

    Args:
        args (`transformers.TrainingArguments`): of the training.
        total (`int`): all optimizer steps.
        steps (iterable of `int`): numbers of steps; the first step of a training is 0.

    Returns:
        `list[float]` or `None`: `None` where the rate depends on what evaluations will find.

    Raises:
        `ValueError`, `TypeError`: if the schedule cannot be made, in the words of transformers.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        return None
    return [float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)) for step in steps]


def _divide(whole: int, part: int, drop: bool) -> int:
    return whole // part if drop else -(-whole // part)


def _events(steps: Steps, strategy: str, every: float | None, delay: float = 0) -> tuple[int, ...]:
    """After which steps the Trainer's own flow asks for an evaluation or a checkpoint."""
    if strategy == IntervalStrategy.EPOCH:
        ends = [*range(steps.per_epoch, steps.total, steps.per_epoch), steps.total]
        return tuple(step for step in ends if delay <= steps.epoch(step))
    if strategy != IntervalStrategy.STEPS or every is None:
        return ()
    gap = math.ceil(steps.total * every) if every < 1 else int(every)
    found = list(range(gap, steps.total + 1, gap)) if gap > 0 else []
    if not found or found[-1] != steps.total:
        found.append(steps.total)  # it ends with one in any case
    return tuple(step for step in found if delay <= step)
