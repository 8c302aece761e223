import dataclasses
import re

import pytest

from lit_embed.data.scenes import (
    TASKS,
    SceneCollection,
    SceneConfig,
    SceneImage,
    ThingImage,
    build_scenes,
    caption_items,
    evaluation_tasks,
    further_captions,
    probe_items,
    scene_attributes,
    training_pairs,
)
from lit_embed.data.scenes.scene import COLOURS, SHAPES
from lit_embed.multimodal import ChoiceTask, encode_rows

SMALL = SceneConfig(train_scenes=200, eval_scenes=80)


@pytest.fixture(scope="module")
def small() -> SceneCollection:
    return build_scenes(SMALL)


@pytest.fixture(scope="module")
def tasks(small: SceneCollection) -> dict[str, ChoiceTask]:
    return {task.name: task for task in evaluation_tasks(small, "test")}


def test_training_gives_every_task_a_pair_of_each_scene(small: SceneCollection) -> None:
    pairs = training_pairs(small)
    assert {task: len(of) for task, of in pairs.items()} == dict.fromkeys(TASKS, 200)
    for task, of in pairs.items():
        assert {pair.task for pair in of} == {task}
        assert all(pair.negative is None for pair in of)
    for number, scene in enumerate(small.train):
        image = SceneImage(scene, 56)
        for task in ("classification", "vqa", "retrieval_i2t", "grounding"):
            query = pairs[task][number].query
            assert query.image == image
            assert query.text.startswith("<|image_1|>\n")
        assert pairs["retrieval_t2i"][number].positive.image == image
        part = pairs["grounding"][number].positive.image
        assert isinstance(part, ThingImage)
        assert part.thing.look in {thing.look for thing in scene.things}
    for task in ("retrieval_t2i", "grounding", "grounding_text"):
        assert {pair.positive.text for pair in pairs[task]} == {"<|image_1|>\nRepresent the picture."}
    for task in ("classification", "vqa", "retrieval_i2t"):
        assert all(pair.positive.image is None and "<|" not in pair.positive.text for pair in pairs[task])
    assert pairs == training_pairs(small)
    fewer = training_pairs(build_scenes(dataclasses.replace(SMALL, train_scenes=50)))
    assert all(fewer[task] == of[:50] for task, of in pairs.items())


def test_captions_go_with_their_pictures(small: SceneCollection) -> None:
    items, further = caption_items(small), further_captions(small)
    assert (len(items), len(further)) == (400, 200)
    for number, scene in enumerate(small.train):
        for text in (items[2 * number].text, items[2 * number + 1].text, further[number].target):
            found = [SHAPES.index(word) for word in re.findall("[a-z]+", text.lower()) if word in SHAPES]
            assert sorted(found) == sorted(thing.shape for thing in scene.things)
        assert items[2 * number].image == further[number].query.image == SceneImage(scene)
    first = training_pairs(small)["retrieval_i2t"]
    assert sum(a.positive.text != b.target for a, b in zip(first, further, strict=True)) > 190


def test_every_task_is_evaluated_in_and_out_of_domain(small: SceneCollection, tasks: dict[str, ChoiceTask]) -> None:
    assert list(tasks) == [f"{task}_{domain}" for task in TASKS for domain in ("ind", "ood")]
    for name, task in tasks.items():
        assert (task.group, task.domain) == (TASKS[name[:-4]], name[-3:])
        assert len(task.queries) == len({query.key for query in task.queries}) or "grounding_text" in name
        assert len(task.queries) == 80
        assert {len(rows) for rows in task.candidates} == {64}
        assert all(len(set(rows.tolist())) == 64 for rows in task.candidates)
        pictures = [query.image for query in task.queries if isinstance(query.image, SceneImage)]
        assert all(picture.scene in small.evaluation["test", name[-3:]] for picture in pictures)  # type: ignore[index]
    held_out = {f"{COLOURS[colour]} {SHAPES[shape]}" for shape, colour in small.kinds["ood"]}
    task = tasks["classification_ood"]
    assert {task.targets[rows[0]].text for rows in task.candidates} <= held_out
    task = tasks["classification_ind"]
    assert not {task.targets[rows[0]].text for rows in task.candidates} & held_out


def test_the_first_candidate_alone_is_right(tasks: dict[str, ChoiceTask]) -> None:
    for name in ("retrieval_t2i_ind", "retrieval_i2t_ood", "grounding_ind", "classification_ood"):
        task = tasks[name]
        for query, rows in zip(task.queries, task.candidates, strict=True):
            right, *wrong = (task.targets[row] for row in rows)
            if name.startswith("retrieval_t2i"):
                assert isinstance(right.image, SceneImage)
                named = sorted(SHAPES.index(w) for w in re.findall("[a-z]+", query.text.lower()) if w in SHAPES)
                assert named == sorted(thing.shape for thing in right.image.scene.things)
            elif name.startswith("grounding"):
                assert isinstance(query.image, SceneImage)
                assert isinstance(right.image, ThingImage)
                looks = {thing.look for thing in query.image.scene.things}
                assert right.image.thing.look in looks
                others = {item.image.thing.look for item in wrong if isinstance(item.image, ThingImage)}
                assert looks - {right.image.thing.look} <= others  # the other things of the scene
            assert right.key not in {item.key for item in wrong}


def test_retrieval_has_the_family_among_its_candidates(small: SceneCollection, tasks: dict[str, ChoiceTask]) -> None:
    scenes, task = small.evaluation["test", "ind"], tasks["retrieval_t2i_ind"]
    for number, rows in enumerate(task.candidates):
        found = {item.image.scene for item in (task.targets[row] for row in rows) if isinstance(item.image, SceneImage)}
        first = number - number % 4
        assert set(scenes[first : first + 4]) <= found


def test_answers_of_the_sort_come_first(tasks: dict[str, ChoiceTask]) -> None:
    task = tasks["vqa_ind"]
    for query, rows in zip(task.queries, task.candidates, strict=True):
        texts = [task.targets[row].text for row in rows]
        if texts[0] in COLOURS:
            assert set(COLOURS) <= set(texts), query.text
        if texts[0] in ("small", "large"):
            assert {"small", "large"} <= set(texts)


def test_items_are_encoded_once(tasks: dict[str, ChoiceTask]) -> None:
    items = encode_rows(list(tasks.values()))
    assert len({(row.item.key, row.kind) for row in items}) == len(items)
    assert len(items) < sum(len(task.queries) + len(task.targets) for task in tasks.values()) - 500


def test_stages_share_no_query(small: SceneCollection, tasks: dict[str, ChoiceTask]) -> None:
    def pictures(of: list[ChoiceTask]) -> set[str]:
        keys = (item.image.key for task in of for item in task.items() if isinstance(item.image, SceneImage))
        return set(keys)

    test, validation = pictures(list(tasks.values())), pictures(evaluation_tasks(small, "validate"))
    trained = {pair.query.image.key for pair in training_pairs(small)["vqa"] if pair.query.image}
    assert len(test) == len(validation) == 160
    assert not test & validation
    assert not (test | validation) & trained


def test_few_candidates_and_few_scenes() -> None:
    config = SceneConfig(shapes=2, colours=3, held_out=0.3, train_scenes=10, eval_scenes=6, candidates=5, family=3)
    for task in evaluation_tasks(build_scenes(config), "validate"):
        assert {len(rows) for rows in task.candidates} == {5}
    config = dataclasses.replace(config, candidates=1000)
    for task in evaluation_tasks(build_scenes(config), "validate"):
        assert all(len(rows) == len(task.targets) for rows in task.candidates)  # all there are


def test_probes(small: SceneCollection) -> None:
    items, attributes = probe_items(small, "test", "ood")
    assert [item.image for item in items] == [SceneImage(scene) for scene in small.evaluation["test", "ood"]]
    assert attributes == [scene_attributes(scene) for scene in small.evaluation["test", "ood"]]
    assert len(probe_items(small, "train")[0]) == 200
    with pytest.raises(ValueError, match="in domain only"):
        probe_items(small, "train", "ood")
