"""What is hidden and how it is scored (CoCoA, card sections 2.1, 2.2, 2.5): worked numbers, plain loops, properties."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lit_core.errors import InputError
from lit_embed.functional.reconstruction import (
    draw_hidden,
    draw_masked,
    hide_patches,
    joint_loss,
    label_states,
    mask_tokens,
    maskable_tokens,
    masked_patch_loss,
    mntp_loss,
    pixel_targets,
    place_hidden,
    predecessors,
)

MASK, BRIDGE, IMAGE, PAD = 90, 91, 92, 93
SPECIAL = [MASK, BRIDGE, IMAGE, PAD]


def random_rows(seed: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids below 30 and a few special ones, with padding on either side and in between."""
    generator = Generator().manual_seed(seed)
    valid = torch.rand(rows, length, generator=generator) < 0.8
    ids = torch.randint(0, 30, (rows, length), generator=generator)
    special = torch.rand(rows, length, generator=generator) < 0.2
    return torch.where(special, IMAGE, ids).masked_fill(~valid, PAD), valid


def test_mntp_card_c4() -> None:
    """Row [A A A E 2 0 3 1]: B1, B3 and B4 are hidden and predicted from rows 3 (E), 5 and 6."""
    ids = torch.tensor([[0, 0, 0, BRIDGE, 2, 0, 3, 1]])
    masked = torch.tensor([[0, 0, 0, 0, 1, 0, 1, 1]]).bool()
    corrupted, labels = mask_tokens(ids, masked, MASK)
    assert labels.tolist() == [[-100, -100, -100, -100, 2, -100, 3, 1]]
    assert corrupted.tolist() == [[0, 0, 0, BRIDGE, MASK, 0, MASK, MASK]]
    logits = torch.zeros(1, 8, 4)
    logits[0, 3, 2], logits[0, 5, 3], logits[0, 6, 0], logits[0, 4, 0] = 2, 1, 1, 5
    valid, head = torch.ones(1, 8, dtype=torch.bool), torch.eye(4)  # states are logits
    states, targets = label_states(logits, labels, valid)
    assert torch.equal(states, logits[0, [3, 5, 6]])
    assert targets.tolist() == [2, 3, 1]
    losses = F.cross_entropy(states, targets, reduction="none").tolist()
    assert losses == pytest.approx([0.340753, 0.743668, 1.743668], abs=1e-6)
    assert float(mntp_loss(logits, labels, valid, head)) == pytest.approx(0.942697, abs=1e-6)
    assert float(mntp_loss(logits, labels, valid, head, shift=False)) == pytest.approx(2.716658, abs=1e-6)


def test_mntp_equals_a_loop_over_tokens_whatever_the_padding() -> None:
    for seed in range(8):
        generator = Generator().manual_seed(seed)
        ids, valid = random_rows(seed, 4, 13)
        labels = mask_tokens(ids, maskable_tokens(ids, valid, SPECIAL), MASK).labels
        states = torch.randn(4, 13, 6, generator=generator, dtype=torch.float64)
        weight = torch.randn(30, 6, generator=generator, dtype=torch.float64)
        bias = torch.randn(30, generator=generator, dtype=torch.float64)
        found = []
        for row in range(4):
            columns = [column for column in range(13) if valid[row, column]]
            for before, column in pairwise(columns):
                if labels[row, column] != -100:
                    logits = [float(word @ states[row, before] + at) for word, at in zip(weight, bias, strict=True)]
                    found.append(math.log(sum(map(math.exp, logits))) - logits[int(labels[row, column])])
        expected = sum(found) / len(found)
        assert float(mntp_loss(states, labels, valid, weight, bias)) == pytest.approx(expected, abs=1e-6)


def test_only_states_that_predict_get_a_gradient() -> None:
    ids, valid = torch.tensor([[PAD, 5, 6, 7, 8, PAD, PAD, 9]]), torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1]]).bool()
    labels = torch.where(torch.tensor([[0, 0, 0, 1, 0, 0, 0, 1]]).bool(), ids, -100)
    states = torch.randn(1, 8, 4, generator=Generator().manual_seed(0)).requires_grad_()
    mntp_loss(states, labels, valid, torch.eye(30)[:, :4]).backward()
    assert states.grad is not None
    assert states.grad[0].norm(dim=1).nonzero().squeeze(1).tolist() == [2, 4]  # 9 follows 8, over the padding


def test_predecessors_by_hand() -> None:
    valid = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    expected = [[-1, -1, 1, 2, 2, 2, 5], [-1, 0, 0, 0, 0, 0, 0], [-1] * 7]
    assert predecessors(valid).tolist() == expected


def test_a_first_token_cannot_be_predicted() -> None:
    labels, valid = torch.tensor([[3, -100, 2]]), torch.ones(1, 3, dtype=torch.bool)
    assert label_states(torch.zeros(1, 3, 4), labels, valid)[1].tolist() == [2]
    assert label_states(torch.zeros(1, 3, 4), labels, valid, shift=False)[1].tolist() == [3, 2]
    with pytest.raises(ValueError, match="at least one label"):
        mntp_loss(torch.zeros(1, 3, 4), labels.where(labels == 3, -100), valid, torch.eye(4))


def test_special_tokens_padding_and_first_tokens_are_never_hidden() -> None:
    for seed in range(6):
        ids, valid = random_rows(seed, 5, 12)
        behind = torch.randint(0, 12, (5,), generator=Generator().manual_seed(seed))
        maskable = maskable_tokens(ids, valid, torch.tensor(SPECIAL))
        later = maskable_tokens(ids, valid, SPECIAL, behind)
        for row in range(5):
            for column in range(12):
                first = not valid[row, :column].any()
                expected = bool(valid[row, column]) and int(ids[row, column]) not in SPECIAL and not first
                assert bool(maskable[row, column]) == expected
                assert bool(later[row, column]) == (expected and column > int(behind[row]))
        masked = draw_masked(maskable, 0.5, range(5))
        assert not (masked & ~maskable).any()
        assert torch.equal(masked.any(1), maskable.any(1))  # at least one wherever there is any
        assert torch.equal(draw_masked(maskable, 1.0, range(5)), maskable)


def test_a_row_s_draw_is_its_own() -> None:
    """Neither the other rows nor padding or special tokens around it matter; its seed does."""
    plain = torch.ones(1, 40, dtype=torch.bool)
    alone = draw_masked(plain, 0.4, [7])[0]
    batch = torch.rand(3, 60, generator=Generator().manual_seed(0)) < 0.5
    batch[1] = False
    batch[1, torch.arange(40) + torch.arange(40) // 4] = True  # 40 candidates among others
    assert torch.equal(draw_masked(batch, 0.4, [1, 7, 2])[1][batch[1]], alone)
    assert not torch.equal(draw_masked(plain, 0.4, [8])[0], alone)
    assert torch.equal(draw_masked(plain, 0.4, [7])[0], alone)


def test_the_share_is_that_asked_for_and_one_is_forced() -> None:
    candidates = torch.ones(2000, dtype=torch.bool)
    hidden = draw_hidden(candidates, 0.7, Generator().manual_seed(0))
    assert int(hidden.sum()) == pytest.approx(1400, abs=82)  # four standard deviations
    few = [draw_hidden(torch.ones(2, dtype=torch.bool), 0.01, Generator().manual_seed(seed)) for seed in range(200)]
    assert all(int(one.sum()) == 1 for one in few)  # both at once: one in 10,000
    assert 70 < sum(int(one[0]) for one in few) < 130  # the forced one stands anywhere
    assert not draw_hidden(torch.zeros(3, dtype=torch.bool), 0.5, Generator()).any()
    assert draw_masked(torch.zeros(0, 5, dtype=torch.bool), 0.5, []).shape == (0, 5)


def test_joint_loss_card_c5() -> None:
    predictions = torch.tensor([[0.0, 1, 2, 3], [1, 1, 1, 1]])
    targets = torch.tensor([[0.0, 0, 2, 1], [1, 3, 1, 1]])
    image = masked_patch_loss(predictions, targets)
    assert float(image) == 1.125
    assert float(masked_patch_loss(predictions.view(1, 8), targets.view(1, 8))) == 1.125  # merged tokens as a whole
    assert float(joint_loss(torch.tensor(2.0), image)) == 2.5625
    assert float(joint_loss(torch.tensor(2.0), image, 0.1)) == pytest.approx(2.1125)


def test_masked_patch_loss_equals_a_loop() -> None:
    generator = Generator().manual_seed(0)
    predictions, targets = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        total += sum((p - t) ** 2 for p, t in zip(prediction, target, strict=True)) / 7
    assert float(masked_patch_loss(predictions, targets)) == pytest.approx(total / 5, abs=1e-6)
    assert masked_patch_loss(predictions.bfloat16(), targets).dtype == torch.float32


def test_nothing_hidden_costs_nothing_and_keeps_the_graph() -> None:
    predictions = torch.zeros(0, 4, requires_grad=True)
    loss = masked_patch_loss(predictions, torch.zeros(0, 4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert predictions.grad is not None
    hidden = hide_patches(torch.zeros(0, 6), torch.zeros(0, 3, dtype=torch.long), 0.5, [])  # a batch of texts
    assert hidden.targets.shape == (0, 24)
    assert not place_hidden(torch.zeros(2, 5, dtype=torch.bool), hidden.hidden).any()


GRIDS = torch.tensor([[1, 4, 6], [1, 2, 2], [2, 4, 4]])  # 6, 1 and 8 merged tokens


def _pixels() -> Tensor:
    return torch.randn(int(GRIDS.prod(1).sum()), 12, generator=Generator().manual_seed(3))


def test_hidden_patches_equal_a_loop_over_patches() -> None:
    pixels = _pixels()
    found = hide_patches(pixels, GRIDS, 0.5, [4, 5, 6])
    assert found.hidden.shape == (15,)
    assert 0 < int(found.hidden.sum()) < 15
    targets = []
    for token, hide in enumerate(found.hidden.tolist()):
        patches = range(4 * token, 4 * token + 4)  # all four go together
        for patch in patches:
            assert torch.equal(found.pixel_values[patch], pixels[patch]) != hide
        if hide:
            targets.append([value for patch in patches for value in pixels[patch].tolist()])
    assert found.targets.tolist() == targets
    assert torch.equal(pixels, _pixels())  # the images themselves stay as they are
    assert torch.equal(found.targets, pixel_targets(pixels, found.hidden))


def test_noise_is_normal_and_drawn_per_patch_or_shared_by_an_image() -> None:
    grid, pixels = torch.tensor([[1, 40, 40], [1, 4, 4]]), torch.full((1616, 12), 100.0)
    for shared in (False, True):
        noisy, hidden, _ = hide_patches(pixels, grid, 0.5, [0, 1], shared_noise=shared)
        rows = noisy[hidden.repeat_interleave(4)]
        of_first = int(hidden[:400].sum()) * 4
        distinct = [len(part.unique(dim=0)) for part in (rows[:of_first], rows[of_first:])]
        assert distinct == ([1, 1] if shared else [of_first, len(rows) - of_first])
        if not shared:
            assert float(rows.mean()) == pytest.approx(0, abs=0.05)
            assert float(rows.std()) == pytest.approx(1, abs=0.05)
    assert hide_patches(pixels.bfloat16(), grid, 0.5, [0, 1]).pixel_values.dtype == torch.bfloat16


def test_an_image_s_draw_is_its_own() -> None:
    pixels = _pixels()
    batch = hide_patches(pixels, GRIDS, 0.5, [4, 5, 6])
    alone = hide_patches(pixels[28:], GRIDS[2:], 0.5, [6])
    assert torch.equal(batch.pixel_values[28:], alone.pixel_values)
    assert torch.equal(batch.hidden[7:], alone.hidden)
    assert bool(batch.hidden[6])  # the only token of the second image
    assert not torch.equal(hide_patches(pixels[28:], GRIDS[2:], 0.5, [7]).pixel_values, alone.pixel_values)


def test_hidden_tokens_find_their_places() -> None:
    image_tokens = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()
    placed = place_hidden(image_tokens, torch.tensor([False, True, True, False]))
    assert placed.int().tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]


def test_errors_name_the_value() -> None:
    ones = torch.ones(1, 4, dtype=torch.bool)
    for rate in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"above 0 and at most 1, got {rate}"):
            draw_masked(ones, rate, [0])
    with pytest.raises(ValueError, match="one seed a row, got 2 for 1 rows"):
        draw_masked(ones, 0.5, [0, 1])
    with pytest.raises(ValueError, match="one seed an image, got 1 for 3 images"):
        hide_patches(_pixels(), GRIDS, 0.5, [0])
    with pytest.raises(ValueError, match="grids of 60 patches do not fit 59 rows"):
        hide_patches(_pixels()[1:], GRIDS, 0.5, [0, 1, 2])
    with pytest.raises(ValueError, match="4 image tokens in the rows do not fit 2 merged tokens"):
        place_hidden(ones, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ in shape"):
        masked_patch_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="at least 0, got -1"):
        joint_loss(torch.tensor(1.0), torch.tensor(1.0), -1)
