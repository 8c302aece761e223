"""Several sets in a schedule: files, filters, bags, growth, what is evaluated, and going on."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_core.errors import InputError
from lit_embed.data.bagging import Bag
from lit_embed.data.families import FamiliesConfig
from lit_embed.data.records import PairItem, TextItem
from lit_embed.data.task_datamodule import TaskDataModule
from lit_embed.data.task_sources import instruct, type_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning 2.6 on torch 2.13
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice only
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from what is imported
]

FAMILIES = FamiliesConfig(rows=800, base_rows=20, test_queries=10)


class Recorder(LightningModule):
    """Records what it is given, untokenised."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches = list[list[PairItem]]()
        self.texts: dict[int, dict[str, str]] = {0: {}, 1: {}}

    def pair_collator(self, train: bool) -> Callable[[list[PairItem]], Any]:
        return lambda items: {"items": items}

    def text_collator(self, kind: Literal["query", "passage"]) -> Callable[[list[TextItem]], Any]:
        return lambda items: {"texts": {item["id"]: item["text"] for item in items}, "kind": kind}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch["items"])
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert batch["kind"] == ("query", "passage")[dataloader_idx]
        assert not batch["texts"].keys() & self.texts[dataloader_idx].keys()
        self.texts[dataloader_idx] |= batch["texts"]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def sets(self) -> list[str]:
        """Set of each batch, each being of one."""
        assert all(len({item["dataset"] for item in batch}) == 1 for batch in self.batches)
        return [batch[0]["dataset"] for batch in self.batches]


def fit(data: TaskDataModule, **options: Any) -> Recorder:
    module, options = Recorder(), {"max_epochs": 1, "limit_val_batches": 0, **options}
    checkpoint = options.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module


def write_rows(path: Path, count: int, **fields: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {"query": f"{path.stem} {i}", "pos": [f"{path.stem} answer {i}"], "neg": [f"{path.stem} wrong {i}"], **fields}
        for i in range(count)
    )
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def write_sets(folder: Path, own_batch: int) -> list[str]:
    """90, 46, 36 and 18 rows are left for training of 100, 50, 40 and 20."""
    return [
        write_rows(folder / "big.jsonl", 100, prompt="Find it"),
        write_rows(folder / "like.jsonl", 50, type="symmetric_sts", prompt="Same"),
        write_rows(folder / "labels_no_in_batch_neg.jsonl", 40, type="symmetric_class", batch_size=own_batch),
        write_rows(folder / "small.jsonl", 20, type="only_1neg"),
    ]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return write_sets(tmp_path, 6)


@pytest.fixture
def row_by_row(tmp_path: Path) -> list[str]:
    """Sets that leave no row out at a batch size of 1."""
    return write_sets(tmp_path, 2)


def test_files_are_read_as_flag_embedding_means_them(paths: list[str]) -> None:
    module = fit(TaskDataModule(path=paths, batch_size=8, negatives=3))
    counts = {name: module.sets.count(name) for name in dict.fromkeys(module.sets)}
    assert counts == {"big": 11, "like": 11, "labels_no_in_batch_neg": 12, "small": 2}  # of 90, 46, 36, 18 rows
    sizes = {batch[0]["dataset"]: len(batch) for batch in module.batches}
    assert sizes == {"big": 8, "like": 4, "labels_no_in_batch_neg": 3, "small": 8}
    items = {item["dataset"]: item for batch in module.batches for item in batch}
    assert {name: item["own_group_only"] for name, item in items.items()} == {
        "big": False, "like": False, "labels_no_in_batch_neg": True, "small": False,
    }  # fmt: skip
    assert {name: len(item["passages"]) for name, item in items.items()} == {
        "big": 4, "like": 4, "labels_no_in_batch_neg": 4, "small": 2,
    }  # fmt: skip
    assert items["big"]["query"].startswith("Instruct: Find it\nQuery: big ")
    assert items["big"]["passages"][0].startswith("big answer")
    assert all(text.startswith("Instruct: Same\nQuery: like ") for text in items["like"]["passages"])
    assert items["small"]["query"].startswith("small ")
    assert (type_of("symmetric_sts"), type_of("symmetric_class"), type_of("normal")) == (
        "sts", "classification", "retrieval",
    )  # fmt: skip
    assert (type_of("clustering"), type_of("")) == ("clustering", "retrieval")


def test_teachers_scores_go_with_the_passages_drawn(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{i}", "pos": ["p0", f"p{i}"], "neg": ["n0", "n1", "n2"], "pos_scores": [9.0, 8.0 + i],
         "neg_scores": [0.0, 1.0, 2.0]}
        for i in range(1, 21)
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = fit(TaskDataModule(path=str(tmp_path / "a.jsonl"), batch_size=2, negatives=2))
    for item in (item for batch in module.batches for item in batch):
        number = int(item["query"][1:])
        known = {"p0": 9.0, f"p{number}": 8.0 + number, "n0": 0.0, "n1": 1.0, "n2": 2.0}
        assert item["scores"] == [known[text] for text in item["passages"]]
        assert len(item["scores"]) == 3


def test_no_instructions(paths: list[str]) -> None:
    module = fit(TaskDataModule(path=paths, batch_size=8, negatives=1, instructions=False), limit_val_batches=1.0)
    assert not any("Instruct" in item["query"] for batch in module.batches for item in batch)
    assert not any("Instruct" in text for texts in module.texts.values() for text in texts.values())


@pytest.mark.parametrize("schedule", ["bls", "dataset", "task", "mixed"])
def test_schedules(paths: list[str], schedule: Any) -> None:
    module = fit(TaskDataModule(path=paths, schedule=schedule, batch_size=8, negatives=1))
    if schedule == "mixed":
        assert [len(batch) for batch in module.batches] == [5] * 38  # of 190 rows; the other schedules have 36 steps
        assert all(len({item["dataset"] for item in batch}) > 1 for batch in module.batches)
        return
    changes = sum(first != second for first, second in zip(module.sets, module.sets[1:], strict=False))
    if schedule == "dataset":
        assert list(dict.fromkeys(module.sets)) == ["big", "like", "labels_no_in_batch_neg", "small"]
        assert changes == 3
    elif schedule == "task":
        kinds = [{"like": "sts", "big": "retrieval", "small": "retrieval"}.get(name, "label") for name in module.sets]
        assert list(dict.fromkeys(kinds)) == ["retrieval", "sts", "label"]
        assert sum(first != second for first, second in itertools.pairwise(kinds)) == 2
    else:
        assert changes > 12


def test_stages_by_filter_and_order(paths: list[str]) -> None:
    first = fit(TaskDataModule(path=paths, types=["retrieval"], batch_size=8, negatives=1))
    assert set(first.sets) == {"big", "small"}
    second = fit(TaskDataModule(path=paths, types=["sts", "classification"], batch_size=8, negatives=1))
    assert set(second.sets) == {"like", "labels_no_in_batch_neg"}
    named = TaskDataModule(path=paths, train_on=["small", "like"], schedule="dataset", order=["small", "like"],
                           batch_size=4, negatives=1)  # fmt: skip
    assert list(dict.fromkeys(fit(named).sets)) == ["small", "like"]


def test_members_are_lists_of_rows(row_by_row: list[str]) -> None:
    def drawn(**bag: Any) -> dict[str, list[str]]:
        data = TaskDataModule(path=row_by_row, batch_size=1, negatives=1, bag=Bag(**bag))
        found: dict[str, list[str]] = {}
        for batch in fit(data).batches:
            for item in batch:
                found.setdefault(item["dataset"], []).append(item["query"])
        for name, queries in found.items():
            assert data.manifest["datasets"][name]["drawn"] == len(queries)
        return found

    whole, half, rest = drawn(), drawn(ratio=50), drawn(ratio=50, complement=True)
    for name, queries in whole.items():
        assert sorted(half[name] + rest[name]) == sorted(queries)
        assert len(half[name]) == (len(queries) + 1) // 2
    nested = [drawn(ratio=ratio, member=member, nested=True) for member, ratio in enumerate((20, 60))]
    assert all(set(nested[0][name]) < set(nested[1][name]) for name in whole)
    again = drawn(ratio=100, replace=True)
    assert all(len(again[name]) == len(whole[name]) > len(set(again[name])) for name in ("big", "like"))
    assert drawn(ratio=50, seed=1) != half


def test_new_sets_and_the_core_of_the_old(row_by_row: list[str]) -> None:
    def rows(part: Any, new: Any) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        data = TaskDataModule(path=row_by_row, batch_size=1, negatives=1, part=part, new=new)
        for batch in fit(data).batches:
            for item in batch:
                found.setdefault(item["dataset"], set()).add(item["query"])
        return found

    whole = rows("all", ["small"])
    assert rows("new", ["small"]) == {"small": whole["small"]}
    assert rows("old", ["small"]) == {name: of for name, of in whole.items() if name != "small"}
    update, core = rows("core+new", ["small"]), rows("core", ["small"])
    assert update == {**core, "small": whole["small"]}
    assert {name: len(of) for name, of in core.items()} == {"big": 36, "like": 18, "labels_no_in_batch_neg": 14}
    later = rows("core+new", ["big", "small"])
    assert later["like"] == core["like"]  # drawn once
    old, new = rows("old", 0.2), rows("new", 0.2)
    core = rows("core", 0.2)
    for name in whole:
        assert not old[name] & new[name]
        assert old[name] | new[name] == whole[name]
        assert core[name] < old[name]
    assert {name: len(of) for name, of in new.items()} == {
        "big": 18,
        "like": 9,
        "labels_no_in_batch_neg": 7,
        "small": 4,
    }


def test_every_text_is_encoded_once(paths: list[str]) -> None:
    data = TaskDataModule(path=[*paths, "families"], families=FAMILIES, batch_size=8, negatives=1, held_out=["small"])
    module = fit(data, limit_val_batches=1.0, limit_train_batches=1)
    evaluation = data.evaluation("validate")
    assert {task.name for task, _, _ in evaluation} >= {"big", "like", "small", "travel-retrieval", "court-sts"}
    assert {task.name for task, _, _ in evaluation if task.domain == "out" and "-" not in task.name} == {"small"}
    assert "small" not in data.manifest["datasets"]
    for task, queries, passages in evaluation:
        assert list(queries) == list(task.queries)
        for text_id, key in queries.items():
            assert module.texts[0][key] == instruct(task.instruction, task.queries[text_id])
        for text_id, key in passages.items():
            assert module.texts[1][key] == task.passages[text_id]
    for texts in module.texts.values():
        assert len(set(texts.values())) == len(texts)
    shared = {
        key for task, _, of in evaluation if task.name in ("court-retrieval", "court-reranking") for key in of.values()
    }
    assert len(shared) < sum(
        len(t.passages) for t, _, _ in evaluation if t.name in ("court-retrieval", "court-reranking")
    )


def test_beir_folders_with_mined_negatives(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True)
        docs = [{"_id": f"d{i}", "title": f"{name} title {i}", "text": f"{name} word{i} text"} for i in range(30)]
        docs[7] = {"_id": "d7", "title": "", "text": ""}
        (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, docs)))
        queries = [{"_id": f"q{i}", "text": f"{name} word{i}"} for i in range(20)]
        (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
        for split, span in (("train", range(10)), ("dev", range(10, 15)), ("test", range(15, 20))):
            lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t{int(i != 19)}" for i in span)]
            (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines))
    data = TaskDataModule(path=[str(tmp_path / "one"), str(tmp_path / "two")], pairs="qrels", batch_size=2, negatives=2,
                          hard_negatives="bm25", held_out=["two"], task_instructions={"one": "Look"})  # fmt: skip
    module = fit(data, limit_val_batches=1.0)
    assert set(module.sets) == {"one/qrels"}
    item = module.batches[0][0]
    assert item["query"].startswith("Instruct: Look\nQuery: one word")
    assert len(item["passages"]) == 3
    tested = {task.name: task for task, _, _ in data.evaluation("test")}
    assert {name: (task.domain, len(task.queries)) for name, task in tested.items()} == {
        "one": ("in", 4),
        "two": ("out", 4),
    }
    assert len(tested["one"].passages) == 29  # without the empty one


@pytest.mark.parametrize("schedule", ["bls", "mixed"])
def test_a_member_goes_on_in_mid_epoch(paths: list[str], tmp_path: Path, schedule: Any) -> None:
    options: dict[str, Any] = {"path": paths, "schedule": schedule, "batch_size": 4, "negatives": 1, "bag": Bag(60)}
    whole = fit(TaskDataModule(**options), max_epochs=2)

    class Saving(Recorder):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 7:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer_options: dict[str, Any] = {"max_epochs": 2}
    module = Saving()
    Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0, **trainer_options,
    ).fit(module, TaskDataModule(**options))  # fmt: skip
    rest = fit(TaskDataModule(**options), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert rest.batches == whole.batches[7:]
    for changed, words in (
        ({"bag": Bag(60, member=1)}, "bag/member was 0, is 1"),
        ({"instructions": False}, "datasets/big/content was"),
    ):
        with pytest.raises(InputError, match=words):
            fit(TaskDataModule(**{**options, **changed}), ckpt_path=tmp_path / "half.ckpt")


def test_a_limit_counts_among_the_rows_of_a_set() -> None:
    data = TaskDataModule(families=FAMILIES, limit=100, types=["retrieval", "sts"])
    data.setup("fit")
    assert {of["rows"] for of in data.training_sets().values()} == {100}
    assert {of["drawn"] for of in data.manifest["datasets"].values()} == {100}


def test_families_are_the_default() -> None:
    module = fit(TaskDataModule(families=FAMILIES, bag=Bag(10)))
    assert {"travel-retrieval", "workshop-clustering", "household-sts"} <= set(module.sets)
    base = TaskDataModule(families=FAMILIES, base=True, negatives=1, batch_size=8)
    assert set(fit(base).sets) == {"travel-base", "household-base", "workshop-base", "festival-base", "court-base"}


def test_a_set_smaller_than_a_batch_makes_smaller_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "few.jsonl", 12)
    module = fit(TaskDataModule(path=[path], batch_size=32, negatives=1))
    assert [len(batch) for batch in module.batches] == [12 - 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "field 'batch_size': must be at least 1, got 0"),
        ({"negatives": -1}, "field 'negatives'"),
        ({"path": []}, "field 'path': needs at least one path"),
        ({"path": "hub/name"}, "is neither 'families' nor a BEIR folder"),
        ({"path": "../no/such/file.jsonl"}, "no such file or folder"),
        ({"part": "old"}, "field 'new': part 'old' needs to know what arrives later"),
        ({"part": "late", "new": ["big"]}, "field 'part': must be one of all, old, new, core, core+new, got 'late'"),
        ({"new": 1.5}, "field 'new': a share must lie between 0 and 1, got 1.5"),
        ({"core": 0}, "field 'core': must be a percentage above 0, at most 100, got 0"),
        ({"part": "old", "new": ["bigger"]}, "field 'new': no training set 'bigger', only big, like"),
        ({"train_on": ["bigger"]}, "field 'train_on': no training set 'bigger', only big, like"),
        ({"types": ["reranking"]}, "field 'types': no training set 'reranking', only retrieval, sts, classification"),
        ({"train_on": ["big"], "part": "new", "new": ["small"]}, "no training set has rows of part 'new'"),
        ({"schedule": "dataset", "order": ["big"]}, "field 'order': must name each dataset once"),
        ({"base": True}, "field 'base': is for path 'families'"),
        ({"bag": Bag(100, complement=True)}, "leaves none for its complement"),
        ({"twice": True}, "field 'path': there are two training sets 'big'"),
        ({"twice": True, "held_out": ["big"]}, "field 'path': there are two tasks 'big'; rename a folder or file"),
        ({"held_out": ["smal"]}, "'held_out': there is no folder or file 'smal', only big, like, labels_no_in"),
        ({"task_instructions": {"smal": "Do"}}, "field 'task_instructions': there is no folder or file 'smal', only"),
        ({"path": "families", "families": FAMILIES, "held_out": ["court"]}, "'court', as all sets are built in"),
        ({"held_out": ["big", "like", "labels_no_in_batch_neg", "small"]}, "'held_out': everything is held out"),
        ({"train_on": ["big"], "leave_out": ["big"]}, "no training set is left; change types, train_on or leave_out"),
    ],
)  # fmt: skip
def test_mistakes_in_flags(paths: list[str], options: dict[str, Any], words: str) -> None:
    if options.pop("twice", False):
        options["path"] = [paths[0], *paths]
    with pytest.raises(InputError) as error:
        fit(TaskDataModule(**{"path": paths, "batch_size": 4, "negatives": 1, **options}))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"query": "b", "pos": ["p"], "prompt": "Else"}, "a.jsonl:2: field 'prompt': is 'Else', was None before"),
        ({"query": "", "pos": ["p"]}, "a.jsonl:2: field 'query': the query is empty"),
        ({"query": "b", "pos": []}, "a.jsonl:2: field 'pos': needs at least one positive"),
        ({"query": "b", "pos": ["p"], "pos_scores": ["x"]}, "a.jsonl:2: field 'pos_scores'"),
        ({"query": "b", "pos": ["p"], "type": "normal"}, "a.jsonl:2: field 'type'"),
    ],
)
def test_mistakes_in_rows(tmp_path: Path, second: dict[str, Any], words: str) -> None:
    rows = [{"query": "a", "pos": ["x"]}, second, {"query": "c", "pos": ["y"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as error:
        TaskDataModule(path=str(tmp_path / "a.jsonl"), negatives=0).setup("fit")
    assert words in str(error.value)


def test_batch_sizes_in_rows_are_checked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 10, batch_size="many")
    with pytest.raises(InputError, match=r"field 'batch_size': must be a whole number of at least 1, got 'many'"):
        TaskDataModule(path=path).setup("fit")


def test_fields_are_flags() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TaskDataModule, "data")
    flags = ["--data.bag.ratio=60", "--data.bag.member=2", "--data.families.rows=800", "--data.new=[a,b]",
             "--data.types=[sts]", "--data.part=core+new"]  # fmt: skip
    data = parser.instantiate_classes(parser.parse_args(flags)).data
    assert data.bag == Bag(60, 2)
    assert (data.families.rows, data.new, data.types, data.part) == (800, ["a", "b"], ["sts"], "core+new")
    assert parser.instantiate_classes(parser.parse_args(["--data.new=0.2", "--data.part=old"])).data.new == 0.2
