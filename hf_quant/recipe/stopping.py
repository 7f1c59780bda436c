"""SIGINT and SIGTERM end a run with a checkpoint from which it goes on."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A run ended by a signal; a `SystemExit` with the exit code of one, 130 or 143.

    Args:
        number (`int`): of the signal.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(128 + number)


class StopOnSignal(TrainerCallback):
    """While a model trains, the first signal lets the step end and saves a checkpoint; a second one stops at once.

    At other times the first one stops at once: nothing is lost then that the last checkpoint does not have. Use it as
    a context, and pass it to the Trainer before callbacks that convert the model when training ends. Several
    processes stop after the same step, whichever of them got the signal.

    Outside of the main thread, where Python lets nobody set a handler, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.step: int | None = None
        self._training = False
        self._stopping: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something to save."""
        self._training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save where a signal came, in every process if in one."""
        self._stopping = _agree(self.received, args)
        if self._stopping is not None:
            args.save_only_model = False  # else it could not be resumed
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is there: stop."""
        if self._stopping is not None:
            self.step = state.global_step
            raise Stopped(self._stopping)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What comes now is done again by a resumed run."""
        self._training = False
        received = _agree(self.received, args)
        if received is not None:
            raise Stopped(received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None or not self._training:
            self.received = number
            raise Stopped(number)
        self.received = number
        # Not `print`: the signal may have come in the midst of one.
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving a checkpoint after this step; once more to stop at once\n".encode())


def _agree(received: int | None, args: TrainingArguments) -> int | None:
    """The signal that any process got."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return received
    highest = torch.tensor([received or 0], device=args.device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return int(highest) or None
