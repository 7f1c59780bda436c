"""The words of a plan, for the terminal and for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .phases import PruningPhase
    from .plan import Plan
    from .targets import Chosen, Match

_NAMES = 3  # modules named where a pattern matches more


def headline(plan: Plan) -> str:
    """Examples, batches and steps."""
    steps = plan.steps
    batch = f"{steps.batch_size:,} a batch"
    if steps.accumulation > 1:
        batch += f", {steps.accumulation} batches a step"
    epochs = f"{_count(steps.per_epoch, 'step')} an epoch, {steps.epoch(steps.total):.4g} epochs"
    return f"{steps.total:,} steps: {_count(steps.examples, 'example')}, {batch}, {epochs}"


def model_words(plan: Plan) -> str:
    """Class, precision, and which models are trained."""
    names = plan.recipe.trainings()
    return f"{plan.model}, trained in {plan.precision}; {_count(len(names), 'training')}: {', then '.join(names)}"


def rate_words(plan: Plan) -> str:
    """The learning rate's schedule."""
    steps = plan.steps
    warmup = f" after {steps.warmup:,} steps of warm-up" if steps.warmup else ""
    if not plan.rates:
        return f"{steps.scheduler} from {steps.peak:g}{warmup}; it depends on evaluations"
    return f"{steps.scheduler}, {max(rate for _, rate in plan.rates):.3g} at most{warmup}"


def pruning_words(phase: PruningPhase) -> str:
    """One pruning."""
    if phase.reached is None:
        return phase.what
    when = f"at step {phase.start:,}" if phase.start == phase.end else f"steps {phase.start:,} to {phase.end:,}"
    shrink = ", then taken out" if phase.shrink else ""
    return f"{phase.reached:.1%} {phase.what}, {when}, {_count(len(phase.goals), 'update')}{shrink}"


def qat_words(plan: Plan) -> str:
    """What QAT does when."""
    qat = plan.phases.quantization
    assert qat is not None
    if qat.freeze is None:
        return f"{qat.scheme} from step {qat.start:,}"
    frozen = f", frozen from {qat.freeze:,}" if qat.freeze < plan.steps.total else ", never frozen"
    return f"{qat.scheme} from step {qat.start:,}, ranges observed{frozen}"


def after_training_words(plan: Plan) -> str:
    """What happens when training is over."""
    after = plan.phases.after_training
    assert after is not None
    words = f"{after.scheme} after training, float until then"
    if after.calibration_samples is None:
        return words
    return f"{words}; ranges found on {_count(after.calibration_samples, 'training example')}"


def distillation_words(plan: Plan) -> str:
    """The teacher, and when."""
    phase = plan.phases.distillation
    assert phase is not None
    return f"steps {phase.start:,} to {phase.end:,}, teacher: {phase.teacher or 'the float model'}"


def event_words(steps: tuple[int, ...]) -> str:
    """How often, and when."""
    if not steps:
        return "none"
    shown = [f"{step:,}" for step in steps]
    if len(shown) > 4:
        shown[2:-1] = ["..."]
    return f"{len(steps)}: {', '.join(shown)}"


def match_row(match: Match) -> tuple[str, str, str]:
    """Where a pattern stands, the pattern, and what it matches."""
    names = ", ".join(match.modules[:_NAMES]) + (" ..." if len(match.modules) > _NAMES else "")
    hit = f"{len(match.modules)}: {names}" if match.modules else "nothing"
    return f"{match.section}.{match.option}", match.pattern, hit


def chosen_words(chosen: Chosen) -> str:
    """What a section works on, and what it leaves."""
    words = ", ".join(f"{count:,} {kind}" for kind, count in chosen.kinds.items())
    left = ", ".join(f"{count:,} ({reason})" for reason, count in chosen.left.items())
    return words + (f"; left in float: {left}" if left else "")


def size_rows(plan: Plan) -> list[tuple[str, str]]:
    """The result on disk, and its zeros."""
    size = plan.size
    if size is None:
        return []
    rows = [
        ("weights on disk", f"{size.result_bytes:,} bytes ({_megabytes(size.result_bytes)})"),
        ("float model", f"{_megabytes(size.float_bytes)}, {size.float_bytes / size.result_bytes:.2f} times as large"),
        ("parameters", f"{size.kept:,}" + (f" of {size.parameters:,}" if size.kept != size.parameters else "")),
    ]
    if size.sparsity is None:
        rows.append(("zeros", "those that the weights have"))
    elif size.zeros:
        rows.append(("zeros", f"{size.zeros:,} ({size.sparsity:.1%} of all parameters)"))
    return rows


def memory_rows(plan: Plan) -> list[tuple[str, str]]:
    """What training keeps in memory."""
    memory = plan.memory
    if memory is None:
        return []
    rows = [("parameters", _megabytes(memory.parameters)), ("gradients", _megabytes(memory.gradients))]
    optimizer = "not known" if memory.optimizer is None else _megabytes(memory.optimizer)
    rows.append(("optimizer", optimizer))
    if memory.pruning:
        rows.append(("pruning: masks and scores", _megabytes(memory.pruning)))
    if memory.teacher != 0:
        rows.append(("teacher", "not known" if memory.teacher is None else _megabytes(memory.teacher)))
    known = None not in (memory.optimizer, memory.teacher)
    words = f"{_megabytes(memory.total)}{'' if known else ' of what is known'}; activations come on top, not predicted"
    return [*rows, ("together", words)]


def timing_rows(plan: Plan) -> list[tuple[str, str]]:
    """The time of each phase, and of all."""
    timing = plan.timing
    if timing is None:
        return []
    rows = []
    for phase in timing.phases:
        each = f"{duration(phase.seconds)}: {phase.end - phase.start:,} steps of {duration(phase.step_seconds)}"
        if phase.updates:
            each += f", {phase.updates} updates of {duration(phase.update_seconds)}"
        rows.append((f"{phase.name} ({phase.start:,} to {phase.end:,})", each))
    if timing.evaluations:
        each = f"{timing.evaluations} of {duration(timing.evaluation_seconds)}"
        rows.append(("evaluations", each))
    if timing.float_seconds:
        rows.append(("float twin", duration(timing.float_seconds)))
    return [
        *rows,
        (
            "together, about",
            f"{duration(timing.total)} ({timing.device}); loading, conversion and the comparison not counted",
        ),
    ]


def duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves a whole number before the point."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
