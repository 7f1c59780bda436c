"""What tests of distillation share: data with other columns, and a run from start to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from tests.tiny import Sentences, make_trainer, weights_bytes


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """[`Sentences`] with further columns or other labels; `None` takes a column out."""

    def __init__(self, count: int = 32, **columns: Any) -> None:
        self.sentences = Sentences(count)
        self.columns = columns

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {**self.sentences[index], **{k: v if v is None else v[index] for k, v in self.columns.items()}}
        return {name: value for name, value in row.items() if value is not None}


def train(folder: Path, *callbacks: TrainerCallback, model: Any = None, resume: Any = None, **kwargs: Any) -> Trainer:
    trainer = make_trainer(folder, model, callbacks, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def saved(trainer: Trainer, folder: Path) -> bytes:
    trainer.save_model(str(folder))
    return weights_bytes(folder)
