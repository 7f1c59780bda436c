"""The recipe that is being made, and what became of each value of the source."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from .reading import MigrationError

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipe.schema import Recipe

Part = str | int  # "" is the top level, a name is a section, a number one of several prunings
# Nothing that exists: a run stops and names the key.
MODEL, TRAIN, VALIDATION, TEACHER = (
    "./FILL-IN/model",
    "./FILL-IN/train.csv",
    "./FILL-IN/validation.csv",
    "./FILL-IN/teacher",
)
OUTPUT = "outputs/migrated"


@dataclass(frozen=True)
class Note:
    """What became of one value.

    Args:
        line (`int`): of the source; 0 for what is not in it.
        source (`str`): the key and value there.
        kind (`str`): `"same"`, `"near"`: something close, as `remark` says; or `"none"`: nothing.
        became (`str`): what it is now; empty for `"none"`.
        remark (`str`): the difference; or the reason, and the nearest thing there is.
    """

    line: int
    source: str
    kind: Literal["same", "near", "none"]
    became: str
    remark: str = ""


@dataclass(frozen=True)
class _Cell:
    value: Any
    line: int
    comment: str


@dataclass
class Draft:
    """A recipe in the making.

    Args:
        file (`str`): the source's name, for messages.
        kind (`str`, *optional*, defaults to `""`): what it is, such as `"SparseML"`.
    """

    file: str
    kind: str = ""
    notes: list[Note] = field(default_factory=list)
    top: dict[str, _Cell] = field(default_factory=dict)
    sections: dict[str, dict[str, _Cell]] = field(default_factory=dict)
    prunings: list[dict[str, _Cell]] = field(default_factory=list)

    def new_pruning(self) -> int:
        """The number of a further, empty pruning section."""
        self.prunings.append({})
        return len(self.prunings) - 1

    def get(self, part: Part, key: str) -> Any:
        """A value that was set, or `None`."""
        if isinstance(part, str) and part and part not in self.sections:
            return None
        cell = self._part(part).get(key)
        return cell.value if cell else None

    def put(self, part: Part, key: str, value: Any, line: int, source: str, remark: str = "") -> bool:
        """Sets a value of the recipe; with `remark`, one that is only near.

        Args:
            part (`str` or `int`): `""`, a section, or the number of a pruning.
            key (`str`): of the recipe.
            value: a plain value.
            line (`int`), source (`str`): where it comes from.
            remark (`str`, *optional*): how it differs from the source.

        Returns:
            `bool`: whether it was set; a value that is there stays, and the new one is listed.
        """
        cells = self._part(part)
        name = self._name(part, key)
        if key in cells and cells[key].value != value:
            first = cells[key]
            self.none(line, source, f"`{name}` is {first.value} by line {first.line}, and a recipe has one")
            return False
        note = Note(line, _line(source), "near" if remark else "same", f"{name}: {_flow(value)}", _line(remark))
        self.notes.append(note)
        cells.setdefault(key, _Cell(value, line, f"line {line}: {source}" + (f" ({remark})" if remark else "")))
        return True

    def default(self, part: Part, key: str, value: Any, why: str) -> None:
        """Sets what the source leaves to its own defaults, or to the user."""
        cells = self._part(part)
        if key not in cells:
            cells[key] = _Cell(value, 0, why)
            self.notes.append(
                Note(0, "(not in the file)", "near", f"{self._name(part, key)}: {_flow(value)}", _line(why))
            )

    def kept(self, line: int, source: str, became: str, remark: str = "") -> None:
        """Notes a value that needs no key: hf_quant does so anyway."""
        self.notes.append(Note(line, _line(source), "near" if remark else "same", _line(became), _line(remark)))

    def none(self, line: int, source: str, remark: str) -> None:
        """Notes a value that has no equivalent, with the reason and the nearest thing."""
        self.notes.append(Note(line, _line(source), "none", "", _line(remark)))

    def fail(self, line: int, message: str) -> MigrationError:
        """An error at a line of the source."""
        return MigrationError(self.file, line, message)

    def render(self) -> tuple[str, dict[int, int]]:
        """The recipe as YAML with comments, and the source's line by line of the recipe."""
        lines = [
            f"# Migrated by `hf-quant migrate` from {_printable(Path(self.file).name)} ({self.kind});",
            "# the lines are those of that file.",
        ]
        missing = sorted(note for note in map(_missing, self.notes) if note)
        if missing:
            lines += ["# No equivalent:", *(f"#   {text}" for _, text in missing)]
        origin: dict[int, int] = {}

        def write(cells: dict[str, _Cell], indent: str) -> None:
            for key, cell in cells.items():
                lines.append(f"{indent}{key}: {_flow(cell.value)}  # {_line(cell.comment)}")
                origin[len(lines)] = cell.line
                indent = " " * len(indent)

        lines.append("")
        write({key: self.top[key] for key in ("model", "task") if key in self.top}, "")
        data = self.sections.get("data")
        for name, cells in (("data", data), ("training", self.sections.get("training"))):
            if cells:
                lines += ["", f"{name}:"]
                write(cells, "  ")
        if self.prunings:
            lines += ["", "pruning:"]
            for cells in self.prunings:
                write(cells, "  " if len(self.prunings) == 1 else "  - ")
        for name in ("distillation", "quantization"):
            if name in self.sections:
                empty = not self.sections[name]
                lines += ["", f"{name}: {{}}" if empty else f"{name}:"]
                write(self.sections[name], "  ")
        lines.append("")
        write({key: cell for key, cell in self.top.items() if key not in ("model", "task")}, "")
        return "\n".join(lines) + "\n", origin

    def check(self, text: str, origin: dict[int, int]) -> Recipe:
        """Reads the recipe back.

        Raises:
            [`MigrationError`]: if a value of the source is none that a recipe may have, at its line there.
        """
        from ..recipe.schema import Recipe
        from ..recipe.source import RecipeError

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(text, encoding="utf-8")
            try:
                return Recipe.from_yaml(path)
            except RecipeError as error:
                problem = error.problems[0]
                raise self.fail(
                    origin.get(problem.line, 0), f"the recipe cannot have this: {problem.message}"
                ) from None

    def ordered_notes(self) -> list[Note]:
        """The notes in the order of the source's lines, those on what it does not say last."""
        alone = len(self.prunings) == 1
        notes = sorted(self.notes, key=lambda note: note.line or 10**9)
        if not alone:
            return notes
        return [dataclasses.replace(note, became=note.became.replace("pruning[0].", "pruning.")) for note in notes]

    def table(self) -> Table:
        """What became of each value, in the order of the source's lines."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.file} ({self.kind})", title_justify="left")
        table.add_column("line", justify="right")
        table.add_column("source")
        table.add_column("recipe")
        table.add_column("remark")
        for note in self.ordered_notes():
            became = note.became or "no equivalent"
            style = {"same": "", "near": "yellow", "none": "red"}[note.kind]
            table.add_row(str(note.line or ""), Text(note.source), Text(became, style), Text(note.remark))
        return table

    def _part(self, part: Part) -> dict[str, _Cell]:
        if isinstance(part, int):
            return self.prunings[part]
        return self.sections.setdefault(part, {}) if part else self.top

    def _name(self, part: Part, key: str) -> str:
        if isinstance(part, int):
            return f"pruning[{part}].{key}"
        return f"{part}.{key}" if part else key


def _missing(note: Note) -> tuple[int, str] | None:
    return (note.line, f"line {note.line}: {note.source}: {note.remark}") if note.kind == "none" else None


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return re.sub(r"\n\.\.\.\n$", "", text).strip()


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _printable(name: str) -> str:
    return _line(name.encode("utf-8", "replace").decode("utf-8"))
