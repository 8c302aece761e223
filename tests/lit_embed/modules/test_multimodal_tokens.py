import torch

from lit_core.images import Patches
from lit_embed.modules.multimodal_tokens import MultimodalTokens, PaddedRows, Row

IMAGE = 9


def _image(rows: int, columns: int, start: float) -> Patches:
    values = start + torch.arange(4.0 * rows * columns)
    return Patches(values[:, None].expand(-1, 6).clone(), (1, 2 * rows, 2 * columns))


def _row(before: int, image: Patches | None, behind: int) -> Row:
    """Ids count up from 100; the row ends with the bridge token 7."""
    placed = [IMAGE] * (len(image.pixels) // 4) if image is not None else []
    ids = [*range(100, 100 + before), *placed, *range(200, 200 + behind), 7]
    return Row(ids, len(ids) - 1, image, before if placed else 0)


A, B = _image(1, 2, 0), _image(3, 2, 100)
ROWS = [_row(2, None, 0), _row(1, A, 2), _row(3, B, 0), _row(0, A, 1), _row(5, None, 3)]


def _expected(rows: list[Row], left: bool) -> PaddedRows:
    """Row by row."""
    width = max(len(row.ids) for row in rows)
    ids, mask, ends = [], [], []
    for row in rows:
        fill = [0] * (width - len(row.ids))
        ids.append(fill + row.ids if left else row.ids + fill)
        mask.append([0] * len(fill) + [1] * len(row.ids) if left else [1] * len(row.ids) + [0] * len(fill))
        ends.append(row.end + (len(fill) if left else 0))
    shown = [row.image for row in rows if row.image is not None]
    pixels = torch.cat([image.pixels for image in shown]) if shown else None
    grids = torch.tensor([image.grid for image in shown]) if shown else None
    none = torch.empty(0)
    return PaddedRows(torch.tensor(ids), torch.tensor(mask), none, torch.tensor(ends), pixels, grids, left)


def _check(tokens: MultimodalTokens, numbers: list[int], rows: list[Row]) -> None:
    for left in (False, True):
        found, expected = tokens.pad(numbers, 0, left), _expected(rows, left)
        for name in ("ids", "mask", "ends", "pixels", "grids", "left"):
            value, wanted = getattr(found, name), getattr(expected, name)
            assert torch.equal(value, wanted) if isinstance(wanted, torch.Tensor) else value is wanted, (name, left)
        assert found.positions.shape == (3, *found.ids.shape)
        same = (found.positions[0] == found.positions[1]) & (found.positions[0] == found.positions[2])
        assert not bool((~same & (found.ids != IMAGE)).any())  # only images leave the line


def test_rows_are_padded_with_their_images_on_either_side() -> None:
    tokens = MultimodalTokens.from_rows(ROWS, 2)
    assert (len(tokens), tokens.lengths) == (5, [3, 6, 10, 4, 9])
    assert (tokens.images, tokens.grids) == ([-1, 0, 1, 0, -1], [(1, 2, 4), (1, 6, 4)])
    assert tokens.pixels is not None
    assert tokens.pixels.shape == (8 + 24, 6)  # the image that two rows share is there once
    for numbers in ([0, 1, 2, 3, 4], [3, 1], [4, 0], [2], [1, 2], [2, 1]):
        _check(tokens, numbers, [ROWS[number] for number in numbers])
    torch.testing.assert_close(tokens.pad([2], 0).positions[:, 0, 3:].T, torch.tensor(
        [[3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4], [3, 5, 3], [3, 5, 4], [6, 6, 6]]
    ))  # fmt: skip


def test_a_batch_without_images_has_no_pixels() -> None:
    tokens = MultimodalTokens.from_rows([ROWS[0], ROWS[4]], 2)
    padded = tokens.pad([0, 1], 0)
    assert (tokens.pixels, tokens.grids, padded.pixels, padded.grids) == (None, [], None, None)
    assert len(MultimodalTokens.from_rows([], 2)) == 0


def test_parts_join_and_rows_are_taken_out() -> None:
    whole = MultimodalTokens.concatenate(
        [MultimodalTokens.from_rows(ROWS[start:stop], 2) for start, stop in ((0, 1), (1, 3), (3, 5))]
    )
    assert whole.images == [-1, 0, 1, 2, -1]  # parts do not know that they share an image
    for numbers in ([0, 1, 2, 3, 4], [3, 1], [4]):
        chosen = [ROWS[number] for number in numbers]
        _check(whole, numbers, chosen)
        few = whole.select(numbers)
        assert len(few.grids) == sum(row.image is not None for row in chosen)
        _check(few, list(range(len(numbers))), chosen)


def test_moving_keeps_everything() -> None:
    tokens = MultimodalTokens.from_rows(ROWS, 2)
    moved = tokens.to("meta")
    assert (moved.ids.device.type, moved.pixels is not None and moved.pixels.device.type) == ("meta", "meta")
    assert moved.lengths == tokens.lengths
    for left in (False, True):  # nothing is left on the host
        padded = moved.select([1, 2, 4]).pad([0, 1, 2], 0, left)
        tensors = [value for value in vars(padded).values() if isinstance(value, torch.Tensor)]
        assert [tensor.device.type for tensor in tensors] == ["meta"] * 6
    _check(tokens.to("cpu"), [1, 2], ROWS[1:3])
    assert MultimodalTokens.from_rows(ROWS[:1], 2).to("cpu").pixels is None


def test_tokens_behind_the_bridge_keep_its_place() -> None:
    """As a reconstruction stage writes them: content, bridge, text."""
    row = _row(1, A, 1)
    longer = Row([*row.ids, 50, 51], row.end, row.image, row.image_start)
    padded = MultimodalTokens.from_rows([longer, ROWS[4]], 2).pad([0, 1], 0)
    assert padded.ids[0, padded.ends[0]] == 7
    assert padded.positions[0, 0].tolist() == [0, 1, 1, 3, 4, 5, 6, 0, 0]
