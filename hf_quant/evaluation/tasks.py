"""What a task is: its text columns, its labels, its metrics and its data. The nine GLUE tasks, and users' own."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

CLASSIFICATION = "single_label_classification"
REGRESSION = "regression"

# The metrics that make sense for each problem type; the first is the default.
METRICS_BY_PROBLEM_TYPE = {
    CLASSIFICATION: ("accuracy", "f1", "matthews_correlation"),
    REGRESSION: ("pearsonr", "spearmanr"),
}

GLUE_DIR_VARIABLE = "HF_QUANT_GLUE_DIR"

_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class Task:
    """A labelled data set and the metrics that it is judged by.

    ```python
    reviews = Task("reviews", text_columns=("text",), label_column="stars", problem_type="regression")
    compare("my/model", "my-model-int8", task=reviews, data="reviews.csv")
    ```

    Args:
        name (`str`): what reports call it.
        text_columns (`tuple[str, ...]`): one column of text, or two for sentence pairs.
        label_column (`str`, *optional*, defaults to `"label"`): class ids, class names, or real numbers.
        problem_type (`str`, *optional*, defaults to `"single_label_classification"`):
            That, or `"regression"`; the words of `PretrainedConfig.problem_type`.
        num_labels (`int`, *optional*): classes; defaults to 2, and is 1 for regression.
        metrics (`tuple[str, ...]`, *optional*):
            For classes `"accuracy"`, `"f1"` (two classes; class 1 is the positive one) and
            `"matthews_correlation"`; for regression `"pearsonr"` and `"spearmanr"`. Defaults to accuracy
            for classes and both correlations for regression.
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
                f"{_list(METRICS_BY_PROBLEM_TYPE)}."
            )
        allowed = METRICS_BY_PROBLEM_TYPE[self.problem_type]
        # Lists and single strings are what people write; the frozen dataclass keeps tuples.
        for field in ("text_columns", "metrics", "splits"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        if self.num_labels is None:
            object.__setattr__(self, "num_labels", 1 if self.problem_type == REGRESSION else 2)
        if not self.metrics:
            object.__setattr__(self, "metrics", allowed if self.problem_type == REGRESSION else allowed[:1])
        if not self.headline:
            object.__setattr__(self, "headline", self.metrics[0])
        self._check(allowed)

    def _check(self, allowed: tuple[str, ...]) -> None:
        if not 1 <= len(self.text_columns) <= 2:
            raise ValueError(
                f"Task {self.name!r}: `text_columns` must name one column of text or two (sentence pairs), "
                f"got {len(self.text_columns)}: {_list(self.text_columns)}."
            )
        for metric in self.metrics:
            if metric not in allowed:
                raise ValueError(
                    f"Task {self.name!r}: unknown metric {metric!r} for {self.problem_type}"
                    f"{did_you_mean(metric, allowed) or '.'} Choose from: {_list(allowed)}."
                )
        if self.headline not in self.metrics:
            raise ValueError(
                f"Task {self.name!r}: `headline` {self.headline!r} is not one of its metrics {_list(self.metrics)}."
            )
        labels = self.num_labels
        if self.problem_type == REGRESSION and labels != 1:
            raise ValueError(f"Task {self.name!r}: regression has `num_labels=1`, got {labels}.")
        if self.problem_type == CLASSIFICATION and (labels is None or labels < 2):
            raise ValueError(f"Task {self.name!r}: classification needs `num_labels` of 2 or more, got {labels}.")
        if "f1" in self.metrics and labels != 2:
            raise ValueError(
                f"Task {self.name!r}: 'f1' is the binary F1 of class 1 and needs `num_labels=2`, got {labels}. "
                f"Use {_list(m for m in allowed if m != 'f1')}."
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
            f"{_list(GLUE_TASKS)}; or give a hf_quant.evaluation.tasks.Task with `data` of your own."
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
                f"{_list(sorted(found.name for found in path.parent.glob('*'))) or 'nothing'}."
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


def load_data(data: Dataset | str | os.PathLike[str]) -> Dataset:
    """Rows from a file, or a `datasets.Dataset` as it is.

    Args:
        data (`datasets.Dataset` or `str`):
            A `.parquet`, `.csv`, `.tsv`, `.json` or `.jsonl` file. TSV cells are taken literally, quotation
            marks included, as in GLUE's own files. Words such as "null" or "NA" stay text.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: for an unknown kind of file, an unreadable one, or one without rows.
        `TypeError`: for anything else, such as a `DatasetDict`.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(data, (dict, DatasetDict)):
        splits = list(data)
        raise TypeError(
            f"`data` holds several splits ({_list(splits)}); pass one, for example data[{splits[-1]!r}]."
            if splits
            else "`data` is empty."
        )
    if not isinstance(data, (str, os.PathLike, Dataset)):
        raise TypeError(f"`data` must be a `datasets.Dataset` or the path of a file, got {type(data).__name__}.")
    dataset = data if isinstance(data, Dataset) else _read(Path(data))
    if len(dataset) == 0:
        raise ValueError(f"`data` ({'a Dataset' if dataset is data else data}) has no rows.")
    return dataset


def _read(path: Path) -> Dataset:
    from datasets import Dataset

    kind = _READERS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown kind of data file {path.suffix!r}. Allowed: {_list(_READERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    name = str(path)
    try:
        if kind == "parquet":
            return Dataset.from_parquet(name)
        if kind == "json":
            return Dataset.from_json(name)
        # Empty cells and words like "null" are text here, not missing numbers.
        if kind == "tsv":
            return Dataset.from_csv(name, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
        return Dataset.from_csv(name, keep_default_na=False)
    except Exception as error:  # datasets wraps whatever pandas, pyarrow or json raised
        cause = error.__cause__ or error
        raise ValueError(f"{path} could not be read as {kind}: {cause}") from error


def check_columns(dataset: Dataset, task: Task) -> None:
    """Refuse a data set that lacks a column of the task, naming the column, those there are and the nearest.

    Raises:
        `ValueError`: if a text column or the label column is missing.
    """
    for column in (*task.text_columns, task.label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"Task {task.name!r}: the data has no column {column!r}"
                f"{did_you_mean(column, dataset.column_names) or '.'} It has {_list(dataset.column_names)}. For "
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
            f"{_list(columns)}, of which text: {_list(text) or 'none'}. Say which with "
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


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(str(name)) for name in names)
