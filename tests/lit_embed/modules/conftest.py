import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lit_embed.items import MARKER, Item

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_vision

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Noise:
    """An image of random colours."""

    height: int
    width: int
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.height} x {self.width}, {self.seed}"

    def load(self) -> "Image":
        from PIL import Image

        values = np.random.default_rng(self.seed).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(values)


@pytest.fixture(scope="session")
def noise() -> Callable[..., Noise]:
    return Noise


@pytest.fixture(scope="session")
def mixed_items() -> list[Item]:
    """Texts, images and both, of many lengths; one image stands in two."""
    return [
        Item("the 42"),
        Item(f"a vessel {MARKER} that carries nine others over the river", Noise(70, 100, 1)),
        Item("", Noise(60, 60, 2)),
        Item("what is shown?", Noise(70, 100, 1)),
        Item("a vessel of the kind that carries nine others over the river at night"),
        Item(f"{MARKER} and", Noise(150, 90, 3)),
        Item("so it is said"),
        Item(f"so it is said {MARKER}", Noise(60, 60, 4)),
    ]
