"""Tokens a second of greedy generation on CPU: hf_quant's int8 and int4, and PyTorch's ways, taking turns.

    python benchmarks/generation.py --threads 2
    python benchmarks/generation.py --quick --peers float32,int8_dynamic

A prompt of 32 tokens of WikiText, 64 new tokens, batches of 1 and 8. Each peer is a process of its own that is stopped
while others have their turn. What Inductor compiles stays in build/generation/compiled: compiling takes minutes a peer
at the first run, so let `--quick` come first. llama.cpp takes part where it is installed (`pip install
llama-cpp-python`, which compiles for minutes); its 4-bit file is what SmolLM2's float weights here were made of.
Results go to benchmarks/results/generation.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, summarize, write
from real_models import SMOLLM2, WIKITEXT

from hf_quant.runtime.cpu import native_bfloat16

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT, NEW, BATCHES, BASE = 32, 64, (1, 8), "float32"
ROUNDS = (3, 15)  # at least, at most

# Name: scheme or way, dtype, whether Inductor compiles, cache.
PEERS: dict[str, tuple[str, str, bool, str | None]] = {
    "float32": ("float", "float32", False, None),
    "bfloat16": ("float", "bfloat16", False, None),
    "float32-compile": ("float", "float32", True, "static"),
    "bfloat16-compile": ("float", "bfloat16", True, "static"),
    "torch.ao-dynamic": ("torch.ao", "float32", False, None),
    "int8_dynamic-before": ("int8_dynamic", "before", False, None),
    "int8_dynamic": ("int8_dynamic", "auto", True, "static"),
    "int8_weight_only": ("int8_weight_only", "auto", True, "static"),
    "int4_weight_only": ("int4_weight_only", "auto", True, "static"),
    "int4_weight_only-bfloat16": ("int4_weight_only", "bfloat16", True, "static"),
    "int8_dynamic-eager": ("int8_dynamic", "auto", False, "static"),
    "int8_weight_only-eager": ("int8_weight_only", "auto", False, "static"),
    "int4_weight_only-bfloat16-eager": ("int4_weight_only", "bfloat16", False, "static"),
    "llama.cpp-q8_0": ("llama.cpp", "q8_0", True, None),
    "llama.cpp-q4_1": ("llama.cpp", "q4_1", True, None),
}


# --- a peer, in its process ------------------------------------------------------------------------------------------


def make(name: str, folder: Path, new: int) -> Callable[[int], tuple[float, list[list[int]]]]:
    """What generates for a number of prompts, and returns the seconds and the new tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

    way, dtype, compiled, cache = PEERS[name]
    ids = prompts(AutoTokenizer.from_pretrained(folder))
    if way == "llama.cpp":
        from peers import llama_cpp

        generate = llama_cpp.generator(dtype, torch.get_num_threads(), new)
        return lambda batch: timed(lambda: generate(ids[:batch].tolist()))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    options["cache_implementation"] = cache
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if way == "float":
        model = model.to(getattr(torch, dtype))
        if compiled:
            # Transformers' own way, by which steps are compiled and the prompt is not; CPUs have to be asked for.
            options["compile_config"] = CompileConfig(mode="default", fullgraph=False)
            options["compile_config"]._compile_all_devices = True
    elif way == "torch.ao":
        # Not the head: it shares its weight with the embedding, and the others keep it in float too.
        layers = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
        spec = dict.fromkeys(layers - {"lm_head"}, torch.ao.quantization.default_dynamic_qconfig)
        model = torch.ao.quantization.quantize_dynamic(model, spec, dtype=torch.qint8)
    else:
        import hf_quant

        model = hf_quant.quantize_dynamic(model, way, progress=False)
        if dtype != "before":
            model = hf_quant.optimize(model, compile=compiled, dtype=dtype)

    def generate(batch: int) -> list[list[int]]:
        given = ids[:batch]
        return model.generate(given, attention_mask=torch.ones_like(given), **options)[:, PROMPT:].tolist()

    return lambda batch: timed(lambda: generate(batch))


def timed(call: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def prompts(tokenizer: Any) -> torch.Tensor:
    """The first tokens of the longest paragraphs of WikiText's test set, (8, 32)."""
    from datasets import load_dataset

    texts = load_dataset("parquet", data_files=str(WIKITEXT), split="train")["text"]
    texts = sorted(texts, key=len, reverse=True)[: max(BATCHES)]
    return torch.tensor([tokenizer(text.strip()).input_ids[:PROMPT] for text in texts])


def serve(name: str, folder: Path, threads: int, new: int) -> None:
    """Answers each number of prompts on stdin with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    torch.set_num_threads(threads)
    run = make(name, folder, new)
    for line in sys.stdin:
        seconds, tokens = run(int(line))
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


# --- the parent ------------------------------------------------------------------------------------------------------


class Peer:
    """The process of a peer, stopped except while it generates."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        folder = REPOSITORY / "build" / "generation"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.txt"
        command = [sys.executable, __file__, "--serve", name, "--model", str(options.model), "--new", str(options.new)]
        threads = str(options.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"), "TORCHINDUCTOR_COMPILE_THREADS": threads}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--threads", threads],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # its helpers stop and end with it
            )

    def generate(self, batch: int) -> dict[str, Any]:
        """Raises `RuntimeError` once the process has ended, with its last line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(batch, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            raise RuntimeError((self.log.read_text().strip().splitlines() or ["it ended without a word"])[-1][:300])
        self._signal(signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def measure(peers: dict[str, Peer], batch: int, seconds: float, rounds: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Tokens a second of each peer, and how many of its tokens are float32's."""
    tokens, times = {}, {name: [] for name in peers}
    for name, peer in peers.items():
        tokens[name] = peer.generate(batch)["tokens"]  # warm already, but after others have filled the caches
    start, done = time.perf_counter(), 0
    while done < rounds[0] or (done < rounds[1] and time.perf_counter() - start < seconds):
        names = list(peers)
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(peers[name].generate(batch)["seconds"])
        done += 1
    rows: dict[str, dict[str, Any]] = dict(summarize(times, BASE if BASE in peers else next(iter(peers))))
    for name, row in rows.items():
        row["tokens_per_s"] = batch * len(tokens[name][0]) / statistics.median(times[name])
        if BASE in tokens:
            expected = torch.tensor(tokens[BASE])
            row["tokens_as_float32"] = float((torch.tensor(tokens[name]) == expected).float().mean())
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="a folder with a decoder")
    parser.add_argument("--peers", help="by default all; without those in bfloat16 where a CPU does not multiply it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="about how long a batch size may take")
    parser.add_argument("--quick", action="store_true", help="8 tokens, two rounds, nothing is written")
    parser.add_argument("--new", type=int, default=NEW, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers is None:
        some = [name for name in PEERS if "bfloat16" not in name or native_bfloat16() is not None]
        options.peers = ",".join(some)
    if unknown := set(options.peers.split(",")) - set(PEERS):
        parser.error(f"unknown peer {sorted(unknown)[0]!r}; choose from {', '.join(PEERS)}")
    options.new = 8 if options.quick else options.new
    return options


def main() -> None:
    options = parse()
    if options.serve:
        serve(options.serve, options.model, options.threads, options.new)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that stopped processes do not stay
    peers: dict[str, Peer] = {}
    failed: dict[str, str] = {}
    first: dict[str, float] = {}
    try:
        for name in options.peers.split(","):
            start = time.perf_counter()
            peers[name] = Peer(name, options)
            try:
                for batch in BATCHES * 2:  # twice: a second batch size may compile the first one's graph anew
                    peers[name].generate(batch)
            except RuntimeError as error:
                failed[name] = str(error)
                peers.pop(name).close()
            first[name] = time.perf_counter() - start
            print(f"{name}: ready after {first[name]:.0f} s {failed.get(name, '')}", flush=True)
        rounds = (2, 2) if options.quick else ROUNDS
        cases = {f"batch{batch}": measure(peers, batch, options.seconds, rounds) for batch in BATCHES}
    finally:
        for peer in peers.values():
            peer.close()
    for case, rows in cases.items():
        print(f"\n{case}")
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["tokens_per_s"]):
            same = f"{row['tokens_as_float32']:7.1%} of tokens as float32" if "tokens_as_float32" in row else ""
            print(f"  {name:32} {row['tokens_per_s']:8.1f} tokens/s  x{row['ratio']:.3f}  {same}")
    if not options.quick:
        results = {"machine": {**machine(), "threads": options.threads}, "prompt": PROMPT, "new": options.new}
        write("generation", {**results, "ready_after_s": first, "failed": failed, "cases": cases})


if __name__ == "__main__":
    main()
