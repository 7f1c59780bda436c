"""Names of parameters and modules in a source as patterns of modules."""

from __future__ import annotations

from .patterns import How, from_regex, literal, subtree
from .reading import Node
from .report import Draft
from .section import Section

FILL_IN = "FILL-IN "  # no module has such a name: a run stops at a pattern that begins so
OPEN = "what begins with FILL-IN has no exact pattern; a run stops there"


def parameter_patterns(section: Section, node: Node) -> list[str]:
    """Patterns of modules for names of parameters, or regular expressions of them."""
    found: list[str] = []
    for item in node.value if isinstance(node.value, list) else [node]:
        if not isinstance(item.value, str):
            raise section.draft.fail(item.line, f"a parameter's name must be text, but is {item.show()!r}")
        if item.value.startswith("re:"):
            patterns, reason = from_regex(item.value[3:], "match", ".weight")
            if reason:
                section.draft.none(item.line, item.value, f"{reason}; replace the FILL-IN")
                patterns = [FILL_IN + item.value[3:]]
        else:
            patterns = [literal(item.value.removesuffix(".weight"))]
        found += [pattern for pattern in patterns if pattern not in found]
    return found


def regex_patterns(draft: Draft, regex: str, how: How, line: int) -> list[str]:
    """Patterns of modules for a regular expression of their names; a FILL-IN where there are none."""
    patterns, reason = from_regex(regex, how)
    if reason:
        draft.none(line, regex, f"{reason}; replace the FILL-IN")
        return [FILL_IN + regex]
    return patterns


def module_patterns(draft: Draft, name: str, line: int) -> list[str]:
    """Patterns for a module's name and all in it, or for `re:` and a regular expression."""
    if name.startswith("re:"):
        return regex_patterns(draft, name[3:], "match", line)
    return [subtree(name)]
