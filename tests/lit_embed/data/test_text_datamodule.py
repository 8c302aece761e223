from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_core.errors import InputError
from lit_embed.data.records import TextItem
from lit_embed.data.text_datamodule import TextDataModule
from lit_embed.data.world import WorldConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning 2.6 on torch 2.13
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice only
]


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.train_texts, self.val_texts = torch.nn.Linear(1, 1), list[str](), list[str]()

    def lm_collator(self) -> Callable[[list[TextItem]], Any]:
        return lambda items: [item["text"] for item in items]

    def training_step(self, batch: list[str], batch_idx: int) -> Tensor:
        self.train_texts += batch
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: list[str], batch_idx: int) -> None:
        self.val_texts += batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TextDataModule) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, max_epochs=1,
    )  # fmt: skip
    trainer.fit(module, data)
    return module


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["", *(f"line {i}" for i in range(40)), "line 3", ""]))
    module = fit(TextDataModule(str(path), batch_size=6))
    assert len(module.train_texts) == 36  # 38 in whole batches
    assert len(module.val_texts) == 2  # 5 % of 40 different lines
    assert not set(module.train_texts) & set(module.val_texts)


def test_few_texts_make_one_small_batch(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}')
    module = fit(TextDataModule(str(path), batch_size=32))
    assert {*module.train_texts, *module.val_texts} == {"one", "two", "three"}


def test_the_world() -> None:
    world = WorldConfig(documents=150, train_questions=10, dev_questions=5, test_questions=5, texts=60)
    data = TextDataModule(world=world, limit=20)
    data.setup("fit")
    assert len(data.train_texts) == 20
    assert 1 <= len(data.val_texts) <= 3  # 5 % of the different ones


def test_text_mistakes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"body": "two"}')
    (tmp_path / "b.txt").write_text("one\n")
    for path, words in (
        ("a.jsonl", "a.jsonl:2: field 'text'"),
        ("b.txt", "two different texts, got 1"),
        ("c.txt", "not found"),
        ("d.csv", "must be 'world'"),
    ):
        with pytest.raises(InputError, match=words.replace(".", r"\.")):
            TextDataModule(str(tmp_path / path)).setup("fit")
    with pytest.raises(InputError, match="batch_size"):
        TextDataModule(batch_size=0)
