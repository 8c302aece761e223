"""How scenes are put into words: captions, questions with their answers, class names, phrases for a part."""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lit_embed.data.scenes.scene import CELLS, COLOURS, SHAPES, SIZES, Kind, Scene, Thing
from lit_embed.data.world.wording import article
from lit_embed.items import MARKER

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE_WORDS = (("small", "little"), ("large", "big"))
PLACES = ("at the {place}", "in the {place} part")
THINGS = (  # everything about a thing
    "a {size} {colour} {shape} {at}",
    "a {colour} {shape} that is {size} {at}",
    "{at} a {size} {colour} {shape}",
    "{at} a {shape} that is {colour} and {size}",
)
CAPTIONS = ("{things}.", "there are {number} things: {things}.", "the picture shows {things}.", "one sees {things}.")
LINKS = (" and ", ", then ", "; ")
LOOKS = ("a {size} {colour} {shape}", "a {colour} {shape} that is {size}", "a {shape} that is {colour} and {size}")
QUESTIONS = {
    "colour of a shape": ("what colour is the {shape}?", "which colour does the {shape} have?"),
    "shape of a colour": ("which shape is {colour}?", "what is the shape of the {colour} thing?"),
    "thing at a place": ("what is {at}?", "which thing is {at}?"),
    "colour at a place": ("what colour is the thing {at}?", "which colour is {at}?"),
    "shape at a place": ("what shape is the thing {at}?", "which shape is {at}?"),
    "place of a thing": ("where is the {colour} {shape}?", "in which place is the {colour} {shape}?"),
    "size of a thing": ("is the {colour} {shape} small or large?", "of which size is the {colour} {shape}?"),
    "number of a colour": ("how many {colour} things are there?", "how many things are {colour}?"),
    "number of a shape": ("how many times is a {shape} there?", "how many things are a {shape}?"),
    "number of things": ("how many things are there?", "how many things does the picture show?"),
}
REGIONS: dict[str, Callable[[Thing], object]] = {  # phrases for a part, and what no other thing may share
    "the thing {at}": lambda thing: thing.cell,
    "the {shape}": lambda thing: thing.shape,
    "the {colour} thing": lambda thing: thing.colour,
    "the {size} thing": lambda thing: thing.size,
    "the {colour} {shape}": lambda thing: thing.kind,
    "the {size} {shape}": lambda thing: (thing.size, thing.shape),
    "the {size} {colour} thing": lambda thing: (thing.size, thing.colour),
}
# Where the picture belongs comes first, then what to do; names and answers stand alone.
INSTRUCTIONS = {
    "classification": f"{MARKER}\nName the main thing in the picture.",
    "vqa": f"{MARKER}\nAnswer the question about the picture: {{}}",
    "retrieval_i2t": f"{MARKER}\nFind a caption of the picture.",
    "retrieval_t2i": "Find the picture with this caption: {}",
    "grounding": f"{MARKER}\nFind the part of the picture: {{}}",
    "grounding_text": "Find the picture of this thing: {}",
}
REPRESENT = f"{MARKER}\nRepresent the picture."  # what stands with a picture that is a target, or is probed


class Question(NamedTuple):
    """A question about a scene, its one right answer, and which of ``QUESTIONS`` it is."""

    text: str
    answer: str
    topic: str


def kind_name(kind: Kind) -> str:
    """Colour and shape, such as ``red circle``."""
    return f"{COLOURS[kind[1]]} {SHAPES[kind[0]]}"


def class_name(scene: Scene) -> str:
    """Colour and shape of the dominant thing."""
    return kind_name(scene.dominant.kind)


def answers(shapes: int, colours: int, grid: int) -> dict[str, list[str]]:
    """Every answer that a question may have, by what it names; no two are the same."""
    return {
        "kind": [kind_name((shape, colour)) for shape in range(shapes) for colour in range(colours)],
        "colour": list(COLOURS[:colours]),
        "shape": list(SHAPES[:shapes]),
        "place": list(CELLS[grid]),
        "size": list(SIZES),
        "number": list(NUMBERS),
    }


def _slots(rng: random.Random, thing: Thing, grid: int) -> dict[str, str]:
    """Words for a thing; those with several forms are drawn."""
    return {
        "shape": SHAPES[thing.shape],
        "colour": COLOURS[thing.colour],
        "size": rng.choice(SIZE_WORDS[thing.size]),
        "at": rng.choice(PLACES).format(place=CELLS[grid][thing.cell]) if grid in CELLS else "",
    }


def caption(rng: random.Random, scene: Scene) -> str:
    """Say everything about a scene, its things in random order; different scenes have different captions."""
    things = [rng.choice(THINGS).format(**_slots(rng, thing, scene.grid)) for thing in scene.things]
    rng.shuffle(things)
    text = rng.choice(CAPTIONS).format(things=rng.choice(LINKS).join(things), number=NUMBERS[len(things)])
    return _sentence(text)


def look(rng: random.Random, thing: Thing) -> str:
    """Say everything about a thing but where it is."""
    return _sentence(rng.choice(LOOKS).format(**_slots(rng, thing, 1)) + ".")


def question(rng: random.Random, scene: Scene, shapes: int = len(SHAPES), colours: int = len(COLOURS)) -> Question:
    """Ask something of a scene that has one answer; every topic that it allows is equally likely.

    Args:
        rng: Draws topic, thing and words.
        scene: The scene.
        shapes: Shapes in use; one that the scene lacks may be counted too.
        colours: Colours in use, likewise.
    """
    possible = _questions(rng, scene)
    for topic, names, here in (
        ("number of a shape", SHAPES[:shapes], {SHAPES[thing.shape] for thing in scene.things}),
        ("number of a colour", COLOURS[:colours], {COLOURS[thing.colour] for thing in scene.things}),
    ):
        missing = [name for name in names if name not in here]
        if missing:
            possible[topic].append(({topic.split()[-1]: rng.choice(missing)}, NUMBERS[0]))
    topic = rng.choice(sorted(possible))
    slots, answer = rng.choice(possible[topic])
    return Question(_sentence(rng.choice(QUESTIONS[topic]).format(**slots)), answer, topic)


def _questions(rng: random.Random, scene: Scene) -> dict[str, list[tuple[dict[str, str], str]]]:
    """What can be asked of a scene: by topic, the words of the question and the answer."""
    things = scene.things
    found: dict[str, list[tuple[dict[str, str], str]]] = {"number of things": [({}, NUMBERS[len(things)])]}

    def add(topic: str, slots: dict[str, str], answer: str) -> None:
        found.setdefault(topic, []).append((slots, answer))

    for thing in things:
        slots = _slots(rng, thing, scene.grid)
        for topic, answer in (
            ("thing at a place", kind_name(thing.kind)), ("colour at a place", slots["colour"]),
            ("shape at a place", slots["shape"]),
        ):  # fmt: skip
            add(topic, slots, answer)
        if _alone(things, thing, lambda other: other.shape):
            add("colour of a shape", slots, slots["colour"])
        if _alone(things, thing, lambda other: other.colour):
            add("shape of a colour", slots, slots["shape"])
        if _alone(things, thing, lambda other: other.kind):
            add("place of a thing", slots, CELLS[scene.grid][thing.cell])
            add("size of a thing", slots, SIZES[thing.size])
        add("number of a colour", slots, NUMBERS[sum(other.colour == thing.colour for other in things)])
        add("number of a shape", slots, NUMBERS[sum(other.shape == thing.shape for other in things)])
    return found


def _alone(things: Sequence[Thing], thing: Thing, about: Callable[[Thing], object]) -> bool:
    """Whether no other thing has the same property."""
    return sum(about(other) == about(thing) for other in things) == 1


def region_phrase(rng: random.Random, scene: Scene, thing: Thing) -> str:
    """Describe one thing of a scene so that no other fits."""
    slots = _slots(rng, thing, scene.grid)
    fitting = [phrase for phrase, about in REGIONS.items() if _alone(scene.things, thing, about)]
    return _sentence(rng.choice(fitting).format(**slots) + ".")


def words() -> list[str]:
    """Every word that scenes are told, asked and instructed with, in lower case, sorted."""
    texts = [*NUMBERS, *SHAPES, *COLOURS, *(word for forms in SIZE_WORDS for word in forms), *PLACES, *THINGS, *LOOKS]
    texts += [name for names in CELLS.values() for name in names]
    texts += [*CAPTIONS, *LINKS, *(text for forms in QUESTIONS.values() for text in forms), *REGIONS, "an"]
    texts += [text.replace(MARKER, " ") for text in (*INSTRUCTIONS.values(), REPRESENT)]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"{\w*}", " ", text).lower())})


def _sentence(text: str) -> str:
    text = article(text)
    return text[0].upper() + text[1:]
