"""What is a unit and what is none: blocks in any layout, layers, patterns, and a model that stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_quant.pruning.blocks import find_blocks
from hf_quant.pruning.layers import is_skipped, skip_layer
from hf_quant.pruning.units import find_units
from hf_quant.quantization.qat import prepare
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules
from tests.pruned import sized
from tests.tiny import Sentences, logits, tiny_bert, tiny_llama
from tests.zoo import batch_for, outputs


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 7), st.sampled_from([1, 2, 3, 5]), st.integers(1, 2), st.integers(0, 10**6)
)  # fmt: skip
def test_blocks_in_any_layout(count: int, size: int, channels: int, seed: int) -> None:
    """Blocks of a tensor made from channels in any order are found again, with their channels."""
    generator = torch.Generator().manual_seed(seed)
    per_block = size * channels
    order = torch.randperm(count * per_block, generator=generator)
    leaf = torch.randn(5, count * per_block, generator=generator).requires_grad_()
    blocks = leaf[:, order].reshape(5, count, channels, size)
    mixed = blocks.exp() if size == 1 else blocks.exp().matmul(torch.rand(size, size, generator=generator) + 0.1)
    found = find_blocks([mixed.sum(2).flatten(1)], {"maker": [leaf]}, {}, single=size == 1)
    assert found is not None
    expected = order.reshape(count, per_block).sort(1).values
    assert torch.equal(found["maker", -1], expected)
    assert find_blocks([mixed.sum(2).flatten(1)], {"maker": [leaf]}, {}, single=size != 1) is None


def test_layers() -> None:
    for species, name, count, fixed in (
        ("bert", "bert.encoder.layer", 3, ()),
        ("llama", "model.layers", 3, ()),
        ("gpt2", "transformer.h", 3, ()),
        ("vit", "vit.layers", 3, ()),
        ("distilbert", "distilbert.transformer.layer", 3, ()),
        ("wav2vec2", "wav2vec2.encoder.layers", 3, ()),
        ("modernbert", "model.layers", 3, (0,)),  # has no norm before its attention
        ("t5", "encoder.block", 3, (0,)),  # has the position bias of all
    ):
        model = sized(species)
        group = find_units(model, "layer")[0]
        assert (group.name, group.count, group.fixed) == (name, count, fixed)
        owned = {(part.parameter, part.unit) for part in group.slices}
        inside = {
            (f"{name}.{unit}.{key}", unit)
            for unit, layer in enumerate(model.get_submodule(name).children())
            for key, _ in layer.named_parameters()
        }
        assert owned == inside


class Toy(PreTrainedModel):
    """Small parts in the shape of what is no unit."""

    config_class = PreTrainedConfig
    main_input_name = "values"

    def __init__(self, part: nn.Module) -> None:
        super().__init__(PreTrainedConfig())
        self.before = nn.Sequential(nn.Linear(8, 8))  # directly in the model it would be its head
        self.part = part

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.part(self.before(values))
        return hidden


class Experts(nn.Module):
    """Each reads the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, values: Tensor) -> Tensor:
        return torch.stack([expert(values) for expert in self.experts]).sum(0)


class OutsideResidual(nn.Module):
    """The sum is not inside of the modules, so that each of them is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, values: Tensor) -> Tensor:
        for step in self.steps:
            values = values + step(values)
        return values


class Carried(nn.Module):
    """What is read carries something besides the Linear's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.randn(4, 8))

    def forward(self, values: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(values))) + self.table)


BATCH = {"values": torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("part", "kind", "found"),
    [
        (nn.Sequential(nn.GELU(), nn.Linear(8, 8)), "neuron", ["part.1"]),
        (nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)), "neuron", []),  # the norm mixes
        (nn.Sequential(nn.Linear(8, 8)), "neuron", []),  # a product of matrices, such as an adapter
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(8, 8)), "neuron", []),
        (Carried(), "neuron", []),
        (Experts(), "neuron", ["part.experts.0.2", "part.experts.1.2", "part.experts.2.2"]),
        (Experts(), "layer", []),
        (OutsideResidual(), "layer", []),
        (nn.Sequential(nn.GELU(), nn.Linear(8, 8)), "head", []),
        (nn.MultiheadAttention(8, 2), "head", []),
    ],
)
def test_what_is_no_unit(part: nn.Module, kind: Any, found: list[str]) -> None:
    model = Toy(part)
    if isinstance(part, nn.MultiheadAttention):
        model.forward = lambda values: part(*[model.before(values)] * 3)[0]  # type: ignore[method-assign]
    if found:
        assert [group.name for group in find_units(model, kind, batch=BATCH)] == found
    else:
        with pytest.raises(ValueError, match=r"Toy has no (feed-forward neurons|attention heads|layers).*another"):
            find_units(model, kind, batch=BATCH)


def test_models_without() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no attention heads.*a single key/value head"):
        find_units(tiny_llama(), "head")
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has no feed-forward neurons.*fused experts"):
        find_units(sized("mixtral"), "neuron")
    with pytest.raises(ValueError, match="AlbertForSequenceClassification has no layers"):
        find_units(sized("albert"), "layer")
    with pytest.raises(ValueError, match="unknown kind of unit 'row'; there are 'head', 'neuron', 'layer'"):
        find_units(tiny_bert(), "row")  # type: ignore[arg-type]


def test_made_up_inputs() -> None:
    with pytest.raises(ValueError, match=r"Toy could not be run on made-up inputs.*TypeError.*Pass `batch`"):
        find_units(Toy(nn.GELU()), "neuron")
    model = tiny_bert()
    model.bert.embeddings.position_embeddings = nn.Embedding(1, 32)
    with pytest.raises(ValueError, match=r"could not be run on made-up inputs \(with input_ids: IndexError"):
        find_units(model, "neuron")


def test_patterns() -> None:
    model = tiny_bert()
    first, second = (f"bert.encoder.layer.{layer}.output.dense" for layer in range(2))
    assert [group.name for group in find_units(model, "neuron", targets=["*.1.output.dense"])] == [second]
    assert [group.name for group in find_units(model, "neuron", ignore=["*.1.intermediate.dense"])] == [first]
    # The pooler's neurons are the head's, which takes a pattern.
    assert [group.name for group in find_units(model, "neuron")] == [first, second]
    assert [group.name for group in find_units(model, "neuron", targets=["classifier"])] == ["classifier"]
    for option in ("targets", "ignore"):
        with pytest.raises(ValueError, match=f"pattern 'encodr' in `{option}` matches no module"):
            find_units(model, "neuron", **{option: ["encodr"]})
    with pytest.raises(ValueError, match="no neuron of BertForSequenceClassification is left to prune"):
        find_units(model, "neuron", ignore=["*"])
    with pytest.raises(TypeError, match=r"Write \['x'\]"):
        find_units(model, "neuron", targets="x")

    model = tiny_bert(num_hidden_layers=4)
    assert find_units(model, "layer", ignore=["bert.encoder.layer.3"])[0].fixed == (3,)
    assert find_units(model, "layer", targets=["*.layer.[12]"])[0].fixed == (0, 3)
    with pytest.raises(ValueError, match="no layer of BertForSequenceClassification is left"):
        find_units(model, "layer", ignore=["*.layer.*"])


@pytest.mark.parametrize("kind", ["head", "neuron", "layer"])
def test_the_model_is_left_alone(kind: Any) -> None:
    model = sized("t5").train()
    model.encoder.block[1].eval()
    model.shared.weight.requires_grad_(False)
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(False)
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    random = torch.random.get_rng_state()
    first = find_units(model, kind)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not seen

    again = find_units(copy.deepcopy(model), kind)
    assert [(group.name, group.fixed) for group in again] == [(group.name, group.fixed) for group in first]
    for one, other in zip(first, again, strict=True):
        for part, same in zip(one.slices, other.slices, strict=True):
            assert part.parameter == same.parameter
            assert part.index is same.index is None or torch.equal(part.index, same.index)


@pytest.mark.parametrize("kind", ["head", "neuron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_and_half_precision_models(kind: Any, dtype: torch.dtype) -> None:
    """What is found depends on no weight: all of them may be zero, as far as they can be pruned."""
    model = sized("roberta").to(dtype)
    expected = [(group.name, group.count) for group in find_units(model, kind)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [(group.name, group.count) for group in find_units(model, kind)] == expected


@pytest.mark.parametrize("model", [tiny_bert(), sized("gpt2")], ids=["bert", "gpt2"])
def test_qat_models(model: PreTrainedModel) -> None:
    """QAT modules are found like others, and their observers and kept batches see none of the made-up inputs."""
    expected = {kind: find_units(model, kind) for kind in ("head", "neuron", "layer")}  # type: ignore[arg-type]
    scheme = SCHEMES["int8_static"]
    state = prepare(model, scheme, select_modules(model, scheme=scheme))
    state.observing = state.fake_quantizing = True
    model.train()(**Sentences().batch())
    inputs, buffers = list(state.inputs), {name: value.clone() for name, value in model.named_buffers()}
    for kind, groups in expected.items():
        found = find_units(model, kind)  # type: ignore[arg-type]
        assert [(group.name, len(group.slices)) for group in found] == [(g.name, len(g.slices)) for g in groups]
    assert list(state.inputs) == inputs
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("species", ["bert", "llama", "gpt2", "t5", "deberta", "bloom"])
@torch.no_grad()
def test_skipped_layer_is_no_layer(species: str) -> None:
    model = sized(species)
    group = find_units(model, "layer")[0]
    batch = batch_for(species, model)
    dense = outputs(model, {**batch, "use_cache": False} if species in ("gpt2", "llama", "bloom") else batch)
    names = list(dict(model.named_parameters()))
    skip_layer(model, f"{group.name}.1")
    skip_layer(model, f"{group.name}.1")
    assert is_skipped(model.get_submodule(f"{group.name}.1"))
    assert not is_skipped(model.get_submodule(f"{group.name}.0"))
    assert list(dict(model.named_parameters())) == names
    assert find_units(model, "layer")[0].count == group.count
    skipped, copied = outputs(model, batch), outputs(copy.deepcopy(model), batch)
    layers = model.get_submodule(group.name)
    del layers[1]
    kept = outputs(model, batch if species in ("bert", "deberta", "t5") else {**batch, "use_cache": False})
    first = "logits"
    assert not torch.allclose(skipped[first], dense[first], atol=1e-4)
    assert torch.equal(skipped[first], kept[first])
    assert torch.equal(skipped[first], copied[first])


def test_skipped_layers_pass_gradients_and_serve_caches() -> None:
    model = tiny_llama(num_hidden_layers=3)
    skip_layer(model, "model.layers.0")
    ids = Sentences(2, length=6).input_ids.clamp(min=3)
    torch.manual_seed(0)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.model.layers[0].parameters())
    model.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, **options, use_cache=True)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))
    assert logits(model).isfinite().all()
