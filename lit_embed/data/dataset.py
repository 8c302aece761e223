"""Map-style datasets whose items are pure functions of a row and a draw seed."""

import random
from collections.abc import Sequence

from torch.utils.data import Dataset

from lit_core.errors import InputError
from lit_embed.data.records import Example, PairItem, TextItem


def draw_pair(example: Example, negatives: int, seed: int, dataset: str, own_group_only: bool = False) -> PairItem:
    """Draw one positive and ``negatives`` hard negatives from an example, as a function of ``seed`` alone.

    Negatives are drawn without replacement where enough exist, else with replacement.

    Raises:
        ValueError: Negatives are asked for and the example has none.
    """
    if negatives and not example.negatives:
        raise ValueError(f"query '{example.query_id}' has no negatives, {negatives} asked for")
    generator, pool = random.Random(seed), range(len(example.negatives))
    positive = generator.choice(range(len(example.positives)))
    drawn = generator.sample(pool, negatives) if negatives <= len(pool) else generator.choices(pool, k=negatives)
    passages = [example.positives[positive], *(example.negatives[place] for place in drawn)]
    scores = None
    if example.positive_scores is not None and (example.negative_scores is not None or not drawn):
        scores = [example.positive_scores[positive], *((example.negative_scores or ())[place] for place in drawn)]
    return PairItem(
        query=example.query,
        query_id=example.query_id,
        passages=[passage.text for passage in passages],
        passage_ids=[passage.doc_id for passage in passages],
        positive_ids=[passage.doc_id for passage in example.positives],
        own_group_only=own_group_only,
        dataset=dataset,
        seed=seed,
        scores=scores,
    )


class PairDataset(Dataset[PairItem]):
    """Examples of one source, addressed by ``(row, seed)``.

    Args:
        examples: The examples; query texts must be distinct (``merge_examples``), so that distinct rows of a batch
            have distinct queries.
        name: Name of the source, told to the loss and in errors.
        negatives: Hard negatives per query.
        own_group_only: Contrast each query with its own passages alone, where other queries' passages often answer it.
        rows: Numbers of the examples to use, some perhaps more than once; by default all of them.

    Raises:
        InputError: There are no examples, two have the same query, one has no positive, or no negatives though some
            are asked for.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        name: str,
        negatives: int = 0,
        own_group_only: bool = False,
        rows: Sequence[int] | None = None,
    ) -> None:
        if negatives < 0:
            raise InputError(f"must be 0 or more, got {negatives}", field="negatives")
        if not examples:
            raise InputError(f"the training set '{name}' has no examples")
        seen: set[str] = set()
        for example in examples:
            if example.query in seen:
                raise InputError(f"query '{example.query_id}' of '{name}' repeats the text of another; merge the two")
            seen.add(example.query)
            if not example.positives:
                raise InputError(f"query '{example.query_id}' of '{name}' has no positive; give it one or remove it")
            if negatives and not example.negatives:
                raise InputError(
                    f"query '{example.query_id}' of '{name}' has no negatives but {negatives} are asked for; "
                    "mine them (hard_negatives: bm25), add them to the file, or set negatives to 0"
                )
        self.examples, self.name, self.negatives, self.own_group_only = examples, name, negatives, own_group_only
        self.rows = range(len(examples)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> PairItem:
        row, seed = key
        return draw_pair(self.examples[self.rows[row]], self.negatives, seed, self.name, self.own_group_only)


class MixedDataset(Dataset[PairItem]):
    """Several datasets addressed by ``(dataset, row, seed)``, as ``HomogeneousBatchSampler`` yields."""

    def __init__(self, datasets: Sequence[PairDataset]) -> None:
        self.datasets = list(datasets)

    @property
    def sizes(self) -> list[int]:
        """Rows of each dataset."""
        return [len(dataset) for dataset in self.datasets]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, key: tuple[int, int, int]) -> PairItem:
        dataset, row, seed = key
        return self.datasets[dataset][row, seed]


class TextDataset(Dataset[TextItem]):
    """Texts with their ids, addressed by row, or by ``(dataset, row, seed)`` in training; the seed is not used."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: int | tuple[int, int, int]) -> TextItem:
        text_id, text = self.texts[key if isinstance(key, int) else key[1]]
        return TextItem(id=text_id, text=text)
