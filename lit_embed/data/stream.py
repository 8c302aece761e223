"""A stream of pairs as a source: its first rows are held out, the rest is trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from lit_core.errors import InputError
from lit_core.progress import track
from lit_embed.data.records import Collection, Example, merge_examples
from lit_embed.data.sources import OTHER_PASSAGES, Stage, TrainSet, held_out_collection

HELD_OUT_STREAM_ROWS = 400  # half for validation, half for testing


@dataclass
class StreamSource:
    """Rows of a ``datasets.IterableDataset``, read as they come.

    Args:
        name: Name of the dataset.
        rows: The stream.
        parse: Turns a row and its number into an example.
        seed: Seed of the sample of other passages.
    """

    name: str
    rows: Any
    parse: Callable[[Mapping[str, Any], int], Example]
    seed: int = 0

    def train_sets(self) -> list[TrainSet]:
        """Return nothing: ``training_rows`` are read by the loader."""
        return []

    def training_rows(self) -> Any:
        """Return the stream without the rows held out."""
        return self.rows.skip(HELD_OUT_STREAM_ROWS)

    def parse_training(self, row: Mapping[str, Any], number: int) -> Example:
        """Turn a training row into an example; ``number`` counts from the first row after those held out."""
        return self.parse(row, number + HELD_OUT_STREAM_ROWS)

    def collection(self, stage: Stage) -> Collection:
        held_out, others = self._first
        chosen = held_out[::2] if stage == "validate" else held_out[1::2]
        return held_out_collection(self.name, chosen, held_out + others, self.seed)

    def note(self) -> str | None:
        return (
            f"{self.name} is read as a stream: its first {HELD_OUT_STREAM_ROWS} rows are held out, half for validation "
            "and half for testing"
        )

    @cached_property
    def _first(self) -> tuple[list[Example], list[Example]]:
        """Examples held out, and those that lend other passages to the corpus."""
        rows = track(islice(self.rows, HELD_OUT_STREAM_ROWS + OTHER_PASSAGES), "reading the first rows", unit="row")
        parsed = [self.parse(row, number) for number, row in enumerate(rows, start=1)]
        if len(parsed) <= HELD_OUT_STREAM_ROWS:
            raise InputError(
                f"a stream needs more than the {HELD_OUT_STREAM_ROWS} rows that are held out, got {len(parsed)}; "
                "set streaming to false",
                self.name,
            )
        return merge_examples(parsed[:HELD_OUT_STREAM_ROWS]), parsed[HELD_OUT_STREAM_ROWS:]
