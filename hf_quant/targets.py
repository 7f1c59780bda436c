"""Which modules are quantized, which are left in float, and why: always an explicit list."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import did_you_mean
from .schemes import Scheme, get_scheme, make_scheme

Kind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True)
class Selection:
    """What will be quantized in a model, and what will not.

    Args:
        quantized (`dict[str, Kind]`): kind of module by qualified name, in the model's order.
        left (`dict[str, str]`): the reason by qualified name, for each further module that holds a weight.
        schemes (`dict[str, Scheme]`, *optional*): of the modules whose scheme is not the model's.
    """

    quantized: dict[str, Kind]
    left: dict[str, str]
    schemes: dict[str, Scheme] = field(default_factory=dict)

    def scheme_of(self, name: str, default: Scheme) -> Scheme:
        """The scheme of one module, where `default` is the model's."""
        return self.schemes.get(name, default)


def select_modules(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    embeddings: bool = True,
    scheme: Scheme | None = None,
    overrides: Mapping[str, str | Scheme | None] | None = None,
) -> Selection:
    """Choose the modules to quantize.

    Without `targets`, every `nn.Linear`, transformers `Conv1D` and `nn.Embedding` is chosen but for the model's
    head (all that lies outside its base model, such as a classifier or LM head) and modules that share a weight
    with another one. With `targets`, exactly what the patterns match is chosen, heads included. What `overrides`
    gives a scheme is chosen too.

    Args:
        model (`torch.nn.Module`): the float model.
        targets (list of `str`, *optional*): shell-style patterns over qualified names, such as `"*.query"`.
        ignore (list of `str`, *optional*): patterns of modules to leave in float.
        embeddings (`bool`, *optional*, defaults to `True`): whether embeddings may be chosen.
        scheme ([`Scheme`], *optional*): of the Linear layers; those that its groups do not divide are left.
        overrides (`dict`, *optional*): schemes, or `None` for float, by pattern; the first that matches a module
            holds: `{"*.query": "int8_dynamic", "lm_head": None}`.

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
    for option, patterns in (("targets", targets), ("ignore", ignore), ("overrides", list(overrides or ()))):
        require_matches(option, patterns, candidates)
    chosen = {pattern: None if own is None else get_scheme(own) for pattern, own in (overrides or {}).items()}

    head = head_names(model)
    tied = _tied_partners(candidates)
    quantized: dict[str, Kind] = {}
    left: dict[str, str] = {}
    schemes: dict[str, Scheme] = {}
    for name, module in candidates.items():
        kind, obstacle = _kind(module)
        pattern = next((pattern for pattern in chosen if fnmatch.fnmatchcase(name, pattern)), None)
        own = scheme if pattern is None else chosen[pattern]
        if matches(name, ignore or ()):
            left[name] = "ignored"
        elif pattern is not None and own is None:
            left[name] = "float by `overrides`"
        elif targets is not None and pattern is None and not matches(name, targets):
            left[name] = "not a target"
        elif obstacle or kind is None:
            left[name] = obstacle
        elif kind == "embedding" and not embeddings:
            left[name] = "embeddings=False"
        elif targets is None and pattern is None and name in tied:
            left[name] = f"shares its weight with {', '.join(tied[name])}"
        elif targets is None and pattern is None and any(name == p or name.startswith(p + ".") for p in head):
            left[name] = "head"
        elif kind != "embedding" and own is not None and not _divides(module, kind, own):
            left[name] = f"its {_in_features(module, kind)} inputs are not a multiple of the group of {own.group_size}"
        else:
            if kind == "embedding" and pattern is not None and own is not None and own.packed:
                raise ValueError(
                    f"`overrides` gives the embedding {name} the scheme {own.name!r}, but embeddings are int8 by row: "
                    "the layout's readers know no other. Write int8_weight_only, or None for float."
                )
            quantized[name] = kind
            if pattern is not None and own is not None and own != scheme:
                schemes[name] = own

    _require_whole_ties(quantized, tied)
    for name in quantized:
        own = schemes.get(name, scheme)
        if own is not None and own.packed and name in tied:
            schemes[name] = make_scheme(8, own.activations)  # one weight has one form, and an embedding's is int8
    if not quantized:
        raise ValueError(
            f"nothing is left to quantize in {type(model).__name__}: "
            + "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
            + (f"; and {len(left) - 5} more" if len(left) > 5 else "")
            + ". Loosen `targets` or `ignore`."
        )
    left.update(_others(model, candidates))
    return Selection(quantized, left, schemes)


def select_prunable(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The modules whose weights pruning may set to 0.

    Without `targets`, every `nn.Linear` and transformers `Conv1D` in the model's repeated layers, whether prepared for
    QAT or not. What stands alone stays dense: heads, and poolers, whose small weights would all be among the lowest of
    a model; so do embeddings. With `targets`, exactly what the patterns match. A weight that several modules share is
    named once.

    Args:
        model (`torch.nn.Module`): a float model.
        targets (list of `str`, *optional*): shell-style patterns over qualified names, such as `"*.query"`.
        ignore (list of `str`, *optional*): patterns of modules to leave dense.

    Returns:
        `dict[str, torch.nn.Module]`: by qualified name, in the model's order.

    Raises:
        `ValueError`: if a pattern matches no module, or nothing is left.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module._parameters.get("weight"), nn.Parameter) and (_family(module) or is_transposed(module))
    }
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        require_matches(option, patterns, candidates)
    head = [*head_names(model), *_alone(model, candidates)]
    chosen: dict[int, tuple[str, nn.Module]] = {}
    for name, module in candidates.items():
        wanted = (
            not isinstance(module, nn.Embedding) and not any(name == p or name.startswith(p + ".") for p in head)
            if targets is None
            else matches(name, targets)
        )
        if wanted and not matches(name, ignore or ()):
            chosen.setdefault(id(module.weight), (name, module))
    if not chosen:
        raise ValueError(
            f"nothing is left to prune in {type(model).__name__}: it holds {len(candidates)} Linear, Conv1D and "
            "Embedding modules, and none is chosen. Loosen `targets` or `ignore`."
        )
    return dict(chosen.values())


def _alone(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules outside of all lists of layers; none where the model has no such list."""
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    alone = [name for name in names if not name.startswith(lists)]
    return alone if lists and len(alone) < len(list(names)) else []


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a Conv1D, of transformers or prepared for QAT: its weight is (nx, nf), in by out."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put `new` where the modules of its names are, and wherever else the same modules hang in the model."""
    by_old = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            parent._modules[child] = by_old.get(id(module), module)


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
    if kind is None and isinstance(module, nn.Linear) and _computes_as_linear(module):
        kind = "linear"
    if kind is None:
        plain = next(base.__name__ for base in exact if isinstance(module, base))
        return None, f"{type(module).__name__} is no plain {plain}"
    if "weight" not in module._parameters:
        return None, "its weight is computed anew by a hook"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None, "renormalizes its weight at each forward (max_norm)"
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not torch.is_floating_point(weight):
        return None, f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return None, "its weight is empty"
    return kind, ""


def _in_features(module: nn.Module, kind: Kind) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0 if kind == "conv1d" else 1]


def _divides(module: nn.Module, kind: Kind, scheme: Scheme) -> bool:
    return scheme.group_size is None or _in_features(module, kind) % scheme.group_size == 0


def _require_whole_ties(quantized: dict[str, Kind], tied: dict[str, list[str]]) -> None:
    for name in quantized:
        apart = [partner for partner in tied.get(name, ()) if partner not in quantized]
        if apart:
            raise ValueError(
                f"{name} shares its weight with {', '.join(apart)}, which would stay in float: the weight would "
                f"be stored twice. Name all of them in `targets`, or put {name} into `ignore`."
            )


def _others(model: nn.Module, candidates: dict[str, nn.Module]) -> dict[str, str]:
    """Modules of other kinds that hold a matrix: named, so that no weight is passed over in silence."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        matrices = [p for p in module.parameters(recurse=False) if sum(size > 1 for size in p.shape) > 1]
        if name in candidates or not matrices:
            continue
        kind = type(module).__name__
        if isinstance(module, nn.modules.conv._ConvNd) or "Conv" in kind:
            reasons[name] = f"a convolution ({kind})"
        elif "Expert" in kind:
            reasons[name] = f"the fused weights of {matrices[0].shape[0]} experts ({kind})"
        else:
            reasons[name] = f"{kind} holds its weight outside of a Linear, Conv1D or Embedding"
    return reasons


def _computes_as_linear(module: nn.Linear) -> bool:
    """Whether a subclass only spells out what `nn.Linear` computes, as Falcon's does."""
    if type(module).forward is nn.Linear.forward or len(list(module.parameters())) > 2 or module.weight.is_meta:
        return False  # read by its parent without being called, or it has weights of its own
    probe = torch.ones(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            return bool(torch.equal(module(probe), nn.functional.linear(probe, module.weight, module.bias)))
    except (RuntimeError, TypeError, ValueError):
        return False


def require_matches(option: str, patterns: Sequence[str] | None, candidates: Iterable[str]) -> None:
    """Refuse a pattern of the argument `option` that matches none of the names."""
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


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def head_names(model: nn.Module) -> list[str]:
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
