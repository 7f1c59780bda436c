"""What pruning costs a training step: plain, and with a PruningCallback's work in each phase, interleaved.

MiniLM shape (6 layers, hidden 384), batch 32 x 64 with a third of the positions padding, AdamW, float32. The Linear
weights of the encoder, 10.6 million, are pruned. "inactive" is a callback before its `start_step`; the rest is what it
does between two updates of the masks. Updates, from 59 % to 79 % of zeros, are timed beside one forward of the same
batch in eval mode.

    python benchmarks/pruning_step.py [--rounds 20]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import interleave, show, summarize, write
from qat_step import BATCH, LENGTH, batch, minilm
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_quant import PruningCallback

STEPS = 1000
CRITERIA = ("magnitude", "movement", "first_order", "fisher", "block_fisher")


class Run:
    """One model in training, with the events that a Trainer would send to the callback."""

    def __init__(self, callback: PruningCallback | None, step: int, args: TrainingArguments) -> None:
        self.model = minilm()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.callback, self.args, self.control = callback, args, TrainerControl()
        self.state = TrainerState(max_steps=STEPS, is_world_process_zero=False)
        self.inputs = batch()
        self.event("on_init_end")
        self.event("on_train_begin")
        self.state.global_step = step

    def event(self, name: str) -> None:
        if self.callback is not None:
            getattr(self.callback, name)(self.args, self.state, self.control, model=self.model)

    def step(self) -> None:
        """The step is always the same one, so that every call costs the same."""
        self.model(**self.inputs).loss.backward()
        self.event("on_pre_optimizer_step")
        self.optimizer.step()
        self.event("on_optimizer_step")
        self.optimizer.zero_grad()
        self.event("on_step_end")


def callback(criterion: str, **arguments: Any) -> PruningCallback:
    settings = {"start_step": 100, "end_step": 600, "frequency": 20, **arguments}
    return PruningCallback(0.8, criterion=criterion, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    args = TrainingArguments(output_dir="build/pruning_step", report_to="none", use_cpu=True)

    between = 309  # updates are at 300, 320, ...
    runs = {"plain": Run(None, 0, args), "inactive": Run(callback("magnitude"), 10, args)}
    for criterion in CRITERIA:
        runs[criterion] = Run(callback(criterion, initial_sparsity=0.1), 119, args)
        runs[criterion].step()  # a first update, so that there are masks
        runs[criterion].state.global_step = between
    steps: dict[str, Callable[[], None]] = {name: run.step for name, run in runs.items()}
    results = {"step between updates": summarize(interleave(steps, arguments.rounds), "plain")}
    show(f"Training step, float32, batch {BATCH} x {LENGTH}", results["step between updates"])

    def forward() -> None:
        with torch.no_grad():
            runs["plain"].model.eval()(**runs["plain"].inputs)

    def update_of(run: Run) -> Callable[[], None]:
        run.state.global_step = 299

        def update() -> None:
            run.event("on_optimizer_step")
            run.state.global_step += 20  # the next one prunes more, as in training

        return update

    updates: dict[str, Callable[[], None]] = {"one forward": forward}
    for name in CRITERIA:
        updates[f"update by {name}"] = update_of(runs[name])
    results["update"] = summarize(interleave(updates, min(10, arguments.rounds)), "one forward")
    show("Update of the masks", results["update"])
    memory = {name: runs[name].callback.memory for name in CRITERIA}  # type: ignore[union-attr]
    write("pruning_step", {"batch": [BATCH, LENGTH], "steps": results, "kept_bytes": memory})


if __name__ == "__main__":
    main()
