"""Units are removed for good: the smaller model computes what the masked one did, and plain transformers loads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_quant.pruning.rebuild import renamed
from hf_quant.pruning.shrink import check_shrinkable, shrink
from hf_quant.pruning.units import UnitGroup, find_units
from hf_quant.quantization.convert import convert_qat
from hf_quant.quantization.qat import prepare, qat_modules
from hf_quant.runtime.base import QuantizedModule
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules
from tests.pruned import choose, prune, sized
from tests.tiny import Sentences, logits, tiny_bert, tiny_gpt2, tiny_llama
from tests.zoo import batch_for, outputs

LAYERS = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "modernbert", "t5", "vit", "gpt-neox", "whisper")
NEURONS = (
    "bert", "roberta", "distilbert", "mpnet", "deberta", "gpt2", "llama-tied", "qwen3", "mistral", "phi3",
    "modernbert", "t5", "t5-gated", "vit", "gpt-neox", "falcon", "whisper", "wav2vec2", "albert", "clip",
)  # fmt: skip
HEADS = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3", "vit")
# Old and new value of what changes in the config.
SAID: dict[tuple[str, str], dict[str, tuple[Any, Any]]] = {
    ("bert", "neuron"): {"intermediate_size": (64, 32)},
    ("gpt2", "neuron"): {"n_inner": (None, 64)},
    ("bert", "layer"): {"num_hidden_layers": (3, 2)},
    ("llama", "head"): {"num_attention_heads": (4, 2), "num_key_value_heads": (2, 1), "head_dim": (16, 16)},
    ("qwen2", "head"): {"num_attention_heads": (4, 2), "num_key_value_heads": (2, 1), "head_dim": (None, 8)},
    ("t5", "layer"): {"num_layers": (3, 2), "num_decoder_layers": (2, 1)},
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": None},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}


def _masked(model: PreTrainedModel, kind: Any) -> tuple[list[UnitGroup], dict[str, torch.Tensor]]:
    groups = find_units(model, kind)
    keep = choose(groups)
    prune(model, groups, keep)
    return groups, keep


@pytest.mark.parametrize(
    ("species", "kind"),
    [(name, "neuron") for name in NEURONS]
    + [(name, "head") for name in HEADS]
    + [(name, "layer") for name in LAYERS],
)
def test_smaller_model(species: str, kind: Any, tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.get(species, {}).items() if value is not None}
    model = sized(species, **sizes)
    if species == "qwen2":  # whose config has no head_dim of its own
        del model.config.head_dim
        model = sized(species, head_dim=8)
        del model.config.head_dim
    batch = batch_for(species, model)
    dense = outputs(model, batch)["logits" if species != "clip" else "logits_per_image"]
    parameters, config = sum(value.numel() for value in model.parameters()), copy.deepcopy(model.config)
    groups, keep = _masked(model, kind)
    masked = outputs(model, batch)
    first = "logits" if species != "clip" else "logits_per_image"
    assert not torch.allclose(masked[first], dense, atol=1e-4)

    checked = check_shrinkable(model, groups, {name: int(kept.sum()) for name, kept in keep.items()})
    assert model.config.to_dict() == config.to_dict()
    shrink(model, groups, keep, batch)
    assert sum(value.numel() for value in model.parameters()) < parameters
    assert outputs(model, batch)[first].sub(masked[first]).abs().max() < 1e-5
    if species != "modernbert":  # which of its layers stay was not said to check_shrinkable
        assert checked.to_dict() == model.config.to_dict()
    for key, (before, after) in SAID.get((species, kind), {}).items():
        assert (getattr(config, key, None), getattr(model.config, key)) == (before, after)

    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    for name, value in outputs(back, batch).items():
        assert torch.equal(value, outputs(model, batch)[name])
    found = find_units(model, kind) if all(int(kept.sum()) > 1 for kept in keep.values()) else []
    assert all(group.count == int(keep[group.name].sum()) for group in found)
