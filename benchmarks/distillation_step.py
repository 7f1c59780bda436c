"""What distillation costs a training step besides the teacher's forward: plain, and with each loss, interleaved.

MiniLM shape (6 layers, hidden 384), batch 32 x 64 with a third of the positions padding, AdamW, float32; and a Llama
of that shape with its vocabulary of 30,522, of which most of the step's time is the head. The teacher's outputs are
computed once and stand in for its forward, except in "cache", where they are read from disk. "inactive" is a callback
outside of its steps. Attention is compared with a plain step that computes it eagerly, as its distillation must.

    python benchmarks/distillation_step.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import interleave, show, summarize, write
from qat_step import BATCH, LENGTH, batch, minilm
from transformers import LlamaConfig, LlamaForCausalLM

from hf_quant.distillation.cache import TeacherCache
from hf_quant.distillation.hook import DistillationHook
from hf_quant.distillation.teacher import Teacher

LLAMA_BATCH = 8


class Precomputed(Teacher):
    """Gives the outputs of its first forward again, which is what subtracting the teacher's forward means."""

    known: Mapping[str, Any] | None = None

    def __call__(self, inputs: Mapping[str, Any], **requests: bool) -> Mapping[str, Any]:
        if self.known is None:
            self.known = super().__call__(inputs, **requests)
        return self.known


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30522, pad_token_id=0, **sizes)).train()


def words() -> dict[str, torch.Tensor]:
    rows = {name: value[:LLAMA_BATCH] for name, value in batch().items()}
    rows["labels"] = torch.where(rows["attention_mask"].bool(), rows["input_ids"], -100)
    return rows


class Run:
    """One model in training, taught by its own first weights."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> None:
        self.model, self.inputs = copy.deepcopy(model), inputs
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.hook: DistillationHook | None = None
        if options:
            active = options.pop("active", True)
            kind = Teacher if "cache" in options else Precomputed
            teacher = kind(copy.deepcopy(model), "a copy")
            if "cache" in options:
                options["cache"] = TeacherCache(options["cache"], teacher.identity())
            self.hook = DistillationHook(self.model, teacher, 0.5, 2.0, **options)
            self.hook.active = active
            self.model(**inputs)  # the teacher's outputs are known from here on
            if self.hook.cache is not None:
                self.hook.cache.flush()

    def step(self) -> None:
        self.model(**self.inputs).loss.backward()
        if self.hook is not None and self.hook.active:
            self.hook.check_used()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bert, rows, spoken = minilm(), batch(), words()
    eager = copy.deepcopy(bert)
    eager.set_attn_implementation("eager")
    decoder = llama()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        tables: dict[str, dict[str, Run]] = {
            f"BERT, batch {BATCH} x {LENGTH}": {
                "plain": Run(bert, rows),
                "inactive": Run(bert, rows, active=False),
                "predictions": Run(bert, rows, active=True),
                "predictions, cache": Run(bert, rows, cache=folder),
                "predictions, hidden states": Run(bert, rows, hidden_states=True),
            },
            f"BERT, eager attention, batch {BATCH} x {LENGTH}": {
                "plain": Run(eager, rows),
                "predictions, attention": Run(eager, rows, attention=True),
            },
            f"Llama, batch {LLAMA_BATCH} x {LENGTH}": {
                "plain": Run(decoder, spoken),
                "predictions": Run(decoder, spoken, active=True),
            },
        }
        for title, runs in tables.items():
            steps: dict[str, Callable[[], None]] = {name: run.step for name, run in runs.items()}
            results[title] = summarize(interleave(steps, arguments.rounds), "plain")
            show(f"Training step, float32, {title}", results[title])
    write("distillation_step", {"steps": results})


if __name__ == "__main__":
    main()
