"""A recipe's model quantized once it is trained: `method: post_training`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .data_kinds import auto_class
from .prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..quantization.calibration import Calibration


def load_trained(prepared: Prepared, folder: Path) -> PreTrainedModel:
    """The float model that a run saved, in float32 and eval mode."""
    import torch

    model: PreTrainedModel = auto_class(prepared.task).from_pretrained(folder, dtype=torch.float32)
    return model


def quantize_trained(prepared: Prepared, model: PreTrainedModel, console: Console) -> None:
    """Quantizes a trained model in place, as the recipe says.

    Of several processes each has to call it with the same weights: the ranges that they find are united, and all of
    them can then evaluate the int8 model.

    Args:
        prepared ([`Prepared`]): a recipe with `method: post_training`, and its data.
        model (`PreTrainedModel`): in float.
        console (`rich.console.Console`): where to print.

    Raises:
        `ValueError`: as [`quantize`] does, such as for NaN in weights.
    """
    from ..quantization.post_training import quantize
    from ..schemes import get_scheme

    wanted = prepared.recipe.quantization
    assert wanted is not None
    static = get_scheme(wanted.scheme).activations == "static"
    calibration = calibration_rows(prepared, model) if static else None
    quantize(
        model,
        wanted.scheme,
        calibration,
        targets=wanted.targets,
        ignore=wanted.ignore,
        embeddings=wanted.embeddings,
        inplace=True,
        progress=not (console.quiet or prepared.recipe.training.get("disable_tqdm")),
    )
    ranges = f", ranges found on {calibration.samples:,} training examples" if calibration is not None else ""
    console.out(f"quantized to {wanted.scheme} after training{ranges}", highlight=False)


def calibration_rows(prepared: Prepared, model: PreTrainedModel) -> Calibration:
    """Some rows of the training data, chosen by the recipe's seed, in batches as the Trainer makes them.

    Args:
        prepared ([`Prepared`]): the recipe and its data.
        model (`PreTrainedModel`): takes some of the columns.
    """
    from torch.utils.data import DataLoader

    from ..quantization.calibration import Calibration

    recipe, rows = prepared.recipe, prepared.encoded["train"]
    assert recipe.quantization is not None
    count = min(recipe.quantization.calibration_samples, len(rows))
    taken = inspect.signature(model.forward).parameters
    rows = rows.select_columns([name for name in rows.column_names if name in taken])
    rows = rows.shuffle(seed=recipe.seed).select(range(count))
    collator = prepared.trainer_options["data_collator"]
    return Calibration(DataLoader(rows, batch_size=Calibration.batch_size, collate_fn=collator), samples=count)
