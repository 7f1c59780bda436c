"""Which weights hang together: heads, neurons and layers, found by running tiny models of many architectures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_quant.pruning.units import UnitGroup, find_units
from tests.pruned import sized
from tests.zoo import batch_for, outputs

# Of the first group: consumer, units, and (Parameter, dim, positions a unit) with names after the common part.
Found = tuple[str, str, str, int, set[tuple[str, int, int]]]
FAMILIES: list[Found] = [
    (
        "bert", "neuron", "bert.encoder.layer.0.|output.dense", 64,
        {("intermediate.dense.weight", 0, 1), ("intermediate.dense.bias", 0, 1), ("output.dense.weight", 1, 1)},
    ),
    (
        "bert", "head", "bert.encoder.layer.0.attention.|output.dense", 2,
        {(f"self.{name}.{kind}", 0, 16) for name in ("query", "key", "value") for kind in ("weight", "bias")}
        | {("output.dense.weight", 1, 16)},
    ),
    ("roberta", "neuron", "roberta.encoder.layer.0.|output.dense", 64, set()),
    (
        "distilbert", "head", "distilbert.transformer.layer.0.attention.|out_lin", 2,
        {(f"{name}.{kind}", 0, 16) for name in ("q_lin", "k_lin", "v_lin") for kind in ("weight", "bias")}
        | {("out_lin.weight", 1, 16)},
    ),
    ("distilbert", "neuron", "distilbert.transformer.layer.0.ffn.|lin2", 64, set()),
    ("mpnet", "head", "mpnet.encoder.layer.0.attention.attn.|o", 2, set()),
    (
        "deberta", "head", "deberta.encoder.layer.0.attention.|output.dense", 2,
        {("self.in_proj.weight", 0, 48), ("self.q_bias", 0, 16), ("self.v_bias", 0, 16),
         ("self.pos_proj.weight", 0, 16), ("self.pos_q_proj.weight", 0, 16), ("self.pos_q_proj.bias", 0, 16),
         ("output.dense.weight", 1, 16)},
    ),
    (
        "gpt2", "head", "transformer.h.0.attn.|c_proj", 2,
        {("c_attn.weight", 1, 48), ("c_attn.bias", 0, 48), ("c_proj.weight", 0, 16)},
    ),
    (
        "gpt2", "neuron", "transformer.h.0.mlp.|c_proj", 128,
        {("c_fc.weight", 1, 1), ("c_fc.bias", 0, 1), ("c_proj.weight", 0, 1)},
    ),
    (
        "llama", "neuron", "model.layers.0.mlp.|down_proj", 64,
        {("gate_proj.weight", 0, 1), ("up_proj.weight", 0, 1), ("down_proj.weight", 1, 1)},
    ),
    (
        "llama", "head", "model.layers.0.self_attn.|o_proj", 2,
        {("q_proj.weight", 0, 32), ("k_proj.weight", 0, 16), ("v_proj.weight", 0, 16), ("o_proj.weight", 1, 32)},
    ),
    (
        "qwen2", "head", "model.layers.0.self_attn.|o_proj", 2,
        {(f"{name}.{kind}", 0, size) for name, size in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8))
         for kind in ("weight", "bias")} | {("o_proj.weight", 1, 16)},
    ),
    ("qwen3", "head", "model.layers.0.self_attn.|o_proj", 2, set()),
    ("mistral", "head", "model.layers.0.self_attn.|o_proj", 2, set()),
    ("phi3", "head", "model.layers.0.self_attn.|o_proj", 2, {("qkv_proj.weight", 0, 64), ("o_proj.weight", 1, 32)}),
    (
        "phi3", "neuron", "model.layers.0.mlp.|down_proj", 64,
        {("gate_up_proj.weight", 0, 2), ("down_proj.weight", 1, 1)},
    ),
    ("modernbert", "neuron", "model.layers.0.mlp.|Wo", 64, {("Wi.weight", 0, 2), ("Wo.weight", 1, 1)}),
    ("modernbert", "head", "model.layers.0.attn.|Wo", 2, {("Wqkv.weight", 0, 48), ("Wo.weight", 1, 16)}),
    ("t5", "neuron", "encoder.block.0.layer.1.DenseReluDense.|wo", 64, {("wi.weight", 0, 1), ("wo.weight", 1, 1)}),
    (  # the position bias is every block's, so it is no head's
        "t5", "head", "encoder.block.0.layer.0.SelfAttention.|o", 2,
        {("q.weight", 0, 16), ("k.weight", 0, 16), ("v.weight", 0, 16), ("o.weight", 1, 16)},
    ),
    ("vit", "neuron", "vit.layers.0.mlp.|fc2", 64, set()),
    ("vit", "head", "vit.layers.0.attention.|o_proj", 2, set()),
    (  # a table of position biases for each layer: a column of it belongs to a head
        "swin", "head", "swin.encoder.layers.0.blocks.0.attention.|o_proj", 2,
        {(f"{name}_proj.{kind}", 0, 16) for name in "qkv" for kind in ("weight", "bias")}
        | {("o_proj.weight", 1, 16), ("relative_position_bias.relative_position_bias_table", 1, 1)},
    ),
    (
        "gpt-neox", "head", "gpt_neox.layers.0.attention.|dense", 2,
        {("query_key_value.weight", 0, 48), ("query_key_value.bias", 0, 48), ("dense.weight", 1, 16)},
    ),
    (
        "falcon", "neuron", "transformer.h.0.mlp.|dense_4h_to_h", 64,
        {("dense_h_to_4h.weight", 0, 1), ("dense_4h_to_h.weight", 1, 1)},
    ),
    ("whisper", "head", "model.encoder.layers.0.self_attn.|out_proj", 2, set()),
    ("wav2vec2", "neuron", "wav2vec2.encoder.layers.0.feed_forward.|output_dense", 64, set()),
]  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {"qwen2": {"head_dim": None}}


def _find(species: str, kind: str) -> tuple[PreTrainedModel, list[UnitGroup]]:
    model = sized(species, **SIZES.get(species, {}))
    return model, find_units(model, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(("species", "kind", "place", "count", "slices"), FAMILIES)
def test_found(species: str, kind: str, place: str, count: int, slices: set[tuple[str, int, int]]) -> None:
    model, groups = _find(species, kind)
    prefix, _, name = place.partition("|")
    group = next(group for group in groups if group.name == prefix + name)
    assert group.count == count
    assert (group.kind, group.fixed) == (kind, ())
    found = {(part.parameter, part.dim, part.index.shape[1]) for part in group.slices if part.index is not None}
    assert len(found) == len(group.slices)
    if slices:
        assert found == {(prefix + parameter, dim, positions) for parameter, dim, positions in slices}
    # Every position of every dimension belongs to one unit.
    parameters = dict(model.named_parameters())
    for part in group.slices:
        assert part.index is not None
        assert part.dim is not None
        assert part.index.shape[0] == count
        assert torch.equal(part.index, part.index.sort(1).values)
        assert part.index.flatten().sort().values.tolist() == list(range(parameters[part.parameter].shape[part.dim]))


@pytest.mark.parametrize(("species", "kind"), dict.fromkeys((family[0], family[1]) for family in FAMILIES))
@torch.no_grad()
def test_zero_slices_are_a_unit_removed(species: str, kind: str) -> None:
    """A unit's slices at zero give what the model gives if only its reader does not read it."""
    model, groups = _find(species, kind)
    batch = batch_for(species, model)
    dense = outputs(model, batch)
    unread = copy.deepcopy(model)
    parameters, others = dict(model.named_parameters()), dict(unread.named_parameters())
    for place, group in enumerate(groups):
        unit = place % group.count
        reader = next(part for part in group.slices if part.parameter == f"{group.name}.weight")
        for part in group.slices:
            parameters[part.parameter].index_fill_(part.dim, part.index[unit], 0.0)
        others[reader.parameter].index_fill_(reader.dim, reader.index[unit], 0.0)
    zeroed, expected = outputs(model, batch), outputs(unread, batch)
    first = next(iter(dense))
    assert not torch.allclose(zeroed[first], dense[first], atol=1e-4)
    torch.testing.assert_close(zeroed[first], expected[first], atol=1e-5, rtol=1e-5)


def test_every_block_has_its_group() -> None:
    assert [group.name for group in find_units(sized("t5"), "neuron")] == [
        *(f"encoder.block.{block}.layer.1.DenseReluDense.wo" for block in range(3)),
        *(f"decoder.block.{block}.layer.2.DenseReluDense.wo" for block in range(2)),
    ]
    heads = [group.name for group in find_units(sized("t5"), "head")]
    assert len(heads) == 3 + 2 + 2
    assert "decoder.block.1.layer.1.EncDecAttention.o" in heads
