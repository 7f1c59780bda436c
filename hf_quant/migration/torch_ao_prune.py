"""What calls of torch.nn.utils.prune say about pruning."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .patterns import literal
from .report import Draft
from .torch_ao_calls import Call, Unknown

_METHODS = {"L1Unstructured": "magnitude", "RandomUnstructured": "random"}
_ONCE = "at once, before training goes on"


def prune_call(draft: Draft, last: str, call: Call, path: Callable[[ast.expr], str | None]) -> bool:
    """Adds a pruning section for a call that prunes; `False` if it is none.

    Args:
        draft ([`Draft`]): to be filled.
        last (`str`): the function's name.
        call ([`Call`]): its arguments.
        path (callable): the name of a module that an expression stands for.
    """
    if last in ("custom_from_mask", "identity"):
        draft.none(
            call.line, call.source, "a mask made by hand; nearest: schedule: constant keeps zeros that are there"
        )
        return True
    if last == "global_unstructured":
        _global(draft, call, path)
    elif last in ("l1_unstructured", "random_unstructured", "ln_structured", "random_structured"):
        _single(draft, last, call, path)
    else:
        return False
    return True


def _single(draft: Draft, last: str, call: Call, path: Callable[[ast.expr], str | None]) -> None:
    names = ["module", "name", "amount", *{"ln_structured": ["n", "dim"], "random_structured": ["dim"]}.get(last, [])]
    given = {**dict(zip(names, call.args, strict=False)), **call.keywords}
    if given.get("name", "weight") != "weight":
        draft.none(call.line, call.source, "only weights are pruned, no biases")
        return
    node = call.node.args[0] if isinstance(call.node, ast.Call) and call.node.args else None
    if node is None and isinstance(call.node, ast.Call):
        node = next((key.value for key in call.node.keywords if key.arg == "module"), None)
    target = path(node) if node is not None else None
    amount = _amount(draft, call, given.get("amount"))
    if amount is None:
        return
    criterion, structure = "magnitude" if last.startswith("l1") else "random", "unstructured"
    if last.endswith("_structured") and "unstructured" not in last:
        dim = given.get("dim", -1)
        structure = {0: "row", 1: "column", -1: "column"}.get(dim if isinstance(dim, int) else 99, "")
        if not structure:
            draft.none(call.line, f"dim={dim}", "a Linear weight has rows (0) and columns (1)")
            return
        power = given.get("n")
        if last == "ln_structured":
            criterion = f"l{power}" if isinstance(power, int) and 1 <= power <= 8 else "l2"
            if criterion != f"l{power}":
                draft.none(call.line, f"n={power}", "norms are l1 to l8; l2 instead")
    part = _section(draft, call, amount, criterion, structure, "layer")
    if target is None:
        draft.none(call.line, call.source, "which module this is, the text does not say; nearest: `targets`")
    elif target in ("", "*"):
        draft.kept(
            call.line, "the loop's modules" if target else "the module", "all but the head", "name others in `targets`"
        )
    else:
        draft.put(part, "targets", [literal(target)], call.line, call.source)


def _global(draft: Draft, call: Call, path: Callable[[ast.expr], str | None]) -> None:
    given = {**dict(zip(["parameters", "pruning_method"], call.args, strict=False)), **call.keywords}
    method = str(given.get("pruning_method", "")).rpartition(".")[2]
    amount = _amount(draft, call, given.get("amount"))
    if amount is None:
        return
    criterion = _METHODS.get(method, "magnitude")
    if method not in _METHODS:
        draft.none(call.line, f"pruning_method={method}", "magnitude instead")
    part = _section(draft, call, amount, criterion, "unstructured", "global")
    targets: list[str] = []
    for pair in given["parameters"] if isinstance(given.get("parameters"), list) else []:
        module = pair[0] if isinstance(pair, list) and len(pair) == 2 else None
        name = path(module.node) if isinstance(module, Unknown) and isinstance(module.node, ast.expr) else None
        if name in (None, "", "*"):
            draft.none(call.line, str(module), "which module this is, the text does not say; nearest: `targets`")
        elif pair[1] == "weight":
            targets.append(literal(str(name)))
        else:
            draft.none(call.line, f"{name}.{pair[1]}", "only weights are pruned, no biases")
    if targets:
        draft.put(part, "targets", targets, call.line, "the parameters")
    else:
        draft.kept(call.line, "the parameters", "all but the head", "name others in `targets`")


def _amount(draft: Draft, call: Call, amount: Any) -> float | None:
    if isinstance(amount, float) and 0 < amount < 1:
        return amount
    what = amount if not isinstance(amount, Unknown) else amount.text
    reason = (
        "a number of weights; nearest: final_sparsity, a share"
        if isinstance(amount, int)
        else ("not a share in the text; nearest: final_sparsity between 0 and 1")
    )
    draft.none(call.line, f"{call.last}(amount={what})", reason)
    return None


def _section(draft: Draft, call: Call, amount: float, criterion: str, structure: str, scope: str) -> int:
    part, source = draft.new_pruning(), call.last
    draft.put(part, "final_sparsity", amount, call.line, f"{source}: amount={amount}")
    draft.put(part, "schedule", "one_shot", call.line, source, _ONCE)
    draft.put(part, "start_step", 0.0, call.line, source)
    draft.put(part, "criterion", criterion, call.line, source)
    draft.put(part, "structure", structure, call.line, source)
    draft.put(part, "scope", scope, call.line, source)
    return part
