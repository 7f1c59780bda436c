"""A task as a function of a model, as the accuracy guard wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..texts import find_tokenizer
from .measures import Bootstrap, examples
from .metrics import compute_metrics, predictions_from_logits
from .predict import predict
from .provenance import origin
from .tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset


def task_evaluator(
    model: PreTrainedModel,
    task: str | Task | None = None,
    data: Dataset | str | None = None,
    *,
    processing_class: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """The metrics of a classification or regression task, as a function of a model.

    ```python
    quantize(model, "int4_weight_only", max_drop=0.01, evaluate=task_evaluator(model, "mrpc"), metric="f1")
    ```

    Args:
        model (`PreTrainedModel`): the float model; the tokenizer, the labels and the longest text are found by it.
        task (`str` or `Task`, *optional*): a GLUE task, or a `Task` for `data`.
        data (`datasets.Dataset` or `str`, *optional*): labelled examples; see [`compare`].
        processing_class (tokenizer or `str`, *optional*): by default the one where the model came from.
        batch_size, max_length, max_samples, seed (*optional*): see [`compare`].

    Returns:
        callable: takes a model in eval mode and returns the task's metrics by name, as fractions.

    Raises:
        `ValueError`: if model, task and data do not fit together.
    """
    tokenizer = find_tokenizer(processing_class, [origin(model)])
    given = examples(
        model,
        tokenizer,
        task,
        data,
        metrics=None,
        max_length=max_length,
        max_samples=max_samples,
        batch_size=batch_size,
        bootstrap=Bootstrap(0, seed),
        progress=False,
    )

    def evaluate(candidate: PreTrainedModel) -> dict[str, float]:
        logits = predict({"candidate": candidate}, given.encoded, tokenizer, batch_size)["candidate"]
        predictions = predictions_from_logits(given.task, logits)
        if given.to_data is not None:
            predictions = given.to_data[predictions]
        return compute_metrics(given.task, predictions, given.references)

    return evaluate
