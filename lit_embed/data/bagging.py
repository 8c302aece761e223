"""Bags: which rows of each dataset a member of an ensemble is trained on (BOOM, card sections 2.1 and 2.2).

Every draw is a function of a seed, the dataset's name and the member, in any process and any order. A row's place in a
permutation comes from a counter-based generator (Philox), so neither other datasets nor later draws touch it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from lit_core.errors import InputError
from lit_core.files import read_json, write_json

Rows = NDArray[np.int64]

CORE_RATIO = 40.0  # percent of the rows seen so far that an update is trained on beside the new ones


class DatasetRecord(TypedDict):
    """What a manifest keeps of a dataset: its rows, how many were drawn, and hashes of their numbers and contents."""

    rows: int
    drawn: int
    ids: str
    content: str


@dataclass(frozen=True)
class Bag:
    """A part of every dataset, drawn for one member.

    Args:
        ratio: Percent of each dataset's rows, above 0, at most 100; rounded half up, at least one row.
        member: Number of the member; other members draw independently.
        seed: Seed of all members' draws.
        nested: All members take prefixes of one permutation, so that a smaller part lies within a larger one.
        replace: Draw with replacement, as bagging in the strict sense does: rows repeat, others are missing.
        complement: Take the rows that the bag with otherwise equal fields leaves out.

    Raises:
        InputError: The ratio is not above 0 and at most 100, or the member is below 0.
    """

    ratio: float = 100.0
    member: int = 0
    seed: int = 0
    nested: bool = False
    replace: bool = False
    complement: bool = False

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if self.member < 0:
            raise InputError(f"must be at least 0, got {self.member}", field="member")
        if self.nested and self.replace:
            raise InputError(
                "draws with replacement are no prefixes of a permutation; set nested to false", field="nested"
            )

    def rows(self, dataset: str, size: int) -> Rows:
        """Row numbers drawn from a dataset, in ascending order.

        Args:
            dataset: Its name, on which the draw depends.
            size: Its rows.

        Raises:
            InputError: The dataset is empty, or nothing is left for the complement.
        """
        count = sample_size(size, self.ratio, dataset)
        bits = random_bits(size, self.seed, dataset, "nested" if self.nested else "replace" if self.replace else "bag",
                           -1 if self.nested else self.member)  # fmt: skip
        drawn = np.sort((bits % np.uint64(size)).astype(np.int64)[:count] if self.replace else _permuted(bits)[:count])
        if not self.complement:
            return drawn
        rest = np.setdiff1d(np.arange(size, dtype=np.int64), drawn)
        if not len(rest):
            raise InputError(
                f"a bag of {self.ratio:g} % of the {size} rows of '{dataset}' leaves none for its complement"
            )
        return rest


def sample_size(size: int, ratio: float, dataset: str = "") -> int:
    """Rows that ``ratio`` percent of ``size`` rows are: rounded half up, at least one.

    Raises:
        InputError: There are no rows, or the ratio is not above 0 and at most 100.
    """
    _check_ratio(ratio)
    if size < 1:
        raise InputError(f"the dataset '{dataset}' has no rows to draw from")
    exact = Decimal(str(ratio)) * size / 100  # as written: 0.29 * 100 is below 29 in binary
    return max(1, int(exact.quantize(Decimal(1), ROUND_HALF_UP)))


def core_rows(dataset: str, arrivals: Sequence[Sequence[int] | Rows], seed: int = 0, ratio: float = CORE_RATIO) -> Rows:
    """The sample of rows seen so far that every update is trained on (card section 2.2).

    Each arrival has its own draw, so that the core, once drawn, stays: an update adds a part of its own rows to it.

    Args:
        dataset: Name of the dataset.
        arrivals: Its rows in the order of arrival: those it began with, then those of each update; some may be empty.
        seed: Seed of the draws.
        ratio: Percent of each arrival's rows.

    Returns:
        Row numbers in ascending order.
    """
    parts = [np.zeros(0, dtype=np.int64)]
    for number, rows in enumerate(arrivals):
        if len(rows):
            bits = random_bits(len(rows), seed, dataset, "core", number)
            parts.append(np.asarray(rows, dtype=np.int64)[_permuted(bits)[: sample_size(len(rows), ratio, dataset)]])
    return np.sort(np.concatenate(parts))


def late_rows(dataset: str, size: int, share: float, seed: int = 0) -> Rows:
    """Rows of a dataset that arrive later, ``share`` of them drawn at random, in ascending order."""
    if not 0 < share < 1:
        raise InputError(f"must lie between 0 and 1, got {share}", field="new")
    count = min(sample_size(size, 100 * share, dataset), size - 1)
    return np.sort(_permuted(random_bits(size, seed, dataset, "late", 0))[:count])


def random_bits(count: int, seed: int, dataset: str, purpose: str, number: int) -> NDArray[np.uint64]:
    """``count`` numbers of 64 random bits; the first ones do not depend on ``count``.

    Only raw bits are used: they are the same in every release of numpy, which its shuffles need not be.
    """
    key = blake2b(f"{seed}\0{dataset}\0{purpose}\0{number}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def _permuted(bits: NDArray[np.uint64]) -> Rows:
    return np.argsort(bits, kind="stable").astype(np.int64)


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 100:
        raise InputError(f"must be a percentage above 0, at most 100, got {ratio}", field="ratio")


# What an ensemble costs, and what its members have in common.


def size_weights(ratios: Sequence[float]) -> list[float]:
    """Weights of a merge in proportion to the members' data."""
    for ratio in ratios:
        _check_ratio(ratio)
    return [ratio / sum(ratios) for ratio in ratios]


def training_cost(ratios: Sequence[float]) -> float:
    """Cost of training all members, where one run on all data costs 1."""
    for ratio in ratios:
        _check_ratio(ratio)
    return sum(ratios) / 100


def incremental_cost(old: float, new: float, core: float = CORE_RATIO) -> float:
    """Cost of an update on the new rows and a core of the old ones, where training anew on all costs 1.

    Args:
        old: Number of old rows.
        new: Number of new rows.
        core: Percent of the old rows in the core.
    """
    if not (old >= 0 and new >= 0 and old + new > 0):
        raise InputError(f"needs numbers of rows of at least 0, not both 0, got {old} and {new}")
    return (new + core / 100 * old) / (old + new)


def union_coverage(ratios: Sequence[float]) -> float:
    """Expected share of the rows that at least one of several independent members sees."""
    return 1 - math.prod(1 - ratio / 100 for ratio in ratios)


def expected_overlap(first: float, second: float) -> float:
    """Expected rows in both of two independent samples over those in either (Jaccard), for many rows."""
    both = first * second / 10_000
    return both / (first / 100 + second / 100 - both)


# What is written beside a member, so that it is never gone on with on other rows.


def manifest(bag: Mapping[str, Any], rows: Mapping[str, Rows], sizes: Mapping[str, int], contents: Mapping[str, str],
             with_ids: bool = False) -> dict[str, Any]:  # fmt: skip
    """Describe what a member is trained on.

    Args:
        bag: Fields of the bag and whatever else the draw depends on.
        rows: Row numbers of each dataset, by name.
        sizes: All rows of each dataset.
        contents: A hash of the rows' contents, by dataset.
        with_ids: Hold the row numbers themselves, not only their hash.
    """
    records = {
        name: DatasetRecord(rows=sizes[name], drawn=len(of), ids=rows_hash(of), content=contents[name])
        for name, of in rows.items()
    }
    found: dict[str, Any] = {"bag": dict(bag), "datasets": records}
    return {**found, "ids": {name: of.tolist() for name, of in rows.items()}} if with_ids else found


def rows_hash(rows: Rows) -> str:
    """Hash of row numbers in their order."""
    return blake2b(np.ascontiguousarray(rows, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def write_manifest(path: Path | str, value: Mapping[str, Any]) -> None:
    """Write a manifest, or check that it equals the one that is there.

    Raises:
        InputError: The file describes another member.
    """
    if Path(path).exists():
        check_manifest(read_json(path), value, path)
    else:
        write_json(path, value)


def check_manifest(saved: Mapping[str, Any], present: Mapping[str, Any], path: Path | str | None = None) -> None:
    """Refuse to go on with a member on other rows than it was begun with.

    Raises:
        InputError: The first thing that differs, what it was and what it is.
    """
    before, now = _flat(saved), _flat(present)
    for name in sorted({*before, *now}):
        if name.split("/")[0] != "ids" and before.get(name) != now.get(name):
            raise InputError(
                f"this member was begun on other data: {name} was {before.get(name)}, is {now.get(name)}; go on with "
                "the same data and settings, or begin anew in another folder", path,
            )  # fmt: skip


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {place: value}
    return {
        name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{place}/{key}".lstrip("/")).items()
    }
