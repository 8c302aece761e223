"""Training examples from Hugging Face datasets: a hub id, a local folder or a data file; whole or as a stream."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

from lit_core.datasets import load_rows
from lit_core.errors import InputError
from lit_core.progress import track
from lit_core.samplers import mix_seed, permutation
from lit_embed.data.dataset import draw_pair
from lit_embed.data.pairs import PairReader
from lit_embed.data.records import Example, PairItem, merge_examples


def load_examples(
    name_or_path: str,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Read a whole dataset; rows may have any of the layouts of ``lit_embed.data.pairs``.

    Args:
        name_or_path: See ``load_rows``.
        config: See ``load_rows``.
        split: See ``load_rows``.
        columns: The dataset's column for each field, such as ``{"query": "question", "positive": "answer"}``.
        limit: Read this many rows at most.

    Raises:
        InputError: There is no such dataset, or a row is broken; rows are counted from 1.
    """
    rows, parse = load_rows(name_or_path, config, split), row_parser(name_or_path, columns)
    count = len(rows) if limit is None else min(limit, len(rows))
    numbered = enumerate(track(islice(rows, count), f"reading {name_or_path}", count, "row"), start=1)
    return merge_examples(parse(row, number) for number, row in numbered)


def row_parser(source: str, columns: Mapping[str, str] | None = None) -> Callable[[Mapping[str, Any], int], Example]:
    """Return a function that turns a row and its number into an example, after renaming columns."""
    reader, names = PairReader(source), dict(columns or {})

    def parse(row: Mapping[str, Any], number: int) -> Example:
        missing = [column for column in names.values() if column not in row]
        if missing:
            raise InputError(f"no column '{missing[0]}'; the dataset has: {', '.join(row)}", source)
        others = {name: value for name, value in row.items() if name not in names.values()}
        return reader.parse({**others, **{field: row[column] for field, column in names.items()}}, number)

    return parse


class StreamLoader:
    """Batches from a stream of rows that need not end; an epoch is a fixed number of batches.

    Rows are read in windows. A window is merged by query text and shuffled, so a batch has distinct queries; rows that
    do not fill a batch at a window's end are left out. When the stream ends it begins again, in another order. Every
    rank reads the whole stream and takes its part of each global batch: so ranks never run out at different times, and
    the saved position is the same for all. It is exact: the window is read again, the batches handed out are skipped.

    Args:
        rows: A ``datasets.IterableDataset``.
        parse: Turns a row and its number into an example.
        collate: Turns a list of items into a batch.
        batch_size: Rows a rank gets per step.
        steps_per_epoch: Batches that make an epoch.
        name: Name of the dataset.
        negatives: Hard negatives per query.
        own_group_only: See ``PairDataset``.
        seed: Seed of order and draws.
        rank: This process's rank.
        world_size: Number of ranks.
        window: Rows read ahead and shuffled together.
    """

    def __init__(
        self,
        rows: Any,
        parse: Callable[[Mapping[str, Any], int], Example],
        collate: Callable[[list[PairItem]], Any],
        batch_size: int,
        steps_per_epoch: int,
        name: str,
        negatives: int = 0,
        own_group_only: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 8192,
    ) -> None:
        if batch_size < 1 or steps_per_epoch < 1 or window < batch_size * world_size:
            raise InputError(
                f"need batch_size >= 1, steps_per_epoch >= 1 and a window that holds a batch of all devices, got "
                f"{batch_size}, {steps_per_epoch} and {window} for {world_size} devices"
            )
        self.rows, self.parse, self.collate, self.name = rows, parse, collate, name
        self.batch_size, self.steps_per_epoch, self.window = batch_size, steps_per_epoch, window
        self.negatives, self.own_group_only, self.seed = negatives, own_group_only, seed
        self.rank, self.world_size = rank, world_size
        self._beginning = rows.state_dict()
        self._start: dict[str, Any] = {"pass": 0, "window": 0, "rows_read": 0, "rows": self._beginning}
        self._batch = 0  # batches of the present window handed out
        self._batches: Iterator[list[PairItem]] | None = None

    def __len__(self) -> int:
        """Batches an epoch, on every rank."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps_per_epoch):
            if self._batches is None:
                self._batches = self._read()
            yield self.collate(next(self._batches))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream; the same on all ranks."""
        return {**self._start, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self._start = {key: state[key] for key in ("pass", "window", "rows_read", "rows")}
        self._batch, self._batches = state["batch"], None

    def _read(self) -> Iterator[list[PairItem]]:
        """Yield this rank's batches from the present position on, pass after pass."""
        while True:
            self.rows.load_state_dict(deepcopy(self._start["rows"]))
            found, stream = self._batch > 0 or self._start["window"] > 0, iter(self.rows)
            while rows := list(islice(stream, self.window)):
                first = self._start["rows_read"] + 1
                examples = merge_examples(self.parse(row, number) for number, row in enumerate(rows, start=first))
                for batch in self._window_batches(examples)[self._batch :]:
                    found = True
                    self._batch += 1
                    yield batch
                following = {"window": self._start["window"] + 1, "rows_read": self._start["rows_read"] + len(rows)}
                self._start = {**self._start, **following, "rows": self.rows.state_dict()}
                self._batch = 0
            if not found:
                needed = self.batch_size * self.world_size
                raise InputError(f"the stream has too few different queries for one batch of {needed}", self.name)
            self._start = {"pass": self._start["pass"] + 1, "window": 0, "rows_read": 0, "rows": self._beginning}

    def _window_batches(self, examples: list[Example]) -> list[list[PairItem]]:
        """Return this rank's part of the batches of one window."""
        place = (self.seed, self._start["pass"], self._start["window"])
        order, whole = permutation(len(examples), *place), self.batch_size * self.world_size
        starts = range(self.rank * self.batch_size, len(order) // whole * whole, whole)
        return [[self._draw(examples[i], mix_seed(*place, i)) for i in order[s : s + self.batch_size]] for s in starts]

    def _draw(self, example: Example, seed: int) -> PairItem:
        if self.negatives and not example.negatives:
            raise InputError(
                f"query '{example.query_id}' has no negatives but {self.negatives} are asked for", self.name
            )
        return draw_pair(example, self.negatives, seed, self.name, self.own_group_only)
