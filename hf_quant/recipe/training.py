"""The `training` section: any field of `transformers.TrainingArguments`, checked by name and type."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import TYPE_CHECKING, Any

from .source import Problem, Source
from .values import check_keys, check_type

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields that the recipe sets from its own keys, or that Trainer.train() does not read.
_RESERVED = {
    "output_dir": "checkpoints go to `checkpoints` in the recipe's `output`",
    "seed": "it is a key of the recipe itself",
    "hub_token": "a recipe is saved beside the weights and must hold no secret; log in with `hf auth login`",
    "resume_from_checkpoint": "pass --resume to `hf-quant run`",
}
# Names that older releases of transformers had.
_RENAMED = {
    "evaluation_strategy": "`eval_strategy`",
    "group_by_length": "`train_sampling_strategy: group_by_length`",
    "no_cuda": "`use_cpu: true`",
    "overwrite_output_dir": "`hf-quant run --overwrite`",
    "warmup_ratio": "`warmup_steps`, which takes a share of all steps too",
}


@functools.cache
def training_fields() -> dict[str, tuple[Any, list[Any]]]:
    """What the `training` section may hold: the type of each field by name, and its choices where there are any."""
    from transformers import TrainingArguments

    hints = {**typing.get_type_hints(TrainingArguments), "bf16": bool | typing.Literal["auto"]}
    fields = [field for field in dataclasses.fields(TrainingArguments) if field.init and field.name not in _RESERVED]
    return {field.name: (hints[field.name], list(field.metadata.get("choices", ()))) for field in fields}


def check_training(section: dict[str, Any], source: Source) -> list[Problem]:
    """What is wrong in a recipe's `training` section.

    Args:
        section (`dict[str, Any]`): fields of `TrainingArguments` by name; `bf16` may also be `"auto"`.
        source ([`Source`]): for the positions in the file.
    """
    problems: list[Problem] = []
    named: dict[str, Any] = {}
    for key, value in section.items():
        if key in _RESERVED:
            message = f"`{key}` does not belong in `training`: {_RESERVED[key]}; remove it"
            problems.append(source.problem(("training", key), message, at_key=True))
        elif key in _RENAMED:
            message = f"`{key}` is gone from TrainingArguments; use {_RENAMED[key]}"
            problems.append(source.problem(("training", key), message, at_key=True))
        else:
            named[key] = value
    fields = training_fields() if section else {}
    problems += check_keys(named, ("training",), fields, source)
    for key in named.keys() & fields.keys():
        problems += check_type(named[key], fields[key][0], ("training", key), source, fields[key][1])
    return problems


def training_arguments(
    section: dict[str, Any], output_dir: str, seed: int, source: Source
) -> tuple[TrainingArguments, str]:
    """The `TrainingArguments` of a recipe.

    Args:
        section (`dict[str, Any]`): the checked `training` section.
        output_dir (`str`): folder of the checkpoints.
        seed (`int`): of the recipe.
        source ([`Source`]): for the positions in the file.

    Returns:
        `tuple[TrainingArguments, str]`: the arguments, and one line on the precision and why.

    Raises:
        [`RecipeError`]: if the values do not fit together, in the words of `TrainingArguments`.
    """
    import torch
    from transformers import TrainingArguments

    from .source import RecipeError

    values = dict(section)
    reason = "as the recipe says" if values.keys() & {"bf16", "fp16"} else "the recipe asks for nothing else"
    if values.get("bf16") == "auto":
        values["bf16"], reason = native_bf16(use_cpu=bool(values.get("use_cpu")))
        if values["bf16"] and not torch.cuda.is_available():
            values["use_cpu"] = True  # without it TrainingArguments takes bf16 for a GPU's and refuses
    # Its default hangs on how talkative transformers is, which is no reason to hide a progress bar.
    values.setdefault("disable_tqdm", False)
    try:
        args = TrainingArguments(output_dir=output_dir, seed=seed, **values)
    except (ValueError, TypeError, ImportError) as error:
        message = f"TrainingArguments refuses the `training` section: {error}"
        raise RecipeError([source.problem(("training",), message, at_key=True)]) from error
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return args, f"{precision} ({reason})"


def native_bf16(use_cpu: bool = False) -> tuple[bool, str]:
    """Whether the device that a Trainer would use multiplies bfloat16 natively, and how that is known.

    Args:
        use_cpu (`bool`, *optional*, defaults to `False`): as in `TrainingArguments`.

    Returns:
        `tuple[bool, str]`: the answer, and the reason in words.
    """
    import torch

    from ..runtime import cpu

    if torch.cuda.is_available() and not use_cpu:
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"{name} has native bfloat16"
        return False, f"{name} has no native bfloat16"
    if torch.backends.mps.is_available() and not use_cpu:
        return False, "not used on Apple GPUs"
    feature = cpu.native_bfloat16()
    return (True, f"this CPU has {feature}") if feature else (False, "this CPU has no native bfloat16")
