import random
import re
import time

import pytest

from lit_core.presets import PRESETS, preset_tokenizer
from lit_rl.data.countdown import CountdownConfig, countdown_problems
from lit_rl.data.countdown_steps import written_steps
from lit_rl.rewards.countdown_steps import CONNECTORS, steps_answer, steps_reward, token_roles

NUMBERS, TARGET = (3, 5, 7), 36
RIGHT = "so 5+7=12 next(3,12) and 12*3=36 go(36)"
PROBLEMS = countdown_problems(CountdownConfig(count=500, most_numbers=5))
SOLUTIONS = [written_steps(p.solution, p.numbers, 0, row) for row, p in enumerate(PROBLEMS)]
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (RIGHT, 1),
        ("5+7=12 so 12*3=36", 1),
        (" go so 7 + 5 = 12 do and 3 *12= 36 also ", 1),
        ("so 5-7=-2 so 3--2=5", 0),  # right, but not the target
        ("so 5+7=12", 0),  # a number left over
        ("so 5+7=12 and 12*3=35", 0),
        ("so 5+7=13 and 12*3=36", 0),
        ("so 12*3=36 and 5+7=12", 0),  # 12 is not there yet
        ("so 5+7=12 and 12*3=36 and 36*1=36", 0),
        ("so 5+7=12 and 12+12=24", 0),  # each result once
        ("so 5+7=12 next(12) and 12*3=36", 0),
        ("so 5+7=12 next(3,12 and 12*3=36", 0),
        ("so 5+7=12 next(,3,12) and 12*3=36", 0),
        ("so 5+7=12 then 12*3=36", 0),
        ("so 5+7=12 12*3=36", 0),  # no connector between
        ("so 5+7=12(3,12) so 12*3=36", 0),
        ("So 5+7=12 and 12*3=36", 0),
        ("so 5+7=12 and 12*3=36.", 0),
        ("so 5+7=12 and 12*3=036", 0),
        ("so 5+7=12\nand 12*3=36", 0),
    ],
)
def test_the_judge_is_strict(response: str, reward: float) -> None:
    assert steps_reward(response, NUMBERS, TARGET) == reward


def test_values_are_exact_and_may_be_negative() -> None:
    assert steps_reward("so 7/2=3 do 3+1=4", (7, 2, 1), 4) == 0
    assert steps_reward("so 8/2=4 do 4+1=5", (8, 2, 1), 5) == 1
    assert steps_reward("so 2-2=0 do 7/0=7", (2, 2, 7), 7) == 0
    assert steps_reward("so 3-12=-9 do(20,-9) do -9+20=11 so(11)", (3, 12, 20), 11) == 1
    assert steps_reward("so 20--9=29", (20, -9), 29) == 1
    assert steps_reward("so 999999999999*2=1999999999998", (999999999999, 2), 1999999999998) == 0  # too long a number
    assert steps_reward("so(5)", (5,), 5) == 0  # nothing was computed


def test_generated_solutions_are_right_whatever_their_connectors() -> None:
    rng = random.Random(0)
    for problem, solution in zip(PROBLEMS, SOLUTIONS, strict=True):
        swapped = re.sub("[a-z]+", lambda _: rng.choice(CONNECTORS), solution)
        assert steps_reward(solution, problem.numbers, problem.target) == 1
        assert steps_reward(swapped, problem.numbers, problem.target) == 1
        assert steps_answer(swapped, problem.numbers) == steps_answer(solution, problem.numbers) is not None


def test_corrupted_solutions_are_wrong() -> None:
    rng = random.Random(0)
    for problem, solution in zip(PROBLEMS, SOLUTIONS, strict=True):
        steps = list(STEP.finditer(solution))
        one = rng.choice(steps)
        first, last = steps[0], steps[-1]
        unused = max(map(int, re.findall(r"\d+", solution))) + 1
        corruptions = {
            "a wrong result": solution[: one.start(4)] + str(int(one[4]) + 1) + solution[one.end(4) :],
            "a number twice": f"{solution} so {first.group()}",
            "a number left over": solution[: last.start()].rsplit(" ", 1)[0],
            "a number that is not there": solution[: one.start()] + f"{unused}+0={unused}" + solution[one.end() :],
            "another word": re.sub("[a-z]+", "then", solution, count=1),
            "no word": STEP.sub(lambda step: f"{step.group()} {step.group()}", solution, count=1),
        }
        if last[1] not in map(str, problem.numbers) and last[3] not in map(str, problem.numbers):
            corruptions["the wrong order"] = " so ".join(step.group() for step in reversed(steps))
        for name, text in corruptions.items():
            assert steps_reward(text, problem.numbers, problem.target) == 0, (name, text)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_connectors_are_single_tokens(preset: str) -> None:
    tokenizer = preset_tokenizer(preset)
    for word in CONNECTORS:
        assert len(tokenizer(f"{word} 5+7=12", add_special_tokens=False)["input_ids"]) == 8
        assert len(tokenizer(f"12 {word}(3)", add_special_tokens=False)["input_ids"]) == 7


@pytest.mark.parametrize(
    "response",
    ["9" * 10_000, "so " * 4000, "(" * 10_000, "so(" + "9," * 400 + ")", "so 9**9=9", "so 9//9=1", "", " ", "so", "=",
     "so \uff19+9=18", "so 9+\u0669=18", "so 9/0=9", "so 9/(9-9)=9", "so 9+9=1e9", "so(9,)", "so(-)", "so(- 9)",
     "so " + "-" * 500, "so 9+9=18\x00", "so 0-0=-0", "so +9+9=18", "<|im_start|>", "so 9+9=18" + " " * 5000],
)  # fmt: skip
def test_hostile_responses_are_worth_nothing_at_once(response: str) -> None:
    started = time.perf_counter()
    assert steps_reward(response, (9, 9), 18) == 0
    assert steps_answer(response, (9, 9)) is None
    assert token_roles(list(response), (9, 9)) is not None
    assert time.perf_counter() - started < 1


def test_answers_are_equal_up_to_order_and_brackets() -> None:
    assert steps_answer(RIGHT, NUMBERS) == "(*(+5+7)*3)"
    assert steps_answer("7+5=12 so 3*12=36", NUMBERS) == "(*(+5+7)*3)"
    assert steps_answer("7*5=35 so 35+3=38", NUMBERS) == "(+(*5*7)+3)"  # wrong, but by the rules
    one, two, three = (20, 15, 12), "so 15-12=3 so 20-3=17", "so 20+12=32 so 32-15=17"
    assert steps_answer(two, one) == steps_answer(three, one) == "(+12-15+20)"
    one, two, three = (8, 9, 5), "so 8-9=-1 so -1*5=-5", "so 9-8=1 so 1*5=5"
    assert steps_answer(two, one) == "(*(+8-9)*5)"
    assert steps_answer(three, one) == "-(*(+8-9)*5)"
    assert steps_answer("5+7=13 so 3*13=39", NUMBERS) is None
    assert steps_answer("5+7=12", NUMBERS) is None


def test_roles_of_tokens() -> None:
    pieces = ["so", "", "1", "2", "-", "1", "=", "1", "1", "next", "(", "1", "5", ",", "1", "1", ")", "and", "", "1",
              "5", "+", "1", "1", "=", "2", "6", "<|im_end|>"]  # fmt: skip
    short = {"decision": "d", "connector": "c", "other": "."}
    roles = "".join(short[role] for role in token_roles(pieces, (12, 15, 1)))
    # All three begin with 1, so only what follows is chosen: 2 of 12, 1 rather than 15 at "=", 5 of 15 rather than 11.
    assert roles == "c..dd.d..c.......c..dd......"


def test_roles_of_longer_tokens_and_of_what_is_wrong() -> None:
    assert token_roles([" so", " 5", "+", " ", "7", "=", "13"], (5, 7)) == [
        *("connector", "decision", "decision", "other", "other", "other", "other"),
    ]
    assert token_roles(["so", "", "8", "*", "3", "=", "1", "do", "", "1"], (5, 7, 3)) == [
        # No number begins with 8; the wrong result 1 counts as there
        *("connector", "other", "decision", "decision", "decision", "other", "other", "connector", "other", "decision"),
    ]
    assert token_roles(["th", "en", "", "5"], (5, 7)) == ["other", "other", "other", "decision"]
    assert token_roles([], (5, 7)) == []
