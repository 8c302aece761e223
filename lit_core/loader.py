"""A data loader that a checkpoint can continue in mid-epoch, with or without worker processes.

Three habits of the trainer are met here. It calls ``iter()`` before it tells the epoch, so iteration begins only when
the first batch is asked for. It fetches no batch ahead where the loader has a length, but worker processes do, so the
state counts batches handed out. And after a restart from a checkpoint written at the end of an epoch under
``max_steps``, it counts that epoch twice: so epochs are counted here, and the trainer's number is believed only at a
fresh start.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_core.samplers import ResumableBatchSampler


def start_worker(number: int) -> None:
    """Keep tokenizers from starting threads in a worker process: their pool does not survive the fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def plain_loader(
    dataset: Dataset[Any], batches: Sampler[Any], collate: Callable[[list[Any]], Any], num_workers: int
) -> DataLoader[Any]:
    """A loader without a state, for evaluation."""
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers, worker_init_fn=start_worker
    )


class _Position:
    """The loader's place in the sequence of epochs and batches; the trainer finds ``set_epoch`` on ``sampler``."""

    def __init__(self, batches: ResumableBatchSampler) -> None:
        self.batches = batches
        self.sampler = self
        self.trainer_epoch: int | None = None
        self.saved_trainer_epoch: int | None = None
        self.begun = False  # a batch of this epoch was handed out, here or before the checkpoint
        self.restored = False  # a state was loaded and no batch was handed out since
        self.epoch_redone = False  # the trainer may spend a whole epoch of its own on the next batch alone

    def set_epoch(self, epoch: int) -> None:
        self.trainer_epoch = epoch
        if not self.begun:
            self.batches.set_epoch(epoch)

    def begin(self) -> None:
        """Choose where the iteration that begins now starts."""
        batches = self.batches
        complete = batches.step >= len(batches)
        if self.restored:
            self.epoch_redone = complete
            new_epoch = complete or self.trainer_epoch != self.saved_trainer_epoch
        else:
            new_epoch = self.begun and not (self.epoch_redone and batches.step == 1 < len(batches))
            self.epoch_redone = False
        if new_epoch:
            batches.set_epoch(batches.epoch + 1)
        self.begun, self.restored = True, False

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {**self.batches.state_dict(), "begun": self.begun, "trainer_epoch": self.trainer_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)
        self.begun = self.restored = state["begun"]
        self.saved_trainer_epoch = self.trainer_epoch = state["trainer_epoch"]


class ResumableLoader(DataLoader[Any]):
    """A loader whose state counts the batches handed out, not those its workers have fetched ahead.

    The trainer saves the state in its checkpoints and restores it. The global random state is left alone.

    Args:
        dataset: Dataset addressed by ``(dataset, row, seed)``.
        sampler: Batches of such keys.
        collate: Turns a list of items into a batch.
        num_workers: Worker processes; 0 loads in this process.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ResumableBatchSampler,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
    ) -> None:
        self.position = _Position(sampler)
        super().__init__(
            dataset,
            batch_sampler=self.position,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(sampler.seed),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.position.begin()
        for batch in super().__iter__():
            self.position.batches.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches handed out, and what their order depends on."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that ``state`` counts.

        Raises:
            InputError: The state lies within an epoch of other data or settings.
        """
        self.position.load_state_dict(state)
