"""Python snippets that use torch.ao.quantization, torchao or torch.nn.utils.prune, read by `ast` and never run."""

from __future__ import annotations

import ast
from typing import Any

from .names import FILL_IN
from .patterns import from_regex, subtree
from .reading import parse_python
from .report import Draft
from .torch_ao_calls import Call, Unknown, quantizes
from .torch_ao_prune import prune_call
from .values import plain

_MODULES = ("torch.ao.", "torch.quantization", "torch.nn.utils.prune", "torchao")
_ITSELF = {
    "prepare_qat": "QATCallback prepares the model",
    "prepare_qat_fx": "QATCallback prepares the model",
    "prepare": "ranges follow the training batches; QATCallback prepares the model",
    "prepare_fx": "ranges follow the training batches; QATCallback prepares the model",
    "convert": "QATCallback converts when training ends",
    "convert_fx": "QATCallback converts when training ends",
    "disable_observer": "`freeze_step` says when",
    "enable_observer": "from `start_step` on",
    "enable_fake_quant": "from `start_step` on",
    "QuantStub": "inputs of Linear layers are quantized; no stubs",
    "DeQuantStub": "inputs of Linear layers are quantized; no stubs",
    "QuantWrapper": "inputs of Linear layers are quantized; no stubs",
    "propagate_qconfig_": "QATCallback prepares the model",
    "remove": "zeros stay in the weights when training ends",
    "is_pruned": "a question, not a setting",
}
_NOTHING = {
    "fuse_modules": "transformers models have nothing to fuse",
    "fuse_modules_qat": "transformers models have nothing to fuse",
    "fuse_fx": "transformers models have nothing to fuse",
    "freeze_bn_stats": "transformers models have no batch norm",
    "disable_fake_quant": "fake-quant goes on from `start_step` to the end",
}


def read_torch_ao(text: str, draft: Draft, epochs: float | None) -> None:
    """Fills a draft with what a Python snippet sets, as far as its text says so.

    Args:
        text (`str`): Python; it is parsed, never run.
        draft ([`Draft`]): to be filled.
        epochs (`float`, *optional*): of the training, for the recipe.

    Raises:
        [`MigrationError`]: if it is no Python, or nothing of torch.ao, torchao or prune is in it.
    """
    try:
        tree = parse_python(text)
    except SyntaxError as error:
        raise draft.fail(error.lineno or 1, f"not valid Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise draft.fail(1, f"not valid Python: {error}") from None
    try:
        _Snippet(tree, draft).read()
    except RecursionError:
        raise draft.fail(1, "nested too deeply") from None
    if not draft.notes:
        raise draft.fail(1, "no qconfig, quantize_, quantize_dynamic or prune call is in it")
    if epochs is not None:
        draft.default("training", "num_train_epochs", plain(epochs), "--epochs")


class _Snippet:
    """The calls and assignments of a snippet, in the order of its lines."""

    def __init__(self, tree: ast.Module, draft: Draft) -> None:
        self.tree, self.draft = tree, draft
        self.imports: dict[str, str] = {}
        self.values: dict[str, ast.expr] = {}
        self.loops: set[str] = set()  # names of loops over modules
        twice: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.imports |= {
                    (one.asname or one.name.split(".")[0]): (one.name if one.asname else one.name.split(".")[0])
                    for one in node.names
                }
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {one.asname or one.name: f"{node.module or ''}.{one.name}" for one in node.names}
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                twice |= {name} & self.values.keys()
                self.values[name] = node.value
            elif isinstance(node, (ast.For, ast.comprehension)):
                self.loops |= {inner.id for inner in ast.walk(node.target) if isinstance(inner, ast.Name)}
        for name in twice:
            del self.values[name]

    def read(self) -> None:
        """Reads all statements."""
        seen: set[int] = set()
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, (ast.Call, ast.Assign, ast.Attribute))]
        for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset, -(node.end_col_offset or 0))):
            if id(node) in seen:
                continue
            if isinstance(node, ast.Assign):
                used = self._assignment(node)
            elif isinstance(node, ast.Call):
                used = self._call(node)
            else:
                used = quantizes(self.draft, Call(self._dotted(node), node, [], {}, node.lineno))
            if used:
                seen |= {id(inner) for inner in ast.walk(node)}

    def _assignment(self, node: ast.Assign) -> bool:
        target = node.targets[0]
        if not isinstance(target, ast.Attribute) or target.attr not in ("qconfig", "engine"):
            return False
        source = ast.unparse(node)
        if target.attr == "engine":
            if "quantized" not in ast.unparse(target):
                return False
            self.draft.kept(
                node.lineno, source, "the kernel that is fastest and exact on the machine that runs the model"
            )
            return True
        module = self._path(target.value)
        value = node.value
        if isinstance(value, ast.Constant) and value.value is None:
            self._float(module, node.lineno, source)
            return True
        if module:
            have = self.draft.get("quantization", "targets")
            if isinstance(have, list):
                have.append(subtree(module))
                self.draft.kept(node.lineno, source, f"quantization.targets: {subtree(module)}")
            elif self.draft.get("quantization", "scheme") is None:
                self.draft.put("quantization", "targets", [subtree(module)], node.lineno, source)
            else:
                self.draft.none(node.lineno, source, "a recipe has one scheme; nearest: `targets` and `ignore`")
                return True
        elif module is None:
            self.draft.none(node.lineno, source, "which module this is, the text does not say; nearest: `targets`")
            return True
        return False  # what is assigned says the scheme

    def _float(self, module: str | None, line: int, source: str) -> None:
        if module is None:
            self.draft.none(line, source, "which module this is, the text does not say; nearest: `ignore`")
        elif not module:
            self.draft.none(line, source, "the whole model in float; nearest: no `quantization`")
        else:
            self._ignore([subtree(module)], line, source)

    def _ignore(self, patterns: list[str], line: int, source: str) -> None:
        have = self.draft.get("quantization", "ignore")
        if have is None:
            self.draft.put("quantization", "ignore", patterns, line, source)
        else:
            have.extend(pattern for pattern in patterns if pattern not in have)
            self.draft.kept(line, source, f"quantization.ignore: {patterns}")

    def _call(self, node: ast.Call) -> bool:
        name = self._dotted(node.func)
        last = name.rpartition(".")[2]
        line, source = node.lineno, ast.unparse(node)
        keywords = {key.arg: self._value(key.value) for key in node.keywords if key.arg}
        call = Call(name, node, [self._value(arg) for arg in node.args], keywords, line)
        if last == "from_pretrained" and call.args and isinstance(call.args[0], str):
            if self.draft.get("", "model") is None and "okenizer" not in name and "rocessor" not in name:
                self.draft.put("", "model", call.args[0], line, source)
            return False
        if last in (
            "set_global",
            "set_object_type",
            "set_module_name",
            "set_module_name_regex",
            "set_module_name_object_type_order",
        ):
            return self._mapping(last, call, source)
        if quantizes(self.draft, call):
            return True
        known = name.startswith(_MODULES) or "." not in name or "prune" in name or "quantization" in name
        if known and prune_call(self.draft, last, call, self._path):
            return True
        if known and last in _ITSELF:
            self.draft.kept(line, source, "nothing to set", _ITSELF[last])
            return last.startswith(("remove", "is_pruned"))
        if known and last in _NOTHING:
            self.draft.none(line, source, _NOTHING[last])
            return True
        if name.startswith(_MODULES) and last not in ("QConfigMapping", "with_args"):
            self.draft.none(line, source, "hf-quant does not know this call")
            return True
        return False

    def _mapping(self, method: str, call: Call, source: str) -> bool:
        """A method of `QConfigMapping`."""
        line, none = call.line, call.args[-1:] == [None]
        shown = f"{method}({', '.join(str(arg) for arg in call.args)})"
        if method == "set_global":
            if none:
                self.draft.none(line, shown, "the whole model in float but for exceptions; nearest: `targets`")
            return False
        if method == "set_module_name" and none and isinstance(call.args[0], str):
            self._ignore([subtree(call.args[0])], line, shown)
        elif method == "set_module_name_regex" and none and isinstance(call.args[0], str):
            patterns, reason = from_regex(call.args[0], "match")
            if reason:
                self.draft.none(line, shown, f"{reason}; replace the FILL-IN")
                patterns = [FILL_IN + call.args[0]]
            self._ignore(patterns, line, shown)
        elif method == "set_object_type" and none and str(call.args[0]).endswith("Embedding"):
            self.draft.put("quantization", "embeddings", False, line, shown)
        elif method == "set_object_type" and none and not str(call.args[0]).endswith("Linear"):
            self.draft.kept(line, shown, "float", "only Linear, Conv1D and Embedding are quantized")
        else:
            self.draft.none(line, shown, "a recipe has one scheme; nearest: `targets` and `ignore`")
        return False

    def _dotted(self, node: ast.AST) -> str:
        """The full name of what is called, by the imports; the last part alone for what is computed."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            parts.insert(0, self.imports.get(node.id, node.id))
        return ".".join(parts)

    def _value(self, node: ast.expr, depth: int = 0) -> Any:
        """A plain value, or an [`Unknown`] with its text; names that are assigned once are followed."""
        if isinstance(node, ast.Name) and node.id in self.values and depth < 10:
            return self._value(self.values[node.id], depth + 1)
        if isinstance(node, (ast.Set, ast.List, ast.Tuple)):
            return [self._value(item, depth) for item in node.elts]
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return Unknown(self._dotted(node) or ast.unparse(node), node)

    def _path(self, node: ast.expr) -> str | None:
        """The name of a module in the model: `model.encoder.layer[0]` is `encoder.layer.0`; `""` is the model.

        `None` where the text does not say; `"*"` for the variable of a loop over modules.
        """
        if isinstance(node, ast.Name):
            followed = self.values.get(node.id)
            if isinstance(followed, (ast.Attribute, ast.Subscript)):
                return self._path(followed)
            return "*" if node.id in self.loops else ""
        if isinstance(node, ast.Attribute):
            before = self._path(node.value)
            if before is None or before == "*" or (before == "" and node.attr == "model" and _is_self(node.value)):
                return "" if before == "" else before
            return f"{before}.{node.attr}" if before else node.attr
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            before = self._path(node.value)
            return f"{before}.{node.slice.value!s}" if before and before != "*" else before
        return None


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
