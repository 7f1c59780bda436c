"""The source file as plain values that know their lines. Nothing in it is executed, and no tag makes an object."""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MOST_BYTES = 4_000_000
_MOST_VALUES = 100_000
_DEEPEST = 100
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class MigrationError(ValueError):
    """A source file that cannot be read.

    Args:
        file (`str`): as the user gave it.
        line (`int`): from 1; 0 where it is about the file as a whole.
        message (`str`): the value, what is allowed, and the change to make.
    """

    def __init__(self, file: str, line: int, message: str) -> None:
        self.line = line
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")


@dataclass(frozen=True)
class Node:
    """A value of the source file.

    Args:
        value: a `dict[str, Node]`, a `list[Node]`, text, a number, true or false, or `None`.
        line (`int`): where it stands; for a value of a mapping, the line of its key.
        tag (`str`, *optional*, defaults to `""`): its YAML tag, such as `"GMPruningModifier"`.
        anchor (`int`, *optional*, defaults to 0): for what an alias stands in for, the line where that is.
    """

    value: Any
    line: int
    tag: str = ""
    anchor: int = 0

    def plain(self) -> Any:
        """The value without lines and tags."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def show(self) -> str:
        """The value in one short line."""
        text = re.sub(r"\s+", " ", str(self.plain()))
        return text if len(text) <= 60 else text[:57] + "..."


def read_text(path: str | Path) -> str:
    """The text of a source file.

    Raises:
        `FileNotFoundError`: if there is no such file.
        [`MigrationError`]: if it is no text in UTF-8, or larger than 4 MB.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    if len(data) > _MOST_BYTES:
        raise MigrationError(str(path), 0, f"{len(data)} bytes; a configuration has {_MOST_BYTES} at most")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise MigrationError(str(path), line, f"not a text file in UTF-8 ({error.reason})") from None
    if not text.strip():
        raise MigrationError(str(path), 1, "the file is empty")
    return text


def parse_python(text: str, mode: str = "exec") -> Any:
    """The syntax tree of Python, without its warnings; raises what `ast.parse` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, mode=mode)


def front_matter(text: str) -> str | None:
    """The YAML between the first two lines of `---`, with its line numbers kept, or `None` where there is none."""
    lines = text.split("\n")
    first = next((at for at, line in enumerate(lines) if line.strip()), 0)
    if lines[first].rstrip() != "---":
        return None
    end = next((at for at in range(first + 1, len(lines)) if lines[at].rstrip() in ("---", "...")), None)
    if end is None:
        return None
    return "\n" * (first + 1) + "\n".join(lines[first + 1 : end])


def read_tree(text: str, file: str) -> Node:
    """YAML, or JSON with or without comments, as a [`Node`].

    Args:
        text (`str`): of the file.
        file (`str`): its name, for messages.

    Raises:
        [`MigrationError`]: at the line that is not valid.
    """
    if text.lstrip()[:1] in ("{", "[") or text.lstrip()[:2] in ("//", "/*"):
        text = _without_comments(text)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise MigrationError(file, mark.line + 1 if mark else 1, f"not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise MigrationError(file, 1, f"not valid YAML: {error}".split("\n")[0]) from None
    except RecursionError:
        raise MigrationError(file, 1, "not valid YAML: nested too deeply") from None
    if root is None:
        raise MigrationError(file, 1, "the file holds no values")
    return _Reader(file).node(root, root.start_mark.line + 1, 0)


class _Reader:
    """Makes [`Node`]s; aliases may be used, but may not blow up."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.count = 0

    def node(self, node: yaml.Node, line: int, depth: int) -> Node:
        self.count += 1
        if depth > _DEEPEST or self.count > _MOST_VALUES:
            what = f"nested more than {_DEEPEST} deep" if depth > _DEEPEST else f"more than {_MOST_VALUES} values"
            raise MigrationError(self.file, line, f"{what}; write aliases out")
        tag = "" if node.tag.startswith("tag:yaml.org,2002:") else node.tag.lstrip("!")
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, depth), line, tag)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.node(item, item.start_mark.line + 1, depth + 1) for item in node.value], line, tag)
        if tag:
            return Node(_clean(node.value) if node.value else {}, line, tag)
        at = node.start_mark.line + 1
        return Node(self._scalar(node, line), line, anchor=at if at < line else 0)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise MigrationError(self.file, line, "a key must be text or a number, but is a list or a mapping")
            if key.tag == "tag:yaml.org,2002:merge":
                merged = self.node(value, line, depth + 1)
                for part in merged.value if isinstance(merged.value, list) else [merged]:
                    if not isinstance(part.value, dict):
                        raise MigrationError(self.file, line, "`<<` must name a mapping")
                    values = {**part.value, **values}
                continue
            name = _clean(key.value)
            if name in values and value is not None:
                first = values[name].line
                raise MigrationError(self.file, line, f"key `{name}` is repeated (first on line {first}); keep one")
            values[name] = self.node(value, line, depth + 1)
        return values

    def _scalar(self, node: yaml.Node, line: int) -> Any:
        kind = node.tag.rsplit(":", 1)[-1]
        if kind == "str" and getattr(node, "style", None) is None and _EXPONENT.fullmatch(node.value):
            kind = "float"  # YAML 1.1 wants a point in it; JSON and the sources do not
        try:
            if kind == "float":
                value = float(node.value.replace("_", "")) if ":" not in node.value else math.nan
                if not math.isfinite(value):
                    raise ValueError
                return value
            if kind == "int":
                number = yaml.SafeLoader("").construct_object(node)
                if abs(number) > 10**15:
                    raise ValueError
                return number
            if kind in ("bool", "null"):
                return yaml.SafeLoader("").construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):
            raise MigrationError(self.file, line, f"{_clean(node.value)[:40]!r} is no usable number") from None
        return _clean(node.value)


def _clean(text: str) -> str:
    """Text that can be printed and written: JSON may escape halves of characters and controls."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]", "\N{REPLACEMENT CHARACTER}", text)


def _without_comments(text: str) -> str:
    """JSON without `//` and `/* */`, everything else in its place, and tabs as spaces outside of text."""
    pattern = r'"(?:\\.|[^"\\\n])*"' + r"|//[^\n]*|/\*.*?\*/|\t"

    def kept(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])

    return re.sub(pattern, kept, text, flags=re.DOTALL)
