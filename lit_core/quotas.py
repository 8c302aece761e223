"""Batches of several domains, each with its share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from lit_core.errors import InputError
from lit_core.samplers import ResumableBatchSampler, mix_seed, permutation

Quotas = Literal["fixed", "random"]


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers as their shares that add up to ``total``, by the largest remainder; of equal ones the first.

    Args:
        shares: Each above 0; only their ratios matter.
        total: Sum of the numbers.
    """
    exact = [share * total / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (round(counts[i] - exact[i], 9), i))  # sums of shares round
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


class QuotaBatchSampler(ResumableBatchSampler):
    """Batches of ``(domain, row, draw_seed)`` from several domains, domain by domain, in the order given.

    A global batch has ``batch_size * world_size`` rows, of which every rank gets ``batch_size``. No row occurs twice
    in it, unless a domain has fewer rows than its part. A domain begins anew, in another order, when it is used up;
    the others go on where they are, from one epoch into the next. An epoch has as many rows as all domains together,
    up to a batch.

    Args:
        sizes: Rows of each domain, by name.
        shares: Share of each domain; only their ratios matter.
        batch_size: Rows a rank gets per step.
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.
        quotas: ``fixed`` gives each domain its share of every global batch, to the nearest row. ``random`` draws the
            domain of each row by the shares, as a sampler does that draws rows with replacement by the weight
            ``share / actual share``; a batch may then lack a domain.
        synchronous: Every rank has equally many rows of each domain, so that the n-th rows of all ranks are of one
            domain; the shares are then those of a rank's part.

    Raises:
        InputError: A share is not above 0, or a domain has too few rows or no place in a batch.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Mapping[str, float],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        quotas: Quotas = "fixed",
        synchronous: bool = False,
    ) -> None:
        super().__init__(seed, rank, world_size)
        if not sizes or sizes.keys() != shares.keys():
            raise InputError(f"need a share for each domain, got {list(shares)} for {list(sizes)}", field="shares")
        for name, share in shares.items():
            if not 0 < share < float("inf"):
                raise InputError(f"domain '{name}' needs a share above 0, got {share}", field="share")
            if sizes[name] < 1:
                raise InputError(f"domain '{name}' has no rows")
        if batch_size < 1:
            raise InputError(f"must be at least 1, got {batch_size}", field="batch_size")
        if quotas not in get_args(Quotas):
            raise InputError(f"must be {' or '.join(get_args(Quotas))}, got '{quotas}'", field="quotas")
        self.names, self.sizes = list(sizes), list(sizes.values())
        self.shares = [float(shares[name]) for name in sizes]
        self.batch_size, self.quotas, self.synchronous = batch_size, quotas, synchronous
        self.copies = world_size if synchronous else 1  # parts of a global batch that are alike
        self.part = batch_size * world_size // self.copies
        self.counts = largest_remainder(self.shares, self.part)
        if quotas == "fixed":
            self._check_room()
        if len(self) < 1:
            raise InputError(
                f"the domains have {sum(self.sizes)} rows together, too few for a batch of {batch_size} on each of "
                f"{world_size} devices; lower batch_size or add data"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch, equal on all ranks."""
        return sum(self.sizes) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the batches of the present epoch from the present step on, without moving either."""
        epoch, length = self.epoch, len(self)
        orders: dict[int, tuple[int, list[int]]] = {}  # of each domain, with the number of its pass
        for step in range(self.step, length):
            time = epoch * length + step
            mine = list[tuple[int, int, int]]()
            whole = list[tuple[int, int, int]]()
            for domain, count in enumerate(self._counts(time)):
                rows = self._rows(domain, count * self.copies, time, orders)
                keys = [(domain, row, mix_seed(self.seed, time, domain, row, at)) for at, row in enumerate(rows)]
                whole += keys
                mine += keys[self.rank :: self.world_size]
            yield mine if self.synchronous else whole[self.rank :: self.world_size]

    def identity(self) -> dict[str, Any]:
        """What the order depends on."""
        names = ("seed", "names", "sizes", "shares", "batch_size", "world_size", "quotas", "synchronous")
        return {name: getattr(self, name) for name in names}

    def _counts(self, time: int) -> list[int]:
        """Rows of each domain in a part of the global batch."""
        if self.quotas == "fixed":
            return self.counts
        generator = torch.Generator().manual_seed(mix_seed(self.seed, time, -2))
        drawn = torch.multinomial(torch.tensor(self.shares), self.part, replacement=True, generator=generator)
        return torch.bincount(drawn, minlength=len(self.shares)).tolist()

    def _rows(self, domain: int, count: int, time: int, orders: dict[int, tuple[int, list[int]]]) -> list[int]:
        size = self.sizes[domain]
        if self.quotas == "random":
            order = permutation(size, self.seed, domain, time)
            return [order[place % size] for place in range(count)]
        number, place = divmod(time, size // count)  # whole parts of a batch only: none lies in two passes
        if orders.get(domain, (-1, []))[0] != number:
            orders[domain] = number, permutation(size, self.seed, domain, number)
        return orders[domain][1][place * count : (place + 1) * count]

    def _check_room(self) -> None:
        for name, size, share, count in zip(self.names, self.sizes, self.shares, self.counts, strict=True):
            if count == 0:
                raise InputError(
                    f"domain '{name}' has {share / sum(self.shares):.3g} of the rows, which is none of a batch of "
                    f"{self.part}; raise batch_size or its share",
                    field="share",
                )
            if size < count * self.copies:
                raise InputError(
                    f"domain '{name}' has {size} rows, too few for its {count * self.copies} of a batch of "
                    f"{self.batch_size * self.world_size}; lower batch_size or add data"
                )
