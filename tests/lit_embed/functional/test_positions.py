from itertools import count
from typing import Any

import pytest
import torch

from lit_core.backbones import load_backbone
from lit_embed.functional.positions import mrope_positions


def test_worked_example_card_2_4() -> None:
    """vs img img img img ve t t E b b b, one image of 4 x 4 patches, 2 x 2 tokens."""
    found = mrope_positions(torch.ones(1, 12, dtype=torch.bool), torch.tensor([1]), torch.tensor([[2, 2]]))
    assert found[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert int(found.max()) + 1 - 12 == -2


def test_text_alone_counts_on_under_either_padding() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    found = mrope_positions(valid, torch.zeros(3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))
    assert found.shape == (3, 3, 5)
    for direction in found:
        assert direction.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]


def _by_hand(tokens: int, start: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """One token after the other."""
    found = [(place, place, place) for place in range(start if rows else tokens)]
    found += [(start, start + row, start + column) for row in range(rows) for column in range(columns)]
    following = count(start + max(rows, columns))
    while len(found) < tokens:
        found.append((next(following),) * 3)  # type: ignore[arg-type]
    return found


def _random_rows(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    valid = torch.zeros(6, 40, dtype=torch.bool)
    starts, grids = [], []
    for row in range(6):
        rows, columns = (draw(1, 5), draw(1, 5)) if row % 3 else (0, 0)
        before, behind = draw(1, 8), draw(1, 8)
        length = before + rows * columns + behind
        first = draw(0, 40 - length + 1)
        valid[row, first : first + length] = True
        starts.append(before if rows else 0)
        grids.append([rows, columns])
    return valid, torch.tensor(starts), torch.tensor(grids)


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-qwen2_5-vl"])
def test_positions_are_those_of_the_model_and_of_a_plain_loop(name: str) -> None:
    model: Any = load_backbone(name)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        valid, starts, grids = _random_rows(generator)
        found = mrope_positions(valid, starts, grids)
        index = valid.long().cumsum(1) - 1
        image = valid & (index >= starts[:, None]) & (index < starts[:, None] + grids.prod(1, keepdim=True))
        shown = torch.cat([torch.ones(6, 1, dtype=torch.long), 2 * grids], dim=1)[grids.prod(1) > 0]
        theirs, _ = model.get_rope_index(image.long(), image.int(), shown, attention_mask=valid.long())
        assert torch.equal(found, theirs)
        for row in range(6):
            expected = _by_hand(int(valid[row].sum()), int(starts[row]), *grids[row].tolist())
            assert list(zip(*found[:, row, valid[row]].tolist(), strict=True)) == expected
