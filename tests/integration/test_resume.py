"""Checkpoints in the middle of a run: resuming ends in the bytes of the run left alone; plain readers load them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_quant import QATCallback, load_quantized
from hf_quant.quantization.qat import qat_modules
from hf_quant.schemes import SCHEMES
from tests.tiny import logits, make_trainer, tiny_bert, tiny_gpt2, tiny_llama, weights_bytes

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, "logging_steps": 1}
# Fake-quant from step 2, ranges frozen from step 6: checkpoints before, at the edges of, in, and after observing.
STEPS: dict[str, Any] = {"start_step": 2, "freeze_step": 6}


def _run(folder: Path, scheme: str, changes: dict[str, Any] | None = None, **kwargs: Any) -> tuple[Trainer, bytes]:
    """Train and give the int8 bytes; `resume` names a step of an earlier run in the same folder."""
    resume = kwargs.pop("resume", None)
    callback = QATCallback(scheme, **STEPS)
    trainer = make_trainer(folder, callbacks=[callback], changes={**SAVING, **(changes or {})}, **kwargs)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / "run" / f"checkpoint-{resume}"))
    trainer.save_model(str(folder / "int8"))
    return trainer, weights_bytes(folder / "int8")


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_resumed_in_any_phase_it_ends_in_the_same_bytes(scheme: str, tmp_path: Path) -> None:
    whole, expected = _run(tmp_path, scheme)
    for step in (1, 2, 4, 6, 7):
        resumed, got = _run(tmp_path, scheme, {"save_strategy": "no"}, resume=step)
        assert got == expected, f"resumed from step {step}"
        ours = [entry for entry in resumed.state.log_history if "loss" in entry]
        theirs = [entry for entry in whole.state.log_history if "loss" in entry]
        for key in ("loss", "qat_phase", "qat_weight_sqnr_db", "qat_range_max"):
            assert [entry.get(key) for entry in ours] == [entry.get(key) for entry in theirs], key


@pytest.mark.parametrize(("maker", "causal"), [(tiny_llama, True), (tiny_gpt2, True)])
def test_decoders_resume_to_the_same_bytes(maker: Any, causal: bool, tmp_path: Path) -> None:
    _, expected = _run(tmp_path, "int8_static", model=maker(), causal=causal)
    _, got = _run(tmp_path, "int8_static", {"save_strategy": "no"}, model=maker(), causal=causal, resume=4)
    assert got == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"restore_callback_states_from_checkpoint": True},
        {"max_steps": -1, "num_train_epochs": 1},
    ],
    ids=["bf16", "accumulation", "callback states", "epochs"],
)
def test_resumes_to_the_same_bytes_with(changes: dict[str, Any], tmp_path: Path) -> None:
    _, expected = _run(tmp_path, "int8_static", changes)
    _, got = _run(tmp_path, "int8_static", {**changes, "save_strategy": "no"}, resume=4)
    assert got == expected


def test_with_a_model_init_the_callback_is_attached(tmp_path: Path) -> None:
    def model_init() -> nn.Module:
        with torch.random.fork_rng():
            return tiny_bert()

    def trainer(**changes: Any) -> Trainer:
        made = make_trainer(tmp_path, model_init=model_init, changes={**SAVING, **changes})
        QATCallback(**STEPS).attach(made)
        return made

    whole = trainer()
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    resumed = trainer(save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    resumed.save_model(str(tmp_path / "resumed"))
    assert weights_bytes(tmp_path / "resumed") == weights_bytes(tmp_path / "whole")


def test_with_a_model_init_a_callback_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    def model_init() -> nn.Module:
        return tiny_bert()

    make_trainer(tmp_path, callbacks=[QATCallback(**STEPS)], changes=SAVING).train()
    late = make_trainer(tmp_path, callbacks=[QATCallback(**STEPS)], model_init=model_init, changes=SAVING)
    with pytest.raises(
        ValueError,
        match=r"training resumes at step 4, after `start_step` \(step 2\), but no activation ranges were loaded.*"
        r"call \.attach\(trainer\) before train\(\)",
    ):
        late.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_callback_added_after_the_trainer_was_made_is_prepared_by_attach(tmp_path: Path) -> None:
    _, expected = _run(tmp_path, "int8_static")
    trainer = make_trainer(tmp_path, changes={**SAVING, "save_strategy": "no"})
    QATCallback(**STEPS).attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    trainer.save_model(str(tmp_path / "attached"))
    assert weights_bytes(tmp_path / "attached") == expected


def _drop(checkpoint: Path, wanted: str) -> int:
    """Remove tensors from a checkpoint, as a program that saves only what it knows would."""
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if wanted not in name}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return len(tensors) - len(kept)


def test_dropped_ranges_are_not_made_up(tmp_path: Path) -> None:
    make_trainer(tmp_path, callbacks=[QATCallback(**STEPS)], changes=SAVING).train()
    assert _drop(tmp_path / "run" / "checkpoint-4", ".observer.") == 3 * 13
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(**STEPS)], changes=SAVING)
    with pytest.raises(ValueError, match=r"training resumes at step 4, after `start_step` \(step 2\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


@pytest.mark.parametrize("step", [4, 7])
@pytest.mark.parametrize(("before", "after"), [({"ignore": ["*.key"]}, {}), ({}, {"ignore": ["*.key"]})])
def test_other_targets_are_refused(before: dict[str, Any], after: dict[str, Any], step: int, tmp_path: Path) -> None:
    """A layer that was not observed has no range, and one that was trained as int8 is not to be float."""
    make_trainer(tmp_path, callbacks=[QATCallback(**STEPS, **before)], changes=SAVING).train()
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(**STEPS, **after)], changes=SAVING)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0\.attention\.self\.key.*targets"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))


def test_plain_checkpoint_resumes_where_start_step_is_later(tmp_path: Path) -> None:
    """QAT decided on half way: the first steps were plain training."""
    make_trainer(tmp_path, changes=SAVING).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    late = make_trainer(tmp_path, callbacks=[QATCallback(start_step=3)], changes=SAVING)
    with pytest.raises(ValueError, match=r"saved without QATCallback, set `start_step` to 4 or later"):
        late.train(resume_from_checkpoint=checkpoint)
    callback = QATCallback(start_step=4)
    trainer = make_trainer(tmp_path, callbacks=[callback], changes={**SAVING, "save_strategy": "no"})
    trainer.train(resume_from_checkpoint=checkpoint)
    assert callback.conversion is not None


def test_another_scheme_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, callbacks=[QATCallback("int8_dynamic", **STEPS)], changes=SAVING).train()
    trainer = make_trainer(tmp_path, callbacks=[QATCallback("int8_weight_only", **STEPS)], changes=SAVING)
    with pytest.raises(
        ValueError,
        match=r"trained for scheme 'int8_dynamic', but this QATCallback has 'int8_weight_only'\. Use the same scheme",
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_record_in_the_checkpoint_is_plain_json(tmp_path: Path) -> None:
    make_trainer(tmp_path, callbacks=[QATCallback(**STEPS)], changes=SAVING).train()
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    record = state["stateful_callbacks"]["hf_quant.qat"]
    assert (record["scheme"], record["start_step"], record["freeze_step"]) == ("int8_static", 2, 6)


def test_plain_trainer_resumes_a_qat_checkpoint(tmp_path: Path) -> None:
    """Without the callback: unexpected keys are dropped, the weights are a float model's."""
    make_trainer(tmp_path, callbacks=[QATCallback(**STEPS)], changes=SAVING).train()
    trainer = make_trainer(tmp_path, changes={**SAVING, "save_strategy": "no"})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("step", [1, 4, 8])
def test_checkpoints_load_with_plain_from_pretrained(step: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(convert=False, **STEPS)], changes=SAVING)
    trainer.train()
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / f"checkpoint-{step}", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(".activation_fake_quant." in key for key in info["unexpected_keys"])
    assert not hasattr(model, "hf_quantizer")
    if step == 8:
        for name, value in trainer.model.named_parameters():
            assert torch.equal(value, model.get_parameter(name)), name


def test_ranges_of_a_checkpoint_are_the_models(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            seen[state.global_step] = {
                name: value.clone() for name, value in model.state_dict().items() if ".observer." in name
            }

    seen: dict[int, dict[str, Tensor]] = {}
    make_trainer(tmp_path, callbacks=[QATCallback(**STEPS), Watch()], changes=SAVING).train()
    stored = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert len(seen[4]) == 3 * 13
    assert all(torch.equal(stored[name], value) for name, value in seen[4].items())


class Headed(nn.Module):
    """Applies one more layer in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.evaluated = tiny_bert(), nn.Linear(2, 2)
        nn.init.eye_(self.evaluated.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        output = self.base(input_ids, attention_mask=attention_mask, labels=labels)
        if not self.training:
            output.logits = self.evaluated(output.logits)
        return output


def test_layer_used_only_in_evaluation_is_skipped_after_a_resume_too(tmp_path: Path) -> None:
    changes = {**SAVING, "eval_strategy": "steps", "eval_steps": 1}

    def outputs(resume: int | None) -> list[Tensor]:
        class Keep(TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
                seen.append(logits(model).clone())
                model.train()

        seen: list[Tensor] = []
        trainer = make_trainer(tmp_path, Headed(), [QATCallback(convert=False, **STEPS), Keep()], changes=changes)
        trainer.train(
            resume_from_checkpoint=None if resume is None else str(tmp_path / "run" / f"checkpoint-{resume}")
        )
        return seen

    whole, resumed = outputs(None), outputs(5)
    assert len(resumed) == 3
    for ours, theirs in zip(resumed, whole[-3:], strict=True):
        assert torch.equal(ours, theirs)


def test_interrupted_and_taken_up_again_in_the_same_process(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5 and not interrupted:
                interrupted.append(5)
                raise KeyboardInterrupt

    _, expected = _run(tmp_path / "whole", "int8_static")
    interrupted: list[int] = []
    trainer = make_trainer(tmp_path, callbacks=[QATCallback(**STEPS), Interrupt()], changes=SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(tmp_path / "int8"))
    assert weights_bytes(tmp_path / "int8") == expected


def test_resuming_a_finished_run_converts_it(tmp_path: Path) -> None:
    _, expected = _run(tmp_path, "int8_static")
    trainer, got = _run(tmp_path, "int8_static", {"save_strategy": "no"}, resume=8)
    assert trainer.state.global_step == 8
    assert got == expected


@pytest.mark.slow
def test_killed_between_two_checkpoints_and_resumed_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import tests.conftest, torch
        from tests.tiny import make_trainer
        from transformers import TrainerCallback
        from hf_quant import QATCallback

        torch.set_num_threads(1)
        folder, kill_at, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10}
        callbacks = [QATCallback(start_step=2, freeze_step=8), Kill()]
        trainer = make_trainer(folder, callbacks=callbacks, changes=changes)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(folder / "int8"))
        """
    )

    def run(folder: Path, kill_at: int, resume: str) -> int:
        command = [sys.executable, "-c", code, str(folder), str(kill_at), resume]
        return subprocess.run(command, cwd=Path(__file__).parents[2], timeout=240, check=False).returncode

    assert run(tmp_path / "whole", 0, "fresh") == 0
    assert run(tmp_path / "killed", 5, "fresh") == -9
    assert not (tmp_path / "killed" / "int8").exists()
    assert run(tmp_path / "killed", 0, "resume") == 0
    assert weights_bytes(tmp_path / "killed" / "int8") == weights_bytes(tmp_path / "whole" / "int8")
    assert not qat_modules(load_quantized(tmp_path / "killed" / "int8"))
