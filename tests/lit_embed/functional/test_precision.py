import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_embed.functional.precision import Ties, precision_at_1


def test_the_worked_example() -> None:
    queries = normalize(torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]]), dim=1)
    targets = normalize(torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 3.0]]), dim=1)
    scores = queries @ targets.T
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.8, 0.96], [0.0, 1.0, 0.6], [1.0, 0.0, 0.8]]))
    for ties in ("wrong", "random", "compat"):
        found = precision_at_1(scores, torch.arange(3), ties)
        assert found.tolist() == [0.0, 1.0, 0.0]
        assert found.dtype == torch.float32
    assert precision_at_1(scores, torch.arange(3)).mean().item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(("ties", "value"), [("wrong", 0.0), ("random", 0.125), ("compat", 1.0)])
def test_equal_scores_earn_what_the_rule_says(ties: Ties, value: float) -> None:
    scores = torch.full((4, 8), 0.3)
    assert precision_at_1(scores, torch.tensor([0, 3, 7, 0]), ties).tolist() == [value] * 4


def test_a_tie_below_the_best_is_no_tie() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.5], [0.9, 0.5, 0.5]])
    for ties in ("wrong", "random", "compat"):
        assert precision_at_1(scores, torch.zeros(2, dtype=torch.long), ties).tolist() == [0.0, 1.0]


def by_loop(scores: Tensor, right: list[int], ties: Ties) -> list[float]:
    found = []
    for row, gold in zip(scores.double().tolist(), right, strict=True):
        best = [column for column, score in enumerate(row) if score == max(row)]
        if ties == "wrong":
            found.append(float(best == [gold]))
        elif ties == "random":
            found.append(1 / len(best) if gold in best else 0.0)
        else:
            reordered = [row[gold], *row[:gold], *row[gold + 1 :]]
            found.append(float(reordered.index(max(reordered)) == 0))
    return found


@pytest.mark.parametrize("ties", ["wrong", "random", "compat"])
def test_random_scores_against_a_loop(ties: Ties) -> None:
    rng = random.Random(0)
    for _ in range(50):
        count, candidates = rng.randint(1, 6), rng.randint(1, 7)
        scores = torch.tensor([[rng.randint(0, 3) / 3 for _ in range(candidates)] for _ in range(count)])
        right = [rng.randrange(candidates) for _ in range(count)]
        found = precision_at_1(scores, torch.tensor(right), ties)
        torch.testing.assert_close(found, torch.tensor(by_loop(scores, right, ties)))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        precision_at_1(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="got 'lucky'"):
        precision_at_1(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), "lucky")  # type: ignore[arg-type]
