import random
import re

import pytest

from lit_core.presets import preset_tokenizer
from lit_embed.data.scenes.collection import SceneConfig, build_scenes
from lit_embed.data.scenes.scene import CELLS, COLOURS, SHAPES, Scene, Thing
from lit_embed.data.scenes.wording import (
    CAPTIONS,
    INSTRUCTIONS,
    QUESTIONS,
    REPRESENT,
    answers,
    caption,
    class_name,
    look,
    question,
    region_phrase,
    words,
)

SIZE_OF = {"small": 0, "little": 0, "large": 1, "big": 1}
NUMBER = ("zero", "one", "two", "three")


@pytest.fixture(scope="module", params=[2, 3])
def scenes(request: pytest.FixtureRequest) -> list[Scene]:
    config = SceneConfig(train_scenes=300, eval_scenes=8, grid=request.param, shapes=4, colours=4)
    return build_scenes(config).train


def place_in(text: str, grid: int) -> int | None:
    found = re.search(r"at the ([a-z ]+?)(?: an? | and |,|;|\.|\?|$)|in the ([a-z ]+?) part", text)
    return CELLS[grid].index(found[1] or found[2]) if found else None


def thing_in(text: str, grid: int) -> Thing:
    """Read a phrase that says everything of a thing."""
    tokens = re.findall(r"[a-z]+", text.lower())
    (shape,) = (SHAPES.index(token) for token in tokens if token in SHAPES)
    (colour,) = (COLOURS.index(token) for token in tokens if token in COLOURS)
    (size,) = (SIZE_OF[token] for token in tokens if token in SIZE_OF)
    cell = place_in(text.lower(), grid) if grid > 1 else 0
    assert cell is not None, text
    return Thing(shape, colour, size, cell)


def test_captions_say_everything_in_many_ways(scenes: list[Scene]) -> None:
    rng = random.Random(0)
    openings = set()
    for scene in scenes:
        text = caption(rng, scene)
        body = text.removesuffix(".").partition(":")[2] if ":" in text else text.removesuffix(".")
        body = body.replace("The picture shows ", "").replace("One sees ", "")
        parts = re.split(r";|, then | and (?=an? |at |in )", body)
        assert {thing_in(part, scene.grid) for part in parts} == set(scene.things), text
        openings.add(" ".join(text.split()[:2]))
        assert not re.search(r"\ba [aeiou]", text)
    assert {"There are", "The picture", "One sees"} < openings
    assert len({caption(rng, scenes[0]) for _ in range(200)}) > 100
    assert len(CAPTIONS) > 3


def answer(scene: Scene, text: str, topic: str) -> list[str]:
    """Every answer to a question, from its words."""
    tokens = re.findall(r"[a-z]+", text.lower())
    place = place_in(text.lower(), scene.grid) if "at a place" in topic or topic == "thing at a place" else None
    shape = next((SHAPES.index(t) for t in tokens if t in SHAPES), None)
    colour = next((COLOURS.index(t) for t in tokens if t in COLOURS), None)
    fits = [
        thing for thing in scene.things
        if (shape in (None, thing.shape)) and (colour in (None, thing.colour)) and place in (None, thing.cell)
    ]  # fmt: skip
    if topic.startswith("number"):
        return [NUMBER[len(fits)]]
    name = {
        "colour": lambda thing: COLOURS[thing.colour], "shape": lambda thing: SHAPES[thing.shape],
        "thing": lambda thing: f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}",
        "place": lambda thing: CELLS[scene.grid][thing.cell], "size": lambda thing: ("small", "large")[thing.size],
    }[topic.split()[0]]  # fmt: skip
    return [name(thing) for thing in fits]


def test_questions_have_one_answer(scenes: list[Scene]) -> None:
    rng = random.Random(1)
    topics: dict[str, set[str]] = {}
    for scene in scenes * 4:
        asked = question(rng, scene, 4, 4)
        assert answer(scene, asked.text, asked.topic) == [asked.answer], (scene.key, asked)
        topics.setdefault(asked.topic, set()).add(asked.answer)
    assert set(topics) == set(QUESTIONS)
    assert {"zero", "one", "two"} <= topics["number of a colour"] & topics["number of a shape"]
    every = [name for names in answers(4, 4, scenes[0].grid).values() for name in names]
    assert len(every) == len(set(every))
    assert set().union(*topics.values()) <= set(every)


def test_phrases_fit_one_thing(scenes: list[Scene]) -> None:
    rng = random.Random(2)
    kinds = set()
    for scene in scenes:
        for thing in scene.things:
            phrase = region_phrase(rng, scene, thing)
            tokens = re.findall(r"[a-z]+", phrase.lower())
            place = place_in(phrase.lower(), scene.grid)
            size = next((SIZE_OF[t] for t in tokens if t in SIZE_OF), None)
            fits = [
                other for other in scene.things
                if place in (None, other.cell) and size in (None, other.size)
                and all(SHAPES[other.shape] == t for t in tokens if t in SHAPES)
                and all(COLOURS[other.colour] == t for t in tokens if t in COLOURS)
            ]  # fmt: skip
            assert fits == [thing], (scene.key, phrase)
            kinds.add(
                (place is None, size is None, any(t in SHAPES for t in tokens), any(t in COLOURS for t in tokens))
            )
            assert thing_in(look(rng, thing), 1) == thing._replace(cell=0)
    assert len(kinds) == 7


def test_class_names() -> None:
    assert class_name(Scene((Thing(0, 1, 0, 0), Thing(3, 5, 1, 2)))) == "orange diamond"  # the large one
    assert class_name(Scene((Thing(0, 1, 0, 1), Thing(3, 5, 0, 2)))) == "green circle"  # the first one


def test_instructions_begin_with_the_picture_where_there_is_one() -> None:
    with_picture = {task for task, text in INSTRUCTIONS.items() if "<|image_1|>" in text}
    assert with_picture == {"classification", "vqa", "retrieval_i2t", "grounding"}
    assert all(text.startswith("<|image_1|>\n") for task, text in INSTRUCTIONS.items() if task in with_picture)
    assert REPRESENT.startswith("<|image_1|>\n")


def test_the_words_are_all_there_is(scenes: list[Scene]) -> None:
    rng = random.Random(3)
    texts = [*INSTRUCTIONS.values(), REPRESENT, *(name for names in answers(8, 8, 3).values() for name in names)]
    for scene in scenes:
        texts += [caption(rng, scene), question(rng, scene).text, region_phrase(rng, scene, scene.things[0])]
        texts.append(look(rng, scene.things[0]))
    used = {word for text in texts for word in re.findall(r"[a-z]+", text.replace("<|image_1|>", "").lower())}
    assert used <= set(words())
    assert set(words()) - used <= {"an", "four", "five", "six", "seven", "eight", "nine"}
    longest = max(texts, key=len)
    assert len(preset_tokenizer("tiny-qwen3")(longest)["input_ids"]) < 100
