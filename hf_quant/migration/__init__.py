"""Configurations of other projects as recipes: SparseML, Neural Compressor, NNCF, and torch.ao snippets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .neural_compressor import is_neural_compressor, read_neural_compressor
from .nncf import is_nncf, read_nncf
from .reading import MigrationError, Node, front_matter, parse_python, read_text, read_tree
from .report import MODEL, OUTPUT, TRAIN, VALIDATION, Draft, Note
from .sparseml import is_sparseml, read_sparseml
from .torch_ao import read_torch_ao

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipe.schema import Recipe

__all__ = ["Migration", "MigrationError", "Note", "migrate"]

_PYTHON = re.compile(
    r"^\s*(?:from\s+[\w.]+\s+import|import\s+\w)|\btorch\.|\.qconfig\s*=|\bquantize_?\w*\(|\bprune\.\w+\(|qconfig\w*\(",
    re.M,
)


@dataclass(frozen=True)
class Migration:
    """A recipe, and what became of each value of the file that it was made from.

    Args:
        kind (`str`): what the file is, such as `"SparseML"`.
        text (`str`): the recipe as YAML; comments name the lines of the file.
        recipe ([`Recipe`]): the same, read back.
        notes (list of [`Note`]): one for each value of the file, and for what the file does not say.
        draft ([`Draft`]): what they were made from.
    """

    kind: str
    text: str
    recipe: Recipe
    notes: list[Note]
    draft: Draft

    @property
    def missing(self) -> list[Note]:
        """What has no equivalent."""
        return [note for note in self.notes if note.kind == "none"]

    def table(self) -> Table:
        """What became of each value, for a terminal."""
        return self.draft.table()


def migrate(
    path: str | Path, *, model: str | None = None, task: str | None = None, epochs: float | None = None
) -> Migration:
    """Makes a recipe of a SparseML recipe, a Neural Compressor or NNCF configuration, or a torch.ao snippet.

    Which of these a file is, is told by what is in it. Nothing in it is executed or imported.

    Args:
        path (`str` or `Path`): YAML, JSON (comments are allowed), Markdown with YAML at its top, or Python.
        model (`str`, *optional*): folder or hub id of the float model; without it a placeholder at which a run stops.
        task (`str`, *optional*): a GLUE task; without it there are placeholders for files.
        epochs (`float`, *optional*): of the whole training, in the place of what the file says.

    Returns:
        [`Migration`]: the recipe, checked, and what became of each value.

    Raises:
        `FileNotFoundError`: if there is no such file.
        [`MigrationError`]: as `file:line: message`, for what cannot be read, or neither prunes nor distils
            nor quantizes.
        `ValueError`: if the task or the number of epochs is none.
    """
    if epochs is not None and not 0 < epochs <= 1e6:
        raise ValueError(f"--epochs is {epochs:g}, but must be above 0 and at most 1,000,000")
    if task is not None:
        from ..evaluation.tasks import get_task

        get_task(task)
    text, draft = read_text(path), Draft(str(path))
    _read(text, draft, epochs)
    if model is not None:
        draft.top.pop("model", None)
        draft.default("", "model", model, "--model")
    draft.default("", "model", MODEL, "the file names no model: write a folder or hub id")
    if task is not None:
        draft.default("", "task", task, "--task")
    else:
        why = "the file names no data: write your files, or `task` in the place of this section"
        draft.default("data", "train", TRAIN, why)
        draft.default("data", "validation", VALIDATION, why)
        draft.default("data", "text_columns", ["text"], why)
    draft.default("", "output", OUTPUT, "the file names no folder for results")
    if not (draft.prunings or draft.sections.keys() & {"distillation", "quantization"}):
        missing = "; ".join(f"line {note.line}: {note.source}" for note in draft.notes if note.kind == "none")
        raise draft.fail(0, f"nothing in it prunes, distils or quantizes as hf_quant can ({missing or 'no such key'})")
    made, origin = draft.render()
    return Migration(draft.kind, made, draft.check(made, origin), draft.ordered_notes(), draft)


def _read(text: str, draft: Draft, epochs: float | None) -> None:
    """Fills the draft from the file, as what it is."""
    matter = front_matter(text)
    python = draft.file.endswith(".py")
    try:
        tree = None if python else read_tree(text if matter is None else matter, draft.file)
    except MigrationError:
        if matter is not None or not _PYTHON.search(text) or not _parses(text):
            raise
        tree, python = None, True
    if tree is None or not isinstance(tree.value, (dict, list)):
        if not python and not (_PYTHON.search(text) and _parses(text)):
            raise draft.fail(tree.line if tree else 1, _unknown("plain text"))
        draft.kind = "torch.ao"
        read_torch_ao(text, draft, epochs)
        return
    _read_tree(tree, draft, epochs)


def _read_tree(tree: Node, draft: Draft, epochs: float | None) -> None:
    if is_sparseml(tree):
        draft.kind = "SparseML"
        read_sparseml(tree, draft, epochs)
    elif is_nncf(tree):
        draft.kind = "NNCF"
        read_nncf(tree, draft, epochs)
    elif _is_recipe(tree):
        raise draft.fail(tree.line, "this is a recipe of hf_quant already; run it with `hf-quant run`")
    elif is_neural_compressor(tree):
        draft.kind = "Neural Compressor"
        read_neural_compressor(tree, draft, epochs)
    else:
        keys = ", ".join(list(tree.value)[:8]) if isinstance(tree.value, dict) else "a list"
        raise draft.fail(tree.line, _unknown(keys or "no keys"))


def _is_recipe(tree: Node) -> bool:
    if not isinstance(tree.value, dict):
        return False
    parts = tree.value.get("quantization"), tree.value.get("pruning")
    return "output" in tree.value and isinstance(tree.value.get("model", Node(None, 0)).value, str) and any(parts)


def _parses(text: str) -> bool:
    try:
        parse_python(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _unknown(what: str) -> str:
    return (
        f"cannot tell what this file is ({what}). Known are SparseML recipes (modifiers), Neural Compressor "
        "(quantization, pruning), NNCF (compression) and Python that uses torch.ao, torch.nn.utils.prune or torchao"
    )
