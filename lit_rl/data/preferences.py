"""Pairs of dialogues, one of them preferred, to train and evaluate reward models on."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lit_core.datamodule import RankedDataModule
from lit_core.errors import InputError
from lit_core.loader import ResumableLoader, plain_loader
from lit_core.samplers import HomogeneousBatchSampler, LengthSortedBatchSampler
from lit_rl.data.preference_rows import (
    Dialogue,
    PreferenceItem,
    hub_preferences,
    read_preferences,
    split_position,
)
from lit_rl.data.preference_tasks import PreferenceTaskConfig, preference_tasks

BUILT_IN = "built_in"
BYTES_PER_TOKEN = 4  # rough, for batching only: the tokenizer belongs to the model
DEFAULT_TASKS = PreferenceTaskConfig()


class PreferenceCollating(Protocol):
    """What the data module needs of the LightningModule: tokenisation belongs to the model."""

    def preference_collator(self) -> Callable[[list[PreferenceItem]], Any]:
        """Return a function that makes a batch of pairs."""
        ...


class PreferenceDataset(Dataset[PreferenceItem]):
    """Pairs, addressed by row, or by ``(dataset, row, seed)`` in training; the seed is not used."""

    def __init__(self, pairs: Sequence[PreferenceItem]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int, int]) -> PreferenceItem:
        return self.pairs[key if isinstance(key, int) else key[1]]


class PreferenceDataModule(RankedDataModule):
    """Pairs of a preferred dialogue and another one.

    What is held out is chosen by a hash of what the user said first, so that no conversation is both trained and
    tested on. A pair whose two dialogues are the same is left out, and a note says how many there were. In evaluation
    a pair may come twice where devices do not share out evenly: drop duplicates by id. The trainer needs
    ``use_distributed_sampler=False``: the samplers shard by rank themselves.

    Args:
        path: ``built_in`` (nothing to download), a JSONL file or a folder of them, or a Hugging Face dataset. A row has
            ``chosen`` and ``rejected``, whole dialogues (Anthropic's HH) or replies to a ``prompt`` (TRL), as texts or
            as messages, and perhaps a ``margin``.
        batch_size: Pairs a device gets per step.
        val_path: File or folder to validate on, instead of a share of ``path``.
        test_path: File or folder to test on, instead of a share of ``path``.
        val_share: Share of ``path`` that is held out to validate on.
        test_share: Share of ``path`` that is held out to test on.
        tasks: The built-in pairs.
        token_budget: Padded tokens of a batch in evaluation, estimated as four bytes each.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of the order.
        split_seed: Seed of what is held out; the same for all seeds, so that they are tested on the same pairs.
        limit: Train on this many pairs at most, for trials.
        hf_split: Split of a Hugging Face dataset.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        path: str = BUILT_IN,
        batch_size: int = 32,
        val_path: str | None = None,
        test_path: str | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        tasks: PreferenceTaskConfig = DEFAULT_TASKS,
        token_budget: int = 8192,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        limit: int | None = None,
        hf_split: str = "train",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1), ("token_budget", token_budget, 1), ("num_workers", num_workers, 0),
            ("limit", 1 if limit is None else limit, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"must be at least {least}, got {value}", field=name)
        self.val_share = val_share if val_path is None else 0.0
        self.test_share = test_share if test_path is None else 0.0
        if min(self.val_share, self.test_share) < 0 or not self.val_share + self.test_share < 1:
            raise InputError(f"shares must be 0 or more and leave something to train on, got {val_share}, {test_share}")
        self.path, self.batch_size, self.val_path, self.test_path = path, batch_size, val_path, test_path
        self.tasks, self.token_budget, self.num_workers = tasks, token_budget, num_workers
        self.seed, self.split_seed, self.limit, self.hf_split = seed, split_seed, limit, hf_split
        self.train_pairs: list[PreferenceItem] = []
        self.val_pairs: list[PreferenceItem] = []
        self.test_pairs: list[PreferenceItem] = []

    def setup(self, stage: str) -> None:
        """Read and split the pairs, once.

        Raises:
            InputError: Something is missing or broken in the data, or a part is empty; the error names file, line and
                field.
        """
        if self.train_pairs:
            return
        pairs = self._read(self.path)
        positions = [split_position(pair["opening"], self.split_seed) for pair in pairs]
        last = self.test_share + self.val_share
        test = [pair for pair, at in zip(pairs, positions, strict=True) if at < self.test_share]
        val = [pair for pair, at in zip(pairs, positions, strict=True) if self.test_share <= at < last]
        train = [pair for pair, at in zip(pairs, positions, strict=True) if at >= last]
        self.test_pairs = test if self.test_path is None else self._read(self.test_path)
        self.val_pairs = val if self.val_path is None else self._read(self.val_path)
        held_out = {pair["opening"] for pair in self.val_pairs + self.test_pairs}
        kept = [pair for pair in train if pair["opening"] not in held_out]
        if len(kept) < len(train):
            rank_zero_info(f"{len(train) - len(kept)} pairs are not trained on: their prompts are held out")
        for name, part in (("train", kept), ("validate", self.val_pairs), ("test", self.test_pairs)):
            if not part:
                raise InputError(f"no pair to {name} on: change val_share, test_share or split_seed", self.path)
        self.train_pairs = kept[: self.limit]
        sizes = (len(self.train_pairs), len(self.val_pairs), len(self.test_pairs))
        rank_zero_info("{} pairs to train on, {} to validate on, {} to test on".format(*sizes))

    def train_dataloader(self) -> ResumableLoader:
        whole = len(self.train_pairs) >= self.batch_size * self._world_size
        sampler = HomogeneousBatchSampler(
            [len(self.train_pairs)], self.batch_size, self.seed, self._rank, self._world_size, drop_last=whole
        )
        return ResumableLoader(PreferenceDataset(self.train_pairs), sampler, self._collator(), self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val_pairs)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test_pairs)

    def predict_dataloader(self) -> DataLoader[Any]:
        # the trainer cannot know that this sampler leaves nothing out
        warnings.filterwarnings("ignore", "You are using a custom batch sampler `LengthSortedBatchSampler`")
        return self._loader(self.test_pairs)

    def _read(self, path: str) -> list[PreferenceItem]:
        if path == BUILT_IN:
            return [
                PreferenceItem(
                    id=f"{BUILT_IN}:{number}",
                    opening=task.request,
                    chosen=task.dialogue(task.chosen),
                    rejected=task.dialogue(task.rejected),
                    margin=0.0,
                )
                for number, task in enumerate(preference_tasks(self.tasks), start=1)
            ]
        local = Path(path).exists() or path.endswith(".jsonl")
        rows = read_preferences(Path(path)) if local else hub_preferences(path, self.hf_split)
        pairs = [row for row in rows if row is not None]
        if len(pairs) < len(rows):
            rank_zero_info(f"{path}: {len(rows) - len(pairs)} of {len(rows)} pairs left out, chosen equals rejected")
        return pairs

    def _loader(self, pairs: list[PreferenceItem]) -> DataLoader[Any]:
        lengths = [2 * max(_tokens(pair["chosen"]), _tokens(pair["rejected"])) for pair in pairs]
        sampler = LengthSortedBatchSampler(lengths, self.token_budget, self._rank, self._world_size)
        return plain_loader(PreferenceDataset(pairs), sampler, self._collator(), self.num_workers)

    def _collator(self) -> Callable[[list[PreferenceItem]], Any]:
        if self.trainer is None:
            raise ValueError("loaders need a trainer: its module tokenises the texts")
        return cast(PreferenceCollating, self.trainer.lightning_module).preference_collator()


def _tokens(dialogue: Dialogue) -> int:
    """Estimated tokens of a dialogue."""
    texts = [dialogue] if isinstance(dialogue, str) else [message["content"] for message in dialogue]
    return 2 + sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN
