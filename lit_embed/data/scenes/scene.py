"""What a scene holds: a few things of a shape, a colour and a size, each in a cell of a grid."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

# The order of the names is part of a scene's definition: an attribute's value is known by its place here.
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "moon")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black")
SIZES = ("small", "large")
CELLS = {  # names of the cells of a square grid in reading order, by its number of rows
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
}

Kind = tuple[int, int]  # (shape, colour)


class Thing(NamedTuple):
    """A thing in a scene; all are places in the tables above, ``cell`` counts in reading order."""

    shape: int
    colour: int
    size: int
    cell: int

    @property
    def kind(self) -> Kind:
        """Shape and colour: what the split into in-domain and held-out goes by."""
        return self.shape, self.colour

    @property
    def look(self) -> str:
        """Name of everything about it but its cell."""
        return f"{SHAPES[self.shape]}-{COLOURS[self.colour]}-{SIZES[self.size]}"


@dataclass(frozen=True)
class Scene:
    """Things in a grid.

    Args:
        things: In the order of their cells.
        grid: Rows and columns of the grid: 2 or 3, or 1 for a cell by itself.

    Raises:
        ValueError: No things, a cell outside the grid, or cells that are taken twice or out of order.
    """

    things: tuple[Thing, ...]
    grid: int = 2

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.things]
        if not cells or cells != sorted(set(cells)) or not 0 <= cells[0] <= cells[-1] < self.grid**2:
            raise ValueError(f"things need cells of their own, in order, in a grid of {self.grid}, got {cells}")

    @property
    def key(self) -> str:
        """Equal for equal scenes only."""
        things = ",".join(f"{thing.look}@{thing.cell}" for thing in self.things)
        return f"scene/{self.grid}/{things}"

    @property
    def dominant(self) -> Thing:
        """The largest thing; of several, the first in reading order."""
        return max(self.things, key=lambda thing: (thing.size, -thing.cell))


def make_scene(things: Collection[Thing], grid: int) -> Scene:
    """Put things, given in any order, into a scene."""
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), grid)


def scene_attributes(scene: Scene) -> dict[str, int]:
    """What a linear probe may ask of a scene, each a class counted from 0 (see ``attribute_classes``).

    Returns:
        ``shape``, ``colour``, ``size`` and ``position`` (cell) of the dominant thing, and ``count``, the number of
        things less one.
    """
    thing = scene.dominant
    return {
        "shape": thing.shape,
        "colour": thing.colour,
        "size": thing.size,
        "position": thing.cell,
        "count": len(scene.things) - 1,
    }


def attribute_classes(shapes: int, colours: int, grid: int, most_things: int) -> dict[str, int]:
    """Number of classes of each attribute of ``scene_attributes``."""
    return {"shape": shapes, "colour": colours, "size": len(SIZES), "position": grid**2, "count": most_things}


def neighbours(scene: Scene, kinds: Collection[Kind]) -> list[Scene]:
    """Every scene that differs in one respect: a thing's shape, colour or cell, two cells swapped, or which is large.

    A scene has at most one large thing, and so have these; all things are of the given kinds.

    Returns:
        Distinct scenes in a fixed order, the scene itself not among them.
    """
    others: dict[Scene, None] = {}
    allowed = sorted(kinds)
    for number, thing in enumerate(scene.things):
        rest = [*scene.things[:number], *scene.things[number + 1 :]]
        for shape, colour in allowed:
            if (shape == thing.shape) != (colour == thing.colour):
                others[make_scene([*rest, thing._replace(shape=shape, colour=colour)], scene.grid)] = None
        for cell in range(scene.grid**2):
            if all(cell != other.cell for other in scene.things):
                others[make_scene([*rest, thing._replace(cell=cell)], scene.grid)] = None
        resized = [other._replace(size=0) for other in rest]
        others[make_scene([*resized, thing._replace(size=1 - thing.size)], scene.grid)] = None
    for first, second in combinations(scene.things, 2):
        rest = [thing for thing in scene.things if thing not in (first, second)]
        swapped = [first._replace(cell=second.cell), second._replace(cell=first.cell)]
        others[make_scene([*rest, *swapped], scene.grid)] = None
    others.pop(scene, None)
    return list(others)
