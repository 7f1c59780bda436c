"""From a path to the values of one recipe: what it extends laid below it, what `--set` says laid above it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .source import KeyPath, Place, Problem, RecipeError, Source, read_source, read_value
from .values import dotted, nearest, show

EXTENDS = "extends"
_PART = re.compile(r"([A-Za-z_]\w*)((?:\[\d{1,4}\])*)")


def resolve(path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> Source:
    """Reads a recipe, all that it extends, and lays `overrides` above it.

    Mappings merge key by key; anything else replaces what the extended recipe says, and null removes a key of it.

    Args:
        path (`str` or `Path`): a YAML file.
        overrides (`Mapping[str, str]`, *optional*): YAML texts by key, such as `{"training.learning_rate": "3e-5"}`.

    Returns:
        [`Source`]: the merged values, each with the place where it stands, and what could not be read.

    Raises:
        `FileNotFoundError`: if there is no such file.
        [`RecipeError`]: if it is no mapping in YAML.
    """
    source, *above = reversed(_read_chain(path))
    for child in above:
        source.file = child.file
        source.problems += child.problems
        source.whole &= child.whole
        source.values[()] = child.values[()]
        _lay_over(source, child, source.tree, child.tree, ())
    for key, text in (overrides or {}).items():
        _override(source, key, text)
    return source


def parse_settings(given: Iterable[str]) -> dict[str, str]:
    """`["training.learning_rate=3e-5"]`, as `--set` takes it, as overrides.

    Raises:
        `ValueError`: for what is not KEY=VALUE, and for a key that is given twice.
    """
    overrides: dict[str, str] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not (key and equals):
            raise ValueError(f"--set {one!r} is not KEY=VALUE. Write, for example, --set training.learning_rate=3e-5.")
        if key in overrides:
            raise ValueError(f"--set {key} is given twice: {overrides[key]} and {value}. Keep one of them.")
        overrides[key] = value
    return overrides


def _read_chain(path: str | os.PathLike[str]) -> list[Source]:
    """The recipe, the one it extends, the one that extends, and so on."""
    chain = [read_source(path)]
    files = [os.path.realpath(path)]
    while EXTENDS in chain[-1].tree:
        child = chain[-1]
        wanted = child.tree.pop(EXTENDS)
        problem = child.problem((EXTENDS,), "")
        _forget(child, (EXTENDS,))
        if problem.place in {one.place for one in child.problems}:  # not readable, as said already
            child.whole = False
            break
        file = os.path.join(os.path.dirname(child.file), wanted) if isinstance(wanted, str) else ""
        message = _refuse_base(wanted, file, files, chain)
        if not message:
            try:
                chain.append(read_source(file))
                files.append(os.path.realpath(file))
                continue
            except RecipeError as error:
                child.problems += error.problems
            except OSError as error:
                message = f"`{EXTENDS}`: {file} cannot be read ({error.strerror})"
        if message:
            child.problems.append(Problem(problem.line, problem.column, message, problem.file))
        child.whole = False
        break
    return chain


def _refuse_base(wanted: Any, file: str, files: list[str], chain: list[Source]) -> str:
    """What is wrong with the value of `extends`; empty where nothing is."""
    if not isinstance(wanted, str) or not wanted:
        return f"`{EXTENDS}` must be the path of another recipe, but is {show(wanted)}"
    if not os.path.isfile(file):
        what = "is a folder" if os.path.isdir(file) else "does not exist"
        folder = os.path.dirname(file) or "."
        beside = sorted(one.name for one in Path(folder).glob("*.y*ml")) if os.path.isdir(folder) else []
        hint = nearest(os.path.basename(file), beside) if beside else ""
        return f"`{EXTENDS}` names {file}, which {what} (its path starts from the folder of this recipe){hint}"
    if os.path.realpath(file) in files:
        first = files.index(os.path.realpath(file))
        circle = " -> ".join([*(source.file for source in chain[first:]), file])
        return f"`{EXTENDS}` goes in a circle: {circle}. Remove one of them"
    return ""


def _lay_over(base: Source, child: Source, below: dict[str, Any], above: dict[str, Any], path: KeyPath) -> None:
    unreadable = {problem.place for problem in child.problems}
    for key, value in above.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            base.keys[here], base.values[here] = child.keys[here], child.values[here]
            _lay_over(base, child, below[key], value, here)
            continue
        removes = value is None and child.values[here] not in unreadable
        if removes and key not in below:
            base.problems.append(child.problem(here, _nothing_to_remove(here, below)))
            continue
        below.pop(key, None)
        _forget(base, here)
        if not removes:
            below[key] = value
            _copy_places(child.keys, base.keys, here)
            _copy_places(child.values, base.values, here)


def _nothing_to_remove(path: KeyPath, tree: Mapping[str, Any]) -> str:
    message = f"`{dotted(path)}` is null, which removes a key, but there is none to remove; write {{}} for an empty "
    return message + f"section{nearest(str(path[-1]), tree) if tree else ''}"


def _override(source: Source, key: str, text: str) -> None:
    """Puts one value into its place; what does not work becomes a problem of `source`."""
    name = f"--set {key}"
    if not isinstance(text, str):
        raise TypeError(f"overrides[{key!r}] is {text!r}; give text, as after --set: {show(text)!r}")
    try:
        path = _in_lists(source.tree, _parse_key(key, name), name)
        value, read = read_value(text, name)
        container, created = _container(source.tree, path, name)
    except RecipeError as error:
        source.problems += error.problems
        return
    place = Place(name, 0, 0)
    for made in created:
        source.keys[made] = source.values[made] = place
    if value is None and isinstance(container, list):
        source.problems.append(Problem(0, 0, "an entry of a list cannot be removed; give the whole list", name))
        return
    if value is None and path[-1] not in container:
        source.problems.append(Problem(0, 0, _nothing_to_remove(path, container), name))
        return
    _forget(source, path)
    if value is None:
        del container[path[-1]]
        return
    container[path[-1]] = value
    source.keys[path] = place
    source.keys.update({(*path, *below): place for below in read.keys})
    source.values.update({(*path, *below): place for below in read.values})


def _parse_key(key: str, name: str) -> KeyPath:
    path: list[str | int] = []
    for part in key.split("."):
        found = _PART.fullmatch(part)
        if found is None:
            message = f"{part!r} is no key; write, for example, --set training.learning_rate=3e-5"
            raise RecipeError([Problem(0, 0, message, name)])
        path += [found[1], *(int(index) for index in re.findall(r"\d+", found[2]))]
    if path[0] == EXTENDS:
        message = f"`{EXTENDS}` can stand in a file only; run a recipe that extends the one you want"
        raise RecipeError([Problem(0, 0, message, name)])
    return tuple(path)


def _in_lists(tree: dict[str, Any], path: KeyPath, name: str) -> KeyPath:
    """`pruning` may be one mapping or a list: makes a path of the one kind fit the other."""
    value = tree.get("pruning")
    if path[0] != "pruning" or len(path) == 1:
        return path
    if isinstance(value, dict) and path[1] == 0:
        return ("pruning", *path[2:])
    if isinstance(value, list) and not isinstance(path[1], int):
        if len(value) != 1:
            message = f"`pruning` is a list of {len(value)}; say which, as in pruning[0].{dotted(path[1:])}"
            raise RecipeError([Problem(0, 0, message, name)])
        return ("pruning", 0, *path[1:])
    return path


def _container(tree: dict[str, Any], path: KeyPath, name: str) -> tuple[Any, list[KeyPath]]:
    """The mapping or list that holds the last part of `path`; missing sections are made, and their paths returned."""
    container: Any = tree
    created: list[KeyPath] = []
    for depth, part in enumerate(path):
        here = dotted(path[:depth])
        if isinstance(part, int) and not (isinstance(container, list) and part < len(container)):
            what = f"has {len(container)} entries" if isinstance(container, list) else "is no list"
            raise RecipeError([Problem(0, 0, f"`{here}` {what}, so there is no `{here}[{part}]`", name)])
        if isinstance(part, str) and not isinstance(container, dict):
            raise RecipeError([Problem(0, 0, f"`{here}` is {show(container)}, so it has no key `{part}`", name)])
        if depth == len(path) - 1:
            break
        inner = container[part] if isinstance(part, int) else container.get(part)
        if inner is None and isinstance(path[depth + 1], str):
            inner = container[part] = {}
            created.append(path[: depth + 1])
        container = inner
    return container, created


def _forget(source: Source, path: KeyPath) -> None:
    for places in (source.keys, source.values):
        for one in [one for one in places if one[: len(path)] == path]:
            del places[one]


def _copy_places(source: dict[KeyPath, Place], target: dict[KeyPath, Place], path: KeyPath) -> None:
    target.update({one: place for one, place in source.items() if one[: len(path)] == path})
