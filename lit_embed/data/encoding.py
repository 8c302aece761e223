"""What data modules share whose module encodes texts: collators from the trainer's module, loaders of texts."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, cast

from torch.utils.data import DataLoader

from lit_core.datamodule import RankedDataModule
from lit_core.loader import plain_loader
from lit_core.samplers import LengthSortedBatchSampler
from lit_embed.data.dataset import TextDataset
from lit_embed.data.records import PairItem, TextItem

BYTES_PER_TOKEN = 4  # rough, for batching only: the tokenizer belongs to the model


class Collating(Protocol):
    """What a data module needs of the LightningModule: tokenisation belongs to the model."""

    def pair_collator(self, train: bool) -> Callable[[list[PairItem]], Any]:
        """Return a function that makes a batch of training or validation pairs."""
        ...

    def text_collator(self, kind: Literal["query", "passage"]) -> Callable[[list[TextItem]], Any]:
        """Return a function that makes a batch of texts to encode."""
        ...


class EncodingDataModule(RankedDataModule):
    """Base of data modules whose texts the trainer's module encodes.

    Args:
        token_budget: Padded tokens of a batch in encoding, estimated as four bytes each.
        num_workers: Loader processes; 0 loads in the main process.
    """

    def __init__(self, token_budget: int, num_workers: int) -> None:
        super().__init__()
        self.token_budget, self.num_workers = token_budget, num_workers

    @property
    def _module(self) -> Collating:
        if self.trainer is None:
            raise ValueError("loaders need a trainer: its module tokenises the texts")
        return cast(Collating, self.trainer.lightning_module)

    def _text_loader(self, texts: Mapping[str, str], kind: Literal["query", "passage"]) -> DataLoader[Any]:
        lengths = [2 + len(text.encode()) // BYTES_PER_TOKEN for text in texts.values()]
        sampler = LengthSortedBatchSampler(lengths, self.token_budget, self._rank, self._world_size)
        collate = self._module.text_collator(kind)
        return plain_loader(TextDataset(list(texts.items())), sampler, collate, self.num_workers)


def whole_prediction(loaders: list[DataLoader[Any]]) -> list[DataLoader[Any]]:
    """Loaders for prediction; the trainer cannot know that their sampler leaves nothing out, and would say so."""
    warnings.filterwarnings("ignore", "You are using a custom batch sampler `LengthSortedBatchSampler`")
    return loaders
