"""NNCF's scopes, which name classes, modules and operations, as patterns of modules."""

from __future__ import annotations

import re

from .names import FILL_IN, OPEN
from .patterns import from_regex, literal
from .report import Part
from .section import Section

_FLOAT = re.compile(r"LayerNorm|BatchNorm|__\w+__|matmul|softmax|gelu|relu|Dropout|baddbmm|layer_norm", re.IGNORECASE)


def scopes(section: Section, key: str, part: Part, into: str = "ignore") -> None:
    """Puts scopes of NNCF into `ignore` or `targets` as patterns of modules."""
    patterns: list[str] = []
    node = section.take(key)
    remark = ""
    items = node.value if node is not None and isinstance(node.value, list) else [node] if node is not None else []
    for item in items:
        if not isinstance(item.value, str):
            raise section.draft.fail(item.line, f"`{key}` must hold texts, but has {item.show()!r}")
        if into == "ignore" and _FLOAT.search(item.value):
            section.draft.kept(item.line, f"{key}: {item.value}", "float", "only Linear, Conv1D and Embedding change")
            continue
        pattern, why = _scope(item.value)
        if why and not pattern:
            section.draft.none(item.line, f"{key}: {item.value}", f"{why}; replace the FILL-IN")
            pattern = FILL_IN + item.value
            remark = OPEN
        patterns.append(pattern)
        remark = remark or why
    have = section.draft.get(part, into)
    patterns = [pattern for pattern in dict.fromkeys(patterns) if pattern not in (have or [])]
    if patterns and have is None:
        section.put(part, into, patterns, key, remark)
    elif patterns:
        have.extend(patterns)  # scopes of weights and of the whole algorithm come together
        section.kept(key, f"{into}: {patterns}", remark)


def _scope(scope: str) -> tuple[str, str]:
    """A pattern for one scope, and how it differs; or no pattern, and the reason."""
    if scope.startswith("{re}"):
        regex = scope[4:]
        inner = re.fullmatch(r"(?:\.\*)?([a-z_]+)(?:\.\*)?", regex)
        if inner:
            return f"*{inner[1]}*", "names of classes and operations are not matched, only names of modules"
        _, reason = from_regex(regex, "search")
        return "", reason or "it matches names of classes, which patterns of modules do not"
    names = re.findall(r"\w+\[([\w.]+)\]", scope)
    if not names:
        return ("", "no name of a module in it") if "/" in scope else (literal(scope), "")
    return ".".join(literal(name) for name in names), ""
