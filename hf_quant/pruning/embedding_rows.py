"""The model's side of a smaller vocabulary: all that is as long as the vocabulary, and all ids that a config holds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..quantization.sensitivity import first_output, output_sqnr

_PROVEN_LENGTH = 32
# Wrong rows leave less than 20 dB; float16 and bfloat16 products of another width may round otherwise.
_ENOUGH_DECIBELS = 40.0

_ID_FIELD = re.compile("(^|_)(token_ids?|token_index|to_id)$")
_LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_FIELDS_TO_UNSET = ("forced_decoder_ids", "force_words_ids", "sequence_bias", "constraints")

Change = tuple[MutableMapping[str, Any], str, Any]


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _id_stores(configs: Iterable[Any], rows: int) -> Iterator[tuple[dict[str, Any], str | None]]:
    """What holds ids of this vocabulary: the fields of each config, once, and the name of its field of the size."""
    seen: set[int] = set()
    for config in configs:
        size = getattr(config, "attribute_map", {}).get("vocab_size", "vocab_size")
        if id(config) not in seen and vars(config).get(size, rows) == rows:
            seen.add(id(config))
            yield vars(config), size if size in vars(config) else None


def _model_configs(model: PreTrainedModel) -> list[Any]:
    """The config, copies of it that a part of the model holds (T5's stacks), and the generation config."""
    held = [value for module in model.modules() for value in vars(module).values()]
    configs = [part for value in held if isinstance(value, PreTrainedConfig) for part in _configs(value)]
    generation = getattr(model, "generation_config", None)
    return configs + ([] if generation is None else [generation])


def special_ids(model: PreTrainedModel, rows: int) -> set[int]:
    """The ids that the model's configs name, as far as they are rows of its embedding."""
    ids: set[int] = set()

    def note(index: int) -> int:
        ids.add(index)
        return index

    for fields, _ in _id_stores(_model_configs(model), rows):
        for key, value in fields.items():
            if _ID_FIELD.search(key):
                _renumber(value, note, rows)
    return ids


def _renumber(value: Any, new: Callable[[int], int], rows: int) -> Any:
    """Ids replaced in a number, a list or the values of a dict; anything that is no id stays."""
    if isinstance(value, (list, tuple)):
        return [_renumber(part, new, rows) for part in value]
    if isinstance(value, dict):
        return {key: _renumber(part, new, rows) for key, part in value.items()}
    return new(value) if type(value) is int and 0 <= value < rows else value


def _without(value: Any, new: Mapping[int, int]) -> Any:
    """A list of ids, or of sequences of ids, without those that can no longer occur."""
    kept = [part for part in value if all(i in new for i in (part if isinstance(part, (list, tuple)) else [part]))]
    return kept or None


def _field_changes(configs: Iterable[Any], rows: int, new: Mapping[int, int]) -> list[Change]:
    changes: list[Change] = []
    sized = False
    for fields, size in _id_stores(configs, rows):
        for key in _FIELDS_TO_UNSET:
            if fields.get(key):
                raise ValueError(
                    f"the model's config sets {key}={fields[key]!r}, whose ids are not renumbered. Set it to None."
                )
        if size is not None:
            sized = True
            changes.append((fields, size, len(new)))
        for key, value in fields.items():
            if _ID_FIELD.search(key) and value is not None:
                changes.append((fields, key, _renumber(value, new.__getitem__, rows)))
            elif key in _LISTS_OF_IDS and value:
                changes.append((fields, key, _renumber(_without(value, new), new.__getitem__, rows)))
    if not sized:
        raise ValueError(
            f"no vocab_size in the model's config equals its {rows} rows, so a smaller one could not be loaded. Call "
            f"model.resize_token_embeddings({rows}) first, which sets it."
        )
    return changes


def find_changes(model: PreTrainedModel, rows: int, new: Mapping[int, int]) -> list[Change]:
    """All that changes, as (fields, name, new value): what differs between models built for both sizes."""
    if len(new) == rows:
        return []
    config = copy.deepcopy(model.config)
    for fields, key, value in _field_changes(_configs(config), rows, new):
        fields[key] = value
    with torch.device("meta"):
        before, after = (dict(type(model)(c).named_modules()) for c in (copy.deepcopy(model.config), config))

    changes = _field_changes(_model_configs(model), rows, new)
    kept = torch.tensor(list(new))
    tensors: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if name not in before:
            continue
        for key, value in vars(after[name]).items():
            if type(value) is int and value != vars(before[name]).get(key) and key in vars(module):
                changes.append((vars(module), key, value))
        for store in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, store).items():
                old, wanted = (getattr(models[name], store).get(key) for models in (before, after))
                if tensor is None or old is None or wanted is None or old.shape == wanted.shape:
                    continue
                smaller = tensors.get(id(tensor))
                if smaller is None:
                    smaller = tensors[id(tensor)] = _slice(f"{name}.{key}", tensor, old, wanted, rows, kept)
                changes.append((getattr(module, store), key, smaller))
    if id(model.get_input_embeddings().weight) not in tensors:
        raise ValueError(
            f"{type(model).__name__} cannot be built with a smaller embedding from its config: vocab_size does not "
            "set it. Its vocabulary cannot be made smaller."
        )
    return changes


def _slice(name: str, tensor: Tensor, old: Tensor, wanted: Tensor, rows: int, kept: Tensor) -> Tensor:
    follows = len(old.shape) == len(wanted.shape) and all(
        size == other or (size, other) == (rows, len(kept))
        for size, other in zip(old.shape, wanted.shape, strict=True)
    )
    if tensor.shape != old.shape or not follows:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}; the config makes it {tuple(old.shape)}, and {tuple(wanted.shape)} with "
            f"{len(kept)} of {rows} tokens: it does not follow the vocabulary by one row a token, and cannot be cut."
        )
    smaller = tensor.detach()
    for dim, (size, other) in enumerate(zip(old.shape, wanted.shape, strict=True)):
        if size != other:
            smaller = smaller.index_select(dim, kept.to(tensor.device))
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


@torch.no_grad()
def apply_changes(
    model: PreTrainedModel, changes: list[Change], new: Mapping[int, int], sequences: list[list[int]]
) -> float | None:
    """Make the changes; SQNR of the outputs, or `None` where the model does not run on text alone."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    undo = [(fields, key, fields[key]) for fields, key, _ in changes]
    try:
        try:
            expected = [_output(model, ids) for ids in sequences]
        except Exception:  # a model that wants images or sound besides refuses in its own way
            expected = []
        for fields, key, value in changes:
            fields[key] = value
        got = [_output(model, [new[index] for index in ids]) for ids in sequences[: len(expected)]]
        if not got:
            return None
        kept = torch.tensor(list(new), device=got[0].device)
        pairs = [
            (a if a.shape == b.shape else a.index_select(-1, kept), b) for a, b in zip(expected, got, strict=True)
        ]
        worst = min(output_sqnr(before, after) for before, after in pairs)
        if not worst >= _ENOUGH_DECIBELS:
            raise ValueError(
                f"with the smaller vocabulary the outputs of {type(model).__name__} would differ ({worst:.1f} dB; at "
                f"least {_ENOUGH_DECIBELS:.0f} are wanted): it uses the numbers of its ids. Its vocabulary cannot be "
                "made smaller."
            )
        return worst
    except BaseException:
        for fields, key, value in undo:
            fields[key] = value
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


def _output(model: PreTrainedModel, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids[:_PROVEN_LENGTH]], device=model.get_input_embeddings().weight.device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens
    return first_output(model, batch)
