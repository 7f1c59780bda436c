"""Tasks whose answer is more than one label: tags of words, and spans that answer questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .predict import Encoded, batches, forward_arguments
from .questions import Questions, questions
from .ratios import ratio_bootstrap
from .results import MetricResult, SplitResult
from .statistics import agreement_of
from .tagging import IGNORED, TaggedSentences, tag_scores, tagged_sentences
from .tasks import QUESTIONS, TOKENS, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PretrainedConfig, PreTrainedTokenizerBase

STRUCTURED = (TOKENS, QUESTIONS)


def structured_examples(
    dataset: Dataset,
    task: Task,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> TaggedSentences | Questions:
    """The examples of a task of tags or of questions; see [`tagged_sentences`] and [`questions`]."""
    if task.problem_type == QUESTIONS:
        return questions(dataset, task, tokenizer, max_length)
    return tagged_sentences(dataset, task, config, tokenizer, max_length)


@torch.no_grad()
def predict_structured(
    models: dict[str, PreTrainedModel],
    examples: TaggedSentences | Questions,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    progress: Callable[[], None] | None = None,
) -> dict[str, list[Any]]:
    """What every model says on the very same batches.

    Args:
        models (`dict[str, PreTrainedModel]`): in eval mode, by what messages call them.
        examples ([`TaggedSentences`] or [`Questions`]): what to ask.
        tokenizer (tokenizer): pads the batches.
        batch_size (`int`): rows or windows a batch.
        progress (callable, *optional*): called once for each batch.

    Returns:
        `dict[str, list]`: the predictions of `examples.predictions`, by model.

    Raises:
        `ValueError`: if a model gives other outputs than the task needs, or NaN.
    """
    read: dict[str, list[Any]] = {name: [None] * len(examples.encoded) for name in models}
    for rows, batch in batches(examples.encoded, tokenizer, batch_size):
        width = batch["input_ids"].shape[1]
        for name, model in models.items():
            output = model(**forward_arguments(model, batch))
            for index, row in enumerate(rows):
                tokens = _tokens(examples.encoded[row], width, tokenizer)
                try:
                    read[name][row] = examples.read(output, index, tokens)
                except ValueError as error:
                    raise ValueError(f"The {name} model ({type(model).__name__}): {error}") from error
        if progress is not None:
            progress()
    return {name: list(examples.predictions(values)) for name, values in read.items()}


def _tokens(row: Encoded, width: int, tokenizer: PreTrainedTokenizerBase) -> slice:
    """Where a row's tokens lie in a padded batch."""
    length = len(row["input_ids"])
    return slice(width - length, width) if tokenizer.padding_side == "left" else slice(0, length)


def judge_structured(
    task: Task,
    split: str,
    rows: int,
    examples: TaggedSentences | Questions,
    predictions: dict[str, list[Any]],
    resamples: int,
    confidence: float,
    seed: int,
    advance: Callable[[], None],
) -> SplitResult:
    """Metrics, intervals and agreement of one split from both models' predictions (`"float"` and `"int8"`).

    The bootstrap draws whole sentences, or questions. One counts as changed if it has other tags, or another answer
    and not both are right.
    """

    def progress(done: int) -> None:
        for _ in range(done):
            advance()

    before, after = (examples.scores(task.metrics, predictions[side]) for side in ("float", "int8"))
    intervals = ratio_bootstrap(
        before, after, resamples=resamples, confidence=confidence, seed=seed, progress=progress
    )
    float_right, int8_right = (examples.right(predictions[side]) for side in ("float", "int8"))
    changed = examples.changed(predictions["float"], predictions["int8"]) & ~(float_right & int8_right)
    return SplitResult(
        split=split,
        samples=len(examples),
        rows=rows,
        metrics=tuple(
            MetricResult(name, before[name].value, after[name].value, intervals[name]) for name in task.metrics
        ),
        agreement=agreement_of(changed, float_right, int8_right),
    )


def structured_metrics(
    task: Task, examples: TaggedSentences | Questions
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for a Trainer that evaluates on these examples, in this order.

    For tags it counts the words that were not cut off; pass [`likeliest`] as `preprocess_logits_for_metrics` with it.
    """

    def of_tags(evaluation: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(evaluation.label_ids)
        pairs = [(ours[kept], true[kept]) for ours, true, kept in zip(
            np.asarray(evaluation.predictions), labels, labels != IGNORED, strict=True
        )]  # fmt: skip
        assert isinstance(examples, TaggedSentences)
        found = tag_scores(task.metrics, [ours for ours, _ in pairs], [true for _, true in pairs], examples.names)
        return {name: ratios.value for name, ratios in found.items()}

    def of_answers(evaluation: EvalPrediction) -> dict[str, float]:
        assert isinstance(examples, Questions)
        starts, ends = evaluation.predictions[:2]
        lengths = [len(row["input_ids"]) for row in examples.encoded]
        answers = examples.predictions(
            [np.stack([start[:n], end[:n]]) for start, end, n in zip(starts, ends, lengths, strict=True)]
        )
        return {name: ratios.value for name, ratios in examples.scores(task.metrics, answers).items()}

    return of_answers if isinstance(examples, Questions) else of_tags


def likeliest(logits: Any, labels: Any) -> torch.Tensor:
    """The likeliest tag of each token, so that a Trainer does not gather all logits; int64 `(batch, length)`."""
    first: torch.Tensor = logits[0] if isinstance(logits, (tuple, list)) else logits
    return first.argmax(-1)


def training_columns(examples: TaggedSentences | Questions) -> dict[str, Sequence[Any]]:
    """The tokens and labels of these examples as columns of a Trainer's data set."""
    columns: dict[str, Sequence[Any]] = {name: [row[name] for row in examples.encoded] for name in examples.encoded[0]}
    if isinstance(examples, TaggedSentences):
        return {**columns, "labels": examples.labels()}
    first, last = examples.positions()
    return {**columns, "start_positions": first, "end_positions": last}
