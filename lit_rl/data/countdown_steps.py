"""Solutions of Countdown in written steps: with words that may be swapped, in any equivalent order, terse or wordy."""

import ast
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_rl.rewards.countdown_steps import CONNECTORS

WORDY = 0.5  # share of the solutions with notes of what is left and with doubled connectors
NOTE = 2 / 3  # of a wordy solution's places for a note, those that have one
DOUBLED = 1 / 4  # of its connectors, those that are followed by another
Step = tuple[int, str, int, int]  # left, operator, right, result


@dataclass
class Chain:
    """Numbers and chains that are added, or multiplied; the steps of its solution use them up two by two.

    Args:
        kind: ``+`` or ``*``.
        terms: Each with True where it is subtracted, or divided by.
        negative: The value is minus that of the terms.
    """

    kind: str
    terms: "list[tuple[bool, int | Chain]]"
    negative: bool = False


def written_steps(expression: str, numbers: Sequence[int], seed: int, problem: int) -> str:
    """A solution in steps, drawn among those that compute the same sums and products.

    Any two terms of a sum, and factors of a product, may be joined first, either may be written first, and independent
    parts take turns. No result is negative or broken.

    Args:
        expression: Solution of the problem, as ``lit_rl.data.countdown`` writes it.
        numbers: The problem's, in the order of the prompt.
        seed: Seed of the problems.
        problem: Id of the problem; each has draws of its own.
    """
    rng = random.Random(f"countdown_steps/{seed}/{problem}")
    steps = _steps(rng, expression)
    there = list(numbers)
    wordy = rng.random() < WORDY
    parts = [*_note(rng, there, wordy)]
    for left, operator, right, result in steps:
        there.remove(left)
        there.remove(right)
        there.append(result)
        parts += [f"{_words(rng, wordy)} {left}{operator}{right}={result}", *_note(rng, there, wordy)]
    return " ".join(parts)


def _words(rng: random.Random, wordy: bool) -> str:
    first = rng.choice(CONNECTORS)
    return f"{first} {rng.choice(CONNECTORS)}" if wordy and rng.random() < DOUBLED else first


def _note(rng: random.Random, there: Sequence[int], wordy: bool) -> Iterator[str]:
    if wordy and rng.random() < NOTE:
        yield f"{_words(rng, wordy)}({','.join(map(str, there))})"


def _steps(rng: random.Random, expression: str) -> list[Step]:
    root = _chain(ast.parse(expression, mode="eval").body)
    steps = []
    while isinstance(root, Chain):
        chain, one, two = rng.choice(list(_moves(root)))
        steps.append(_join(rng, chain, one, two))
        root, _ = _settled(root)
    return steps


def _chain(node: ast.expr) -> int | Chain:
    """An expression with the brackets left out that do not change it."""
    if not isinstance(node, ast.BinOp):
        return int(ast.literal_eval(node))
    kind = "+" if isinstance(node.op, ast.Add | ast.Sub) else "*"
    chain = Chain(kind, [])
    for inverse, side in ((False, node.left), (isinstance(node.op, ast.Sub | ast.Div), node.right)):
        part = _chain(side)
        own = part.terms if isinstance(part, Chain) and part.kind == kind else [(False, part)]
        chain.terms += [(inverse ^ flag, term) for flag, term in own]
    return chain


def _moves(chain: Chain) -> Iterator[tuple[Chain, int, int]]:
    """Chains and the positions of two of their numbers that one step can join."""
    for one, (flag, first) in enumerate(chain.terms):
        if isinstance(first, Chain):
            yield from _moves(first)
            continue
        for two in range(one + 1, len(chain.terms)):
            other, second = chain.terms[two]
            if isinstance(second, Chain):
                continue
            upper, lower = (second, first) if flag else (first, second)
            if chain.kind == "+" or flag == other or upper % lower == 0:
                yield chain, one, two


def _join(rng: random.Random, chain: Chain, one: int, two: int) -> Step:
    (other, second), (flag, first) = chain.terms.pop(two), chain.terms.pop(one)
    assert isinstance(first, int)  # as all moves
    assert isinstance(second, int)
    if flag == other:
        left, right = (first, second) if rng.random() < 0.5 else (second, first)
        step = left, chain.kind, right, left + right if chain.kind == "+" else left * right
    else:
        left, right = (second, first) if flag else (first, second)
        if chain.kind == "*":
            flag, step = False, (left, "/", right, left // right)
        else:
            flag = left < right
            step = (right, "-", left, right - left) if flag else (left, "-", right, left - right)
    chain.terms.append((flag, step[-1]))
    return step


def _settled(chain: Chain) -> tuple[int | Chain, bool]:
    """A chain in which chains of one number have become that number; whether its sign is left to who holds it."""
    for row, (flag, term) in enumerate(chain.terms):
        if isinstance(term, Chain):
            settled, negative = _settled(term)
            chain.terms[row] = flag ^ (negative and chain.kind == "+"), settled
            chain.negative ^= negative and chain.kind == "*"
    flag, term = chain.terms[0]
    if len(chain.terms) > 1 or isinstance(term, Chain):
        return chain, False
    return term, chain.negative ^ flag
