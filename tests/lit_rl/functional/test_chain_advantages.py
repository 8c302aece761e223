import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.functional.advantages import fr3e, spo_chain
from lit_rl.functional.chain_advantages import chain_cuts, uncertain_tokens


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=2e-6, rtol=0)


def by_segments(found: Tensor, runs: list[list[tuple[int, float]]]) -> None:
    """Runs of equal values, then zeros."""
    rows = [[value for count, value in row for _ in range(count)] for row in runs]
    close(found, [row + [0.0] * (found.shape[1] - len(row)) for row in rows])


def test_spo_chain_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.95, 0.8, 0.1, 0.9, 0.2, 0.3, 0.4], [0.99, 0.99, 0.99, 0.2, 1, 1, 1, 1]])
    lengths = torch.tensor([7, 6])
    mask = torch.arange(8) < lengths[:, None]
    uncertain = uncertain_tokens(probabilities.log(), mask)
    assert uncertain.long().tolist() == [[1, 0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert chain_cuts(uncertain, lengths).tolist() == [[0, 6], [0, 6]]
    cuts = chain_cuts(uncertain, lengths, every=2)
    assert cuts.tolist() == [[0, 2, 5], [0, 6, 6]]
    assert chain_cuts(uncertain[1:], lengths[1:]).tolist() == [[0]]
    values = torch.tensor([[0.5, 0.25, 0.75, 1], [0.5, 9, 9, 0]])
    by_segments(spo_chain(cuts, values, lengths, mask), [[(2, -0.25), (3, 0.5), (2, 0.25)], [(6, -0.5)]])
    with pytest.raises(ValueError, match="3 a row"):
        spo_chain(cuts[:, :2], values, lengths, mask)
    with pytest.raises(ValueError, match=r"from 0 to the length 6, got \[0, 6, 5\] in row 1"):
        spo_chain(torch.tensor([[0, 2, 5], [0, 6, 5]]), values, lengths, mask)
    with pytest.raises(ValueError, match="every must be at least 1"):
        chain_cuts(uncertain, lengths, 0)


def test_fr3e_of_the_card() -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0])
    steps = torch.arange(12) // 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    chains, mask = torch.zeros(12, dtype=torch.long), torch.ones(12, 2, dtype=torch.bool)
    found = fr3e(rewards[order], chains, steps[order], mask)[order.argsort(), 1]
    close(found[[0, 1, 4, 6, 8, 11]], [0.354275, -0.118092, 0.389400, -0.389400, 0.194700, -0.584101])
    other = fr3e(rewards.repeat(2), torch.arange(24) // 12, steps.repeat(2), mask.repeat(2, 1))
    torch.testing.assert_close(other[12:, 0], found)
    sharp = fr3e(rewards, chains, steps, mask, sharpen=True)[:, 0]
    centred = rewards - rewards.view(3, 4).mean(1).repeat_interleave(4)
    close((centred / sharp).log()[::4], [0.722074, 0.138963, 0.138963])
    scaled = fr3e(rewards, chains, steps, mask, scale=True)[:, 0]
    torch.testing.assert_close(scaled[:4], found[:4] / 0.500001)
    passed_over = fr3e(rewards[4:], chains[4:], steps[4:], mask[4:])[:, 0]  # now the second state is the first
    close(passed_over[[0, 4]], [0.5 / math.exp(0.5), 0.25 / math.exp(0.25)])
