"""The tasks that scenes give: pairs to train on, and queries with candidates, after the four groups of MMEB."""

import random
from collections.abc import Sequence
from itertools import product
from typing import Literal

from lit_embed.data.scenes import wording
from lit_embed.data.scenes.collection import DOMAINS, EvalStage, SceneCollection, SceneConfig
from lit_embed.data.scenes.render import SceneImage, ThingImage
from lit_embed.data.scenes.scene import SIZES, Scene, Thing, scene_attributes
from lit_embed.items import Item
from lit_embed.multimodal import ChoiceTask, Domain, Group, ItemPair, TargetPair, choice_task

TASKS: dict[str, Group] = {
    "classification": "classification",  # picture -> class name
    "vqa": "vqa",  # picture and question -> answer
    "retrieval_i2t": "retrieval",  # picture -> caption
    "retrieval_t2i": "retrieval",  # caption -> picture
    "grounding": "grounding",  # picture and phrase for a part -> picture of that part
    "grounding_text": "grounding",  # description of a thing -> picture of it
}
Part = Literal["train", "validate", "test"]


def training_pairs(scenes: SceneCollection, part: Part = "train") -> dict[str, list[ItemPair]]:
    """A pair of each in-domain scene for every task, by task; the scenes come in the same order."""
    return {
        task: [_pair(rng, scenes.config, scene, task) for scene in _scenes(scenes, part, "ind")]
        for task in TASKS
        for rng in [scenes.stream(f"pairs/{part}/{task}")]
    }


def caption_items(scenes: SceneCollection, part: Part = "train") -> list[Item]:
    """Pictures of in-domain scenes with their captions as texts, ``config.captions`` of each."""
    rng = scenes.stream(f"captions/{part}")
    return [
        Item(wording.caption(rng, scene), SceneImage(scene, scenes.config.pixels))
        for scene in _scenes(scenes, part, "ind")
        for _ in range(scenes.config.captions)
    ]


def further_captions(scenes: SceneCollection, part: Part = "train") -> list[TargetPair]:
    """The query of ``retrieval_i2t`` with other captions than in its pair, so that there are ``config.captions``."""
    rng = scenes.stream(f"further captions/{part}")
    return [
        TargetPair(pair.query, pair.positive.text, pair.task)
        for scene in _scenes(scenes, part, "ind")
        for _ in range(scenes.config.captions - 1)
        for pair in [_pair(rng, scenes.config, scene, "retrieval_i2t")]
    ]


def evaluation_tasks(scenes: SceneCollection, stage: EvalStage) -> list[ChoiceTask]:
    """Every task in and out of domain, a query for each scene; they are named ``<task>_<domain>``."""
    return [_choice_task(scenes, stage, domain, task) for task in TASKS for domain in DOMAINS]


def probe_items(scenes: SceneCollection, part: Part, domain: Domain = "ind") -> tuple[list[Item], list[dict[str, int]]]:
    """Pictures with an instruction that names no task, and the attributes of each (see ``scene_attributes``).

    Raises:
        ValueError: Training has no scenes out of domain.
    """
    chosen = _scenes(scenes, part, domain)
    items = [Item(wording.REPRESENT, SceneImage(scene, scenes.config.pixels)) for scene in chosen]
    return items, [scene_attributes(scene) for scene in chosen]


def _scenes(scenes: SceneCollection, part: Part, domain: Domain) -> list[Scene]:
    if part != "train":
        return scenes.evaluation[part, domain]
    if domain != "ind":
        raise ValueError(f"training has scenes in domain only, got '{domain}'")
    return scenes.train


def _pair(rng: random.Random, config: SceneConfig, scene: Scene, task: str) -> ItemPair:
    picture, instruction = SceneImage(scene, config.pixels), wording.INSTRUCTIONS[task]
    represented = Item(wording.REPRESENT, picture)
    match task:
        case "classification":
            return ItemPair(Item(instruction, picture), Item(wording.class_name(scene)), task)
        case "vqa":
            question = wording.question(rng, scene, config.shapes, config.colours)
            return ItemPair(Item(instruction.format(question.text), picture), Item(question.answer), task)
        case "retrieval_i2t":
            return ItemPair(Item(instruction, picture), Item(wording.caption(rng, scene)), task)
        case "retrieval_t2i":
            return ItemPair(Item(instruction.format(wording.caption(rng, scene))), represented, task)
        case "grounding":
            thing = rng.choice(scene.things)
            phrase = wording.region_phrase(rng, scene, thing)
            return ItemPair(Item(instruction.format(phrase), picture), _part(thing, config), task)
        case _:
            thing = rng.choice(scene.things)
            return ItemPair(Item(instruction.format(wording.look(rng, thing))), _part(thing, config), task)


def _part(thing: Thing, config: SceneConfig) -> Item:
    return Item(wording.REPRESENT, ThingImage(thing._replace(cell=0), config.pixels))


def _choice_task(scenes: SceneCollection, stage: EvalStage, domain: Domain, task: str) -> ChoiceTask:
    """A query for each scene of an evaluation: the right answer, those most like it, and others at random."""
    rng, config = scenes.stream(f"queries/{stage}/{domain}/{task}"), scenes.config
    chosen = scenes.evaluation[stage, domain]
    pairs = [_pair(rng, config, scene, task) for scene in chosen]
    every = {item.key: item for item in _targets(config, TASKS[task], pairs)}
    rows = []
    for number, pair in enumerate(pairs):
        near = {item.key: item for item in _near(config, TASKS[task], number, chosen, pairs)}
        near.pop(pair.positive.key, None)
        keys = rng.sample(list(near), min(len(near), config.candidates - 1))
        rest = [key for key in every if key not in near and key != pair.positive.key]
        keys += rng.sample(rest, min(len(rest), config.candidates - 1 - len(keys)))
        rows.append((pair.query, [pair.positive, *(every[key] for key in keys)]))
    return choice_task(f"{task}_{domain}", TASKS[task], domain, rows)


def _targets(config: SceneConfig, group: Group, pairs: Sequence[ItemPair]) -> list[Item]:
    """Every target that a query may have to choose from; of scenes, the others' targets."""
    answers = wording.answers(config.shapes, config.colours, config.grid)
    match group:
        case "classification":
            return [Item(name) for name in answers["kind"]]
        case "vqa":
            return [Item(name) for names in answers.values() for name in names]
        case "retrieval":
            return [pair.positive for pair in pairs]
        case _:
            looks = product(range(config.shapes), range(config.colours), range(len(SIZES)))
            return [_part(Thing(*look, cell=0), config) for look in looks]


def _near(
    config: SceneConfig, group: Group, number: int, scenes: Sequence[Scene], pairs: Sequence[ItemPair]
) -> list[Item]:
    """Wrong targets that a query always has, as far as they fit: answers of the sort, the family, the scene's things.

    The right target may be among them.
    """
    match group:
        case "classification":
            return []
        case "vqa":
            right = pairs[number].positive.text
            answers = wording.answers(config.shapes, config.colours, config.grid)
            return [Item(name) for names in answers.values() if right in names for name in names]
        case "retrieval":
            first = number - number % config.family
            return [pair.positive for pair in pairs[first : first + config.family]]
        case _:
            return [_part(thing, config) for thing in scenes[number].things]
