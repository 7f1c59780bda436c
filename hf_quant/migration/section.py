"""A mapping of the source, read key by key."""

from __future__ import annotations

from typing import Any

from .reading import Node
from .report import Draft, Part


class Section:
    """A mapping of the source that knows which of its keys were noted, so that none is passed over.

    Args:
        draft ([`Draft`]): where to note.
        node ([`Node`]): the mapping.
        name (`str`): for notes and messages; empty for the file itself.

    Raises:
        [`MigrationError`]: if the node is no mapping.
    """

    def __init__(self, draft: Draft, node: Node, name: str) -> None:
        if node.value is None:
            node = Node({}, node.line, node.tag)
        if not isinstance(node.value, dict):
            raise draft.fail(
                node.line, f"`{name or 'the file'}` must be a mapping of keys to values, but is {node.show()}"
            )
        self.draft, self.name, self.line = draft, name, node.line
        self.values: dict[str, Node] = node.value
        self.noted: set[str] = set()

    def take(self, key: str) -> Node | None:
        """The node of a key; `None` where it is missing or null. What is in a mapping is noted by who reads it."""
        node = self.values.get(key)
        if node is not None and isinstance(node.value, dict):
            self.noted.add(key)
        return None if node is None or (node.value is None and not node.tag) else node

    def number(self, key: str) -> float | None:
        """The number of a key."""
        node = self.take(key)
        if node is None:
            return None
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            raise self.draft.fail(node.line, f"`{key}` must be a number, but is {node.show()!r}")
        return float(node.value)

    def word(self, key: str) -> str | None:
        """The text of a key; numbers and truth values as they are written."""
        node = self.take(key)
        if node is None:
            return None
        if isinstance(node.value, (dict, list)):
            raise self.draft.fail(node.line, f"`{key}` must be text, but is {node.show()}")
        return str(node.value)

    def flag(self, key: str, default: bool) -> bool:
        """The truth value of a key; 0 and 1 count."""
        node = self.take(key)
        if node is None:
            return default
        if node.value not in (True, False):
            raise self.draft.fail(node.line, f"`{key}` must be true or false, but is {node.show()!r}")
        return bool(node.value)

    def words(self, key: str) -> list[str]:
        """The texts of a key: a list, or one alone."""
        node = self.take(key)
        if node is None:
            return []
        items = node.value if isinstance(node.value, list) else [node]
        for item in items:
            if not isinstance(item.value, str):
                raise self.draft.fail(item.line, f"`{key}` must hold texts, but has {item.show()!r}")
        return [item.value for item in items]

    def items(self, key: str) -> list[Node]:
        """The items of a list, or one alone; each is noted by who reads it."""
        node = self.take(key)
        if node is None:
            return []
        self.noted.add(key)
        return node.value if isinstance(node.value, list) else [node]

    def line_of(self, key: str) -> int:
        """The line of a key; that of the section where it is missing."""
        return self.values[key].line if key in self.values else self.line

    def source(self, key: str) -> str:
        """A key with its value, as notes write it."""
        where = f"{self.name}." if self.name else ""
        return f"{where}{key}: {self.values[key].show()}" if key in self.values else f"{where}{key}"

    def put(self, part: Part, key: str, value: Any, from_key: str, remark: str = "") -> bool:
        """[`Draft.put`] of a value that comes from `from_key`."""
        self.noted.add(from_key)
        return self.draft.put(part, key, value, self.line_of(from_key), self.source(from_key), remark)

    def kept(self, key: str, became: str, remark: str = "") -> None:
        """[`Draft.kept`] of a key, unless it was noted already."""
        if key in self.values and key not in self.noted:
            self.noted.add(key)
            self.draft.kept(self.line_of(key), self.source(key), became, remark)

    def none(self, key: str, remark: str) -> None:
        """[`Draft.none`] of a key, unless it was noted already."""
        if key in self.values and key not in self.noted:
            self.noted.add(key)
            self.draft.none(self.line_of(key), self.source(key), remark)

    def rest(self, remarks: dict[str, str] | None = None) -> None:
        """Notes all keys that were not noted: with the remark for it, or as unknown."""
        for key, node in self.values.items():
            if node.value is None and not node.tag:
                self.kept(key, "the default")
            else:
                self.none(key, (remarks or {}).get(key, "not a key that hf-quant knows of this source"))
