import pytest
import torch

from lit_embed.functional.corruption import corrupt_tokens, corrupt_words

DRAWS = torch.tensor([0.10, 0.70, 0.59, 0.60, 0.95])


def test_worked_example() -> None:
    """E5: a word is hidden where its draw is strictly below the rate."""
    assert corrupt_words("a b c d e", 0.6, draws=DRAWS) == "_ b _ d e"
    assert corrupt_words("a b c d e", 1.0, draws=DRAWS) == "_ _ _ _ _"
    assert corrupt_words("a  b\nc", 0.0) == "a  b\nc"  # untouched, white space included
    assert corrupt_words(" a \n b ", 1.0) == "_ _"
    assert corrupt_words("", 0.6) == ""


def test_the_generator_alone_decides() -> None:
    text = " ".join("abcdefghij" * 40)

    def draw(seed: int) -> str:
        return corrupt_words(text, 0.6, torch.Generator().manual_seed(seed), mask="[MASK]")

    assert draw(1) == draw(1) != draw(2)
    assert draw(1).split().count("[MASK]") == pytest.approx(240, abs=40)  # four standard deviations


def test_tokens_are_hidden_one_by_one() -> None:
    ids = list(range(1000))
    hidden = corrupt_tokens(ids, 0.3, -1, torch.Generator().manual_seed(0))
    assert all(found in (token, -1) for token, found in zip(ids, hidden, strict=True))
    assert hidden.count(-1) == pytest.approx(300, abs=60)
    assert corrupt_tokens(ids, 0.0, -1) == ids


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match="corruption rate must be a probability"):
        corrupt_words("a", rate)
    with pytest.raises(ValueError, match="corruption rate must be a probability"):
        corrupt_tokens([1], rate, 0)
