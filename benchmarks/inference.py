"""Seconds of a forward on CPU: hf_quant and its peers, each in a process of its own, taking turns.

    pip install -e ".[benchmarks]"
    python benchmarks/inference.py --shape minilm --threads 2
    python benchmarks/inference.py --shape bert-base --threads 2
    python benchmarks/inference.py --shape tiny --threads 1 --quick --peers float32,static,ort

MiniLM is the folder of `--model`, BERT-base has random weights. Cases: 1, 8 and 32 sentences of 128 tokens, and
batches of 32 real texts of MRPC and SST-2 in the order of the file, padded to the longest. All peers get the
same arrays.

The files of all peers are made first and kept in build/inference/<shape>, with what compilers write, so a run with
`--quick` makes the next one short; `--remake` starts anew. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine, write
from peers import PEERS
from peers.cases import REPOSITORY, TOKENIZER, make_cases, read
from peers.files import READS, STEPS
from peers.report import best_other, plot, write_table
from peers.worker import Worker

from hf_quant.runtime.cpu import native_bfloat16

SHAPES: dict[str, dict[str, int]] = {
    "minilm": {},  # what the folder of --model says
    "bert-base": {},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
}
PACKAGES = ("torch", "transformers", "torchao", "onnxruntime", "onnx", "openvino", "nncf", "compressed-tensors")
BASE = "float32"  # the peer that predictions are compared with, and that says how many batches fit
BATCHES = 8  # of each case of real texts, at most
MOST_ROUNDS = 40
ROOM = 1536  # MB that must be free before another peer starts


# --- files -----------------------------------------------------------------------------------------------------------


def make_files(options: argparse.Namespace, folder: Path, names: list[str]) -> dict[str, str]:
    """Make what the peers need and is not there yet; returns the steps that failed, with their reasons."""
    made_from = {"shape": options.shape, "model": str(options.model)}
    note = folder / "made_from.json"
    if options.remake or not note.is_file() or json.loads(note.read_text()) != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_float_model(options, folder / "float")
        make_cases(folder / "cases", BATCHES)
        note.write_text(json.dumps(made_from))
    needed = {PEERS[name].needs for name in names}
    needed |= {READS[step] for step in needed if step in READS}
    failed: dict[str, str] = {}
    for step in STEPS:
        if step not in needed or (folder / step).is_dir():
            continue
        if READS.get(step) in failed:
            failed[step] = failed[READS[step]]
            continue
        start = time.perf_counter()
        command = [sys.executable, "-m", "peers.files", str(folder), step, "--threads", str(options.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            (folder / f"{step}.txt").write_text(done.stdout + done.stderr)
            failed[step] = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]
        print(f"made {step} in {time.perf_counter() - start:.0f} s {failed.get(step, '')}", flush=True)
    return failed


def make_float_model(options: argparse.Namespace, folder: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    if options.shape == "minilm":
        if not (options.model / "config.json").is_file():
            raise SystemExit(f"--model {options.model} has no config.json: run `python scripts/fetch_quickstart.py`.")
        model = BertForSequenceClassification.from_pretrained(options.model, num_labels=2)
    else:
        model = BertForSequenceClassification(BertConfig(**SHAPES[options.shape]))
    model.save_pretrained(folder)


# --- peers -----------------------------------------------------------------------------------------------------------


class Fleet:
    """The running peers, and what is known of all: `rows[name]` holds figures, or `failed` with the reason."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def start(self, name: str, folder: Path, threads: int) -> None:
        """Start a peer and wait for its first answer, alone."""
        self.rows[name] = row = {}
        free = free_mb()
        if free is not None and free < ROOM:
            self._fail(name, f"not started: only {free:.0f} MB of memory were free; run it with fewer --peers")
            return
        start = time.perf_counter()
        self.workers[name] = worker = Worker(name, folder, threads)
        answer = self.ask(name, {}, timeout=600)
        if answer:
            row["first_answer_s"] = time.perf_counter() - start
            row["compiled_before"] = worker.compiled_before
            row["memory_mb"] = answer["memory_mb"]
            print(f"  {name}: first answer after {row['first_answer_s']:.1f} s, {row['memory_mb']:.0f} MB", flush=True)

    def ask(self, name: str, order: dict[str, Any], timeout: float = 300) -> dict[str, Any] | None:
        """The answer, or `None` once the peer has failed; it is then closed."""
        try:
            return self.workers[name].ask(order, timeout)
        except RuntimeError as error:
            self._fail(name, str(error))
            return None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def _fail(self, name: str, reason: str) -> None:
        print(f"  {name}: {reason}", flush=True)
        self.rows[name]["failed"] = reason
        if name in self.workers:
            self.workers.pop(name).close()


def free_mb() -> float | None:
    info = Path("/proc/meminfo")
    return int(info.read_text().split("MemAvailable:")[1].split()[0]) / 1024 if info.is_file() else None


# --- cases -----------------------------------------------------------------------------------------------------------


def run_case(fleet: Fleet, case: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Warm all peers up for a case, keep their logits, then let them take turns for about `--seconds`."""
    batches = read(folder / "cases" / f"{case}.npz")
    if options.quick:
        batches = batches[:1]
    if len(batches) > 1 and BASE in fleet.workers:
        fleet.ask(BASE, {"run": case, "batches": 1})
        one = fleet.ask(BASE, {"run": case, "batches": 1})
        if one:
            batches = batches[: max(1, int(options.seconds / 40 / one["seconds"]))]
    for name in list(fleet.workers):
        path = folder / "logits" / f"{name}-{case}.npy"
        answer = fleet.ask(name, {"warm": case, "batches": len(batches), "save": str(path)})
        if answer:
            fleet.rows[name]["memory_end_mb"] = answer["memory_mb"]
    least, most = (1, 1) if options.quick else (options.rounds, MOST_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in fleet.workers}
    rounds, began = 0, time.perf_counter()
    while fleet.workers and (rounds < least or (rounds < most and time.perf_counter() - began < options.seconds)):
        names = list(fleet.workers)
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            answer = fleet.ask(name, {"run": case, "batches": len(batches)})
            if answer:
                times[name].append(answer["seconds"])
            else:
                del times[name]
        rounds += 1
    if not times:
        return None
    masks = [batch["attention_mask"] for batch in batches]
    result = {
        "sentences": sum(len(mask) for mask in masks),
        "batches": len(batches),
        "tokens": int(sum(mask.sum() for mask in masks)),
        "positions": sum(mask.size for mask in masks),
        "rounds": rounds,
    }
    return {**result, "rows": case_rows(times, result["sentences"], result["tokens"] < result["positions"])}


def case_rows(times: dict[str, list[float]], sentences: int, padded: bool) -> dict[str, dict[str, float]]:
    """Medians and quartiles of each peer, and within-round ratios to the best other peer and to the products."""
    rows = {}
    for name, values in times.items():
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        rows[name] = {
            "median_ms": middle * 1e3,
            "q1_ms": low * 1e3,
            "q3_ms": high * 1e3,
            "sentences_per_s": sentences / middle,
        }
    other = best_other(rows)
    products = "products-unpadded" if padded else "products"
    for name, row in rows.items():
        if other is not None and PEERS[name].kind != "products":
            pairs = zip(times[other], times[name], strict=True)
            row["of_best_other"] = statistics.median(theirs / ours for theirs, ours in pairs)
        if products in times:
            pairs = zip(times[name], times[products], strict=True)
            row["of_products"] = statistics.median(ours / bare for ours, bare in pairs)
    return rows


def agreement(folder: Path, names: list[str], cases: list[str]) -> dict[str, dict[str, Any]]:
    """The share of predictions equal to float32's, and the SQNR of the logits in dB, over cases."""
    found = {}
    expected = [np.load(folder / "logits" / f"{BASE}-{case}.npy") for case in cases]
    for name in names:
        logits = np.concatenate([np.load(folder / "logits" / f"{name}-{case}.npy") for case in cases])
        reference = np.concatenate(expected)
        if logits.shape != reference.shape:
            continue  # the bare products have no logits
        noise = float(np.square(logits - reference).sum())
        found[name] = {
            "agreement": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
            "compared": len(reference),
            "sqnr_db": 10 * float(np.log10(np.square(reference).sum() / noise)) if noise else None,
        }
    return found


# --- command ---------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fine_tuned = REPOSITORY / "build" / "glue" / "mrpc" / "float"
    default = fine_tuned if fine_tuned.is_dir() else TOKENIZER
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--model", type=Path, default=default, help="a folder with MiniLM's weights (%(default)s)")
    parser.add_argument("--peers", default="", help=f"of {','.join(PEERS)}; all by default")
    parser.add_argument("--cases", default="", help="of batch1,batch8,batch32,mrpc,sst2; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25, help="about how long a case takes turns")
    parser.add_argument("--rounds", type=int, default=3, help="of a case, at least, however long they take")
    parser.add_argument("--quick", action="store_true", help="one round of one batch: tries out, and fills the caches")
    parser.add_argument("--remake", action="store_true", help="make the files of all peers anew")
    options = parser.parse_args()
    options.asked = bool(options.peers)
    options.peers = options.peers.split(",") if options.peers else list(PEERS)
    for name in options.peers:
        if name not in PEERS:
            parser.error(f"unknown peer {name!r}; choose from {', '.join(PEERS)}")
    return options


def pin(threads: int) -> None:
    """Keep this process, and those it starts, on as many cores as there are threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            raise SystemExit(f"--threads is {threads}, but this process may use {len(cores)} cores; ask for no more.")
        os.sched_setaffinity(0, cores[:threads])


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    options = parse()
    for ending in (signal.SIGTERM, signal.SIGHUP):  # peers are stopped most of the time, and would stay for ever
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    pin(options.threads)
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    folder = REPOSITORY / "build" / "inference" / options.shape
    failed = make_files(options, folder, options.peers)
    shutil.rmtree(folder / "logits", ignore_errors=True)
    (folder / "logits").mkdir()
    known = [path.stem for path in sorted((folder / "cases").glob("*.npz")) if path.stem != "calibration"]
    known.sort(key=lambda case: (not case.startswith("batch"), len(case), case))
    cases = options.cases.split(",") if options.cases else known
    if not set(cases) <= set(known):
        raise SystemExit(f"--cases is {options.cases}, but the cases here are {','.join(known)}.")
    results: dict[str, Any] = {
        "shape": options.shape,
        "machine": machine(),
        "versions": {package: version_of(package) for package in PACKAGES},
        "peers": {},
        "cases": {},
    }
    fleet = Fleet()
    try:
        print(f"files are there after {time.perf_counter() - began:.0f} s; starting the peers", flush=True)
        for name in options.peers:
            if PEERS[name].needs in failed:
                fleet.rows[name] = {"failed": failed[PEERS[name].needs]}
            elif "bf16" in name and not options.asked and native_bfloat16() is None:
                fleet.rows[name] = {"failed": "not started: this CPU has no bfloat16, and emulates it very slowly"}
            else:
                fleet.start(name, folder, options.threads)
        for case in cases:
            result = run_case(fleet, case, folder, options)
            if result:
                results["cases"][case] = result
                print_case(case, result, time.perf_counter() - began)
        texts = [case for case in cases if not case.startswith("batch")] or cases
        if BASE in fleet.workers and texts:
            for name, row in agreement(folder, list(fleet.workers), texts).items():
                fleet.rows[name].update(row)
    finally:
        fleet.close()
    results["peers"] = fleet.rows
    if options.quick:
        table = folder / "inference.md"
    else:
        write(f"inference_{options.shape}", results)
        table = RESULTS / f"inference_{options.shape}.md"
    write_table(table, results)
    try:
        plot(table.with_suffix(".svg"), results)
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib")
    print(f"{time.perf_counter() - began:.0f} s; the table is {table}")


def print_case(case: str, result: dict[str, Any], seconds: float) -> None:
    print(f"\n{case}: {result['sentences']} sentences, {result['rounds']} rounds; {seconds:.0f} s since the start")
    rows = result["rows"]
    for name in sorted(rows, key=lambda name: rows[name]["median_ms"]):
        row = rows[name]
        best = f"  {row['of_best_other']:5.2f} of the best other" if "of_best_other" in row else ""
        bare = f"  {row['of_products']:5.2f} x the bare products" if "of_products" in row else ""
        print(
            f"  {name:20} {row['median_ms']:9.2f} ms [{row['q1_ms']:.2f}, {row['q3_ms']:.2f}]"
            f"  {row['sentences_per_s']:9.1f} /s{best}{bare}",
            flush=True,
        )


if __name__ == "__main__":
    main()
