"""Scenes drawn from a seed: distinct ones for training and for evaluation, in-domain and with held-out kinds."""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lit_core.errors import InputError
from lit_embed.data.scenes.scene import COLOURS, SHAPES, Kind, Scene, Thing, make_scene, neighbours
from lit_embed.multimodal import Domain

EvalStage = Literal["validate", "test"]
DOMAINS: tuple[Domain, ...] = ("ind", "ood")
LARGE_SHARE = 0.75  # of the scenes that have a large thing, which then is the only one
MAX_MISSES = 2000  # draws in a row without a new scene, after which there are no more


@dataclass(frozen=True)
class SceneConfig:
    """Everything the built-in pictures depend on; equal configurations give equal ones.

    Args:
        seed: Seed of all draws.
        pixels: Width and height of a picture.
        grid: Rows and columns of places, 2 or 3.
        shapes: Shapes in use, of 8.
        colours: Colours in use, of 8.
        least_things: Fewest things of a scene.
        most_things: Most things of a scene.
        held_out: Share of the (shape, colour) pairs that only the out-of-domain evaluation has, rounded so that each
            shape lacks equally many colours.
        train_scenes: Scenes of training; each gives a pair to every task.
        eval_scenes: Scenes of each evaluation (validation and test, in and out of domain); each gives every task a
            query.
        captions: Captions of a scene in the stages that reconstruct.
        family: Scenes of evaluation come in families: one, and others that differ from it in one respect. They are
            candidates for each other's queries. 1 makes no families.
        candidates: Candidates of a query, as far as there are so many.

    Raises:
        InputError: A field is out of range.
    """

    seed: int = 0
    pixels: int = 56
    grid: int = 2
    shapes: int = 8
    colours: int = 8
    least_things: int = 2
    most_things: int = 3
    held_out: float = 0.25
    train_scenes: int = 4000
    eval_scenes: int = 200
    captions: int = 2
    family: int = 4
    candidates: int = 64

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "pixels": (28, 1344),
            "grid": (2, 3),
            "shapes": (2, len(SHAPES)),
            "colours": (2, len(COLOURS)),
            "least_things": (1, self.grid**2),
            "most_things": (self.least_things, self.grid**2),
            "train_scenes": (1, 10**6),
            "eval_scenes": (1, 10**5),
            "captions": (1, 100),
            "family": (1, 20),
            "candidates": (2, 1000),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise InputError(f"must be between {low} and {high}, got {value}", field=f"scenes.{name}")
        if not 0 < self.held_out < 1:
            raise InputError(f"must lie between 0 and 1, got {self.held_out}", field="scenes.held_out")


@dataclass(frozen=True)
class SceneCollection:
    """Scenes for training and evaluation.

    Args:
        config: What they were drawn from.
        kinds: The (shape, colour) pairs of each domain; all things of a scene are of one of them.
        train: Scenes of training, in-domain.
        evaluation: Scenes of each evaluation, family by family; none of them is in training or in another one.
    """

    config: SceneConfig
    kinds: dict[Domain, list[Kind]]
    train: list[Scene]
    evaluation: dict[tuple[EvalStage, Domain], list[Scene]]

    def stream(self, name: str) -> random.Random:
        """Draws for one part, so that the size of one part leaves the others as they are."""
        return _stream(self.config, name)


@lru_cache(maxsize=4)
def build_scenes(config: SceneConfig | None = None) -> SceneCollection:
    """Draw the scenes of a configuration; the last few are kept, so treat the result as read-only.

    Scenes of evaluation are drawn first: they do not depend on the size of training.

    Raises:
        InputError: There are not as many different scenes as wanted.
    """
    config = config or SceneConfig()
    kinds = split_kinds(config)
    taken: set[Scene] = set()
    evaluation: dict[tuple[EvalStage, Domain], list[Scene]] = {}
    stages: tuple[EvalStage, ...] = ("test", "validate")
    for stage in stages:
        for domain in DOMAINS:
            rng = _stream(config, f"scenes/{stage}/{domain}")
            evaluation[stage, domain] = _families(rng, config, kinds[domain], taken)
    rng = _stream(config, "scenes/train")
    train = [_new_scene(rng, config, kinds["ind"], taken, "train_scenes") for _ in range(config.train_scenes)]
    return SceneCollection(config, kinds, train, evaluation)


def split_kinds(config: SceneConfig) -> dict[Domain, list[Kind]]:
    """Divide the (shape, colour) pairs among the domains, so that every shape and colour occurs in training.

    Shapes and colours are shuffled and laid round a circle; a pair is held out by the distance between its two, so
    that as many colours are held out of each shape, and nearly as many shapes of each colour.

    Raises:
        InputError: So many are held out that a shape or colour might be missing in training.
    """
    rng = _stream(config, "kinds")
    shapes, colours = list(range(config.shapes)), list(range(config.colours))
    rng.shuffle(shapes)
    rng.shuffle(colours)
    round_trip = max(config.shapes, config.colours)
    count = max(1, round(config.held_out * round_trip))
    if count >= min(config.shapes, config.colours):
        raise InputError(
            f"holds out {count} pairs of a shape or colour, which must be fewer than its "
            f"{min(config.shapes, config.colours)}; lower it",
            field="scenes.held_out",
        )
    kinds: dict[Domain, list[Kind]] = {"ind": [], "ood": []}
    for i, shape in enumerate(shapes):
        for j, colour in enumerate(colours):
            kinds["ood" if (j - i) % round_trip < count else "ind"].append((shape, colour))
    return {domain: sorted(of) for domain, of in kinds.items()}


def _stream(config: SceneConfig, name: str) -> random.Random:
    return random.Random(f"{config.seed}/{name}")


def _families(rng: random.Random, config: SceneConfig, kinds: list[Kind], taken: set[Scene]) -> list[Scene]:
    """Draw the scenes of an evaluation, and take them; every ``config.family`` of them belong together."""
    scenes: list[Scene] = []
    while len(scenes) < config.eval_scenes:
        first = _new_scene(rng, config, kinds, taken, "eval_scenes")
        free = [scene for scene in neighbours(first, kinds) if scene not in taken]
        wanted = min(config.family, config.eval_scenes - len(scenes)) - 1
        if len(free) < wanted:
            raise InputError(f"only {len(free)} scenes are like another one; lower it", field="scenes.family")
        scenes += [first, *rng.sample(free, wanted)]
        taken.update(scenes)
    return scenes


def _new_scene(rng: random.Random, config: SceneConfig, kinds: list[Kind], taken: set[Scene], field: str) -> Scene:
    """Draw a scene that is not taken, and take it."""
    for _ in range(MAX_MISSES):
        scene = _draw(rng, config, kinds)
        if scene not in taken:
            taken.add(scene)
            return scene
    raise InputError(
        f"only {len(taken)} different scenes were found, the other evaluations' included; ask for fewer, or raise "
        "scenes.most_things, scenes.grid, scenes.shapes or scenes.colours",
        field=f"scenes.{field}",
    )


def _draw(rng: random.Random, config: SceneConfig, kinds: list[Kind]) -> Scene:
    count = rng.randint(config.least_things, config.most_things)
    cells = rng.sample(range(config.grid**2), count)
    large = rng.randrange(count) if rng.random() < LARGE_SHARE else None
    drawn = [rng.choice(kinds) for _ in cells]
    things = [
        Thing(*kind, int(number == large), cell) for number, (kind, cell) in enumerate(zip(drawn, cells, strict=True))
    ]
    return make_scene(things, config.grid)
