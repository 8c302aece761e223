"""Unpaired texts for training a causal language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from torch.utils.data import DataLoader

from lit_core.datamodule import RankedDataModule
from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.loader import ResumableLoader, plain_loader
from lit_core.progress import track
from lit_core.samplers import HomogeneousBatchSampler, permutation
from lit_embed.data.beir import string_field
from lit_embed.data.dataset import TextDataset
from lit_embed.data.records import TextItem, content_id
from lit_embed.data.world import WorldConfig, build_world

HELD_OUT_TEXTS = (0.05, 200)  # share and most of the texts that validation uses
DEFAULT_WORLD = WorldConfig()


class TextCollating(Protocol):
    """What the data module needs of the LightningModule."""

    def lm_collator(self) -> Callable[[list[TextItem]], Any]:
        """Return a function that makes a batch of texts to train a language model on."""
        ...


class TextDataModule(RankedDataModule):
    """Texts to train a causal language model on; 5 %, at most 200, are held out for validation.

    Equal texts are used once.

    Args:
        path: ``world`` (the built-in unpaired sentences), a ``.txt`` file with a text per line, or a ``.jsonl`` file
            with a field ``text``.
        batch_size: Texts a device gets per step.
        world: The built-in collection.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of order and hold-out.
        limit: Train on this many texts at most, for trials.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        path: str = "world",
        batch_size: int = 32,
        world: WorldConfig = DEFAULT_WORLD,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("limit", 1 if limit is None else limit, 1),
        ):
            if value < least:
                raise InputError(f"must be at least {least}, got {value}", field=name)
        self.path, self.batch_size, self.world = path, batch_size, world
        self.num_workers, self.seed, self.limit = num_workers, seed, limit
        self.train_texts: list[tuple[str, str]] = []
        self.val_texts: list[tuple[str, str]] = []

    def setup(self, stage: str) -> None:
        """Read the texts, once.

        Raises:
            InputError: The file is missing or broken, or has fewer than two texts.
        """
        if self.train_texts:
            return
        texts = [(content_id(text), text) for text in dict.fromkeys(self._read())]
        if len(texts) < 2:
            raise InputError(f"need at least two different texts, got {len(texts)}", self.path)
        share, most = HELD_OUT_TEXTS
        order = permutation(len(texts), self.seed, 4)
        count = min(most, max(1, int(share * len(texts))))
        self.val_texts = [texts[row] for row in sorted(order[:count])]
        self.train_texts = [texts[row] for row in sorted(order[count:])][: self.limit]

    def train_dataloader(self) -> ResumableLoader:
        dataset = TextDataset(self.train_texts)
        whole = len(dataset) >= self.batch_size * self._world_size
        return ResumableLoader(dataset, self._sampler(dataset, drop_last=whole), self._collator(), self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        dataset = TextDataset(self.val_texts)
        sampler = self._sampler(dataset, drop_last=False, shuffle=False)
        collate = self._collator()
        return plain_loader(dataset, sampler, collate, self.num_workers)

    def _sampler(self, dataset: TextDataset, drop_last: bool, shuffle: bool = True) -> HomogeneousBatchSampler:
        return HomogeneousBatchSampler(
            [len(dataset)],
            self.batch_size,
            self.seed,
            self._rank,
            self._world_size,
            drop_last=drop_last,
            shuffle=shuffle,
        )

    def _collator(self) -> Callable[[list[TextItem]], Any]:
        if self.trainer is None:
            raise ValueError("loaders need a trainer: its module tokenises the texts")
        return cast(TextCollating, self.trainer.lightning_module).lm_collator()

    def _read(self) -> list[str]:
        """Return the texts without the empty ones."""
        path = Path(self.path)
        if self.path == "world":
            return build_world(self.world).texts
        if path.suffix == ".jsonl":
            rows = track(read_jsonl(path), f"reading {path.name}", unit="row")
            texts = [string_field(row, "text", path, line).strip() for line, row in rows]
        elif path.suffix == ".txt":
            if not path.is_file():
                raise InputError("file not found", path)
            try:
                texts = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
            except UnicodeDecodeError as error:
                raise InputError(f"not valid UTF-8 ({error})", path) from None
        else:
            raise InputError("must be 'world', a .txt file (a text per line) or a .jsonl file (field 'text')", path)
        return [text for text in texts if text]
