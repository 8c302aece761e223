import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_core.lm_head import Truncation, cross_entropy, token_log_probs


def problem(dtype: torch.dtype = torch.float64, rows: int = 13, width: int = 5, words: int = 17) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(words, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, words, (rows,), generator=generator)


@pytest.mark.parametrize("chunk_logits", [1, 40, 1 << 20])
def test_cross_entropy_equals_full_logits(chunk_logits: int) -> None:
    hidden, weight, bias, labels = problem(torch.float32)
    labels[[1, 5, 12]] = -100
    ours = cross_entropy(hidden, weight, labels, bias, chunk_logits)
    full = F.cross_entropy(hidden @ weight.T + bias, labels)
    torch.testing.assert_close(ours, full)
    grads = torch.autograd.grad(ours * 3, (hidden, weight, bias))
    for ours_grad, full_grad in zip(grads, torch.autograd.grad(full * 3, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(ours_grad, full_grad)


def test_cross_entropy_of_bfloat16_inputs_is_float32_and_near() -> None:
    hidden, weight, bias, labels = problem(torch.bfloat16)
    ours = cross_entropy(hidden, weight, labels, bias)
    full = F.cross_entropy((hidden @ weight.T).float() + bias.float(), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, full)
    (grad,) = torch.autograd.grad(ours, weight)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, torch.autograd.grad(full, weight)[0], atol=2e-2, rtol=2e-2)


def test_cross_entropy_without_a_label_is_refused() -> None:
    hidden, weight, bias, labels = problem()
    with pytest.raises(ValueError, match="at least one label"):
        cross_entropy(hidden, weight, torch.full_like(labels, -100), bias)


def test_uniform_logits_by_hand() -> None:  # log p = -ln 4, entropy = ln 4
    result = token_log_probs(torch.zeros(3, 2), torch.randn(4, 2), torch.tensor([0, 1, 2]), entropy=True)
    torch.testing.assert_close(result.log_probs, torch.full((3,), -math.log(4)))
    torch.testing.assert_close(result.entropy, torch.full((3,), math.log(4)))


@pytest.mark.parametrize("chunk_logits", [1, 40, 1 << 20])
def test_token_log_probs_and_entropy_equal_full_logits(chunk_logits: int) -> None:
    hidden, weight, bias, targets = problem(torch.float32)
    outer = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1))
    ours = token_log_probs(hidden, weight, targets, bias, entropy=True, chunk_logits=chunk_logits)
    full = (hidden @ weight.T + bias).log_softmax(1)
    log_probs, entropy = full.gather(1, targets[:, None]).squeeze(1), -(full.exp() * full).sum(1)
    torch.testing.assert_close(ours.log_probs, log_probs)
    torch.testing.assert_close(ours.entropy, entropy)
    assert ours.entropy is not None
    grads = torch.autograd.grad((outer[0] * ours.log_probs + outer[1] * ours.entropy).sum(), (hidden, weight, bias))
    expected = torch.autograd.grad((outer[0] * log_probs + outer[1] * entropy).sum(), (hidden, weight, bias))
    for ours_grad, full_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours_grad, full_grad, atol=2e-6, rtol=1e-5)


def test_only_the_needed_gradients_are_formed() -> None:
    hidden, weight, _, targets = problem(torch.float32)
    (grad,) = torch.autograd.grad(token_log_probs(hidden, weight.detach(), targets).log_probs.sum(), hidden)
    full = (hidden @ weight.detach().T).log_softmax(1).gather(1, targets[:, None]).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(full, hidden)[0])


def reference(logits: Tensor, kept: Tensor) -> Tensor:
    """Entropy of the softmax over the marked words, by a loop over rows."""
    rows = [row[mark].log_softmax(0) for row, mark in zip(logits, kept, strict=True)]
    return torch.stack([-(row.exp() * row).sum() for row in rows])


@pytest.mark.parametrize("chunk_logits", [1, 40, 1 << 20])
@pytest.mark.parametrize("truncation", [Truncation(top_k=2), Truncation(top_k=17), Truncation(top_p=0.8),
                                        Truncation(top_p=0.99, cap=3), Truncation(top_p=0.9, cap=None)])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_truncated_entropy_equals_full_logits(truncation: Truncation, temperature: float, chunk_logits: int) -> None:
    hidden, weight, bias, targets = problem(torch.float32)
    outer = torch.randn(3, len(targets), generator=torch.Generator().manual_seed(1))
    ours = token_log_probs(hidden, weight, targets, bias, True, truncation, temperature, chunk_logits)
    logits = (hidden @ weight.T + bias) / temperature
    probabilities = logits.softmax(1)
    order = logits.argsort(dim=1, descending=True)
    sizes = [truncation.top_k or 0] * len(logits)
    if truncation.top_p is not None:
        before = probabilities.gather(1, order).cumsum(1) - probabilities.gather(1, order)
        sizes = [min(int(row.sum()), truncation.cap or 99) for row in before < truncation.top_p]
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, size in enumerate(sizes):
        kept[row, order[row, :size]] = True
    full = logits.log_softmax(1)
    log_probs, entropy = full.gather(1, targets[:, None]).squeeze(1), -(full.exp() * full).sum(1)
    truncated = reference(logits, kept)
    assert ours.entropy is not None
    assert ours.truncated_entropy is not None
    assert ours.kept is not None
    torch.testing.assert_close(ours.truncated_entropy, truncated)
    assert ours.kept.tolist() == sizes
    torch.testing.assert_close(ours.kept_mass, (probabilities * kept).sum(1))
    found = (outer[0] * ours.log_probs + outer[1] * ours.entropy + outer[2] * ours.truncated_entropy).sum()
    expected = (outer[0] * log_probs + outer[1] * entropy + outer[2] * truncated).sum()
    for one, other in zip(
        *(torch.autograd.grad(total, (hidden, weight, bias)) for total in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-5)


def test_truncation_to_one_word_is_the_min_entropy() -> None:  # card TRE, example A, K = 1
    logits = torch.tensor([[2.0, 1, 0, -1]])
    hidden = logits.clone().requires_grad_()
    found = token_log_probs(hidden, torch.eye(4), torch.tensor([1]), truncation=Truncation(top_k=1))
    torch.testing.assert_close(found.truncated_entropy, torch.tensor([0.440190]), atol=1e-6, rtol=0)
    assert found.truncated_entropy is not None
    (grad,) = torch.autograd.grad(found.truncated_entropy.sum(), hidden)
    torch.testing.assert_close(grad, torch.tensor([[-0.356086, 0.236883, 0.087144, 0.032059]]), atol=1e-6, rtol=0)


def test_mass_preserving_gradient_is_orthogonal_to_the_probabilities() -> None:
    hidden = torch.tensor([[2.0, 1, 0, -1]], requires_grad=True)
    truncation = Truncation(top_k=3, mass_preserving=True)
    found = token_log_probs(hidden, torch.eye(4), torch.tensor([1]), truncation=truncation).truncated_entropy
    assert found is not None
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    assert abs(float(grad[0, :3] @ hidden.detach()[0, :3].softmax(0))) < 1e-7
    assert float(grad[0, 3]) == 0


@pytest.mark.parametrize(
    "mistake", [{}, {"top_k": 2, "top_p": 0.5}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 1, "cap": 0}]
)
def test_mistakes_in_a_truncation(mistake: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"top_k|top_p|cap"):
        Truncation(**mistake)  # type: ignore[arg-type]


def test_mistakes_in_a_call() -> None:
    hidden, weight, _, targets = problem(torch.float32)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_log_probs(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="at most the 17 tokens"):
        token_log_probs(hidden, weight, targets, truncation=Truncation(top_k=18))
