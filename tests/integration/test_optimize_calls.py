"""Optimized models in use: lengths, modes, threads, pipelines, generation, and compiled kernels."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration, pipeline

from hf_quant import optimize, quantize_dynamic
from hf_quant.quantization.sensitivity import sqnr
from tests.tiny import VOCAB, int8_model, tiny_bert, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_kernel")

SAME = 50.0  # dB; one value of these models rounded to the other side costs more than that
CLOSE = 28.0  # dB, in bfloat16
SHAPES = [(2, 5), (3, 9), (1, 7), (8, 12), (1, 32), (2, 32), (5, 3), (1, 2)]


def _bert(**config: Any) -> Any:
    """One layer: Dynamo takes seconds for each, and nothing here hangs on their number."""
    return tiny_bert(num_hidden_layers=1, **config)


def _pair(model: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A quantized model, and an optimized copy of it."""
    return model, optimize(copy.deepcopy(model), **{"compile": False, "dtype": "float32", **kwargs})


def _graphs(model: Any) -> int:
    return len(model.forward._forward.graphs)


def _batch(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _assert_same(expected: Any, got: Any, bound: float = SAME, **batch: Any) -> None:
    reference, value = expected(**batch), got(**batch)
    assert type(value) is type(reference)
    assert sqnr(reference.logits, value.logits) > bound


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_one_graph_for_batches_and_one_for_single_rows(scheme: str) -> None:
    plain, fast = _pair(int8_model(_bert(), scheme))
    for rows, length in SHAPES:
        _assert_same(plain, fast, **_batch(rows, length))
    assert _graphs(fast) == 2


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_padded_batches_run_in_groups(scheme: str) -> None:
    plain, fast = _pair(int8_model(_bert(max_position_embeddings=128), scheme))
    # A pooler's dynamic range is that of all rows that run together.
    lengths = torch.tensor([100, 4, 3, 90, 5, 4, 6, 3])
    for seed in range(3):  # the first one runs whole as well, and is compared
        mask = (torch.arange(100) < lengths[:, None]).long()
        ids = _batch(8, 100, seed)["input_ids"] * mask
        _assert_same(plain, fast, bound=40.0, input_ids=ids, attention_mask=mask)
        lengths = lengths.flip(0)
    (layout,) = fast.forward._layouts.values()
    assert layout is not None
    assert _graphs(fast) == 1


def test_modes_of_the_caller_share_a_graph() -> None:
    plain, fast = _pair(int8_model(_bert(), "int8_static"))
    batch = _batch(2, 6)
    with torch.no_grad():
        expected = plain(**batch).logits
    first = fast(**batch).logits
    got = [first]
    with torch.no_grad():
        got.append(fast(**batch).logits)
    with torch.inference_mode():
        got.append(fast(**batch).logits)
        inside = fast(input_ids=batch["input_ids"].clone(), attention_mask=batch["attention_mask"].clone())
        got.append(inside.logits)  # of inference tensors
    with torch.autocast("cpu", torch.bfloat16):
        got.append(fast(**batch).logits)
    assert _graphs(fast) == 1
    assert sqnr(expected, first) > SAME
    for value in got:
        assert torch.equal(value, first)
        assert value.dtype == torch.float32
        assert not value.requires_grad
    weight = torch.ones(2, requires_grad=True)  # a head of the caller's own may be trained on them
    (first @ weight).sum().backward()
    assert torch.equal(weight.grad, first.sum(0))  # type: ignore[arg-type]


def test_threads() -> None:
    plain, fast = _pair(int8_model(_bert(), "int8_dynamic"))
    batches = [_batch(rows, length, seed) for seed in range(4) for rows, length in SHAPES]
    with torch.no_grad():
        expected = [plain(**batch).logits for batch in batches]
    with ThreadPoolExecutor(4) as pool:  # graphs too are made by several of them
        got = list(pool.map(lambda batch: fast(**batch).logits, batches))
    for reference, value in zip(expected, got, strict=True):
        assert sqnr(reference, value) > SAME


def test_pipelines() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["w3 w4 w5 w9", "w80", "w7 w7 w7 w7 w7 w7 w7", "w11 w12", "w60 w4 w60"]
    plain, fast = (
        pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", batch_size=3, top_k=None)
        for model in _pair(int8_model(_bert(), "int8_static"))
    )
    for one, other in zip(plain(texts), fast(texts), strict=True):
        assert [found["label"] for found in one] == [found["label"] for found in other]
        assert [found["score"] for found in one] == pytest.approx([found["score"] for found in other], abs=2e-3)


def test_other_outputs() -> None:
    plain, fast = _pair(int8_model(_bert(attn_implementation="eager"), "int8_static"))
    batch = _batch(3, 7)
    with torch.no_grad():
        for flags in ({"output_hidden_states": True, "output_attentions": True}, {"return_dict": False}):
            for inputs in (batch, {**batch, "labels": torch.tensor([0, 1, 1])}):
                one, other = plain(**inputs, **flags), fast(**inputs, **flags)
                assert type(one) is type(other)
                if flags != {"return_dict": False}:
                    assert list(one) == list(other)
                    one, other = one.to_tuple(), other.to_tuple()
                leaves = [torch.utils._pytree.tree_leaves(output) for output in (one, other)]
                for reference, value in zip(*leaves, strict=True):
                    assert reference.shape == value.shape
                    assert sqnr(reference, value) > SAME


def _t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, initializer_factor=3.0))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(tiny_llama, {}, marks=pytest.mark.slow),
        pytest.param(tiny_llama, {"cache_implementation": "static"}, marks=pytest.mark.slow),
        (_t5, {}),
        pytest.param(_t5, {"cache_implementation": "static"}, marks=pytest.mark.slow),
        pytest.param(tiny_llama, {"num_beams": 2}, marks=pytest.mark.slow),
        pytest.param(_t5, {"num_beams": 2}, marks=pytest.mark.slow),
    ],
)
def test_generation(make: Any, settings: dict[str, Any]) -> None:
    plain, fast = _pair(quantize_dynamic(make().eval(), progress=False))
    for rows, length in ((2, 5), (1, 4), (3, 6)):
        batch = _batch(rows, length)
        kwargs: dict[str, Any] = {**settings, "max_new_tokens": 6, "do_sample": False}
        assert fast.generate(**batch, **kwargs).tolist() == plain.generate(**batch, **kwargs).tolist()


def test_a_cache_of_the_callers_own() -> None:
    plain, fast = _pair(int8_model(tiny_llama(), "int8_dynamic"))
    ids = _batch(2, 6)["input_ids"]
    caches = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        with torch.no_grad():
            one, other = (
                model(input_ids=part, past_key_values=cache)
                for model, cache in zip((plain, fast), caches, strict=True)
            )
        assert sqnr(one.logits, other.logits) > SAME
        assert [cache.get_seq_length() for cache in caches] == [caches[0].get_seq_length()] * 2
    assert caches[1].get_seq_length() == 6


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_compiled(scheme: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.runtime.cpu.native_bfloat16", lambda: "bf16")
    plain, fast = _pair(int8_model(_bert(), scheme), compile=True, dtype=dtype)
    for rows, length in SHAPES:
        batch = _batch(rows, length)
        with torch.no_grad():
            assert sqnr(plain(**batch).logits, fast(**batch).logits) > (SAME if dtype == "float32" else CLOSE)
    assert _graphs(fast) == 2


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from hf_quant.runtime import cpu, vnni

    def missing() -> str:
        raise RuntimeError("no g++ here")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    monkeypatch.setattr(vnni, "available", lambda: False)  # as it is where the first call finds no compiler
    cpu.compiler_available.cache_clear()
    try:
        plain, fast = _pair(int8_model(_bert(), "int8_static"), compile=True)
        _assert_same(plain, fast, **_batch(2, 5))
    finally:
        cpu.compiler_available.cache_clear()
    assert "no C++ compiler was found (no g++ here): models run without compiled kernels" in caplog.text


PROCESS = textwrap.dedent(
    """
    import sys, torch
    from hf_quant import load_quantized, optimize
    from hf_quant.runtime import choice, products
    kernel = products.exact_kernels()[0]
    choice.choose = lambda *_: kernel
    torch.set_num_threads(1)
    model = optimize(load_quantized(sys.argv[1]), dtype="float32")
    ids = torch.arange(12).view(2, 6) + 3
    torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, sys.argv[2])
    from torch._dynamo.utils import counters
    print(counters["inductor"]["fxgraph_cache_hit"], "hits")
    """
)


@pytest.mark.slow
def test_a_new_process_finds_the_compiled_kernels(tmp_path: Path) -> None:
    model = int8_model(_bert(), "int8_static")
    model.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    printed, logits = [], []
    for number in range(2):
        file = tmp_path / f"{number}.pt"
        command = [sys.executable, "-c", PROCESS, str(tmp_path / "model"), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip())
        logits.append(torch.load(file))
    assert printed == ["0 hits", "1 hits"]
    assert torch.equal(*logits)
    ids = torch.arange(12).view(2, 6) + 3
    with torch.no_grad():
        assert sqnr(model(input_ids=ids).logits, logits[0]) > SAME
