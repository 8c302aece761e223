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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the second is not that of the selection
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_trimming_is_the_head_of_a_stable_sort_by_size(dtype: torch.dtype, step: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 200, generator=generator).to(dtype)
    rows[1] = (rows[1] * 4).round() / 4  # many are equal
    rows[2] = rows[2].sign()  # all are
    rows[3] = 0.0
    rows[4] *= 1e-42  # denormal in float32
    rows[5, 5:] = 0.0
    rows[6] = rows[6].float().bfloat16()
    rows[7, ::2] = -rows[7, 1::2]
    rows[8] = rows[8].float() * 2**-140
    counts = [1, 90, 77, 5, 120, 50, 60, 99, 199]
    sizes = rows.float().abs()
    selection = Selection(lambda which: sizes[which].split(step, dim=1), counts, 200, torch.float32)
    trim = selection.trimmer()
    found = torch.cat([trim(chunk.clone()) for chunk in rows.split(step, dim=1)], dim=1)
    order = sizes.sort(dim=1, descending=True, stable=True).indices
    for row, count in enumerate(counts):
        expected = torch.zeros_like(rows[row])
        expected[order[row, :count]] = rows[row, order[row, :count]]
        assert torch.equal(found[row], expected), row
