"""The sections of a recipe. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Data:
    """Where the sentences and labels are.

    With `task` in the recipe, only `data_dir` and `max_length` may be set; without it, `train`, `validation` and
    `text_columns` must be. Paths are relative to the folder where the recipe is run.

    Args:
        train (`str`, *optional*): file to train on: `.parquet`, `.csv`, `.tsv`, `.json` or `.jsonl`.
        validation (`str`, *optional*): file to measure on, of the same kinds.
        text_columns (`list[str]`, *optional*):
            One column of text, or two for pairs; one of lists of words for token classification; question and context
            for question answering.
        label_column (`str`, *optional*, defaults to `"label"`):
            Class ids, class names, or real numbers; lists of tag ids or names, one a word; or answers as in SQuAD,
            `{"text": [...], "answer_start": [...]}`, empty where there is none. Language models need none.
        problem_type (`str`, *optional*):
            `"single_label_classification"` (the default), `"regression"`, `"token_classification"`,
            `"question_answering"` or `"causal_lm"`.
        num_labels (`int`, *optional*): number of classes; defaults to 2, and is 1 for regression. Of tags, those of
            the training data.
        metrics (`list[str]`, *optional*): defaults to those of the problem type; the first is the headline.
        name (`str`, *optional*): what reports call the data; defaults to `"data"`.
        data_dir (`str`, *optional*): with `task`: folder of `<task>/train.parquet` and `<task>/validation.parquet`.
            Without it the task's data come from the hub.
        max_length (`int`, *optional*):
            Tokens at which a text is cut; defaults to what the model can take. A context is cut into windows of this
            length that overlap, and the text of a language model into windows that do not; its default is 512.
    """

    train: str | None = None
    validation: str | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    problem_type: (
        Literal["single_label_classification", "regression", "token_classification", "question_answering", "causal_lm"]
        | None
    ) = None
    num_labels: int | None = field(default=None, metadata={"minimum": 1})
    metrics: list[str] | None = None
    name: str | None = None
    data_dir: str | None = None
    max_length: int | None = field(default=None, metadata={"minimum": 1})


@dataclass
class Pruning:
    """The arguments of [`PruningCallback`].

    Args:
        final_sparsity (`float` or `dict[str, float]`, *optional*): share to prune, or one by pattern of modules.
        initial_sparsity (`float`, *optional*, defaults to 0): share that is pruned at once at `start_step`.
        start_step (`int` or `float`, *optional*, defaults to 0.1):
            First step with pruning. An `int` counts optimizer steps, a `float` in [0, 1) is a share of all.
        end_step (`int` or `float`, *optional*, defaults to 0.6): step from which on the masks stay; the same units.
        frequency (`int` or `float`, *optional*, defaults to 0.02): steps between updates; the same units.
        schedule (`str` or list, *optional*, defaults to `"cubic"`): a name, or a list of [step, sparsity].
        criterion (`str`, *optional*, defaults to `"magnitude"`): what a weight is worth.
        structure (`str`, *optional*, defaults to `"unstructured"`): what is pruned as one.
        scope (`str`, *optional*, defaults to `"global"`): `"global"` or `"layer"`.
        uniform (`bool`, *optional*, defaults to `False`): whether all layers lose the same number of units.
        shrink (`bool`, *optional*, defaults to `False`): whether pruned units are removed at the end.
        targets (`list[str]`, *optional*): patterns of the modules to prune; all but the head, by default.
        ignore (`list[str]`, *optional*): patterns of the modules to leave dense.
        log_modules (`bool`, *optional*, defaults to `False`): whether logs hold the sparsity of each target.
    """

    final_sparsity: float | dict[str, float] | None = None
    initial_sparsity: float = 0.0
    start_step: int | float = 0.1
    end_step: int | float = 0.6
    frequency: int | float = 0.02
    schedule: str | list[list[float]] = "cubic"
    criterion: str = "magnitude"
    structure: str = "unstructured"
    scope: Literal["global", "layer"] = "global"
    uniform: bool = False
    shrink: bool = False
    targets: list[str] | None = None
    ignore: list[str] | None = None
    log_modules: bool = False


@dataclass
class Quantization:
    """How the model becomes int8: the arguments of [`QATCallback`], or of [`quantize`] after training.

    Args:
        scheme (`str`, *optional*, defaults to `"int8_static"`):
            `"int8_dynamic"`, `"int8_static"`, `"int4_weight_only"` ...; see [`get_scheme`].
        start_step (`int` or `float`, *optional*, defaults to 0):
            First step with fake-quant. An `int` counts optimizer steps, a `float` in [0, 1) is a share of all.
        freeze_step (`int` or `float`, *optional*, defaults to 0.9): first step with frozen ranges; the same units.
        targets (`list[str]`, *optional*): patterns of the modules to quantize; all that can be, by default.
        ignore (`list[str]`, *optional*): patterns of the modules to leave; the classifier head, by default.
        embeddings (`bool`, *optional*, defaults to `True`): whether embeddings become int8 too.
        method (`str`, *optional*, defaults to `"qat"`):
            `"qat"`: int8 is trained, with `start_step` and `freeze_step`; `"post_training"`: the trained float model
            is quantized, without these two.
        calibration_samples (`int`, *optional*, defaults to 128):
            Training rows, or windows of their texts, on which a static scheme's ranges are found after training; only
            with `method: post_training`.
    """

    scheme: str = "int8_static"
    start_step: int | float = 0
    freeze_step: int | float = 0.9
    targets: list[str] | None = None
    ignore: list[str] | None = None
    embeddings: bool = True
    method: Literal["qat", "post_training"] = "qat"
    calibration_samples: int = field(default=128, metadata={"minimum": 1})


@dataclass
class Distillation:
    """The arguments of [`DistillationCallback`].

    Args:
        teacher (`str`, *optional*):
            Folder or hub id of a float model. Without it, the float model teaches its own pruned or int8 version:
            `hf-quant run` trains it first.
        hardness (`float`, *optional*, defaults to 0.5): weight of the teacher against the task, in (0, 1].
        temperature (`float`, *optional*, defaults to 2.0): by which logits are divided on both sides.
        hidden_states (`bool` or `dict[int, int]`, *optional*, defaults to `False`):
            Whether hidden states are to be alike too; or which layer of the student learns from which of the teacher.
        attention (`bool` or `dict[int, int]`, *optional*, defaults to `False`): the same for attention probabilities.
        cache (`str`, *optional*): folder in which the teacher's predictions are kept for later epochs.
        start_step (`int` or `float`, *optional*, defaults to 0):
            First step with a teacher. An `int` counts optimizer steps, a `float` in [0, 1) is a share of all.
        end_step (`int` or `float`, *optional*): first step without it again; by default there is none.
    """

    teacher: str | None = None
    hardness: float = field(default=0.5, metadata={"exclusiveMinimum": 0, "maximum": 1})
    temperature: float = field(default=2.0, metadata={"exclusiveMinimum": 0})
    hidden_states: bool | dict[int, int] = False
    attention: bool | dict[int, int] = False
    cache: str | None = None
    start_step: int | float = 0
    end_step: int | float | None = None

    def __post_init__(self) -> None:
        self.hidden_states = _layer_map(self.hidden_states)
        self.attention = _layer_map(self.attention)


@dataclass
class Hub:
    """Where the finished model goes on the Hugging Face hub; without this section it goes nowhere.

    The token is that of `hf auth login` or of the environment: a recipe is saved beside the weights.

    Args:
        repo_id (`str`): the repository, as `user/name`; it is made where there is none.
        private (`bool`, *optional*, defaults to `True`): whether a new repository is private.
        commit_message (`str`, *optional*): of the upload.
    """

    repo_id: str | None = None
    private: bool = True
    commit_message: str | None = None


@dataclass
class Evaluation:
    """How the int8 model is measured against a float one.

    Args:
        baseline (`str`, *optional*, defaults to `"train"`):
            `"train"`: train a float twin first, with the same seed, data and arguments but without quantization;
            `"none"`: compare with nothing; otherwise the folder of a float model.
        batch_size (`int`, *optional*, defaults to 32): sentences a batch in evaluation.
        max_samples (`int`, *optional*): rows of the validation data to use; all, by default.
    """

    baseline: str = "train"
    batch_size: int = field(default=32, metadata={"minimum": 1})
    max_samples: int | None = field(default=None, metadata={"minimum": 1})


def _layer_map(value: bool | dict[int, int]) -> bool | dict[int, int]:
    """A map of layers with numbers as keys: YAML's and JSON's keys arrive as text."""
    if not isinstance(value, dict):
        return value
    return {int(key) if str(key).isdecimal() else key: other for key, other in value.items()}
