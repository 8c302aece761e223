"""Batch samplers that shard by rank themselves and can go on in mid-epoch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from lit_core.errors import InputError

_MASK = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """Mix integers into one seed of 63 bits that looks random and depends on all of them and on their order."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & _MASK
    return (state ^ (state >> 29)) >> 1


def permutation(count: int, *seed_parts: int) -> list[int]:
    """Return a permutation of ``range(count)`` that depends on the seed alone."""
    generator = torch.Generator().manual_seed(mix_seed(*seed_parts))
    return torch.randperm(count, generator=generator).tolist()


class ResumableBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """Base of samplers whose batches are a function of ``(seed, epoch, step)``, and that can go on in mid-epoch.

    Args:
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.
    """

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.step = 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch, equal on all ranks."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch and begin it at its first batch."""
        self.epoch, self.step = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what the order depends on; the same on all ranks."""
        return {"epoch": self.epoch, "step": self.step, **self.identity(), "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            InputError: The position lies within an epoch whose order was made from other data or settings.
        """
        mine = {**self.identity(), "length": len(self)}
        other = [key for key in mine if state.get(key) != mine[key]]
        if other and 0 < state["step"] < state["length"]:
            key = other[0]
            raise InputError(
                f"the checkpoint lies within an epoch of other data: {key} was {state.get(key)}, is {mine[key]}; "
                "resume with the same data and number of devices"
            )
        complete = state["step"] >= state["length"]
        self.epoch, self.step = state["epoch"], len(self) if complete else state["step"]

    def identity(self) -> dict[str, Any]:
        """What the order depends on."""
        raise NotImplementedError


class HomogeneousBatchSampler(ResumableBatchSampler):
    """Batches of ``(dataset, row, draw_seed)``, each from one dataset, the same dataset on all ranks at a step.

    A batch is a pure function of ``(seed, epoch, step)``; within an epoch no row occurs twice. Ranks take consecutive
    parts of a global batch of ``batch_size * world_size`` rows. With ``drop_last=False`` the rows left at a dataset's
    end make one smaller batch, equally large on all ranks; fewer than ``world_size`` rows may still be left out.

    Args:
        sizes: Rows of each dataset.
        batch_size: Rows a rank gets per step, for all datasets or one number each.
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.
        drop_last: Leave out each dataset's incomplete last batch.
        strategy: ``proportional`` uses every batch of every dataset once an epoch, in random order; ``round_robin``
            takes turns and ends with the smallest dataset.
        shuffle: Draw rows and datasets in random order; otherwise in the order given.

    Raises:
        InputError: A number is out of range, or a dataset has too few rows for a single batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int | Sequence[int],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        strategy: Literal["proportional", "round_robin"] = "proportional",
        shuffle: bool = True,
    ) -> None:
        self.sizes = list(sizes)
        self.batch_sizes = [batch_size] * len(self.sizes) if isinstance(batch_size, int) else list(batch_size)
        if not self.sizes or len(self.batch_sizes) != len(self.sizes):
            raise InputError(f"need one batch size a dataset, got {len(self.batch_sizes)} for {len(self.sizes)}")
        if min(self.batch_sizes) < 1:
            raise InputError(f"must be at least 1, got {min(self.batch_sizes)}", field="batch_size")
        super().__init__(seed, rank, world_size)
        if strategy not in ("proportional", "round_robin"):
            raise InputError(f"must be proportional or round_robin, got '{strategy}'", field="strategy")
        self.drop_last, self.strategy, self.shuffle = drop_last, strategy, shuffle
        self._counts = [self._batch_count(d) for d in range(len(self.sizes))]

    def __len__(self) -> int:
        """Batches in a whole epoch, equal on all ranks."""
        if self.strategy == "round_robin":
            return min(self._counts) * len(self._counts)
        return sum(self._counts)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the batches of the present epoch from the present step on, without moving either."""
        epoch, first = self.epoch, self.step
        orders: dict[int, list[int]] = {}
        for dataset, index in self._schedule(epoch)[first:]:
            if dataset not in orders:
                size = self.sizes[dataset]
                orders[dataset] = permutation(size, self.seed, epoch, dataset) if self.shuffle else list(range(size))
            rows = self._local_rows(dataset, index, orders[dataset])
            yield [(dataset, row, mix_seed(self.seed, epoch, dataset, row)) for row in rows]

    def identity(self) -> dict[str, Any]:
        """What the order depends on."""
        return {
            "seed": self.seed,
            "sizes": self.sizes,
            "batch_sizes": self.batch_sizes,
            "world_size": self.world_size,
            "drop_last": self.drop_last,
            "strategy": self.strategy,
            "shuffle": self.shuffle,
        }

    def _batch_count(self, dataset: int) -> int:
        size, whole = self.sizes[dataset], self.batch_sizes[dataset] * self.world_size
        count = size // whole
        if not self.drop_last and size % whole >= self.world_size:
            count += 1
        if count == 0:
            raise InputError(
                f"dataset {dataset} has {size} rows, too few for a batch of {self.batch_sizes[dataset]} on each of "
                f"{self.world_size} devices; lower batch_size or add data"
            )
        return count

    def _schedule(self, epoch: int) -> list[tuple[int, int]]:
        """Return ``(dataset, index of its batch)`` for every step of the epoch."""
        if self.strategy == "round_robin":
            return [(d, i) for i in range(min(self._counts)) for d in range(len(self._counts))]
        used = [0] * len(self._counts)
        schedule = []
        for dataset in self._slots(epoch):
            schedule.append((dataset, used[dataset]))
            used[dataset] += 1
        return schedule

    def _slots(self, epoch: int) -> list[int]:
        """Return the dataset of every step of the epoch."""
        return self._mixed(range(len(self._counts)), epoch, -1)

    def _mixed(self, datasets: Iterable[int], epoch: int, part: int) -> list[int]:
        """Return the datasets of all batches of some datasets, in random order if shuffled."""
        slots = [dataset for dataset in datasets for _ in range(self._counts[dataset])]
        return [slots[i] for i in permutation(len(slots), self.seed, epoch, part)] if self.shuffle else slots

    def _local_rows(self, dataset: int, index: int, order: list[int]) -> list[int]:
        batch_size = self.batch_sizes[dataset]
        start = index * batch_size * self.world_size
        share = min(batch_size, (len(order) - start) // self.world_size)
        return order[start + self.rank * share : start + (self.rank + 1) * share]


class LengthSortedBatchSampler(Sampler[list[int]]):
    """Batches of indices under a budget of padded tokens, longest texts first; for encoding, not for training.

    Batches are dealt to the ranks in turn. Where they do not come out even, the remaining ranks get a batch of one
    index that another rank has too: consumers drop duplicates by id.

    Args:
        lengths: Length of each text in tokens, or an estimate of it.
        token_budget: Largest ``batch size * longest length``; a longer text makes a batch of its own.
        rank: This process's rank.
        world_size: Number of ranks.

    Raises:
        InputError: There are no texts, or the budget is below 1.
    """

    def __init__(self, lengths: Sequence[int], token_budget: int, rank: int = 0, world_size: int = 1) -> None:
        if not lengths:
            raise InputError("nothing to encode: there are no texts")
        if token_budget < 1:
            raise InputError(f"must be at least 1, got {token_budget}", field="token_budget")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        batches, start = list[list[int]](), 0
        while start < len(order):
            count = max(1, token_budget // max(1, lengths[order[start]]))
            batches.append(order[start : start + count])
            start += count
        batches += [[order[-1]]] * (-len(batches) % world_size)
        self._batches = batches[rank::world_size]

    def __len__(self) -> int:
        """Batches of this rank, equal on all ranks."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
