"""Exact values of arithmetic expressions, by walking their syntax tree: nothing is ever evaluated as code."""

import ast
import re
from collections.abc import Callable
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import NamedTuple

MOST_CHARACTERS = 400  # deep brackets beyond this would cost the parser's stack
LARGEST = 10**12  # of a number written or met on the way, of its numerator and denominator
MOST_POWER = 40  # exponent that the compatible mode takes
CHARACTERS = re.compile(r"[0-9+\-*/(). ]+", re.ASCII)
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
}


class Arithmetic(NamedTuple):
    """Value of an expression and the whole numbers that it is written with, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str, compatible: bool = False) -> Arithmetic | None:
    """Evaluate an expression of whole numbers, ``+ - * /``, brackets and blanks, exactly.

    Args:
        text: The expression.
        compatible: Also take what slips through a filter on characters alone: ``**``, ``//``, signs, decimal points.

    Returns:
        The value and the numbers, or None for anything else: other characters, an error of syntax, a division by zero,
        an expression that is too long, or a value that is too large.
    """
    if len(text) > MOST_CHARACTERS or not CHARACTERS.fullmatch(text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        value = _value(tree.body, compatible)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    return Arithmetic(value, tuple(int(digits) for digits in re.findall(r"[0-9]+", text)))


def _value(node: ast.expr, compatible: bool) -> Fraction:
    if isinstance(node, ast.Constant) and (type(node.value) is int or (compatible and type(node.value) is float)):
        return _small(Fraction(str(node.value)))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, compatible), _value(node.right, compatible)
        if type(node.op) in OPERATORS:
            return _small(OPERATORS[type(node.op)](left, right))
        if compatible and isinstance(node.op, ast.FloorDiv):
            return Fraction(left // right)
        if compatible and isinstance(node.op, ast.Pow) and right.denominator == 1 and abs(right) <= MOST_POWER:
            return _small(left ** int(right))
    if compatible and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, compatible)
        return -value if isinstance(node.op, ast.USub) else value
    raise ValueError("not arithmetic")


def _small(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise OverflowError("too large")
    return value
