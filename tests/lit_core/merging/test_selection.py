import pytest
import torch

from lit_core.merging.selection import Selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_selection_is_the_head_of_a_stable_sort(dtype: torch.dtype, step: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 300, generator=generator, dtype=dtype).abs()  # more rows than are counted at once
    rows[1] = (rows[1] * 4).round() / 4  # many are equal
    rows[2] = (rows[2] * 2).bfloat16()
    rows[3] = 0.0
    rows[4] *= 1e-42  # denormal in float32
    rows[5, 10:20] = torch.finfo(dtype).max
    rows[6] = 1 + rows[6] * torch.finfo(dtype).eps  # the last bits decide
    counts = [1, 150, 77, 5, 200, 12, 60, 300, 299, 2, 10]
    selection = Selection(lambda which: rows[which].split(step, dim=1), counts, 300, dtype)
    mark = selection.marker()
    found = torch.cat([mark(chunk) for chunk in rows.split(step, dim=1)], dim=1)
    order = rows.sort(dim=1, descending=True, stable=True).indices
    for row, count in enumerate(counts):
        expected = torch.zeros(300, dtype=torch.bool)
        expected[order[row, :count]] = True
        assert torch.equal(found[row], expected), row
    assert torch.equal(
        selection.thresholds[:, 0], rows.sort(1, descending=True).values[range(11), [c - 1 for c in counts]]
    )
