"""Countdown problems from a seed, each solvable, with a solution to imitate."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from lit_core.errors import InputError

PROMPT = (
    "Using the numbers {numbers}, write an expression that equals {target}. You may use +, -, *, / and brackets, and "
    "every number exactly once. Think inside <think> </think> and give the expression inside <answer> </answer>, for "
    "example <answer>(1 + 2) / 3</answer>."
)
MOST_DRAWS = 2000  # in a row without a new problem


@dataclass(frozen=True)
class CountdownConfig:
    """Everything the problems depend on.

    Args:
        seed: Seed of all draws.
        count: Problems.
        least_numbers: Fewest numbers of a problem.
        most_numbers: Most numbers of a problem.
        largest_number: Numbers lie between 1 and this.
        largest_target: Targets lie between 1 and this.
        operators: Which of ``+-*/`` solutions are made with.

    Raises:
        InputError: A field is out of range.
    """

    seed: int = 0
    count: int = 1000
    least_numbers: int = 3
    most_numbers: int = 4
    largest_number: int = 99
    largest_target: int = 999
    operators: str = "+-*/"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 1, 10**7),
            ("least_numbers", 2, 6),
            ("most_numbers", self.least_numbers, 6),
            ("largest_number", 1, 10**6),
            ("largest_target", 1, 10**9),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise InputError(f"must be between {low} and {high}, got {value}", field=f"countdown.{name}")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise InputError(f"takes some of + - * /, got '{self.operators}'", field="countdown.operators")


@dataclass(frozen=True)
class CountdownProblem:
    """Numbers, a target, and one expression that reaches it."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def prompt(self) -> str:
        """The task in words."""
        return PROMPT.format(numbers=list(self.numbers), target=self.target)


def countdown_problems(config: CountdownConfig) -> list[CountdownProblem]:
    """Draw different problems; equal configurations give equal ones.

    Raises:
        InputError: There are not as many different ones.
    """
    return list(_problems(config))


@lru_cache(maxsize=4)
def _problems(config: CountdownConfig) -> tuple[CountdownProblem, ...]:
    """Draw them; kept, as the runs of an experiment ask for the same ones."""
    rng = random.Random(f"countdown/{config.seed}")
    found: dict[tuple[tuple[int, ...], int], CountdownProblem] = {}
    misses = 0
    while len(found) < config.count:
        size = rng.randint(config.least_numbers, config.most_numbers)
        numbers = tuple(rng.randint(1, config.largest_number) for _ in range(size))
        value, solution = _draw(rng, numbers, config.operators)
        key = tuple(sorted(numbers)), int(value)
        if value.denominator == 1 and 1 <= value <= config.largest_target and key not in found:
            found[key] = CountdownProblem(numbers, int(value), solution)
            misses = 0
            continue
        misses += 1
        if misses > MOST_DRAWS:
            raise InputError(f"only {len(found)} different problems exist in these ranges", field="countdown.count")
    return tuple(found.values())


def _draw(rng: random.Random, numbers: Sequence[int], operators: str) -> tuple[Fraction, str]:
    """Join two random parts with a random operator until one is left; its value and text, without outer brackets."""
    parts = [(Fraction(number), str(number)) for number in numbers]
    while len(parts) > 1:
        (left, left_text), (right, right_text) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        usable = [
            operator for operator in operators if operator != "/" or (right != 0 and (left / right).denominator == 1)
        ]
        operator = rng.choice(usable or ["+"])
        value = {"+": left + right, "-": left - right, "*": left * right}.get(operator)
        parts.append((left / right if value is None else value, f"({left_text} {operator} {right_text})"))
    value, text = parts[0]
    return value, text[1:-1] if text.startswith("(") else text


def solutions(numbers: Sequence[int], target: int) -> Iterator[str]:
    """All expressions that reach a target, up to the order of sums and products, with repeats left out."""
    seen: set[str] = set()
    for value, text in _combinations([(Fraction(number), str(number)) for number in numbers]):
        if value == target and text not in seen:
            seen.add(text)
            yield text


def _combinations(parts: list[tuple[Fraction, str]]) -> Iterator[tuple[Fraction, str]]:
    if len(parts) == 1:
        yield parts[0]
        return
    for first in range(len(parts)):
        for second in range(first + 1, len(parts)):
            rest = [part for row, part in enumerate(parts) if row not in (first, second)]
            for joined in _joined(*sorted((parts[first], parts[second]), key=lambda part: (-part[0], part[1]))):
                yield from _combinations([*rest, joined])


def _joined(one: tuple[Fraction, str], two: tuple[Fraction, str]) -> Iterator[tuple[Fraction, str]]:
    (a, left), (b, right) = one, two
    yield a + b, f"({left} + {right})"
    yield a * b, f"({left} * {right})"
    yield a - b, f"({left} - {right})"
    yield b - a, f"({right} - {left})"
    if b != 0:
        yield a / b, f"({left} / {right})"
    if a != 0:
        yield b / a, f"({right} / {left})"
