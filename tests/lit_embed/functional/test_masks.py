from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_core.errors import InputError
from lit_embed.functional.masks import (
    Bridge,
    attention_stop,
    bidirectional,
    bridge_mask,
    causal,
    collaborative,
    one_way,
    strict,
)


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


BRIDGES: dict[Bridge, Callable[..., Tensor]] = {
    "collaborative": collaborative,
    "strict": strict,
    "one_way": one_way,
}


def test_bridges_card_c1() -> None:
    valid, end = torch.ones(1, 8, dtype=torch.bool), torch.tensor([4])
    context, bridge, target = [1, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]
    mask = collaborative(valid, end)
    assert (mask[0, 0] == 0).int().tolist() == [context] * 4 + [bridge] + [target] * 3
    assert (mask == 0).sum() == 40
    outputs = uniform_attention(mask, torch.arange(8.0))
    torch.testing.assert_close(outputs, torch.tensor([2, 2, 2, 2, 3.5, 5.5, 5.5, 5.5]))
    mask = strict(valid, end)
    assert (mask[0, 0] == 0).int().tolist() == [context] * 5 + [target] * 3
    assert (mask == 0).sum() == 37
    outputs = uniform_attention(mask, torch.arange(8.0))
    torch.testing.assert_close(outputs, torch.tensor([2, 2, 2, 2, 2, 5.5, 5.5, 5.5]))


@pytest.mark.parametrize(
    ("bridge", "allowed", "once", "twice", "weighted"),
    [
        (
            "collaborative",
            31,
            [1.5, 1.5, 1.5, 3, 4.5, 4.5, 4.5],
            [1.875, 1.875, 1.875, 3, 4.125, 4.125, 4.125],
            [2, 2, 2, 4, 4.727273, 4.727273, 4.727273],
        ),
        (
            "strict",
            28,
            [1.5, 1.5, 1.5, 1.5, 4.5, 4.5, 4.5],
            [1.5, 1.5, 1.5, 1.5, 3.75, 3.75, 3.75],
            [2, 2, 2, 2, 4.727273, 4.727273, 4.727273],
        ),
        (
            "one_way",  # applied twice and with weights: by hand, from the rule
            25,
            [1, 1, 1, 1.5, 4.5, 4.5, 4.5],
            [1, 1, 1, 1.125, 3.75, 3.75, 3.75],
            [4 / 3, 4 / 3, 4 / 3, 2, 4.727273, 4.727273, 4.727273],
        ),
    ],
)
def test_bridges_card_c2(
    bridge: Bridge, allowed: int, once: list[float], twice: list[float], weighted: list[float]
) -> None:
    mask = bridge_mask(bridge, torch.ones(1, 7, dtype=torch.bool), torch.tensor([3]))
    assert (mask == 0).sum() == allowed
    position = torch.arange(7.0)
    first = uniform_attention(mask, position)
    torch.testing.assert_close(first, torch.tensor(once))
    torch.testing.assert_close(uniform_attention(mask, first), torch.tensor(twice))
    torch.testing.assert_close(uniform_attention(mask, position, position + 1), torch.tensor(weighted))


def test_collaborative_with_padding_card_c3() -> None:
    valid = torch.tensor([[False, False, True, True, True, True, True, True]])
    outputs = uniform_attention(collaborative(valid, torch.tensor([4])), torch.arange(8.0))
    torch.testing.assert_close(outputs, torch.tensor([0, 1, 3, 3, 4.5, 5.5, 5.5, 5.5]))


def test_bridges_equal_the_table_on_random_rows() -> None:
    """Padding on the left, on the right and between the blocks; the table of card section 2.2, block by block."""
    generator = torch.Generator().manual_seed(1)
    may_see = {
        "collaborative": {"A": "AE", "E": "AEB", "B": "EB"},
        "strict": {"A": "AE", "E": "AE", "B": "EB"},
        "one_way": {"A": "A", "E": "AE", "B": "EB"},
    }
    for _ in range(20):
        pads, context, between, target, more = torch.randint(0, 4, (5,), generator=generator).tolist()
        row = "-" * pads + "A" * context + "E" + "-" * between + "B" * target + "-" * more
        valid, end = torch.tensor([[place != "-" for place in row]]), torch.tensor([row.index("E")])
        for bridge, build in BRIDGES.items():
            mask = bridge_mask(bridge, valid, end)
            assert torch.equal(mask, build(valid, end))
            for i, reader in enumerate(row):
                for j, read in enumerate(row):
                    expected = i == j or (reader != "-" and read in may_see[bridge][reader])
                    assert bool(mask[0, 0, i, j] == 0) == expected, (bridge, row, i, j)


def test_bridges_read_each_row_s_own_end() -> None:
    valid = torch.ones(2, 6, dtype=torch.bool)
    for build in BRIDGES.values():
        both = build(valid, torch.tensor([1, 4]), torch.float64)
        assert both.dtype == torch.float64
        assert torch.equal(both[:1], build(valid[:1], torch.tensor([1]), torch.float64))
        assert torch.equal(both[1:], build(valid[:1], torch.tensor([4]), torch.float64))


def test_what_is_no_bridge_is_refused() -> None:
    valid = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="bridge must be one of collaborative, strict, one_way, got 'both'"):
        bridge_mask("both", valid, torch.tensor([1, 1]))  # type: ignore[arg-type]
    for build in BRIDGES.values():
        with pytest.raises(ValueError, match=r"shape \(2,\), got \(1,\)"):
            build(valid, torch.tensor([1]))
