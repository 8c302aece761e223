"""The tiled head against all logits at once in float64, where tiles divide neither rows nor words."""

import math

import pytest
import torch
from torch import Tensor

from lit_core import head_tiles
from lit_core.head_tiles import tiling
from lit_core.lm_head import TokenLogProbs, Truncation, token_log_probs


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows by a few words, also where best words are looked for."""
    monkeypatch.setattr(head_tiles, "CPU_ROWS", 3)
    monkeypatch.setattr(head_tiles, "SORTED_WIDTH", 1)


def problem(rows: int, width: int, words: int, seed: int, spread: float = 1.0) -> tuple[Tensor, ...]:
    """States, weight and bias in float32, and targets from the first word to the last."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(count, width, generator=generator) for count in (rows, words))
    bias = torch.randn(words, generator=generator)
    inputs = ((part * scale).requires_grad_() for part, scale in ((hidden, spread), (weight, 1.0), (bias, 1.0)))
    return *inputs, torch.linspace(0, words - 1, rows).long()


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, truncation: Truncation | None, temperature: float
) -> list[Tensor]:
    """Log-probs, entropy, truncated entropy, words kept and their mass, by a loop over rows of all logits."""
    logs = ((hidden @ weight.T + bias) / temperature).log_softmax(1)
    found = [logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(1)]
    if truncation is None:
        return found
    truncated, kept, mass = [], [], []
    for row in logs:
        ordered, order = row.sort(descending=True)
        before = ordered.exp().cumsum(0) - ordered.exp()
        size = truncation.top_k or min(int((before < float(truncation.top_p or 1)).sum()), truncation.cap or len(row))
        inside = row[order[:size]]
        mass.append(inside.exp().sum())
        kept.append(torch.tensor(size))
        renormalised = inside.log_softmax(0)
        truncated.append(-inside[0] if truncation.top_k == 1 else -(renormalised.exp() * renormalised).sum())
    return [*found, *map(torch.stack, (truncated, kept, mass))]


def assert_equal_to_reference(
    inputs: tuple[Tensor, ...], truncation: Truncation | None, temperature: float, chunk_logits: int, entropy: bool
) -> TokenLogProbs:
    hidden, weight, bias, targets = inputs
    outer = torch.randn(3, len(targets), generator=torch.Generator().manual_seed(1))
    ours = token_log_probs(hidden, weight, targets, bias, entropy, truncation, temperature, chunk_logits)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight, bias)]
    expected = reference(*exact, targets, truncation, temperature)
    total = expected_total = torch.zeros(())
    for number, (one, other) in enumerate(zip(ours, expected, strict=False)):
        if one is not None:
            torch.testing.assert_close(one.double(), other.double(), atol=5e-6, rtol=1e-5)
            if number < 3:
                total = total + (outer[number] * one).sum()
                expected_total = expected_total + (outer[number] * other).sum()
    grads = torch.autograd.grad(total, (hidden, weight, bias))
    for grad, exact_grad in zip(grads, torch.autograd.grad(expected_total, exact), strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, atol=2e-5, rtol=1e-4)
    return ours


def test_tiles_cover_all_logits_once_within_the_bound() -> None:
    for rows, vocabulary, most, best in [
        (7, 19, 12, 0),
        (100, 5, 40, 2),
        (3, 1000, 64, 70),
        (1, 9, 1, 0),
        (0, 9, 9, 0),
    ]:
        for cuda in (False, True):
            tiles = tiling(rows, vocabulary, most, best, cuda)
            for slices, total in ((tiles.rows, rows), (tiles.words, vocabulary)):
                assert [place for part in slices for place in range(part.start, part.stop)] == list(range(total))
            for part in tiles.rows:
                assert all((part.stop - part.start) * (words.stop - words.start) <= most for words in tiles.words)


def test_tile_of_a_large_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def shape(*sizes: int) -> tuple[int, int]:
        tiles = tiling(*sizes)
        return tiles.rows[0].stop, tiles.words[0].stop

    monkeypatch.undo()
    assert shape(1024, 151_936, 1 << 23, 0) == (512, 2048)
    assert shape(16, 151_936, 1 << 23, 0) == (16, 65_536)  # the weight is read once
    assert shape(1024, 151_936, 1 << 23, 256) == (256, 16_384)
    assert shape(1024, 4096, 1 << 23, 256) == (256, 4096)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("rows", "words", "chunk_logits", "truncation", "temperature"),
    [
        (7, 103, 40, None, 1.0),  # tiles of 3 x 12
        (10, 11, 5, None, 0.7),  # 1 x 4
        (1, 50, 7, Truncation(top_k=1), 1.3),
        (11, 101, 48, Truncation(top_k=3), 1.0),
        (8, 37, 30, Truncation(top_k=29), 0.8),  # more than there are in a tile
        (9, 64, 33, Truncation(top_p=0.9, cap=5), 1.0),
        (13, 90, 50, Truncation(top_p=0.95, cap=None), 0.9),
        (5, 61, 9, Truncation(top_p=1.0, cap=20), 1.0),
    ],
)
def test_equals_full_logits(
    rows: int, words: int, chunk_logits: int, truncation: Truncation | None, temperature: float, entropy: bool
) -> None:
    inputs = problem(rows, 6, words, seed=rows)
    assert_equal_to_reference(inputs, truncation, temperature, chunk_logits, entropy)


def test_regions_wider_than_a_tile() -> None:  # nearly uniform, so that 0.8 of the mass are most of the words
    inputs = problem(6, 4, 70, seed=2, spread=0.01)
    for cap in (None, 60):
        ours = assert_equal_to_reference(inputs, Truncation(top_p=0.8, cap=cap), 1.0, 20, True)
        assert ours.kept is not None
        assert int(ours.kept.min()) > 20


def test_words_that_tie_in_different_tiles() -> None:  # equal rows of the weight: whichever is kept, the sums agree
    hidden, weight, bias, targets = (part.detach() for part in problem(5, 4, 6, seed=3))
    copies = 8
    inputs = [part.requires_grad_() for part in (hidden, weight.repeat(copies, 1), bias.repeat(copies))]
    for kept in (1, 3, copies, copies + 3):
        ours = token_log_probs(inputs[0], inputs[1], targets, inputs[2], False, Truncation(top_k=kept), 1.0, 30)
        logits = (inputs[0] @ inputs[1].T + inputs[2]).double()
        best = logits.topk(kept, dim=1).values.log_softmax(1)
        expected = -(best.exp() * best).sum(1) if kept > 1 else -logits.log_softmax(1).amax(1)
        assert ours.truncated_entropy is not None
        torch.testing.assert_close(ours.truncated_entropy.double(), expected, atol=2e-6, rtol=1e-5)
        found = torch.autograd.grad(ours.truncated_entropy.sum(), inputs)
        wanted = torch.autograd.grad(expected.sum(), inputs)
        torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
        for one, other in zip(found[1:], wanted[1:], strict=True):
            sums = (part.unflatten(0, (copies, -1)).sum(0) for part in (one, other))
            torch.testing.assert_close(*sums, atol=1e-5, rtol=1e-5)


def test_tiles_of_very_different_height() -> None:  # words that are masked, then one that has all the mass
    hidden, weight, bias, targets = problem(4, 5, 60, seed=4)
    with torch.no_grad():
        bias[:20], bias[50] = -1e30, 5000.0
    targets = torch.tensor([22, 50, 59, 50])
    ours = assert_equal_to_reference((hidden, weight, bias, targets), Truncation(top_k=2), 1.0, 40, True)
    assert ours.entropy is not None
    assert ours.entropy.tolist() == [0.0] * 4
    with torch.no_grad():  # all of the row but its last tile
        bias[:], bias[58:] = torch.finfo(torch.float32).min, 0.0
    ours = token_log_probs(torch.zeros(1, 5), weight, torch.tensor([59]), bias, True, chunk_logits=20)
    torch.testing.assert_close(ours.log_probs.detach(), torch.tensor([-math.log(2)]))
    assert ours.entropy is not None
    torch.testing.assert_close(ours.entropy.detach(), torch.tensor([math.log(2)]))


def test_bfloat16_keeps_its_dtype_and_sums_over_tiles_in_float32() -> None:
    full = problem(9, 8, 300, seed=5)
    narrow = [part.detach().bfloat16().requires_grad_() for part in full[:3]]
    wide = [part.detach().float().requires_grad_() for part in narrow]
    found, expected = (
        token_log_probs(*inputs[:2], full[3], inputs[2], True, Truncation(top_p=0.9, cap=9), 1.0, chunk)
        for inputs, chunk in ((narrow, 100), (wide, 1 << 20))
    )
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=3e-2, rtol=1e-2)
    assert found.log_probs.dtype == torch.float32
    grads = torch.autograd.grad(found.log_probs.sum(), narrow)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 3
    for one, other in zip(grads, torch.autograd.grad(expected.log_probs.sum(), wide), strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.01


def test_no_rows_give_no_results_and_zero_gradients() -> None:
    hidden, weight, bias, targets = problem(0, 4, 30, seed=6)
    found = token_log_probs(hidden, weight, targets, bias, True, Truncation(top_p=0.9), chunk_logits=20)
    assert all(part is not None and part.shape == (0,) for part in found)
    grads = torch.autograd.grad(found.log_probs.sum(), (hidden, weight, bias))
    assert grads[0].shape == (0, 4)
    assert not grads[1].any()
    assert not grads[2].any()


@pytest.mark.parametrize("target", [-100, 30])
def test_targets_that_are_no_words_are_refused(target: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        token_log_probs(torch.zeros(1, 4), torch.zeros(30, 4), torch.tensor([target]), chunk_logits=10)


@pytest.mark.parametrize("truncation", [None, Truncation(top_k=1), Truncation(top_p=0.9, cap=5)])
def test_nothing_is_copied_to_the_host(truncation: Truncation | None) -> None:  # on the meta device there is nothing
    inputs = [torch.empty(size, device="meta", requires_grad=True) for size in ((9, 4), (50, 4), (50,))]
    targets = torch.empty(9, dtype=torch.long, device="meta")
    found = token_log_probs(*inputs[:2], targets, inputs[2], True, truncation, 0.7, chunk_logits=40)
    loss = found.log_probs.sum() + sum(part.sum() for part in found[1:3] if part is not None)
    assert all(grad.is_meta for grad in torch.autograd.grad(loss, inputs))
