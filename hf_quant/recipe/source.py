"""YAML text to plain Python values, with the file, line and column of every key and value.

Only what a recipe needs of YAML: text, numbers, true/false, null, lists and mappings with text keys (whole numbers
as keys are read as text). Tags, anchors, aliases, merge keys and repeated keys are errors, so that what a recipe says
is what it shows.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]

MAX_BYTES = 2**20  # a model file given by mistake is not read whole
MAX_DEPTH = 32
_MAX_BITS = 64  # Python refuses to print numbers of more than some thousand digits

_CORE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that also reads `5e-5` as a number: YAML 1.2 and JSON do, YAML 1.1 calls it text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Place(NamedTuple):
    """Where something stands.

    Args:
        file (`str`): path of the recipe as the user gave it, or `--set KEY`; empty for a recipe made in Python.
        line (`int`): from 1; 0 where there are no lines.
        column (`int`): from 1; 0 where there are no lines.
    """

    file: str
    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a recipe.

    Args:
        line (`int`): from 1; 0 where the recipe was not read from a file.
        column (`int`): from 1; 0 where the recipe was not read from a file.
        message (`str`): the value, what is allowed, and the change to make.
        file (`str`, *optional*, defaults to `""`): path of the recipe as the user gave it, or `--set KEY`.
    """

    line: int
    column: int
    message: str
    file: str = ""

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place(self.file, self.line, self.column)

    def __str__(self) -> str:
        """`recipes/x.yaml:12:3: message`, `--set KEY: message`, or the message alone; one line in any case."""
        where = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: " if self.file else ""
        text = re.sub(r"\s*\n\s*", " ", where + self.message)
        # A recipe may hold any character; a terminal must not obey it.
        return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class RecipeError(ValueError):
    """A recipe that cannot run, with all that is wrong in it.

    Args:
        problems (`list[Problem]`): at least one; shown in the order of the files, one a line.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(set(problems), key=lambda problem: (problem.place, problem.message))
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass
class Source:
    """The values of a recipe and where each stands.

    Args:
        file (`str`, *optional*, defaults to `""`): the path in messages; empty for a recipe made in Python.
        tree (`dict[str, Any]`, *optional*): the plain values.
        keys (`dict[KeyPath, Place]`, *optional*): where the key of each value stands, in this file or another.
        values (`dict[KeyPath, Place]`, *optional*): where each value stands.
        problems (`list[Problem]`, *optional*): what could not be read.
        whole (`bool`, *optional*, defaults to `True`): whether all that the recipe extends was found.
    """

    file: str = ""
    tree: dict[str, Any] = field(default_factory=dict)
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    whole: bool = True

    def problem(self, path: KeyPath, message: str, at_key: bool = False) -> Problem:
        """A [`Problem`] at the value of `path` (or at its key), or at the nearest parent that is in the file."""
        for depth in range(len(path), -1, -1):
            place = (self.keys if at_key else self.values).get(path[:depth])
            if place:
                return Problem(place.line, place.column, message, place.file)
        return Problem(1, 1, message, self.file) if self.file else Problem(0, 0, message)


def read_source(path: str | os.PathLike[str]) -> Source:
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
    file = os.fspath(path)
    if not os.path.isfile(file):
        what = "is a folder, not a recipe" if os.path.isdir(file) else "does not exist"
        raise FileNotFoundError(f"{file} {what}; give the path of a recipe (.yaml)")
    size = os.path.getsize(file)
    if size > MAX_BYTES:
        raise RecipeError([Problem(1, 1, f"holds {size:,} bytes; a recipe is a text of {MAX_BYTES:,} at most", file)])
    content = Path(file).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise RecipeError([Problem(line, column, f"not a text file in UTF-8 ({error.reason})", file)]) from None
    source = Source(file)
    node = _compose(text, file)
    if node is None:
        raise RecipeError([Problem(1, 1, "the recipe is empty; recipes/README.md lists its keys", file)])
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([Problem(1, 1, "a recipe is a mapping of keys to values (`model: ...`)", file)])
    source.tree = _construct(node, (), source)
    return source


def read_value(text: str, name: str) -> tuple[Any, Source]:
    """Reads one value, by the same rules as a file.

    Args:
        text (`str`): YAML, such as `3e-5` or `{scheme: int8_dynamic}`.
        name (`str`): what messages call the place.

    Returns:
        `tuple[Any, Source]`: the value, and its parts' places, without lines.

    Raises:
        [`RecipeError`]: if it is no YAML, or a value that no recipe holds.
    """
    source = Source(name)
    try:
        node = _compose(text, name)
        if node is None:
            raise RecipeError([Problem(0, 0, 'no value; write null to remove the key, or "" for no text', name)])
        value = _construct(node, (), source)
        if source.problems:
            raise RecipeError(source.problems)
    except RecipeError as error:
        raise RecipeError([Problem(0, 0, problem.message, name) for problem in error.problems]) from None
    source.keys = dict.fromkeys(source.keys, Place(name, 0, 0))
    source.values = dict.fromkeys(source.values, Place(name, 0, 0))
    return value, source


def _compose(text: str, file: str) -> yaml.Node | None:
    """The YAML nodes of a text without anchors, aliases or endless brackets; `None` where there is nothing."""
    try:
        _check_events(text, file)
        return yaml.compose(text, Loader=_Loader)
    except RecipeError:  # a ValueError, like what follows
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = error.problem or str(error.context)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        what = error.reason
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as "\\UFFFFFFFF"
        line, column, what = 1, 1, str(error)
    raise RecipeError([Problem(line, column, f"not valid YAML: {what}", file)])


def _check_events(text: str, file: str) -> None:
    depth, problems = 0, []
    for event in yaml.parse(text, Loader=_Loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            # Aliases share nodes: one would be visited once a use, and its position would be that of another key.
            message = f"a recipe has no aliases (`*{anchor}`); write the value out"
            problems.append(Problem(*_position(event), message, file))
        elif anchor:
            message = f"a recipe has no anchors (`&{anchor}`); remove it"
            problems.append(Problem(*_position(event), message, file))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                message = f"nested more than {MAX_DEPTH} levels deep, which no key of a recipe needs"
                raise RecipeError([*problems, Problem(*_position(event), message, file)])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    if problems:
        raise RecipeError(problems)


def _construct(node: yaml.Node, path: KeyPath, source: Source) -> Any:
    """The plain value of a node; fills the positions and problems of `source`."""
    position = _position(node)
    source.values[path] = Place(source.file, *position)
    if node.tag not in _CORE_TAGS:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        message = f"{_quote(node)} reads as YAML `{kind}`, which recipes do not use; put it in quotes if it is text"
        source.problems.append(Problem(*position, message, source.file))
        return None
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(node, path, source)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, index), source) for index, item in enumerate(node.value)]
    kind = node.tag.rsplit(":", 1)[-1]
    try:
        value = _Loader("").construct_object(node)
    except (ValueError, LookupError, yaml.YAMLError):  # such as `!!int x`, `!!bool x`, or ten thousand digits
        source.problems.append(Problem(*position, f"{_quote(node)} is no {kind}", source.file))
        return None
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        message = f"{_quote(node)} is too large: a whole number has {_MAX_BITS} bits at most"
        source.problems.append(Problem(*position, message, source.file))
        return None
    return value


def _construct_mapping(node: yaml.MappingNode, path: KeyPath, source: Source) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        position = _position(key_node)
        # Layers are named by their number, which is text in JSON and a number in YAML.
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.rsplit(":", 1)[-1] not in ("str", "int"):
            message = f"a key must be text, but this is {_quote(key_node)}; put it in quotes or remove it"
            source.problems.append(Problem(*position, message, source.file))
            continue
        key = key_node.value
        here = (*path, key)
        if key in tree:
            first = source.keys[here].line
            message = f"key `{key}` is repeated (first on line {first}); keep one of them"
            source.problems.append(Problem(*position, message, source.file))
            continue
        source.keys[here] = Place(source.file, *position)
        tree[key] = _construct(value_node, here, source)
    return tree


def _position(part: yaml.Node | yaml.Event) -> tuple[int, int]:
    mark = part.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _quote(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return repr(node.value if len(node.value) <= 40 else node.value[:37] + "...")
