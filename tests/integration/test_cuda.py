"""The same on a GPU, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_quant import QATCallback, load_quantized, optimize, quantize_dynamic, save_quantized
from hf_quant.runtime.base import quantized_modules
from hf_quant.runtime.kernels import Kernel, choose_kernel, use_kernel
from hf_quant.runtime.modules import Int8Linear
from hf_quant.schemes import SCHEMES
from tests.tiny import Sentences, logits, make_trainer, tiny_bert

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


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only", "int4_weight_only"])
def test_optimized_logits_are_those_of_the_unoptimized(scheme: str) -> None:
    model = quantize_dynamic(tiny_bert(), scheme, progress=False).to("cuda")
    batch = {name: value.to("cuda") for name, value in Sentences(8, seed=7).batch(8).items()}
    with torch.no_grad():
        expected = model(**batch).logits
    got = optimize(model, dtype="float32")(**batch).logits
    assert (got - expected).norm() <= 0.03 * expected.norm()
