"""Checks of plain values against type hints: the one place that says "must be a number, but is text"."""

from __future__ import annotations

import difflib
import enum
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from .source import KeyPath, Problem, Source


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean `x`?"`, or all that is allowed where nothing is near."""
    allowed = list(allowed)
    near = difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; allowed: {', '.join(allowed)}"


def check_keys(section: Mapping[str, Any], path: KeyPath, allowed: Iterable[str], source: Source) -> list[Problem]:
    """One problem for every key of `section` that is not allowed."""
    allowed = list(allowed)
    where = f" in `{dotted(path)}`" if path else ""
    return [
        source.problem((*path, key), f"unknown key `{_short(key)}`{where}{nearest(key, allowed)}", at_key=True)
        for key in section
        if key not in allowed
    ]


def check_type(value: Any, hint: Any, path: KeyPath, source: Source, choices: Iterable[Any] = ()) -> list[Problem]:
    """A problem if `value` does not fit the type hint, or is none of the choices where there are any."""
    name = dotted(path)
    choices = list(choices)
    if fits(value, hint) and (not choices or value is None or value in choices):
        return []
    choices = choices or _choices(hint)
    if choices and isinstance(value, str):
        return [source.problem(path, f"`{name}` cannot be {show(value)}{nearest(value, map(str, choices))}")]
    message = f"`{name}` must be {describe(hint, choices)}, but is {show(value)}"
    if value is False and "no" in choices:
        message += '; YAML reads a bare `no` as false: write "no"'
    return [source.problem(path, message)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that came from YAML fits a type hint. Whole numbers are numbers; true and false are not."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        # `IntervalStrategy | str` means the words of the enumeration, not any text.
        if any(_is_enum(arg) for arg in args):
            args = tuple(arg for arg in args if arg is not str)
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if _is_enum(hint):
        return isinstance(value, str) and value in [member.value for member in hint]
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if hint is dict or origin is dict:
        return isinstance(value, dict)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and _finite(value)
    return hint in (int, str) and isinstance(value, hint)


def describe(hint: Any, choices: Iterable[Any] = ()) -> str:
    """A type hint in words, such as "a whole number or null"."""
    choices = [str(choice) for choice in choices]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if int in args and float in args:
            args = tuple(arg for arg in args if arg is not int)
        if any(_is_enum(arg) for arg in args):
            args = tuple(arg for arg in args if arg is not str)
        return " or ".join(describe(arg, choices) for arg in sorted(args, key=lambda arg: arg is type(None)))
    if hint is type(None):
        return "null"
    if choices and (hint is str or origin is Literal or _is_enum(hint)):
        return f"one of {', '.join(choices)}"
    if origin in (list, tuple):
        return f"a list of {describe(args[0]).removeprefix('a ')}s" if args[0] is not str else "a list of texts"
    if hint is dict or origin is dict:
        return "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, "something that YAML cannot write")


def _choices(hint: Any) -> list[Any]:
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return list(args)
    if _is_enum(hint):
        return [member.value for member in hint]
    if get_origin(hint) in (Union, types.UnionType):
        found = [_choices(arg) for arg in args if _choices(arg)]
        return found[0] if len(found) == 1 else []
    return []


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def dotted(path: KeyPath) -> str:
    """A place in a recipe as messages write it: `pruning[1].criterion`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def show(value: Any) -> str:
    """A value in a message: short, and in YAML's words where they differ from Python's."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
