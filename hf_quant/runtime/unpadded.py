"""Padded batches run as several batches with little or no padding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .grouping import split_batch

logger = logging.getLogger(__name__)

# Arguments with one entry for each token: (batch, length, ...), or one row for all.
_PER_TOKEN = frozenset(
    ("attention_mask", "bbox", "input_ids", "inputs_embeds", "position_ids", "task_type_ids", "token_type_ids")
)
Skipping = Callable[[Sequence[int], int], contextlib.AbstractContextManager[None]]
# Of a batch whose padding is left out but not cut: halves of fewer, from which its outputs are learned, would be
# batches of one, for which a compiled forward has a graph of their own.
_LEAST_ROWS = 4
# Marks in the shape of an output for what differs from batch to batch.
_ROWS, _LENGTH = -1, -2
# Of an output's root mean square. Roundings of int8 and bfloat16 were seen to change a token of a 24-layer model by up
# to 0.12 of it; what a model makes of padding that it does not ignore is larger.
_TOLERANCE = 0.25


class UnpaddedForward:
    """A model's forward for batches with padding that computes little of the padding.

    Rows are sorted by length and run in the groups of [`split_batch`], each cut to its longest row. Outputs come back
    in the caller's order, type and shapes, as on the whole batch. Positions of padding hold 0; in outputs of
    (batch, length), which are scores of positions, the lowest number of their dtype: padding is never the best.

    Which dimensions of an output are rows and tokens is learned from the first batch with padding of each combination
    of arguments: it runs whole as well, and is compared. Where anything is not understood, or differs, batches of that
    combination run whole from then on, and a warning says why. Run whole at once, without a warning, are batches
    without a 2-D `attention_mask` of ones and then zeros (or zeros and then ones), and with arguments other than flags
    and tensors of one entry for each token (labels, caches, images, a decoder's inputs).

    Where the forward can leave padding out by itself (`skipping`), groups are fewer, and hold rows of several lengths.

    Batches of more than `most` tokens are split too, with or without padding: what lies between two layers then stays
    in the CPU's caches.

    Padding on the left is only cut where that moves no position: `position_ids` are given, or rotary.

    Args:
        forward (callable): of a model, bound; its outputs have the rows of the batch as first dimension.
        config (`PreTrainedConfig`): of the model.
        overhead (`int`, *optional*, defaults to 64): what one more forward costs, in tokens, at least 0.
        most (`int`, *optional*, defaults to 2048): tokens that a forward of several rows may have, at least 1.
        skipping (callable, *optional*): of the lengths of rows and the length of their batch, gives a context in which
            the forward computes none of the padding at the end of rows, and attends to none.

    Raises:
        `ValueError`: if `overhead` is negative, or `most` is less than 1.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        config: Any,
        overhead: int = 64,
        most: int = 2048,
        skipping: Skipping | None = None,
    ) -> None:
        split_batch([], overhead, most)  # checks them
        # Not the attributes: a compiled forward's would make Dynamo take this object for that one.
        functools.update_wrapper(self, forward, updated=())
        self.__signature__ = inspect.signature(forward)
        self._forward = forward
        self._overhead, self._most, self._skipping = overhead, most, skipping
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [name for name, value in self.__signature__.parameters.items() if value.kind in kinds]
        self._relative, self._splits = _has_rotary_positions(config), _may_be_split(config, self.__signature__)
        self._layouts: dict[Any, _Layout | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward."""
        # A tracer would keep the groups of one batch for all.
        if not self._splits or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._forward(*args, **kwargs)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        padding = _read_padding(given) if len(args) <= len(self._names) else None
        if padding is None or (padding.left and not self._relative and given.get("position_ids") is None):
            return self._forward(*args, **kwargs)
        groups = split_batch(padding.lengths, self._overhead, self._most)
        nothing_to_cut = len(groups) == 1 and padding.longest(groups[0]) == padding.total
        if nothing_to_cut and (len(groups[0]) < _LEAST_ROWS or not self._may_skip(padding, groups[0])):
            return self._forward(*args, **kwargs)

        flags = {name: "given" if isinstance(value, Tensor) else value for name, value in given.items()}
        key = (padding.left, frozenset((name, value) for name, value in flags.items() if value is not None))
        if key not in self._layouts:
            return self._learn(key, padding, groups, args, kwargs)
        layout = self._layouts[key]
        if layout is None:
            return self._forward(*args, **kwargs)
        try:
            return _join(list(self._run(padding, groups, args, kwargs)), groups, padding, layout)
        except Exception:  # whatever it is: the whole batch decides whether it is the caller's
            return self._learn(key, padding, groups, args, kwargs)

    def _run(
        self, padding: _Padding, groups: list[list[int]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[Any]:
        for rows in groups:
            cut = functools.partial(padding.cut, rows=rows)
            given, named = list(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
            with self._leaving_out(padding, rows):
                output = self._forward(*given, **named)
            yield output

    def _may_skip(self, padding: _Padding, rows: list[int]) -> bool:
        """Whether the forward can leave out padding of a group, and there is some."""
        lengths = [padding.lengths[row] for row in rows]
        # With as many rows as tokens, a model that swaps the two dimensions would leave out others.
        return self._skipping is not None and not padding.left and min(lengths) < max(lengths) != len(rows)

    def _leaving_out(self, padding: _Padding, rows: list[int]) -> contextlib.AbstractContextManager[None]:
        if self._skipping is None or not self._may_skip(padding, rows):
            return contextlib.nullcontext()
        return self._skipping([padding.lengths[row] for row in rows], padding.longest(rows))

    def _learn(
        self, key: Any, padding: _Padding, groups: list[list[int]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The outputs of the whole batch, after noting how those of groups become the same."""
        whole = self._forward(*args, **kwargs)
        self._layouts[key] = None
        if len(groups) == 1:  # two, so that the dimension of the rows shows
            half = len(groups[0]) // 2
            groups = [groups[0][:half], groups[0][half:]]
        try:
            _refuse_other_outputs(whole)
            parts = list(self._run(padding, groups, args, kwargs))
            seen = [(part, len(rows), padding.longest(rows)) for part, rows in zip(parts, groups, strict=True)]
            if padding.total > 1 and all(length == padding.total for _, _, length in seen):
                # A token less, so that the dimension of the tokens shows too.
                shorter = dataclasses.replace(padding, lengths=[padding.total - 1] * len(padding.lengths))
                seen += [
                    (part, len(groups[0]), padding.total - 1) for part in self._run(shorter, groups[:1], args, kwargs)
                ]
            layout = _find_layout(whole, seen, padding)
            _compare(whole, _join(parts, groups, padding, layout), padding, layout)
        except Exception as error:  # whatever the model does not take; the whole batch is right
            logger.warning("batches run with their padding: %s", error)
        else:
            self._layouts[key] = layout
        return whole


@dataclass(frozen=True)
class _Padding:
    """Where the padding of a batch is."""

    mask: Tensor  # bool, (batch, length): False for padding
    lengths: list[int]  # at least 1: an empty row is run as one token
    total: int
    left: bool

    def longest(self, rows: Sequence[int]) -> int:
        return max(self.lengths[row] for row in rows)

    def kept(self, length: int) -> slice:
        """Which positions of the whole batch a group of that length holds."""
        return slice(self.total - length, None) if self.left else slice(length)

    def cut(self, value: Any, rows: Sequence[int]) -> Any:
        """Some rows of an argument, without the padding that they share; a new tensor."""
        if not isinstance(value, Tensor):
            return value
        value = value[:, self.kept(self.longest(rows))]
        if value.shape[0] == len(self.lengths):
            value = value[torch.tensor(rows, device=value.device)]
        # Plain strides: a compiled forward would compile anew for others.
        return value.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Layout:
    """How outputs are built: their structure, and for each tensor its shape (`None` for none)."""

    structure: TreeSpec
    shapes: list[tuple[int, ...] | None]


def _has_rotary_positions(config: Any) -> bool:
    """Whether attention sees how far tokens are apart, and not where they are."""
    return bool(getattr(config, "rope_parameters", None))


def _may_be_split(config: Any, signature: inspect.Signature) -> bool:
    """Whether the length of a batch changes nothing but the padding."""
    # Rotary frequencies of the last two follow the longest row of a batch; BigBird's attention changes for short ones.
    by_length = any(name in str(getattr(config, "rope_parameters", None)) for name in ("dynamic", "longrope"))
    by_length |= getattr(config, "attention_type", None) == "block_sparse"
    return "decoder_input_ids" not in signature.parameters and not by_length


def _read_padding(given: Mapping[str, Any]) -> _Padding | None:
    """The padding of a batch, none where there is no mask; `None` if there is no batch, or what cannot be cut."""
    mask = given.get("attention_mask")
    if mask is None and isinstance(given.get("input_ids"), Tensor):
        mask = torch.ones_like(given["input_ids"])
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] < 2:
        return None
    for name, value in given.items():
        if isinstance(value, Tensor):
            if name not in _PER_TOKEN or value.ndim < 2 or value.shape[0] not in (1, len(mask)):
                return None
            if value.shape[1] != mask.shape[1]:
                return None
        elif not (value is None or isinstance(value, (bool, str))):
            return None
    real = mask != 0
    lengths = real.sum(1, keepdim=True)
    positions = torch.arange(mask.shape[1], device=mask.device)
    on_the_right = torch.equal(real, positions < lengths)
    if not on_the_right and not torch.equal(real, positions >= mask.shape[1] - lengths):
        return None
    if not torch.equal(mask, real.to(mask.dtype)):
        return None
    return _Padding(real, lengths.clamp(min=1).flatten().tolist(), mask.shape[1], left=not on_the_right)


def _refuse_other_outputs(whole: Any) -> None:
    for output in tree_flatten(whole)[0]:
        if output is not None and not isinstance(output, Tensor):
            raise TypeError(
                f"the outputs hold a {type(output).__name__}, which cannot be put together from those of groups of "
                "rows. If it is a cache that is not needed, call the model with use_cache=False."
            )


def _find_layout(whole: Any, parts: list[tuple[Any, int, int]], padding: _Padding) -> _Layout:
    """Which dimensions of outputs are rows and tokens: those that are as many in the whole batch and in each part.

    Args:
        whole: the outputs of the batch.
        parts: outputs of some of its rows, with how many rows and tokens a row they are of.
        padding ([`_Padding`]): of the batch.
    """
    outputs, structure = tree_flatten(whole)
    flat = [tree_flatten(part)[0] for part, _, _ in parts]
    if any(len(leaves) != len(outputs) for leaves in flat):
        raise ValueError("the structure of the outputs depends on the batch.")
    shapes: list[tuple[int, ...] | None] = []
    for index, output in enumerate(outputs):
        if output is None:
            shapes.append(None)
            continue
        seen = [
            (tuple(leaves[index].shape), rows, length) for leaves, (_, rows, length) in zip(flat, parts, strict=True)
        ]
        seen.append((tuple(output.shape), len(padding.lengths), padding.total))
        shapes.append(_find_shape(seen))
    return _Layout(structure, shapes)


def _find_shape(seen: list[tuple[tuple[int, ...], int, int]]) -> tuple[int, ...]:
    """One output's shape with marks, from its (shape, rows, length) in several batches of different lengths."""
    shapes = [shape for shape, _, _ in seen]
    if len({len(shape) for shape in shapes}) != 1 or any(shape[:1] != (rows,) for shape, rows, _ in seen):
        raise ValueError(f"the first dimension of an output of shape {shapes[-1]} is not the batch.")
    found = [_ROWS]
    for dim in range(1, len(shapes[0])):
        if len({shape[dim] for shape in shapes}) == 1:
            found.append(shapes[0][dim])
        elif all(shape[dim] == length for shape, _, length in seen):
            found.append(_LENGTH)
        else:
            raise ValueError(f"dimension {dim} of an output of shape {shapes[-1]} is neither fixed nor the length.")
    return tuple(found)


def _join(parts: list[Any], groups: list[list[int]], padding: _Padding, layout: _Layout) -> Any:
    """The outputs of groups as those of the whole batch."""
    flat = []
    for part in parts:
        leaves, structure = tree_flatten(part)
        if structure != layout.structure:
            raise ValueError("the structure of the outputs changed.")
        flat.append(leaves)
    joined = [
        None if shape is None else _join_output([leaves[index] for leaves in flat], groups, padding, shape)
        for index, shape in enumerate(layout.shapes)
    ]
    return tree_unflatten(joined, layout.structure)


def _join_output(parts: list[Tensor], groups: list[list[int]], padding: _Padding, shape: tuple[int, ...]) -> Tensor:
    is_score = shape == (_ROWS, _LENGTH) and parts[0].is_floating_point()
    fill = torch.finfo(parts[0].dtype).min if is_score else 0
    sizes = {_ROWS: len(padding.lengths), _LENGTH: padding.total}
    whole = parts[0].new_full([sizes.get(size, size) for size in shape], fill)
    lengths = [dim for dim, size in enumerate(shape) if size == _LENGTH]
    for part, rows in zip(parts, groups, strict=True):
        longest = padding.longest(rows)
        sizes = {_ROWS: len(rows), _LENGTH: longest}
        if list(part.shape) != [sizes.get(size, size) for size in shape] or part.dtype != whole.dtype:
            raise ValueError(f"the shape of an output changed to {tuple(part.shape)}, {part.dtype}.")
        place: list[Any] = [slice(None)] * len(shape)
        place[0] = torch.tensor(rows, device=part.device)
        for dim in lengths:
            place[dim] = padding.kept(longest)
        whole[tuple(place)] = part
    return _blank(whole, padding, shape, fill)


def _blank(values: Tensor, padding: _Padding, shape: tuple[int, ...], fill: float) -> Tensor:
    """Fills, in place, what an output holds at positions of padding."""
    for dim, size in enumerate(shape):
        if size == _LENGTH:
            view = [1] * len(shape)
            view[0], view[dim] = padding.mask.shape
            values.masked_fill_(~padding.mask.view(view).to(values.device), fill)
    return values


def _compare(whole: Any, joined: Any, padding: _Padding, layout: _Layout) -> None:
    """Refuse outputs in which a row, or a token, is not what it is in the whole batch.

    Raises:
        `ValueError`: if the error of one is more than a quarter of the root mean square of all, as vectors.
    """
    tokens = padding.mask.sum(1).tolist()  # what a model makes of a row without tokens means nothing
    for expected, got, shape in zip(tree_flatten(whole)[0], tree_flatten(joined)[0], layout.shapes, strict=True):
        if shape is None:
            continue
        squares, count, largest = 0.0, 0, 0.0
        for row, length in enumerate(tokens):
            if not length:
                continue
            real = tuple(padding.kept(length) if size == _LENGTH else slice(None) for size in shape[1:])
            leading = length if shape[1:2] == (_LENGTH,) else 1
            values, found = (output[row][real].float().reshape(leading, -1) for output in (expected, got))
            errors = torch.where(values == found, 0.0, values - found).norm(dim=1)
            largest = max(largest, float(errors.max().nan_to_num(nan=math.inf)))
            squares += float(values[values.isfinite()].square().sum())
            count += leading
        usual = math.sqrt(squares / max(count, 1))
        if largest > _TOLERANCE * usual:
            raise ValueError(
                f"without it, an output of shape {tuple(expected.shape)} differs by {largest:.2g} in a row or token, "
                f"where their root mean square is {usual:.2g} and {_TOLERANCE:.0%} of that is allowed."
            )
