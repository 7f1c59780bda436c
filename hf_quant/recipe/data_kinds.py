"""What each kind of problem makes of a recipe's rows: the model's class and config, and a Trainer's data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..evaluation.tasks import CAUSAL, CLASSIFICATION, QUESTIONS, REGRESSION, TOKENS, Task
from .data import SPLITS, load_labels, name_classes, place_of, tokenize
from .source import Problem, RecipeError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from .schema import Recipe

_AUTO_CLASSES = {
    CLASSIFICATION: "AutoModelForSequenceClassification",
    REGRESSION: "AutoModelForSequenceClassification",
    TOKENS: "AutoModelForTokenClassification",
    QUESTIONS: "AutoModelForQuestionAnswering",
    CAUSAL: "AutoModelForCausalLM",
}


def auto_class(task: Task) -> Any:
    """The class of transformers that builds and loads a task's models."""
    import transformers

    return getattr(transformers, _AUTO_CLASSES[task.problem_type])


def load_config(recipe: Recipe, task: Task, rows: dict[str, Dataset]) -> tuple[PretrainedConfig, Task]:
    """The model's config with the task's labels, and the task with the number of them.

    Args:
        recipe ([`Recipe`]): names the model.
        task ([`Task`]): of `recipe.to_task()`.
        rows (`dict[str, datasets.Dataset]`): of [`load_rows`]; the tags are those of the training data.

    Raises:
        `OSError`, `ValueError`: if there is no such model.
        [`RecipeError`]: if the data do not have the number of tags that the recipe says.
    """
    from transformers import AutoConfig

    if task.problem_type == CAUSAL:
        return AutoConfig.from_pretrained(recipe.model), task
    if task.problem_type == QUESTIONS:
        return AutoConfig.from_pretrained(recipe.model, num_labels=task.num_labels), task
    if task.problem_type == TOKENS:
        return _tag_config(recipe, task, rows["train"])
    values = {"num_labels": task.num_labels, "problem_type": task.problem_type}
    config = AutoConfig.from_pretrained(recipe.model, **values)
    name_classes(recipe, task, rows["train"], config)
    return config, task


def _tag_config(recipe: Recipe, task: Task, train: Dataset) -> tuple[PretrainedConfig, Task]:
    from transformers import AutoConfig

    from ..evaluation.labels import label_names
    from ..evaluation.tagging import tag_names

    names = tag_names(train, task)
    own = AutoConfig.from_pretrained(recipe.model)
    if names and set(names) <= set(label_names(own)):  # a tagger that is trained on, with its own numbers of the tags
        return own, dataclasses.replace(task, num_labels=own.num_labels)
    ids = [tag for tags in train[task.label_column] for tag in tags or () if isinstance(tag, int)]
    there = len(names) or max(ids, default=0) + 1
    wanted = task.num_labels or there
    if there > wanted or (names and there != wanted):
        message = f"the training data have {there} tags, but `num_labels` is {wanted}; remove it, or correct it"
        raise RecipeError([recipe.source.problem(("data", "num_labels"), message)])
    config = AutoConfig.from_pretrained(recipe.model, num_labels=wanted)
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    return config, dataclasses.replace(task, num_labels=wanted)


def trainer_data(
    recipe: Recipe,
    task: Task,
    rows: dict[str, Dataset],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """What a Trainer trains and evaluates on, and the arguments that go with it.

    Args:
        recipe ([`Recipe`]): for places in messages.
        task ([`Task`]): of [`load_config`].
        rows (`dict[str, datasets.Dataset]`): of [`load_rows`].
        config (`transformers.PretrainedConfig`): of [`load_config`]; gets the class names of the data.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        max_length (`int` or `None`): tokens at which a text, or a window of it, is cut.

    Returns:
        `tuple[dict[str, datasets.Dataset], dict[str, Any]]`: tokens and labels by `"train"` and `"validation"`, one
        row an example, or a window of a long context or text; and `data_collator`, `compute_metrics` and
        `preprocess_logits_for_metrics` of the Trainer.

    Raises:
        [`RecipeError`]: with what is wrong in the rows of both files.
    """
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

    from ..evaluation.metrics import trainer_metrics
    from ..evaluation.structured import likeliest, structured_metrics

    if task.problem_type == CAUSAL:
        return _packed(recipe, task, rows, tokenizer, max_length), {"data_collator": default_data_collator}
    if task.problem_type in (CLASSIFICATION, REGRESSION):
        labels = load_labels(recipe, task, rows, config)
        encoded = tokenize(recipe, task, rows, labels, tokenizer, max_length)
        return encoded, {
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": trainer_metrics(task),
        }
    examples, encoded = _structured(recipe, task, rows, config, tokenizer, max_length)
    options: dict[str, Any] = {"compute_metrics": structured_metrics(task, examples["validation"])}
    if task.problem_type == QUESTIONS:
        return encoded, {**options, "data_collator": DataCollatorWithPadding(tokenizer)}
    options["preprocess_logits_for_metrics"] = likeliest
    return encoded, {**options, "data_collator": DataCollatorForTokenClassification(tokenizer)}


def _structured(
    recipe: Recipe,
    task: Task,
    rows: dict[str, Dataset],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> tuple[dict[str, Any], dict[str, Dataset]]:
    from datasets import Dataset

    from ..evaluation.structured import structured_examples, training_columns

    examples: dict[str, Any] = {}
    encoded: dict[str, Dataset] = {}
    problems: list[Problem] = []
    for split in SPLITS:
        try:
            examples[split] = structured_examples(rows[split], task, config, tokenizer, max_length)
            encoded[split] = Dataset.from_dict(dict(training_columns(examples[split])))
        except ValueError as error:
            problems.append(recipe.source.problem(place_of(recipe, split), f"{split} data: {error}"))
    if problems:
        raise RecipeError(problems)
    return examples, encoded


def _packed(
    recipe: Recipe,
    task: Task,
    rows: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> dict[str, Dataset]:
    """Windows of the texts of a column, joined by blank lines as [`perplexity`] does it; what is left is dropped."""
    from datasets import Dataset

    from ..evaluation.windows import text_ids

    packed: dict[str, Dataset] = {}
    problems: list[Problem] = []
    for split in SPLITS:
        try:
            ids = text_ids(tokenizer, rows[split][task.text_columns[0]][:])
        except (ValueError, TypeError) as error:
            problems.append(recipe.source.problem(place_of(recipe, split), f"{split} data: {error}"))
            continue
        length = min(max_length or len(ids), len(ids))
        windows = ids[: len(ids) // length * length].view(-1, length).tolist()
        packed[split] = Dataset.from_dict({"input_ids": windows, "labels": windows})
    if problems:
        raise RecipeError(problems)
    return packed
