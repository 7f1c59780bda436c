"""A teacher: a frozen model beside the one in training, loaded or copied, checked against it, and asked."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quantization.float_models import load_float
from ..quantization.qat import qat_modules
from ..texts import find_tokenizer

# What says nothing about what the model computes, or what transformers writes into a config by itself.
_IDLE_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "problem_type", "use_cache", "dtype")


class Teacher:
    """A model that is only asked: in eval mode, without gradients, part of no other module.

    Args:
        model (`torch.nn.Module`): put into eval mode.
        name (`str`): what messages call it.
        copied (`bool`, *optional*, defaults to `False`): whether it is a copy of the student.
    """

    def __init__(self, model: nn.Module, name: str, copied: bool = False) -> None:
        self.model = model.eval()
        self.name = name
        self.copied = copied
        self.precision: torch.dtype | None = None
        core = base_model(model)
        parameters = inspect.signature(core.forward).parameters
        self._accepts = set(parameters)
        any_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._named = {"return_dict": True} if any_keyword or "return_dict" in parameters else {}
        self._labels = {name for name in self._accepts if "label" in name} | {"start_positions", "end_positions"}
        self.encoder_decoder = bool(getattr(getattr(core, "config", None), "is_encoder_decoder", False))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the student's keyword arguments this model takes too; never labels.

        An encoder-decoder without `decoder_input_ids` makes them from the labels, so there it gets these.
        """
        taken = {
            name: value
            for name, value in batch.items()
            if value is not None and name in self._accepts and name not in self._labels and not _is_request(name)
        }
        if self.encoder_decoder and "decoder_input_ids" not in taken and batch.get("labels") is not None:
            taken["labels"] = batch["labels"]
        if "use_cache" in self._accepts:
            taken["use_cache"] = False
        return taken

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], **requests: bool) -> Mapping[str, Any]:
        """The outputs for [`~Teacher.inputs`], by name, in the precision of training."""
        if self.model.training:
            self.model.eval()
        device = next(self.model.parameters()).device
        autocast: Any = contextlib.nullcontext()
        if self.precision is not None:
            autocast = torch.autocast(device.type, self.precision)
        with autocast:
            outputs = self.model(**inputs, **self._named, **requests)
        return outputs

    def to(self, device: torch.device) -> None:
        """Move it, unless it is there already."""
        if any(parameter.device != device for parameter in self.model.parameters()):
            self.model.to(device)

    def weights(self) -> str:
        """SHA-256 of its class and weights; for a copy of the student without what callbacks put into buffers."""
        digest = hashlib.sha256(type(base_model(self.model)).__name__.encode())
        tensors = dict(self.model.named_parameters())
        if not self.copied:
            tensors |= dict(self.model.named_buffers())  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """What its outputs depend on: weights, config and precision."""
        config = getattr(base_model(self.model), "config", None)
        settings = config.to_diff_dict() if config is not None else {}
        said = json.dumps({k: v for k, v in settings.items() if k not in _IDLE_SETTINGS}, sort_keys=True, default=str)
        return {
            "class": type(base_model(self.model)).__name__,
            "weights": self.weights(),
            "config": hashlib.sha256(said.encode()).hexdigest(),
            "autocast": str(self.precision),
        }


def _is_request(name: str) -> bool:
    """Arguments that ask for something instead of saying something."""
    return name.startswith("output_") or name in ("return_dict", "use_cache", "num_items_in_batch", "past_key_values")


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def self_teacher(student: nn.Module) -> Teacher:
    """A frozen copy of the student's float weights as they are now.

    A student that is prepared for QAT already is copied with its QAT modules, whose fake-quant is off in the copy:
    they then compute exactly what the float modules do.
    """
    with torch.random.fork_rng(devices=[]):
        model = copy.deepcopy(student)
    for module in qat_modules(model).values():
        module.state.observing = module.state.fake_quantizing = False
    # An Accelerator that has wrapped the student's forward in autocast; the teacher's is its own affair.
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    return Teacher(model.requires_grad_(False), f"{type(student).__name__} as it was before training", copied=True)


def load_teacher(teacher: str | os.PathLike[str] | nn.Module, student: nn.Module, attention: bool) -> Teacher:
    """A teacher from a folder, a hub id or a model.

    Args:
        teacher: where it lies, or the model itself.
        student (`torch.nn.Module`): the model in training, whose dtype a loaded teacher gets.
        attention (`bool`): whether its attention is wanted; a loaded one then computes it eagerly.

    Raises:
        `ValueError`: if the checkpoint is quantized or damaged, or the teacher is the student.
    """
    if isinstance(teacher, nn.Module):
        own = {id(parameter) for parameter in student.parameters()}
        if teacher is student or any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError(
                "the teacher shares its weights with the student, so it would learn along. Leave out `teacher` to "
                "teach the model by what it was before training, or load another one."
            )
        path = getattr(teacher, "name_or_path", "")
        return Teacher(teacher, type(teacher).__name__ + (f" ({path})" if path else ""))
    dtype = next(parameter.dtype for parameter in student.parameters() if parameter.is_floating_point())
    eager: dict[str, Any] = {"attn_implementation": "eager"} if attention else {}
    with torch.random.fork_rng(devices=[]):  # a head that is made anew would draw from the run's random numbers
        model = load_float(teacher, dtype=dtype, **eager)
    return Teacher(model.requires_grad_(False), os.fspath(teacher))


def require_attention(whose: str, model: nn.Module) -> None:
    """Refuse a model whose attention gives no probabilities.

    Raises:
        `ValueError`: if its implementation is not `"eager"`.
    """
    kind = getattr(getattr(base_model(model), "config", None), "_attn_implementation", None)
    if kind not in (None, "eager"):
        raise ValueError(
            f"`attention` needs attention probabilities, which the {whose}'s attention {kind!r} does not give. Load "
            "it with from_pretrained(..., attn_implementation='eager'), or leave `attention` out."
        )


def check_teacher(student: nn.Module, teacher: Teacher, processing_class: Any = None) -> None:
    """Refuse a teacher that reads other tokens or gives other answers than the student.

    Args:
        student (`torch.nn.Module`): the model in training.
        teacher ([`Teacher`]): a frozen model.
        processing_class (*optional*): the student's tokenizer, compared with the one in the teacher's folder.

    Raises:
        `ValueError`: naming both sides.
    """
    core, other = base_model(student), base_model(teacher.model)
    mine, theirs = getattr(core, "config", None), getattr(other, "config", None)
    if mine is None or theirs is None:
        return
    sizes = [getattr(config.get_text_config(), "vocab_size", None) for config in (mine, theirs)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has a vocabulary of {sizes[0]} tokens, the teacher {teacher.name} one of {sizes[1]}: an id "
            "would mean another token. Use a teacher with the student's tokenizer."
        )
    if None not in sizes:
        _check_tokens(processing_class, teacher)
    names = [dict(sorted((int(k), v) for k, v in (config.id2label or {}).items())) for config in (mine, theirs)]
    if "Classification" in type(core).__name__ and names[0] != names[1]:
        raise ValueError(
            f"the student's labels are {names[0]}, those of the teacher {teacher.name} are {names[1]}: output i must "
            "mean the same to both. If only names differ, set `id2label` and `label2id` of the config; if the order "
            "does, train the student's head in the teacher's order."
        )


def _check_tokens(processing_class: Any, teacher: Teacher) -> None:
    place = str(getattr(base_model(teacher.model), "name_or_path", "") or "")
    if not hasattr(processing_class, "get_vocab") or not Path(place).is_dir():
        return
    try:
        theirs = find_tokenizer(None, [place]).get_vocab()
    except ValueError:
        return  # a folder without a tokenizer says nothing about tokens
    mine = processing_class.get_vocab()
    if mine != theirs:
        token = min(
            (token for token in {**mine, **theirs} if mine.get(token) != theirs.get(token)),
            key=lambda token: (token not in mine or token not in theirs, token),
        )
        raise ValueError(
            f"the tokenizers differ: {token!r} is id {mine.get(token, 'none')} in the student's "
            f"({getattr(processing_class, 'name_or_path', '') or type(processing_class).__name__}), "
            f"{theirs.get(token, 'none')} in the teacher's ({place}). Use a teacher with the student's tokenizer."
        )
