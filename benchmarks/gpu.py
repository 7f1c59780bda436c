"""One GPU: products, BERT-base's forward and a decoder's tokens a second, int8 and int4 against bfloat16 and float16.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts encoder --variants bf16-compiled,int8_dynamic --quick

Random weights. All variants are in one process and take turns; each time is that of a call until the GPU is done. The
encoder gets batches of 1 to 128 sentences of 128 tokens. The decoder has the shape of SmolLM2-1.7B and generates 64
tokens after a prompt of 32, greedily, with a static cache; float variants are compiled the way transformers does it.
Products are timed on the GPU alone: as a CUDA graph of calls with weights of their own, so that none is in a cache.
Results go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import interleave, machine, show, summarize, write
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_quant
from hf_quant.qparams import dequantize_weight
from hf_quant.runtime import cuda

LENGTH, PROMPT, NEW = 128, 32, 64
PRODUCTS = ((768, 768), (3072, 768), (768, 3072), (2048, 2048), (8192, 2048), (2048, 8192))  # BERT-base, SmolLM2-1.7B
TOKENS = (1, 8, 16, 64, 512, 4096)
BATCHES = {"encoder": (1, 8, 32, 128), "decoder": (1, 8)}
ENCODERS = (
    "bf16",
    "bf16-compiled",
    "f16-compiled",
    "int8_dynamic-before",
    "int8_static-before",
    "int8_dynamic",
    "int8_static",
    "torchao-int8_dynamic",
)
DECODERS = (
    "bf16",
    "bf16-compiled",
    "int8_weight_only",
    "int4_weight_only",
    "torchao-int4_g128",
)
BASE = "bf16-compiled"


def ids(batch: int, length: int, vocabulary: int) -> Tensor:
    """The same random tokens for all variants."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocabulary, (batch, length), generator=generator).cuda()


def bert(layers: int) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).eval()


def llama(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def encoder(name: str, layers: int) -> Any:
    """A model by the name of its variant."""
    scheme, _, way = name.partition("-")
    model = bert(layers)
    if scheme == "f16":
        return torch.compile(model.to(torch.float16))
    model = model.to(torch.bfloat16)
    if scheme == "bf16":
        return torch.compile(model) if way else model
    if scheme == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        # Without its settings of Inductor, which would be those of all variants.
        quantize_(model.bert, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        return torch.compile(model)
    if scheme == "int8_static":
        data = [{"input_ids": ids(8, LENGTH, 30000)} for _ in range(2)]
        model = hf_quant.quantize_static(model, data, progress=False)
    else:
        model = hf_quant.quantize_dynamic(model, scheme, progress=False)
    return model if way else hf_quant.optimize(model)


def decoder(name: str, layers: int) -> tuple[Any, dict[str, Any]]:
    """A model by the name of its variant, and how it generates."""
    scheme, _, way = name.partition("-")
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": not way}
    model = llama(layers)
    if scheme == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        config = Int4WeightOnlyConfig(128, False, int4_packing_format="tile_packed_to_4d")
        quantize_(model.model, config)
    elif scheme != "bf16":
        model = hf_quant.optimize(hf_quant.quantize_dynamic(model, scheme, progress=False))
    return model, options


def measure(
    part: str, variants: dict[str, Callable[[int], Any]], rounds: int, notes: dict[str, Any]
) -> dict[str, Any]:
    """Times of each batch size; what fails at its first calls is left out, with the reason in `notes`."""
    for name in list(variants):
        start = time.perf_counter()
        try:
            for batch in BATCHES[part] * 2:  # twice: a second batch size may compile the first one's graph anew
                variants[name](batch)
        except Exception as error:
            notes["failed"][f"{part} {name}"] = str(error).strip().split("\n")[0][:200]
            del variants[name]
        notes["ready_after_s"][f"{part} {name}"] = took = round(time.perf_counter() - start, 1)
        print(f"{part} {name}: {took} s {notes['failed'].get(f'{part} {name}', '')}", flush=True)
    base = BASE if BASE in variants else next(iter(variants))
    cases = {}
    for batch in BATCHES[part]:
        times = interleave({name: functools.partial(run, batch) for name, run in variants.items()}, rounds)
        rows = cases[f"batch{batch}"] = summarize(times, base)
        if part == "decoder":
            for name, row in rows.items():
                row["tokens_per_s"] = batch * NEW / statistics.median(times[name])
        show(f"{part}, batch {batch}", rows)
    return cases


def products() -> dict[str, dict[str, float]]:
    """Microseconds of one product, by shape (outputs x inputs) and tokens."""
    found = {}
    dequantized = torch.compile(lambda x, weight, scale: F.linear(x, weight * scale), dynamic=False)
    unpacked = torch.compile(
        lambda x, t, scale: F.linear(x, dequantize_weight(cuda.from_tiles(t), scale)), dynamic=False
    )
    for outputs, inputs in PRODUCTS:
        torch._dynamo.reset()  # it makes few variants of one function
        count = max(6, int(3e8 / (outputs * inputs * 2)))
        floats = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        int8 = [torch.randint(-127, 128, (outputs, inputs), device="cuda", dtype=torch.int8) for _ in range(count)]
        scale = torch.rand(outputs, 1, device="cuda", dtype=torch.bfloat16)
        scales = torch.rand(outputs, inputs // 32, device="cuda", dtype=torch.bfloat16)
        int4 = [cuda.to_tiles(weight >> 4, scales) for weight in int8]
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            calls: dict[str, list[Callable[[], Any]]] = {
                "bf16": [functools.partial(F.linear, x, weight) for weight in floats],
                "int8_dequantized": [functools.partial(dequantized, x, weight, scale) for weight in int8],
                "int4_dequantized": [functools.partial(unpacked, x, tiles, scales) for tiles, _ in int4],
            }
            if tokens <= cuda.FEW_ROWS:
                calls["int8_few"] = [functools.partial(cuda.int8_linear, x, weight, scale, None) for weight in int8]
                calls["int4_few"] = [functools.partial(cuda.int4_linear, x, *form, None) for form in int4]
            else:
                integers = torch.randint(-128, 128, x.shape, device="cuda", dtype=torch.int8)
                calls["int_mm"] = [functools.partial(torch._int_mm, integers, weight.t()) for weight in int8]
            row = found[f"{outputs}x{inputs} {tokens}"] = {
                name: round(recorded(each), 1) for name, each in calls.items()
            }
            print(f"{outputs}x{inputs}, {tokens} tokens: {row}", flush=True)
    return found


def recorded(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Microseconds of a call, as the median of replays of a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    with (
        torch.inference_mode(),
        torch.cuda.stream(stream),
    ):  # what is compiled or loaded at first is not to be recorded
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.inference_mode(), torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def run_encoder(model: Any) -> Callable[[int], Tensor]:
    inputs = {batch: ids(batch, LENGTH, 30000) for batch in BATCHES["encoder"]}

    @torch.inference_mode()
    def run(batch: int) -> Tensor:
        output = model(input_ids=inputs[batch]).logits
        torch.cuda.synchronize()
        return output

    return run


def run_decoder(model: Any, options: dict[str, Any]) -> Callable[[int], Tensor]:
    inputs = {batch: ids(batch, PROMPT, 49000) for batch in BATCHES["decoder"]}

    def run(batch: int) -> Tensor:
        tokens = model.generate(
            inputs[batch],
            attention_mask=torch.ones_like(inputs[batch]),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            **options,
        )
        torch.cuda.synchronize()
        return tokens

    return run


def gpu() -> dict[str, Any]:
    found = {name: importlib.metadata.version(name) for name in ("triton", "torchao") if _installed(name)}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **found}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="products,encoder,decoder", help="%(default)s")
    parser.add_argument("--variants", help="names of variants; all by default")
    parser.add_argument("--rounds", type=int, default=30, help="of the encoder; a third of it of the decoder")
    parser.add_argument("--encoder-layers", type=int, default=12, help="BERT-base has %(default)s")
    parser.add_argument(
        "--decoder-layers", type=int, default=24, help="SmolLM2-1.7B has %(default)s; fewer compile faster"
    )
    parser.add_argument("--quick", action="store_true", help="three rounds, nothing is written")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found: this benchmark needs an NVIDIA GPU.")
    wanted = None if options.variants is None else set(options.variants.split(","))
    results: dict[str, Any] = {"length": LENGTH, "prompt": PROMPT, "new": NEW}
    results |= {"encoder_layers": options.encoder_layers, "decoder_layers": options.decoder_layers}
    notes: dict[str, Any] = {"weights_mib": {}, "ready_after_s": {}, "failed": {}}
    torch.ones(64, 64, device="cuda", dtype=torch.bfloat16).mm(torch.ones(64, 64, device="cuda", dtype=torch.bfloat16))
    for part in options.parts.split(","):  # with cuBLAS's workspace there, which is nobody's weight
        if part == "products":
            results[part] = products()
            continue
        variants = {}
        for name in ENCODERS if part == "encoder" else DECODERS:
            if wanted is not None and name not in wanted:
                continue
            gc.collect()
            before = torch.cuda.memory_allocated()
            try:
                if part == "encoder":
                    run = run_encoder(encoder(name, options.encoder_layers))
                else:
                    run = run_decoder(*decoder(name, options.decoder_layers))
            except ImportError as error:
                notes["failed"][f"{part} {name}"] = str(error)
                continue
            gc.collect()
            notes["weights_mib"][f"{part} {name}"] = round((torch.cuda.memory_allocated() - before) / 2**20, 1)
            variants[name] = run
        rounds = 3 if options.quick else options.rounds if part == "encoder" else options.rounds // 3
        results[part] = measure(part, variants, rounds, notes)
        del variants, run  # their memory too
        if not options.quick:
            write("gpu", {"machine": {**machine(), **gpu()}, **results, **notes})
    print(notes["weights_mib"])


if __name__ == "__main__":
    main()
