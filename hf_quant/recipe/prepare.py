"""Everything that can be known before training: files, labels, model, patterns. Nothing is written here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import load_rows
from .data_kinds import auto_class, load_config, trainer_data
from .source import KeyPath, Problem, RecipeError
from .training import training_arguments
from .values import dotted, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from ..evaluation.tasks import Task
    from .schema import Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe with all that its run needs, known to fit together.

    Args:
        recipe ([`Recipe`]): the recipe.
        task ([`Task`]): its columns, labels and metrics.
        encoded (`dict[str, datasets.Dataset]`): tokenized rows, or windows, by `"train"` and `"validation"`.
        trainer_options (`dict[str, Any]`): the Trainer's arguments that go with them, such as its `data_collator`.
        config (`transformers.PretrainedConfig`): of the model, with the task's labels.
        model (`transformers.PreTrainedModel`): the float model, in float32.
        new_weights (`list[str]`): names of its parameters that no checkpoint had, such as a new head's.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        max_length (`int` or `None`): tokens at which texts are cut; of a language model those of a window.
        precision (`str`): of the training, and why.
    """

    recipe: Recipe
    task: Task
    encoded: dict[str, Dataset]
    trainer_options: dict[str, Any]
    config: PretrainedConfig
    model: PreTrainedModel
    new_weights: list[str]
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    precision: str


def prepare(recipe: Recipe) -> Prepared:
    """Loads what a recipe names and makes every check that needs no training.

    Raises:
        [`RecipeError`]: with what is wrong, each at its place in the file.
    """
    from ..evaluation.tasks import CAUSAL
    from ..evaluation.windows import check_length, default_length
    from ..quantization.float_models import require_unquantized
    from ..schemes import get_scheme
    from ..targets import select_modules
    from ..texts import find_tokenizer, length_limit

    task = recipe.to_task()
    _, precision, rows = read_files(recipe, task)
    with at(recipe, ("model",)):
        config, task = load_config(recipe, task, rows)
        tokenizer = find_tokenizer(None, [recipe.model])
        model, new_weights = load_model(recipe, task, config)
        require_unquantized(model)
    if (wanted := recipe.quantization) is not None:
        with at(recipe, ("quantization",)):
            scheme = get_scheme(wanted.scheme)
            select_modules(model, wanted.targets, wanted.ignore, wanted.embeddings, scheme)
    callbacks: list[Any] = recipe.callbacks()
    places: list[KeyPath] = [("pruning", index) for index in range(len(recipe.pruning))]
    for place, callback in zip(places if len(places) > 1 else [("pruning",)] * len(places), callbacks, strict=False):
        with at(recipe, place):
            callback.check(model)
    if recipe.distillation is not None:
        with at(recipe, ("distillation",)):
            callbacks[len(places)].check(model, tokenizer)
    with at(recipe, ("data", "max_length")):
        if task.problem_type == CAUSAL:
            window = recipe.data.max_length or default_length(tokenizer, model)
            check_length(model, window)
            max_length: int | None = window
        else:
            max_length = length_limit(tokenizer, [model], recipe.data.max_length)
    encoded, options = trainer_data(recipe, task, rows, config, tokenizer, max_length)
    return Prepared(recipe, task, encoded, options, config, model, new_weights, tokenizer, max_length, precision)


def load_model(recipe: Recipe, task: Task, config: PretrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """The recipe's model in float32, a new head drawn from the recipe's seed.

    Args:
        recipe ([`Recipe`]): names the model.
        task ([`Task`]): says which class of model.
        config (`transformers.PretrainedConfig`): with the task's labels.

    Returns:
        `tuple[PreTrainedModel, list[str]]`: the model, and the parameters that its checkpoint did not have.

    Raises:
        `ValueError`: if the weights do not fit the config, or less than half of them are there.
    """
    import torch
    from transformers import set_seed

    set_seed(recipe.seed)
    try:
        model, info = auto_class(task).from_pretrained(
            recipe.model, config=config, dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"{recipe.model} could not be loaded with {config.num_labels} labels: {error}") from error
    new = sorted(info["missing_keys"])
    if 2 * len(new) > len(list(model.parameters())):
        raise ValueError(
            f"{recipe.model} lacks {len(new)} weights of {type(model).__name__}, such as {new[0]}: it is no "
            "checkpoint of that model. Give one that was pretrained"
        )
    return model, new


def read_files(recipe: Recipe, task: Task) -> tuple[TrainingArguments, str, dict[str, Dataset]]:
    """The arguments of the training, its precision in words, and the rows of the data.

    Raises:
        [`RecipeError`]: with what is wrong in folders, arguments and files, all at once.
    """
    problems = check_folders(recipe)
    try:
        args, precision = training_arguments(recipe.training, recipe.output, recipe.seed, recipe.source)
    except RecipeError as error:
        problems += error.problems
    try:
        rows = load_rows(recipe, task)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return args, precision, rows


def check_folders(recipe: Recipe) -> list[Problem]:
    """Problems of the folders that `model` and `baseline` name."""
    problems = []
    model, baseline = recipe.model, recipe.evaluation.baseline
    # A hub id has at most one slash; a path that begins with a dot, a slash or a tilde is never one.
    local = model.count("/") > 1 or model[0] in "./~" or Path(model).exists()
    if local and not (Path(model) / "config.json").is_file():
        problems.append(recipe.source.problem(("model",), _no_model(model)))
    if baseline not in ("train", "none") and not (Path(baseline) / "config.json").is_file():
        hint = nearest(baseline, ("train", "none"))
        message = f"`baseline` must be `train`, `none` or the folder of a float model; {_no_model(baseline)}{hint}"
        problems.append(recipe.source.problem(("evaluation", "baseline"), message))
    return problems


def _no_model(path: str) -> str:
    what = "has no config.json" if Path(path).is_dir() else "is no folder"
    return f"{path} {what} (relative paths start from {Path.cwd()})"


@contextlib.contextmanager
def at(recipe: Recipe, place: KeyPath) -> Iterator[None]:
    """Gives what other modules raise the place in the recipe that it is about."""
    try:
        yield
    except RecipeError:  # has its place
        raise
    except (OSError, ValueError) as error:
        raise RecipeError([recipe.source.problem(place, f"`{dotted(place)}`: {error}")]) from error
