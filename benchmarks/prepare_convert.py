"""Seconds and peak memory of preparing, converting and quantizing a BERT-base shape (110M parameters).

And of quantizing SmolLM2's shape (135M).

    python benchmarks/prepare_convert.py

Each stage runs in a process of its own; peak memory is the process's, beyond what it held before the float model
was made, as a multiple of the float model's bytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

STAGES = (
    "prepare",
    "convert",
    "int8_dynamic",
    "int8_dynamic, in place",
    "int4_weight_only, in place",
    "SmolLM2, int8_dynamic",
    "SmolLM2, int8_dynamic, in place",
    "SmolLM2, int4_weight_only, in place",
)
RUNS = 3


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(stage: str) -> dict[str, float]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    from hf_quant import quantize_dynamic
    from hf_quant.quantization.convert import convert_qat
    from hf_quant.quantization.qat import prepare
    from hf_quant.schemes import get_scheme
    from hf_quant.targets import select_modules

    inputs = {"input_ids": torch.randint(1000, 30000, (8, 64), generator=torch.Generator().manual_seed(0))}
    small = BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2))
    scheme, selection = get_scheme("int8_static"), select_modules(small)
    state = prepare(small, scheme, selection)
    state.observing = state.fake_quantizing = True
    small.train()(**inputs)
    convert_qat(small, state, scheme, selection, list(state.inputs))
    del small, state  # what libraries load and compile at their first use is not the model's
    before = peak_bytes()
    with torch.device("meta"):  # so that nothing but the weights themselves counts as the float model
        if stage.startswith("SmolLM2"):
            sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
            model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        else:
            model = BertForSequenceClassification(BertConfig())
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()
    float_bytes = sum(parameter.nbytes for parameter in model.parameters())
    seconds = 0.0

    def timed(function, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal seconds
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - start
        return result

    if "int" in stage:
        name = next(part for part in stage.split(", ") if part.startswith("int"))
        timed(quantize_dynamic, model, name, inplace=stage.endswith("in place"), progress=False)
    else:
        selection = select_modules(model)
        state = timed(prepare, model, get_scheme("int8_static"), selection)
        if stage == "convert":
            model.train()
            state.observing = state.fake_quantizing = True
            with torch.no_grad():
                model(**inputs)
            timed(convert_qat, model, state, get_scheme("int8_static"), selection, list(state.inputs))
    return {"seconds": seconds, "peak": (peak_bytes() - before) / float_bytes}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    from common import write

    results = {}
    for stage in STAGES:
        runs = []
        for _ in range(RUNS):
            output = subprocess.run([sys.executable, __file__, stage], capture_output=True, text=True, check=True)
            runs.append(json.loads(output.stdout.splitlines()[-1]))
        runs.sort(key=lambda run: run["seconds"])
        results[stage] = {"seconds": runs[RUNS // 2]["seconds"], "peak": runs[RUNS // 2]["peak"], "runs": runs}
        print(f"{stage:36} {results[stage]['seconds']:.2f} s, peak {results[stage]['peak']:.2f} x the float model")
    write("prepare_convert", {"models": "BERT-base and SmolLM2 shapes", "stages": results})


if __name__ == "__main__":
    main()
