import time
from fractions import Fraction

import pytest

from lit_rl.rewards.arithmetic import evaluate
from lit_rl.rewards.countdown import countdown_reward, expression_reward

THOUGHT = "<think>so</think>"


@pytest.mark.parametrize(
    ("response", "numbers", "target", "reward"),
    [
        (f"{THOUGHT}<answer>(1 + 2) / 3</answer>", (1, 2, 3), 1, 1),
        (f"{THOUGHT}<answer>1+2</answer>", (1, 2, 3), 3, 0),  # a number left over
        (f"{THOUGHT}<answer>12</answer>", (1, 2), 12, 0),
        (f"{THOUGHT}<answer>(1 + 2) / 3 = 1</answer>", (1, 2, 3), 1, 0),
        (f"{THOUGHT}<answer>(1 + 2) / 3</answer> done", (1, 2, 3), 1, 0),
        (f"{THOUGHT}<answer>(1 + 2) / 3</answer>\n", (1, 2, 3), 1, 1),
        (f"{THOUGHT}<answer>(1 + 2) / 3</answer>\n\n", (1, 2, 3), 1, 0),
        ("<answer>(1 + 2) / 3</answer>", (1, 2, 3), 1, 0),
        (f"<answer>(1 + 2) / 3</answer>{THOUGHT}", (1, 2, 3), 1, 0),
        (f"{THOUGHT}<answer>1</answer> no: <answer>(1 + 2) / 3</answer>", (1, 2, 3), 1, 1),
        (f"{THOUGHT}<answer>2 * 2</answer>", (2, 2), 4, 1),
        (f"{THOUGHT}<answer>2 + 1 + 1</answer>", (2, 1), 4, 0),
        ("", (1,), 1, 0),
    ],
)
def test_the_checks_of_the_card(response: str, numbers: tuple[int, ...], target: int, reward: float) -> None:
    assert countdown_reward(response, numbers, target) == reward
    assert countdown_reward(response, numbers, target, compatible=True) == reward


@pytest.mark.parametrize(
    ("expression", "numbers", "target"), [("2**3", (2, 3), 8), ("7//2", (7, 2), 3), ("-2+5", (2, 5), 3)]
)
def test_what_a_filter_on_characters_lets_through(expression: str, numbers: tuple[int, ...], target: int) -> None:
    assert expression_reward(expression, numbers, target) == 0
    assert expression_reward(expression, numbers, target, compatible=True) == 1


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9", "9**9**9**9", "(" * 5000 + "1" + ")" * 5000, "(" * 180 + "1" + ")" * 180 + "/0",
        "\uff11+\uff12", "1\uff0b2", "\u00b2", "\u0663+1",
        "1/0", "1/(1-1)", "0**-1", "", " ", "()", "1 2", "1+", "abs(1)", "__import__('os')",
        "1e9", "1_000",
        "9" * 399, "999999999999*999999999999", "1,2", "1<2", "1 if 1 else 2", "01+2", "\x00",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_worth_nothing_at_once(expression: str, compatible: bool) -> None:
    started = time.perf_counter()
    assert expression_reward(expression, (9, 9, 9), 9, compatible) == 0
    assert countdown_reward(f"{THOUGHT}<answer>{expression}</answer>", (9, 9, 9), 9, compatible) == 0
    assert time.perf_counter() - started < 1


def test_values_are_exact() -> None:
    found = evaluate("(1 / 3 + 2 / 3) * 10 - 4 / 8")
    assert found is not None
    assert (found.value, found.numbers) == (Fraction(19, 2), (1, 3, 2, 3, 10, 4, 8))
    assert expression_reward("1 / 3 * 3", (1, 3, 3), 1) == 1
    assert evaluate("1.5 + 1") is None
    assert evaluate("1.5 + 1", compatible=True) is not None


def test_a_long_response_of_brackets_costs_nothing() -> None:
    started = time.perf_counter()
    for text in ("<answer>" * 20_000, "<think>" * 20_000 + "<answer>1</answer>", "(" * 10_000 + "</answer>"):
        assert countdown_reward(text, (1,), 1) == 0
    assert time.perf_counter() - started < 1
