import math

import pytest

from lit_rl.rewards.pairwise import WordPreference, dialogue_length, outcomes, score_pairs

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]


def test_outcomes_of_pairs() -> None:
    assert outcomes({"a": (2.0, 1.0), "b": (1.0, 1.0), "c": (-1.0, 0.0)}) == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert outcomes({}) == {}


def test_lengths() -> None:
    assert dialogue_length("four") == 4
    assert dialogue_length(MESSAGES) == len("Hi\n\nNo.")
    pairs = [{"id": "x", "chosen": "aaa", "rejected": MESSAGES}]
    assert score_pairs(pairs, dialogue_length) == {"x": (3.0, 7.0)}


def test_weights_of_two_words() -> None:
    """One pair, good against bad: both weights are +-w with 2 w = z, and penalty * w = sigmoid(-z)."""
    model = WordPreference(penalty=1.0).fit(["the good"], ["the bad"])
    assert set(model.weights) == {"good", "bad"}  # what both share cancels
    weight = model.weights["good"]
    assert model.weights["bad"] == pytest.approx(-weight)
    assert weight == pytest.approx(1 / (1 + math.exp(2 * weight)), abs=1e-4)
    assert weight == pytest.approx(0.3374, abs=1e-3)
    assert model.score("Good good, unknown!") == pytest.approx(2 * weight)


def test_words_that_are_preferred_are_found_in_dialogues_too() -> None:
    chosen, rejected = [f"no thanks {i}" for i in range(30)], [f"yes {i}" for i in range(30)]
    model = WordPreference().fit(chosen, rejected)
    assert model.score("no") > 0 > model.score("yes")
    assert model.score(MESSAGES) == pytest.approx(model.score("hi no."))
    assert WordPreference().fit(["a"], ["a"]).weights == {}
    with pytest.raises(ValueError, match="penalty must be above 0, got 0"):
        WordPreference(0)
