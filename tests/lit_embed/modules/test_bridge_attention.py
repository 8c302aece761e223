"""Attention under a bridge in a few calls against a softmax written out, in float64 (CoCoA, card section 2.4)."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from lit_core.backbones import BackboneConfig, load_backbone
from lit_core.errors import InputError
from lit_embed.functional.masks import Bridge, bridge_mask
from lit_embed.modules.bridge_attention import (
    allowed_pairs,
    arrange,
    bridge_attention,
    bridge_layout,
    use_bridge_attention,
)

BRIDGES: tuple[Bridge, ...] = ("collaborative", "strict", "one_way")
SEES = {  # the table of card section 2.2
    "collaborative": {"A": "AE", "E": "AEB", "B": "EB"},
    "strict": {"A": "AE", "E": "AE", "B": "EB"},
    "one_way": {"A": "A", "E": "AE", "B": "EB"},
}
CALLS = {"collaborative": 3, "strict": 2, "one_way": 3}
PADDED = ["-AAAE-BBBB", "E--BB-----", "AAAAAAE---", "A--EB----B"]  # nothing before E, nothing behind it
EQUAL = ["AAAEBB--", "AAA-EBB-", "-AAAE-BB"]


class _Layer(nn.Module):
    """What transformers' attention functions ask of a layer: four query heads on two key heads."""

    num_key_value_groups, is_causal = 2, True


def _batch(rows: list[str]) -> tuple[Tensor, Tensor]:
    valid = torch.tensor([[place != "-" for place in row] for row in rows])
    return valid, torch.tensor([row.index("E") for row in rows])


def _plain(rows: list[str], bridge: Bridge, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention ``(B, L, 4, D)`` token by token; zeros for padding."""
    batch, length, _, width = query.shape
    output = torch.zeros_like(query)
    for row in range(batch):
        for i in range(length):
            seen = [j for j in range(length) if rows[row][j] in SEES[bridge].get(rows[row][i], "")]
            for head in range(4 if seen else 0):
                scores = key[row, seen, head // 2] @ query[row, i, head] / width**0.5
                weights = scores.exp() / scores.exp().sum()
                output[row, i, head] = weights @ value[row, seen, head // 2]
    return output


def _states(rows: list[str]) -> list[Tensor]:
    generator = Generator().manual_seed(0)
    shapes = [(len(rows), len(rows[0]), heads, 5) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("rows", [PADDED, EQUAL])
def test_outputs_and_gradients_equal_a_softmax_written_out(rows: list[str], bridge: Bridge) -> None:
    valid, end_index = _batch(rows)
    arrangement = arrange(valid, end_index)
    layout = bridge_layout(bridge, arrangement)
    assert len(layout.blocks) == CALLS[bridge]
    assert all((block.mask is None) == (rows is EQUAL) for block in layout.blocks)  # equal lengths need no mask at all
    cotangent = torch.randn(len(rows), len(rows[0]), 4, 5, generator=Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for split in (True, False):
        states = _states(rows)
        if split:
            moved = [arrangement.move(x.flatten(2)).unflatten(2, x.shape[2:]).transpose(1, 2) for x in states]
            output, _ = bridge_attention(_Layer(), *moved, None, bridge=layout)  # type: ignore[arg-type]
            output = arrangement.restore(output.flatten(2)).view(cotangent.shape)
        else:
            output = _plain(rows, bridge, *states)
        output = output[valid]
        results.append((output, *torch.autograd.grad((output * cotangent[valid]).sum(), states)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bridge", BRIDGES)
def test_blocks_allow_what_the_square_mask_allows(bridge: Bridge) -> None:
    valid, end_index = _batch(PADDED)
    arrangement = arrange(valid, end_index)
    end = torch.full((len(PADDED),), arrangement.end)
    size = len(PADDED), arrangement.valid.shape[1], valid.device
    found = bridge_layout(bridge, arrangement).additive(*size, torch.float32) == 0
    expected = bridge_mask(bridge, arrangement.valid, end) == 0
    tokens = arrangement.valid[:, None, :, None].expand_as(found)
    assert torch.equal(found[tokens], expected[tokens])
    assert found.any(-1).all()  # padding sees something, so that nothing is NaN


def test_arrangement_by_hand() -> None:
    valid, end_index = _batch(["-AAE-B", "EBB---", "A-AE--"])
    arrangement = arrange(valid, end_index)
    assert (arrangement.end, arrangement.context, arrangement.target) == (2, 2, 2)
    assert arrangement.full == (False, False)
    assert arrangement.valid.int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert arrangement.columns.tolist() == [[1, 2, 3, 5, 3], [0, 0, 0, 1, 2], [0, 2, 3, 3, 3]]
    assert arrangement.places.tolist() == [[2, 0, 1, 2, 2, 3], [2, 3, 4, 2, 2, 2], [0, 2, 1, 2, 2, 2]]
    values = torch.arange(18.0).view(3, 6)
    assert arrangement.move(values).tolist() == [[1, 2, 3, 5, 3], [6, 6, 6, 7, 8], [12, 14, 15, 15, 15]]
    again = arrangement.restore(arrangement.move(values[..., None]))[..., 0]
    assert torch.equal(again[valid], values[valid])


def test_pairs_of_the_card() -> None:
    assert allowed_pairs("collaborative", 256, 64) == 70_273
    assert (256 + 1 + 64) ** 2 == 103_041
    assert allowed_pairs("collaborative", 1280, 64) == 1_645_185
    assert (1280 + 1 + 64) ** 2 == 1_809_025
    assert [allowed_pairs(bridge, 3, 3) for bridge in BRIDGES] == [31, 28, 25]  # C2
    assert [allowed_pairs(bridge, 4, 3) for bridge in BRIDGES[:2]] == [40, 37]  # C1


@pytest.mark.parametrize("bridge", BRIDGES)
def test_pairs_are_those_of_the_mask(bridge: Bridge) -> None:
    for context, target in ((0, 0), (0, 3), (5, 0), (2, 7), (6, 4)):
        mask = bridge_mask(bridge, torch.ones(1, context + 1 + target, dtype=torch.bool), torch.tensor([context]))
        assert allowed_pairs(bridge, context, target) == int((mask == 0).sum())


def test_without_a_layout_it_is_the_ordinary_attention() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model: Any = load_backbone("tiny-qwen3", "causal_lm").eval()
    expected = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    use_bridge_attention(model)
    use_bridge_attention(model)  # twice does no harm
    found = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-6)


def test_what_cannot_be_is_refused() -> None:
    eager = load_backbone("tiny-llama", "causal_lm", BackboneConfig(attention="eager"))
    with pytest.raises(InputError, match="need sdpa attention, got eager; use form dense"):
        use_bridge_attention(eager)
    valid = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="points at padding"):
        arrange(valid, torch.tensor([2]))
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(2,\)"):
        arrange(valid, torch.tensor([1, 1]))
