"""In which order batches of several datasets are trained on: mixed, dataset by dataset, or task type by task type."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from lit_core.errors import InputError
from lit_core.samplers import HomogeneousBatchSampler, ResumableBatchSampler, mix_seed, permutation

DataSchedule = Literal["bls", "dataset", "task", "mixed"]


def schedule_sampler(
    schedule: DataSchedule,
    sizes: Mapping[str, int],
    batch_size: int | Sequence[int],
    types: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ResumableBatchSampler:
    """Build the sampler of a data schedule (BOOM, card section 2.3).

    Args:
        schedule: ``bls`` mixes batches, each of one dataset; ``dataset`` gives all batches of one dataset, then those
            of the next; ``task`` all batches of one task type, its datasets mixed as by ``bls``, then the next;
            ``mixed`` mixes rows, so that a batch has rows of several datasets.
        sizes: Rows of each dataset, by name.
        batch_size: Rows a rank gets per step, for all datasets or one number each; of several numbers ``mixed`` makes
            the one that comes nearest to as many steps (:func:`mixed_batch_size`).
        types: Task type of each dataset, for ``task``.
        order: Datasets or task types in the order of training; by default by decreasing size.
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.

    Raises:
        InputError: A number is out of range, the order does not name each dataset or type once, or the schedule has no
            order.
    """
    if schedule not in get_args(DataSchedule):
        raise InputError(f"must be one of {', '.join(get_args(DataSchedule))}, got '{schedule}'", field="schedule")
    stages = schedule_stages(schedule, sizes, types, order)
    if schedule == "mixed":
        if not isinstance(batch_size, int):
            batch_size = mixed_batch_size(list(sizes.values()), batch_size, world_size)
        return MixedBatchSampler(list(sizes.values()), batch_size, seed, rank, world_size)
    return StagedBatchSampler(list(sizes.values()), batch_size, stages, seed, rank, world_size)


def mixed_batch_size(sizes: Sequence[int], batch_sizes: Sequence[int], world_size: int = 1) -> int:
    """Rows a rank gets per step where rows are mixed, so that an epoch has as nearly as possible as many steps.

    Datasets whose batches are smaller make more steps of their rows; one size for all would make fewer, and a
    comparison of schedules would compare numbers of steps too.

    Args:
        sizes: Rows of each dataset.
        batch_sizes: Rows a rank gets per step of each dataset where batches are of one.
        world_size: Number of ranks.
    """
    wanted = StagedBatchSampler(sizes, batch_sizes, [range(len(sizes))], world_size=world_size)
    rows = sum(sizes) // world_size
    middle = max(1, rows // len(wanted))
    return min((middle, middle + 1), key=lambda size: abs(rows // size - len(wanted)))


def schedule_stages(
    schedule: DataSchedule,
    sizes: Mapping[str, int],
    types: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return which datasets, by number, are mixed with one another, stage by stage; arguments as above."""
    if schedule in ("bls", "mixed"):
        if order is not None:
            raise InputError(f"the schedule '{schedule}' has no order, it mixes everything", field="order")
        return [list(range(len(sizes)))]
    if schedule == "task" and (types is None or types.keys() != sizes.keys()):
        raise InputError("the schedule 'task' needs the task type of each dataset", field="types")
    group = {name: name if schedule == "dataset" or types is None else types[name] for name in sizes}
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        totals[group[name]] = totals.get(group[name], 0) + size
    ordered = sorted(totals, key=lambda name: -totals[name]) if order is None else list(order)  # equal ones stay put
    if sorted(ordered) != sorted(totals):
        what = "dataset" if schedule == "dataset" else "task type"
        raise InputError(f"must name each {what} once: {', '.join(totals)}; got {', '.join(ordered)}", field="order")
    return [[number for number, name in enumerate(sizes) if group[name] == chosen] for chosen in ordered]


class StagedBatchSampler(HomogeneousBatchSampler):
    """Batches of ``(dataset, row, draw_seed)``, each from one dataset, in stages that follow one another.

    Within a stage the batches of its datasets come in random order. One stage of all datasets is batch-level shuffling
    (BLS) and gives the batches of ``HomogeneousBatchSampler``; a stage for each dataset trains on one after another.
    Incomplete last batches of the datasets are left out.

    Args:
        sizes: Rows of each dataset.
        batch_size: Rows a rank gets per step, for all datasets or one number each.
        stages: Numbers of the datasets of each stage; every dataset is in one.
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.

    Raises:
        InputError: A number is out of range, or a dataset has too few rows for a single batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int | Sequence[int],
        stages: Sequence[Sequence[int]],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(sizes, batch_size, seed, rank, world_size)
        self.stages = [list(stage) for stage in stages]
        if sorted(number for stage in self.stages for number in stage) != list(range(len(self.sizes))):
            raise ValueError(f"stages must hold each of {len(self.sizes)} datasets once, got {self.stages}")

    def identity(self) -> dict[str, Any]:
        """What the order depends on."""
        return {**super().identity(), "stages": self.stages}

    def _slots(self, epoch: int) -> list[int]:
        return [slot for number, stage in enumerate(self.stages) for slot in self._mixed(stage, epoch, -1 - number)]


class MixedBatchSampler(ResumableBatchSampler):
    """Batches of ``(dataset, row, draw_seed)`` with rows of several datasets, each in proportion to its size.

    All rows are shuffled together and cut into global batches of ``batch_size * world_size`` rows, of which the ranks
    take consecutive parts; the rows that do not fill a batch are left out, others in every epoch.

    Args:
        sizes: Rows of each dataset.
        batch_size: Rows a rank gets per step.
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.

    Raises:
        InputError: The batch size is below 1, or there are too few rows for a single batch.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(seed, rank, world_size)
        if batch_size < 1:
            raise InputError(f"must be at least 1, got {batch_size}", field="batch_size")
        self.sizes, self.batch_size = list(sizes), batch_size
        if len(self) < 1:
            raise InputError(
                f"the datasets have {sum(self.sizes)} rows together, too few for a batch of {batch_size} on each of "
                f"{world_size} devices; lower batch_size or add data"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch, equal on all ranks."""
        return sum(self.sizes) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the batches of the present epoch from the present step on, without moving either."""
        epoch, first, whole = self.epoch, self.step, self.batch_size * self.world_size
        addresses = [(dataset, row) for dataset, size in enumerate(self.sizes) for row in range(size)]
        order = permutation(len(addresses), self.seed, epoch, -1)
        for step in range(first, len(self)):
            start = step * whole + self.rank * self.batch_size
            rows = [addresses[place] for place in order[start : start + self.batch_size]]
            yield [(dataset, row, mix_seed(self.seed, epoch, dataset, row)) for dataset, row in rows]

    def identity(self) -> dict[str, Any]:
        """What the order depends on."""
        return {name: getattr(self, name) for name in ("seed", "sizes", "batch_size", "world_size")}
