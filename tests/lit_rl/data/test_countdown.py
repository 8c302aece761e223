from fractions import Fraction

import pytest

from lit_core.errors import InputError
from lit_rl.data.countdown import CountdownConfig, countdown_problems, solutions
from lit_rl.rewards.arithmetic import evaluate
from lit_rl.rewards.countdown import expression_reward


def test_problems_are_solved_by_their_solutions_and_differ() -> None:
    problems = countdown_problems(CountdownConfig(count=500))
    assert all(expression_reward(p.solution, p.numbers, p.target) == 1 for p in problems)
    assert len({(tuple(sorted(p.numbers)), p.target) for p in problems}) == 500
    assert {len(p.numbers) for p in problems} == {3, 4}
    assert {operator for p in problems for operator in "+-*/" if operator in p.solution} == set("+-*/")
    assert str(problems[0].target) in problems[0].prompt


def test_equal_configurations_give_equal_problems() -> None:
    first = countdown_problems(CountdownConfig(count=50))
    assert countdown_problems(CountdownConfig(count=50)) == first
    assert countdown_problems(CountdownConfig(count=80))[:50] == first
    assert countdown_problems(CountdownConfig(count=50, seed=1)) != first


def test_all_solutions_of_a_problem() -> None:
    found = list(solutions((1, 2, 3), 6))
    assert not any("(1 + 2)" in text or "(1 * 2)" in text for text in found)  # written with the larger part first
    assert {Fraction(6)} == {value.value for text in found if (value := evaluate(text)) is not None}
    assert len(found) == len(set(found))
    assert all(expression_reward(text, (1, 2, 3), 6) == 1 for text in found)
    for problem in countdown_problems(CountdownConfig(count=20, most_numbers=3)):
        assert next(solutions(problem.numbers, problem.target), None) is not None
    assert list(solutions((1, 1), 5)) == []


def test_ranges() -> None:
    with pytest.raises(InputError, match=r"countdown.least_numbers'.*between 2 and 6, got 1"):
        CountdownConfig(least_numbers=1)
    with pytest.raises(InputError, match=r"countdown.operators'"):
        CountdownConfig(operators="%")
    with pytest.raises(InputError, match=r"different problems exist"):
        countdown_problems(CountdownConfig(count=10_000, largest_number=2, most_numbers=3, largest_target=3))
