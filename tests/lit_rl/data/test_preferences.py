import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_core.errors import InputError
from lit_rl.data.preference_tasks import PreferenceTaskConfig
from lit_rl.data.preferences import PreferenceDataModule

TASKS = PreferenceTaskConfig(count=300)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), dict[str, list[str]](train=[], val=[], test=[])

    def preference_collator(self) -> Callable[[list[Any]], Any]:
        return lambda pairs: [pair["id"] for pair in pairs]

    def training_step(self, batch: list[str], batch_idx: int) -> Tensor:
        self.seen["train"] += batch
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: list[str], batch_idx: int) -> None:
        self.seen["val"] += batch

    def test_step(self, batch: list[str], batch_idx: int) -> None:
        self.seen["test"] += batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(data: PreferenceDataModule) -> dict[str, list[str]]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, max_epochs=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return module.seen


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def conversation(number: int, turns: int = 1) -> dict[str, str]:
    start = f"\n\nHuman: question {number}" + "".join(f"\n\nAssistant: {t}\n\nHuman: {t}" for t in range(turns - 1))
    return {side: f"{start}\n\nAssistant: {side}" for side in ("chosen", "rejected")}


def test_built_in_pairs_are_trained_on_and_evaluated_once() -> None:
    data = PreferenceDataModule(batch_size=7, tasks=TASKS)
    seen = run(data)
    parts = [data.train_pairs, data.val_pairs, data.test_pairs]
    assert sum(map(len, parts)) == 300
    assert len(seen["train"]) == len(set(seen["train"])) == len(data.train_pairs) // 7 * 7
    assert sorted(seen["val"]) == sorted(pair["id"] for pair in data.val_pairs)
    assert sorted(seen["test"]) == sorted(pair["id"] for pair in data.test_pairs)
    assert 20 <= len(seen["test"]) <= 40


def test_all_seeds_hold_the_same_pairs_out_and_split_seeds_others() -> None:
    def held_out(**settings: Any) -> list[str]:
        data = PreferenceDataModule(tasks=TASKS, **settings)
        data.setup("test")
        return [pair["id"] for pair in data.test_pairs]

    assert held_out(seed=1) == held_out(seed=2, limit=5)
    assert held_out(split_seed=1) != held_out()
    assert run(PreferenceDataModule(tasks=TASKS, seed=1))["train"] != run(PreferenceDataModule(tasks=TASKS))["train"]


def test_a_conversation_stays_in_one_part(tmp_path: Path) -> None:
    rows = [conversation(number, turns) for turns in (3, 1, 2) for number in range(60)]
    data = PreferenceDataModule(str(write(tmp_path / "a.jsonl", rows)), val_share=0.3, test_share=0.3)
    data.setup("fit")
    openings = [{pair["opening"] for pair in part} for part in (data.train_pairs, data.val_pairs, data.test_pairs)]
    assert sum(map(len, openings)) == 60 == len(set.union(*openings))
    assert all(openings)
    assert len(data.val_pairs) == 3 * len(openings[1])


def test_files_of_their_own_and_prompts_that_lie_in_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "train.jsonl", [conversation(number) for number in range(40)])
    test = write(tmp_path / "test.jsonl", [conversation(number, 2) for number in range(30, 50)])
    data = PreferenceDataModule(str(train), test_path=str(test), val_share=0.2)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):  # a quiet run may have silenced it
        data.setup("fit")
    assert len(data.test_pairs) == 20
    assert not {p["opening"] for p in data.train_pairs} & {p["opening"] for p in data.test_pairs}
    left_out = 40 - len(data.train_pairs) - len(data.val_pairs)
    assert 0 < left_out <= 10
    assert f"{left_out} pairs are not trained on: their prompts are held out" in caplog.text


def test_equal_dialogues_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = {"chosen": "a b", "rejected": "a b"}
    path = write(tmp_path / "a.jsonl", [*(conversation(number) for number in range(50)), same, same])
    data = PreferenceDataModule(str(path))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):  # a quiet run may have silenced it
        data.setup("fit")
    assert "2 of 52 pairs left out, chosen equals rejected" in caplog.text
    assert len(data.train_pairs) + len(data.val_pairs) + len(data.test_pairs) == 50


def test_mistakes(tmp_path: Path) -> None:
    for settings, words in (
        ({"batch_size": 0}, "field 'batch_size': must be at least 1, got 0"),
        ({"val_share": 0.5, "test_share": 0.5}, "leave something to train on, got 0.5, 0.5"),
        ({"val_share": -0.1}, "shares must be 0 or more"),
    ):
        with pytest.raises(InputError, match=words):
            PreferenceDataModule(**settings)  # type: ignore[arg-type]
    few = write(tmp_path / "few.jsonl", [conversation(0)])
    with pytest.raises(InputError, match=r"few\.jsonl: no pair to (train|validate|test) on"):
        PreferenceDataModule(str(few)).setup("fit")
    with pytest.raises(InputError, match=r"no-such/dataset: must be 'built_in', a \.jsonl file or a folder"):
        PreferenceDataModule("no-such/dataset").setup("fit")
    with pytest.raises(InputError, match=r"none\.jsonl: file not found"):
        PreferenceDataModule("none.jsonl").setup("fit")
