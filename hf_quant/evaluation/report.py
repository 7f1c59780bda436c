"""The report of a comparison: as a table, JSON, Markdown and HTML."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .results import Figures, decode, encode

if TYPE_CHECKING:
    from rich.console import RenderableType

# Raised when fields change their meaning.
SCHEMA = "hf_quant.comparison/1"
TEXT_WIDTH = 100


@dataclass(frozen=True)
class Comparison(Figures):
    """What [`compare`] found. `print` it, or write it with `to_json`, `to_markdown`, `to_html` or `save`."""

    def __rich__(self) -> RenderableType:
        from .text import renderable

        return renderable(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=TEXT_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _repr_html_(self) -> str:
        from .html import fragment

        return fragment(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON, metrics as fractions; written to `path` where one is given.

        Numbers that JSON does not have are the strings `"nan"`, `"inf"` and `"-inf"`.
        """
        text = json.dumps({"schema": SCHEMA, **encode(self)}, indent=2, ensure_ascii=False, allow_nan=False)
        return write_text_file(text + "\n", path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Comparison:
        """The report back from `to_json`.

        Args:
            source (`str`): a path, or the JSON itself.

        Raises:
            `FileNotFoundError`: if there is no such file.
            `ValueError`: if it is not such a report, naming the place.
        """
        text = str(source)
        if not text.lstrip().startswith("{"):
            text = Path(source).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"This is not JSON: {error}. Expected a report.json of hf_quant.") from error
        schema = values.pop("schema", None) if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"The report's `schema` is {schema!r}; this version of hf_quant reads {SCHEMA!r}.")
        report: Comparison = decode(cls, values)
        return report

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as GitHub-flavoured Markdown; written to `path` where one is given."""
        from .markdown import document

        return write_text_file(document(self), path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML file with plots, which needs nothing else; written to `path` where one is given."""
        from .html import document

        return write_text_file(document(self), path)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `report.json`, `report.md` and `report.html` into a folder, which is made if it is not there."""
        directory = Path(folder)
        # All three before the first is written.
        files = {
            "report.json": self.to_json(),
            "report.md": self.to_markdown(),
            "report.html": self.to_html(),
        }
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text_file(text, directory / name)


def write_text_file(text: str, path: str | os.PathLike[str] | None) -> str:
    """Write a text where a path is given, and return it."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
