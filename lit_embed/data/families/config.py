"""What the families are built from, and what comes out."""

from dataclasses import dataclass

from lit_core.errors import InputError
from lit_embed.data.families.domains import DOMAINS
from lit_embed.data.records import Example
from lit_embed.retrieval.tasks import EvalTask, TaskType


@dataclass(frozen=True)
class FamiliesConfig:
    """Everything the families depend on; equal configurations give equal bytes.

    Args:
        seed: Seed of all draws.
        rows: Examples of the largest training set; the others have fixed shares of it.
        base_rows: Examples for the base in each domain.
        held_out: Domains that are evaluated, but not trained on, one or two of the five.
        wrong: Share of training examples whose positive is another text of the same set, not one with the label or
            meaning asked for. The base's examples are never wrong.
        near_duplicates: Share of training examples that say an earlier one again in other words.
        negatives: Hard negatives of an example, where there are as many.
        overlap: Probability that a query says a word or phrase as passages do; 0 leaves a lexical ranker only function
            words to match.
        values: Values of an attribute in use, of 20.
        test_queries: Queries of a ranking task, and pairs of a task on pairs, at test; validation has half.

    Raises:
        InputError: A field is out of range.
    """

    seed: int = 0
    rows: int = 4000
    base_rows: int = 800
    held_out: tuple[str, ...] = ("festival", "court")
    wrong: float = 0.0
    near_duplicates: float = 0.0
    negatives: int = 7
    overlap: float = 0.3
    values: int = 10
    test_queries: int = 50

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "seed": (0, 2**63 - 1),
            "rows": (80, 20000),
            "base_rows": (10, 20000),
            "wrong": (0, 1),
            "near_duplicates": (0, 0.9),
            "negatives": (1, 32),
            "overlap": (0, 1),
            "values": (5, 20),
            "test_queries": (10, 100),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise InputError(f"must be between {low} and {high}, got {value}", field=f"families.{name}")
        for name in self.held_out:
            if name not in DOMAINS:
                raise InputError(f"no domain '{name}'; choose from {', '.join(DOMAINS)}", field="families.held_out")
        if len(set(self.held_out)) != len(self.held_out) or not 0 < len(self.held_out) <= 2:
            raise InputError(
                f"must be one or two different domains, got {list(self.held_out)}",
                field="families.held_out",
            )


@dataclass(frozen=True)
class TrainTask:
    """A set to train on.

    Args:
        name: Unique among the sets.
        type: What it teaches.
        examples: Queries, all different, with positives and at least one negative each.
        own_group_only: Contrast a query with its own passages alone: other queries' passages often answer it too.
        symmetric: Passages are texts like queries and get the query's prompt.
        instruction: The task in words, for the query's prompt.
        batch_size: Queries of a batch, where the set wants a size of its own.
    """

    name: str
    type: TaskType
    examples: list[Example]
    own_group_only: bool = False
    symmetric: bool = False
    instruction: str = ""
    batch_size: int | None = None


@dataclass(frozen=True)
class Families:
    """All sets and tasks of a configuration.

    Args:
        config: What they were built from.
        train: Sets to train on, of the domains that are not held out.
        base: Sets to pre-train a base on, one for each domain.
        validation: Tasks to validate on; no text is shared with another part.
        test: Tasks to test on.
    """

    config: FamiliesConfig
    train: list[TrainTask]
    base: list[TrainTask]
    validation: list[EvalTask]
    test: list[EvalTask]
