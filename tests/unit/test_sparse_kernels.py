"""2:4 kernels: which weights qualify, and what a machine without them is told."""

from __future__ import annotations

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from hf_quant import quantize_dynamic
from hf_quant.runtime import sparse
from hf_quant.runtime.sparse import is_n_m, use_semi_structured

from ..tiny import tiny_bert, tiny_gpt2, tiny_llama

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def prune(weight: Tensor, keep: int = 2, of: int = 4) -> None:
    """The first `of - keep` of each `of` consecutive inputs become zero, in place."""
    with torch.no_grad():
        weight.view(weight.shape[0], -1, of)[..., : of - keep] = 0


def two_of_four(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Linear layers of the given sizes, all 2:4."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, dtype=dtype) for a, b in pairwise(sizes)))
    for layer in model:
        prune(layer.weight)
    return model


def pretend_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the machine's check and keep weights dense: what is left is which layers are chosen."""
    monkeypatch.setattr(sparse, "_require_device", lambda device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense.clone())


class TestPattern:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from([0.0, 1.0]), min_size=8, max_size=8), st.integers(1, 4))
    def test_counts_what_stays_in_each_group(self, values: list[float], n: int) -> None:
        expected = sum(map(bool, values[:4])) <= n and sum(map(bool, values[4:])) <= n
        assert is_n_m(torch.tensor([values]), n, 4) == expected

    @pytest.mark.parametrize("changed", [False, True])
    def test_agrees_with_what_the_kernels_can_hold(self, changed: bool) -> None:
        weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).half()
        prune(weight)
        if changed:
            weight[5, 8:12] = torch.tensor([1.0, 2.0, 3.0, 0.0])
        packed = sparse_semi_structured_from_dense_cutlass(weight)
        whole = torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)
        assert is_n_m(weight, 2, 4) == whole == (not changed)

    def test_is_along_the_inputs(self) -> None:
        weight = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 4)
        assert is_n_m(weight, 2, 4)
        assert not is_n_m(weight.t(), 2, 4)
        assert is_n_m(weight.t().to(torch.int8), 4, 4)

    def test_wants_a_whole_number_of_groups(self) -> None:
        assert not is_n_m(torch.zeros(2, 6), 2, 4)

    @pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2)])
    def test_refuses_what_is_no_pattern(self, n: int, m: int) -> None:
        with pytest.raises(ValueError, match=f"{n}:{m} is no pattern; N:M needs 1 <= N <= M"):
            is_n_m(torch.zeros(2, 4), n, m)

    def test_refuses_what_is_no_matrix(self) -> None:
        with pytest.raises(ValueError, match=r"not of shape \(4,\)"):
            is_n_m(torch.zeros(4), 2, 4)


class TestRefusals:
    def test_without_two_of_four_names_the_sparsity(self) -> None:
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
        with torch.no_grad():
            model[0].weight.fill_(1.0)
            model[0].weight[0].zero_()  # 8 of 48 weights
            model[1].weight.fill_(1.0)
        with pytest.raises(
            ValueError, match=r"no weight of Sequential is 2:4: 16\.7 % of the weights in its 2 Linear"
        ):
            use_semi_structured(model)
        with pytest.raises(
            ValueError, match=r"Unstructured zeros give no speed on CPUs or GPUs.*shrink=True, and int8"
        ):
            use_semi_structured(model)

    def test_without_linear_layers(self) -> None:
        with pytest.raises(ValueError, match="Embedding has no Linear layer"):
            use_semi_structured(nn.Embedding(4, 4))

    def test_on_the_cpu_says_what_is_needed(self) -> None:
        model = two_of_four(64, 64)
        before = model[0].weight
        with pytest.raises(RuntimeError, match=r"compute capability 8\.0.*the model is on 'cpu'.*\"neuron\""):
            use_semi_structured(model)
        assert model[0].weight is before

    def test_on_an_old_gpu_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        with pytest.raises(
            RuntimeError, match=r"the model is on Tesla T4 \(compute capability 7\.5\)\. Unstructured zeros"
        ):
            sparse._require_device(torch.device("cuda"))

    def test_on_a_gpu_of_another_maker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Instinct")
        monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=None))
        with pytest.raises(RuntimeError, match="need an NVIDIA GPU"):
            sparse._require_device(torch.device("cuda"))


class TestEligibility:
    def test_takes_what_is_two_of_four(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_ampere(monkeypatch)
        model = two_of_four(64, 64, 96, 64)
        dense = model[1].weight
        with torch.no_grad():
            dense.fill_(1.0)
        assert use_semi_structured(model) == ["0"]  # "2" has 96 inputs, no multiple of 64
        assert not model[0].weight.requires_grad
        assert model[1].weight is dense

    def test_names_what_stays_dense(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        pretend_ampere(monkeypatch)
        with caplog.at_level(logging.WARNING):
            use_semi_structured(two_of_four(64, 64, 96, 64))
        assert "2 is 2:4 but stays dense: its weight is (64, 96), and the kernels take multiples" in caplog.text
        assert "0 is" not in caplog.text

    def test_refuses_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_ampere(monkeypatch)
        with pytest.raises(ValueError, match=r"none of the 1 weights.*0: it is torch.float32; cast the model"):
            use_semi_structured(two_of_four(64, 64, dtype=torch.float32))

    def test_leaves_a_weight_that_the_embedding_shares(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_ampere(monkeypatch)
        model = tiny_llama(hidden_size=64).bfloat16()
        prune(model.lm_head.weight)
        with pytest.raises(ValueError, match=r"lm_head: its weight is shared: model\.embed_tokens\.weight, lm_head"):
            use_semi_structured(model)

    def test_leaves_conv1d(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_ampere(monkeypatch)
        model = tiny_gpt2(n_embd=64).bfloat16()
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight[::2] = 0  # (in, out)
        with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc: Conv1D is no plain nn\.Linear"):
            use_semi_structured(model)

    def test_leaves_int8_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_ampere(monkeypatch)
        model = tiny_bert(hidden_size=64)
        prune(model.bert.encoder.layer[0].intermediate.dense.weight)
        quantized = quantize_dynamic(model, progress=False)
        with pytest.raises(ValueError, match=r"none of the 1 weights.*layer\.0\.intermediate\.dense: it is int8"):
            use_semi_structured(quantized)


@pytest.mark.skipif(not CUDA, reason="2:4 kernels need a CUDA device of compute capability 8.0 or later")
class TestKernels:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_equals_the_dense_product(self, dtype: torch.dtype) -> None:
        model = two_of_four(128, 256, 64, dtype=dtype).cuda().eval()
        input = torch.randn(3, 17, 128, device="cuda", dtype=dtype)
        with torch.no_grad():
            expected = model(input)
            assert use_semi_structured(model) == ["0", "1"]
            got = model(input)
        assert isinstance(model[0].weight, torch.sparse.SparseSemiStructuredTensor)
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)

    def test_on_a_language_model(self) -> None:
        model = tiny_llama(hidden_size=64, intermediate_size=128).bfloat16().cuda().eval()
        for layer in model.model.layers:
            prune(layer.mlp.up_proj.weight)
        ids = torch.arange(16, device="cuda")[None]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            assert use_semi_structured(model) == [f"model.layers.{index}.mlp.up_proj" for index in range(2)]
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=5e-2, atol=5e-2)
