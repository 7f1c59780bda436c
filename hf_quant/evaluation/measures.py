"""What models are held against each other on: labelled examples, or windows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..progress import progress_bar
from ..quantization.calibration import Calibration
from ..texts import length_limit
from .compare import CONFIDENCE, data_name, judge, load_splits, sample_rows, with_metrics
from .labels import read_labels
from .perplexity import DEFAULT_BATCH_SIZE, Perplexity, perplexity_change, perplexity_of_ids, require_causal
from .predict import Encoded, encode_texts, predict
from .results import Agreement, Deviation
from .structured import STRUCTURED
from .sweep_results import PERPLEXITY, Change
from .tasks import CAUSAL, Task, get_task, infer_task, load_task_data
from .windows import Window, check_length, default_length, text_ids, windows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Judged = tuple[tuple[Change, ...], Agreement | None, Deviation | None]


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn.

    Args:
        resamples (`int`): how many.
        seed (`int`): of them.
    """

    resamples: int
    seed: int


@dataclass(frozen=True)
class Examples:
    """The first labelled split of a task, for classifiers and regressions; see `examples`."""

    task: Task
    own_task: bool
    split: str
    encoded: list[Encoded]
    references: np.ndarray
    to_data: np.ndarray | None
    rows: int
    max_length: int | None
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    bootstrap: Bootstrap
    progress: bool

    tokens = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def headline(self) -> str:
        """The metric to quote."""
        return self.task.headline

    @property
    def samples(self) -> int:
        """Examples that are judged."""
        return len(self.encoded)

    @property
    def example(self) -> Sequence[int]:
        """Token ids of a real text."""
        return self.encoded[0]["input_ids"]

    def measure(self, label: str, model: PreTrainedModel) -> np.ndarray:
        """Logits of shape `(n, num_labels)` of a model in eval mode."""
        count = -(-self.samples // self.batch_size)
        with progress_bar(f"Predicting {self.name}, {label}", count, self.progress) as advance:
            return predict({label: model}, self.encoded, self.tokenizer, self.batch_size, advance)[label]

    def judge(self, before: np.ndarray, after: np.ndarray) -> Judged:
        """Metrics, intervals and agreement from the logits of the float and the quantized model."""
        with progress_bar(f"Bootstrap {self.name}", self.bootstrap.resamples, self.progress) as advance:
            result = judge(
                self.task,
                self.split,
                self.rows,
                {"float": before, "int8": after},
                self.references,
                self.to_data,
                self.bootstrap.resamples,
                self.bootstrap.seed,
                advance,
            )
        changes = (Change(m.name, m.float_value, m.int8_value, m.delta, m.interval) for m in result.metrics)
        return tuple(changes), result.agreement, result.deviation

    def calibration(self, data: Any, samples: int) -> tuple[Calibration, str]:
        """Calibration data and words for them: the given ones, or drawn from the train split of the task.

        Raises:
            `ValueError`: if none are given and there is no train split.
        """
        if isinstance(data, Calibration):
            return data, _first(data.samples)
        if data is not None:
            if set(self.task.text_columns) <= set(getattr(data, "column_names", ())):
                data = data.select_columns(list(self.task.text_columns))
            given = Calibration(data, samples, max_length=self.max_length, processing_class=self.tokenizer)
            return given, _first(samples)
        if self.own_task:
            raise ValueError(_wanted("the data came without a task, so there is no train split"))
        try:
            train = load_task_data(self.task, "train")
        except (OSError, ValueError) as error:
            raise ValueError(_wanted(f"no train split of {self.name!r} was found ({error})")) from error
        rows = sample_rows(len(train), samples, self.bootstrap.seed)
        drawn = train.select_columns(list(self.task.text_columns)).select(rows)
        words = f"{len(rows)} of {len(train):,} examples of the train split of {self.name}, drawn with seed"
        found = Calibration(drawn, samples, max_length=self.max_length, processing_class=self.tokenizer)
        return found, f"{words} {self.bootstrap.seed}"


@dataclass(frozen=True)
class Texts:
    """Windows of a text, for causal language models; see `texts`."""

    ids: Tensor
    cuts: list[Window]
    rows: int
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    bootstrap: Bootstrap
    progress: bool

    name = headline = PERPLEXITY
    split = "the text"

    @property
    def samples(self) -> int:
        """Windows that are judged."""
        return len(self.cuts)

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(cut.predicted for cut in self.cuts)

    @property
    def example(self) -> Sequence[int]:
        """Token ids of a real text."""
        return self.ids[: self.max_length].tolist()

    def measure(self, label: str, model: PreTrainedModel) -> Perplexity:
        """The perplexity of a model in eval mode."""
        count = -(-len(self.cuts) // self.batch_size)
        with progress_bar(f"Perplexity, {label}", count, self.progress) as advance:
            return perplexity_of_ids(model, self.ids, self.cuts, self.batch_size, advance)

    def judge(self, before: Perplexity, after: Perplexity) -> Judged:
        """The relative change of the perplexity, with its interval."""
        change, interval = perplexity_change(
            before,
            after,
            resamples=self.bootstrap.resamples,
            confidence=CONFIDENCE,
            seed=self.bootstrap.seed,
        )
        return (Change(PERPLEXITY, before.value, after.value, change, interval),), None, None

    def calibration(self, data: Any, samples: int) -> tuple[Calibration, str]:
        """Calibration data and words for them; texts are cut into windows as those that are measured.

        Raises:
            `ValueError`: if none are given.
        """
        if data is None:
            raise ValueError(_wanted("a text has no train split"))
        if isinstance(data, Calibration):
            return data, _first(data.samples)
        rows = [data] if isinstance(data, str) else data
        if not isinstance(rows, (list, tuple)) or not all(isinstance(row, str) for row in rows):
            given = Calibration(data, samples, max_length=self.max_length, processing_class=self.tokenizer)
            return given, _first(samples)
        ids = text_ids(self.tokenizer, rows)
        cuts = windows(len(ids), self.max_length)
        drawn = [cuts[row] for row in sample_rows(len(cuts), samples, self.bootstrap.seed)]
        found = [{"input_ids": ids[cut.start : cut.end]} for cut in drawn]
        words = (
            f"{len(drawn)} of {len(cuts):,} windows of the text given for it, drawn with seed {self.bootstrap.seed}"
        )
        return Calibration(found, samples, self.batch_size), words


def examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Task | None,
    data: Dataset | Any,
    *,
    metrics: Sequence[str] | str | None,
    max_length: int | None,
    max_samples: int | None,
    batch_size: int | None,
    bootstrap: Bootstrap,
    progress: bool,
) -> Examples:
    """The first labelled split of a task or of a user's data, tokenized.

    Raises:
        `ValueError`: if model, task and data do not fit together.
    """
    chosen = None if task is None else with_metrics(get_task(task), metrics)
    if chosen is not None and chosen.problem_type in (*STRUCTURED, CAUSAL):
        raise ValueError(
            f"Task {chosen.name!r} is of {chosen.problem_type}; several schemes are held against each other on "
            "sequences or, with `texts=`, on the perplexity. Measure one model with hf_quant.compare."
        )
    splits = load_splits(chosen, data)
    name = next(iter(splits))
    split = splits[name]
    if chosen is None:
        wanted = [metrics] if isinstance(metrics, str) else metrics
        chosen = infer_task(split, model.config.num_labels, wanted or (), name=data_name(data))
    references, to_data = read_labels(split, chosen, model.config)
    limit = length_limit(tokenizer, [model], max_length)
    rows = sample_rows(len(split), max_samples, bootstrap.seed)
    return Examples(
        task=chosen,
        own_task=task is None,
        split=name,
        encoded=encode_texts(split.select(rows), chosen, tokenizer, limit),
        references=references[rows],
        to_data=to_data,
        rows=len(split),
        max_length=limit,
        tokenizer=tokenizer,
        batch_size=batch_size or 32,
        bootstrap=bootstrap,
        progress=progress,
    )


def texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[str] | str,
    *,
    max_length: int | None,
    max_samples: int | None,
    batch_size: int | None,
    bootstrap: Bootstrap,
    progress: bool,
) -> Texts:
    """A text cut into windows.

    Raises:
        `ValueError`: if the model is no causal language model, or cannot take windows of that length.
    """
    require_causal(model)
    length = default_length(tokenizer, model) if max_length is None else max_length
    check_length(model, length)
    ids = text_ids(tokenizer, given)
    cuts = windows(len(ids), length)
    return Texts(
        ids=ids,
        cuts=[cuts[row] for row in sample_rows(len(cuts), max_samples, bootstrap.seed)],
        rows=len(cuts),
        max_length=length,
        tokenizer=tokenizer,
        batch_size=batch_size or DEFAULT_BATCH_SIZE,
        bootstrap=bootstrap,
        progress=progress,
    )


def _first(samples: int) -> str:
    return f"the first {samples} samples (if there are as many) of the data given"


def _wanted(reason: str) -> str:
    return (
        f"static schemes need calibration data, and {reason}. Pass `calibration=` (--calibration): texts or examples "
        "like those that the model will see, about 128, and not the ones that it is measured on."
    )
