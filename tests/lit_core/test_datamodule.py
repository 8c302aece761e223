from types import SimpleNamespace
from typing import Any

from lit_core.datamodule import RankedDataModule


def test_the_rank_is_the_trainers_or_the_only_one() -> None:
    data = RankedDataModule()
    assert (data._rank, data._world_size) == (0, 1)
    trainer: Any = SimpleNamespace(global_rank=2, world_size=4)
    data.trainer = trainer
    assert (data._rank, data._world_size) == (2, 4)
