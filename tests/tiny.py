"""Tiny real models, data and Trainers, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_quant import quantize_dynamic
from hf_quant.checkpoint import attach_quantizer
from hf_quant.quantization.convert import convert_qat
from hf_quant.quantization.qat import prepare
from hf_quant.schemes import SCHEMES
from hf_quant.targets import select_modules

VOCAB = 96

INT8_SCHEMES = tuple(sorted(name for name, scheme in SCHEMES.items() if not scheme.packed))


def tiny_bert(seed: int = 0, **config: Any) -> BertForSequenceClassification:
    """Two layers, width 32: 14 Linear layers, 3 embeddings and a classifier."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        # The usual 0.02 makes so small a model nearly linear; here activations should matter.
        "initializer_range": 0.2,
    }
    return BertForSequenceClassification(BertConfig(**{**sizes, **config}))


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Two layers, width 32; the LM head is tied to the embedding unless `tie_word_embeddings=False`."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def tiny_gpt2(seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """Two layers, width 32, built from transformers' Conv1D; the LM head is tied to the embedding."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **config}))


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random token ids, right-padded to one length, whose label follows from the ids.

    Args:
        count: how many.
        length: tokens, padding included.
        seed: of the ids.
        causal: labels for a language model (the ids themselves) instead of two classes.
    """

    def __init__(self, count: int = 32, length: int = 12, seed: int = 0, causal: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (count, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (count, 1), generator=generator)
        self.attention_mask = (torch.arange(length) < lengths).long()
        self.input_ids = ids * self.attention_mask
        two_classes = (self.input_ids[:, 1] > VOCAB // 2).long()
        self.labels = torch.where(self.attention_mask.bool(), ids, -100) if causal else two_classes

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "labels": self.labels[index],
        }

    def batch(self, count: int = 8) -> dict[str, Tensor]:
        """The first `count` rows without labels, as keyword arguments of `forward`."""
        return {"input_ids": self.input_ids[:count], "attention_mask": self.attention_mask[:count]}


def training_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Eight steps of four rows on the CPU, silent, without a reporter."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **changes})


def make_trainer(
    folder: Path,
    model: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    causal: bool = False,
    cls: type[Trainer] = Trainer,
    changes: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Trainer:
    """A real Trainer on [`Sentences`].

    Args:
        folder: where the run is kept.
        model: by default a tiny BERT, unless `model_init` is among `kwargs`.
        callbacks: passed on.
        causal: whether the labels are a language model's.
        cls: a subclass to make instead.
        changes: further `TrainingArguments`.
        kwargs: further arguments of the Trainer.
    """
    if model is None and "model_init" not in kwargs:
        model = tiny_bert()
    kwargs.setdefault("train_dataset", Sentences(32, causal=causal))
    kwargs.setdefault("eval_dataset", Sentences(16, seed=1, causal=causal))
    if not causal:
        kwargs.setdefault("compute_metrics", accuracy)
    return cls(
        model=model,
        args=training_arguments(folder, **(changes or {})),
        callbacks=list(callbacks),
        **kwargs,
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


@torch.no_grad()
def logits(model: PreTrainedModel, count: int = 8) -> Tensor:
    """The model's logits on fixed rows, in eval mode."""
    model.eval()
    return model(**Sentences(count, seed=7).batch(count)).logits  # type: ignore[no-any-return]


def weights_bytes(folder: str | Path) -> bytes:
    """The bytes of a folder's `model.safetensors`."""
    return (Path(folder) / "model.safetensors").read_bytes()


def folder_bytes(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    root = Path(folder)
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def int8_model(model: PreTrainedModel, scheme: str) -> Any:
    """The model in int8, whatever the scheme; static ranges are observed on fixed rows, without training."""
    if SCHEMES[scheme].activations != "static":
        return quantize_dynamic(model, scheme, progress=False)
    selection = select_modules(model, scheme=SCHEMES[scheme])
    state = prepare(model, SCHEMES[scheme], selection)
    state.observing = state.fake_quantizing = True
    with torch.no_grad():
        model.train()(**Sentences(16, seed=5).batch(16))
    convert_qat(model, state, SCHEMES[scheme], selection, [Sentences(4, seed=6).batch(4)])
    attach_quantizer(model)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words `w3` to `w95` and BERT's special tokens."""
    words = {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", model_max_length=32
    )
