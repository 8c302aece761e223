import math

import pytest
import torch

from lit_rl.functional.preference import bradley_terry_loss, pairwise_accuracy, pairwise_outcomes

CHOSEN, REJECTED = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 1.0])


def test_loss_of_three_pairs() -> None:
    # differences 2, 0, -2: ln(1 + e^-2) = 0.126928, ln 2 = 0.693147, ln(1 + e^2) = 2.126928; mean 0.982334
    torch.testing.assert_close(bradley_terry_loss(CHOSEN, REJECTED), torch.tensor(0.982334), atol=1e-6, rtol=0)


def test_margin_and_centring() -> None:
    # a margin of 2 on the first pair makes it ln 2: (0.693147 + 0.693147 + 2.126928) / 3 = 1.171074
    margin = torch.tensor([2.0, 0.0, 0.0])
    torch.testing.assert_close(bradley_terry_loss(CHOSEN, REJECTED, margin), torch.tensor(1.171074), atol=1e-6, rtol=0)
    # sums 2, 0, 0: mean square 4/3, times 0.3 is 0.4
    centred = bradley_terry_loss(CHOSEN, REJECTED, margin, centre=0.3)
    torch.testing.assert_close(centred, torch.tensor(1.571074), atol=1e-6, rtol=0)


def test_a_shift_of_all_rewards_matters_to_the_penalty_alone() -> None:
    plain, centred = (bradley_terry_loss(CHOSEN + 5, REJECTED + 5, centre=centre) for centre in (0.0, 0.01))
    torch.testing.assert_close(plain, bradley_terry_loss(CHOSEN, REJECTED))
    torch.testing.assert_close(centred - plain, torch.tensor(0.01 * (144 + 100 + 100) / 3), atol=1e-5, rtol=0)


def test_gradient_is_the_probability_of_being_wrong() -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    bradley_terry_loss(chosen, rejected).backward()
    expected = -torch.sigmoid(REJECTED - CHOSEN) / 3
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)  # so the likelihood moves no pair as a whole
    chosen.grad = rejected.grad = None
    bradley_terry_loss(chosen, rejected, centre=0.5).backward()
    torch.testing.assert_close(chosen.grad + rejected.grad, 2 * 2 * 0.5 * (CHOSEN + REJECTED) / 3)  # type: ignore[operator]


def test_far_apart_rewards_stay_finite() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2))
    assert loss.item() == 5e3
    loss.backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [0.0, -0.5]


def test_half_precision_is_computed_in_float32() -> None:
    chosen, rejected = CHOSEN.bfloat16(), REJECTED.bfloat16()
    found = bradley_terry_loss(chosen, rejected, torch.tensor([2.0, 0, 0]).bfloat16(), 0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(1.571074), atol=1e-6, rtol=0)
    big = torch.full((4,), 300.0).half()  # 600 squared is beyond half precision
    assert math.isfinite(bradley_terry_loss(big, big, centre=1.0))
    assert pairwise_accuracy(chosen, rejected).dtype == torch.float32


def test_equal_rewards_count_half() -> None:
    assert pairwise_outcomes(CHOSEN, REJECTED).tolist() == [1.0, 0.5, 0.0]
    assert pairwise_accuracy(CHOSEN, REJECTED).item() == 0.5
    assert pairwise_accuracy(torch.zeros(7), torch.zeros(7)).item() == 0.5
    assert pairwise_accuracy(CHOSEN[:2], REJECTED[:2]).item() == 0.75


def test_no_pairs_and_unequal_shapes() -> None:
    none = torch.zeros(0)
    assert bradley_terry_loss(none, none, centre=1.0).item() == 0.0
    assert pairwise_accuracy(none, none).item() == 0.0
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3, 1\)"):
        bradley_terry_loss(CHOSEN, REJECTED[:, None])
    with pytest.raises(ValueError, match=r"one margin a pair, got \(1,\) for \(3,\)"):
        bradley_terry_loss(CHOSEN, REJECTED, torch.ones(1))
