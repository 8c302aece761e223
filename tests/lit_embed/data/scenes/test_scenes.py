import dataclasses
import hashlib
from collections import Counter

import pytest

from lit_core.errors import InputError
from lit_embed.data.scenes import (
    Scene,
    SceneCollection,
    SceneConfig,
    Thing,
    attribute_classes,
    build_scenes,
    scene_attributes,
)
from lit_embed.data.scenes.collection import split_kinds
from lit_embed.data.scenes.scene import make_scene, neighbours

SMALL = SceneConfig(train_scenes=500, eval_scenes=50)


@pytest.fixture(scope="module")
def small() -> SceneCollection:
    return build_scenes(SMALL)


def digest(scenes: SceneCollection) -> str:
    parts = [scenes.train, *scenes.evaluation.values()]
    return hashlib.sha256("\n".join(scene.key for part in parts for scene in part).encode()).hexdigest()[:16]


def test_equal_configurations_give_equal_scenes(small: SceneCollection) -> None:
    assert digest(small) == "39d1bd67f1285e48"
    assert build_scenes(dataclasses.replace(SMALL)) is small
    assert digest(build_scenes(dataclasses.replace(SMALL, seed=1))) != digest(small)


def test_training_and_evaluations_share_no_scene(small: SceneCollection) -> None:
    parts = [small.train, *small.evaluation.values()]
    assert [len(part) for part in parts] == [500, 50, 50, 50, 50]
    assert len({scene.key for part in parts for scene in part}) == 700
    more = build_scenes(dataclasses.replace(SMALL, train_scenes=600))
    assert more.evaluation == small.evaluation  # its size leaves the evaluation as it is
    assert more.train[:500] == small.train


def test_every_pair_is_in_domain_or_held_out(small: SceneCollection) -> None:
    ind, ood = set(small.kinds["ind"]), set(small.kinds["ood"])
    assert (len(ind), len(ood), len(ind | ood)) == (48, 16, 64)
    for attribute in (0, 1):
        assert set(Counter(kind[attribute] for kind in ood).values()) == {2}  # each shape and colour alike
    for (_, domain), scenes in [*small.evaluation.items(), (("train", "ind"), small.train)]:
        assert {thing.kind for scene in scenes for thing in scene.things} <= set(small.kinds[domain])
    assert {thing.kind for scene in small.train for thing in scene.things} == ind
    assert split_kinds(dataclasses.replace(SMALL, seed=3)) != small.kinds


@pytest.mark.parametrize(("shapes", "colours", "held_out"), [(3, 8, 0.2), (8, 3, 0.2), (5, 6, 0.5), (2, 2, 0.1)])
def test_training_has_every_shape_and_colour(shapes: int, colours: int, held_out: float) -> None:
    for seed in range(10):
        kinds = split_kinds(SceneConfig(seed=seed, shapes=shapes, colours=colours, held_out=held_out))
        assert {shape for shape, _ in kinds["ind"]} == set(range(shapes))
        assert {colour for _, colour in kinds["ind"]} == set(range(colours))
        assert {shape for shape, _ in kinds["ood"]} <= set(range(shapes))
        assert len(kinds["ind"]) + len(kinds["ood"]) == shapes * colours
        assert kinds["ood"]


def test_scenes_have_all_they_may(small: SceneCollection) -> None:
    assert Counter(len(scene.things) for scene in small.train).keys() == {2, 3}
    large = Counter(sum(thing.size for thing in scene.things) for scene in small.train)
    assert large.keys() == {0, 1}
    assert 0.65 < large[1] / 500 < 0.85
    wide = build_scenes(SceneConfig(grid=3, least_things=1, most_things=5, train_scenes=300, eval_scenes=4))
    assert {len(scene.things) for scene in wide.train} == {1, 2, 3, 4, 5}
    assert {thing.cell for scene in wide.train for thing in scene.things} == set(range(9))


def differences(one: Scene, other: Scene) -> int:
    """In how many things two scenes of one grid differ."""
    return len(set(one.things) ^ set(other.things))


def test_families_differ_in_one_respect(small: SceneCollection) -> None:
    for scenes in small.evaluation.values():
        for start in range(0, len(scenes), 4):
            first, *others = scenes[start : start + 4]
            for other in others:
                assert len(other.things) == len(first.things)
                assert 1 <= differences(first, other) <= 4  # a thing there and here, or two


def test_neighbours_against_the_definition() -> None:
    scene = Scene((Thing(0, 0, 1, 0), Thing(1, 1, 0, 3)))
    kinds = [(shape, colour) for shape in range(3) for colour in range(3)]
    found = neighbours(scene, kinds)
    assert len(found) == len(set(found)) == 15
    circle, square = scene.things
    expected = {make_scene([circle._replace(shape=s), square], 2) for s in (1, 2)}
    expected |= {make_scene([circle._replace(colour=c), square], 2) for c in (1, 2)}
    expected |= {make_scene([circle, square._replace(shape=s)], 2) for s in (0, 2)}
    expected |= {make_scene([circle, square._replace(colour=c)], 2) for c in (0, 2)}
    expected |= {make_scene([circle._replace(cell=c), square], 2) for c in (1, 2)}
    expected |= {make_scene([circle, square._replace(cell=c)], 2) for c in (1, 2)}
    expected.add(make_scene([circle._replace(size=0), square], 2))  # none is large
    expected.add(make_scene([circle._replace(size=0), square._replace(size=1)], 2))  # the other one is
    expected.add(make_scene([circle._replace(cell=3), square._replace(cell=0)], 2))
    assert set(found) == expected
    assert all(
        thing.kind in [(0, 0), (1, 1)] for other in neighbours(scene, [(0, 0), (1, 1)]) for thing in other.things
    )


def test_attributes(small: SceneCollection) -> None:
    assert scene_attributes(Scene((Thing(5, 2, 0, 1), Thing(3, 4, 1, 2)))) == {
        "shape": 3, "colour": 4, "size": 1, "position": 2, "count": 1,
    }  # fmt: skip
    assert scene_attributes(Scene((Thing(5, 2, 0, 1), Thing(3, 4, 0, 2), Thing(0, 0, 0, 3))))["position"] == 1
    classes = attribute_classes(8, 8, 2, 3)
    assert classes == {"shape": 8, "colour": 8, "size": 2, "position": 4, "count": 3}
    values = [scene_attributes(scene) for scene in small.train]
    for name, count in classes.items():
        seen = {value[name] for value in values}
        assert seen == set(range(count)) - ({0} if name == "count" else set())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": 4}, "field 'scenes.grid': must be between 2 and 3, got 4"),
        ({"most_things": 1}, "field 'scenes.most_things': must be between 2 and 4"),
        ({"shapes": 9}, "field 'scenes.shapes'"),
        ({"candidates": 1}, "field 'scenes.candidates'"),
        ({"held_out": 0.0}, "field 'scenes.held_out'"),
        ({"shapes": 2, "held_out": 0.5}, "holds out 4 pairs"),
        (
            {"shapes": 2, "colours": 2, "most_things": 2, "eval_scenes": 8, "train_scenes": 5000},
            "field 'scenes.train_scenes': only ",
        ),
        ({"shapes": 2, "colours": 2, "most_things": 2, "family": 1, "eval_scenes": 500}, "field 'scenes.eval_scenes'"),
        ({"shapes": 2, "colours": 2, "family": 20, "eval_scenes": 20}, "scenes are like another one"),
    ],
)
def test_mistakes(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError) as error:
        build_scenes(SceneConfig(**options))  # type: ignore[arg-type]
    assert words in str(error.value)


def test_things_need_cells_of_their_own() -> None:
    for cells in ((0, 0), (1, 0), (0, 4), ()):
        with pytest.raises(ValueError, match="cells of their own"):
            Scene(tuple(Thing(0, 0, 0, cell) for cell in cells))
