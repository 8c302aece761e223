"""Pictures of scenes and of single things, drawn when they are needed."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lit_embed.data.scenes.scene import COLOURS, SHAPES, Scene, Thing

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

BACKGROUND = (236, 236, 236)
RGB = {
    "red": (214, 36, 36),
    "green": (44, 150, 52),
    "blue": (40, 76, 214),
    "yellow": (242, 206, 22),
    "purple": (138, 44, 168),
    "orange": (246, 132, 20),
    "cyan": (32, 196, 206),
    "black": (24, 24, 24),
}
RADII = (0.22, 0.42)  # of a small and a large thing, in sides of its cell
SUPERSAMPLING = 4  # pictures are drawn this many times as large and averaged down, which smooths the edges
KEPT_PICTURES = 1 << 13  # drawn ones in memory; 10 kB each at 56 pixels


@dataclass(frozen=True)
class SceneImage:
    """The picture of a scene.

    Args:
        scene: What it shows.
        pixels: Its width and height.
    """

    scene: Scene
    pixels: int = 56

    @property
    def key(self) -> str:
        return f"{self.scene.key}/{self.pixels}"

    def load(self) -> "Image":
        return _draw_scene(self.scene, self.pixels).copy()


@dataclass(frozen=True)
class ThingImage:
    """A thing's cell, cut out of any scene that has it and enlarged; where the cell was cannot be seen.

    Args:
        thing: What it shows.
        pixels: Width and height of the enlarged cell.
    """

    thing: Thing
    pixels: int = 56

    @property
    def key(self) -> str:
        return f"thing/{self.thing.look}/{self.pixels}"

    def load(self) -> "Image":
        return _draw_scene(Scene((self.thing._replace(cell=0),), grid=1), self.pixels).copy()


@lru_cache(maxsize=KEPT_PICTURES)
def _draw_scene(scene: Scene, pixels: int) -> "Image":
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (pixels * SUPERSAMPLING,) * 2, BACKGROUND)
    pen = ImageDraw.Draw(picture)
    side = pixels * SUPERSAMPLING / scene.grid
    for thing in scene.things:
        row, column = divmod(thing.cell, scene.grid)
        _draw_thing(pen, thing, (column + 0.5) * side, (row + 0.5) * side, RADII[thing.size] * side)
    return picture.reduce(SUPERSAMPLING)


def _draw_thing(pen: "ImageDraw", thing: Thing, x: float, y: float, radius: float) -> None:
    """Draw a thing about ``(x, y)`` that reaches ``radius`` to the left and right, above and below."""
    colour = RGB[COLOURS[thing.colour]]

    def disc(centre: float, size: float, fill: tuple[int, int, int]) -> None:
        pen.ellipse((x + (centre - size) * radius, y - size * radius, x + (centre + size) * radius, y + size * radius),
                    fill)  # fmt: skip

    match SHAPES[thing.shape]:
        case "circle":
            disc(0, 1, colour)
        case "ring":
            disc(0, 1, colour)
            disc(0, 0.55, BACKGROUND)
        case "moon":
            disc(0, 1, colour)
            disc(0.55, 0.8, BACKGROUND)
        case name:
            pen.polygon([(x + u * radius, y + v * radius) for u, v in POLYGONS[name]], colour)


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    angles = [math.pi * (i / points - 0.5) for i in range(2 * points)]
    lengths = [1.0 if i % 2 == 0 else inner for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(lengths, angles, strict=True)]


_ARM = 0.34  # half the width of a cross's arms
POLYGONS: dict[str, list[tuple[float, float]]] = {  # corners in radii from the centre, y downwards
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "star": _star(),
}  # fmt: skip
