"""What QAT costs a training step: plain, hf_quant in its phases, and torch.ao's prepare_qat, interleaved.

MiniLM shape (6 layers, hidden 384), batch 32 x 64 with a third of the positions padding, AdamW; float32, and bf16
autocast where the CPU has it.

    python benchmarks/qat_step.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Callable

import torch
from common import interleave, machine, show, summarize, write
from transformers import BertConfig, BertForSequenceClassification

from hf_quant.quantization.qat import prepare
from hf_quant.schemes import get_scheme
from hf_quant.targets import select_modules

BATCH, LENGTH = 32, 64


def minilm() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertForSequenceClassification(config).train()


def hf_quant_model(model: torch.nn.Module, scheme: str, observing: bool) -> torch.nn.Module:
    state = prepare(model, get_scheme(scheme), select_modules(model))
    state.fake_quantizing = state.observing = True
    model(**batch())
    state.observing = observing
    return model


def torch_ao_model(model: torch.nn.Module) -> torch.nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    # Linear layers only: eager-mode QAT has no embedding that its default qconfig could serve.
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.classifier:
            module.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model, inplace=True)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(LENGTH // 3, LENGTH + 1, (BATCH,), generator=generator)
    return {
        "input_ids": torch.randint(1000, 30000, (BATCH, LENGTH), generator=generator),
        "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long(),
        "labels": torch.randint(0, 2, (BATCH,), generator=generator),
    }


def step_of(model: torch.nn.Module, bf16: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    inputs = batch()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="time torch.ao too, in float32"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results = {}
    precisions = [False] + [True] * any("bf16" in flag for flag in machine()["cpu_flags"])
    for bf16 in precisions:
        plain = minilm()
        models = {
            "plain": plain,
            "int8_static, observing": hf_quant_model(copy.deepcopy(plain), "int8_static", True),
            "int8_static, frozen": hf_quant_model(copy.deepcopy(plain), "int8_static", False),
            "int8_dynamic": hf_quant_model(copy.deepcopy(plain), "int8_dynamic", False),
        }
        if (
            arguments.peer and not bf16
        ):  # under autocast torch.ao stops: "expected scalar type Float but found BFloat16"
            models["torch.ao prepare_qat"] = torch_ao_model(copy.deepcopy(plain))
        steps = {name: step_of(model, bf16) for name, model in models.items()}
        title = "bf16 autocast" if bf16 else "float32"
        results[title] = summarize(interleave(steps, arguments.rounds), "plain")
        show(f"Training step, {title}, batch {BATCH} x {LENGTH}", results[title])
    write("qat_step", {"batch": [BATCH, LENGTH], "steps": results})


if __name__ == "__main__":
    main()
