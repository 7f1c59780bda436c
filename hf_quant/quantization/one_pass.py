"""One forward of all calibration data at once, in which each layer can be worked on when its inputs arrive.

A layer that is quantized, or corrected, on the spot hands its new outputs on: the next layer then sees what it will
see in the finished model, whatever the architecture and however its forward branches. Nothing has to be known of the
model's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import batch_masks

Before = Callable[[str, nn.Module, Tensor], None]
After = Callable[[str, nn.Module, Tensor], Tensor | None]


class Finished(BaseException):
    """Raised by a callable of [`one_pass`] that needs no more of the forward.

    Not an `Exception`, so that no model catches it.
    """


def merge_batches(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All batches as one.

    Args:
        batches (list of `dict`): keyword arguments of `forward`. Tensors are concatenated along their first
            dimension. Those whose second dimension (the length) differs are padded at the right: with zeros where an
            attention mask of their (batch, length) tells padding from the rest, `labels` with -100. Other values
            must be equal.

    Raises:
        `ValueError`: if there is no batch, or the batches do not fit together.
    """
    if not batches:
        raise ValueError("there are no calibration batches. Give at least one.")
    for index, batch in enumerate(batches):
        if set(batch) != set(batches[0]):
            raise ValueError(
                f"calibration batch {index} holds {', '.join(sorted(batch))}, but batch 0 holds "
                f"{', '.join(sorted(batches[0]))}. Give batches of the same arguments."
            )
    merged: dict[str, Any] = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if all(isinstance(value, Tensor) and value.ndim > 0 for value in values):
            merged[name] = torch.cat(_of_one_shape(name, values, batches))
        elif all(bool(value == values[0]) for value in values):
            merged[name] = values[0]
        else:
            other = next(value for value in values if not bool(value == values[0]))
            raise ValueError(
                f"`{name}` is {values[0]!r} in one calibration batch and {other!r} in another. All batches run as one "
                "here: give the same value in each."
            )
    return merged


def _of_one_shape(name: str, values: list[Tensor], batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    if len({value.shape[1:] for value in values}) == 1:
        return values
    masked = name == "labels" or all(
        any(mask.shape == value.shape[:2] for mask in batch_masks(batch))
        for value, batch in zip(values, batches, strict=True)
    )
    if min(value.ndim for value in values) < 2 or len({value.shape[2:] for value in values}) > 1 or not masked:
        shapes = sorted({tuple(value.shape[1:]) for value in values})
        raise ValueError(
            f"`{name}` has rows of the shapes {', '.join(map(str, shapes))}. All batches run as one here: give rows "
            "of one shape, or sequences with an attention_mask, so that they can be padded."
        )
    length = max(value.shape[1] for value in values)
    fill = -100 if name == "labels" else 0
    return [F.pad(v, (0, 0) * (v.ndim - 2) + (0, length - v.shape[1]), value=fill) for v in values]


@torch.no_grad()
def one_pass(
    model: nn.Module,
    batch: Mapping[str, Any],
    names: Iterable[str],
    before: Before | None = None,
    after: After | None = None,
) -> None:
    """Run a model forward once, in eval mode, and call back at each of the named modules.

    Args:
        model (`torch.nn.Module`): the model.
        batch (`dict`): keyword arguments of `forward`.
        names (iterable of `str`): qualified names of modules with one input and one output; a module with several
            of them counts under the first.
        before (callable, *optional*): called with name, module and input ahead of each call of a module.
        after (callable, *optional*): called with name, module and output after each; what it returns, unless `None`,
            takes the output's place.

    Either may raise [`Finished`], which ends the forward there: an LM head's logits of all data are never made.
    """
    modules: dict[nn.Module, str] = {}
    for name in names:
        modules.setdefault(model.get_submodule(name), name)
    handles: list[Any] = []
    for module, name in modules.items():
        if before is not None:
            handles.append(module.register_forward_pre_hook(_pre_hook(name, before), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(_hook(name, after)))
    training = model.training
    model.eval()
    try:
        # Some models draw random numbers in eval mode too; and a pass must not disturb later draws.
        with _without_cache(model), torch.random.fork_rng():
            torch.manual_seed(0)
            model(**batch)
    except Finished:
        pass
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _pre_hook(name: str, before: Before) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(name, module, args[0] if args else next(iter(kwargs.values())))

    return hook


def _hook(name: str, after: After) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return after(name, module, output)

    return hook


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keys and values of all calibration data would only take memory."""
    configs: list[Any] = [module.__dict__.get("config") for module in model.modules()]
    caching = {id(config): config for config in configs if getattr(config, "use_cache", False)}
    for config in caching.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching.values():
            config.use_cache = True
