"""SparseML recipes: variables, stages and lists of modifiers, in YAML or in the front matter of Markdown."""

from __future__ import annotations

import re
from typing import Any

from .arithmetic import calculate
from .reading import Node
from .report import Draft
from .section import Section
from .sparseml_pruning import pruning
from .sparseml_quantization import ONE_SHOT, one_shot, quantization
from .sparseml_training import Training, distillation
from .values import plain

_EVAL = re.compile(r"eval\((.*)\)", re.DOTALL)
_DEEPEST = 50
_DESCRIPTIONS = ("metadata", "recipe_metadata", "version", "framework", "__metadata__")


def is_sparseml(node: Node) -> bool:
    """Whether a file's values look like a SparseML recipe."""
    if isinstance(node.value, list):
        return bool(node.value) and all(_modifier(item) for item in node.value)
    if not isinstance(node.value, dict):
        return False
    return any(_holds_modifiers(key, value) or _stage(value) for key, value in node.value.items())


def read_sparseml(node: Node, draft: Draft, epochs: float | None) -> None:
    """Fills a draft with what the modifiers of a SparseML recipe say.

    Args:
        node ([`Node`]): the file.
        draft ([`Draft`]): to be filled.
        epochs (`float`, *optional*): of the whole training, in the place of what the file says.

    Raises:
        [`MigrationError`]: for a value that cannot be what its key wants, at its line.
    """
    found = _Modifiers(draft)
    if isinstance(node.value, list):
        found.add_list(node, {})
    else:
        found.add_mapping(node, {})
    training = Training(draft, epochs or found.epochs())
    found.note_variables()
    # The number of epochs comes first, and what keeps zeros after what prunes.
    order = ("EpochRangeModifier", "LearningRate", "Pruning", "ConstantPruning", "LayerThinning")

    def rank(entry: tuple[str, Section]) -> int:
        return max((at for at, part in enumerate(order) if part in entry[0]), default=len(order))

    for name, section in sorted(found.modifiers, key=rank):
        _translate(name, section, training)
        if "LearningRate" not in name:  # these are read together, by finish()
            section.rest()
    training.finish()


def _translate(name: str, section: Section, training: Training) -> None:
    if name == "EpochRangeModifier":
        training.epoch_range(section)
    elif name in ("SetLearningRateModifier", "LearningRateFunctionModifier"):
        training.add_learning_rate(name, section)
    elif name == "SetWeightDecayModifier":
        training.weight_decay(section)
    elif name in ("DistillationModifier", "PerLayerDistillationModifier"):
        distillation(name, section, training)
    elif name in ("QuantizationModifier", "LegacyQuantizationModifier"):
        quantization(name, section, training)
    elif name in ONE_SHOT:
        one_shot(name, section)
    elif not pruning(name, section, training):
        nearest = "set requires_grad on the model, then use a Trainer of your own with Recipe.callbacks()"
        remark = f"a recipe trains all parameters; nearest: {nearest}"
        remark = remark if name == "TrainableParamsModifier" else "hf_quant has nothing that does this"
        section.draft.none(section.line, name, remark)
        section.rest(dict.fromkeys(section.values, f"belongs to {name}"))


class _Modifiers:
    """The modifiers of a file with their values computed, and which variables were used for that."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.modifiers: list[tuple[str, Section]] = []
        self.variables: list[tuple[str, Node]] = []
        self.used: set[int] = set()  # lines of variables

    def add_mapping(self, node: Node, outer: dict[str, Node]) -> None:
        """The modifiers of the file, or of a stage within it."""
        own = {
            key: value
            for key, value in node.value.items()
            if not isinstance(value.value, (dict, list)) and key not in _DESCRIPTIONS
        }
        self.variables += own.items()
        scope = {**outer, **own}
        for key, value in node.value.items():
            if key in _DESCRIPTIONS:
                self.draft.none(value.line, f"{key}: {value.show()}", "a description; write it as a comment")
            elif _holds_modifiers(key, value):
                self.add_list(value if isinstance(value.value, list) else Node([value], value.line), scope)
            elif _stage(value):
                self.draft.kept(value.line, key, "the same training", "stages follow each other by their epochs")
                self.add_mapping(value, scope)
            elif key not in own:
                self.draft.none(value.line, f"{key}: {value.show()}", "not a key that hf-quant knows of this source")

    def add_list(self, items: Node, scope: dict[str, Node]) -> None:
        """A list of modifiers: tagged, or each a name with its values."""
        fail = self.draft.fail
        for item in items.value:
            named = [(item.tag, item)] if item.tag else list(item.value.items()) if _is_mapping(item) else []
            if not named:
                raise fail(
                    item.line, f"a modifier such as `!EpochRangeModifier` must stand here, but is {item.show()}"
                )
            for name, body in named:
                if not re.fullmatch(r"\w{1,60}", name):
                    raise fail(body.line, f"{name[:40]!r} is no modifier's name")
                if body.value is not None and not isinstance(body.value, dict):
                    raise fail(body.line, f"`{name}` must hold keys and values, but is {body.show()}")
                resolved = self._resolved(Node(body.value or {}, body.line), scope)
                self.modifiers.append((name, Section(self.draft, resolved, name)))

    def epochs(self) -> float | None:
        """The epochs of the whole training: the last that an `EpochRangeModifier` names, else `num_epochs`."""
        ends = [section.values.get("end_epoch") for name, section in self.modifiers if name == "EpochRangeModifier"]
        numbers = [end.value for end in ends if end is not None and _is_number(end.value) and end.value > 0]
        if numbers:
            return float(max(numbers))
        scope = dict(self.variables)
        if "num_epochs" not in scope:
            return None
        node = scope["num_epochs"]
        value = self._computed(node, scope, ())
        if not _is_number(value) or value <= 0:
            return None
        self.draft.put("training", "num_train_epochs", plain(value), node.line, f"num_epochs: {node.show()}")
        return float(value)

    def note_variables(self) -> None:
        """Says of each variable whether a modifier used it."""
        noted = {note.line for note in self.draft.notes}
        for name, node in self.variables:
            source = f"{name}: {node.show()}"
            if node.line in self.used:
                self.draft.kept(node.line, source, "computed into what uses it")
            elif node.line not in noted:
                self.draft.none(node.line, source, "a variable that no modifier uses")

    def _resolved(self, node: Node, scope: dict[str, Node]) -> Node:
        if isinstance(node.value, dict):
            return Node({key: self._resolved(value, scope) for key, value in node.value.items()}, node.line, node.tag)
        if isinstance(node.value, list):
            return Node([self._resolved(item, scope) for item in node.value], node.line, node.tag)
        return Node(self._computed(node, scope, ()), node.line, node.tag)

    def _computed(self, node: Node, scope: dict[str, Node], within: tuple[str, ...]) -> Any:
        found = _EVAL.fullmatch(node.value.strip()) if isinstance(node.value, str) else None
        if found is None:
            self.used.add(node.anchor)
            return node.value
        names = set(re.findall(r"[A-Za-z_]\w*", found[1])) & scope.keys()
        values: dict[str, Any] = {}
        for name in sorted(names):
            if name in within or len(within) > _DEEPEST:
                circle = " -> ".join([*within, name][-5:])
                raise self.draft.fail(node.line, f"the variable `{name}` depends on itself ({circle})")
            self.used.add(scope[name].line)
            values[name] = self._computed(scope[name], scope, (*within, name))
        if found[1].strip() in values:
            return values[found[1].strip()]  # alone, it may be text
        try:
            return calculate(found[1], {name: value for name, value in values.items() if _is_number(value)})
        except ValueError as error:
            raise self.draft.fail(node.line, f"eval(...): {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_mapping(node: Node) -> bool:
    return isinstance(node.value, dict) and bool(node.value)


def _modifier(node: Node) -> bool:
    if node.tag:
        return node.tag.endswith("Modifier")
    return isinstance(node.value, dict) and bool(node.value) and all(key.endswith("Modifier") for key in node.value)


def _holds_modifiers(key: str, node: Node) -> bool:
    if key.endswith("modifiers"):
        return isinstance(node.value, (list, dict))
    return isinstance(node.value, list) and bool(node.value) and all(_modifier(item) for item in node.value)


def _stage(node: Node) -> bool:
    return isinstance(node.value, dict) and any(_holds_modifiers(key, value) for key, value in node.value.items())
