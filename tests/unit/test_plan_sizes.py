"""Bytes that are planned, against files and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from hf_quant.planning.sizes import (
    file_bytes,
    optimizer_bytes,
    predicted_sparsity,
    result_tensors,
    stored_tensors,
    training_memory,
)
from hf_quant.pruning.criteria import get_criterion
from hf_quant.pruning.pruner import Pruner
from hf_quant.pruning.structures import get_structure
from hf_quant.schemes import get_scheme
from hf_quant.targets import select_modules

from ..tiny import int8_model, make_trainer, tiny_bert, tiny_gpt2, tiny_llama, training_arguments

dtypes = st.sampled_from([torch.float32, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16])
shapes = st.lists(st.integers(0, 12), max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=12), st.tuples(dtypes, shapes), max_size=12))
def test_a_file_has_the_bytes_that_were_counted(described: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    described.pop("__metadata__", None)
    try:
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in described.items()}
        name_bytes = save(tensors, metadata={"format": "pt"})
    except UnicodeEncodeError:  # a lone surrogate is no name
        return
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert file_bytes(meta) == len(name_bytes)


def _on_disk(model: PreTrainedModel, folder: Path) -> int:
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(
    "scheme", ["int8_static", "int8_dynamic", "int8_weight_only", "int4_weight_only", "int3_dynamic_g32"]
)
def test_every_scheme_and_kind_of_layer(tmp_path: Path, make: Any, scheme: str) -> None:
    wanted = get_scheme(scheme)
    if wanted.packed:
        from hf_quant import quantize_dynamic

        model = quantize_dynamic(make(), scheme, progress=False)
    else:
        model = int8_model(make(), scheme)
    with torch.device("meta"):
        bare = make()
    planned = result_tensors(bare, {}, set(), select_modules(bare, scheme=wanted), wanted)
    assert file_bytes(planned) == pytest.approx(_on_disk(model, tmp_path / "int8"), rel=0.002)
    assert file_bytes(stored_tensors(bare)) == pytest.approx(_on_disk(make(), tmp_path / "float"), rel=0.002)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"])
def test_memory_of_optimizers(tmp_path: Path, optim: str) -> None:
    trainer = make_trainer(tmp_path, changes={"optim": optim, "max_steps": 1})
    trainer.train()
    states: list[Tensor] = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() > 1
    ]
    kept = sum(tensor.nbytes for tensor in states)
    assert optimizer_bytes(trainer.args, trainer.model) == pytest.approx(kept, rel=0.01)


def test_an_optimizer_that_is_not_known_is_said_to_be(tmp_path: Path) -> None:
    args = training_arguments(tmp_path, optim="stable_adamw")
    memory = training_memory(args, tiny_bert(), {}, 0)
    assert memory.optimizer is None
    assert memory.total == memory.parameters + memory.gradients
    assert optimizer_bytes(training_arguments(tmp_path, optim="sgd", optim_args="momentum=0.9"), tiny_bert()) is None


@pytest.mark.parametrize(
    ("structure", "scope", "goal"),
    [
        ("unstructured", "global", 0.37),
        ("unstructured", "layer", 0.37),
        ("2:4", "layer", 0.5),
        ("4x1", "layer", 0.61),
        ("row", "layer", 0.33),
        ("head", "layer", 0.5),
        ("neuron", "global", 0.31),
        ("neuron", "layer", 0.31),
    ],
)
def test_the_sparsity_that_is_reached(structure: str, scope: str, goal: float) -> None:
    pruner = Pruner(tiny_bert(), get_structure(structure), get_criterion("magnitude"), scope, goal)
    wanted, planned = predicted_sparsity(pruner)
    pruner.update(pruner.final, seed=0)
    assert wanted == pytest.approx(goal)
    assert planned == pytest.approx(pruner.total(pruner.reached()), abs=1e-4)
