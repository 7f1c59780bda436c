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
    "qwen2": {"head_dim": None},  # its config has no field for it
    "modernbert": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}


def _masked(model: PreTrainedModel, kind: Any) -> tuple[list[UnitGroup], dict[str, torch.Tensor]]:
    groups = find_units(model, kind)
    keep = choose(groups)
    prune(model, groups, keep)
    return groups, keep


@pytest.mark.parametrize(
    ("species", "kind"),
    [(name, "neuron") for name in NEURONS] + [(name, "head") for name in HEADS] + [(name, "layer") for name in LAYERS],
)
def test_smaller_model(species: str, kind: Any, tmp_path: Path) -> None:
    model = sized(species, **SIZES.get(species, {}))
    batch = batch_for(species, model)
    dense = outputs(model, batch)
    first = next(iter(dense))
    parameters, config = sum(value.numel() for value in model.parameters()), copy.deepcopy(model.config)
    groups, keep = _masked(model, kind)
    masked = outputs(model, batch)
    assert not torch.allclose(masked[first], dense[first], atol=1e-4)

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


def test_several_kinds_at_once() -> None:
    model = sized("llama-tied")
    batch = batch_for("llama-tied", model)
    groups: list[UnitGroup] = []
    keep = {}
    for kind in ("neuron", "head", "layer"):
        more, kept = _masked(model, kind)
        groups += more
        keep.update(kept)
    masked = outputs(model, batch)["logits"]
    shrink(model, groups, keep)
    assert outputs(model, batch)["logits"].sub(masked).abs().max() < 1e-5
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (2, 2, 32)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert model.model.layers[1].self_attn.config is config
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # The cache has an entry for each of the layers that are left.
    ids = Sentences(2, length=6).input_ids.clamp(min=3)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))
    assert renamed("model.layers.2.mlp.up_proj", groups, keep) == "model.layers.1.mlp.up_proj"
    assert renamed("model.layers.1", groups, keep) is None
    assert renamed("model.layers.2", groups, keep) == "model.layers.1"
    assert renamed("lm_head", groups, keep) == "lm_head"


@pytest.mark.parametrize(
    ("species", "kind", "error"),
    [
        ("bert", "head", r"config of BertForSequenceClassification cannot say that heads are removed.*"
         r"query.weight the shape \(16, 32\); the nearest gives \(32, 32\).*shrink=False"),
        ("gpt2", "head", r"c_attn.weight the shape \(32, 48\)"),
        ("t5", "head", r"relative_attention_bias.weight the shape \(32, 2\); the nearest gives \(32, 1\)"),
        ("bloom", "neuron", r"cannot say that neurons are removed.*dense_h_to_4h.weight the shape \(64, 32\)"),
        ("deberta-v2", "head", r"output.dense.weight the shape \(32, 16\)"),
    ],
)  # fmt: skip
def test_what_the_config_cannot_say(species: str, kind: Any, error: str) -> None:
    model = sized(species)
    groups = find_units(model, kind)
    keep = choose(groups)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=error):
        check_shrinkable(model, groups, {name: int(kept.sum()) for name, kept in keep.items()})
    prune(model, groups, keep)
    pruned = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=error):
        shrink(model, groups, keep)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, pruned[name]) for name, value in model.state_dict().items())


def test_other_counts_in_each_layer() -> None:
    model = tiny_bert()
    groups = find_units(model, "neuron")
    first, second = (group.name for group in groups)
    message = rf"{first} keeps 10 of 48 neurons and {second} 12, but the config .* uniform=True \(or scope='layer'\)"
    with pytest.raises(ValueError, match=message):
        check_shrinkable(model, groups, {first: 10, second: 12})
    with pytest.raises(ValueError, match=rf"{first} keeps 10 of 48 neurons and {second} 48"):
        check_shrinkable(model, groups, {first: 10})
    assert check_shrinkable(model, groups, {first: 10, second: 10}).intermediate_size == 10
    # An encoder and a decoder may have a number each.
    model = sized("whisper")
    groups = find_units(model, "neuron")
    config = check_shrinkable(model, groups, {g.name: 10 if "encoder" in g.name else 20 for g in groups})
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (10, 20)


def test_bad_requests() -> None:
    model = tiny_bert()
    groups = find_units(model, "layer", ignore=["*.layer.0"])
    name = groups[0].name
    whole = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'x' is no group of units; there are 'bert.encoder.layer'"):
        shrink(model, groups, {"x": whole})
    with pytest.raises(ValueError, match=r"dtype torch.float32 and the shape \(2,\), but needs torch.bool and \(2,\)"):
        shrink(model, groups, {name: torch.ones(2)})
    with pytest.raises(ValueError, match=r"unit 0 of bert.encoder.layer is fixed"):
        shrink(model, groups, {name: torch.tensor([False, True])})
    with pytest.raises(ValueError, match=r"cannot keep 0 of 2 units, 1 of which are fixed. Keep 1 to 2"):
        check_shrinkable(model, groups, {name: 0})
    neurons = find_units(model, "neuron")
    with pytest.raises(ValueError, match=r"all 48 units of .* would be removed.*lower the sparsity"):
        shrink(model, neurons, {neurons[0].name: torch.zeros(48, dtype=torch.bool)})
    state = model.state_dict()
    shrink(model, groups, {name: whole})  # nothing to remove
    assert all(value.data_ptr() == state[key].data_ptr() for key, value in model.state_dict().items())


def test_models_that_their_config_does_not_build() -> None:
    model = tiny_bert()
    groups = find_units(model, "neuron")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not build the model as it is"):
        check_shrinkable(model, groups, {group.name: 8 for group in groups})
    with pytest.raises(ValueError, match="Sequential has no config"):
        check_shrinkable(nn.Sequential(), [], {})


@pytest.mark.parametrize("kind", ["neuron", "layer"])
def test_unequal_outputs_put_everything_back(kind: Any) -> None:
    """Units that are not zero, layers that are not skipped."""
    model = tiny_bert(num_hidden_layers=3).train()
    for layer in model.bert.encoder.layer:
        torch.nn.init.normal_(layer.intermediate.dense.bias)
    groups = find_units(model, kind)
    config, names = model.config, dict(model.named_parameters())
    modules = dict(model.named_modules())
    attributes = {name: module.__dict__.copy() for name, module in modules.items()}
    with pytest.raises(
        ValueError, match=r"gives other outputs \(\S+ dB, at least 60 are needed\), so it was put back"
    ):
        shrink(model, groups, choose(groups))
    assert model.config is config
    assert config.intermediate_size == 48
    assert dict(model.named_modules()) == modules
    assert {name: id(value) for name, value in model.named_parameters()} == {n: id(v) for n, v in names.items()}
    assert all(module.__dict__ == attributes[name] for name, module in modules.items())
    assert model.training


def test_what_follows_from_the_number_of_a_layer() -> None:
    """Each layer divides by its number, which would change: no shape shows it, but the outputs do."""
    model = sized("gpt2", scale_attn_by_inverse_layer_idx=True)
    groups, keep = _masked(model, "layer")
    with pytest.raises(ValueError, match="computes something from its numbers of units or layers"):
        shrink(model, groups, keep)
    assert len(model.transformer.h) == 3


def test_flags_hooks_and_changes_by_hand_stay() -> None:
    model = tiny_bert()
    groups, keep = _masked(model, "neuron")
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.weight.requires_grad_(False)
    model.bert.encoder.layer[0].output.dropout.p = 0.37
    seen: list[tuple[int, ...]] = []
    dense.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    shrink(model, groups, keep)
    assert model.bert.encoder.layer[0].intermediate.dense is dense
    assert (dense.out_features, dense.weight.requires_grad, dense.bias.requires_grad) == (24, False, True)
    assert model.bert.encoder.layer[0].output.dropout.p == 0.37
    seen.clear()
    logits(model)
    assert seen == [(8, 12, 24)]


def test_bfloat16(tmp_path: Path) -> None:
    model = tiny_bert().to(torch.bfloat16)
    groups, keep = _masked(model, "neuron")
    shrink(model, groups, keep)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("scheme_name", ["int8_static", "int8_dynamic"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(tiny_bert, "neuron"), (tiny_bert, "layer"), (tiny_gpt2, "neuron"), (tiny_gpt2, "layer"), (tiny_llama, "head")],
)
def test_qat(make: Any, kind: Any, scheme_name: str) -> None:
    """QAT modules stay, with observers and hooks, and become a smaller int8 model."""
    scheme = SCHEMES[scheme_name]
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2} if make is tiny_llama else {}
    model = make(**sizes)
    state = prepare(model, scheme, select_modules(model, scheme=scheme))
    groups, keep = _masked(model, kind)
    state.observing = state.fake_quantizing = True
    model.train()(**Sentences(16, seed=5).batch(16))
    kept_inputs = list(state.inputs)
    modules = {renamed(name, groups, keep): module for name, module in qat_modules(model).items()}
    ranges = {name: value.clone() for name, value in model.named_buffers() if "observer" in name}
    masked = logits(model)

    shrink(model, groups, keep, Sentences(4).batch(4))
    assert state.fake_quantizing
    assert kept_inputs[-1] is state.inputs[0]  # the masked model's, and none of shrink's
    assert len(state.inputs) == 2
    assert all(modules[name] is module for name, module in qat_modules(model).items())
    after = {name: value for name, value in model.named_buffers() if "observer" in name}
    assert all(
        torch.equal(ranges[name], after[new]) for name in ranges if (new := renamed(name, groups, keep)) is not None
    )
    assert logits(model).sub(masked).abs().max() < 0.05 * masked.abs().max()

    selection = select_modules(_float_twin(model), scheme=scheme)
    batch = Sentences(4, seed=6).batch(4)
    result = convert_qat(model, state, scheme, selection, [batch])
    assert result.quantized.keys() == selection.quantized.keys()
    assert min(result.layer_sqnr.values()) > 60
    assert any(isinstance(module, QuantizedModule) for module in model.modules())
    assert logits(model).sub(masked).abs().max() < 0.05 * masked.abs().max()


def _float_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A float model of the same config, for its names."""
    return type(model)(copy.deepcopy(model.config))


def test_groups_of_weights_have_to_divide() -> None:
    model = tiny_bert(intermediate_size=64)
    scheme = SCHEMES["int4_dynamic"]
    prepare(model, scheme, select_modules(model, scheme=scheme))
    groups = find_units(model, "neuron")
    with pytest.raises(ValueError, match=r"output.dense would have 40 inputs.*Prune to a multiple of 32"):
        check_shrinkable(model, groups, {group.name: 40 for group in groups})
    assert check_shrinkable(model, groups, {group.name: 32 for group in groups}).intermediate_size == 32
