"""The value of `eval(...)` expressions in old recipes: numbers, names and `+ - * / // % **`, nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

from .reading import parse_python

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {"min": min, "max": max, "abs": abs, "round": round, "int": int}
_MOST_CHARACTERS = 1000
_LARGEST = 1e12


def calculate(expression: str, variables: Mapping[str, Number]) -> Number:
    """The number that an arithmetic expression stands for; nothing is executed.

    Args:
        expression (`str`): such as `"num_epochs - 2 * qat_epochs"`; `min`, `max`, `abs`, `round` and `int` may be
            called.
        variables (`dict[str, int or float]`): the numbers that names stand for.

    Returns:
        `int` or `float`: finite, at most 1e12 in magnitude, as Python's own arithmetic gives it.

    Raises:
        `ValueError`: naming the part that is no arithmetic, the name that is unknown, or the value out of range.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ValueError(f"an expression of {len(expression)} characters; {_MOST_CHARACTERS} are allowed")
    try:
        tree = parse_python(expression.strip(), "eval")
        return _value(tree.body, variables)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{_short(expression)} is no arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError(f"{_short(expression)} divides by 0") from None


def _value(node: ast.expr, variables: Mapping[str, Number]) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return _finite(node.value, node)
    if isinstance(node, ast.Name):
        if node.id not in variables:
            known = ", ".join(sorted(variables)) or "none"
            raise ValueError(f"unknown variable {node.id!r}; numbers of this file: {known}")
        return _finite(variables[node.id], node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        operand = _value(node.operand, variables)
        return -operand if isinstance(node.op, ast.USub) else +operand
    if isinstance(node, ast.BinOp) and (isinstance(node.op, ast.Pow) or type(node.op) in _BINARY):
        left, right = _value(node.left, variables), _value(node.right, variables)
        if isinstance(node.op, ast.Pow):
            return _finite(_power(left, right, node), node)
        return _finite(_BINARY[type(node.op)](left, right), node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if node.keywords or not node.args or any(isinstance(arg, ast.Starred) for arg in node.args):
            raise ValueError(f"{_short(ast.unparse(node))}: give plain numbers")
        numbers = [_value(arg, variables) for arg in node.args]
        try:
            return _finite(
                _FUNCTIONS[node.func.id](*(numbers if len(numbers) > 1 else _one(node.func.id, numbers))), node
            )
        except TypeError:
            raise ValueError(f"{_short(ast.unparse(node))}: {node.func.id} takes other numbers") from None
    raise ValueError(
        f"{_short(ast.unparse(node))} is not allowed in an expression; numbers, names and + - * / // % ** are"
    )


def _one(name: str, numbers: list[Number]) -> list[Number]:
    # Python's min and max of one number want an iterable; here they are that number.
    return [*numbers, *numbers] if name in ("min", "max") else numbers


def _power(base: Number, exponent: Number, node: ast.expr) -> Number:
    # Before it is computed: 9**9**9 would not end.
    if base and abs(exponent) * abs(math.log2(abs(base))) > 64:
        raise ValueError(f"{_short(ast.unparse(node))} is beyond {_LARGEST:g}")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError(f"{_short(ast.unparse(node))} is no real number")
    return result


def _finite(value: Number, node: ast.expr) -> Number:
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{_short(ast.unparse(node))} is beyond {_LARGEST:g}")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
