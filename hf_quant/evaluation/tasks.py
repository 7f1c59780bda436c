"""What a task is: its text columns, its labels, its metrics and its data. The nine GLUE tasks, and users' own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import did_you_mean
from .files import listed, load_data

if TYPE_CHECKING:
    from datasets import Dataset

CLASSIFICATION = "single_label_classification"
REGRESSION = "regression"
TOKENS = "token_classification"
QUESTIONS = "question_answering"
CAUSAL = "causal_lm"

# The metrics that make sense for each problem type; the first is the default.
METRICS_BY_PROBLEM_TYPE = {
    CLASSIFICATION: ("accuracy", "f1", "matthews_correlation"),
    REGRESSION: ("pearsonr", "spearmanr"),
    TOKENS: ("token_accuracy", "entity_f1"),
    QUESTIONS: ("exact_match", "token_f1"),
    CAUSAL: ("perplexity",),
}
_ALL_BY_DEFAULT = (REGRESSION, QUESTIONS)
# What the text columns are, by problem type; the others have one or two texts.
_TEXT_COLUMNS = {
    TOKENS: (1, "one column of lists of words"),
    QUESTIONS: (2, "two columns, the question and its context"),
    CAUSAL: (1, "one column of text"),
}

GLUE_DIR_VARIABLE = "HF_QUANT_GLUE_DIR"


@dataclass(frozen=True)
class Task:
    """A labelled data set and the metrics that it is judged by.

    ```python
    reviews = Task("reviews", text_columns=("text",), label_column="stars", problem_type="regression")
    compare("my/model", "my-model-int8", task=reviews, data="reviews.csv")
    ```

    Args:
        name (`str`): what reports call it.
        text_columns (`tuple[str, ...]`):
            One column of text, or two for sentence pairs; one of lists of words for token classification; question
            and context for question answering.
        label_column (`str`, *optional*, defaults to `"label"`):
            Class ids, class names, or real numbers; a list of tag ids or names, one a word; for question answering
            `{"text": [...], "answer_start": [...]}` as in SQuAD, empty lists where there is no answer. A causal
            language model needs none.
        problem_type (`str`, *optional*, defaults to `"single_label_classification"`):
            That, `"regression"`, `"token_classification"`, `"question_answering"` or `"causal_lm"`.
        num_labels (`int`, *optional*):
            Classes; defaults to 2, and is 1 for regression. For token classification it is by default the model's.
        metrics (`tuple[str, ...]`, *optional*):
            For classes `"accuracy"`, `"f1"` (two classes; class 1 is the positive one) and
            `"matthews_correlation"`; for regression `"pearsonr"` and `"spearmanr"`; for tokens `"token_accuracy"`
            and `"entity_f1"` (BIO tags); for questions `"exact_match"` and `"token_f1"`; for language models
            `"perplexity"`. Defaults to accuracy for classes and tokens, and to all of the others.
        headline (`str`, *optional*): the one metric to quote; defaults to the first.
        splits (`tuple[str, ...]`, *optional*, defaults to `("validation",)`): the labelled splits to judge on.
        hub_dataset (`str`, *optional*): data set on the hub.
        hub_config (`str`, *optional*): its configuration.

    Raises:
        `ValueError`: where the fields do not fit together, naming the value and the allowed ones.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str = "label"
    problem_type: str = CLASSIFICATION
    num_labels: int | None = None
    metrics: tuple[str, ...] = ()
    headline: str = ""
    splits: tuple[str, ...] = ("validation",)
    hub_dataset: str | None = None
    hub_config: str | None = None

    def __post_init__(self) -> None:
        if self.problem_type not in METRICS_BY_PROBLEM_TYPE:
            raise ValueError(
                f"Task {self.name!r}: unknown `problem_type` {self.problem_type!r}"
                f"{did_you_mean(self.problem_type, METRICS_BY_PROBLEM_TYPE) or '.'} Choose one of: "
                f"{listed(METRICS_BY_PROBLEM_TYPE)}."
            )
        allowed = METRICS_BY_PROBLEM_TYPE[self.problem_type]
        # Lists and single strings are what people write; the frozen dataclass keeps tuples.
        for field in ("text_columns", "metrics", "splits"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        if self.num_labels is None:
            number = {REGRESSION: 1, TOKENS: None, CAUSAL: None}.get(self.problem_type, 2)
            object.__setattr__(self, "num_labels", number)
        if not self.metrics:
            object.__setattr__(self, "metrics", allowed if self.problem_type in _ALL_BY_DEFAULT else allowed[:1])
        if not self.headline:
            object.__setattr__(self, "headline", self.metrics[0])
        self._check(allowed)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that its data must have."""
        return self.text_columns if self.problem_type == CAUSAL else (*self.text_columns, self.label_column)

    def _check(self, allowed: tuple[str, ...]) -> None:
        count, words = _TEXT_COLUMNS.get(self.problem_type, (None, ""))
        if count not in (None, len(self.text_columns)):
            raise ValueError(
                f"Task {self.name!r}: for {self.problem_type}, `text_columns` must name {words}; got "
                f"{len(self.text_columns)}: {listed(self.text_columns)}."
            )
        if not 1 <= len(self.text_columns) <= 2:
            raise ValueError(
                f"Task {self.name!r}: `text_columns` must name one column of text or two (sentence pairs), "
                f"got {len(self.text_columns)}: {listed(self.text_columns)}."
            )
        for metric in self.metrics:
            if metric not in allowed:
                raise ValueError(
                    f"Task {self.name!r}: unknown metric {metric!r} for {self.problem_type}"
                    f"{did_you_mean(metric, allowed) or '.'} Choose from: {listed(allowed)}."
                )
        if self.headline not in self.metrics:
            raise ValueError(
                f"Task {self.name!r}: `headline` {self.headline!r} is not one of its metrics {listed(self.metrics)}."
            )
        labels = self.num_labels
        if self.problem_type == REGRESSION and labels != 1:
            raise ValueError(f"Task {self.name!r}: regression has `num_labels=1`, got {labels}.")
        if self.problem_type == CLASSIFICATION and (labels is None or labels < 2):
            raise ValueError(f"Task {self.name!r}: classification needs `num_labels` of 2 or more, got {labels}.")
        if self.problem_type == QUESTIONS and labels != 2:
            raise ValueError(
                f"Task {self.name!r}: a question-answering model has two outputs a token, where the answer starts and "
                f"where it ends; leave `num_labels` out, got {labels}."
            )
        if self.problem_type == CAUSAL and labels is not None:
            raise ValueError(f"Task {self.name!r}: causal_lm has no labels; leave `num_labels` out, got {labels}.")
        if "f1" in self.metrics and labels != 2:
            raise ValueError(
                f"Task {self.name!r}: 'f1' is the binary F1 of class 1 and needs `num_labels=2`, got {labels}. "
                f"Use {listed(m for m in allowed if m != 'f1')}."
            )
        if not self.splits:
            raise ValueError(f"Task {self.name!r}: `splits` is empty; name at least one labelled split.")


def _glue(name: str, text_columns: Sequence[str], metrics: Sequence[str], **fields: Any) -> Task:
    return Task(
        name=name,
        text_columns=tuple(text_columns),
        metrics=tuple(metrics),
        hub_dataset="nyu-mll/glue",
        hub_config=name,
        **fields,
    )


_SENTENCES = ("sentence1", "sentence2")

# Metrics as in Wang et al., 2018 (GLUE), Table 1. Headlines as in Devlin et al., 2019 (BERT), Table 1: F1 for
# QQP and MRPC, Spearman for STS-B, accuracy or Matthews elsewhere.
GLUE_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ["sentence"], ["matthews_correlation"]),
        _glue(
            "mnli",
            ["premise", "hypothesis"],
            ["accuracy"],
            num_labels=3,
            splits=("validation_matched", "validation_mismatched"),
        ),
        _glue("mrpc", _SENTENCES, ["accuracy", "f1"], headline="f1"),
        _glue("qnli", ["question", "sentence"], ["accuracy"]),
        _glue("qqp", ["question1", "question2"], ["accuracy", "f1"], headline="f1"),
        _glue("rte", _SENTENCES, ["accuracy"]),
        _glue("sst2", ["sentence"], ["accuracy"]),
        _glue("stsb", _SENTENCES, ["pearsonr", "spearmanr"], headline="spearmanr", problem_type=REGRESSION),
        _glue("wnli", _SENTENCES, ["accuracy"]),
    )
}


def get_task(task: str | Task) -> Task:
    """The GLUE task of that name; a `Task` passes through.

    Raises:
        `ValueError`: for an unknown name, with the nearest one.
    """
    if isinstance(task, Task):
        return task
    if task not in GLUE_TASKS:
        raise ValueError(
            f"unknown task {task!r}{did_you_mean(str(task).lower(), GLUE_TASKS) or '.'} Choose one of: "
            f"{listed(GLUE_TASKS)}; or give a hf_quant.evaluation.tasks.Task with `data` of your own."
        )
    return GLUE_TASKS[task]


def load_task_data(
    task: str | Task, split: str = "validation", data_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """One split of a task's data, from a local folder where there is one, else from the hub.

    Args:
        task (`str` or `Task`): a GLUE task, or one of your own.
        split (`str`, *optional*, defaults to `"validation"`):
            `"validation"` means the first of the task's own validation splits (MNLI: `"validation_matched"`).
        data_dir (`str`, *optional*, defaults to the environment variable `HF_QUANT_GLUE_DIR`):
            A folder that holds `<task>/<split>.parquet`. Where it is given, the hub is not asked.

    Returns:
        `datasets.Dataset`: with at least the task's text and label columns.

    Raises:
        `FileNotFoundError`: if the folder has no such file.
        `ConnectionError`: if the hub cannot be reached and no folder is given.
        `ValueError`: if the task is unknown, has no data of its own, or its columns are missing.
    """
    task = get_task(task)
    if split == "validation" and split not in task.splits:
        split = task.splits[0]
    data_dir = data_dir or os.environ.get(GLUE_DIR_VARIABLE)
    if data_dir:
        path = Path(data_dir) / task.name / f"{split}.parquet"
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path}. Expected the layout <data_dir>/<task>/<split>.parquet; that folder holds: "
                f"{listed(sorted(found.name for found in path.parent.glob('*'))) or 'nothing'}."
            )
        dataset = load_data(path)
    elif task.hub_dataset is None:
        raise ValueError(
            f"Task {task.name!r} has no data set on the hub. Pass `data=`, or a folder with "
            f"{task.name}/{split}.parquet as `data_dir` or in {GLUE_DIR_VARIABLE}."
        )
    else:
        dataset = _from_hub(task, split)
    check_columns(dataset, task)
    return dataset


def _from_hub(task: Task, split: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(task.hub_dataset, task.hub_config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"{task.hub_dataset} ({task.hub_config}, {split}) could not be loaded from the hub: {error} "
            f"Without a network, put {task.name}/{split}.parquet in a folder and name the folder in "
            f"{GLUE_DIR_VARIABLE}."
        ) from error


def check_columns(dataset: Dataset, task: Task) -> None:
    """Refuse a data set that lacks a column of the task, naming the column, those there are and the nearest.

    Raises:
        `ValueError`: if a text column or the label column is missing.
    """
    for column in task.columns:
        if column not in dataset.column_names:
            raise ValueError(
                f"Task {task.name!r}: the data has no column {column!r}"
                f"{did_you_mean(column, dataset.column_names) or '.'} It has {listed(dataset.column_names)}. For "
                f"columns of other names give Task({task.name!r}, text_columns=..., label_column=...)."
            )


def infer_task(dataset: Dataset, num_labels: int, metrics: Sequence[str] = (), name: str = "data") -> Task:
    """A `Task` for data that came without one: the column `label` or `labels`, and one or two columns of text.

    Args:
        dataset (`datasets.Dataset`): the data.
        num_labels (`int`): of the model; 1 means regression.
        metrics (sequence of `str`, *optional*): as in `Task`.
        name (`str`, *optional*, defaults to `"data"`): as in `Task`.

    Raises:
        `ValueError`: if the columns leave room for doubt.
    """
    columns = dataset.column_names
    label = next((column for column in ("label", "labels") if column in columns), None)
    text = [c for c in columns if getattr(dataset.features[c], "dtype", None) in ("string", "large_string")]
    text = [c for c in text if c != label]
    if label is None or not 1 <= len(text) <= 2:
        raise ValueError(
            "Without `task=` the data needs a column 'label' and one or two columns of text; it has "
            f"{listed(columns)}, of which text: {listed(text) or 'none'}. Say which with "
            "`task=Task('my-task', text_columns=(...), label_column=...)` from hf_quant.evaluation.tasks."
        )
    return Task(
        name=name,
        text_columns=tuple(text),
        label_column=label,
        problem_type=REGRESSION if num_labels == 1 else CLASSIFICATION,
        num_labels=num_labels,
        metrics=tuple(metrics),
    )
