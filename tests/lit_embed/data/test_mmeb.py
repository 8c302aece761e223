import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_core.errors import InputError
from lit_embed.data.mmeb import (
    SETS,
    read_captions,
    read_evaluation,
    read_targets,
    read_training,
    reconstruction_pairs,
    set_of,
)
from lit_embed.items import ImageFile, Item
from lit_embed.multimodal import ItemPair, TargetPair

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from datasets and what it imports

ASK = "<|image_1|>\nAnswer: what is it?"
SHOW = "<|image_1|> Represent the picture."
TRAIN = [
    {"qry": ASK + "\n", "qry_image_path": "images/a.png", "pos_text": "a cat", "pos_image_path": ""},
    {"qry": "find a cat", "qry_image_path": "", "pos_text": SHOW, "pos_image_path": "images/a.png",
     "neg_text": SHOW, "neg_image_path": "images/b.png"},
    {"qry": ASK, "qry_image_path": "images/b.png", "pos_text": "a dog", "pos_image_path": None,
     "neg_text": "a cat", "neg_image_path": ""},
]  # fmt: skip
EVAL = [
    {
        "qry_text": ASK,
        "qry_img_path": "a.png",
        "tgt_text": ["a cat", "a dog", "a cat", "a cow"],
        "tgt_img_path": [""] * 4,
    },
    {"qry_text": ASK, "qry_img_path": "b.png", "tgt_text": ["a dog", "a cow", "a cat"], "tgt_img_path": [""] * 3},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place in ("", "images"):
        (tmp_path / place).mkdir(exist_ok=True)
        for name in "ab":
            Image.new("RGB", (4, 4)).save(tmp_path / place / f"{name}.png")
    return tmp_path


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


def test_training_rows(folder: Path) -> None:
    path = write(folder / "Animals.jsonl", TRAIN)
    a, b = ImageFile(folder / "images/a.png"), ImageFile(folder / "images/b.png")
    expected = [
        ItemPair(Item(ASK, a), Item("a cat"), "Animals"),
        ItemPair(Item("find a cat"), Item(SHOW, a), "Animals", Item(SHOW, b)),
        ItemPair(Item(ASK, b), Item("a dog"), "Animals", Item("a cat")),
    ]
    assert read_training(path) == {"Animals": expected}
    assert read_training(path, limit=1) == {"Animals": expected[:1]}
    moved = write(folder / "elsewhere" / "Animals.jsonl", TRAIN)
    assert read_training(moved, image_root=folder) == {"Animals": expected}


def test_a_folder_of_tasks_is_read_by_its_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    write(folder / "Cats.jsonl", TRAIN[:1])
    for name, rows in (("original-00000-of-00002", TRAIN[1:2]), ("original-00001-of-00002", TRAIN[2:]),
                       ("diverse_instruction-00000-of-00001", TRAIN[:1])):  # fmt: skip
        (folder / "OK-VQA").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(folder / "OK-VQA" / f"{name}.parquet"))
    write(folder / "NIGHTS" / "original.jsonl", TRAIN[:2])
    write(folder / "NIGHTS" / "diverse_instruction.jsonl", TRAIN[1:2])
    found = read_training(folder)
    assert {task: len(pairs) for task, pairs in found.items()} == {"Cats": 1, "NIGHTS": 2, "OK-VQA": 2}
    assert [pair.positive.text for pair in found["OK-VQA"]] == [SHOW, "a dog"]
    assert {pair.task for pair in found["OK-VQA"]} == {"OK-VQA"}
    assert read_training(folder, "diverse_instruction")["OK-VQA"] == [
        pair._replace(task="OK-VQA") for pair in found["Cats"]
    ]
    assert list(read_training(folder, tasks=["NIGHTS"])) == ["NIGHTS"]
    assert read_training(folder / "OK-VQA") == {"OK-VQA": found["OK-VQA"]}  # images are relative to the folder above
    with pytest.raises(InputError, match="no task 'GQA', only Cats, NIGHTS, OK-VQA"):
        read_training(folder, tasks=["GQA"])
    with pytest.raises(InputError, match="NIGHTS: no split 'test', only diverse_instruction, original"):
        read_evaluation(folder)
    write(folder / "OK-VQA" / "original-00002-of-00002.jsonl", [TRAIN[0] | {"qry_image_path": "c.png"}])
    with pytest.raises(
        InputError, match=r"original-00002-of-00002.jsonl:1: field 'qry_image_path': no such image: .*c.png"
    ):
        read_training(folder)


def test_evaluation_rows(folder: Path) -> None:
    (task,) = read_evaluation(write(folder / "GQA.jsonl", EVAL))
    assert (task.name, task.group, task.domain) == ("GQA", "vqa", "ood")
    assert [query.image for query in task.queries] == [ImageFile(folder / "a.png"), ImageFile(folder / "b.png")]
    assert [item.text for item in task.targets] == ["a cat", "a dog", "a cow"]
    assert [rows.tolist() for rows in task.candidates] == [[0, 1, 2], [1, 2, 0]]  # the right one first, none twice


def test_candidates_that_are_images(folder: Path) -> None:
    a, b = Item(SHOW, ImageFile(folder / "a.png")), Item(SHOW, ImageFile(folder / "b.png"))
    row = {"qry_text": "a cat", "qry_img_path": "", "tgt_text": [SHOW, SHOW], "tgt_img_path": ["b.png", "a.png"]}
    (task,) = read_evaluation(write(folder / "EDIS.jsonl", [row]))
    assert task.targets == [b, a]
    (task,) = read_evaluation(write(folder / "EDIS.jsonl", [row | {"tgt_text": SHOW}]))  # one text for all
    assert task.targets == [b, a]
    (task,) = read_evaluation(
        write(folder / "EDIS.jsonl", [row | {"tgt_text": "", "tgt_img_path": ["a.png", "a.png"]}])
    )
    assert task.targets == [Item("", ImageFile(folder / "a.png"))]
    (task,) = read_evaluation(write(folder / "EDIS.jsonl", [row | {"tgt_text": "x", "tgt_img_path": ""}]))
    assert (task.targets, [rows.tolist() for rows in task.candidates]) == ([Item("x")], [[0]])
    (task,) = read_evaluation(
        write(folder / "EDIS.jsonl", [row | {"tgt_text": ["x", "y"], "tgt_img_path": [None, None]}])
    )
    assert task.targets == [Item("x"), Item("y")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tgt_text": ["a"]}, "field 'tgt_img_path': needs an entry for each of the 1 of tgt_text, got 4"),
        ({"tgt_text": [], "tgt_img_path": []}, "field 'tgt_text': has no candidate"),
        ({"tgt_text": ["a", 3, "b", "c"]}, "field 'tgt_text': must be a list of strings, has an entry of type int"),
        ({"tgt_text": {"a": 1}}, "field 'tgt_text': must be a list of strings, got dict"),
        ({"tgt_img_path": ["", "", "z.png", ""]}, "field 'tgt_img_path': candidate 3: no such image: "),
        ({"tgt_text": ["a", "", "b", "c"]}, "field 'tgt_text': candidate 2: has neither a text nor an image"),
        (
            {"tgt_text": ["a", "b", SHOW, "c"]},
            "field 'tgt_text': candidate 3: has <|image_1|> in its text, but no image",
        ),
        ({"qry_img_path": ""}, "field 'qry_text': has <|image_1|> in its text, but no image"),
    ],
)
def test_mistakes_of_evaluation_rows(folder: Path, change: dict[str, Any], words: str) -> None:
    path = write(folder / "GQA.jsonl", [EVAL[1], EVAL[0] | change])
    with pytest.raises(InputError) as error:
        read_evaluation(path)
    assert str(error.value).startswith(f"{path}:2: {words}")
    missing = {field: value for field, value in EVAL[0].items() if field not in change}
    with pytest.raises(InputError, match=r"GQA.jsonl:1: field '\w+': the field is missing"):
        read_evaluation(write(path, [missing]))


def test_texts_to_reconstruct(folder: Path) -> None:
    rows = [
        *TRAIN,
        TRAIN[0] | {"pos_text": " \n"},
        {name: TRAIN[0][name] for name in ("qry", "qry_image_path", "pos_text")},
    ]
    a, b = ImageFile(folder / "images/a.png"), ImageFile(folder / "images/b.png")
    expected = [(Item(ASK, a), "a cat"), (Item(ASK, b), "a dog"), (Item(ASK, a), "a cat")]
    for name in ("list.json", "list.jsonl"):
        found = read_targets(write(folder / name, rows))
        assert found.pairs == [TargetPair(query, target, "list") for query, target in expected]
        assert (found.image_targets, found.empty_targets) == (1, 1)
    with pytest.raises(InputError, match=r"list.jsonl:1: field 'pos_text': the field is missing"):
        read_targets(write(folder / "list.jsonl", [{"qry": "x", "qry_image_path": ""}]))
    with pytest.raises(InputError, match=r"list.jsonl:1: field 'qry_image_path': the field is missing"):
        read_targets(write(folder / "list.jsonl", [{"qry": "x", "pos_text": "y"}]))
    with pytest.raises(InputError, match=r"list.jsonl:1: field 'pos_text': has <\|image_1\|> .* no image"):
        read_targets(write(folder / "list.jsonl", [rows[-1] | {"pos_text": "<|image_1|>\nRepresent it."}]))


def test_pairs_to_reconstruct(folder: Path) -> None:
    pairs = read_training(write(folder / "Animals.jsonl", TRAIN))["Animals"]
    found = reconstruction_pairs(pairs)
    assert found.pairs == [
        TargetPair(pairs[0].query, "a cat", "Animals"),
        TargetPair(pairs[2].query, "a dog", "Animals"),
    ]
    assert (found.image_targets, found.empty_targets) == (1, 0)
    assert found == read_targets(folder / "Animals.jsonl")


def test_captions(folder: Path) -> None:
    rows = [{"image_path": "a.png", "caption": "a cat "}, {"image_path": "images/b.png", "caption": "a dog"}]
    items = read_captions(write(folder / "captions.json", rows))
    assert items == [Item("a cat", ImageFile(folder / "a.png")), Item("a dog", ImageFile(folder / "images/b.png"))]
    assert read_captions(folder / "captions.json", limit=1) == items[:1]
    for change, words in (
        ({"caption": ""}, "field 'caption': is empty"),
        ({"image_path": ""}, "field 'image_path': is empty"),
        ({"image_path": "z.png"}, "field 'image_path': no such image"),
        ({"caption": 1}, "field 'caption': must be a string, got int"),
    ):
        with pytest.raises(InputError, match=f"captions.jsonl:2: {words}"):
            read_captions(write(folder / "captions.jsonl", [rows[0], rows[1] | change]))
    with pytest.raises(InputError, match=r"other.json:1: field 'caption': the field is missing; the row has: qry"):
        read_captions(write(folder / "other.json", TRAIN))
    (folder / "tasks" / "VOC2007").mkdir(parents=True)
    write(folder / "tasks" / "VOC2007" / "original.jsonl", TRAIN)
    with pytest.raises(InputError, match=r"tasks: no file of captions in it \(rows of image_path and caption\)"):
        read_captions(folder / "tasks")


def test_nothing_to_read(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").touch()
    for path, words in (("no", "no such file or folder"), ("empty", "no task in it"), ("empty.jsonl", "has no rows")):
        with pytest.raises(InputError, match=words):
            read_training(folder / path)


def test_the_sets_of_mmeb() -> None:
    counts: dict[str, int] = {}
    for (group, domain), names in SETS.items():
        for key in (group, domain):
            counts[key] = counts.get(key, 0) + len(names)
    assert counts == {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4, "ind": 20, "ood": 16}
    assert len({name for names in SETS.values() for name in names}) == 36
    published = {"classification": 63.0, "vqa": 57.4, "retrieval": 69.6, "grounding": 85.8}  # CoCoA, Qwen2-VL 2B
    assert sum(counts[group] * score for group, score in published.items()) / 36 == pytest.approx(66.18, abs=0.005)
    by_domain = {"ind": 70.2, "ood": 60.7}
    assert sum(counts[domain] * score for domain, score in by_domain.items()) / 36 == pytest.approx(65.98, abs=0.005)
    assert set_of("ImageNet_1K") == set_of("ImageNet-1K") == ("classification", "ind")  # training writes it otherwise
    assert set_of("Visual7W-Pointing") == ("grounding", "ood")
    assert set_of("MSCOCO_i2t") == ("retrieval", "ind")
    assert set_of("Animals") == ("other", None)
