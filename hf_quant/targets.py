"""Which modules are quantized, which are left in float, and why: always an explicit list."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import did_you_mean

Kind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True)
class Selection:
    """What will be quantized in a model, and what will not.

    Args:
        quantized (`dict[str, Kind]`): kind of module by qualified name, in the model's order.
        left (`dict[str, str]`): the reason by qualified name, for each further Linear, Conv1D and Embedding.
    """

    quantized: dict[str, Kind]
    left: dict[str, str]


def select_modules(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    embeddings: bool = True,
) -> Selection:
    """Choose the modules to quantize.

    Without `targets`, every `nn.Linear`, transformers `Conv1D` and `nn.Embedding` is chosen but for the model's
    head (all that lies outside its base model, such as a classifier or LM head) and modules that share a weight
    with another one. With `targets`, exactly what the patterns match is chosen, heads included.

    Args:
        model (`torch.nn.Module`): the float model.
        targets (list of `str`, *optional*): shell-style patterns over qualified names, such as `"*.query"`.
        ignore (list of `str`, *optional*): patterns of modules to leave in float.
        embeddings (`bool`, *optional*, defaults to `True`): whether embeddings may be chosen.

    Raises:
        `ValueError`: if a pattern matches no module, nothing is left to quantize, or only a part of a group of
            modules that share one weight is chosen.
    """
    candidates = {name: module for name, module in model.named_modules() if _family(module)}
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no module that can be quantized: it holds no nn.Linear, transformers "
            "Conv1D or nn.Embedding. Pass a model built from those."
        )
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        _require_matches(option, patterns, candidates)

    head = _head_names(model)
    tied = _tied_partners(candidates)
    quantized: dict[str, Kind] = {}
    left: dict[str, str] = {}
    for name, module in candidates.items():
        kind, obstacle = _kind(module)
        if _matches(name, ignore or ()):
            left[name] = "ignored"
        elif targets is not None and not _matches(name, targets):
            left[name] = "not a target"
        elif obstacle or kind is None:
            left[name] = obstacle
        elif kind == "embedding" and not embeddings:
            left[name] = "embeddings=False"
        elif targets is None and name in tied:
            left[name] = f"shares its weight with {', '.join(tied[name])}"
        elif targets is None and any(name == prefix or name.startswith(prefix + ".") for prefix in head):
            left[name] = "head"
        else:
            quantized[name] = kind

    for name in list(quantized):
        apart = [partner for partner in tied.get(name, ()) if partner not in quantized]
        if apart:
            raise ValueError(
                f"{name} shares its weight with {', '.join(apart)}, which would stay in float: the weight would "
                f"be stored twice. Name all of them in `targets`, or put {name} into `ignore`."
            )
    if not quantized:
        raise ValueError(
            f"nothing is left to quantize in {type(model).__name__}: "
            + "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
            + (f"; and {len(left) - 5} more" if len(left) > 5 else "")
            + ". Loosen `targets` or `ignore`."
        )
    return Selection(quantized, left)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` is, and wherever else the same module hangs in the model."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


def require_finite(name: str, module: nn.Module) -> None:
    """Refuse a module whose weight cannot be quantized because it holds NaN or infinity."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    # One pass without a temporary of the weight's size: NaN and infinity survive a sum of extremes.
    low, high = torch.aminmax(weight.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~torch.isfinite(weight.detach())).sum())
        raise ValueError(
            f"the weight of {name} holds {bad} NaN or infinite values of {weight.numel()}, so it has no int8 "
            "range. Start from a checkpoint whose training did not diverge."
        )


def _family(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _kind(module: nn.Module) -> tuple[Kind | None, str]:
    """The kind of a module that can be swapped, or the reason why it cannot."""
    from transformers.pytorch_utils import Conv1D

    # Subclasses do something of their own in forward, or are read by their parent without being called.
    exact: dict[type[nn.Module], Kind] = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}
    kind = exact.get(type(module))
    if kind is None:
        return None, f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None, "renormalizes its weight at each forward (max_norm)"
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not torch.is_floating_point(weight):
        return None, f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return None, "its weight is empty"
    return kind, ""


def _require_matches(option: str, patterns: Sequence[str] | None, candidates: Iterable[str]) -> None:
    if isinstance(patterns, str):
        raise TypeError(f"`{option}` is a list of patterns, but {patterns!r} is a string. Write [{patterns!r}].")
    names = list(candidates)
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            ends = {"*." + name.rpartition(".")[2] for name in names} | set(names)
            raise ValueError(
                f"pattern {pattern!r} in `{option}` matches no module{did_you_mean(pattern, ends) or '.'} "
                f"Patterns are matched against whole names, such as {names[0]!r} and {names[-1]!r}."
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _head_names(model: nn.Module) -> list[str]:
    """The modules that make up the head: output embeddings, and what lies outside the base model.

    Some models do not hold their base model as one child (CLIP, T5 and Whisper for classification); there, Linear
    layers directly under the model are its head.
    """
    if not hasattr(model, "get_output_embeddings"):
        return []
    output = model.get_output_embeddings()  # type: ignore[operator]
    head = [name for name, module in model.named_modules() if output is not None and module is output]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        return head + [name for name, _ in model.named_children() if name != prefix]
    return head + [name for name, child in model.named_children() if isinstance(child, nn.Linear)]


def _tied_partners(candidates: dict[str, nn.Module]) -> dict[str, list[str]]:
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in candidates.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        holders[id(weight)].append(name)
    return {
        name: [other for other in names if other != name]
        for names in holders.values()
        if len(names) > 1
        for name in names
    }
