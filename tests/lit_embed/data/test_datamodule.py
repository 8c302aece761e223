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
from lit_embed.data.datamodule import RetrievalDataModule
from lit_embed.data.records import PairItem, TextItem
from lit_embed.data.world import WorldConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning 2.6 on torch 2.13
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice only
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from datasets and what it imports
]

WORLD = WorldConfig(documents=150, train_questions=80, dev_questions=10, test_questions=12, texts=10)


class Recorder(LightningModule):
    """Records what it is given, untokenised."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.train_items, self.val_items = list[list[PairItem]](), list[list[PairItem]]()
        self.texts: dict[int, list[str]] = {0: [], 1: []}

    def pair_collator(self, train: bool) -> Callable[[list[PairItem]], Any]:
        return lambda items: {"items": items, "train": train}

    def text_collator(self, kind: Literal["query", "passage"]) -> Callable[[list[TextItem]], Any]:
        return lambda items: {"ids": [item["id"] for item in items], "kind": kind}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch["train"]
        self.train_items.append(batch["items"])
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 2:
            assert not batch["train"]
            self.val_items.append(batch["items"])
        else:
            assert batch["kind"] == ("query", "passage")[dataloader_idx]
            self.texts[dataloader_idx] += batch["ids"]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.texts[dataloader_idx] += batch["ids"]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        return batch["ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def fit(data: RetrievalDataModule, **options: Any) -> Recorder:
    module = Recorder()
    trainer(**{"max_epochs": 1, **options}).fit(module, data)
    return module


def test_the_world_is_trained_on_and_evaluated() -> None:
    data = RetrievalDataModule(world=WORLD, batch_size=8, val_pairs=6, token_budget=200)
    module = fit(data, max_epochs=2)
    assert [len(batch) for batch in module.train_items] == [8] * (2 * (len(module.train_items) // 2))
    assert {item["dataset"] for batch in module.train_items for item in batch} == {"world"}
    validation = data.collection("validate")
    assert sorted(module.texts[0]) == sorted(2 * list(validation.queries))
    assert sorted(module.texts[1]) == sorted(2 * list(validation.corpus))
    assert [item["query_id"] for item in module.val_items[0]] == [item["query_id"] for item in module.val_items[1]]
    assert sum(map(len, module.val_items)) == 12
    for item in module.val_items[0]:
        assert set(item["positive_ids"]) == set(validation.qrels[item["query_id"]])
    tested = Recorder()
    trainer().test(tested, data, verbose=False)
    assert sorted(tested.texts[0]) == sorted(data.collection("test").queries)
    predicted = trainer().predict(tested, data)
    assert predicted is not None
    assert len(predicted) == 2


def test_bm25_negatives_and_runs() -> None:
    data = RetrievalDataModule(world=WORLD, batch_size=8, negatives=2, hard_negatives="bm25", val_pairs=0)
    items = [item for batch in fit(data).train_items for item in batch]
    assert all(len(item["passages"]) == 3 for item in items)
    assert not any(set(item["passage_ids"][1:]) & set(item["positive_ids"]) for item in items)
    run = data.bm25_run("test", 5)
    assert run is data.bm25_run("test", 5)
    assert set(run) == set(data.collection("test").queries)
    assert all(len(ranking) <= 5 for ranking in run.values())


def write_rows(path: Path, count: int, **fields: Any) -> str:
    rows = ({"query": f"{path.stem} {i}", "positives": [f"{path.stem} answer {i}"], **fields} for i in range(count))
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_several_files_make_homogeneous_batches(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / "big.jsonl", 100), write_rows(tmp_path / "small.jsonl", 10)]
    data = RetrievalDataModule(path=paths, batch_size=16, own_group_only=["small"], val_pairs=4)
    module = fit(data)
    sets = [{item["dataset"] for item in batch} for batch in module.train_items]
    assert all(len(names) == 1 for names in sets)
    assert sorted(len(batch) for batch in module.train_items) == [8, 10, 16, 16, 16, 16, 16]  # 90 and 8 rows
    assert all(item["own_group_only"] == (item["dataset"] == "small") for b in module.train_items for item in b)
    assert {query.split()[0] for query in data.collection("test").queries.values()} == {"big"}
    with pytest.raises(InputError, match="no training set 'medium', only big, small"):
        fit(RetrievalDataModule(path=paths, own_group_only=["medium"]))


def test_all_seeds_are_tested_on_the_same_queries(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 100)
    sources = [RetrievalDataModule(path=path, seed=seed) for seed in (0, 1)]
    for data in sources:
        data.setup("fit")
        data.setup("test")
    for stage in ("validate", "test"):
        first, second = (data.collection(stage) for data in sources)
        assert first == second
    other = RetrievalDataModule(path=path, split_seed=1)
    other.setup("test")
    assert other.collection("test").queries != sources[0].collection("test").queries


def test_a_limit_for_trials(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 1000)
    data = RetrievalDataModule(path=path, batch_size=4, limit=10, val_pairs=1)
    assert [len(batch) for batch in fit(data).train_items] == [4, 4]
    assert len(data.collection("validate").corpus) == 410  # 10 and the rows that may be held out were read


def test_a_stream_is_trained_on_past_its_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", 500)
    options: dict[str, Any] = {"path": str(tmp_path / "data"), "streaming": True, "batch_size": 8, "val_pairs": 8}
    module = fit(data := RetrievalDataModule(**options, steps_per_epoch=5), max_epochs=2)
    numbers = [int(item["query"].split()[1]) for batch in module.train_items for item in batch]
    assert len(numbers) == len(set(numbers)) == 80
    assert min(numbers) >= 400
    assert all(int(query.split()[1]) < 400 for query in data.collection("validate").queries.values())
    assert not set(data.collection("validate").queries) & set(data.collection("test").queries)
    resumed = RetrievalDataModule(**options, steps_per_epoch=2)
    resumed.load_state_dict(fit_state(options))
    assert fit(resumed).train_items == module.train_items[3:5]


def fit_state(options: dict[str, Any]) -> dict[str, Any]:
    data = RetrievalDataModule(**options, steps_per_epoch=3)
    fit(data)
    return data.state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "field 'batch_size': must be at least 1, got 0"),
        ({"negatives": -1}, "field 'negatives'"),
        ({"limit": 0}, "field 'limit'"),
        ({"path": []}, "field 'path'"),
        ({"streaming": True}, "a stream is one Hugging Face dataset"),
        ({"streaming": True, "path": "a/b", "limit": 3}, "field 'limit': not available for a stream"),
        ({"streaming": True, "path": "a/b", "hard_negatives": "bm25"}, "field 'hard_negatives'"),
        ({"path": "../no/such/folder"}, "no such file or folder"),
        ({"negatives": 1, "world": WORLD}, "has no negatives but 1 are asked for"),
        ({"val_split": "valid", "world": WORLD}, "no split 'valid'"),
    ],
)
def test_datamodule_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        RetrievalDataModule(**options).setup("fit")
    assert words in str(error.value)


def test_world_fields_are_flags() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(RetrievalDataModule, "data")
    config = parser.parse_args(["--data.world.documents=150", "--data.path=[a,b]", "--data.own_group_only=[a]"])
    data = parser.instantiate_classes(config).data
    assert data.world == WorldConfig(documents=150)
    assert (data.paths, data.own_group_only) == (["a", "b"], ["a"])
