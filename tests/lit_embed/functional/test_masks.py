import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_embed.functional.masks import attention_stop, bidirectional, causal


def uniform_attention(mask: Tensor, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Attention whose scores are all equal (or log ``weights`` of the keys), for one row of the batch."""
    scores = mask[0, 0] if weights is None else mask[0, 0] + weights.log()
    return scores.softmax(-1) @ values


def test_attention_stop_card_e1() -> None:
    mask = attention_stop(torch.ones(1, 8, dtype=torch.bool), torch.tensor([4]))
    allowed = (mask[0, 0] == 0).int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]
    assert sum(map(sum, allowed)) == 24
    assert (causal(torch.ones(1, 8, dtype=torch.bool)) == 0).sum() == 36
    position = torch.arange(8.0)
    once = uniform_attention(mask, position)
    torch.testing.assert_close(once, torch.tensor([0, 0.5, 1, 1.5, 2, 4.5, 5, 5.5]))
    twice = uniform_attention(mask, once)
    torch.testing.assert_close(twice, torch.tensor([0, 0.25, 0.5, 0.75, 1, 3.25, 3.833333, 4.25]))
    weighted = uniform_attention(mask, position, position + 1)
    expected = [0, 0.666667, 1.333333, 2, 2.666667, 4.545455, 5.111111, 5.692308]
    torch.testing.assert_close(weighted, torch.tensor(expected))


def test_attention_stop_with_padding_card_e2() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    mask = attention_stop(valid, torch.tensor([6]))
    outputs = uniform_attention(mask, torch.arange(11.0))
    torch.testing.assert_close(outputs, torch.tensor([0, 1, 2, 2.5, 3, 3.5, 4, 6.5, 7, 7.5, 10]))
    assert (mask[0, 0, 7] == 0).int().tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]


def test_masks_equal_the_definition_on_random_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        length = int(torch.randint(2, 12, (), generator=generator))
        left, right = sorted(torch.randint(0, length, (2,), generator=generator).tolist())
        valid = torch.zeros(1, length, dtype=torch.bool)
        valid[0, left : right + 1] = True
        end = int(torch.randint(left, right + 1, (), generator=generator))
        masks = {
            "causal": causal(valid),
            "both": bidirectional(valid),
            "stop": attention_stop(valid, torch.tensor([end])),
        }
        for i in range(length):
            for j in range(length):
                tokens = bool(valid[0, i] and valid[0, j])
                expected = {
                    "causal": tokens and j <= i,
                    "both": tokens,
                    "stop": tokens and j <= i and not (i > end and j < end),
                }
                for name, mask in masks.items():
                    assert bool(mask[0, 0, i, j] == 0) == (expected[name] or i == j), (name, i, j)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_stay_finite(dtype: torch.dtype) -> None:
    valid = torch.tensor([[False, True, True, False]])
    mask = attention_stop(valid, torch.tensor([1]), dtype)
    assert mask.dtype == dtype
    states = torch.randn(1, 1, 4, 8, dtype=dtype)
    assert F.scaled_dot_product_attention(states, states, states, attn_mask=mask).isfinite().all()


def test_end_index_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        attention_stop(torch.ones(2, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.long))
