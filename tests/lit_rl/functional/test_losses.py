import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.functional.losses import (
    Reduction,
    adapted_coefficient,
    aggregate,
    divergence,
    explained_variance,
    importance_weights,
    log_ratio,
    loss_denominator,
    overlong_penalty,
    policy_loss,
    reinforce_loss,
    value_loss,
)

REDUCTIONS: tuple[Reduction, ...] = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm")
LOSSES = torch.tensor([[1.0, 2, 3, 4], [5, 6, math.nan, 0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False]])


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=1e-5, rtol=0)


def row(values: list[float]) -> Tensor:
    return torch.tensor([values])


def every(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, dtype=torch.bool)


def test_the_clipped_loss_of_the_card() -> None:
    logs, advantages = row([1.5, 0.5, 1.1, 1.5, 0.5, 4]).log(), row([1.0, 1, 1, -1, -1, -1])
    old, mask = torch.zeros_like(logs), every(logs)
    found = policy_loss(logs, old, advantages, mask)
    close(found.losses, [[-1.2, -0.5, -1.1, 1.5, 0.8, 4]])
    close(found.losses.mean(), 0.583333)
    assert found.clipped.tolist() == [[True, False, False, False, True, False]]
    higher = policy_loss(logs, old, advantages, mask, clip_high=0.28)
    close(higher.losses[0, 0], -1.28)
    close(higher.losses.mean(), 0.57)
    dual = policy_loss(logs, old, advantages, mask, dual_clip=3.0)
    close(dual.losses[0, 5], 3.0)
    close(dual.losses.mean(), 0.416667)
    assert dual.dual_clipped.tolist() == [[False] * 5 + [True]]
    close(-log_ratio(logs, old, mask).mean(), -0.151040)


@pytest.mark.parametrize(("dual_clip", "last"), [(None, 4.0), (3.0, 0.0)])
def test_gradients_of_the_card(dual_clip: float | None, last: float) -> None:
    logs = row([1.1, 1.5, 0.7, 1.5, 0.7, 4]).log().requires_grad_()
    advantages = row([1.0, 1, 1, -1, -1, -1])
    policy_loss(logs, torch.zeros_like(logs), advantages, every(logs), dual_clip=dual_clip).losses.sum().backward()
    assert logs.grad is not None
    close(logs.grad, [[-1.1, 0, -0.7, 1.5, 0, last]])


def test_at_the_first_update_the_gradient_is_that_of_reinforce() -> None:
    logs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    advantages, mask = torch.randn(3, 5), torch.arange(5) < torch.tensor([[5], [2], [0]])
    gradients = []
    for loss in (
        lambda x: policy_loss(x, logs, advantages, mask).losses,
        lambda x: reinforce_loss(x, advantages, mask),
    ):
        leaf = logs.clone().requires_grad_()
        loss(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0], torch.where(mask, -advantages, 0.0))


def test_ratios_of_sequences() -> None:
    logs, old = row([0.2, -0.1, 0.5, 9.0]), torch.zeros(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    close(log_ratio(logs, old, mask, "sequence_mean").exp()[0, 0], 1.221403)
    close(log_ratio(logs, old, mask, "sequence_sum").exp()[0, 0], 1.822119)
    close(log_ratio(row([50.0, -50, 0, 0]), old, mask), [[20.0, -20, 0, 0]])


@pytest.mark.parametrize(
    ("reduction", "constant", "expected"),
    [
        ("token_mean", None, 3.5),
        ("seq_mean_token_sum", None, 10.5),
        ("seq_mean_token_mean", None, 4.0),
        ("const_norm", 4.0, 5.25),
        ("const_norm", 2 * 4.0, 2.625),  # TRL's dr_grpo: responses times the longest length
    ],
)
def test_aggregations_of_the_card(reduction: Reduction, constant: float | None, expected: float) -> None:
    empty = torch.nn.functional.pad(MASK, (0, 0, 0, 1)), torch.nn.functional.pad(LOSSES, (0, 0, 0, 1), value=9.0)
    for mask, losses in ((MASK, LOSSES), empty):  # a response without a token counts nothing
        close(aggregate(losses, mask, loss_denominator(mask, reduction, constant), reduction), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up_and_padding_changes_nothing(reduction: Reduction) -> None:
    generator = torch.Generator().manual_seed(1)
    losses = torch.randn(7, 9, generator=generator, requires_grad=True)
    mask = torch.arange(9) < torch.randint(0, 10, (7, 1), generator=generator)
    denominator = loss_denominator(mask, reduction, 9.0)
    whole = aggregate(losses, mask, denominator, reduction)
    (expected,) = torch.autograd.grad(whole, losses)
    parts = [aggregate(losses[rows], mask[rows], denominator, reduction) for rows in ([0, 3], [1, 2, 4, 6], [5])]
    (found,) = torch.autograd.grad(torch.stack(parts).sum(), losses)
    torch.testing.assert_close(found, expected)
    wide = torch.nn.functional.pad(mask, (0, 4))
    padded = aggregate(torch.nn.functional.pad(losses, (0, 4)), wide, loss_denominator(wide, reduction, 9.0), reduction)
    torch.testing.assert_close(padded, whole)
    nothing = torch.zeros_like(mask)
    empty = aggregate(losses.detach(), nothing, loss_denominator(nothing, reduction, 9.0), reduction)
    assert float(empty) == 0


def test_divergences_of_the_card() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    rows = {kind: divergence(p.log(), q.log(), kind) for kind in ("k1", "k2", "k3", "k3_st")}  # type: ignore[arg-type]
    close(rows["k1"], [0.223144, -0.287682, 0])
    close(rows["k2"], [0.024897, 0.041380, 0])
    close(rows["k3"], [0.023144, 0.045651, 0])
    close(rows["k3_st"], [0.023144, 0.045651, 0])
    for kind, mean, variance in (("k1", 0.025267, 0.049086), ("k2", 0.024862, 0.000205), ("k3", 0.025267, 0.000255)):
        close((p * rows[kind]).sum(), mean)
        close((p * rows[kind].square()).sum() - (p * rows[kind]).sum() ** 2, variance)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.0, 0, 0]),
        ("k2", [0.098938, -0.093885, -0.005053]),
        ("k3", [0.1, -0.1, 0]),
        ("k3_st", [0.098938, -0.093885, -0.005053]),
    ],
)
def test_expected_gradients_of_the_divergences(kind: Any, expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    logs = logits.log_softmax(0)
    reference = torch.tensor([0.4, 0.4, 0.2]).log()
    (logs.detach().exp() * divergence(logs, reference, kind)).sum().backward()
    assert logits.grad is not None
    close(logits.grad, expected)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3_st"])
def test_divergences_stay_finite_and_are_0_at_0(kind: Any) -> None:
    far = torch.tensor([50.0, -50, 0], dtype=torch.bfloat16)
    found = divergence(far, torch.zeros(3), kind)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert float(found[2]) == 0
    if kind != "k1":
        assert (found >= 0).all()


def test_the_value_loss_of_the_card() -> None:
    values, old, returns = row([0.9, 0.1, 0.6]), torch.full((1, 3), 0.5), row([1.0, 0, 0.5]).requires_grad_()
    found = value_loss(values, old, returns, every(values), clip=0.2)
    close(found.losses.mean(), 0.031667)
    close(found.clipped.float().mean(), 2 / 3)
    for clip in (0.5, None):
        close(value_loss(values, old, returns, every(values), clip).losses.mean(), 0.005)
    assert not found.losses.requires_grad  # returns are targets


def test_importance_weights_of_the_card() -> None:
    old, rollout = row([-1.0, -2, -0.5, 0]).requires_grad_(), row([-1.2, -3.5, -0.4, 0])
    mask = torch.tensor([[True, True, True, False]])

    def weights(**settings: Any) -> Tensor:
        return importance_weights(old, rollout, mask, **settings)

    close(weights(high=9.0), [[1.221403, 4.481689, 0.904837, 0]])
    close(weights(), [[1.221403, 2, 0.904837, 0]])
    close(weights(how="mask", low=0.5), [[1.221403, 0, 0.904837, 0]])
    close(weights(level="sequence", high=9.0)[0, :3], [4.953032] * 3)
    close(weights(level="sequence"), [[2.0, 2, 2, 0]])
    close(weights(level="sequence", how="mask", high=3.0), [[0.0, 0, 0, 0]])
    close(weights(level="sequence_mean", high=9.0)[0, :3], [1.704605] * 3)
    close(weights(low=1.0)[0, 2], 1.0)
    assert not weights().requires_grad


def test_penalties_and_coefficients_of_the_card() -> None:
    close(overlong_penalty(torch.tensor([3, 16, 17, 18, 20]), 20, 4), [0.0, 0, -0.25, -0.5, -1])
    assert adapted_coefficient(0.001, 0.3, 0.1, 1024, 10000) == pytest.approx(0.00102048)
    assert adapted_coefficient(0.001, 0.1, 0.1, 1024, 10000) == pytest.approx(0.001)


def test_explained_variance() -> None:
    returns, mask = row([1.0, 2, 3, 99]), torch.tensor([[True, True, True, False]])
    assert float(explained_variance(returns, returns, mask)) == 1
    assert float(explained_variance(torch.full_like(returns, 2.0), returns, mask)) == 0


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="dual clip above 1"):
        policy_loss(LOSSES, LOSSES, LOSSES, MASK, dual_clip=1.0)
    with pytest.raises(ValueError, match="const_norm needs a constant"):
        loss_denominator(MASK, "const_norm")
