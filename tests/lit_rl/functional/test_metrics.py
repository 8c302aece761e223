import pytest

from lit_rl.functional.metrics import pass_at_k


@pytest.mark.parametrize(("correct", "expected"), [(0, 0.0), (1, 0.5), (2, 0.785714), (3, 0.928571), (5, 1.0)])
def test_pass_at_4_of_8_of_the_card(correct: int, expected: float) -> None:
    assert pass_at_k(8, correct, 4) == pytest.approx(expected, abs=1e-6)
