"""The same on a GPU, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_quant import QATCallback, load_quantized, optimize, quantize_dynamic, save_quantized
from hf_quant.runtime import cuda
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import Kernel, choose_kernel, use_kernel
from hf_quant.runtime.modules import Int8Linear
from hf_quant.runtime.packed import PackedLinear
from hf_quant.schemes import SCHEMES, get_scheme
from tests.tiny import VOCAB, Sentences, int8_model, logits, make_trainer, tiny_bert, tiny_llama

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))


@schemes
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 32), (8, 8), (60, 32), (64, 30), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_agree_with_the_reference(
    scheme: str, rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    """Sizes that `torch._int_mm` takes, and sizes that it does not."""
    bounds = (torch.tensor(-3.0), torch.tensor(3.0))
    layer = Int8Linear.from_float(
        torch.randn(out_features, in_features), torch.randn(out_features), SCHEMES[scheme], bounds
    ).to("cuda", dtype)
    values = torch.randn(rows, in_features).to("cuda", dtype)
    got = layer(values)
    with use_kernel("reference"):
        expected = layer(values)
    assert got.dtype == expected.dtype == dtype
    share = 1e-4 if dtype == torch.float32 else 0.02
    assert (got.float() - expected.float()).norm() <= share * expected.float().norm()


def test_integer_kernel_is_chosen() -> None:
    kernel: Kernel = choose_kernel(torch.device("cuda"))
    assert kernel == "int_mm"


@schemes
def test_logits_are_those_of_the_cpu(scheme: str, tmp_path: Path) -> None:
    if scheme == "int8_static":
        pytest.skip("needs ranges; see the Trainer below")
    model = quantize_dynamic(tiny_bert(), scheme, progress=False)
    save_quantized(model, tmp_path / "int8")
    loaded = load_quantized(tmp_path / "int8").to("cuda")
    batch = {name: value.to("cuda") for name, value in Sentences(8, seed=7).batch(8).items()}
    with torch.no_grad():
        got = loaded(**batch).logits.cpu()
    assert (got - logits(model)).norm() <= 0.03 * logits(model).norm()


@schemes
def test_trainer(scheme: str, tmp_path: Path) -> None:
    callback = QATCallback(scheme)
    changes = {"use_cpu": False, "eval_strategy": "steps", "eval_steps": 8}
    trainer = make_trainer(tmp_path, callbacks=[callback], changes=changes)
    trainer.train()
    assert callback.conversion is not None
    assert min(callback.conversion.layer_sqnr.values()) > 60
    assert all(module.int8_weight.is_cuda for module in quantized_modules(trainer.model).values())
    during = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(during, rel=0.02)
    trainer.save_model(str(tmp_path / "int8"))
    expected = trainer.predict(Sentences(8, seed=7)).predictions
    got = logits(load_quantized(tmp_path / "int8"))
    assert (got - torch.from_numpy(expected)).norm() <= 0.03 * got.norm()


# --- optimize --------------------------------------------------------------------------------------------------------

# Of the norm. One value that is rounded to the other side moves the logits of so small a model by percents.
SHARES = {torch.float32: 0.03, torch.bfloat16: 0.15}
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # that PyTorch's int4 product takes
optimizable = pytest.mark.parametrize(
    "scheme", ["int8_dynamic", "int8_static", "int8_weight_only", "int4_weight_only"]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def cuda_model(model: Any, scheme: str, dtype: torch.dtype) -> Any:
    return int8_model(model, scheme).to("cuda", dtype)


def batch(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).to("cuda")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, cache: str | None, rows: int = 2, new: int = 12) -> Any:
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "cache_implementation": cache}
    return model.generate(**batch(rows, 6), **options, output_logits=True, return_dict_in_generate=True)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return bool((got.float() - expected.float()).norm() <= SHARES[dtype] * expected.float().norm())


@optimizable
@dtypes
@torch.no_grad()
def test_optimized_logits_are_those_of_the_unoptimized(scheme: str, dtype: torch.dtype) -> None:
    model = cuda_model(tiny_bert(**WIDE), scheme, dtype)
    shapes = [(2, 5), (3, 9), (1, 7), (8, 12), (1, 32), (2, 32), (1, 2)]
    expected = [model(**batch(*shape)).logits for shape in shapes]
    optimize(model)
    with pytest.raises(ValueError, match="optimized already"):
        optimize(model)
    for shape, logits_before in zip(shapes, expected, strict=True):
        got = model(**batch(*shape)).logits
        assert got.dtype == dtype
        assert close(got, logits_before, dtype)
    padded = Sentences(8, seed=7).batch(8)
    assert model(**{name: value.to("cuda") for name, value in padded.items()}).logits.isfinite().all()
    assert len(model.forward.graphs) <= 4, "for single rows and for more, each for a few tokens and for many"


@optimizable
@torch.no_grad()
def test_an_optimized_forward_does_not_wait_for_the_gpu(scheme: str) -> None:
    model = optimize(cuda_model(tiny_bert(), scheme, torch.bfloat16))
    inputs = {"input_ids": batch(4, 9)["input_ids"]}
    model(**inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@optimizable
@dtypes
def test_an_optimized_model_is_saved_as_before(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = cuda_model(tiny_bert(**WIDE), scheme, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimize(model)
    with torch.no_grad():
        expected = model(**batch(4, 9)).logits
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    save_quantized(model, tmp_path / "int8")
    with torch.no_grad():
        got = load_quantized(tmp_path / "int8").to("cuda", dtype)(**batch(4, 9)).logits
    assert close(got, expected, dtype)


@pytest.mark.parametrize("cache", [None, "static"])
@optimizable
@dtypes
def test_optimized_generation_is_that_of_the_unoptimized(scheme: str, dtype: torch.dtype, cache: str | None) -> None:
    model = cuda_model(tiny_llama(**WIDE), scheme, dtype)
    expected = {rows: generate(model, cache, rows) for rows in (1, 2)}
    optimize(model)
    for rows in (1, 2, 1):
        got = generate(model, cache, rows)
        same = (got.sequences == expected[rows].sequences).all(0)[6:].tolist()
        # Where rounding turns a token over, what follows is another text.
        for step in range(1 + (same.index(False) if False in same else len(same) - 1)):
            assert close(got.logits[step], expected[rows].logits[step], dtype)
        assert all(same) or scheme not in ("int8_weight_only", "int4_weight_only") or dtype == torch.bfloat16


def test_steps_on_a_static_cache_are_recorded() -> None:
    """With outputs that stay what they were, and from other threads too."""
    model = optimize(cuda_model(tiny_llama(), "int8_dynamic", torch.float32))
    generate(model, "static")
    made = len(model.forward.graphs)
    before = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    first = generate(model, "static")
    logits_then = [value.clone() for value in first.logits]
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(generate, model, "static").result()
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(now, then) for now, then in zip(first.logits, logits_then, strict=True))
    assert before == torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    generate(model, "static", new=20)
    assert len(model.forward.graphs) <= made + 3, "a longer cache, and the graph of the other thread"


@torch.no_grad()
def test_the_callers_own_compiler_sees_through_an_optimized_model() -> None:
    model = optimize(cuda_model(tiny_bert(), "int8_dynamic", torch.float32))
    expected = model(**batch(4, 9)).logits
    got = torch.compile(model, fullgraph=True)(**batch(4, 9)).logits
    assert close(got, expected, torch.float32)


@pytest.mark.parametrize("tiles", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 7, cuda.FEW_ROWS, cuda.FEW_ROWS + 1, 200])
@torch.no_grad()
def test_int4_products(tiles: int, group: int, rows: int) -> None:
    columns = 16 * tiles * 3
    if columns % group:
        group = columns  # one scale a row
    scheme = get_scheme("int4_weight_only_channel" if group == columns else f"int4_weight_only_g{group}")
    weight, bias = torch.randn(40, columns).bfloat16(), torch.randn(40).bfloat16()
    layer = PackedLinear.from_float(weight, bias, scheme).to("cuda")
    x = torch.randn(2, rows, columns).to("cuda", torch.bfloat16)
    expected, integers = layer(x), layer.integers
    layer.prepare_for_cuda()
    assert layer.tiles is not None
    assert layer.tiles.shape[-1] == tiles // 2
    assert torch.equal(layer.integers, integers)
    assert (layer(x).float() - expected.float()).norm() <= 2**-7 * expected.float().norm()
    assert layer(x.float()).dtype == torch.float32, "the dequantized product, for other dtypes"


@pytest.mark.parametrize("rows", [1, 2, cuda.FEW_ROWS, cuda.FEW_ROWS + 1])
@pytest.mark.parametrize("shape", [(32, 64), (30, 60), (1, 8), (2048, 512), (72, 4100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_int8_weights_alone(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = Int8Linear.from_float(torch.randn(shape), torch.randn(shape[0]), get_scheme("int8_weight_only"))
    layer.to("cuda", dtype)
    x = torch.randn(rows, shape[1]).to("cuda", dtype)
    expected = layer(x)
    layer.prepare_for_cuda()
    assert layer._reads_integers, "Triton's product is there, and right"
    got = layer(x)
    assert got.dtype == dtype
    assert (got.float() - expected.float()).norm() <= (
        1e-4 if dtype == torch.float32 else 0.02
    ) * expected.float().norm()
