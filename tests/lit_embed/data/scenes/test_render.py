from itertools import combinations, product

import numpy as np
import pytest

from lit_embed.data.scenes.collection import SceneConfig, build_scenes
from lit_embed.data.scenes.render import SceneImage, ThingImage
from lit_embed.data.scenes.scene import COLOURS, SHAPES, Scene, Thing, make_scene

GREY = 236
SEEN = {  # roughly, and not as they are drawn
    "red": (220, 30, 30), "green": (50, 150, 50), "blue": (40, 70, 220), "yellow": (240, 210, 30),
    "purple": (140, 40, 170), "orange": (250, 130, 20), "cyan": (30, 190, 200), "black": (20, 20, 20),
}  # fmt: skip


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a shape of radius 1 is, as formulas; y points downwards."""
    length = np.hypot(x, y)
    match shape:
        case "circle":
            return length <= 1
        case "ring":
            return (length <= 1) & (length >= 0.55)
        case "moon":
            return (length <= 1) & (np.hypot(x - 0.55, y) >= 0.8)
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.9
        case "diamond":
            return abs(x) + abs(y) <= 1
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1)
        case "triangle":
            return (y <= 0.9) & (abs(x) <= (y + 1) / 1.9)
        case _:  # a star: between a tip and the notch beside it the edge is straight
            angle = abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            notch = 0.42 * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
            u, v = length * np.sin(angle), length * np.cos(angle)
            return u * (1 - notch[1]) + (v - 1) * notch[0] <= 0


def read(pixels: np.ndarray, grid: int) -> list[tuple[str, str, str, int]]:
    """Shape, colour, size and cell of everything in a picture, by rules of thumb."""
    found = []
    side = len(pixels) / grid
    for cell in range(grid**2):
        row, column = divmod(cell, grid)
        top, left = round(row * side), round(column * side)
        part = pixels[top : round((row + 1) * side), left : round((column + 1) * side)].astype(float)
        contrast = abs(part - GREY).max(2)
        if contrast.max() < 60:
            continue
        mask = contrast > contrast.max() / 2  # pixels on an edge are covered in part
        mean = part[mask].mean(0)
        colour = min(SEEN, key=lambda name: float(np.linalg.norm(mean - SEEN[name])))
        rows = np.where(mask.any(1))[0]
        height = (rows[-1] - rows[0] + 1) / side
        size = "large" if height > 0.6 else "small"
        radius = (0.42 if size == "large" else 0.22) * side
        y, x = np.mgrid[: part.shape[0], : part.shape[1]] + 0.5
        x, y = (x + left - (column + 0.5) * side) / radius, (y + top - (row + 0.5) * side) / radius

        def overlap(shape: str, mask: np.ndarray = mask, x: np.ndarray = x, y: np.ndarray = y) -> float:
            drawn = inside(shape, x, y)
            return float((drawn & mask).sum() / (drawn | mask).sum())

        found.append((max(SHAPES, key=overlap), colour, size, cell))
    return found


def names(thing: Thing) -> tuple[str, str, str, int]:
    return SHAPES[thing.shape], COLOURS[thing.colour], ("small", "large")[thing.size], thing.cell


@pytest.mark.parametrize(("grid", "pixels"), [(2, 56), (2, 112), (3, 112), (3, 84)])
def test_everything_can_be_read_from_the_pixels(grid: int, pixels: int) -> None:
    for shape, colour, size in product(range(8), range(8), range(2)):
        things = [Thing(shape, colour, size, (shape + colour) % grid**2)]
        things.append(Thing((shape + 3) % 8, (colour + 5) % 8, 0, (things[0].cell + 1 + size) % grid**2))
        scene = make_scene(things, grid)
        assert read(np.asarray(SceneImage(scene, pixels).load()), grid) == [names(thing) for thing in scene.things]


def test_pictures_differ_where_scenes_do() -> None:
    scenes = build_scenes(SceneConfig(train_scenes=300, eval_scenes=40))
    chosen = [*scenes.train, *scenes.evaluation["test", "ind"], *scenes.evaluation["test", "ood"]]
    pictures = {SceneImage(scene).load().tobytes() for scene in chosen}
    assert len(pictures) == len({SceneImage(scene).key for scene in chosen}) == 380


def test_a_changed_attribute_changes_its_cell_alone() -> None:
    base = Scene((Thing(0, 0, 0, 0), Thing(4, 5, 1, 3)))
    first = np.asarray(SceneImage(base).load()).astype(int)
    for change in ({"shape": 1}, {"colour": 2}, {"size": 1}):
        other = Scene((base.things[0]._replace(**change), base.things[1]))
        different = abs(np.asarray(SceneImage(other).load()).astype(int) - first).max(2) > 0
        assert different[:28, :28].any(), change
        assert not different[28:].any()
        assert not different[:, 28:].any()


def test_parts_show_the_thing_and_not_its_place() -> None:
    parts = [ThingImage(Thing(s, c, z, 0)) for s, c, z in product(range(8), range(8), range(2))]
    assert len({part.key for part in parts}) == len({part.load().tobytes() for part in parts}) == 128
    for part in parts:
        assert read(np.asarray(part.load()), 1) == [names(part.thing)]
    moved = ThingImage(Thing(2, 3, 1, 2))
    assert moved.key == ThingImage(Thing(2, 3, 1, 0)).key
    assert moved.load().tobytes() == ThingImage(Thing(2, 3, 1, 0)).load().tobytes()
    whole = SceneImage(Scene((Thing(2, 3, 1, 2),)), 112).load().crop((0, 56, 56, 112))
    assert abs(np.asarray(whole).astype(int) - np.asarray(moved.load())).max() <= 1  # enlarged, not another drawing


def test_pictures_are_the_same_every_time() -> None:
    image = SceneImage(Scene((Thing(7, 4, 1, 1), Thing(5, 2, 0, 2))), 112)
    first = image.load()
    assert (first.size, first.mode) == ((112, 112), "RGB")
    before = first.tobytes()
    first.paste((0, 0, 0), (0, 0, 112, 112))  # whoever draws on it has a copy
    assert image.load().tobytes() == before
    assert len({image.key, SceneImage(image.scene, 56).key, SceneImage(Scene(image.scene.things, 3), 112).key}) == 3


def test_colours_are_far_apart() -> None:
    corners = {
        name: np.asarray(ThingImage(Thing(1, colour, 1, 0)).load())[28, 28] for colour, name in enumerate(COLOURS)
    }
    for (_, a), (_, b) in combinations([*corners.items(), ("background", np.full(3, GREY))], 2):
        assert np.linalg.norm(a.astype(int) - b.astype(int)) > 60
