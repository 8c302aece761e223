"""Sums: the shortest of exact answers, a number and nothing else; for models of a few thousand parameters."""

import re
from collections.abc import Sequence

WHOLE = re.compile(r"\s*(0|-?[1-9][0-9]{0,17})\s*", re.ASCII)


def sums_prompt(numbers: Sequence[int]) -> str:
    """``[12, 7, 3]`` as ``12+7+3=``."""
    return "+".join(map(str, numbers)) + "="


def sums_answer(response: str) -> str | None:
    """The number that a response consists of; None where it is no whole number without leading zeros."""
    found = WHOLE.fullmatch(response)
    return None if found is None else found.group(1)


def sums_reward(response: str, numbers: Sequence[int]) -> float:
    """1 where a response is the sum of the numbers and nothing else, blanks around it excepted; else 0."""
    return float(sums_answer(response) == str(sum(numbers)))
