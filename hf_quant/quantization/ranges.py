"""Activation ranges found on calibration data, without training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import did_you_mean
from .histogram import HistogramObserver
from .int8_training import version_of
from .masks import batch_masks, tokens
from .observers import MinMax, MovingAverageMinMax


class Observer(Protocol):
    """What watches one activation."""

    def observe(self, values: Tensor) -> None:
        """Take a batch into account: (tokens, features), without padding."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value to be represented; float32, shape ()."""


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "ema": MovingAverageMinMax,
    "percentile": lambda: HistogramObserver("percentile"),
    "mse": lambda: HistogramObserver("mse"),
    "entropy": lambda: HistogramObserver("entropy"),
}


def require_observer(name: str) -> None:
    """Refuse an observer that there is not.

    Raises:
        `ValueError`: with the nearest name.
    """
    if name not in OBSERVERS:
        raise ValueError(
            f"unknown observer {name!r}{did_you_mean(str(name), OBSERVERS) or '.'} "
            f"Choose one of: {', '.join(OBSERVERS)}."
        )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    names: Collection[str],
    observer: str = "minmax",
    progress: Callable[[], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The range of each named module's input over the batches; padding is not counted.

    In a distributed run each process has its own batches, and the ranges of all are united.

    Args:
        model (`torch.nn.Module`): the float model; it runs in eval mode and is left as it was.
        batches (list of `dict`): keyword arguments of `forward`, on the model's device.
        names (collection of `str`): qualified names of Linear or Conv1D modules.
        observer (`str`, *optional*, defaults to `"minmax"`): `"minmax"`, `"ema"`, `"percentile"`, `"mse"` or
            `"entropy"`; see [`MinMax`], [`MovingAverageMinMax`] and [`HistogramObserver`].
        progress (callable, *optional*): called once for each batch.

    Returns:
        `dict`: smallest and largest value by name, float32, shape (); modules that never ran are absent.

    Raises:
        `ValueError`: if an activation holds NaN or infinity, naming the layer and the batch.
    """
    require_observer(observer)
    watch = _Watch(observer)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch.hook(name), with_kwargs=True) for name in names
    ]
    mode = model.training
    model.eval()
    try:
        for index, batch in enumerate(batches):
            watch.start(index, batch)
            model(**batch)
            if progress is not None:
                progress()
    finally:
        for handle in handles:
            handle.remove()
        model.train(mode)
    found = {id(one): one.range() for one in watch.observers.values()}
    return _united({name: found[id(watch.observers[name])] for name in names if name in watch.observers})


class _Watch:
    """The observers by module; query, key and value read the same activation and share one."""

    def __init__(self, observer: str) -> None:
        self.make = OBSERVERS[observer]
        self.observers: dict[str, Observer] = {}
        self.last: tuple[Tensor, int | None, Observer] | None = None

    def start(self, index: int, batch: Mapping[str, Any]) -> None:
        self.index = index
        self.masks = batch_masks(batch)
        self.last = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values: Tensor = args[0] if args else next(iter(kwargs.values()))
            version = version_of(values)
            same = self.last is not None and self.last[0] is values and self.last[1] == version is not None
            if same and self.last is not None and self.observers.setdefault(name, self.last[2]) is self.last[2]:
                return
            observer = self.observers.get(name) or self.make()
            rows = tokens(values, self.masks)
            if rows.numel() == 0:
                return  # an expert that no token was routed to
            low, high = torch.aminmax(rows)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad = int((~torch.isfinite(rows)).sum())
                raise ValueError(
                    f"the input of {name} holds {bad} NaN or infinite values of {rows.numel()} in calibration batch "
                    f"{self.index}, so it has no range. Look at that batch, or at the layers before {name}."
                )
            self.observers[name] = observer
            observer.observe(rows)
            self.last = values, version, observer

        return observe


def _united(ranges: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ranges
    everywhere: list[dict[str, tuple[float, float]]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, {name: (float(a), float(b)) for name, (a, b) in ranges.items()})
    return {
        name: (
            torch.tensor(min(own[name][0] for own in everywhere if name in own)),
            torch.tensor(max(own[name][1] for own in everywhere if name in own)),
        )
        for name in dict.fromkeys(name for own in everywhere for name in own)
    }
