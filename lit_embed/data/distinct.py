"""Batches of pairs in which equal positives meet as seldom as possible."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from lit_core.errors import InputError
from lit_core.samplers import ResumableBatchSampler, mix_seed, permutation

Address = tuple[int, int]  # dataset, row


class DistinctBatchSampler(ResumableBatchSampler):
    """Batches of ``(dataset, row, draw_seed)``, in which rows of one label are spread over all batches of an epoch.

    A label that ``m`` of the epoch's rows have occurs at most ``ceil(m / batches)`` times in a batch of all ranks, the
    least that is possible: once wherever that can be. A batch is a pure function of ``(seed, epoch, step)``; within an
    epoch no row occurs twice, and rows that do not fill a batch are left out, others in every epoch. A dataset (or all
    of them, where mixed) that is smaller than a batch makes a smaller one, equally large on all ranks.

    Args:
        labels: For each dataset the label of each row; labels are compared across datasets.
        batch_size: Rows a rank gets per step.
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.
        mixed: Draw a batch from all datasets in proportion to their sizes; otherwise each from one dataset, the same
            on all ranks at a step.

    Raises:
        InputError: The batch size is below 1, or a dataset has fewer rows than there are ranks.
    """

    def __init__(
        self,
        labels: Sequence[Sequence[int]],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mixed: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"must be at least 1, got {batch_size}", field="batch_size")
        super().__init__(seed, rank, world_size)
        self.labels, self.batch_size, self.mixed = labels, batch_size, mixed
        addresses = [[(dataset, row) for row in range(len(of))] for dataset, of in enumerate(labels)]
        self._pools: list[list[Address]] = [[a for of in addresses for a in of]] if mixed else addresses
        self._counts: list[int] = []
        for number, pool in enumerate(self._pools):
            if len(pool) < world_size:
                what = "all datasets have" if mixed else f"dataset {number} has"
                raise InputError(f"{what} {len(pool)} rows, too few for {world_size} devices")
            self._counts.append(max(1, len(pool) // (batch_size * world_size)))
        digest = blake2b(b"".join(np.array(of, np.int64).tobytes() for of in labels), digest_size=8)
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        """Batches in a whole epoch, equal on all ranks."""
        return sum(self._counts)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the batches of the present epoch from the present step on, without moving either."""
        epoch, first = self.epoch, self.step
        schedule = [(pool, batch) for pool, count in enumerate(self._counts) for batch in range(count)]
        order = permutation(len(schedule), self.seed, epoch, -1)
        dealt: dict[int, list[Address]] = {}
        for step in order[first:]:
            pool, batch = schedule[step]
            if pool not in dealt:
                dealt[pool] = self._spread(epoch, pool)
            rows = dealt[pool][batch :: self._counts[pool]]
            mixed = permutation(len(rows), self.seed, epoch, pool, batch)  # no rank gets all the frequent labels
            share = len(rows) // self.world_size
            mine = mixed[self.rank * share : (self.rank + 1) * share]
            yield [(*rows[i], mix_seed(self.seed, epoch, *rows[i])) for i in mine]

    def identity(self) -> dict[str, Any]:
        """What the order depends on."""
        return {
            "seed": self.seed,
            "sizes": [len(of) for of in self.labels],
            "labels": self._digest,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "mixed": self.mixed,
        }

    def _spread(self, epoch: int, pool: int) -> list[Address]:
        """The rows of an epoch with those of a label side by side; dealing them out in turn keeps these apart."""
        everyone, batches = self._pools[pool], self._counts[pool]
        whole = min(len(everyone) // batches, self.batch_size * self.world_size)
        used = batches * (whole // self.world_size) * self.world_size
        by_label: dict[int, list[Address]] = {}
        for place in permutation(len(everyone), self.seed, epoch, pool)[:used]:
            dataset, row = everyone[place]
            by_label.setdefault(self.labels[dataset][row], []).append((dataset, row))
        return [address for rows in by_label.values() for address in rows]
