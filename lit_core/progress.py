"""One progress bar for all work outside the trainer's own loops."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate with a progress bar that appears only once the work has taken two seconds."""
    yield from tqdm(items, desc=description, total=total, unit=unit, delay=2.0, leave=False, dynamic_ncols=True)
