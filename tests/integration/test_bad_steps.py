"""Steps that make no schedule: an error with the value, what is allowed and the change to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant import QATCallback
from hf_quant.runtime.base import quantized_modules
from tests.tiny import make_trainer


class TestSteps:
    @pytest.mark.parametrize("name", ["start_step", "freeze_step"])
    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (-1, ValueError, r"`{}` counts optimizer steps, so it cannot be -1\. Use 0 or more\."),
            (1.5, ValueError, r"`{}`=1\.5 is a float, so it is a share .* in \[0, 1\)\. Write 1 without a point"),
            (1.0, ValueError, r"`{}`=1\.0 is a float.*Write 1 without a point to count steps"),
            (-0.5, ValueError, r"`{}`=-0\.5 is a float"),
            (float("nan"), ValueError, r"`{}`=nan is a float"),
            (float("inf"), ValueError, r"`{}`=inf is a float"),
            (True, TypeError, r"`{}` must be an int \(steps\) or a float in \[0, 1\) \(share of training\), got True"),
            ("0.5", TypeError, r"`{}` must be an int .*, got '0\.5'"),
            (None, TypeError, r"`{}` must be an int .*, got None"),
        ],
    )
    def test_what_is_no_step(self, name: str, value: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message.format(name)):
            QATCallback(**{name: value})

    @pytest.mark.parametrize(("start", "freeze"), [(5, 5), (6, 5), (0.5, 0.5), (0.95, 0.9), (0, 0)])
    def test_freeze_has_to_come_after_start(self, start: float, freeze: float) -> None:
        with pytest.raises(
            ValueError,
            match=rf"`freeze_step` \({freeze}\) must come after `start_step` \({start}\): ranges are observed between "
            r"them\. Lower `start_step` or raise `freeze_step`\.",
        ):
            QATCallback(start_step=start, freeze_step=freeze)

    @pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only"])
    def test_schemes_without_ranges_have_nothing_to_freeze(self, scheme: str, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, callbacks=[QATCallback(scheme, start_step=0.95)], changes={"max_steps": 40})
        trainer.train()
        assert quantized_modules(trainer.model)

    def test_an_int_and_a_share_are_compared_when_the_number_of_steps_is_known(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, callbacks=[QATCallback(start_step=5, freeze_step=0.5)])
        with pytest.raises(ValueError, match=r"`freeze_step` \(0\.5\) must come after `start_step` \(5\)"):
            trainer.train()

    @pytest.mark.parametrize("start", [8, 100])
    def test_start_after_the_end(self, start: int, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, callbacks=[QATCallback(start_step=start, freeze_step=200)])
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        with pytest.raises(
            ValueError,
            match=rf"`start_step` \({start}, step {start}\) is not before the end of training \(8 steps\): no QAT "
            r"phase is left\. Lower `start_step` or train longer\.",
        ):
            trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
        assert not list((tmp_path / "run").glob("checkpoint-*"))

    def test_training_stopped_before_anything_was_observed(self, tmp_path: Path) -> None:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = True

        trainer = make_trainer(tmp_path, callbacks=[QATCallback(start_step=3), Stop()])
        with pytest.raises(
            RuntimeError,
            match=r"training ended at step 1, before anything was observed \(`start_step` is step 3\), so the "
            r"model was left in float\. Train past `start_step`, or lower it\.",
        ):
            trainer.train()
        assert not quantized_modules(trainer.model)
