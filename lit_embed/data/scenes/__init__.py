"""Built-in pictures: small scenes drawn from a seed, and everything that can be asked of them.

A scene has a few things (circles, squares, moons, ...) of a colour and a size in the cells of a grid. Templates say it
in several wordings: captions, questions with answers, class names, phrases for a part. From these come four groups of
tasks as MMEB has them: classification, question answering, retrieval and grounding.

What a score means: the (shape, colour) pairs are divided in two. Training and the in-domain evaluation have things of
one share, the out-of-domain evaluation has things of the other share alone: shapes and colours that training knows, in
combinations that it does not. No scene of an evaluation, as right or wrong answer, is in training.
"""

from lit_embed.data.scenes.collection import SceneCollection, SceneConfig, build_scenes
from lit_embed.data.scenes.render import SceneImage, ThingImage
from lit_embed.data.scenes.scene import Scene, Thing, attribute_classes, scene_attributes
from lit_embed.data.scenes.tasks import (
    TASKS,
    caption_items,
    evaluation_tasks,
    further_captions,
    probe_items,
    training_pairs,
)

__all__ = [
    "TASKS",
    "Scene",
    "SceneCollection",
    "SceneConfig",
    "SceneImage",
    "Thing",
    "ThingImage",
    "attribute_classes",
    "build_scenes",
    "caption_items",
    "evaluation_tasks",
    "further_captions",
    "probe_items",
    "scene_attributes",
    "training_pairs",
]
