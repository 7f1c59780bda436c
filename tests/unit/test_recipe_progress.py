"""The names of a training's phases are those that the callbacks themselves are in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from hf_quant import PruningCallback, QATCallback
from hf_quant.callbacks.distillation import DistillationCallback
from hf_quant.recipe.progress import TrainingProgress, phase_names
from tests.tiny import make_trainer


class Watch(TrainerCallback):
    """Notes what each step really did, and what it was called."""

    def __init__(self, pruning: PruningCallback, qat: QATCallback, distillation: DistillationCallback) -> None:
        self.callbacks = (pruning, distillation, qat)
        self.names: list[list[str]] = []
        self.states: list[tuple[bool, bool, bool]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _, distillation, qat = self.callbacks
        self.names.append(phase_names(self.callbacks, state.global_step, state.max_steps))
        assert qat._qat is not None
        assert distillation._hook is not None
        self.states.append((qat._qat.fake_quantizing, qat._qat.observing, distillation._hook.active))


def test_phases_are_named_as_the_callbacks_have_them(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, start_step=1, end_step=4, frequency=1)
    qat = QATCallback(start_step=3, freeze_step=6)
    distillation = DistillationCallback(start_step=2, end_step=7)
    watch = Watch(pruning, qat, distillation)
    screen = io.StringIO()
    progress = TrainingProgress(
        "int8", Console(file=screen, force_terminal=True, width=120), [pruning, distillation, qat]
    )
    trainer = make_trainer(
        tmp_path, callbacks=[pruning, distillation, qat, watch, progress], changes={"disable_tqdm": False}
    )
    trainer.train()
    for names, (fake_quantizing, observing, teaching) in zip(watch.names, watch.states, strict=True):
        assert ("QAT" in names) == (fake_quantizing and observing)
        assert ("QAT with frozen ranges" in names) == (fake_quantizing and not observing)
        assert ("distillation" in names) == teaching
    pruned = [step for step, names in enumerate(watch.names, 1) if "pruning" in names]
    assert pruned == [step for step, _, _ in pruning.history]
    assert watch.names[0] == ["pruning"]
    assert watch.names[3] == ["pruning", "distillation", "QAT"]
    assert watch.names[7] == ["QAT with frozen ranges"]
    assert "training int8: QAT with frozen ranges" in screen.getvalue()


def test_dynamic_schemes_have_no_frozen_ranges() -> None:
    assert phase_names([QATCallback("int8_dynamic", start_step=2)], 9, 10) == ["QAT"]
    assert phase_names([QATCallback("int8_dynamic", start_step=2)], 1, 10) == []
    twice = [PruningCallback(0.5, start_step=0, end_step=4) for _ in range(2)]
    assert phase_names(twice, 2, 10) == ["pruning"]
    assert phase_names([PruningCallback(schedule="constant"), TrainerCallback()], 2, 10) == []
