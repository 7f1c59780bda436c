"""Tasks, their data, and labels in the numbering of a model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig

from hf_quant.evaluation.labels import check_models_agree, label_names, read_labels
from hf_quant.evaluation.tasks import (
    GLUE_TASKS,
    Task,
    check_columns,
    get_task,
    infer_task,
    load_data,
    load_task_data,
)

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="the GLUE files are not beside this checkout")


def config(**changes: object) -> BertConfig:
    return BertConfig(**{"num_labels": 2, **changes})


# The table of Wang et al., 2018 (GLUE), Table 1, with the column names of nyu-mll/glue.
@pytest.mark.parametrize(
    ("name", "columns", "labels", "metrics"),
    [
        ("cola", ("sentence",), 2, ("matthews_correlation",)),
        ("mnli", ("premise", "hypothesis"), 3, ("accuracy",)),
        ("mrpc", ("sentence1", "sentence2"), 2, ("accuracy", "f1")),
        ("qnli", ("question", "sentence"), 2, ("accuracy",)),
        ("qqp", ("question1", "question2"), 2, ("accuracy", "f1")),
        ("rte", ("sentence1", "sentence2"), 2, ("accuracy",)),
        ("sst2", ("sentence",), 2, ("accuracy",)),
        ("stsb", ("sentence1", "sentence2"), 1, ("pearsonr", "spearmanr")),
        ("wnli", ("sentence1", "sentence2"), 2, ("accuracy",)),
    ],
)
def test_glue_table(name: str, columns: tuple[str, ...], labels: int, metrics: tuple[str, ...]) -> None:
    task = get_task(name)
    assert (task.text_columns, task.num_labels, task.metrics) == (columns, labels, metrics)
    assert (task.hub_dataset, task.hub_config, task.label_column) == ("nyu-mll/glue", name, "label")
    assert task.problem_type == ("regression" if name == "stsb" else "single_label_classification")
    assert task.headline in metrics
    assert len(GLUE_TASKS) == 9


def test_mnli_has_both_validation_splits() -> None:
    assert get_task("mnli").splits == ("validation_matched", "validation_mismatched")


@pytest.mark.parametrize(("wrong", "right"), [("mprc", "mrpc"), ("SST2", "sst2"), ("cloa", "cola")])
def test_unknown_task_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown task '{wrong}'; did you mean '{right}'\? Choose one of: 'cola'"):
        get_task(wrong)


def test_task_of_ones_own() -> None:
    task = Task("stars", text_columns=["text"], problem_type="regression")  # type: ignore[arg-type]
    assert task.text_columns == ("text",)
    assert (task.num_labels, task.metrics, task.headline) == (1, ("pearsonr", "spearmanr"), "pearsonr")
    assert get_task(task) is task
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"  # type: ignore[misc]
    assert Task("t", "text").text_columns == ("text",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem_type": "regresion"}, r"unknown `problem_type` 'regresion'; did you mean 'regression'\?"),
        ({"metrics": ("acuracy",)}, r"unknown metric 'acuracy' for single_label.*did you mean 'accuracy'\?"),
        ({"metrics": ("pearsonr",)}, r"unknown metric 'pearsonr' for single_label.*Choose from: 'accuracy', 'f1'"),
        ({"metrics": ("f1",), "num_labels": 3}, "'f1' is the binary F1 of class 1 and needs `num_labels=2`, got 3"),
        ({"headline": "f1"}, r"`headline` 'f1' is not one of its metrics 'accuracy'"),
        ({"num_labels": 1}, "classification needs `num_labels` of 2 or more, got 1"),
        ({"problem_type": "regression", "num_labels": 2}, "regression has `num_labels=1`, got 2"),
        ({"text_columns": ()}, "one column of text or two.*got 0"),
        ({"text_columns": ("a", "b", "c")}, "got 3: 'a', 'b', 'c'"),
        ({"splits": ()}, "`splits` is empty"),
    ],
)
def test_task_refuses_fields_that_do_not_fit(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "mine", "text_columns": ("text",), **fields})  # type: ignore[arg-type]


def test_importing_tasks_and_reports_does_not_import_torch() -> None:
    code = (
        "import sys, hf_quant.evaluation.tasks, hf_quant.evaluation.report, hf_quant.evaluation.html;"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Data


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict({"text": ["null", 'say "it', "NA"], "label": [0, 1, 1]})


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "json", "jsonl"])
def test_load_data_reads_every_kind_of_file(kind: str, rows: Dataset, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "csv":
        rows.to_csv(path, index=False)
    elif kind == "tsv":
        path.write_text('text\tlabel\nnull\t0\nsay "it\t1\nNA\t1\n')
    else:
        rows.to_json(path, lines=kind == "jsonl", orient="records")
    read = load_data(path)
    assert read["text"][:] == ["null", 'say "it', "NA"]  # neither missing values nor quotation
    assert read["label"][:] == [0, 1, 1]


def test_quotation_marks_in_tsv_cells_do_not_swallow_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('text\tlabel\n"open\t0\nplain\t1\n')
    assert load_data(tmp_path / "rows.tsv")["text"][:] == ['"open', "plain"]


def test_load_data_passes_a_dataset_through(rows: Dataset) -> None:
    assert load_data(rows) is rows


def test_load_data_refuses_what_it_cannot_read(rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"unknown kind of data file '\.xlsx'. Allowed: '\.parquet', '\.csv'"):
        load_data(tmp_path / "rows.xlsx")
    with pytest.raises(ValueError, match=r"broken\.parquet could not be read as parquet"):
        load_data(tmp_path / "broken.parquet")
    with pytest.raises(FileNotFoundError, match=r"There is no data file .*none\.csv"):
        load_data(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"empty\.csv could not be read as csv.*no data"):
        load_data(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match=r"`data` \(a Dataset\) has no rows"):
        load_data(rows.select([]))
    with pytest.raises(TypeError, match=r"several splits \('train', 'test'\); pass one, for example data\['test'\]"):
        load_data(DatasetDict(train=rows, test=rows))
    with pytest.raises(TypeError, match="path of a file, got int"):
        load_data(3)  # type: ignore[arg-type]


def test_load_task_data_from_a_folder(rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sst2").mkdir()
    rows.rename_column("text", "sentence").to_parquet(tmp_path / "sst2" / "validation.parquet")
    assert len(load_task_data("sst2", data_dir=tmp_path)) == 3
    monkeypatch.setenv("HF_QUANT_GLUE_DIR", str(tmp_path))
    assert len(load_task_data("sst2")) == 3
    with pytest.raises(FileNotFoundError, match=r"sst2.train\.parquet.*that folder holds: 'validation\.parquet'"):
        load_task_data("sst2", "train")
    with pytest.raises(FileNotFoundError, match=r"rte.validation\.parquet.*holds: nothing"):
        load_task_data("rte")


def test_validation_of_mnli_means_the_matched_one(tmp_path: Path) -> None:
    (tmp_path / "mnli").mkdir()
    data = Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [2]})
    data.to_parquet(tmp_path / "mnli" / "validation_matched.parquet")
    assert load_task_data("mnli", "validation", tmp_path)["label"][:] == [2]


def test_load_task_data_says_what_to_do_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_QUANT_GLUE_DIR", raising=False)

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ConnectionError, match=r"nyu-mll/glue \(mrpc, validation\).*no network.*HF_QUANT_GLUE_DIR"):
        load_task_data("mrpc")
    with pytest.raises(ValueError, match=r"Task 'mine' has no data set on the hub\. Pass `data=`"):
        load_task_data(Task("mine", ("text",)))


def test_load_task_data_asks_the_hub_for_the_right_split(rows: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_QUANT_GLUE_DIR", raising=False)
    asked = []

    def hub(*args: object, **kwargs: object) -> Dataset:
        asked.append((args, kwargs))
        return rows.rename_column("text", "sentence")

    monkeypatch.setattr("datasets.load_dataset", hub)
    load_task_data("cola", "train")
    assert asked == [(("nyu-mll/glue", "cola"), {"split": "train"})]


def test_missing_column_is_named_with_those_there_are_and_the_nearest(rows: Dataset) -> None:
    with pytest.raises(
        ValueError, match=r"no column 'sentence'\. It has 'text', 'label'\. For columns of other names"
    ):
        check_columns(rows, get_task("sst2"))
    with pytest.raises(ValueError, match=r"no column 'labels'; did you mean 'label'\?"):
        check_columns(rows, Task("mine", ("text",), label_column="labels"))


def test_infer_task() -> None:
    pair = Dataset.from_dict({"a": ["x"], "b": ["y"], "idx": [7], "labels": [0.5]})
    task = infer_task(pair, num_labels=1)
    assert (task.text_columns, task.label_column, task.problem_type) == (("a", "b"), "labels", "regression")
    names = Dataset.from_dict({"text": ["x"], "label": ["good"]})
    assert infer_task(names, num_labels=2, metrics=["f1"]).text_columns == ("text",)
    with pytest.raises(ValueError, match=r"needs a column 'label'.*it has 'x', 'label', of which text: none"):
        infer_task(Dataset.from_dict({"x": [1], "label": [0]}), num_labels=2)


@needs_glue
@pytest.mark.parametrize(
    ("name", "rows"), [("mrpc", 408), ("sst2", 872), ("cola", 1043), ("stsb", 1500), ("wnli", 71)]
)
def test_real_glue_data_fits_the_table(name: str, rows: int) -> None:
    task = get_task(name)
    data = load_task_data(name, data_dir=GLUE)
    references, order = read_labels(data, task, config(num_labels=task.num_labels))
    assert len(data) == len(references) == rows
    assert order is None
    assert set(np.unique(references)) == {0, 1} if task.num_labels == 2 else references.max() <= 5.0


# Labels


def labelled(values: list[object], names: list[str] | None = None) -> Dataset:
    data = Dataset.from_dict({"text": ["t"] * len(values), "label": values})
    return data.cast(Features({"text": Value("string"), "label": ClassLabel(names=names)})) if names else data


MINE = Task("mine", ("text",))


def test_class_ids_are_read_from_whole_numbers_of_any_dtype() -> None:
    for values in ([0, 1, 1], [0.0, 1.0, 1.0], [False, True, True]):
        references, order = read_labels(labelled(values), MINE, config())
        assert references.dtype == np.int64
        assert references.tolist() == [0, 1, 1]
        assert order is None


def test_class_names_are_read_through_the_model() -> None:
    model = config(id2label={0: "NEGATIVE", 1: "POSITIVE"})
    assert read_labels(labelled(["positive", "negative"]), MINE, model)[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"class name 'positiv'; did you mean 'positive'\? The model's classes"):
        read_labels(labelled(["positiv", "NEGATIVE"]), MINE, model)
    with pytest.raises(ValueError, match="The model's classes: it names none"):
        read_labels(labelled(["good", "bad"]), MINE, config())


def test_a_model_that_numbers_its_classes_otherwise_is_read_in_the_numbering_of_the_data() -> None:
    names = ["entailment", "neutral", "contradiction"]
    model = config(num_labels=3, id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"})
    task = Task("nli", ("text",), num_labels=3)
    references, order = read_labels(labelled([0, 2, 1], names), task, model)
    assert references.tolist() == [0, 2, 1]
    assert order is not None
    assert order.tolist() == [2, 1, 0]
    assert read_labels(labelled([0], names), task, config(num_labels=3))[1] is None
    same = config(num_labels=3, id2label=dict(enumerate(names)))
    assert read_labels(labelled([0], names), task, same)[1] is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, -1, -1], r"the label in row 1 \(-1\) is -1: these rows are unlabelled; 2 of 3 rows"),
        ([0, 1, 2], r"the label in row 2 \(2\) is no class id of 0 to 1"),
        ([0.5, 1.0], r"row 0 \(0.5\) is no class id"),
        ([0, None], r"row 1 \(None\) is missing"),
        ([[0], [1]], r"must hold class ids or class names, one a row; it begins with \[0\]"),
    ],
)
def test_labels_that_are_no_classes_are_refused(values: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(labelled(values), MINE, config())


def test_regression_labels() -> None:
    task, model = Task("r", ("text",), problem_type="regression"), config(num_labels=1)
    assert read_labels(labelled([-1.0, 2.5]), task, model)[0].tolist() == [-1.0, 2.5]  # -1 may be a rating
    with pytest.raises(ValueError, match="is -1: these rows are unlabelled; 2 of 2 rows"):
        read_labels(labelled([-1.0, -1.0]), task, model)
    with pytest.raises(ValueError, match=r"row 1 \(nan\) is not a finite number"):
        read_labels(labelled([1.0, float("nan")]), task, model)
    with pytest.raises(ValueError, match=r"is a regression, but the column 'label' holds 'good'"):
        read_labels(labelled(["good", "bad"]), task, model)


def test_a_model_that_does_not_fit_the_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Task 'mine' .* has 2 label\(s\), the model 5"):
        read_labels(labelled([0]), MINE, config(num_labels=5))
    with pytest.raises(ValueError, match="'multi_label_classification'; one label an example"):
        read_labels(labelled([0]), MINE, config(problem_type="multi_label_classification"))


def test_models_that_do_not_predict_the_same_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="float model has 2 labels and the int8 model 3"):
        check_models_agree(config(), config(num_labels=3))
    first, second = config(id2label={0: "no", 1: "yes"}), config(id2label={0: "yes", 1: "no"})
    with pytest.raises(ValueError, match=r"differently: float \['no', 'yes'\], int8 \['yes', 'no'\]"):
        check_models_agree(first, second)
    check_models_agree(first, config())  # placeholders say nothing
    assert label_names(config()) == []
