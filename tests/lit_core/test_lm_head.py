import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_core.lm_head import cross_entropy, token_log_probs


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
