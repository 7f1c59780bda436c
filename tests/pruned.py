"""Models of the zoo in other sizes, and units of theirs made zero, as a pruner would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_quant.pruning.layers import skip_layer
from hf_quant.pruning.units import UnitGroup

from .zoo import SPECIES, enliven, find_class

_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_THREE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3"), _GROUPED),
    **{name: {"num_layers": 3, "num_decoder_layers": 2} for name in ("t5", "t5-gated")},
    "gpt2": {"n_layer": 3},
    "distilbert": {"n_layers": 3},
    "whisper": {"encoder_layers": 3, "decoder_layers": 2},
}


def sized(species: str, **sizes: Any) -> PreTrainedModel:
    """A random model of the zoo in eval mode: three layers, grouped queries where there are any, biases not zero.

    `None` among `sizes` leaves a size to the config.
    """
    kind = SPECIES[species]
    known = {**kind.sizes, **_THREE.get(species, {})}
    if "num_hidden_layers" in known:
        known["num_hidden_layers"] = 3
    known = {name: value for name, value in {**known, **sizes}.items() if value is not None}
    model: PreTrainedModel = find_class(kind.head)(find_class(kind.config)(**known))
    return enliven(model).eval()


def choose(groups: list[UnitGroup]) -> dict[str, Tensor]:
    """Which units to keep: of layers all but the second, of others every other one."""
    keep = {}
    for group in groups:
        units = torch.arange(group.count)
        keep[group.name] = units != 1 if group.kind == "layer" else units % 2 == 1
    return keep


@torch.no_grad()
def prune(model: PreTrainedModel, groups: list[UnitGroup], keep: dict[str, Tensor]) -> None:
    """Zero all that belongs to units that are not kept, and skip layers."""
    parameters = dict(model.named_parameters())
    for group in groups:
        gone = ~keep[group.name]
        for part in group.slices:
            if part.dim is not None and part.index is not None:
                parameters[part.parameter].index_fill_(part.dim, part.index[gone].flatten(), 0.0)
            elif bool(gone[part.unit]):
                parameters[part.parameter].zero_()
        if group.kind == "layer":
            for unit in gone.nonzero().flatten().tolist():
                skip_layer(model, f"{group.name}.{unit}")
