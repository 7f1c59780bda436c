"""Patterns of module names: regular expressions and names of subtrees as shell-style patterns.

A shell-style pattern (`fnmatch`) knows `*`, `?` and `[...]`. A regular expression that says no more than that has an
exact translation; a list of patterns is their union. All others have none, and are never guessed.
"""

from __future__ import annotations

import re
import warnings
from typing import Literal

How = Literal["match", "search", "fullmatch"]

Pattern = list[str]  # one part a matched character, but "*"
_MOST_ALTERNATIVES = 32
_WORD = "[A-Za-z0-9_]"


class _InexactError(ValueError):
    """The expression says more than shell-style patterns can."""


def literal(name: str) -> str:
    """The pattern that matches exactly `name`."""
    return "".join(_quoted(character) for character in name)


def subtree(name: str) -> str:
    """One pattern for a module and everything in it; it must match where the module is a layer itself.

    `encoder*` also matches a sibling named `encoder_2`. Below a number, as in `layers.1`, it would match `layers.10`,
    so there it is `layers.1.*`: members of a list are hardly ever layers themselves.
    """
    name = name.strip(".")
    return literal(name) + (".*" if name[-1:].isdigit() else "*")


def from_regex(regex: str, how: How, suffix: str = "") -> tuple[list[str], str]:
    """A regular expression over names as shell-style patterns.

    Args:
        regex (`str`): in Python's syntax.
        how (`str`): the function of `re` with which the source applies it: `"match"`, `"search"` or `"fullmatch"`.
        suffix (`str`, *optional*, defaults to `""`):
            What the source's names have after a module's, such as `".weight"`. Modules are taken to have no name with
            `weight` in it.

    Returns:
        `tuple[list[str], str]`: patterns whose union matches exactly the modules that the expression does, and an
        empty string; or no pattern, and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may mean something else in later versions of Python
            re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        return [], f"no regular expression ({error})"
    try:
        begins, ends, whole_regex = how != "search", how == "fullmatch", regex
        if regex.startswith("^"):
            regex, begins = regex[1:], True
        if regex.endswith("$") and not regex.endswith("\\$"):
            regex, ends = regex[:-1], True
        if regex != whole_regex and "|" in _outside_groups(regex):
            raise _InexactError("anchor of only one alternative")
        found, rest = _alternatives(regex, 0)
        if rest != len(regex):
            raise _InexactError("unbalanced parentheses")
    except _InexactError as reason:
        return [], f"shell-style patterns have no {reason}"
    except RecursionError:
        return [], "nested too deeply"
    whole = [([] if begins else ["*"]) + parts + ([] if ends else ["*"]) for parts in found]
    patterns = _distinct(quotient for parts in whole for quotient in _without_suffix(_collapse(parts), suffix))
    if suffix:
        patterns = [parts for parts in patterns if "weight" not in "".join(parts)]
    if not patterns:
        return [], "it matches no module's weight"
    return ["".join(parts) for parts in patterns], ""


def _alternatives(regex: str, at: int) -> tuple[list[Pattern], int]:
    """The alternatives from `at` up to the end or a closing parenthesis, and where that is."""
    done: list[Pattern] = []
    current: list[Pattern] = [[]]
    while at < len(regex) and regex[at] != ")":
        if regex[at] == "|":
            done, current, at = done + current, [[]], at + 1
            continue
        atom, at, any_character = _atom(regex, at)
        quantifier = re.match(r"[*+?]\??|\{[^}]*\}\??", regex[at:])
        if quantifier:
            atom = _repeated(atom, quantifier[0].rstrip("?") or "?", any_character)
            at += quantifier.end()
        current = [[*left, *right] for left in current for right in atom]
        if len(current) + len(done) > _MOST_ALTERNATIVES:
            raise _InexactError(f"more than {_MOST_ALTERNATIVES} alternatives")
    return done + current, at


def _atom(regex: str, at: int) -> tuple[list[Pattern], int, bool]:
    """One atom as alternatives, where it ends, and whether it is `.`."""
    character = regex[at]
    if character == ".":
        return [["?"]], at + 1, True
    if character == "(":
        start = at + 3 if regex.startswith("(?:", at) else at + 1
        if regex.startswith("(?", at) and start == at + 1:
            raise _InexactError(f"`{regex[at : at + 3]}`")
        found, end = _alternatives(regex, start)
        if end >= len(regex):
            raise _InexactError("unbalanced parentheses")
        return found, end + 1, False
    if character == "[":
        inside = re.match(r"\[(\^?)((?:[\w.]|(?<=\w)-(?=\w)|\\[.])+)\]", regex[at:], re.ASCII)
        if inside is None:
            raise _InexactError("such a class of characters")
        return [[f"[{'!' if inside[1] else ''}{inside[2].replace(chr(92), '')}]"]], at + inside.end(), False
    if character == "\\":
        escaped = regex[at + 1 : at + 2]
        if escaped in ("d", "w"):
            return [["[0-9]" if escaped == "d" else _WORD]], at + 2, False
        if not escaped or escaped.isalnum():
            raise _InexactError(f"`\\{escaped}`")
        return [[_quoted(escaped)]], at + 2, False
    if character in "^$*+?{}":
        raise _InexactError(f"`{character}` there")
    return [[_quoted(character)]], at + 1, False


def _repeated(atom: list[Pattern], quantifier: str, any_character: bool) -> list[Pattern]:
    if quantifier == "?":
        return [[], *atom]
    if any_character and quantifier in "*+":
        return [["*"] if quantifier == "*" else ["?", "*"]]
    if re.fullmatch(r"\{\d\}", quantifier):
        count = int(quantifier[1])
        repeated: list[Pattern] = [[]]
        for _ in range(count):
            repeated = [[*left, *right] for left in repeated for right in atom]
            if len(repeated) > _MOST_ALTERNATIVES:
                raise _InexactError(f"more than {_MOST_ALTERNATIVES} alternatives")
        return repeated
    raise _InexactError(f"repetition (`{quantifier}`) of anything but `.`, and `[0-9]*` is the nearest to digits")


def _without_suffix(pattern: Pattern, suffix: str) -> list[Pattern]:
    """The patterns of all names that match `pattern` when `suffix` is put behind them."""
    patterns = [pattern]
    for character in reversed(suffix):
        shorter: list[Pattern] = []
        for parts in patterns:
            for end in range(len(parts), 0, -1):
                if parts[end - 1] == "*":
                    shorter.append(parts[:end])  # the star takes the character, or is empty: look further
                    continue
                if re.fullmatch(_as_regex(parts[end - 1]), character):
                    shorter.append(parts[: end - 1])
                break
        patterns = _distinct(shorter)
    return patterns


def _distinct(patterns: object) -> list[Pattern]:
    """Without those that another one covers."""
    found: list[Pattern] = []
    for parts in patterns:  # type: ignore[attr-defined]
        if parts not in found:
            found.append(parts)
    return [parts for parts in found if not any(_covers(other, parts) for other in found if other != parts)]


def _covers(wide: Pattern, narrow: Pattern) -> bool:
    return bool(wide) and wide[-1] == "*" and narrow[: len(wide) - 1] == wide[:-1]


def _collapse(parts: Pattern) -> Pattern:
    return [part for at, part in enumerate(parts) if part != "*" or at == 0 or parts[at - 1] != "*"]


def _as_regex(part: str) -> str:
    if part == "?":
        return "."
    return part.replace("[!", "[^") if part.startswith("[") else re.escape(part)


def _quoted(character: str) -> str:
    return f"[{character}]" if character in "*?[" else character


def _outside_groups(regex: str) -> str:
    """What stands outside of parentheses; escapes and classes are left out."""
    text, depth = "", 0
    for character in re.sub(r"\\.|\[[^\]]*\]", "", regex):
        depth += (character == "(") - (character == ")")
        text += character if depth == 0 else ""
    return text
