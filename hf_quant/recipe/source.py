"""YAML text to plain Python values, with the line and column of every key and value.

Only what a recipe needs of YAML: text, numbers, true/false, null, lists and mappings with text keys. Tags,
anchors, aliases, merge keys and repeated keys are errors, so that what a recipe says is what it shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_CORE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that also reads `5e-5` as a number: YAML 1.2 and JSON do, YAML 1.1 calls it text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong in a recipe.

    Args:
        line (`int`): from 1; 0 where the recipe was not read from a file.
        column (`int`): from 1; 0 where the recipe was not read from a file.
        message (`str`): the value, what is allowed, and the change to make.
        file (`str`, *optional*, defaults to `""`): path of the recipe as the user gave it.
    """

    line: int
    column: int
    message: str
    file: str = ""

    def __str__(self) -> str:
        """`recipes/x.yaml:12:3: message`, or the message alone."""
        return f"{self.file}:{self.line}:{self.column}: {self.message}" if self.file else self.message


class RecipeError(ValueError):
    """A recipe that cannot run, with all that is wrong in it.

    Args:
        problems (`list[Problem]`): at least one; shown in the order of the file, one a line.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(set(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass
class Source:
    """The values of a YAML file and where each stands.

    Args:
        file (`str`, *optional*, defaults to `""`): the path in messages; empty for a recipe made in Python.
    """

    file: str = ""
    tree: dict[str, Any] = field(default_factory=dict)
    keys: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)
    values: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: KeyPath, message: str, at_key: bool = False) -> Problem:
        """A [`Problem`] at the value of `path` (or at its key), or at the nearest parent that is in the file."""
        for depth in range(len(path), -1, -1):
            position = (self.keys if at_key else self.values).get(path[:depth])
            if position:
                return Problem(*position, message, self.file)
        return Problem(1, 1, message, self.file) if self.file else Problem(0, 0, message)


def read_source(path: str | Path) -> Source:
    """Reads a YAML file.

    Args:
        path (`str` or `Path`): the file, in UTF-8.

    Returns:
        [`Source`]: its tree is what could be read; its problems are repeated keys and values that no recipe
        holds, for the caller to show together with its own.

    Raises:
        `FileNotFoundError`: if there is no such file.
        [`RecipeError`]: if the file is not text, not YAML, or not a mapping.
    """
    file = str(path)
    if not Path(path).is_file():
        what = "is a folder, not a recipe" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{file} {what}; give the path of a recipe (.yaml)")
    try:
        text = Path(path).read_text(encoding="utf-8")
        events = list(yaml.parse(text, Loader=_Loader))
        node = yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise RecipeError([Problem(1, 1, f"not a text file in UTF-8 ({error.reason})", file)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise RecipeError([Problem(line, column, f"not valid YAML: {error.problem}", file)]) from None
    except yaml.YAMLError as error:
        raise RecipeError([Problem(1, 1, f"not valid YAML: {error}".split("\n")[0], file)]) from None
    except (RecursionError, ValueError, OverflowError) as error:  # thousands of brackets; "\\UFFFFFFFF"
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecipeError([Problem(1, 1, f"not valid YAML: {why}", file)]) from None

    # Aliases share nodes: one would be visited once a use, and its position would be that of another key.
    aliases = [
        Problem(*_position(event), f"a recipe has no aliases (`*{event.anchor}`); write the value out", file)
        for event in events
        if isinstance(event, yaml.AliasEvent)
    ]
    if aliases:
        raise RecipeError(aliases)
    if node is None:
        raise RecipeError([Problem(1, 1, "the recipe is empty; recipes/README.md lists its keys", file)])
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([Problem(1, 1, "a recipe is a mapping of keys to values (`model: ...`)", file)])
    source = Source(file)
    source.tree = _construct(node, (), source)
    return source


def _construct(node: yaml.Node, path: KeyPath, source: Source) -> Any:
    """The plain value of a node; fills the positions and problems of `source`."""
    position = _position(node)
    source.values[path] = position
    if node.tag not in _CORE_TAGS:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        message = f"{_quote(node)} reads as YAML `{kind}`, which recipes do not use; put it in quotes if it is text"
        source.problems.append(Problem(*position, message, source.file))
        return None
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(node, path, source)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, index), source) for index, item in enumerate(node.value)]
    try:
        return _Loader("").construct_object(node)
    except (ValueError, yaml.YAMLError):  # such as `!!int x`, or a number of ten thousand digits
        message = f"{_quote(node)} is no {node.tag.rsplit(':', 1)[-1]}"
        source.problems.append(Problem(*position, message, source.file))
        return None


def _construct_mapping(node: yaml.MappingNode, path: KeyPath, source: Source) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        position = _position(key_node)
        if key_node.tag != "tag:yaml.org,2002:str":
            message = f"a key must be text, but this is {_quote(key_node)}; put it in quotes or remove it"
            source.problems.append(Problem(*position, message, source.file))
            continue
        key = key_node.value
        here = (*path, key)
        if key in tree:
            first = source.keys[here][0]
            message = f"key `{key}` is repeated (first on line {first}); keep one of them"
            source.problems.append(Problem(*position, message, source.file))
            continue
        source.keys[here] = position
        tree[key] = _construct(value_node, here, source)
    return tree


def _position(part: yaml.Node | yaml.Event) -> tuple[int, int]:
    mark = part.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _quote(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return repr(node.value if len(node.value) <= 40 else node.value[:37] + "...")
