import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.functional.exploration import (
    clip_cov_mask,
    covariances,
    entropy,
    forking_mask,
    kl_cov_mask,
    region_size,
    trust_region_entropy,
)

A = [2.0, 1, 0, -1]
B = [math.log(p) for p in (0.6, 0.25, 0.1, 0.05)]


def both(values: list[float], **settings: Any) -> tuple[float, Tensor]:
    """Value and gradient; without settings those of the full entropy."""
    logits = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = trust_region_entropy(logits, **settings) if settings else entropy(logits)
    found.backward()
    assert logits.grad is not None
    return float(found.detach()), logits.grad


@pytest.mark.parametrize(
    ("logits", "settings", "value", "gradient"),
    [
        (A, {}, 0.947537, [-0.326688, 0.116701, 0.130076, 0.079911]),
        (A, {"top_k": 2}, 1.164406, [-0.393224, 0.393224, 0, 0]),
        (A, {"top_k": 3}, 1.050366, [-0.356586, 0.177632, 0.178953, 0]),
        (A, {"top_k": 4}, 0.947537, [-0.326688, 0.116701, 0.130076, 0.079911]),
        (A, {"top_k": 1}, 0.440190, [-0.356086, 0.236883, 0.087144, 0.032059]),
        (A, {"top_k": 2, "scale": "none"}, 0.582203, [-0.196612, 0.196612, 0, 0]),
        (B, {}, 1.033114, [-0.313373, 0.088295, 0.126947, 0.098131]),
        (B, {"top_p": 0.5}, 0.0, [0, 0, 0, 0]),
        (B, {"top_p": 0.7}, 1.211595, [-0.363516, 0.363516, 0, 0]),
        (B, {"top_p": 0.84}, 1.211595, [-0.363516, 0.363516, 0, 0]),
        (B, {"top_p": 0.9}, 1.108575, [-0.333922, 0.151581, 0.182341, 0]),
        (B, {"top_p": 0.99}, 1.033114, [-0.313373, 0.088295, 0.126947, 0.098131]),
        (B, {"top_p": 0.9, "scale": "none"}, 0.878525, [-0.264629, 0.120127, 0.144502, 0]),
    ],
)
def test_values_and_gradients_of_the_card(
    logits: list[float], settings: dict[str, Any], value: float, gradient: list[float]
) -> None:
    found, grad = both(logits, **settings)
    assert found == pytest.approx(value, abs=1e-5)
    assert grad.tolist() == pytest.approx(gradient, abs=1e-5)


def test_first_order_change_of_the_mass() -> None:
    p = torch.tensor(B, dtype=torch.float64).exp()
    mass, q = p[:2].sum(), p[:2] / p[:2].sum()

    def change(grad: Tensor) -> float:  # dM = sum of dp over the top two
        return float((p[:2] * (grad[:2] - (p * grad).sum())).sum())

    assert change(both(B)[1]) == pytest.approx(-0.03985, abs=1e-5)
    assert change(both(B, top_k=2)[1]) == pytest.approx(-0.01908, abs=1e-5)
    assert change(both(B, top_k=2, scale="none")[1]) == pytest.approx(-0.00954, abs=1e-5)
    kept = both(B, top_k=2, mass_preserving=True)[1]
    assert change(kept) == pytest.approx(0, abs=1e-7)
    assert float((kept[:2] * q).sum()) == pytest.approx(0, abs=1e-7)
    assert float(mass) == pytest.approx(0.85)


def test_the_cap_of_a_nucleus() -> None:
    logits = -torch.arange(512.0) / 200
    assert int(region_size(logits, 0.99, None)) == 490
    assert float(trust_region_entropy(logits, top_p=0.99, cap=None)) == pytest.approx(6.019062, abs=1e-5)
    assert float(trust_region_entropy(logits, top_p=0.99)) == pytest.approx(6.164541, abs=1e-5)
    assert float(logits.softmax(0)[:256].sum()) == pytest.approx(0.782450, abs=1e-5)


def test_scale_of_a_real_vocabulary() -> None:
    for size, top_k, factor in ((151_936, 2, 17.213), (152_064, 2, 17.214), (151_936, 5, 7.413)):
        assert math.log(size) / math.log(top_k) == pytest.approx(factor, abs=1e-3)


def test_a_big_vocabulary_leaks_nothing() -> None:
    p = torch.tensor([0.70, 0.28] + [0.02 / 9998] * 9998, dtype=torch.float64)
    value, grad = both(p.log().tolist())
    assert value == pytest.approx(0.868546, abs=1e-5)
    assert float(grad[2]) == pytest.approx(0.0000245, abs=1e-7)
    assert float(grad[2:].sum()) == pytest.approx(0.245072, abs=1e-5)
    value, grad = both(p.log().tolist(), top_k=2)
    assert value == pytest.approx(7.949634, abs=1e-5)
    assert torch.equal(grad[2:], torch.zeros(9998, dtype=torch.float64))


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.8}])
def test_properties(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 20, generator=generator)
    leaf = logits.clone().requires_grad_()
    values = trust_region_entropy(leaf, **settings)
    values.sum().backward()
    assert leaf.grad is not None
    ordered = logits.sort(descending=True)
    size = region_size(logits, 0.8) if "top_p" in settings else torch.full((50,), 3)
    grads = leaf.grad.gather(1, ordered.indices)
    outside = torch.arange(20) >= size[:, None]
    assert torch.equal(grads[outside], torch.zeros(int(outside.sum())))
    torch.testing.assert_close(grads.sum(1), torch.zeros(50), atol=1e-5, rtol=0)
    if "top_k" in settings:  # the objective is indifferent to the mass of the region
        raised = torch.where(torch.arange(20) < 3, ordered.values + 1.5, ordered.values)
        torch.testing.assert_close(trust_region_entropy(raised, **settings), values.detach())
    for row in range(50):  # against the definition, in float64
        best = ordered.values[row, : int(size[row])].double()
        q = best.softmax(0)
        plain = float(-(q * q.log()).sum()) * (math.log(20) / math.log(len(q)) if len(q) > 1 else 0)
        assert float(values[row].detach()) == pytest.approx(plain, abs=1e-5)


def test_limits() -> None:
    assert float(trust_region_entropy(torch.zeros(7), top_k=2)) == pytest.approx(math.log(7))
    assert float(trust_region_entropy(torch.zeros(7), top_k=5)) == pytest.approx(math.log(7))
    assert float(trust_region_entropy(torch.zeros(7), top_p=1.0)) == pytest.approx(math.log(7))
    for far in (torch.tensor([1e4, 0, 0]), torch.tensor([5.0, -math.inf, -math.inf])):
        leaf = far.clone().requires_grad_()
        found = trust_region_entropy(leaf, top_k=2) + entropy(leaf)
        found.backward()
        assert float(found.detach()) == 0
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros(3))
    for bad in ({}, {"top_k": 1, "top_p": 0.5}, {"top_k": 8}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="top_"):
            trust_region_entropy(torch.zeros(7), **bad)


@pytest.mark.parametrize(("count", "kept"), [(5, 1), (6, 2), (10, 2), (11, 3)])
def test_forking_tokens_of_the_card(count: int, kept: int) -> None:
    entropies = torch.arange(12.0)[None]
    mask = torch.arange(12)[None] < count
    found = forking_mask(entropies, mask)
    assert found.nonzero()[:, 1].tolist() == list(range(count - kept, count))


def test_the_covariance_of_the_card() -> None:
    advantages, logs = torch.tensor([[1.0, -1, 2, 0, 9]]), torch.tensor([[-0.1, -2, -0.5, -1, math.nan]])
    mask = torch.tensor([[True] * 4 + [False]])
    found = covariances(advantages, logs, mask)
    torch.testing.assert_close(found, torch.tensor([[0.4, 1.65, 0.6, 0.05, 0]]))
    assert kl_cov_mask(advantages, logs, mask).tolist() == [[False, True, False, False, False]]
    for count, kept in ((999, 1), (1000, 2)):
        values = torch.randn(2, count)
        assert int(kl_cov_mask(values[:1], values[1:], torch.ones(1, count, dtype=torch.bool)).sum()) == kept


def test_clip_cov_takes_few_of_the_candidates_and_repeats() -> None:
    generator = torch.Generator().manual_seed(3)
    advantages, logs = torch.randn(2, 40, 500, generator=generator) * 2
    mask = torch.rand(40, 500, generator=generator) < 0.9
    found = [clip_cov_mask(advantages, logs, mask, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*found)
    cov = covariances(advantages, logs, mask)[found[0]]
    assert len(cov) == int(2e-4 * int(mask.sum()))
    assert ((cov > 1) & (cov < 5)).all()
    assert not clip_cov_mask(advantages * 0, logs, mask, torch.Generator()).any()


def test_nothing_to_choose_from() -> None:
    values, nothing = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert not forking_mask(values, nothing).any()
    assert not kl_cov_mask(values, values, nothing).any()
    assert not clip_cov_mask(values, values, nothing, torch.Generator()).any()


@pytest.mark.parametrize("cap", [None, 256, 40, 8])
def test_sizes_of_small_and_large_nuclei(cap: int | None) -> None:
    """Few tokens are looked at first; rows that need more of them get the size that a whole sort gives."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.linspace(0.1, 6, 60)[:, None] * torch.randn(60, 500, generator=generator)
    sizes = region_size(logits.view(3, 20, 500), 0.9, cap)
    mass = logits.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    expected = ((mass < 0.9).sum(-1) + 1).clamp(max=cap or 500)
    assert expected.min() < 8
    assert expected.max() == min(cap or 500, int((mass < 0.9).sum(-1).max()) + 1)
    assert torch.equal(sizes, expected.view(3, 20))
