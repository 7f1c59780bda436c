"""A float model and its quantized version on the same examples: what quantization costs, and what it buys."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..progress import progress_bar
from ..quantization.sensitivity import layer_sqnr
from ..runtime.base import quantized_modules
from ..texts import find_tokenizer, length_limit
from .files import load_data
from .labels import check_models_agree, read_labels
from .latency import time_pair
from .metrics import compute_metrics, predictions_from_logits
from .predict import (
    Encoded,
    batches,
    encode_texts,
    evaluating,
    forward_arguments,
    load_model,
    predict,
)
from .provenance import describe_machine, describe_model, describe_versions, origin
from .report import Comparison
from .results import Deviation, MetricResult, SplitResult
from .statistics import agreement, check_bootstrap, paired_bootstrap
from .structured import STRUCTURED, judge_structured, predict_structured, structured_examples
from .tasks import CAUSAL, CLASSIFICATION, GLUE_TASKS, Task, check_columns, get_task, infer_task, load_task_data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CONFIDENCE = 0.95
DEFAULT_LATENCY_LENGTH = 128
SQNR_BATCHES = 4
SQNR_BATCH_SIZE = 8


def compare(
    float_model: PreTrainedModel | str | os.PathLike[str],
    int8_model: PreTrainedModel | str | os.PathLike[str],
    task: str | Task | None = None,
    data: Dataset | str | os.PathLike[str] | None = None,
    *,
    metrics: Sequence[str] | str | None = None,
    processing_class: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    max_samples: int | None = None,
    latency_batch_size: int | None = 1,
    latency_length: int | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure a quantized model against the float model that it was made from.

    ```python
    print(compare("my/bert-mrpc", "bert-mrpc-int8", task="mrpc"))
    compare(model, int8, data="reviews.csv", processing_class=tokenizer).save("report")
    ```

    Both models see the very same batches. The report holds every metric of the task with the paired-bootstrap
    95 % interval of its change, flips and McNemar's test, size by kind of layer, latency, and SQNR per layer.

    Args:
        float_model (`PreTrainedModel` or `str`):
            A model for sequences, tokens or questions, as `task` has it; its folder or hub id.
        int8_model (`PreTrainedModel` or `str`): the same, quantized; folders are loaded as int8 modules.
        task (`str` or `Task`, *optional*): a GLUE task, whose data is found by itself, or a `Task` for `data`.
        data (`datasets.Dataset` or `str`, *optional*):
            Labelled examples, or a `.parquet`, `.csv`, `.tsv`, `.json` or `.jsonl` file of them. Without a `task`
            its columns must speak for themselves: `label`, and one or two columns of text.
        metrics (list of `str`, *optional*): in place of the task's own; see `Task`.
        processing_class (tokenizer or `str`, *optional*):
            Defaults to the one in the float model's folder, then in the int8 model's, then where the models in
            memory came from.
        batch_size (`int`, *optional*, defaults to 32): examples a batch, for the metrics.
        max_length (`int`, *optional*): tokens at which texts are cut; defaults to what the models can take.
        max_samples (`int`, *optional*): examples to draw at random from each split; all of them by default.
        latency_batch_size (`int`, *optional*, defaults to 1): sequences a timed call; `None` times nothing.
        latency_length (`int`, *optional*): tokens a timed sequence; 128, or what the models can take if less.
        resamples (`int`, *optional*, defaults to 10000): of the bootstrap.
        seed (`int`, *optional*, defaults to 0): of the bootstrap, of `max_samples`, and of the timed tokens.
        device (`torch.device` or `str`, *optional*):
            Where both run; defaults to where the int8 model is, or the float one, or the CPU. Models in memory
            are put back afterwards.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.

    Returns:
        [`Comparison`]: prints as a table; `to_json`, `to_markdown`, `to_html`, and `save` for all three.

    Raises:
        `ValueError`: if the models, the task and the data do not fit together, or labels are missing.
    """
    check_numbers(batch_size, max_samples, latency_batch_size, latency_length)
    check_bootstrap(resamples, CONFIDENCE)
    if task is None and data is None:
        raise ValueError(
            f"Nothing to compare on. Give `task=`, one of {', '.join(GLUE_TASKS)}, or `data=`, a file or Dataset."
        )
    if float_model is int8_model:
        raise ValueError(
            "`float_model` and `int8_model` are the same object, so nothing would differ. Keep the float model: "
            "quantize_dynamic(model) leaves it as it is unless `inplace=True`."
        )
    chosen = None if task is None else with_metrics(get_task(task), metrics)
    if chosen is not None and chosen.problem_type == CAUSAL:
        raise ValueError("A perplexity has a report of its own: call hf_quant.compare_perplexity, not compare.")
    splits = load_splits(chosen, data)
    pair = {"float": load_given(float_model), "int8": load_given(int8_model)}
    check_roles(pair)
    check_models_agree(pair["float"].config, pair["int8"].config)
    if chosen is None:
        classes, metrics = pair["float"].config.num_labels, [metrics] if isinstance(metrics, str) else metrics
        chosen = infer_task(next(iter(splits.values())), classes, metrics or (), name=data_name(data))
    models = list(pair.values())
    places = [m for m in (float_model, int8_model) if not isinstance(m, PreTrainedModel)]
    tokenizer = find_tokenizer(processing_class, [*places, *(origin(model) for model in models)])
    limit = length_limit(tokenizer, models, max_length)
    timed_length = find_timed_length(latency_length, length_limit(tokenizer, models, None))
    structured = chosen.problem_type in STRUCTURED
    drawn = {name: sample_rows(len(split), max_samples, seed) for name, split in splits.items()}
    # The labels of every split before the first forward pass of any.
    labels: dict[str, Any] = {}
    for name, split in splits.items():
        if structured:
            few = split.select(drawn[name])
            labels[name] = structured_examples(few, chosen, pair["int8"].config, tokenizer, limit)
        else:
            labels[name] = read_labels(split, chosen, pair["int8"].config)

    with evaluating(models, _device(float_model, int8_model, device)):
        results: list[SplitResult] = []
        encoded_first: list[Encoded] = []
        for name, split in splits.items():
            rows, known, size = drawn[name], labels[name], len(split)
            encoded = known.encoded if structured else encode_texts(split.select(rows), chosen, tokenizer, limit)
            encoded_first = encoded_first or encoded
            count = -(-len(encoded) // batch_size)
            said: Any
            with progress_bar(f"Predicting {chosen.name} {name}", count, progress) as advance:
                if structured:
                    said = predict_structured(pair, known, tokenizer, batch_size, advance)
                else:
                    said = predict(pair, encoded, tokenizer, batch_size, advance)
            with progress_bar(f"Bootstrap {chosen.name} {name}", resamples, progress) as advance:
                if structured:
                    found = judge_structured(chosen, name, size, known, said, resamples, CONFIDENCE, seed, advance)
                else:
                    references, to_data = known
                    found = judge(chosen, name, size, said, references[rows], to_data, resamples, seed, advance)
            results.append(found)
        layers = _layer_sqnr(pair, encoded_first, tokenizer, progress)
        latency = None
        if latency_batch_size is not None:
            example = encoded_first[0]["input_ids"]
            latency = time_pair(pair, latency_batch_size, timed_length, tokenizer, example, seed, progress)
        return Comparison(
            task=chosen.name,
            problem_type=chosen.problem_type,
            headline=chosen.headline,
            float_model=describe_model(float_model, pair["float"]),
            int8_model=describe_model(int8_model, pair["int8"]),
            splits=tuple(results),
            confidence=CONFIDENCE,
            resamples=resamples,
            seed=seed,
            max_length=limit,
            latency=latency,
            layer_sqnr=layers,
            machine=describe_machine(models[0].device),
            versions=describe_versions(),
        )


def judge(
    task: Task,
    split: str,
    rows: int,
    logits: dict[str, np.ndarray],
    references: np.ndarray,
    to_data: np.ndarray | None,
    resamples: int,
    seed: int,
    advance: Callable[[], None],
) -> SplitResult:
    """Metrics, intervals and agreement of one split from both models' logits."""

    def progress(done: int) -> None:
        for _ in range(done):
            advance()

    before, after = (predictions_from_logits(task, logits[side]) for side in ("float", "int8"))
    if to_data is not None:
        before, after = to_data[before], to_data[after]
    float_values, int8_values = (compute_metrics(task, values, references) for values in (before, after))
    intervals = paired_bootstrap(
        task.metrics,
        before,
        after,
        references,
        resamples=resamples,
        confidence=CONFIDENCE,
        seed=seed,
        progress=progress,
    )
    classes = task.problem_type == CLASSIFICATION
    differences = np.abs(after.astype(np.float64) - before.astype(np.float64))
    return SplitResult(
        split=split,
        samples=len(references),
        rows=rows,
        metrics=tuple(
            MetricResult(name, float_values[name], int8_values[name], intervals[name]) for name in task.metrics
        ),
        agreement=agreement(before, after, references) if classes else None,
        deviation=None if classes else Deviation(float(differences.mean()), float(differences.max())),
    )


def _layer_sqnr(
    pair: dict[str, PreTrainedModel],
    encoded: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    progress: bool,
) -> dict[str, float]:
    """SQNR of the int8 layers, on a few small batches spread over the lengths of the texts."""
    float_layers = dict(pair["float"].named_modules())
    names = [name for name in quantized_modules(pair["int8"]) if name in float_layers]
    if not names or not _same_weights(pair):
        return {}
    by_length = sorted(encoded, key=lambda row: len(row["input_ids"]))
    wanted = min(len(by_length), SQNR_BATCHES * SQNR_BATCH_SIZE)
    few = [by_length[i] for i in np.linspace(0, len(by_length) - 1, wanted).astype(int)]
    size = SQNR_BATCH_SIZE if tokenizer.pad_token is not None else 1
    inputs = [forward_arguments(pair["float"], batch) for _, batch in batches(few, tokenizer, size)]
    with progress_bar("Error by layer", len(inputs), progress) as advance:
        return layer_sqnr(pair["float"], pair["int8"], inputs, names, advance)


def _same_weights(pair: dict[str, PreTrainedModel]) -> bool:
    """Whether one model was made from the other's weights, judged by what both hold in float.

    A model trained with QAT and a float twin differ by their training; that is no layer's quantization error.
    """
    floats = dict(pair["float"].named_parameters())
    common = [(value, floats[name]) for name, value in pair["int8"].named_parameters() if name in floats]
    return all(
        value.shape == other.shape and torch.equal(value.cpu(), other.to("cpu", value.dtype))
        for value, other in common
    )


def check_numbers(
    batch_size: int, max_samples: int | None, latency_batch_size: int | None, latency_length: int | None
) -> None:
    """Refuse counts below 1."""
    values = {
        "batch_size": batch_size,
        "max_samples": max_samples,
        "latency_batch_size": latency_batch_size,
        "latency_length": latency_length,
    }
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be 1 or more.")


def with_metrics(task: Task, metrics: Sequence[str] | str | None) -> Task:
    """The task with other metrics, where some are given."""
    if metrics is None:
        return task
    wanted = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    return replace(task, metrics=wanted, headline=task.headline if task.headline in wanted else "")


def load_splits(task: Task | None, data: Any) -> dict[str, Dataset]:
    """The labelled splits of a task, or of the data given."""
    if data is None and task is not None:
        return {split: load_task_data(task, split) for split in task.splits}
    dataset = load_data(data)
    if task is not None:
        check_columns(dataset, task)
    split = dataset.split if not isinstance(data, (str, os.PathLike)) else Path(data).stem
    return {str(split or "data"): dataset}


def data_name(data: Any) -> str:
    """What reports call data that came without a task."""
    return Path(data).stem if isinstance(data, (str, os.PathLike)) else "data"


def load_given(model: PreTrainedModel | str | os.PathLike[str]) -> PreTrainedModel:
    """The model itself, or the one in that folder."""
    return load_model(model) if isinstance(model, (str, os.PathLike)) else model


def check_roles(pair: dict[str, PreTrainedModel]) -> None:
    """Refuse a quantized model in the float model's place."""
    if quantized_modules(pair["float"]):
        swapped = not quantized_modules(pair["int8"])
        raise ValueError(
            "`float_model` holds int8 layers"
            + (" and `int8_model` none: the two are swapped. " if swapped else ". ")
            + "Pass the float model first: compare(float_model, int8_model)."
        )


def _device(
    float_model: PreTrainedModel | str | os.PathLike[str],
    int8_model: PreTrainedModel | str | os.PathLike[str],
    device: torch.device | str | None,
) -> torch.device:
    if device is not None:
        return torch.device(device)
    homes = [model.device for model in (int8_model, float_model) if isinstance(model, PreTrainedModel)]
    return homes[0] if homes else torch.device("cpu")


def find_timed_length(wanted: int | None, limit: int | None) -> int:
    """Tokens of a timed sequence."""
    if wanted is None:
        return min(DEFAULT_LATENCY_LENGTH, limit or DEFAULT_LATENCY_LENGTH)
    if limit is not None and wanted > limit:
        raise ValueError(f"`latency_length` is {wanted}; these models take 1 to {limit} tokens.")
    return wanted


def sample_rows(rows: int, max_samples: int | None, seed: int) -> np.ndarray:
    """Rows to judge on: all, or some drawn with a seed, in the order of the data."""
    if max_samples is None or max_samples >= rows:
        return np.arange(rows)
    # Drawn, not the first ones: files are often sorted by label. Sorted, so that the order stays that of the file.
    return np.sort(np.random.default_rng(seed).choice(rows, size=max_samples, replace=False))
