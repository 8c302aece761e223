"""Ragged batches of rows that hold text, an image, or both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_core.images import Grid, Patches
from lit_core.tokens import Tokens
from lit_embed.functional.positions import mrope_positions


@dataclass
class Row:
    """One sequence.

    Args:
        ids: Token ids, the image's placeholders among them.
        end: Place of the bridge token, whose state becomes the vector.
        image: The image, if any.
        image_start: Place of its first placeholder.
        cut: Whether text was left out to keep within the limit.
    """

    ids: list[int]
    end: int
    image: Patches | None = None
    image_start: int = 0
    cut: bool = False


@dataclass
class PaddedRows:
    """Rows of one forward pass.

    Args:
        ids: Long ``(B, L)``.
        mask: Long ``(B, L)``, 1 = token, 0 = padding.
        positions: Long ``(3, B, L)``, multimodal rotary positions.
        ends: Long ``(B,)``, place of each row's bridge token.
        pixels: Float ``(patches, 3 * frames * patch * patch)`` of the rows' images, one after the other; None without
            any. The ``merge * merge`` patches of one placeholder stand together, in the order of the placeholders.
        grids: Long ``(images, 3)``, frames, rows and columns in patches; None without any.
        left: Whether padding stands on the left.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    ends: Tensor
    pixels: Tensor | None
    grids: Tensor | None
    left: bool = False


@dataclass
class MultimodalTokens:
    """Rows one after the other; what plans chunks stays on the host.

    Args:
        ids: Long ``(sum of lengths,)``.
        lengths: Tokens of each row, an image's included.
        ends: Place of the bridge token in each row.
        images: Number of each row's image, -1 for none. Rows may share one.
        image_starts: Place of the image's first placeholder in each row.
        grids: Frames, rows and columns of each image in patches.
        pixels: Patches of all images, one image after the other; None without any.
        merge: Patches on each side of what one placeholder stands for.
    """

    ids: Tensor
    lengths: list[int]
    ends: list[int]
    images: list[int]
    image_starts: list[int]
    grids: list[Grid]
    pixels: Tensor | None
    merge: int

    @classmethod
    def from_rows(cls, rows: Sequence[Row], merge: int) -> "MultimodalTokens":
        """Pack rows; an image that several share is held once."""
        distinct = {id(row.image): row.image for row in rows if row.image is not None}
        number = {key: place for place, key in enumerate(distinct)}
        return cls(
            ids=torch.tensor([token for row in rows for token in row.ids], dtype=torch.long),
            lengths=[len(row.ids) for row in rows],
            ends=[row.end for row in rows],
            images=[number.get(id(row.image), -1) for row in rows],
            image_starts=[row.image_start for row in rows],
            grids=[image.grid for image in distinct.values()],
            pixels=torch.cat([image.pixels for image in distinct.values()]) if distinct else None,
            merge=merge,
        )

    @classmethod
    def concatenate(cls, parts: Sequence["MultimodalTokens"]) -> "MultimodalTokens":
        """The rows of all parts in order."""
        images, seen = list[int](), 0
        for part in parts:
            images += [number if number < 0 else number + seen for number in part.images]
            seen += len(part.grids)
        pixels = [part.pixels for part in parts if part.pixels is not None]
        return cls(
            ids=torch.cat([part.ids for part in parts]),
            lengths=[length for part in parts for length in part.lengths],
            ends=[end for part in parts for end in part.ends],
            images=images,
            image_starts=[start for part in parts for start in part.image_starts],
            grids=[grid for part in parts for grid in part.grids],
            pixels=torch.cat(pixels) if pixels else None,
            merge=parts[0].merge,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MultimodalTokens":
        """Move ids and pixels; lightning calls this for its batch transfer."""
        pixels = None if self.pixels is None else self.pixels.to(device, non_blocking=non_blocking)
        return self._with(self.ids.to(device, non_blocking=non_blocking), pixels)

    def pin_memory(self) -> "MultimodalTokens":
        """Copy ids and pixels into page-locked memory; the data loader calls this."""
        return self._with(self.ids.pin_memory(), None if self.pixels is None else self.pixels.pin_memory())

    def select(self, rows: Sequence[int]) -> "MultimodalTokens":
        """Some of the rows, with their images alone."""
        parts = self.ids.split(self.lengths)
        used = list(dict.fromkeys(self.images[row] for row in rows if self.images[row] >= 0))
        return MultimodalTokens(
            ids=torch.cat([parts[row] for row in rows]),
            lengths=[self.lengths[row] for row in rows],
            ends=[self.ends[row] for row in rows],
            images=[used.index(self.images[row]) if self.images[row] >= 0 else -1 for row in rows],
            image_starts=[self.image_starts[row] for row in rows],
            grids=[self.grids[number] for number in used],
            pixels=self._patches(used),
            merge=self.merge,
        )

    def pad(self, rows: Sequence[int], pad_id: int, left: bool = False) -> PaddedRows:
        """Chosen rows as a padded batch.

        Args:
            rows: Numbers of the rows.
            pad_id: Fills the rest.
            left: Put the padding on the left.
        """
        device = self.ids.device
        ids, mask = Tokens(self.ids, self.lengths).pad(rows, pad_id)
        ends = torch.tensor([self.ends[row] for row in rows], device=device)
        if left:
            shift = ids.shape[1] - mask.sum(1)
            place = (torch.arange(ids.shape[1], device=device) - shift[:, None]) % ids.shape[1]
            ids, mask, ends = ids.gather(1, place), mask.gather(1, place), ends + shift
        numbers = [self.images[row] for row in rows]
        shown = [number for number in numbers if number >= 0]
        sides = [self.grids[number][1:] if number >= 0 else (0, 0) for number in numbers]
        starts = torch.tensor([self.image_starts[row] for row in rows], device=device)
        positions = mrope_positions(mask.bool(), starts, torch.tensor(sides, device=device) // self.merge)
        grids = torch.tensor([self.grids[number] for number in shown], device=device) if shown else None
        return PaddedRows(ids, mask, positions, ends, self._patches(shown), grids, left)

    def _patches(self, numbers: list[int]) -> Tensor | None:
        """Patches of some images in order."""
        if self.pixels is None or not numbers:
            return None
        parts = self.pixels.split([frames * rows * columns for frames, rows, columns in self.grids])
        return torch.cat([parts[number] for number in numbers]) if numbers != list(range(len(parts))) else self.pixels

    def _with(self, ids: Tensor, pixels: Tensor | None) -> "MultimodalTokens":
        hosts = (self.lengths, self.ends, self.images, self.image_starts, self.grids)
        return MultimodalTokens(ids, *hosts, pixels, self.merge)
