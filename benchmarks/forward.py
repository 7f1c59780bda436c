"""Milliseconds of a forward: float32, bf16 and int8, eager and not optimized, interleaved (see inference.py).

python benchmarks/forward.py [--shape minilm|bert-base] [--rounds 15]
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from common import interleave, machine, show, summarize, write
from transformers import BertConfig, BertForSequenceClassification

from hf_quant import quantize_dynamic
from hf_quant.quantization.convert import convert_qat
from hf_quant.quantization.qat import prepare
from hf_quant.schemes import get_scheme
from hf_quant.targets import select_modules

LENGTH = 128
SHAPES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {},
}


def static_int8(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.nn.Module:
    scheme, selection = get_scheme("int8_static"), select_modules(model)
    state = prepare(model, scheme, selection)
    state.observing = state.fake_quantizing = True
    with torch.no_grad():
        model.train()(**inputs)
    convert_qat(model, state, scheme, selection, [inputs])
    return model.eval()


def torch_ao_dynamic(model: torch.nn.Module) -> torch.nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def forward_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPES[arguments.shape])).eval()
    ids = torch.randint(1000, 30000, (32, LENGTH))
    models = {
        "float32": model,
        "int8_static": static_int8(copy.deepcopy(model), {"input_ids": ids[:4]}),
        "int8_dynamic": quantize_dynamic(model, progress=False),
        "torch.ao dynamic": torch_ao_dynamic(copy.deepcopy(model)),
    }
    if any("bf16" in flag for flag in machine()["cpu_flags"]):
        models["bf16"] = copy.deepcopy(model).bfloat16()
    results = {}
    for size in (1, 8, 32):
        forwards = {name: forward_of(each, {"input_ids": ids[:size]}) for name, each in models.items()}
        results[f"batch {size}"] = summarize(interleave(forwards, arguments.rounds), "float32")
        show(f"{arguments.shape}, batch {size} x {LENGTH}", results[f"batch {size}"])
    write(f"forward_{arguments.shape}", {"length": LENGTH, "forward": results})


if __name__ == "__main__":
    main()
