"""Countdown: reach a target with given numbers, each used once (arXiv 2602.03635, card section 4)."""

import re
from collections import Counter
from collections.abc import Sequence

from lit_rl.rewards.arithmetic import evaluate

TOLERANCE = 1e-5
ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>\n?\Z", re.DOTALL)


def countdown_reward(response: str, numbers: Sequence[int], target: int, compatible: bool = False) -> float:
    """1 where the response ends with a right answer behind its thoughts, else 0; no credit for the format alone.

    Args:
        response: ``<think>...</think> ... <answer>(1 + 2) / 3</answer>``; one line break may follow.
        numbers: All of them have to be used, each as often as it is given.
        target: Value to reach, exactly.
        compatible: Judge as the authors' checker does: powers, floor division and signs pass, and values are compared
            to 1e-5.
    """
    found = ANSWER.search(response)
    opened = response.find("<think>")
    if found is None or opened < 0 or not 0 <= response.find("</think>", opened) < found.start():
        return 0.0
    return expression_reward(found.group(1), numbers, target, compatible)


def expression_reward(expression: str, numbers: Sequence[int], target: int, compatible: bool = False) -> float:
    """1 where an expression uses exactly the given numbers and has the target's value, else 0."""
    found = evaluate(expression, compatible)
    if found is None or Counter(found.numbers) != Counter(numbers):
        return 0.0
    return float(abs(found.value - target) < TOLERANCE if compatible else found.value == target)
